"""
Processors of families with grids: for a fixed budget they write what the model keeps of each view, images and videos,
and the text between placeholders stays. Image and video processors, which need torchvision, are stubs: what they
return are grids.
"""

import inspect
import re
from types import SimpleNamespace

import oracle_family as contract
import pytest
import torch
from families import ROWS, every_row
from transformers.video_utils import VideoMetadata

from modeling_prunesid import processing
from modeling_prunesid.family import stock_class


def has_grids(row):
    return bool(row.mechanisms & {"GridModelMixin", "NewlineGridModelMixin"})


every_grid = every_row(has_grids)
TOKENS = {
    f"{name}_token": f"<{name}>"
    for name in (
        "image",
        "video",
        "vision_start",
        "vision_end",
        "image_start",
        "image_end",
        "video_start",
        "video_end",
        "video_sep",
    )
}
BUDGETS = [
    (5, "view", None),
    (0.4, "view", None),
    (1 / 3, "view", 6),
    (1, "view", None),
    (7, "image", None),
    (0.4, "image", None),
    (1.0, "view", None),
    (None, "view", None),
]


def stub(cls, budget=None, scope="view", min_budget=None):
    """A processor with parts that know the sizes of patches alone; of `cls`, ours or the stock one."""
    processor = cls.__new__(cls)
    sizes = {"merge_size": 2, "temporal_patch_size": 2, "spatial_patch_size": 1, "patch_size": 4}
    sizes["frame_timestamp_format"] = "{timestamp:.1f}"
    parts = {"image_processor": SimpleNamespace(**sizes), "video_processor": SimpleNamespace(**sizes)}
    settings = {"num_visual_tokens": budget, "budget_scope": scope, "min_budget": min_budget}
    tokens = {name: getattr(cls, name.upper(), text) for name, text in TOKENS.items()}
    own = {**tokens, **parts, **settings, "cat_extra_token": True, "tokenizer": SimpleNamespace(**tokens)}
    for name, value in own.items():
        if not isinstance(getattr(cls, name, None), property):
            setattr(processor, name, value)
    return processor


def stock_of(cls):
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))


def text_of(processor, row, inputs, index):
    """What the stock processor writes for one input."""
    return getattr(processor, f"replace_{row.modality}_token")(inputs, index, load_audio_from_video=False)


def grids_of(row):
    """What the stock image or video processor returns for the inputs of a row of the contract."""
    grids = row.inputs(contract.rows_of(row))[f"{row.modality}_grid_thw"]
    frames = (2 * grids[:, 0]).tolist()
    metadata = [VideoMetadata(total_num_frames=count, fps=2.0, frames_indices=list(range(count))) for count in frames]
    chunks = [1] * len(frames)
    return {f"{row.modality}_grid_thw": grids, "video_metadata": metadata, "num_chunks_per_video": chunks}


def runs_of(text, token):
    return [len(run) // len(token) for run in re.findall(f"(?:{re.escape(token)})+", text)]


@every_grid
@torch.no_grad()
def test_a_processor_writes_what_the_model_keeps(name):
    for budget, scope, min_budget in BUDGETS:
        check_writes_what_the_model_keeps(name, budget, scope, min_budget)


def check_writes_what_the_model_keeps(name, budget, scope, min_budget):
    ours, _, row = contract.build(name)
    cls = row.head._processor_class
    processor, inputs = stub(cls, budget, scope, min_budget), grids_of(row)
    texts = [text_of(stub(stock_of(cls)), row, inputs, index) for index in range(row.num_inputs)]
    token = processor._placeholder(row.modality)
    changes = {"min_budget": None, "budget_scope": scope, "budget": budget}
    with contract.settings_of(ours, **changes), contract.settings_of(ours, min_budget=min_budget):
        output = contract.encode(ours, row)
    returned, shortened = processor._write(row.modality, dict(inputs), texts, None)
    for index, (full, short) in enumerate(zip(texts, shortened)):
        runs = runs_of(full, token)
        assert sum(runs) == row.tokens[index]
        assert short.replace(token, "") == full.replace(token, "")
        if output.get("keep_indices") is None:
            assert short == full
            continue
        ends = torch.tensor(runs).cumsum(0)
        kept = torch.searchsorted(ends, output["keep_indices"][index], right=True).bincount(minlength=len(runs))
        assert runs_of(short, token) == kept.tolist()
        counts = returned["num_visual_tokens" if row.modality == "image" else processing.OF_VIDEOS]
        assert counts[index] == len(output["keep_indices"][index])


def test_a_video_of_chunks_has_a_count_for_each():
    """MiniMax-M3-VL encodes a long video as chunks, which the model takes as inputs of their own."""
    cls = ROWS["minimax_m3_vl"].head._processor_class
    if "num_chunks_per_video" not in inspect.getsource(stock_of(cls).replace_video_token):
        return  # before it did
    grids = torch.tensor([[2, 8, 8], [1, 8, 8], [3, 4, 8]])
    inputs = {"video_grid_thw": grids, "num_chunks_per_video": [2, 1]}
    texts = [stub(stock_of(cls)).replace_video_token(inputs, index) for index in range(2)]
    processor = stub(cls, 5)
    returned, shortened = processor._write("video", dict(inputs), texts, None)
    assert returned[processing.OF_VIDEOS] == [10, 5, 15]
    assert [runs_of(text, processor.VIDEO_TOKEN) for text in shortened] == [[5, 5, 5]] * 2
    returned, shortened = stub(cls, 7, "image")._write("video", dict(inputs), texts, None)
    assert returned[processing.OF_VIDEOS] == [5, 2, 7]
    assert [runs_of(text, processor.VIDEO_TOKEN) for text in shortened] == [[3, 2, 2]] * 2


@every_row(lambda row: has_grids(row) and row.mrope)
@torch.no_grad()
def test_engines_number_short_prompts_before_they_encode(name):
    ours, reference, row = contract.build(name)
    full = contract.prompt(row)
    settings, seen = ours.config.prunesid_config, []
    handle = ours.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    settings.mrope_positions = "contiguous"
    try:
        keep = ours(**full).keep_mask & full["attention_mask"].bool()
        short = contract.batch([ids[kept].tolist() for ids, kept in zip(full["input_ids"], keep)])
        short = {**short, **row.along(short["input_ids"]), **row.inputs(contract.rows_of(row))}
        ours(**short)
        positions, deltas = ours.model.get_rope_index(**_names_of_positions(ours, short))
        assert torch.equal(positions, seen[-1]) and not deltas.any()
        again = ours.model.get_rope_index(**_names_of_positions(ours, full))
        expected = reference.model.get_rope_index(**_names_of_positions(ours, full))
        assert all(torch.equal(*pair) for pair in zip(again, expected))
        settings.mrope_positions = "original"
        with pytest.raises((RuntimeError, ValueError)):
            ours.model.get_rope_index(**_names_of_positions(ours, short))
    finally:
        settings.mrope_positions = "original"
        handle.remove()


def _names_of_positions(ours, inputs):
    names = inspect.signature(stock_class(type(ours.model)).get_rope_index).parameters
    inputs = {**inputs, "second_per_grids": inputs.get("video_second_per_grid")}
    return {name: inputs[name] for name in names if name in inputs}
