"""The Python files of a repo beside those that the installed package writes for its settings. None of them runs."""

import ast
import difflib
import io
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
from modeling_prunesid.repo_code import SOURCES, carry_code, files_imported_by, state_release
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
        `ValueError`: for a repo without a PruneSID or ViTCoP configuration.
        `OSError`: if there is no such repo, or it cannot be reached.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["**.py", "*.json"]))
    files = {path.relative_to(folder).as_posix(): _read(path) for path in sorted(folder.rglob("*.py"))}
    fields = read_fields(folder, CONFIG_NAME, {}) or {}
    expected = _expected(name, fields)
    elsewhere = [str(place) for place in (fields.get("auto_map") or {}).values() if "--" in str(place)]
    problems = [f"Code of another repo runs: {place}. Read it as well." for place in elsewhere]
    rows = []
    for file, source in files.items():
        lines, own = source.splitlines(), expected.get(file)
        found = "as the package writes it"
        if own is None:
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


def _expected(name: str, fields: dict[str, Any]) -> dict[str, str]:
    """The sources by file that the package writes for the settings in a `config.json`."""
    given = fields.get("prunesid_config") or fields.get("vitcop_config")
    classes = [*(fields.get("auto_map") or {}).values()]
    modules = {str(own).rpartition("--")[2].partition(".")[0] for own in classes}
    own = next((module for module in sorted(modules) if module.startswith("modeling_")), None)
    if not isinstance(given, dict) or own is None or not (SOURCES / f"{own}.py").exists():
        raise ValueError(
            f"{name} is no repo of this package: its {CONFIG_NAME} names no settings of PruneSID, or no code of a "
            f"family that version {modeling_prunesid.__version__} has. Name a variant, or upgrade the package."
        )
    method = given.get("method")
    if method is not None and method not in methods.MODULES:  # registered by whoever saved it, in a file of its own
        given = {**given, "method": "paper", "method_settings": None}
    settings_class = ViTCoPConfig if given.get("model_type") == "vitcop" else PruneSIDConfig
    settings = settings_class.from_dict(given)
    with tempfile.TemporaryDirectory() as copied:
        for module in modules:
            for file in files_imported_by(f"{module}.py", SOURCES):
                shutil.copy(SOURCES / file, copied)
        carry_code(copied, own, settings, methods, thin=settings.base_model_name_or_path is not None)
        state_release(copied, own)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(copied).glob("*.py")}


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
