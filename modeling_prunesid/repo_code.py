"""The code of a repo: that of its model's family, and of what its settings need. It does not travel with a repo."""

import ast
import inspect
import re
import shutil
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

from .families import first_release
from .methods import DEFAULT_METHOD, module_of
from .parts import OF_CLS


SOURCES = Path(__file__).parent
# What settings may need, and the name in `parts.py` of the code for it.
_PARTS = {"attention": "ATTENTION", "grouping": "GROUPING", "relevance": "QUESTION"}
_PARTS |= {"dynamic": "DYNAMIC", **dict.fromkeys(OF_CLS, "CLS")}


def carry_code(folder: Any, module: str, settings: Any, methods: Any, thin: bool, is_own: bool = True) -> None:
    """
    Leave in a folder of copied code what the model needs: `methods.py` names its own method alone, a registered one
    has its file beside it, `parts.py` has None for what it does not need, and files that nothing imports any more are
    removed.

    Args:
        folder (`str` or `os.PathLike`), module (`str`): that of the family's classes in it.
        settings: the model's (`PruneSIDConfig`, or those of ViTCoP).
        methods: the module `methods` that the model runs.
        thin (`bool`): whether the repo has no weights.
        is_own (`bool`): whether the code is the package's, and not that of a repo, which has its method already.

    Raises:
        `ValueError`: for a registered method that imports a file outside of the package.
    """
    folder, own = Path(folder), f"{module}.py"
    name, needs = DEFAULT_METHOD, OF_CLS  # ViTCoP has none, and reads CLS
    if hasattr(settings, "method"):
        name = settings.method
        # Of its defaults as well, which are those of every `PruneSIDConfig` in the repo.
        needs = methods.needs_of(settings) | methods.module_of(name).needs({})
    needs |= {"dynamic"} if settings.dynamic else set()
    given = files_imported_by(own, folder) | files_imported_by("parts.py", SOURCES)
    parts = [part for need, part in _PARTS.items() if need in needs] + ["THIN"] * thin
    for file, write in (("methods.py", partial(carried_source, name)), ("parts.py", partial(carried_parts, parts))):
        (folder / file).write_text(write((folder / file).read_text(encoding="utf-8")), encoding="utf-8")
    method = folder / f"method_{name}.py"
    if is_own and not (SOURCES / method.name).exists():
        method.write_text(method_source(name), encoding="utf-8")
        for imported in _imports(method):
            if not (SOURCES / imported).exists():
                raise ValueError(
                    f"prunesid_config.method={name!r} imports {imported}, which does not travel with a model: only "
                    "its own file does, and what that imports of modeling_prunesid. Move what it needs into the file."
                )
    carried = files_imported_by(own, folder, or_package=True)
    for name in carried:
        if not (folder / name).exists():
            shutil.copy(SOURCES / name, folder)
    for name in given - carried:
        (folder / name).unlink(missing_ok=True)


def state_release(folder: Any, module: str) -> None:
    """
    The family's file in a repo first says which Transformers it needs: in an older one, the imports that follow fail
    in words that name no release.
    """
    path = Path(folder, f"{module}.py")
    source = path.read_text(encoding="utf-8") if path.exists() else ""
    imports = [node.lineno for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    if not imports or "check_transformers" in source:
        return
    lines, release = source.splitlines(keepends=True), first_release(module.removeprefix("modeling_prunesid_"))
    lines.insert(imports[0] - 1, f'from .checks import check_transformers\n\n\ncheck_transformers("{release}")\n\n')
    path.write_text("".join(lines), encoding="utf-8")


def files_imported_by(name: str, folder: Path, or_package: bool = False) -> set[str]:
    """The code files in the folder (or else in the package) that this one imports, directly or not, and itself."""
    found: set[str] = set()
    names = [name]
    while names:
        name = names.pop()
        path = SOURCES / name if or_package and not (folder / name).exists() else folder / name
        if name not in found and path.exists():
            found.add(name)
            names += _imports(path)
    return found


def _imports(path: Path) -> list[str]:
    return [f"{module}.py" for module in get_relative_imports(path)]


def carried_source(name: str, source: str) -> str:
    """The source of `methods.py` for a repository that carries one method."""
    source = re.sub(
        r"(from \.method_\w+ import .*\n)+", f"from .method_{name} import select as {name}\n", source, count=1
    )
    return re.sub(r'(    "\w+": \w+,\n)+', f'    "{name}": {name},\n', source, count=1)


def carried_parts(needed: Collection[str], source: str) -> str:
    """The source of `parts.py`, in place of another one, for a repository that carries the parts of these names."""
    own = Path(__file__).with_name("parts.py").read_text(encoding="utf-8")
    for line in re.findall(r"^from \..* as [A-Z]+$", own, re.MULTILINE):
        name = line.split()[-1]
        new = line if name in needed else f"{name} = None"
        source = re.sub(rf"^(from \..* as {name}|{name} = None)$", new, source, flags=re.MULTILINE)
    return source


def method_source(name: str) -> str:
    """The source of a method's file for a repository, where the package's files lie beside it."""
    source = inspect.getsource(module_of(name))
    return re.sub(r"^from modeling_prunesid\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)
