"""List the presets: published settings by name, the model family that each is for, and what they keep.

A name goes into `from_pretrained(..., prunesid_config=name)`, `PruneSIDConfig.from_preset(name)`, `ViTCoPConfig` for
those of ViTCoP, or `prunesid convert --preset NAME`.

Examples:
    prunesid presets
    prunesid presets llava_1.5_64
"""

import argparse
from typing import Any

from modeling_prunesid.presets import preset_names, read_preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show this preset as JSON")


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    if arguments.name is not None:
        return read_preset(arguments.name).fields
    names = preset_names()
    width = max(map(len, names))
    print(f"{'preset':{width}}  {'budget':>7}  {'models':29}  other settings")
    for name in names:
        fields, method, model_types = read_preset(name)
        budget = fields.pop("budget")
        shown = f"{budget:.1%}" if isinstance(budget, float) else str(budget)
        settings = ", ".join(f"{key}={value}" for key, value in fields.items())
        print(f"{name:{width}}  {shown:>7}  {', '.join(model_types):29}  {settings}".rstrip())
    return None
