"""The processor of Video-LLaVA that writes one placeholder for each kept token."""

import torch
from transformers import VideoLlavaProcessor
from transformers.processing_utils import ProcessingKwargs, VideosKwargs

from .configuration_prunesid import PruneSIDConfig
from .processing_prunesid import PruneSIDImagesKwargs, ShortPromptProcessorMixin
from .sharing_prunesid import request_budgets


_OF_CLIPS = "num_visual_tokens_of_clips"


class PruneSIDVideosKwargs(VideosKwargs, total=False):
    """
    num_visual_tokens (`int` or `float`, *optional*):
        Tokens kept of each frame (with `budget_scope="image"`: of each clip), or their share, in place of the
        processor's own.
    """

    num_visual_tokens: int | float | None


class PruneSIDVideoLlavaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: PruneSIDImagesKwargs
    videos_kwargs: PruneSIDVideosKwargs
    _defaults = getattr(VideoLlavaProcessor.valid_processor_kwargs, "_defaults", {})


class PruneSIDVideoLlavaProcessor(ShortPromptProcessorMixin, VideoLlavaProcessor):
    r"""
    [`VideoLlavaProcessor`] that writes a placeholder for each kept token and returns the numbers as
    `num_visual_tokens`, a tensor of shape `(num_images + num_clips,)` that the model obeys: first the images, then the
    clips.

    Args:
        num_visual_tokens (`int` or `float`, *optional*):
            The `budget` of the model's `prunesid_config`. None (for a dynamic budget of each frame, or off) writes the
            full prompt of the stock processor. A call may pass another value.
        budget_scope (`"view"` or `"image"`, defaults to `"view"`):
            That of the model's `prunesid_config`: N counts the tokens of each frame, or of the whole clip.

    Raises:
        `ValueError`: for an invalid budget.
    """

    valid_processor_kwargs = PruneSIDVideoLlavaProcessorKwargs
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        video_processor=None,
        tokenizer=None,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        video_token="<video>",
        chat_template=None,
        num_additional_image_tokens=1,
        num_visual_tokens: int | float | None = None,
        budget_scope: str = "view",
        **kwargs,
    ):
        settings = PruneSIDConfig(budget=num_visual_tokens, budget_scope=budget_scope)
        self.num_visual_tokens, self.budget_scope = settings.budget, settings.budget_scope
        super().__init__(
            image_processor,
            video_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_token=image_token,
            video_token=video_token,
            chat_template=chat_template,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        output = super().__call__(images=images, text=text, videos=videos, **kwargs)
        of_clips, of_images = output.pop(_OF_CLIPS, None), output.get("num_visual_tokens")
        if of_clips is not None:
            if of_images is not None and isinstance(of_clips, torch.Tensor):
                of_clips = torch.cat([of_images, of_clips])
            elif of_images is not None:
                of_clips = [*of_images, *of_clips]
            output["num_visual_tokens"] = of_clips
        return output

    def _num_kept(self, num_tokens: int, num_visual_tokens: int | float | None, num_views: int = 1) -> int:
        settings = PruneSIDConfig(budget=self.num_visual_tokens, budget_scope=self.budget_scope)
        of_view = num_tokens // num_views
        budgets = request_budgets(settings, num_visual_tokens, [[of_view] * num_views], of_view)
        return num_tokens if budgets is None else budgets.totals[0]

    def replace_video_token(
        self, video_inputs: dict, video_idx: int, num_visual_tokens: int | float | None = None, **kwargs
    ) -> str:
        text = super().replace_video_token(video_inputs, video_idx, **kwargs)
        num_frames = len(video_inputs["pixel_values_videos"][video_idx])
        return self.video_token * self._num_kept(text.count(self.video_token), num_visual_tokens, num_frames)

    def _process_videos(self, videos, num_visual_tokens: int | float | None = None, **kwargs):
        video_inputs, replacements = super()._process_videos(videos, **kwargs)
        replacements = [
            self.replace_video_token(video_inputs, index, num_visual_tokens=num_visual_tokens, **kwargs)
            for index in range(len(replacements))
        ]
        if self.num_visual_tokens is not None or num_visual_tokens is not None:
            video_inputs[_OF_CLIPS] = [text.count(self.video_token) for text in replacements]
        return video_inputs, replacements


__all__ = ["PruneSIDVideoLlavaProcessor"]
