"""The methods that choose tokens: by name, what each reads, and what settings it has of its own.

A method is a file with `select(views, counts, settings, context) -> Selection`, `needs`, `DEFAULTS` and `RULES`. Those
of the package are `method_<name>.py` and have two lines below; `registering.py` adds others. A repository on the Hub
carries its own method alone.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

from .attention import PARTS as ATTENTION_PARTS
from .method_paper import select as paper
from .method_release import select as release
from .method_spread import select as spread
from .question import PARTS


METHODS: dict[str, Callable] = {
    "paper": paper,
    "release": release,
    "spread": spread,
}
# What reads the attention in a tower; None in a repository whose method does not.
ATTENTION: Any = ATTENTION_PARTS
_CARRIES_ATTENTION = ATTENTION is not None
# What reads the question of a prompt; None in a repository whose method does not.
QUESTION: Any = PARTS
_CARRIES_QUESTION = QUESTION is not None
# The module of each method. A configuration knows methods by name alone: pickled by value, as vLLM does, it takes no
# selector along.
MODULES = {name: f"{__name__.rpartition('.')[0]}.method_{name}" for name in METHODS}
DEFAULT_METHOD = next(iter(MODULES))
# What a method may need that is read in the layer of the tower whose CLS attention is watched.
OF_CLS = frozenset({"cls_attention", "joined_attention", "keys"})


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
        if setting == "question" and value and not _CARRIES_QUESTION:
            raise ValueError(
                f"{field}[{setting!r}]={value!r} needs code that this model was saved without, because it read no "
                "question. Convert it with the package, which carries it."
            )
    if not _CARRIES_ATTENTION and "attention" in module_of(name).needs(method_settings or {}):
        raise ValueError(
            f"{field}={method_settings!r} needs code that this model was saved without, because it read no attention. "
            "Convert it with the package, which carries it."
        )


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
    defaults = module_of(name).DEFAULTS
    return name, {key: value for key, value in given.items() if key not in unread and value != defaults[key]}


def module_of(name: str) -> Any:
    """The module of a method. `ValueError` if no such method is carried here."""
    check_name(name)
    module = MODULES[name]
    return sys.modules[module] if module in sys.modules else importlib.import_module(module)
