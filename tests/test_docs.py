"""The pages: their Python runs as it stands, their commands parse, their links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import ROWS
from pages import PAGES, ROOT, code_of
from tiny_checkpoint import picture, save_checkpoint

from modeling_prunesid.context import Context
from prunesid_cli import command
from prunesid_cli.baselines.divprune import most_diverse


NAMED = re.compile(r"# (\S+\.py)\n")


def blocks_of(page, language="python"):
    """The blocks of code of a page, each with the name of the file that it is, if it begins with one."""
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    named = [(NAMED.match(block), block) for block in blocks]
    return [(name and name.group(1), block[name.end() :] if name else block) for name, block in named]


def run(*command, folder, path=""):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": path, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("page", ["new_method.md", "new_family.md"])
def test_pages_are_short(page):
    assert len((ROOT / "docs" / page).read_text().splitlines()) <= 85


@pytest.mark.contract
def test_the_page_on_methods_runs(tmp_path):
    """Written, run, saved and loaded elsewhere, on a tiny checkpoint in place of LLaVA's."""
    save_checkpoint(tmp_path / "stock")
    picture().save(tmp_path / "photo.jpg")
    script = []
    for name, block in blocks_of("new_method.md"):
        block = block.replace("llava-hf/llava-1.5-7b-hf", "stock").replace('"budget": 64', '"budget": 8')
        if name is None:
            script.append(block)
        else:
            (tmp_path / name).write_text(block)
    (tmp_path / "script.py").write_text("\n".join(script))
    kept, *answer = run("script.py", folder=tmp_path, path=str(ROOT)).splitlines()
    kept = eval(kept)
    assert len(set(kept)) == 8 and kept == sorted(kept) and answer
    assert "method_divprune.py" in os.listdir(tmp_path / "llava-divprune")
    (tmp_path / "divprune.py").unlink()
    elsewhere = (tmp_path / "elsewhere.py").read_text() + "print(model.config.prunesid_config.method)\n"
    assert run("-c", elsewhere, folder=tmp_path).splitlines()[-1] == "divprune"


def test_the_method_of_the_page_is_divprune(tmp_path, monkeypatch):
    (tmp_path / "page_divprune.py").write_text(dict(blocks_of("new_method.md"))["divprune.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    import page_divprune

    tokens, settings = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0)), None
    for context in (Context(counts=[9, 4, 30]), Context(counts=[9, 4, 30], projected=tokens.flip(0))):
        settings = type("Settings", (), {"method_settings": None, "method": "divprune"})
        found = page_divprune.select(tokens, torch.tensor([9, 4, 30]), settings, context)
        compared = tokens if context.projected is None else context.projected
        for own, indices, count in zip(compared, found.indices, context.counts):
            assert torch.equal(indices[:count], most_diverse(own, count))
    assert page_divprune.needs({}) == {"projected"} and page_divprune.needs({"between": "compared"}) == frozenset()


@pytest.mark.contract
def test_the_page_on_families_declares_one(tmp_path):
    """In a copy of the repository that has no SmolVLM, all that the page says is done, and the contract holds."""
    for folder in ("modeling_prunesid", "prunesid_cli", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "modeling_prunesid" / "modeling_prunesid_smolvlm.py").unlink()
    families, table = tmp_path / "modeling_prunesid" / "families.py", tmp_path / "tests" / "families.py"
    row = '("smolvlm", "smolvlm_vision"), '
    assert row in table.read_text() and '    "smolvlm": "SmolVLM",\n' in families.read_text()
    table.write_text(
        table.read_text()
        .replace(row, "")
        .replace('("idefics3", "idefics3_vision"))', '("idefics3", "idefics3_vision"),)')
    )
    families.write_text(families.read_text().replace('    "smolvlm": "SmolVLM",\n', ""))
    check = "import modeling_prunesid; modeling_prunesid.PruneSIDSmolVLMModel"
    with pytest.raises(AssertionError, match="has no attribute 'PruneSIDSmolVLMModel'"):
        run("-c", check, folder=tmp_path)

    blocks = dict(blocks_of("new_family.md"))
    (tmp_path / "modeling_prunesid" / "modeling_prunesid_smolvlm.py").write_text(
        blocks.pop("modeling_prunesid/modeling_prunesid_smolvlm.py")
    )
    families.write_text(
        families.read_text().replace("FAMILIES = {\n", "FAMILIES = {\n" + blocks.pop("modeling_prunesid/families.py"))
    )
    table.write_text(table.read_text() + blocks.pop("tests/families.py"))
    assert not blocks
    ((_, command),) = blocks_of("new_family.md", "bash")
    python, *arguments = shlex.split(command)
    assert python == "python"
    arguments = [*arguments, "-q", "-p", "no:cacheprovider"]
    if not any(row.is_installed for row in ROWS.values() if row.family == "smolvlm"):  # in an older Transformers
        with pytest.raises(AssertionError, match=r"\d+ deselected"):
            run(*arguments, folder=tmp_path)
        return
    told = run(*arguments, folder=tmp_path)
    assert re.search(r"\b[12][0-9] passed, \d+ deselected", told), told


RUN_TOGETHER = [page for page in PAGES if page not in ("docs/new_method.md", "docs/new_family.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.contract
def test_the_python_of_every_page_runs(tmp_path):
    """From top to bottom, with a tiny checkpoint in place of that on the Hub, and budgets below its 49 tokens."""
    save_checkpoint(tmp_path / "llava-hf" / "llava-1.5-7b-hf")
    picture().save(tmp_path / "photo.jpg")
    script = [f"import sys; sys.path.insert(0, {str(ROOT)!r})"]
    budget = re.compile(r'("budget": |budget=|num_visual_tokens ?= ?)64')
    for page in RUN_TOGETHER:
        code = budget.sub(r"\g<1>8", "\n".join(code_of(page, "python")))
        script.append(f"exec(compile({code!r}, {page!r}, 'exec'), {{}})")
    (tmp_path / "pages.py").write_text("\n".join(script))
    run("pages.py", folder=tmp_path, path=str(ROOT))
    assert (tmp_path / "kept.png").exists() and (tmp_path / "llava-64-full" / "model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_parse_and_its_scripts_exist(page):
    for line in "".join(code_of(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)
        while words and (words[0] in ("for", "do", "done") or words[0].endswith(";")):
            words = words[words.index("do") + 1 :] if "do" in words else words[1:]
        if words[:1] == ["prunesid"]:
            words = words[: next((place for place, word in enumerate(words) if word in ("&", "&&", ";")), None)]
            name = words[1]
            module = command.import_command(name)
            command.build_parser(name, module).parse_args(words[1:])
        for place, word in enumerate(words):
            if word.startswith("scripts/"):
                assert (ROOT / word).exists(), line
            if words[place - 1] == "-m" and word.startswith("prunesid_cli."):
                assert (ROOT / (word.replace(".", "/") + ".py")).exists(), line


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "embedded/README.md"])
def test_its_links_lead_somewhere(page):
    path = ROOT / page
    for target in LINK.findall(re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_page_on_families_is_that_of_the_declared_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import families_page

    assert families_page.PAGE.read_text().endswith(families_page.tables()), "run scripts/families_page.py"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(Path(page).name in navigation for page in PAGES if page.startswith("docs/"))
