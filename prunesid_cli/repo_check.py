"""The Python files of a repo beside those that the installed package writes for its settings. None of them runs."""

import ast
import difflib
import io
import re
import shutil
import tempfile
import tokenize
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import CONFIG_NAME

import modeling_prunesid
from modeling_prunesid import methods
from modeling_prunesid.configuration_prunesid import PruneSIDConfig
from modeling_prunesid.modeling_vitcop_llava import ViTCoPConfig
from modeling_prunesid.repo_code import (
    SOURCES,
    carried_parts,
    carried_source,
    carry_code,
    files_imported_by,
    state_release,
)
from modeling_prunesid.repo_files import read_fields


_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def check_repo(name: str, revision: str | None = None) -> tuple[list[dict[str, str]], list[str]]:
    """
    Compares the code of a repo with the package's.

    Args:
        name (`str`): of a repo on the Hub, or a folder.
        revision (`str`, *optional*): of a repo.

    Returns:
        A row for each Python file, and one for all of them; and what should be read before it runs, a sentence each.

    Raises:
        `ValueError`: for a repo without a PruneSID or ViTCoP configuration, or a file; for a folder with a revision.
        `OSError`: if there is no such repo, or it cannot be reached.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name} is a file. Name the folder that it is in, or a repo on the Hub.")
    if folder.is_dir() and revision is not None:
        raise ValueError(f"--revision={revision} is of a repo on the Hub, and {name} is a folder. Leave it out.")
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["**.py", "*.json"]))
    paths = [path for path in sorted(folder.rglob("*.py")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): _read(path) for path in paths}
    fields = read_fields(folder, CONFIG_NAME, {}) or {}
    expected = _expected(name, fields, files)
    # Processors and tokenizers name their code in files of their own.
    every = [fields, *(read_fields(folder, path.name, {}) or {} for path in sorted(folder.glob("*_config.json")))]
    elsewhere = dict.fromkeys(place for own in every for place in _named_code(own) if "--" in place)
    problems = [f"Code of another repo runs: {place}. Read it as well." for place in elsewhere]
    rows = []
    for file, source in files.items():
        lines, own = source.splitlines(), expected.get(file)
        found = "as the package writes it"
        if own != source and (SOURCES / file).is_file() and _read(SOURCES / file) == source:
            found = "as in the package"  # whole, as the embedded folder has it
        elif own is None:
            found = "not of the package"
            problems.append(f"{file} is not of the package. Read it before you pass trust_remote_code=True.")
        elif own != source:
            changed = sum(line[0] in "+-" for line in difflib.ndiff(own.splitlines(), lines))
            found = f"differs in {changed} lines"
            problems.append(
                f"{file} differs from the package's in {changed} lines: another version wrote it, or it was edited. "
                "Read what differs."
            )
        rows.append(_row(file, len(lines), count_code(source), found))
    problems += [f"{file} is missing, and the code needs it." for file in sorted(expected.keys() - files.keys())]
    all_lines = sum(len(source.splitlines()) for source in files.values())
    rows.append(_row(f"{len(files)} files", all_lines, sum(map(count_code, files.values()))))
    return rows, problems


def _row(file: str, lines: int, of_code: int, found: str = "") -> dict[str, str]:
    return {"file": file, "lines": f"{lines:,}", "of code": f"{of_code:,}", "found": found}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _expected(name: str, fields: dict[str, Any], files: dict[str, str]) -> dict[str, str | None]:
    """
    The sources by file that the package writes for the settings in a `config.json`; None is a file of somebody else's.
    """
    given = fields.get("prunesid_config") or fields.get("vitcop_config")
    modules = {place.rpartition("--")[2].partition(".")[0] for place in _places_in(fields.get("auto_map"))}
    own = next((module for module in sorted(modules) if module.startswith("modeling_")), None)
    if not isinstance(given, dict) or own is None or not (SOURCES / f"{own}.py").exists():
        raise ValueError(
            f"{name} is no repo of this package: its {CONFIG_NAME} names no settings of PruneSID, or no code of a "
            f"family that version {modeling_prunesid.__version__} has. Name a variant, or upgrade the package."
        )
    method: Any = given.get("method")
    is_registered = isinstance(method, str) and method.isidentifier() and method not in methods.MODULES
    if is_registered:  # by whoever saved it, in a file of its own
        given = {**given, "method": methods.DEFAULT_METHOD, "method_settings": None}
    settings_class = ViTCoPConfig if given.get("model_type") == "vitcop" else PruneSIDConfig
    settings = settings_class.from_dict(given)
    with tempfile.TemporaryDirectory() as copied:
        for module in modules:
            for file in files_imported_by(f"{module}.py", SOURCES):
                shutil.copy(SOURCES / file, copied)
        carry_code(copied, own, settings, methods, thin=settings.base_model_name_or_path is not None)
        state_release(copied, own)
        if not is_registered:
            return {path.name: _read(path) for path in Path(copied).glob("*.py")}
        # What it needs, its own code knows alone: any of the package's parts. It is read, and does not run.
        needed = re.findall(r"^from \..* as ([A-Z]+)$", files.get("parts.py", ""), re.MULTILINE)
        parts, carried = (_read(Path(copied, file)) for file in ("parts.py", "methods.py"))
        written = {"parts.py": carried_parts(needed, parts), "methods.py": carried_source(method, carried)}
        written[f"method_{method}.py"] = files.get(f"method_{method}.py", "")
        for file, source in written.items():
            Path(copied, file).write_text(source, encoding="utf-8")
        found = files_imported_by(f"{own}.py", Path(copied), or_package=True)
        places = {file: Path(copied, file) if Path(copied, file).exists() else SOURCES / file for file in found}
        return {**{file: _read(place) for file, place in places.items()}, f"method_{method}.py": None}


def _named_code(fields: Any) -> list[str]:
    """Where a JSON file says that code is, of any of its parts: `"file.Class"`, `"org/name--file.Class"`."""
    if not isinstance(fields, dict):
        return []
    nested = [place for value in fields.values() for place in _named_code(value)]
    return [*_places_in(fields.get("auto_map")), *nested]


def _places_in(auto_map: Any) -> list[str]:
    values = auto_map.values() if isinstance(auto_map, dict) else []
    places = [place for value in values for place in (value if isinstance(value, list) else [value])]
    return [place for place in places if isinstance(place, str)]  # a slow and a fast tokenizer, or one of them


def count_code(source: str) -> int:
    """The lines of a source without comments, docstrings and blank ones; all lines of what is no Python."""
    lines: set[int] = set()
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type not in _NO_CODE:
                lines.update(range(token.start[0], token.end[0] + 1))
        tree = ast.parse(source)
    except (SyntaxError, tokenize.TokenError, ValueError):
        return len(source.splitlines())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first: Any = node.body[0]
            lines.difference_update(range(first.lineno, first.end_lineno + 1))
    return len(lines)
