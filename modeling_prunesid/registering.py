"""Methods from files outside of the package: registered, and carried to the Hub. It does not travel with a repo."""

from typing import Any

from .methods import METHODS, MODULES


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
