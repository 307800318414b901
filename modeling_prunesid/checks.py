"""Checks of versions, counts and budgets, what is said once in a process, and what only the package has."""

import importlib
import math
from numbers import Integral, Real
from types import ModuleType

import torch
import transformers
from packaging.version import Version
from transformers.utils import logging


OLDEST_TRANSFORMERS = "5.18"
PACKAGE = "prunesid-transformers"

logger = logging.get_logger(__name__)

_said: set[str] = set()


def check_transformers(release: str = OLDEST_TRANSFORMERS) -> None:
    """
    Raises:
        `ImportError`: if the installed Transformers is older than `release`, the first that has what is built on.
    """
    if Version(transformers.__version__).release < Version(release).release:
        raise ImportError(
            f"PruneSID needs transformers {release} or newer, found {transformers.__version__}. Upgrade it: pip "
            f"install -U 'transformers>={release}'"
        )


def from_package(name: str) -> ModuleType | None:
    """A file that stays in the installed package, so that who runs a repo has less to read; None without it."""
    try:
        return importlib.import_module(f"modeling_prunesid.{name}")
    except ImportError:
        return None


def warn_once(kind: str, message: str) -> None:
    """Log a warning, the first of its kind in this process. Compiled code says nothing."""
    if kind not in _said and not torch.compiler.is_compiling():
        _said.add(kind)
        logger.warning(message)


def resolve_budget(budget: int | float, tokens: int) -> int:
    """The count that a count or a share stands for, at most `tokens`."""
    if isinstance(budget, Integral) and not isinstance(budget, bool) and budget >= 1:
        return min(int(budget), tokens)
    if isinstance(budget, Real) and not isinstance(budget, Integral) and 0 < budget <= 1:
        return max(math.floor(budget * tokens + 0.5), 1)
    raise ValueError(
        f"`budget` must be a number of tokens (an int of at least 1) or a share of them (a float in (0, 1]), "
        f"got {budget!r}."
    )


def check_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")
