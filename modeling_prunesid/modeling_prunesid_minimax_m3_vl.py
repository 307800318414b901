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
        if modality == "image":
            return super().num_slices(modality, inputs, index)
        return sum(self._slices_of_chunks(inputs, index))

    def _slices_of_chunks(self, inputs, index):
        counts = inputs.get("num_chunks_per_video")
        if counts is None:  # a release whose videos are one chunk each
            counts = [1] * len(inputs["video_grid_thw"])
        start = sum(counts[:index])
        return [int(grid[0]) for grid in inputs["video_grid_thw"][start : start + counts[index]]]

    def _write(self, modality, inputs, texts, num_visual_tokens):
        inputs, texts = super()._write(modality, inputs, texts, num_visual_tokens)
        if inputs.get(OF_VIDEOS) is not None:
            kept = [iter(self._runs(text, "video")) for text in texts]
            inputs[OF_VIDEOS] = [
                sum(next(runs) for _ in range(slices))
                for index, runs in enumerate(kept)
                for slices in self._slices_of_chunks(inputs, index)
            ]
        return inputs, texts


PruneSIDMiniMaxM3VLAutoModel = register_family(
    PruneSIDMiniMaxM3VLForConditionalGeneration, PruneSIDMiniMaxM3VLProcessor
)
