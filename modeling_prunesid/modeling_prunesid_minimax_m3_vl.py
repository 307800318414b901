"""MiniMax-M3-VL with PruneSID: tokens are chosen behind the patch merger."""

from transformers import (
    GenerationMixin,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MiniMaxM3VLModel,
    MiniMaxM3VLProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .processing import OF_VIDEOS


class PruneSIDMiniMaxM3VLConfig(GridConfigMixin, MiniMaxM3VLConfig):
    """[`MiniMaxM3VLConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_minimax_m3_vl"


class PruneSIDMiniMaxM3VLModel(GridModelMixin, MiniMaxM3VLModel):
    """[`MiniMaxM3VLModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDMiniMaxM3VLConfig


class PruneSIDMiniMaxM3VLForConditionalGeneration(
    PrunedGenerationMixin, MiniMaxM3SparseForConditionalGeneration, GenerationMixin
):
    """[`MiniMaxM3SparseForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDMiniMaxM3VLModel


class PruneSIDMiniMaxM3VLProcessor(GridProcessorMixin, MiniMaxM3VLProcessor):
    """
    [`MiniMaxM3VLProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]. A video is encoded as chunks that
    the model takes as inputs of their own, so that there is a count for each chunk.
    """

    def num_slices(self, modality, inputs, index):
        counts = inputs.get("num_chunks_per_video") if modality == "video" else None
        if counts is None:  # an image, or a video of a release whose videos are one chunk each
            return super().num_slices(modality, inputs, index)
        start = sum(counts[:index])
        return sum(int(grid[0]) for grid in inputs["video_grid_thw"][start : start + counts[index]])

    def _write(self, modality, inputs, texts, num_visual_tokens):
        inputs, texts = super()._write(modality, inputs, texts, num_visual_tokens)
        if inputs.get(OF_VIDEOS) is not None:
            runs = (run for text in texts for run in self._runs(text, "video"))
            inputs[OF_VIDEOS] = [sum(next(runs) for _ in range(int(grid[0]))) for grid in inputs["video_grid_thw"]]
        return inputs, texts


PruneSIDMiniMaxM3VLAutoModel = register_family(
    PruneSIDMiniMaxM3VLForConditionalGeneration, PruneSIDMiniMaxM3VLProcessor
)
