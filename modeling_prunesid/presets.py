"""Published settings by name. They come with the package; a repo on the Hub has settings of its own in their place."""

import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


# A wheel has the files beside this one; in a checkout they are in its top folder.
FOLDER = next(
    folder
    for folder in (Path(__file__).with_name("configuration"), Path(__file__).parents[1] / "configuration")
    if folder.is_dir()
)
# How the name of a preset begins: the model types that it is for.
MODEL_TYPES = {
    "llava_1.5_vitcop_": ("vitcop_llava",),
    "llava_1.5_": ("llava", "layer_pruned_llava"),
    "llava_next_": ("llava_next",),
    "mini_gemini_": ("mini_gemini",),
    "qwen_vl_": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    "video_llava_": ("video_llava",),
}


class Preset(NamedTuple):
    """
    Args:
        fields (`dict`): those of the settings class.
        method (`str`): the `model_type` of the settings, `"prunesid"` or `"vitcop"`.
        model_types (`tuple[str, ...]`): of the models that it is for; none where a file does not say.
    """

    fields: dict[str, Any]
    method: str
    model_types: tuple[str, ...] = ()


def preset_names(method: str | None = None) -> list[str]:
    """The names of all presets, or of those of one method (`"prunesid"` or `"vitcop"`)."""
    names = sorted((path.stem for path in FOLDER.glob("*.json")), key=_natural)
    return [name for name in names if method is None or read_preset(name).method == method]


def read_preset(name: str | os.PathLike) -> Preset:
    """
    A preset by its name, or from a JSON file such as `prunesid calibrate` writes.

    Raises:
        `ValueError`: if there is no such preset, or the file does not hold settings.
    """
    is_file = str(name).endswith(".json")
    path = Path(name) if is_file else FOLDER / f"{name}.json"
    if not path.is_file():
        names = ", ".join(preset_names())
        near = difflib.get_close_matches(str(name), preset_names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"A preset must be the path of a JSON file or one of {names}, got {str(name)!r}.{hint}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The preset {name} is no JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"The preset {name} must hold a JSON object, got {json.dumps(fields)[:40]}.")
    method = fields.pop("model_type", "prunesid")
    fields.pop("transformers_version", None)
    model_types = () if is_file else next(types for start, types in MODEL_TYPES.items() if path.stem.startswith(start))
    return Preset(fields, method, model_types)


def read_settings(settings_class: Any, name: str | os.PathLike, with_defaults: Callable[[dict], dict]) -> Any:
    """
    The settings of a preset, as `settings_class`, with defaults for what it does not say.

    Raises:
        `ValueError`: if there is no such preset, or it is of another method.
    """
    preset, own = read_preset(name), settings_class.model_type.partition("_")[0]
    if preset.method != own:
        raise ValueError(
            f"The preset {str(name)!r} has settings of {preset.method!r}, and {settings_class.__name__} takes those "
            f"of {own!r}. Take one of {', '.join(preset_names(own))}."
        )
    settings = settings_class(**with_defaults(preset.fields))
    settings._preset = str(name)
    return settings


def check_model_type(name: str | os.PathLike, model_type: str) -> None:
    """Raise a `ValueError` unless the preset is for models of this `model_type` (of the stock class, or ours)."""
    preset = read_preset(name)
    own = model_type.removeprefix("prunesid_")
    wanted = {own, f"vitcop_{own}"} if preset.method == "vitcop" else {own}
    if preset.model_types and not wanted & set(preset.model_types):
        fitting = [other for other in preset_names() if own in read_preset(other).model_types]
        advice = f"For this model take {', '.join(fitting)}." if fitting else "Set the fields one by one."
        raise ValueError(
            f"The preset {str(name)!r} is for models of type {' or '.join(map(repr, preset.model_types))}, got one of "
            f"type {own!r}. {advice}"
        )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """64 before 128."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split("_")]
