"""
The table of the family contract (`test_contract.py`): a row for each declared family and kind of input.

Configurations are tiny, weights random, and what a processor would return is written here by hand: no network, no
image library. Rows are added at the end of the file, by `add`, or by a helper for what many have in common.
"""

import functools
import importlib
import importlib.util
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import modeling_prunesid
from modeling_prunesid.families import FAMILIES, release_with


PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END, TAG = 0, 1, 2, 100, 101, 102, 103, 11
SHIPPED = "5.18.0"
# The pixels of images for Video-LLaVA: `pixel_values_images` in 5.18, `pixel_values` in 5.23.
VIDEO_LLAVA_PIXELS = [*inspect.signature(transformers.VideoLlavaModel.get_image_features).parameters][1]


def is_at_least(release: str) -> bool:
    """Whether the installed Transformers is of that minor release or a later one."""
    installed, wanted = (tuple(map(int, version.split(".")[:2])) for version in (transformers.__version__, release))
    return installed >= wanted


def one_run(num_tokens: int, index: int, token: int) -> list[int]:
    """An input as most processors write it: a placeholder for each token."""
    return [token] * num_tokens


def runs(length: int, begin: Sequence[int] = (), end: Sequence[int] = (TAG,)) -> Callable:
    """An input as runs of `length` placeholders, each with tags before and after it."""

    def write(num_tokens: int, index: int, token: int) -> list[int]:
        return [*begin, *[token] * length, *end] * (num_tokens // length)

    return write


@functools.cache
def mechanisms_of(family: str) -> frozenset[str]:
    """What the file of a family names of ours: mixins to extend, and attributes. It is read, not imported."""
    path = Path(modeling_prunesid.__file__).with_name(f"modeling_prunesid_{family}.py")
    return frozenset(re.findall(r"\w+Mixin\b|\bprojector_name\b", path.read_text()))


@functools.cache
def shared_mechanisms() -> frozenset[str]:
    """What the models of at least four families name. A mechanism of fewer is tested in the contract alone."""
    counts = Counter(name for family in FAMILIES for name in mechanisms_of(family))
    return frozenset(name for name, count in counts.items() if count >= 4 and "Processor" not in name)


@dataclass
class Row:
    """
    Args:
        name (`str`): of the row; the family's name, and a word more for its further rows.
        config (`dict`): fields of the stock configuration.
        inputs (`Callable`):
            What the processor returns beside the prompt, for inputs given as a list of indices a row of the batch:
            `[[0, 1], [2]]`. An input is the same whatever the others are.
        tokens, kept (`tuple[int, ...]`): T and N of inputs 0, 1, 2, ... at `budget`; by default one view each.
        view (`str`): what a view is, in words.
        budget (`int`): of each view.
        modality (`"image"` or `"video"`).
        rows (`tuple[int, ...]`): how many inputs each row of the batch of the tests has.
        write (`Callable`): the ids that input `index` of `num_tokens` is written as, given the id of its placeholder.
        along (`Callable`): further arguments of `forward` that run along the prompt `(batch, length)`.
        special (`tuple[int, ...]`): further ids that are no words where they come in an answer.
        answer (`int`): what `along` has for the tokens of an answer.
        token (`int`): the placeholder.
        mrope (`bool`): positions are three-dimensional, and kept tokens keep theirs.
        needs_types (`bool`): with `mrope`: upstream's numbering reads `mm_token_type_ids`.
        family (`str`): the end of the name of the modeling file; by default the first word of `name`.
        since (`str`): the first release of Transformers that was seen to have the family.
        features (`Callable`): the stock output's rows of all inputs, one behind the other.
        put_features (`Callable`):
            Given a copy of the stock output, the output, and what chooses the rows of some inputs, changes the copy.
        prepare (`Callable`): changes a new model, ours and the stock one alike.
        ours (`tuple[str, ...]`): those of `inputs` that only our classes take.
        several_runs (`bool`): a view is written as several runs of placeholders, of which it keeps equal shares.
        view_length (`int`): with `several_runs`: tokens of a view; by default all of its input.
        fixed_layout (`bool`): what an input is depends on the rows of the batch, so that they are not regrouped.
        beams (`bool`): False where the stock class itself cannot search by beams.
        cached_chat (`bool`): False where a cache cannot go on with a second turn of views in the stock class either.
        static_cache (`bool`): False where the stock class cannot use one.
        stock_encodes_as_images (`bool`): the stock class has no `get_video_features`, and encodes videos as images.
        needs (`tuple[str, ...]`): further packages, without which there is no row.
        checks_loading (`bool`): False where the stock class itself does not load its own checkpoint.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[list[list[int]]], dict[str, Any]]
    tokens: tuple[int, ...] = (64,) * 3
    kept: tuple[int, ...] = ()
    view: str = "image"
    budget: int = 5
    modality: str = "image"
    rows: tuple[int, ...] = (2, 1)
    write: Callable[[int, int, int], list[int]] = one_run
    along: Callable[[torch.LongTensor], dict[str, Any]] = lambda ids: {}
    special: tuple[int, ...] = ()
    answer: int = 0
    token: int = 0
    mrope: bool = False
    needs_types: bool = True
    family: str = ""
    since: str = SHIPPED
    features: Callable[[Any], torch.Tensor] = lambda output: torch.cat(list(output.pooler_output))
    put_features: Callable[[Any, Any, Callable], None] | None = None
    prepare: Callable[[Any], None] | None = None
    ours: tuple[str, ...] = ()
    several_runs: bool = False
    view_length: int = 0
    fixed_layout: bool = False
    beams: bool = True
    cached_chat: bool = True
    static_cache: bool = True
    stock_encodes_as_images: bool = False
    needs: tuple[str, ...] = ()
    checks_loading: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.kept = self.kept or (self.budget,) * len(self.tokens)
        self.family = self.family or self.name.split()[0]
        self.token = self.token or (IMAGE if self.modality == "image" else VIDEO)

    @property
    def is_installed(self) -> bool:
        """Whether the installed Transformers has the family, and the packages that it needs are there."""
        has_family = is_at_least(self.since) and release_with(self.family) is None
        has_packages = all(importlib.util.find_spec(package) is not None for package in self.needs)
        return has_family and has_packages

    @property
    def mechanisms(self) -> frozenset[str]:
        return mechanisms_of(self.family)

    @property
    def kind(self) -> tuple:
        """Rows of one kind test the same mechanisms, of those that several families share."""
        written = self.write(self.tokens[0], 0, self.token)
        num_runs = sum(is_token for is_token, _ in itertools.groupby(id_ == self.token for id_ in written))
        return self.mechanisms & shared_mechanisms(), self.modality, self.several_runs, num_runs > 1

    @property
    def module(self):
        return importlib.import_module(f"modeling_prunesid.modeling_prunesid_{self.family}")

    @property
    def head(self) -> Any:
        """Our class with a language-modelling head."""
        heads = (value for value in vars(self.module).values() if inspect.isclass(value))
        heads = [value for value in heads if getattr(value, "_auto_class", None) == "AutoModelForImageTextToText"]
        return next(head for head in heads if head.__module__ == self.module.__name__)

    @property
    def num_inputs(self) -> int:
        return sum(self.rows)


ROWS: dict[str, Row] = {}


def add(name: str, config: dict[str, Any], inputs: Callable, **columns: Any) -> None:
    """Add a row; columns are the fields of [`Row`]."""
    ROWS[name] = Row(name, config, inputs, **columns)


def every_row(fits: Callable[[Row], bool] = lambda row: True) -> pytest.MarkDecorator:
    """
    Runs a test for the `name` of each installed row that `fits`. All are of the tier `contract`; the first row of each
    kind is of the tier `quick` too. The tests of one family run in one process.
    """
    kinds, cases = set(), []
    for name, row in ROWS.items():
        if row.is_installed and fits(row):
            tiers = [pytest.mark.contract] + [pytest.mark.quick] * (row.kind not in kinds)
            kinds.add(row.kind)
            marks = [*tiers, pytest.mark.xdist_group(row.family)]
            cases.append(pytest.param(name, marks=marks, id=name.replace(" ", "-")))
    return pytest.mark.parametrize("name", cases)


def noise(index: int, *shape: int) -> torch.Tensor:
    """The random pixels of one input, the same in every batch."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(index + 1), dtype=torch.float64)


def flat(rows: list[list[int]]) -> list[int]:
    return [index for row in rows for index in row]


def images(*shape: int, name: str = "pixel_values", **others: Any) -> Callable:
    """Inputs of equal shapes as one tensor. `others` give further arguments, each a value for every input."""

    def inputs(rows: list[list[int]]) -> dict[str, Any]:
        indices = flat(rows)
        further = {
            key: torch.stack([torch.as_tensor(values[index]) for index in indices]) for key, values in others.items()
        }
        return {name: torch.stack([noise(index, *shape) for index in indices]), **further}

    return inputs


def tiles(num_tiles: Sequence[int], *shape: int) -> Callable:
    """Images of several tiles, one tile behind the other, as `pixel_values`, with `num_tiles` of each image."""

    def inputs(rows: list[list[int]]) -> dict[str, Any]:
        indices = flat(rows)
        pixels = torch.cat([noise(index, num_tiles[index], *shape) for index in indices])
        return {"pixel_values": pixels, "num_tiles": torch.tensor([num_tiles[index] for index in indices])}

    return inputs


def tiles_of_rows(num_tiles: Sequence[int], *shape: int, mask: str | None = None) -> Callable:
    """As `tiles`, but `(batch, largest number of tiles, ...)` with missing tiles zero; `mask` marks the others."""

    def inputs(rows: list[list[int]]) -> dict[str, Any]:
        pixels = [torch.cat([noise(index, num_tiles[index], *shape) for index in row]) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)
        is_real = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in pixels])[:, None]
        counts = torch.tensor([num_tiles[index] for index in flat(rows)])
        return {"pixel_values": padded, "num_tiles": counts, **({mask: is_real} if mask else {})}

    return inputs


def patches(
    grids: Sequence[Sequence[int]], *dim: int, pixels="pixel_values", grid="image_grid_thw", **others
) -> Callable:
    """Inputs of any sizes as patches one behind the other, `t * h * w` of each grid."""

    def inputs(rows: list[list[int]]) -> dict[str, Any]:
        indices = flat(rows)
        own = [torch.tensor(grids[index]) for index in indices]
        further = {key: torch.tensor([values[index] for index in indices]) for key, values in others.items()}
        cells = [noise(index, int(size.prod()), *dim) for index, size in zip(indices, own)]
        return {pixels: torch.cat(cells), grid: torch.stack(own), **further}

    return inputs


# Fields of the stock configurations by their size in this table; others are named where they are.
FIELDS = {
    0.3: "initializer_range",
    1: "n_group topk_group n_shared_experts first_k_dense_replace",
    2: (
        "num_hidden_layers depth num_heads temporal_patch_size spatial_merge_size pooling_kernel_size "
        "linear_num_key_heads linear_num_value_heads num_experts_per_tok swa_num_key_value_heads "
        "index_n_heads hc_mult"
    ),
    4: (
        "num_attention_heads num_key_value_heads patch_size linear_conv_kernel_dim n_routed_experts "
        "swa_num_attention_heads d_rel num_local_experts"
    ),
    8: (
        "head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim "
        "pos_emb_height pos_emb_width swa_head_dim index_head_dim"
    ),
    16: "sliding_window q_lora_rank kv_lora_rank sliding_window_size rel_extent",
    32: "hidden_size image_size moe_intermediate_size text_hidden_size out_hidden_size adapter_out_dim",
    64: "intermediate_size num_position_embeddings index_topk num_patches max_image_size",
    120: "unpadded_vocab_size",
    512: "max_position_embeddings",
}
SIZE_OF = {name: size for size, names in FIELDS.items() for name in names.split()}


def tiny(names: str, **others: Any) -> dict[str, Any]:
    """Fields of the sizes of this table, and others."""
    return {**{name: SIZE_OF[name] for name in names.split()}, **others}


TEXT = tiny(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings initializer_range",
    num_key_value_heads=2,
    vocab_size=120,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)


def language(names: str, **others: Any) -> dict[str, Any]:
    """A language model's fields: those of all in this table, and as `tiny`."""
    return {**TEXT, **tiny(names, **others)}


VISION = tiny(
    "hidden_size intermediate_size num_attention_heads image_size patch_size initializer_range", num_hidden_layers=3
)
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 8}
LLAMA = {**TEXT, "model_type": "llama"}
QWEN2 = {**TEXT, "model_type": "qwen2"}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}


def types_of(token: int, kind: int, name: str = "mm_token_type_ids") -> Callable:
    """Token types: `kind` for placeholders, else 0."""
    return lambda ids: {name: kind * (ids == token).long()}


add(
    "llava",
    {"vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE, "image_seq_length": 64},
    images(3, 32, 32),
)
ANYRES = {
    "vision_config": CLIP,
    "text_config": LLAMA,
    "image_token_index": IMAGE,
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
}
SIZES = [[64, 40], [32, 64], [60, 60]]
add(
    "llava_next",
    ANYRES,
    images(5, 3, 32, 32, image_sizes=SIZES),
    tokens=(64 + 16 * 11, 64 + 8 * 17, 64 + 16 * 17),
    kept=(25, 15, 25),
    view="crop",
)
for modality, name, shape in (("image", "", (3, 32, 32)), ("video", " video", (2, 3, 32, 32))):
    add(
        f"video_llava{name}",
        {
            "vision_config": CLIP,
            "text_config": LLAMA,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_seq_length": 64,
        },
        images(*shape, name="pixel_values_videos" if name else VIDEO_LLAVA_PIXELS),
        modality=modality,
        tokens=(130,) * 3 if name else (64,) * 3,
        kept=(10,) * 3 if name else (5,) * 3,
        view="frame" if name else "image",
    )
GRIDS = [[1, 8, 8], [1, 4, 8], [1, 8, 8]]
QWEN_VISION = tiny("depth hidden_size num_heads patch_size temporal_patch_size spatial_merge_size initializer_range")
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
for name, vision, text in (
    ("qwen2_vl", {"embed_dim": 32, "mlp_ratio": 2}, {}),
    (
        "qwen2_5_vl",
        {"out_hidden_size": 32, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1]},
        {},
    ),
    (
        "qwen3_vl",
        {
            "out_hidden_size": 32,
            "intermediate_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        {"head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
    ),
):
    add(
        name,
        {
            "vision_config": {**QWEN_VISION, **vision},
            "text_config": {**TEXT, "rope_parameters": MROPE, **text},
            **QWEN_IDS,
        },
        patches(GRIDS, 96),
        tokens=(16, 8, 16),
        view="temporal slice",
        write=lambda num_tokens, index, token: [VISION_START, *[token] * num_tokens, VISION_END],
        along=types_of(IMAGE, 1),
        mrope=True,
        settings={"min_budget": None},
    )


BOTH_TILES = ("num_tiles", "num_video_tiles")


def add_tiles(name: str, config: dict[str, Any], **columns: Any) -> None:
    """A row of images of two tiles, one and one, each of 16 tokens."""
    common = {"tokens": (32, 16, 16), "kept": (10, 5, 5), "view": "tile", "ours": BOTH_TILES}
    add(name, config, **{"inputs": tiles((2, 1, 1), 3, 32, 32), **common, **columns})


def image_token(text: dict = LLAMA, vision: dict = SIGLIP, index: bool = False, **fields: Any) -> dict[str, Any]:
    """A configuration of tower, language model and image token, whose field has one of two names."""
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_index" if index else "image_token_id": IMAGE,
        "tie_word_embeddings": False,
        **fields,
    }


def plain_experts(model):
    """The grouped matrix products of experts have no float64."""
    model.set_experts_implementation("eager")


def double_router(model):
    """Inkling routes and mixes its loops in float32, whatever the other weights are: these come back to it."""
    plain_experts(model)
    for name, module in model.named_modules():
        if "Router" in type(module).__name__ or name.endswith(("forget_gate_proj", "message_gate_proj")):
            module.float()


SAM = tiny(
    "hidden_size num_hidden_layers num_attention_heads patch_size initializer_range",
    output_channels=16,
    image_size=64,
    window_size=4,
    global_attn_indexes=[1],
    mlp_dim=64,
)
add("vipllava", image_token(vision=CLIP, index=True, vision_feature_layer=(-2, -1)), images(3, 32, 32))
add_tiles(
    "internvl",
    image_token(
        QWEN2, {**VISION, "image_size": [32, 32], "patch_size": [4, 4]}, image_seq_length=16, downsample_ratio=0.5
    ),
    write=lambda num_tokens, index, token: [110, *[token] * num_tokens, 112],
)
ONEVISION = {
    "vision_config": SIGLIP,
    "text_config": QWEN2,
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 96]],
    "vision_aspect_ratio": "anyres_max_4",
    "tie_word_embeddings": False,
}
add(
    "llava_onevision",
    ONEVISION,
    images(10, 3, 32, 32, image_sizes=[[64, 40], [32, 64], [90, 90]]),
    tokens=(64 + 16 * 11, 64 + 8 * 17, 64 + 16 * 17),
    kept=(25, 15, 50),
    view="crop",
)


def several_a_row(rows: list[list[int]]) -> dict[str, Any]:
    """Images that share a prompt are a single crop each."""
    counts = torch.tensor([len(row) for row in rows])
    sizes = [[64, 40], [32, 64], [90, 90]]
    return {**images(10, 3, 32, 32, image_sizes=sizes)(rows), "batch_num_images": counts}


add(
    "llava_onevision several",
    ONEVISION,
    several_a_row,
    tokens=(65, 65, 64 + 16 * 17),
    kept=(5, 5, 50),
    view="crop",
    fixed_layout=True,
)
add(
    "llava_onevision video",
    ONEVISION,
    images(3, 3, 32, 32, name="pixel_values_videos"),
    modality="video",
    tokens=(49,) * 3,
    kept=(15,) * 3,
    view="frame",
)
NEXT_VIDEO = {**ANYRES, "video_token_index": VIDEO}
add(
    "llava_next_video",
    NEXT_VIDEO,
    images(5, 3, 32, 32, image_sizes=SIZES),
    tokens=(64 + 16 * 11, 64 + 8 * 17, 64 + 16 * 17),
    kept=(25, 15, 25),
    view="crop",
)
add(
    "llava_next_video video",
    NEXT_VIDEO,
    images(3, 3, 32, 32, name="pixel_values_videos"),
    modality="video",
    tokens=(48,) * 3,
    kept=(15,) * 3,
    view="frame",
)
for name, vision in (("smolvlm", "smolvlm_vision"), ("idefics3", "idefics3_vision")):
    add_tiles(
        name,
        image_token(vision={**VISION, "model_type": vision}, scale_factor=2, pad_token_id=PAD),
        inputs=tiles_of_rows((2, 1, 1), 3, 32, 32),
        write=runs(16),
    )
add(
    "idefics2",
    image_token(
        {**TEXT, "model_type": "mistral", "sliding_window": None},
        VISION,
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
        },
    ),
    tiles_of_rows((2, 1, 1), 3, 32, 32),
    tokens=(16, 8, 8),
    kept=(6, 3, 3),
    budget=3,
    view="tile",
    write=runs(8),
    ours=BOTH_TILES,
)
add(
    "paligemma",
    {
        "vision_config": {**SIGLIP, "projection_dim": 32},
        "text_config": {**TEXT, "model_type": "gemma", "head_dim": 8},
        "image_token_index": IMAGE,
        "projection_dim": 32,
    },
    images(3, 32, 32),
    along=types_of(IMAGE, 0, "token_type_ids"),  # without these, upstream masks the rows of a batch by one another
    answer=1,
    cached_chat=False,  # a second turn looks back only, while a whole conversation is a prefix that sees all of itself
)
GEMMA3_TEXT = {
    **TEXT,
    "model_type": "gemma3_text",
    "head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
add_tiles(
    "gemma3",
    image_token(GEMMA3_TEXT, index=True, mm_tokens_per_image=16, boi_token_index=102, eoi_token_index=103),
    view="image or crop",
    write=runs(16, [102], [103]),
    along=types_of(IMAGE, 1, "token_type_ids"),
)
GEMMA4_VISION = tiny(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim pooling_kernel_size patch_size initializer_range",
    position_embedding_size=64,
)
GEMMA4_TEXT = {
    **TEXT,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "use_bidirectional_attention": "vision",
    "tie_word_embeddings": False,
}
GEMMA4 = {"video_token_id": VIDEO, "audio_token_id": 104, "boi_token_id": 102, "eoi_token_id": 103}
PLACES = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1).reshape(64, 2)


def gemma4_images(patches_of_image: int, dim: int) -> Callable:
    return images(patches_of_image, dim, image_position_ids=[PLACES[:patches_of_image]] * 3)


def gemma4_frames(rows: list[list[int]]) -> dict[str, Any]:
    counts = [(2, 1, 1)[index] for index in flat(rows)]
    pixels = torch.cat([noise(index, count, 64, 48) for index, count in zip(flat(rows), counts)])
    return {
        "pixel_values_videos": pixels.sigmoid(),
        "video_position_ids": PLACES.expand(len(pixels), -1, -1),
        "num_frames_per_video": torch.tensor(counts),
    }


PER_LAYER = {"vocab_size_per_layer_input": 120, "hidden_size_per_layer_input": 8}
add(
    "gemma4",
    image_token({**GEMMA4_TEXT, **PER_LAYER}, GEMMA4_VISION, **GEMMA4),
    gemma4_images(64, 48),
    tokens=(16,) * 3,
    write=runs(16, [102], [103]),
    along=types_of(IMAGE, 1),
    since="5.23.0",
)
add(
    "gemma4 video",
    image_token({**GEMMA4_TEXT, **PER_LAYER}, GEMMA4_VISION, **GEMMA4),
    gemma4_frames,
    modality="video",
    tokens=(32, 16, 16),
    kept=(10, 5, 5),
    view="frame",
    write=runs(16, [TAG, 102], [103]),
    along=types_of(VIDEO, 2),
    since="5.23.0",
)
add(
    "gemma4_unified",
    image_token(
        GEMMA4_TEXT,
        {
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 64,
            "output_proj_dims": 32,
            "initializer_range": 0.3,
        },
        **GEMMA4,
    ),
    gemma4_images(16, 192),
    tokens=(16,) * 3,
    write=runs(16, [102], [103]),
    along=types_of(IMAGE, 1),
    since="5.23.0",
)
add(
    "mistral3",
    image_token({**TEXT, "model_type": "mistral", "head_dim": 8}, PIXTRAL, index=True, vision_feature_layer=-1),
    images(3, 32, 32, image_sizes=[[32, 32], [16, 32], [32, 32]]),
    tokens=(16, 8, 16),
    write=runs(4),
    several_runs=True,
)
add(
    "mistral_large4",
    image_token(
        language(
            "num_key_value_heads moe_intermediate_size n_routed_experts num_experts_per_tok "
            "kv_lora_rank qk_rope_head_dim v_head_dim qk_nope_head_dim index_topk index_head_dim "
            "index_n_heads head_dim first_k_dense_replace"
        ),
        PIXTRAL,
        index=True,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
    images(3, 32, 32, image_sizes=[[32, 32]] * 3),
    tokens=(16,) * 3,
    write=runs(4),
    several_runs=True,
    since="5.22.0",
    prepare=plain_experts,
)
add_tiles(
    "aya_vision",
    image_token(
        {**TEXT, "model_type": "cohere2", "head_dim": 8, "sliding_window": 64},
        index=True,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    ),
    write=runs(16, [TAG], []),
)
add_tiles(
    "cohere2_vision",
    image_token(
        {**TEXT, "model_type": "cohere2", "head_dim": 8, "sliding_window": 64},
        downsample_factor=2,
        alignment_intermediate_size=64,
    ),
    write=runs(16),
)
LINEAR = tiny(
    "head_dim linear_num_key_heads linear_num_value_heads linear_key_head_dim "
    "linear_value_head_dim linear_conv_kernel_dim",
    layer_types=["linear_attention", "full_attention"],
)
MINICPM = {
    "vision_config": {**VISION, "insert_layer_id": 1, "window_kernel_size": (2, 2)},
    "text_config": {
        **TEXT,
        "model_type": "qwen3_5_text",
        **LINEAR,
        "rope_parameters": {**MROPE, "mrope_interleaved": True},
    },
    "insert_layer_id": 1,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_size": 32,
}


def slices(video: bool) -> Callable:
    """Slices of 8 x 8 patches side by side: 2, 1 and 1 of an image; a clip has two frames of as many."""

    def inputs(rows: list[list[int]]) -> dict[str, Any]:
        counts = [(2, 1, 1)[index] for index in flat(rows)]
        pixels = [noise(index, 1, 3, 4, 256 * count) for index, count in zip(flat(rows), counts)]
        sizes = torch.tensor([[8, 8]] * sum(counts))
        if video:
            names = ("pixel_values_videos", "target_sizes_videos", "num_video_tiles")
        else:
            names = ("pixel_values", "target_sizes", "num_tiles")
        return dict(zip(names, (torch.cat(pixels, -1), sizes, torch.tensor(counts))))

    return inputs


for name, modality in (("minicpmv4_6", "image"), ("minicpmv4_6 video", "video")):
    add(
        name,
        MINICPM,
        slices(modality == "video"),
        modality=modality,
        tokens=(8, 4, 4),
        kept=(4, 2, 2),
        budget=2,
        view="slice" if modality == "image" else "slice of a frame",
        write=runs(4, [104], [105]),
        ours=BOTH_TILES,
    )
add(
    "minicpm_ocr",
    {**{name: value for name, value in MINICPM.items() if name != "image_size"}, "downsample_mode": "16x"},
    slices(False),
    tokens=(8, 4, 4),
    kept=(4, 2, 2),
    budget=2,
    view="slice",
    write=runs(4, [104], [105]),
    ours=BOTH_TILES,
    since="5.23.0",
)
KIMI = image_token(
    language(
        "num_key_value_heads n_routed_experts n_group topk_group num_experts_per_tok "
        "moe_intermediate_size n_shared_experts first_k_dense_replace q_lora_rank kv_lora_rank "
        "qk_nope_head_dim qk_rope_head_dim v_head_dim",
        model_type="deepseek_v3",
    ),
    tiny(
        "patch_size pos_emb_height pos_emb_width num_attention_heads num_hidden_layers hidden_size intermediate_size"
    ),
    projection_hidden_size=32,
    video_token_id=VIDEO,
    vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END,
)
add("kimi_k25", KIMI, patches(GRIDS, 3, 4, 4), tokens=(16, 8, 16), ours=BOTH_TILES, prepare=plain_experts)


def chunks(rows: list[list[int]]) -> dict[str, Any]:
    counts = [(2, 1, 1)[index] for index in flat(rows)]
    return {
        "pixel_values_videos": torch.cat([noise(i, 64 * count, 3, 4, 4) for i, count in zip(flat(rows), counts)]),
        "video_grid_thw": torch.tensor([[1, 8, 8]] * sum(counts)),
        "num_video_tiles": torch.tensor(counts),
    }


add(
    "kimi_k25 video",
    KIMI,
    chunks,
    modality="video",
    tokens=(32, 16, 16),
    kept=(10, 5, 5),
    view="chunk of four frames",
    write=runs(16, [TAG, 104], [105]),
    ours=BOTH_TILES,
    prepare=plain_experts,
)
MOLMO2 = {
    "vision_config": tiny(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim patch_size num_position_embeddings initializer_range",
        image_size=[32, 32],
    ),
    "adapter_config": tiny(
        "hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size "
        "text_hidden_size initializer_range",
        vision_feature_layer=[-1, -2],
    ),
    "text_config": {**TEXT, "head_dim": 8, "additional_vocab_size": 8},
    "image_patch_id": IMAGE,
    "image_start_token_id": 110,
    "low_res_image_start_token_id": 111,
    "image_end_token_id": 112,
    "frame_start_token_id": 113,
    "frame_end_token_id": 114,
}
POOLED = torch.arange(64).view(8, 8).unfold(0, 2, 2).unfold(1, 2, 2).reshape(16, 4)


def molmo2_images(rows: list[list[int]]) -> dict[str, Any]:
    """Each image is two crops: the low-resolution grid and a high-resolution one of 4 x 4 tokens."""
    crops = 2 * len(flat(rows))
    return {
        "pixel_values": torch.cat([noise(index, 2, 64, 48) for index in flat(rows)]),
        "image_token_pooling": torch.cat([POOLED + 64 * crop for crop in range(crops)]),
        "image_grids": torch.tensor([[4, 4, 4, 4]] * len(flat(rows))),
    }


def molmo2_videos(rows: list[list[int]]) -> dict[str, Any]:
    counts = [(2, 1, 1)[index] for index in flat(rows)]
    return {
        "pixel_values_videos": torch.cat([noise(index, count, 64, 48) for index, count in zip(flat(rows), counts)]),
        "video_token_pooling": torch.cat([POOLED + 64 * frame for frame in range(sum(counts))]),
        "video_grids": torch.tensor([[count, 4, 4] for count in counts]),
    }


add(
    "molmo2",
    MOLMO2,
    molmo2_images,
    tokens=(32,) * 3,
    kept=(10,) * 3,
    view="grid (low, high resolution)",
    write=lambda num_tokens, index, token: [110, *[*[token] * 4, 115] * (num_tokens // 4), 112],
    along=types_of(IMAGE, 1),
    several_runs=True,
    view_length=16,
    since="5.20.0",
)
add(
    "molmo2 video",
    MOLMO2,
    molmo2_videos,
    modality="video",
    token=IMAGE,
    tokens=(32, 16, 16),
    kept=(10, 5, 5),
    view="frame",
    write=runs(16, [113], [114, TAG]),
    along=types_of(IMAGE, 1),
    since="5.20.0",
)


def put_before_projector(encoded, output, choose):
    encoded.last_hidden_state = torch.cat(choose(output.last_hidden_state))[None]


def put_pairs(encoded, output, choose):
    encoded.deepstack_features = [(layer, choose(features)) for layer, features in output.deepstack_features]


def mend_llama4(model):
    """Llama 4 leaves some of its weights as they were allocated, and its `forward` raises in 5.24.0 without this."""
    model.language_model.register_forward_hook(lambda module, args, output: setattr(output, "image_outputs", None))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.3
            )


add_tiles(
    "llama4",
    {
        "vision_config": tiny(
            "hidden_size num_hidden_layers num_attention_heads image_size patch_size initializer_range",
            intermediate_size=128,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "text_config": {
            **TEXT,
            "head_dim": 8,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
            "num_local_experts": 2,
            "attention_chunk_size": 64,
        },
        "image_token_index": IMAGE,
        "boi_token_index": 102,
        "eoi_token_index": 103,
    },
    write=runs(16),
    features=lambda output: output.last_hidden_state.flatten(0, -2),
    put_features=put_before_projector,
    prepare=mend_llama4,
    static_cache=is_at_least("5.23.0"),  # before, the stock class raises
)
add("deepseek_vl", image_token(), images(3, 32, 32))


def two_resolutions(rows: list[list[int]]) -> dict[str, Any]:
    high = [noise(index + 10, 3, 128, 128) for index in flat(rows)]
    return {**images(3, 32, 32)(rows), "high_res_pixel_values": torch.stack(high)}


add(
    "deepseek_vl_hybrid",
    image_token(high_res_vision_config={**SAM, "image_size": 128, "num_pos_feats": 16}),
    two_resolutions,
)
add(
    "janus",
    image_token(
        vision={**VISION, "projection_dim": 32, "num_image_tokens": 64, "depth": 2},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_patches": 8,
            "projection_dim": 32,
            "num_hidden_layers": 2,
            "image_token_embed_dim": 32,
        },
    ),
    images(3, 32, 32),
)
add_tiles("got_ocr2", image_token(QWEN2, SAM, index=True), inputs=tiles((2, 1, 1), 3, 64, 64), view="page or tile")
add_tiles(
    "qianfan_ocr",
    image_token(
        {**TEXT, "model_type": "qwen3", "head_dim": 8},
        {**VISION, "image_size": [32, 32], "patch_size": [4, 4]},
        image_seq_length=16,
        downsample_ratio=0.5,
    ),
)
add_tiles(
    "ovis2",
    image_token(
        QWEN2,
        {**VISION, "vocab_size": 40, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
        visual_indicator_token_ids=[111, 112, 113, 114, 115],
        vocab_size=120,
        hidden_size=32,
    ),
    write=runs(16, [111], [112]),
    special=(111, 112, 113, 114, 115),
)


def aria_crops(rows: list[list[int]]) -> dict[str, Any]:
    inputs = tiles((2, 1, 1), 3, 32, 32)(rows)
    return {**inputs, "pixel_mask": torch.ones(len(inputs["pixel_values"]), 32, 32, dtype=torch.bool)}


add(
    "aria",
    image_token(
        {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        {**VISION, "model_type": "idefics3_vision"},
        index=True,
        projector_patch_to_query_dict={64: 24},
    ),
    aria_crops,
    tokens=(48, 24, 24),
    kept=(10, 5, 5),
    view="crop",
    ours=BOTH_TILES,
    prepare=plain_experts,
)


def lfm2_tiles(rows: list[list[int]]) -> dict[str, Any]:
    """Tiles of up to 64 patches: a tile and a thumbnail, a tile, a tile."""
    shapes = [shape for index in flat(rows) for shape in ([[8, 8], [4, 8]], [[8, 6]], [[8, 8]])[index]]
    counts = [(2, 1, 1)[index] for index in flat(rows)]
    lengths = torch.tensor(shapes).prod(1, keepdim=True)
    return {
        "pixel_values": torch.cat([noise(index, count, 64, 48) for index, count in zip(flat(rows), counts)]),
        "spatial_shapes": torch.tensor(shapes),
        "pixel_attention_mask": (torch.arange(64)[None] < lengths).long(),
        "num_tiles": torch.tensor(counts),
    }


add(
    "lfm2_vl",
    image_token(
        {**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
        tiny(
            "hidden_size intermediate_size num_hidden_layers num_attention_heads num_patches "
            "patch_size initializer_range",
            vision_use_head=False,
        ),
        downsample_factor=2,
        projector_hidden_size=32,
    ),
    lfm2_tiles,
    tokens=(24, 12, 16),
    kept=(10, 5, 5),
    view="tile or thumbnail",
    ours=BOTH_TILES,
)
add(
    "lighton_ocr",
    image_token({**TEXT, "model_type": "qwen3", "head_dim": 8}, PIXTRAL, spatial_merge_size=2),
    images(3, 32, 32, image_sizes=[[32, 32], [16, 32], [32, 32]]),
    tokens=(16, 8, 16),
    checks_loading=False,
)
add_tiles(
    "granite_docling",
    image_token(
        {
            **TEXT,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 0.35,
            "tie_word_embeddings": False,
        },
        {
            **VISION,
            "out_hidden_size": 32,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0, 1],
            "use_fine_route": False,
        },
        pad_token_id=PAD,
        density_router_hidden_size=None,
    ),
    inputs=tiles_of_rows((2, 1, 1), 3, 32, 32, mask="pixel_attention_mask"),
    write=runs(16),
    since="5.23.0",
)


def step_crops(side: int) -> Callable:
    """The whole image, and two crops of the first one."""

    def inputs(rows: list[list[int]]) -> dict[str, Any]:
        indices = flat(rows)
        counts = [(2, 0, 0)[index] for index in indices]
        given = {"pixel_values": torch.stack([noise(index, 3, side, side) for index in indices])}
        if sum(counts):
            given["pixel_values_local"] = torch.cat([noise(i + 10, n, 3, side, side) for i, n in zip(indices, counts)])
            given["num_local_patches"] = counts
        return given

    return inputs


add(
    "step3p7",
    {
        "vision_config": {**VISION, "max_position_embeddings": 64},
        "text_config": language(
            "head_dim sliding_window num_experts_per_tok num_local_experts n_routed_experts moe_intermediate_size",
            num_sliding_attention_heads=4,
            share_expert_dim=32,
            layer_types=["full_attention", "full_attention"],
            mlp_layer_types=["dense", "sparse"],
        ),
        "image_token_id": IMAGE,
    },
    step_crops(32),
    tokens=(12, 4, 4),
    kept=(6, 2, 2),
    budget=2,
    view="crop",
    write=runs(4, [104], [105]),
)
add(
    "deepseek_ocr2",
    {
        "vision_config": {
            "sam_config": {**SAM, "downsample_channels": [16, 32]},
            "encoder_config": tiny(
                "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
                "max_position_embeddings initializer_range"
            ),
        },
        "text_config": language(
            "n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size n_group topk_group",
            max_position_embeddings=2048,
            mlp_layer_types=["dense", "sparse"],
        ),
        "image_token_id": IMAGE,
    },
    step_crops(64),
    tokens=(433, 145, 145),
    kept=(15, 5, 5),
    view="crop",
    prepare=plain_experts,
)
INKLING2 = {
    "vision_config": tiny(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size "
        "spatial_merge_size text_hidden_size initializer_range",
        posemb_grid_size=8,
        projection_hidden_dim=32,
    ),
    "text_config": language(
        "head_dim swa_num_attention_heads swa_num_key_value_heads swa_head_dim "
        "sliding_window_size d_rel rel_extent n_routed_experts num_experts_per_tok "
        "moe_intermediate_size unpadded_vocab_size"
    ),
    "image_token_id": IMAGE,
}
add("inkling2", INKLING2, patches([[1, 4, 4]] * 3, 8, 8, 3), tokens=(16,) * 3, since="5.23.0", prepare=double_router)
add(
    "inkling2_loop",
    {
        **INKLING2,
        "text_config": {
            **INKLING2["text_config"],
            "n_layers_per_attn_res_block": 1,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 2,
            "loop_gate_rank": 8,
        },
    },
    patches([[1, 4, 4]] * 3, 8, 8, 3),
    tokens=(16,) * 3,
    since="5.24.0",
    prepare=double_router,
)
add(
    "granite4_vision",
    {
        "vision_config": {**SIGLIP, "hidden_size": 128},
        "text_config": TEXT,
        "image_token_index": IMAGE,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -2,
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 0]],
        "spatial_vision_layer": -1,
        "spatial_target_layers": [1, 1, 1, 1],
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "encoder_hidden_size": 128,
            "cross_attention_frequency": 1,
            "vocab_size": 10,
        },
    },
    images(5, 3, 32, 32, image_sizes=SIZES),
    tokens=(16 + 8 * 7, 16 + 4 * 9, 16 + 8 * 9),
    kept=(10, 6, 10),
    budget=2,
    view="crop",
    features=lambda output: torch.cat(list(output.deepstack_features[0][1])),
    put_features=put_pairs,
)
add(
    "unlimited_ocr",
    {
        "vision_config": {
            "sam_config": {**SAM, "downsample_channels": [16, 32]},
            "encoder_config": {**VISION, "image_size": 16},
        },
        "text_config": language(
            "n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size n_group topk_group",
            mlp_layer_types=["dense", "sparse"],
        ),
        "image_token_id": IMAGE,
    },
    lambda rows: {**step_crops(64)(rows), "patches_grid": [[(2, 1), (0, 0), (0, 0)][index] for index in flat(rows)]},
    tokens=(4 * 9 + 21, 21, 21),
    kept=(15, 5, 5),
    view="crop",
    prepare=plain_experts,
    since="5.20.0",
)
NEMOTRON = {
    "vision_config": tiny(
        "hidden_size num_hidden_layers num_attention_heads image_size patch_size initializer_range",
        model_type="radio",
        max_img_size=64,
        video_temporal_patch_size=2,
    ),
    "text_config": {
        **{name: value for name, value in TEXT.items() if name != "num_hidden_layers"},
        "model_type": "nemotron_h",
        "head_dim": 8,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "use_mamba_kernels": False,
        "num_nextn_predict_layers": 0,
    },
    "vision_hidden_size": 32,
    "projector_hidden_size": 32,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
add("nemotron_h_omni", NEMOTRON, patches([[8, 8], [4, 8], [8, 8]], 48, grid="image_grid_hw"), tokens=(16, 8, 16))
add(
    "nemotron_h_omni video",
    NEMOTRON,
    images(2, 6, 32, 32, name="pixel_values_videos"),
    modality="video",
    tokens=(32,) * 3,
    kept=(10,) * 3,
    view="slice",
    token=IMAGE,
    since="5.24.0",  # before, upstream's videos have another layout
    write=runs(16, [TAG]),
    beams=False,  # the stock class scores them 0.3 off its own logits; states in float32 hide what ours does
)
VIDEO_LLAMA = {
    "vision_config": {name: value for name, value in VISION.items() if name != "image_size"},
    "text_config": QWEN2,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
add(
    "video_llama_3",
    VIDEO_LLAMA,
    patches([[1, 8, 8], [1, 4, 16], [1, 8, 8]], 48, image_merge_sizes=[1, 2, 2]),
    tokens=(64, 16, 16),
)
add(
    "video_llama_3 video",
    VIDEO_LLAMA,
    patches(
        [[2, 8, 8], [1, 8, 8], [1, 8, 8]],
        48,
        pixels="pixel_values_videos",
        grid="video_grid_thw",
        video_merge_sizes=[2] * 3,
    ),
    modality="video",
    tokens=(32, 16, 16),
    kept=(10, 5, 5),
    view="frame",
    write=runs(16, [TAG], []),
)


def thinned(rows: list[list[int]]) -> dict[str, Any]:
    """As its processor leaves them: static tokens of the second frame are marked to be dropped."""
    masks = [torch.ones(tokens, dtype=torch.bool) for tokens in (32, 16, 16)]
    masks[0][18:30] = False
    mask = torch.cat([masks[index] for index in flat(rows)])
    return {**ROWS["video_llama_3 video"].inputs(rows), "video_compression_mask": mask}


add(
    "video_llama_3 thinned",
    VIDEO_LLAMA,
    thinned,
    modality="video",
    tokens=(20, 16, 16),
    kept=(9, 5, 5),
    view="frame, as far as the processor leaves it",
    write=lambda num_tokens, index, token: [
        TAG,
        *[token] * 16,
        *[TAG, *[token] * (num_tokens - 16)] * (num_tokens > 16),
    ],
)
add_tiles(
    "pp_chart2table", image_token(QWEN2, SAM, index=True), inputs=tiles((2, 1, 1), 3, 64, 64), view="page or tile"
)
RESNET = {"model_type": "timm_wrapper", "architecture": "resnet18", "do_pooling": False, "hidden_size": 512}
add("fast_vlm", image_token(QWEN2, RESNET, index=True), images(3, 128, 128), tokens=(16,) * 3, needs=("timm",))
PERCEPTION = image_token(
    LLAMA,
    {
        "model_type": "timm_wrapper",
        "architecture": "vit_tiny_patch16_224",
        "do_pooling": False,
        "model_args": {"img_size": [64, 64], "embed_dim": 32, "depth": 2, "num_heads": 4},
    },
    video_token_id=VIDEO,
    projector_pooling_ratio=2,
    vision_use_cls_token=True,
)
add(
    "perception_lm",
    PERCEPTION,
    images(2, 3, 64, 64),
    tokens=(8,) * 3,
    kept=(4,) * 3,
    budget=2,
    view="tile",
    needs=("timm",),
)
add(
    "perception_lm video",
    PERCEPTION,
    images(3, 3, 64, 64, name="pixel_values_videos"),
    modality="video",
    tokens=(12,) * 3,
    kept=(6,) * 3,
    budget=2,
    view="frame",
    needs=("timm",),
    stock_encodes_as_images=True,
)


def give_gradients(model):
    """
    Upstream scales the tower's output in place, of which a ResNet's last ReLU would need the values, and takes the
    root of the mean square of embeddings, which is zero for those of padding.
    """
    base = getattr(model, "model", model)
    base.vision_tower.timm_model.layer4[-1].act2 = torch.nn.GELU()
    for table in (base.language_model.embed_tokens, base.language_model.embed_tokens_per_layer):
        table.weight.data[PAD] = 0.1


add(
    "gemma3n",
    {
        "vision_config": {
            "model_type": "gemma3n_vision",
            "architecture": "resnet18",
            "hidden_size": 512,
            "vocab_size": 4,
            "vocab_offset": 112,
            "do_pooling": False,
        },
        "text_config": {
            **TEXT,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 112,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0],
            "tie_word_embeddings": False,
        },
        "audio_config": {
            "hidden_size": 32,
            "vocab_size": 4,
            "vocab_offset": 116,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 4,
            "input_feat_size": 16,
            "sscp_conv_channel_size": [4, 4],
        },
        "vision_soft_tokens_per_image": 16,
        "image_token_id": 113,
        "audio_token_id": 117,
        "boi_token_id": 110,
        "eoi_token_id": 112,
        "boa_token_id": 111,
        "eoa_token_id": 116,
        "tie_word_embeddings": False,
    },
    images(3, 128, 128),
    tokens=(16,) * 3,
    token=113,
    prepare=give_gradients,
    needs=("timm",),
)


def inkling_patches(rows: list[list[int]]) -> dict[str, Any]:
    counts = [(16, 8, 16)[index] for index in flat(rows)]
    pixels = torch.cat([noise(index, count, 2, 40, 40, 3) for index, count in zip(flat(rows), counts)])
    return {"pixel_values": pixels, "num_patches": torch.tensor(counts)}


add(
    "inkling_mm_model",
    {
        "text_config": language(
            "head_dim swa_num_attention_heads swa_num_key_value_heads swa_head_dim "
            "sliding_window_size d_rel rel_extent n_routed_experts num_experts_per_tok "
            "n_shared_experts moe_intermediate_size unpadded_vocab_size",
            logits_mup_width_multiplier=1.0,
            local_layer_ids=[0],
        ),
        "vision_config": {
            "text_hidden_size": 32,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "initializer_range": 0.3,
        },
        "audio_config": {"text_hidden_size": 32, "n_mel_bins": 4, "mel_vocab_size": 8},
        "image_token_id": IMAGE,
        "audio_token_id": 104,
        "image_bos_token_id": 105,
        "audio_bos_token_id": 106,
    },
    inkling_patches,
    tokens=(16, 8, 16),
    ours=("num_patches",),
    prepare=double_router,
    static_cache=False,
)

import families_grids  # noqa: E402, F401
