"""GLM-5-Next with PruneSID: tokens are chosen behind the patch merger."""

from transformers import (
    GenerationMixin,
    Glm5NextConfig,
    Glm5NextForConditionalGeneration,
    Glm5NextModel,
    Glm5NextProcessor,
)

from .family import PrunedGenerationMixin, register_family
from .grids import GridConfigMixin, GridModelMixin, GridProcessorMixin
from .shared_id import SharedIdProcessorMixin


class PruneSIDGlm5NextConfig(GridConfigMixin, Glm5NextConfig):
    """[`Glm5NextConfig`] with a nested [`PruneSIDConfig`]; see [`GridConfigMixin`]."""

    model_type = "prunesid_glm5_next"


class PruneSIDGlm5NextModel(GridModelMixin, Glm5NextModel):
    """[`Glm5NextModel`] with compressing `get_*_features`; see [`GridModelMixin`]."""

    config_class = PruneSIDGlm5NextConfig

    def find_placeholders(self, modality, input_ids, inputs_embeds):
        """The placeholder of images, between the tags of a video or not."""
        found = {
            name: super(PruneSIDGlm5NextModel, self).find_placeholders(name, input_ids, inputs_embeds)
            for name in ("image", "video_start", "video_end")
        }
        is_in_video = found["video_start"].cumsum(-1) > found["video_end"].cumsum(-1)
        return found["image"] & (is_in_video if modality == "video" else ~is_in_video)


class PruneSIDGlm5NextForConditionalGeneration(
    PrunedGenerationMixin, Glm5NextForConditionalGeneration, GenerationMixin
):
    """[`Glm5NextForConditionalGeneration`] on shortened prompts; see [`PrunedGenerationMixin`]."""

    model_class = PruneSIDGlm5NextModel


class PruneSIDGlm5NextProcessor(SharedIdProcessorMixin, GridProcessorMixin, Glm5NextProcessor):
    """[`Glm5NextProcessor`] that writes short prompts; see [`PrunedProcessorMixin`]."""


PruneSIDGlm5NextAutoModel = register_family(PruneSIDGlm5NextForConditionalGeneration, PruneSIDGlm5NextProcessor)
