"""Writes the tables of docs/families.md from the declared families: their names, docstrings and releases.

python scripts/families_page.py          # after a family was added; a test compares the page
"""

import re
from pathlib import Path

from modeling_prunesid.families import _OWN, _RELEASES, FAMILIES, UNSUPPORTED
from modeling_prunesid.presets import preset_names, read_preset


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
TABLES = "<!-- written by scripts/families_page.py -->\n"


def tables() -> str:
    lines = [
        "## Families",
        "",
        "| model | `PruneSID...` | tokens are chosen | since | presets |",
        "|---|---|---|---|---|",
    ]
    for family, name in sorted(FAMILIES.items()):
        source = (ROOT / "modeling_prunesid" / f"modeling_prunesid_{family}.py").read_text()
        [title, where] = re.search(r'^"""\s*(.*?)\.?(?:"""|\n)', source)[1].split(" with PruneSID: ")
        where = re.sub("^tokens are (chosen|compared) ", "", where)
        where = re.sub(",? and keep their positions.*", "; positions kept", where).partition(", and")[0]
        since = "this package" if family in _OWN else _RELEASES.get(family, "5.18.0")
        presets = len([preset for preset in preset_names() if family in read_preset(preset).model_types])
        lines.append(f"| {title} | `{name}` | {where} | {since} | {presets or ''} |")
    lines += ["", "## Unsupported models", "", "| `model_type` | why |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in UNSUPPORTED.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(TABLES)] + TABLES + "\n" + tables())


if __name__ == "__main__":
    main()
