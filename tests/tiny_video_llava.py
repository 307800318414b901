"""Tiny random Video-LLaVA models, their clips and prompts."""

import torch
from copies import remembered
from families import VIDEO_LLAVA_PIXELS
from tiny import EOS, IMAGE, NUM_PATCHES, PAD, TEXT, VISION, answering, batch

from modeling_prunesid import (
    PruneSIDVideoLlavaConfig,
    PruneSIDVideoLlavaForConditionalGeneration,
)


VIDEO = 101
FRAMES, FED = 3, NUM_PATCHES + 1  # of a frame, upstream feeds CLS and patches
BUDGET = 6


def build_config(budget=BUDGET, vision=None, **settings):
    return PruneSIDVideoLlavaConfig(
        vision_config={**VISION, **(vision or {})},
        text_config={**TEXT, "max_position_embeddings": 4096},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        prunesid_config={"budget": budget, **settings},
    )


@remembered
def build(budget=BUDGET, **config):
    torch.manual_seed(0)
    model = PruneSIDVideoLlavaForConditionalGeneration(build_config(budget, **config))
    return answering(model, PAD, EOS, IMAGE, VIDEO)


def images(count=2, seed=0):
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def clips(count=2, frames=FRAMES, seed=1):
    return torch.randn(count, frames, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


ROWS = [((1, 1), [7, 8, 9]), ((0, 1), [9, 4]), ((0, 0), [3, 4, 5, 6]), ((1, 0), [11])]  # (images, clips), text


def rows(of_image, of_clip, which=ROWS):
    return [
        [1, *([5] + [IMAGE] * of_image) * one, *([6] + [VIDEO] * of_clip) * other, *text]
        for (one, other), text in which
    ]


def full_batch(side="left"):
    pixels = {VIDEO_LLAVA_PIXELS: images(), "pixel_values_videos": clips()}
    return {**batch(rows(NUM_PATCHES, FRAMES * FED), side), **pixels}
