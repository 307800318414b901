"""Fewer pixels or fewer cells in place of a choice of tokens: what every method has to beat (arXiv 2510.07143).

- `downsample-image`: the picture is made smaller, so that the tower itself gives about N patches, its positions
  interpolated;
- `downsample-features`: the tower reads the whole picture, and its patches are averaged to as many cells;
- `downsample-enlarged`, a control that saves nothing: the small picture is enlarged again and read with all T tokens.
  What it loses is lost with the pixels; what `downsample-image` loses beyond that, by the coarser grid.

The grid keeps the shape of the picture, and its counts are whole: of 24 x 24 patches 14 x 14, 11 x 11, 8 x 8, 6 x 6
and 4 x 4, that is 196, 121, 64, 36 and 16 tokens for budgets of 192, 128, 64, 32 and 16. All stay, in raster order.
"""

import inspect
import math
from typing import Any

import torch
from torch.nn import functional

from .encoder import Kept, patch_features


def encode_small(base_model: Any, pixel_values: torch.Tensor, layers: list[int], budget: int) -> list[Kept]:
    """
    Args:
        base_model: LLaVA with a tower that reads pictures of several sizes: CLIP, SigLIP or DINOv2.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`).
        layers (`list[int]`): the feature layers.
        budget (`int`): N, about.
    """
    grid = _full_grid(base_model, pixel_values)
    small = reduced(pixel_values, base_model.vision_tower.config.patch_size, coarse_grid(grid, budget))
    indices = centres(grid, coarse_grid(grid, budget)).to(pixel_values.device)
    return [Kept(view, indices) for view in _features(base_model, small, layers)]


def encode_enlarged(base_model: Any, pixel_values: torch.Tensor, layers: list[int], budget: int) -> list[Kept]:
    """See [`encode_small`]."""
    grid = _full_grid(base_model, pixel_values)
    small = reduced(pixel_values, base_model.vision_tower.config.patch_size, coarse_grid(grid, budget))
    large = functional.interpolate(small.float(), pixel_values.shape[-2:], mode="bicubic", antialias=True)
    indices = torch.arange(grid[0] * grid[1], device=pixel_values.device)
    return [Kept(view, indices) for view in _features(base_model, large.to(pixel_values.dtype), layers)]


def encode_cells(base_model: Any, pixel_values: torch.Tensor, layers: list[int], budget: int) -> list[Kept]:
    """See [`encode_small`]."""
    grid = _full_grid(base_model, pixel_values)
    cells = coarse_grid(grid, budget)
    maps = _features(base_model, pixel_values, layers).transpose(1, 2).unflatten(-1, grid)
    pooled = functional.adaptive_avg_pool2d(maps.float(), cells).flatten(2).transpose(1, 2).to(maps.dtype)
    indices = centres(grid, cells).to(pixel_values.device)
    return [Kept(view, indices) for view in pooled]


def coarse_grid(grid: tuple[int, int], budget: int) -> tuple[int, int]:
    """Rows and columns, of about the shape of `grid` and about `budget` cells."""
    rows, columns = grid
    scale = math.sqrt(budget / (rows * columns))
    return max(round(rows * scale), 1), max(round(columns * scale), 1)


def centres(grid: tuple[int, int], cells: tuple[int, int]) -> torch.LongTensor:
    """The patch of `grid` in the middle of each of the `cells`, row by row."""
    rows, columns = ((2 * torch.arange(few) + 1) * many // (2 * few) for many, few in zip(grid, cells))
    return (rows[:, None] * grid[1] + columns).flatten()


def reduced(pixel_values: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Pictures `(batch, channels, height, width)` at the size of which each patch is one of `grid`."""
    size = (grid[0] * patch_size, grid[1] * patch_size)
    small = functional.interpolate(pixel_values.float(), size, mode="bicubic", antialias=True)
    return small.to(pixel_values.dtype)


def _full_grid(base_model: Any, pixel_values: torch.Tensor) -> tuple[int, int]:
    height, width = (side // base_model.vision_tower.config.patch_size for side in pixel_values.shape[-2:])
    return height, width


def _features(base_model: Any, pixel_values: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """Features `(batch, patches, dim)` of pictures of any size."""
    resized = {"interpolate_pos_encoding": True}  # DINOv2 does so unasked
    takes = inspect.signature(base_model.vision_tower.forward).parameters
    resized = resized if "interpolate_pos_encoding" in takes else {}
    return patch_features(base_model, pixel_values, layers, **resized)
