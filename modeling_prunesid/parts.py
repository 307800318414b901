"""Code that only some models need. A repo on the Hub has that of its own model; the rest is None there."""

from .attention import PARTS as ATTENTION
from .checks import PACKAGE
from .cls_attention import PARTS as CLS
from .grouping import group as GROUPING
from .question import PARTS as QUESTION
from .thin import PARTS as THIN


# What a method may need, and whether its code is here. Configurations, which vLLM pickles by value, take this along.
CARRIED = {"attention": ATTENTION is not None, "grouping": GROUPING is not None, "relevance": QUESTION is not None}
CARRIED |= dict.fromkeys(("cls_attention", "joined_attention", "keys"), CLS is not None)


def missing_part(what: str, advice: str = "Convert it with the package, which carries it.") -> ValueError:
    """The error of what needs a part that is None."""
    return ValueError(f"{what} needs code that this model was saved without. {advice}")


def missing_thin(name: object) -> ValueError:
    """The error of loading a thin variant by code without `THIN`."""
    return missing_part(
        f"Loading {name}, a thin variant,",
        "Load it by the code of its own repo (an Auto class with trust_remote_code=True), or install the package "
        f"{PACKAGE} and load it by that.",
    )


__all__ = ["ATTENTION", "CARRIED", "CLS", "GROUPING", "QUESTION", "THIN", "missing_part", "missing_thin"]
