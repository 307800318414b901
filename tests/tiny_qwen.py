"""Tiny random Qwen-VL models, their prompts of images, videos and text, and what the language model is given."""

from contextlib import contextmanager

import torch
import transformers
from copies import remembered
from tiny import random_model

import modeling_prunesid
from modeling_prunesid.upstream import cache_of


PAD, EOS, VISION_START, VISION_END, IMAGE, VIDEO = 0, 2, 91, 92, 93, 94
FAMILIES = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
PATCH_DIM = 3 * 2 * 4 * 4

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "initializer_range": 0.3,
}
VISION_OF = {
    "Qwen2VL": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "Qwen2_5_VL": {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 64,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
    "Qwen3VL": {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}


def fields(family):
    text = {**TEXT, "head_dim": 8} if family == "Qwen3VL" else TEXT
    return {
        "text_config": text,
        "vision_config": {**VISION, **VISION_OF[family]},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }


def our_class(family, name="ForConditionalGeneration"):
    return getattr(modeling_prunesid, f"PruneSID{family}{name}")


def stock_class(family, name="ForConditionalGeneration"):
    return getattr(transformers, f"{family}{name}")


@remembered
def build(family, budget=0.25, min_budget=4, **settings):
    """A random model whose answers depend on what it sees and end at `max_new_tokens`."""
    torch.manual_seed(0)
    settings = {"budget": budget, "min_budget": min_budget, **settings}
    config = our_class(family, "Config")(**fields(family), prunesid_config=settings)
    model = our_class(family)(config).double().eval()
    with torch.no_grad():
        model.lm_head.weight[[PAD, EOS, VISION_START, VISION_END, IMAGE, VIDEO]] = 0
    return model


def stock_twin(model, family):
    stock = random_model(stock_class(family), fields(family)).to(model.dtype)
    stock.load_state_dict(model.state_dict())
    return stock


def tokens_of(grid):
    return grid[0] * grid[1] * grid[2] // 4


def pixels(grids, seed):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(t * h * w, PATCH_DIM, generator=generator) for t, h, w in grids]
    return torch.cat(views)


def prompt(family, *parts):
    """
    One row, of text (integers), images `("image", grid)` and videos `("video", grid)`. Qwen3-VL writes a timestamp
    before each temporal slice of a video, and the others write one run of placeholders.
    """
    ids, seen = [], {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        kind, grid = part
        seen[kind].append(grid)
        placeholder = IMAGE if kind == "image" else VIDEO
        if kind == "video" and family == "Qwen3VL":
            for frame in range(grid[0]):
                ids += [10 + frame, VISION_START, *[VIDEO] * (grid[1] * grid[2] // 4), VISION_END]
        else:
            ids += [VISION_START, *[placeholder] * tokens_of(grid), VISION_END]
    return ids, seen


def batch(family, *rows, seed=0, side="left"):
    """The inputs of a batch of `prompt`s; the pixels of a view depend on its grid and `seed`, not on the batch."""
    length = max(len(ids) for ids, _ in rows)
    padded, mask = [], []
    for ids, _ in rows:
        padding, ones = [PAD] * (length - len(ids)), [1] * len(ids)
        padded.append(padding + ids if side == "left" else ids + padding)
        mask.append([0] * len(padding) + ones if side == "left" else ones + [0] * len(padding))
    input_ids = torch.tensor(padded)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int(),
    }
    for kind, suffix in (("image", ""), ("video", "_videos")):
        grids = [grid for _, seen in rows for grid in seen[kind]]
        if grids:
            inputs[f"pixel_values{suffix}"] = torch.cat([pixels([grid], seed + sum(grid)) for grid in grids])
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids)
    if family == "Qwen2_5_VL" and "video_grid_thw" in inputs:
        inputs["second_per_grid_ts"] = torch.full((len(inputs["video_grid_thw"]),), 1.5)
    return inputs


@contextmanager
def positions_seen(model):
    """Collects the `(3, batch, length)` positions of every run of the language model."""
    seen = []

    def collect(module, args, kwargs):
        position_ids = kwargs["position_ids"]
        if position_ids is None:
            past = cache_of(kwargs).get_seq_length() if cache_of(kwargs) is not None else 0
            batch, length = kwargs["inputs_embeds"].shape[:2]
            position_ids = torch.arange(past, past + length).expand(1, batch, -1)
        position_ids = position_ids[None] if position_ids.dim() == 2 else position_ids
        seen.append(position_ids[-3:].expand(3, -1, -1).clone())

    handle = model.model.language_model.register_forward_pre_hook(collect, with_kwargs=True)
    yield seen
    handle.remove()
