"""Fields of 0.1.0, which became methods with settings of their own. It does not travel with a repo."""

from typing import Any

from .methods import module_of


FIELDS = ("score", "center", "quota", "keep_cls", "grouping", "seed", "llm_budget")


def renew(settings: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """
    Gives settings (a `PruneSIDConfig` of this package or of a repo) what retired fields among others mean.

    Returns:
        `dict`: the other fields.

    Raises:
        `ValueError`: if they contradict `method` and `method_settings`, or another class reads them now.
    """
    retired = {name: fields[name] for name in FIELDS if name in fields}
    others = {name: value for name, value in fields.items() if name not in retired}
    # Saved as null with every model.
    if retired.pop("llm_budget", None) is not None:
        raise ValueError(
            "prunesid_config.llm_budget must be None for this model: tokens are dropped inside the language model by "
            "LayerPrunedLlavaForConditionalGeneration. Load the model with it."
        )
    if retired and settings.method == type(settings).method and not settings.method_settings:
        settings.method, own = method_of_saved(retired)
        settings.method_settings = own or None
    elif retired:
        raise ValueError(
            f"prunesid_config has {', '.join(retired)} of version 0.1.0 beside method={settings.method!r}, "
            f"method_settings={settings.method_settings!r}. Write them into method and method_settings."
        )
    return others


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
