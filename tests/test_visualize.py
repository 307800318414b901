"""`explain` and `visualize`: what is drawn is what the model keeps."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NUM_PATCHES, build
from tiny_checkpoint import build_processor, picture

from modeling_prunesid import explain, visualize
from modeling_prunesid.context import SELECTIONS
from modeling_prunesid.visualize import CELL, DIM, draw_kept, group_outlines


class Processor:
    def __init__(self, image_processor):
        self.image_processor = image_processor


@pytest.mark.parametrize("settings", [{}, {"method": "spread"}, {"method": "release"}])
def test_it_explains_what_the_model_keeps(settings):
    model, processor = build(**settings), build_processor()
    output = explain(model, processor, picture())
    inputs = processor.image_processor(images=picture(), return_tensors="pt")
    kept = model.get_image_features(**inputs)["keep_indices"][0]
    assert output.kept.tolist() == [index for index in kept.tolist() if index >= 0]
    assert output.grid == (7, 7) and len(output.scores) == NUM_PATCHES
    assert 0 < output.rho < 1 and output.is_cropped
    assert SELECTIONS.get() is None


def test_a_model_that_drops_nothing_has_nothing_to_explain():
    with pytest.raises(ValueError, match=r"Nothing is dropped .* prunesid_config.budget=None. Set a smaller budget"):
        explain(build(budget=None), build_processor(), picture())
    assert SELECTIONS.get() is None


def test_the_picture_shows_the_image_the_kept_patches_and_the_scores():
    model, processor = build(), build_processor()
    output = explain(model, processor, picture())
    shown = visualize(Image.new("RGB", (300, 200), "white"), output)
    side = 7 * round(200 / 7)
    assert shown.size == (3 * side + 16, side + 22)
    assert np.asarray(shown)[23:, :side].min() == 255  # the image
    middle = np.asarray(shown)[22:, side + 8 : 2 * side + 8]
    cell = side // 7
    for index in range(NUM_PATCHES):
        row, column = (round((place + 0.5) * cell) for place in divmod(index, 7))
        assert (middle[row, column].min() == 255) == (index in output.kept), index


def test_dropped_patches_are_dim_and_kept_ones_are_not():
    drawn = np.asarray(draw_kept(Image.new("RGB", (4, 4), (200, 100, 0)), torch.tensor([3]), None, (2, 2)))
    assert drawn.shape == (2 * CELL, 2 * CELL, 3)
    assert drawn[-1, -1].tolist() == [200, 100, 0]
    assert drawn[0, 0].tolist() == [DIM * 100 + 20] * 3


def test_outlines_join_neighbours_of_one_group():
    kept, groups = torch.tensor([0, 1]), torch.zeros(4, dtype=torch.long)
    assert len(group_outlines(kept, groups, (2, 2))) == 6
    assert len(group_outlines(kept, torch.tensor([0, 1, 0, 0]), (2, 2))) == 8
