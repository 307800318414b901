"""The methods that choose tokens: by name, what each reads, and what settings it has of its own.

A method is a file with `select(views, counts, settings, context) -> Selection`, `needs`, `DEFAULTS` and `RULES`. Those
of the package are `method_<name>.py` and have two lines below; others are added by `register_method`. A repository on
the Hub carries its own method alone: `carried_source`, `method_source`.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from .method_paper import select as paper
from .method_release import select as release
from .method_spread import select as spread


METHODS: dict[str, Callable] = {
    "paper": paper,
    "release": release,
    "spread": spread,
}
# The module of each method. A configuration knows methods by name alone: pickled by value, as vLLM does, it takes no
# selector along.
MODULES = {name: f"{__name__.rpartition('.')[0]}.method_{name}" for name in METHODS}
DEFAULT_METHOD = next(iter(MODULES))
# What a method may need that is read in the layer of the tower whose CLS attention is watched.
OF_CLS = frozenset({"cls_attention", "joined_attention", "keys"})


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


def method_of(name: str, field: str = "prunesid_config.method") -> Callable:
    """The `select` of a method. `ValueError` if no such method is carried here."""
    check_name(name, field)
    return METHODS[name]


def check_name(name: str, field: str = "prunesid_config.method") -> None:
    """Raise a `ValueError` for a method that is not carried here."""
    if name not in MODULES:
        raise ValueError(
            f"{field} must be one of {tuple(MODULES)}, the methods that are carried here, got {name!r}. A model "
            "saved on the Hub carries its own method only: convert it with the package to change it. A method of your "
            "own must first be registered: register_method(name, module)."
        )


def needs_of(settings: Any) -> frozenset[str]:
    """What of a `Context` the method of the settings reads: `"cls_attention"`, `"attention"`, `"projected"`, ..."""
    return _module_of(settings.method).needs(settings.method_settings or {})


def options_of(settings: Any) -> dict:
    """The method's own settings, with its defaults."""
    return _module_of(settings.method).DEFAULTS | (settings.method_settings or {})


def check_method(name: str, method_settings: dict | None, field: str = "prunesid_config.method_settings") -> None:
    """Raise a `ValueError` for a method that is not carried here, or settings that are none of its own."""
    rules = _module_of(name).RULES
    for setting, value in (method_settings or {}).items():
        if setting not in rules:
            raise ValueError(f"{field} of method {name!r} may have {tuple(rules)}, got {setting!r}. Remove it.")
        is_valid, description = rules[setting]
        if not is_valid(value):
            raise ValueError(f"{field}[{setting!r}] must be {description}, got {value!r}.")


def method_of_saved(fields: dict) -> tuple[str, dict]:
    """
    The method and its settings of a configuration saved by 0.1.0.

    Args:
        fields (`dict`): of which `score`, `center`, `quota`, `keep_cls`, `grouping` and `seed` are read, each of them
            optional.
    """
    given = {"score": "component", "center": "tokens", "quota": "proportional", "keep_cls": False}
    given |= {"grouping": "psca", "seed": 0}
    given |= {name: fields[name] for name in given if name in fields}
    if given["quota"] == "spread":
        name, unread = "spread", {"quota", "grouping", "seed"}
    elif (given["score"], given["center"], given["quota"], given["keep_cls"]) == (
        "component",
        "tokens",
        "proportional",
        False,
    ):
        name, unread = "paper", {"score", "center", "quota", "keep_cls"}
    else:
        name, unread = "release", set()
    defaults = _module_of(name).DEFAULTS
    return name, {key: value for key, value in given.items() if key not in unread and value != defaults[key]}


def carried_source(name: str) -> str:
    """The source of this file for a repository that carries one method."""
    check_name(name)
    source = inspect.getsource(sys.modules[__name__])
    source = re.sub(
        r"(from \.method_\w+ import .*\n)+", f"from .method_{name} import select as {name}\n", source, count=1
    )
    return re.sub(r'(    "\w+": \w+,\n)+', f'    "{name}": {name},\n', source, count=1)


def method_source(name: str) -> str:
    """The source of a method's file for a repository, where the package's files lie beside it."""
    source = inspect.getsource(_module_of(name))
    return re.sub(r"^from modeling_prunesid\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)


def _module_of(name: str) -> Any:
    check_name(name)
    module = MODULES[name]
    return sys.modules[module] if module in sys.modules else importlib.import_module(module)
