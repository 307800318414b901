"""Methods from files outside of the package: registered, and carried to the Hub. It does not travel with a repo."""

import inspect
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .methods import METHODS, MODULES, module_of


def register_method(name: str, module: Any) -> None:
    """
    Add a method, for `prunesid_config.method` to name. A model that is saved with it carries the module's file.

    Args:
        name (`str`): a Python name that no other method has.
        module: an imported module of one file, with `select`, `needs`, `DEFAULTS` and `RULES` as the methods of the
            package have them, which imports the package as `from modeling_prunesid.<file> import ...`.

    Raises:
        `ValueError`: for another name, or a module that lacks one of the four.
    """
    if not name.isidentifier() or name in MODULES:
        raise ValueError(f"name must be a Python name and none of {tuple(MODULES)}, got {name!r}. Take another.")
    missing = [part for part in ("select", "needs", "DEFAULTS", "RULES") if not hasattr(module, part)]
    if missing:
        raise ValueError(f"module {module.__name__!r} of method {name!r} lacks {', '.join(missing)}. Define them.")
    METHODS[name], MODULES[name] = module.select, module.__name__


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
