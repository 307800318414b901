"""HY-V4-VL with PruneSID: tokens are chosen behind the patch merger and keep their positions."""

from transformers import (
    GenerationMixin,
    HYV4VLConfig,
    HYV4VLForConditionalGeneration,
    HYV4VLModel,
    HYV4VLProcessor,
)

from .budgets import View
from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin, rows_without_newlines
from .mrope import MRoPEModelMixin


class PruneSIDHYV4VLConfig(GridConfigMixin, HYV4VLConfig):
    """[`HYV4VLConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_hy_v4_vl"


class PruneSIDHYV4VLModel(MRoPEModelMixin, GridModelMixin, HYV4VLModel):
    """
    [`HYV4VLModel`] with compressing `get_*_features`; see [`GridModelMixin`]. The rows of a frame end with a token
    each, which leave with the first token that is dropped.
    """

    config_class = PruneSIDHYV4VLConfig
    views_apart = ()
    has_raster_patches = True

    def sizes_of(self, modality, inputs):
        merged, grids = self.config.vision_config.spatial_merge_size, inputs[f"{modality}_grid_thw"].tolist()
        return [frames * (height // merged) * (width // merged + 1) for frames, height, width in grids]

    def views(self, modality, inputs, sizes):
        merged, views = self.config.vision_config.spatial_merge_size, []
        for frames, height, width in inputs[f"{modality}_grid_thw"].tolist():
            height, width = height // merged, width // merged
            firsts = range(0, frames * height * (width + 1), height * (width + 1))
            views.append([View(rows_without_newlines(height, width, first)) for first in firsts])
        return views


class PruneSIDHYV4VLForConditionalGeneration(PrunedGenerationMixin, HYV4VLForConditionalGeneration, GenerationMixin):
    """[`HYV4VLForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDHYV4VLModel


class PruneSIDHYV4VLProcessor(GridProcessorMixin, HYV4VLProcessor):
    """[`HYV4VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""

    def view_lengths(self, modality, inputs, index, runs):
        merged = getattr(self, f"{modality}_processor").merge_size
        frames, height, width = map(int, inputs[f"{modality}_grid_thw"][index])
        return [(height // merged) * (width // merged)] * frames


PruneSIDHYV4VLAutoModel = register_family(PruneSIDHYV4VLForConditionalGeneration, PruneSIDHYV4VLProcessor)
