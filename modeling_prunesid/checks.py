"""Checks of counts and budgets."""

import math
from numbers import Integral, Real


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
