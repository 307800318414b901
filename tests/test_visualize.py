"""`explain` and `visualize`: what is drawn is what the model keeps."""

import numpy as np
import pytest
import tiny_video_llava
import torch
from PIL import Image
from tiny import NUM_PATCHES, build
from tiny_checkpoint import build_processor, picture
from transformers import BatchFeature

from modeling_prunesid import explain, visualize
from modeling_prunesid.context import SELECTIONS
from modeling_prunesid.visualize import CELL, DIM, _grid_of, draw_kept, explain_views, group_outlines


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


class FrameProcessor:
    """Frames of one size as a tower takes them, in place of a video processor, which needs torchvision."""

    do_normalize, image_mean, image_std = True, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]

    def __call__(self, videos, do_sample_frames, return_tensors):
        assert not do_sample_frames and return_tensors == "pt"
        pixels = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3) / 255
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return BatchFeature({"pixel_values_videos": (pixels - mean) / deviation})


@pytest.mark.parametrize(
    "settings", [{"budget": 6}, {"budget": 18, "budget_scope": "image", "dynamic": True, "reference_information": 0.5}]
)
def test_every_frame_of_a_clip_is_explained_and_has_its_own_picture(settings):
    model, processor = tiny_video_llava.build(**settings).float(), Processor(build_processor().image_processor)
    processor.video_processor = FrameProcessor()
    frames = [picture(seed).resize((28, 28)) for seed in (0, 1, 1)]
    outputs = explain_views(model, processor, frames)
    inputs = processor.video_processor(videos=[np.stack(frames)], do_sample_frames=False, return_tensors="pt")
    kept = model.model.get_video_features(**inputs)["keep_indices"][0].tolist()
    length = 1 + NUM_PATCHES
    for number, (output, frame) in enumerate(zip(outputs, frames, strict=True)):
        own = [index - number * length - 1 for index in kept if index // length == number and index % length]
        assert output.kept.tolist() == own and output.grid == (7, 7)
        assert np.array_equal(np.asarray(output.picture), np.asarray(frame))
        assert visualize(frames[0], output).height == 22 + 7 * CELL


@pytest.mark.parametrize(
    ("length", "ratio", "grid"), [(35, 7 / 5, (5, 7)), (35, 5 / 7, (7, 5)), (60, 1.62, (6, 10)), (36, 1.0, (6, 6))]
)
def test_the_grid_of_an_image_of_any_size_has_its_shape(length, ratio, grid):
    assert _grid_of({}, length, None, ratio) == grid


@pytest.mark.parametrize(("length", "ratio"), [(35, None), (37, 1.3), (35, 1.0)])
def test_tokens_that_form_no_grid_are_refused(length, ratio):
    with pytest.raises(ValueError, match=f"The {length} tokens of a view form no grid"):
        _grid_of({}, length, None, ratio)


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
