"""Families whose images and videos have the same placeholder in a prompt."""

from .family import PrunedModelMixin
from .processing import PrunedProcessorMixin


class SharedIdModelMixin(PrunedModelMixin):
    """The placeholder of images stands for videos too."""

    def find_placeholders(self, modality, input_ids, inputs_embeds):
        return super().find_placeholders("image", input_ids, inputs_embeds)


class SharedIdProcessorMixin(PrunedProcessorMixin):
    """For the processor of a [`SharedIdModelMixin`]."""

    def _placeholder(self, modality):
        return super()._placeholder("image")
