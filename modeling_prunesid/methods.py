"""The methods that choose tokens: by name, what each reads, and what settings it has of its own.

A method is a file with `select(views, counts, settings, context) -> Selection`, `needs`, `DEFAULTS` and `RULES`. Those
of the package are `method_<name>.py` and have two lines below; `registering.py` adds others. A repository on the Hub
carries its own method alone.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

from .method_paper import select as paper
from .method_release import select as release
from .method_spread import select as spread
from .parts import CARRIED, missing_part


METHODS: dict[str, Callable] = {
    "paper": paper,
    "release": release,
    "spread": spread,
}
# The module of each method. A configuration knows methods by name alone: pickled by value, as vLLM does, it takes no
# selector along.
MODULES = {name: f"{__name__.rpartition('.')[0]}.method_{name}" for name in METHODS}
DEFAULT_METHOD = next(iter(MODULES))


def method_of(name: str, field: str = "prunesid_config.method") -> Callable:
    """The `select` of a method. `ValueError` if no such method is carried here."""
    check_name(name, field)
    return METHODS[name]


def check_name(name: str, field: str = "prunesid_config.method") -> None:
    """Raise a `ValueError` for a method that is not carried here."""
    if name not in MODULES:
        raise ValueError(
            f"{field} must be one of {tuple(MODULES)}, got {name!r}. Add your own with `register_method`. A Hub "
            "repository has the code of its own method only: convert it with the package to change the method."
        )


def needs_of(settings: Any) -> frozenset[str]:
    """What of a `Context` the method of the settings reads: `"cls_attention"`, `"attention"`, `"projected"`, ..."""
    return module_of(settings.method).needs(settings.method_settings or {})


def reads_question(settings: Any) -> bool:
    """Whether the tokens of a view depend on the question of its prompt."""
    return "relevance" in needs_of(settings)


def options_of(settings: Any) -> dict:
    """The method's own settings, with its defaults."""
    return module_of(settings.method).DEFAULTS | (settings.method_settings or {})


def check_method(name: str, method_settings: dict | None, field: str = "prunesid_config.method_settings") -> None:
    """Raise a `ValueError` for a method that is not carried here, or settings that are none of its own."""
    rules = module_of(name).RULES
    for setting, value in (method_settings or {}).items():
        if setting not in rules:
            raise ValueError(f"{field} of method {name!r} may have {tuple(rules)}, got {setting!r}. Remove it.")
        is_valid, description = rules[setting]
        if not is_valid(value):
            raise ValueError(f"{field}[{setting!r}] must be {description}, got {value!r}.")
    for need in module_of(name).needs(method_settings or {}):
        if not CARRIED.get(need, True):
            raise missing_part(f"{field}={method_settings!r} reads {need!r}, which")


def module_of(name: str) -> Any:
    """The module of a method. `ValueError` if no such method is carried here."""
    check_name(name)
    module = MODULES[name]
    return sys.modules[module] if module in sys.modules else importlib.import_module(module)
