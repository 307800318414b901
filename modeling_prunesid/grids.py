"""What families of images of any size share: grids of merged patches, and a budget that is a share of them."""

from collections.abc import Sequence
from typing import Any

from .connector import BehindConnectorModelMixin
from .no_cls import BehindConnectorConfig
from .patches import from_windows, pool_blocks, tower_of
from .processing import PrunedProcessorMixin


class GridConfigMixin(BehindConnectorConfig):
    """
    For images of any number of tokens: the budget is a share by default, a third of the tokens and at least 16 (the
    authors' release for Qwen2-VL), of each image and of each temporal slice of a video, or with `budget_scope="image"`
    of each image and video. Tokens are compared as they leave the patch merger; `layer` is that of
    `score="attention"`.
    """

    _has_no_cls = "its vision tower has no CLS token"

    def _with_defaults(self, settings):
        settings = {"budget": 1 / 3, **settings}
        return settings if settings.get("budget_scope") == "image" else {"min_budget": 16, **settings}


class GridModelMixin(BehindConnectorModelMixin):
    """
    A view is a temporal slice of a grid. K is N/4 and lambda 18 N/T, which is N/32 at 576 tokens. The release for
    Qwen2-VL has the same, but lambda never falls below 1, and its rho is about half the true one.
    """

    views_apart: Sequence[str] = ("video",)

    def slices(self, modality: str, inputs: dict[str, Any]) -> list[int]:
        """In how many slices of equal length the tokens of each input lie one behind the other."""
        return inputs[f"{modality}_grid_thw"][:, 0].tolist()

    def views(self, modality, inputs, sizes):
        return [[size // count] * count for size, count in zip(sizes, self.slices(modality, inputs))]

    def sizes_of(self, modality, inputs):
        grids, vision = inputs[f"{modality}_grid_thw"], self.config.vision_config
        merged = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None)
        if merged is None:
            return None
        slices = self.slices(modality, inputs)
        return [count * height * width // merged**2 for count, (_, height, width) in zip(slices, grids.tolist())]

    # Whether the tower has patches in the order of the picture, not merged ones one behind the other.
    has_raster_patches = False

    def pool_attention(self, patches, modality, inputs, num_tokens):
        grids = inputs[f"{modality}_grid_thw"]
        if self.has_raster_patches:
            return pool_blocks(patches, grids, num_tokens)
        return from_windows(tower_of(self), patches.view(num_tokens, -1).mean(1), grids)


class GridProcessorMixin(PrunedProcessorMixin):
    """A view is a temporal slice of a grid, each with a run of its own or all in one."""

    def num_slices(self, modality: str, inputs: dict[str, Any], index: int) -> int:
        """As [`GridModelMixin.slices`], of one input."""
        return int(inputs[f"{modality}_grid_thw"][index][0])

    def view_lengths(self, modality, inputs, index, runs):
        slices = self.num_slices(modality, inputs, index)
        return [sum(runs) // slices] * slices
