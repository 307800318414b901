"""Which patches of a vision tower a token is merged from, as methods need it that rank tokens by attention."""

import math
from typing import Any

import torch
from torch import nn
from transformers.vision_utils import get_vision_window_index


_TOWERS = ("visual", "vision_tower", "vision_model", "vision_encoder")


def tower_of(model: Any) -> nn.Module:
    """The vision tower of a base model whose tokens are compared as they enter the language model."""
    name = model.tower_name or next((name for name in _TOWERS if hasattr(model, name)), None)
    if name is None:
        raise ValueError(
            f"score='attention' needs a vision tower, which {type(model).__name__} lacks. Use score='component'."
        )
    return model.get_submodule(name)


def pool_blocks(patches: torch.Tensor, grids: torch.LongTensor, num_tokens: int) -> torch.Tensor:
    """The mean of the square of patches that each token is merged from, of grids `(t, h, w)` in raster order."""
    side, pooled = math.isqrt(len(patches) // num_tokens), []
    for own, (frames, height, width) in zip(patches.split(grids.prod(-1).tolist()), grids.tolist()):
        blocks = own.view(frames, height // side, side, width // side, side)
        pooled.append(blocks.mean((2, 4)).flatten())
    return torch.cat(pooled)


def square_grids(model: Any, modality: str, inputs: dict[str, Any], num_patches: int) -> torch.LongTensor:
    """The `patch_grids` of families whose tower encodes square images, tiles or frames of one size."""
    size, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    side = size // patch if isinstance(size, int) else size[0] // patch[0]
    return torch.tensor([[1, side, side]]).expand(num_patches // side**2, -1)


def grids_of_image_sizes(model: Any, modality: str, inputs: dict[str, Any], num_patches: int) -> torch.LongTensor:
    """The `patch_grids` of families with Pixtral's tower, which encodes images `(height, width)` of any size."""
    sizes = torch.as_tensor(inputs["image_sizes"]) // model.config.vision_config.patch_size
    return torch.nn.functional.pad(sizes, (1, 0), value=1)


def from_windows(tower: nn.Module, tokens: torch.Tensor, grids: torch.LongTensor) -> torch.Tensor:
    """Merged tokens `(tokens,)` of a tower that lays them out by windows, in the order of the grids."""
    if not hasattr(tower, "fullatt_block_indexes"):
        return tokens
    index, _ = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return tokens[index.argsort().to(tokens.device)]
