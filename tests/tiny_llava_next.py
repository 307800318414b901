"""Tiny random LLaVA-NeXT models, their images and prompts."""

import tiny
import torch
from copies import remembered
from tiny import EOS, IMAGE, PAD, TEXT, VISION, answering, batch, prompt

from modeling_prunesid import (
    PruneSIDLlavaNextConfig,
    PruneSIDLlavaNextForConditionalGeneration,
)
from modeling_prunesid.tower_crops import pack_patches, views_of_crops


CROP, PATCH, SIDE = VISION["image_size"], VISION["patch_size"], VISION["image_size"] // VISION["patch_size"]
GRIDS = [[CROP, 2 * CROP], [2 * CROP, CROP], [2 * CROP, 2 * CROP], [3 * CROP, CROP], [CROP, 3 * CROP]]
SIZES = [(40, 50), (30, 90), (200, 30), (28, 28), (56, 56)]  # height, width: padded below, to the sides, not at all
BUDGET = 6
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def build_config(budget=BUDGET, vision=None, strategy="default", **settings):
    return PruneSIDLlavaNextConfig(
        vision_config={**VISION, **(vision or {})},
        text_config={**TEXT, "max_position_embeddings": 4096},
        image_token_index=IMAGE,
        image_grid_pinpoints=GRIDS,
        vision_feature_select_strategy=strategy,
        prunesid_config={"budget": budget, **settings},
    )


@remembered
def build(budget=BUDGET, seed=0, **config):
    torch.manual_seed(seed)
    return answering(PruneSIDLlavaNextForConditionalGeneration(build_config(budget, **config)), PAD, EOS, IMAGE)


def packed(size):
    """`crop * patches_of_a_crop + patch` of each placeholder."""
    return pack_patches(size, GRIDS, CROP, PATCH)


def crops_of(size):
    """The patches of each crop that are no padding."""
    return [view.patches for view in views_of_crops(size, GRIDS, CROP, PATCH)]


def images(sizes=SIZES, seed=0):
    """`pixel_values` and `image_sizes` as the processor gives them: crops that an image lacks are zero."""
    crops = [len(crops_of(size)) for size in sizes]
    pixel_values = torch.zeros(len(sizes), max(crops), 3, CROP, CROP)
    generator = torch.Generator().manual_seed(seed)
    for image, count in enumerate(crops):
        pixel_values[image, :count] = torch.randn(count, 3, CROP, CROP, generator=generator)
    return {"pixel_values": pixel_values, "image_sizes": torch.tensor(sizes)}


def full_count(size):
    return len(packed(size))


ROWS = [((0, 1), [7, 8, 9]), ((2,), [9, 4]), ((), [3, 4, 5, 6]), ((3, 4), [11])]


def rows(count, which=ROWS):
    return [prompt([count(SIZES[image]) for image in shown], text) for shown, text in which]


def full_batch(side="left"):
    return {**batch(rows(full_count), side), **images()}


def new_tokens(model, inputs, **kwargs):
    return tiny.new_tokens(model, inputs, **{**GREEDY, **kwargs})
