"""Methods from files outside of the package: registered, and carried to the Hub. It does not travel with a repo."""

import inspect
import re
import sys
from typing import Any

from .methods import METHODS, MODULES, check_name, module_of


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


def carried_source(name: str, reads_question: bool = False, reads_attention: bool = False) -> str:
    """The source of `methods.py` for a repository that carries one method."""
    check_name(name)
    source = inspect.getsource(sys.modules[check_name.__module__])
    source = re.sub(
        r"(from \.method_\w+ import .*\n)+", f"from .method_{name} import select as {name}\n", source, count=1
    )
    source = re.sub(r'(    "\w+": \w+,\n)+', f'    "{name}": {name},\n', source, count=1)
    if not reads_question:
        source = re.sub(r"from \.question import .*\n", "", source, count=1)
        source = re.sub(r"^QUESTION: Any = .*$", "QUESTION: Any = None", source, count=1, flags=re.MULTILINE)
    if not reads_attention:
        source = re.sub(r"from \.attention import .*\n", "", source, count=1)
        source = re.sub(r"^ATTENTION: Any = .*$", "ATTENTION: Any = None", source, count=1, flags=re.MULTILINE)
    return source


def method_source(name: str) -> str:
    """The source of a method's file for a repository, where the package's files lie beside it."""
    source = inspect.getsource(module_of(name))
    return re.sub(r"^from modeling_prunesid\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)
