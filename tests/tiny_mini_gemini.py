"""Tiny random Mini-Gemini models and their images."""

import tiny
import torch
from copies import remembered
from tiny import BUDGET, EOS, IMAGE, PAD, TEXT, VISION, answering

from modeling_prunesid import (
    MiniGeminiForConditionalGeneration,
    PruneSIDMiniGeminiConfig,
    PruneSIDMiniGeminiForConditionalGeneration,
)


LOW, PATCH = VISION["image_size"], VISION["patch_size"]
HIGH = 2 * LOW  # a map of 14 x 14: windows of 2 x 2 for the 7 x 7 patches
HIGH_RES = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 2, 1],
    "image_size": HIGH,
    "layer_scale_init_value": 0.5,
    "initializer_range": 0.3,
}


HD = {"image_grid": 2, "image_global": True}


def build_config(budget=BUDGET, views=None, **settings):
    return PruneSIDMiniGeminiConfig(
        vision_config=dict(VISION),
        text_config={**TEXT, "max_position_embeddings": 1024},
        high_res_vision_config=dict(HIGH_RES),
        image_token_index=IMAGE,
        prunesid_config={"budget": budget, **settings},
        **(views or {}),
    )


@remembered
def build(budget=BUDGET, views=None, **settings):
    """A random model whose answers depend on its images and end at `max_new_tokens`."""
    torch.manual_seed(0)
    config = build_config(budget, views, **settings)
    return answering(PruneSIDMiniGeminiForConditionalGeneration(config), PAD, EOS, IMAGE)


def stock_twin(model):
    """The class without PruneSID, with the same weights."""
    return tiny.stock_twin(model, MiniGeminiForConditionalGeneration)


def pixels(num_images, seed=0, grid=1, has_global=False):
    """Images in both resolutions, as the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    views = [grid**2 + has_global] if grid > 1 else []
    return {
        "pixel_values": torch.randn(num_images, *views, 3, LOW, LOW, generator=generator),
        "high_res_pixel_values": torch.randn(num_images, 3, grid * HIGH, grid * HIGH, generator=generator),
    }
