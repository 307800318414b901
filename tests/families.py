"""
The table of the family contract (`test_contract.py`): a row for each declared family and kind of input.

Configurations are tiny, weights random, and what a processor would return is written here by hand: no network, no
image library. Rows are added at the end of the file, by `add`.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers


PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END, TAG = 0, 1, 2, 100, 101, 102, 103, 11
SHIPPED = "5.18.0"


def one_run(num_tokens: int, index: int, token: int) -> list[int]:
    """An input as most processors write it: a placeholder for each token."""
    return [token] * num_tokens


def runs(length: int, begin: Sequence[int] = (), end: Sequence[int] = (TAG,)) -> Callable:
    """An input as runs of `length` placeholders, each with tags before and after it."""

    def write(num_tokens: int, index: int, token: int) -> list[int]:
        return [*begin, *[token] * length, *end] * (num_tokens // length)

    return write


@dataclass
class Row:
    """
    Args:
        name (`str`): of the row; the family's name, and a word more for its further rows.
        config (`dict`): fields of the stock configuration.
        inputs (`Callable`):
            What the processor returns beside the prompt, for inputs given as a list of indices a row of the batch:
            `[[0, 1], [2]]`. An input is the same whatever the others are.
        tokens, kept (`tuple[int, ...]`): T and N of inputs 0, 1, 2, ... at `budget`.
        view (`str`): what a view is, in words.
        budget (`int`): of each view.
        modality (`"image"` or `"video"`).
        rows (`tuple[int, ...]`): how many inputs each row of the batch of the tests has.
        write (`Callable`): the ids that input `index` of `num_tokens` is written as, given the id of its placeholder.
        along (`Callable`): further arguments of `forward` that run along the prompt `(batch, length)`.
        token (`int`): the placeholder.
        mrope (`bool`): positions are three-dimensional, and kept tokens keep theirs.
        needs_types (`bool`): with `mrope`: upstream's numbering reads `mm_token_type_ids`.
        family (`str`): the end of the name of the modeling file; by default the first word of `name`.
        since (`str`): the first release of Transformers that was seen to have the family.
        features (`Callable`): the stock output's rows of all inputs, one behind the other.
        put_features (`Callable`): the stock output with the rows of some inputs in place of its own.
        prepare (`Callable`): changes a new model, ours and the stock one alike.
        ours (`tuple[str, ...]`): those of `inputs` that only our classes take.
        beams (`bool`): False where the stock class itself cannot search by beams.
        cached_chat (`bool`): False where a cache cannot go on with a second turn of views in the stock class either.
        static_cache (`bool`): False where the stock class cannot use one.
        checks_loading (`bool`): False where the stock class itself does not load its own checkpoint.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[list[list[int]]], dict[str, Any]]
    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    view: str = "image"
    budget: int = 5
    modality: str = "image"
    rows: tuple[int, ...] = (2, 1)
    write: Callable[[int, int, int], list[int]] = one_run
    along: Callable[[torch.LongTensor], dict[str, Any]] = lambda ids: {}
    token: int = 0
    mrope: bool = False
    needs_types: bool = True
    family: str = ""
    since: str = SHIPPED
    features: Callable[[Any], torch.Tensor] = lambda output: torch.cat(list(output.pooler_output))
    put_features: Callable[[Any, list[torch.Tensor]], None] | None = None
    prepare: Callable[[Any], None] | None = None
    ours: tuple[str, ...] = ()
    beams: bool = True
    cached_chat: bool = True
    static_cache: bool = True
    checks_loading: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.family = self.family or self.name.split()[0]
        self.token = self.token or (IMAGE if self.modality == "image" else VIDEO)

    @property
    def is_installed(self) -> bool:
        """Whether the installed Transformers has the family."""
        return tuple(map(int, transformers.__version__.split(".")[:2])) >= tuple(map(int, self.since.split(".")[:2]))

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
    """As `tiles`, but `(batch, largest number of tiles, ...)`, where missing tiles are zero; `mask` marks the others."""

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


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "initializer_range": 0.3,
}
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
    tokens=(64,) * 3,
    kept=(5,) * 3,
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
        images(*shape, name="pixel_values_videos" if name else "pixel_values"),
        modality=modality,
        tokens=(130,) * 3 if name else (64,) * 3,
        kept=(10,) * 3 if name else (5,) * 3,
        view="frame" if name else "image",
    )
GRIDS = [[1, 8, 8], [1, 4, 8], [1, 8, 8]]
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "initializer_range": 0.3,
}
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
        kept=(5, 5, 5),
        view="temporal slice",
        write=lambda num_tokens, index, token: [VISION_START, *[token] * num_tokens, VISION_END],
        along=types_of(IMAGE, 1),
        mrope=True,
        settings={"min_budget": None},
    )


import families_grids  # noqa: E402, F401
