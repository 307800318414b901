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
from prunesid_cli.tables import print_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show this preset as JSON")


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    if arguments.name is not None:
        return read_preset(arguments.name).fields
    print_rows([columns(name) for name in preset_names()], left=("models", "other settings"))
    return None


def columns(name: str) -> dict[str, str]:
    fields, _, model_types = read_preset(name)
    budget = fields.pop("budget")
    return {
        "preset": name,
        "budget": f"{budget:.1%}" if isinstance(budget, float) else str(budget),
        "models": ", ".join(model_types),
        "other settings": ", ".join(f"{key}={value}" for key, value in fields.items()),
    }
