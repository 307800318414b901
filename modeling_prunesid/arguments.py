"""The arguments of `forward` that run along the prompt, made as short as it."""

from typing import Any

import torch

from .plans import Plan
from .prompts import IGNORED_LABEL, ShortPrompt, is_flat
from .upstream import PIXELS


class ShortensArgumentsMixin:
    """The steps of a [`CompressedModelMixin`] that shorten what runs along the prompt."""

    # Further arguments of `forward` that run along the prompt, with what fills added padding.
    along_prompt: dict[str, float | int] = {}

    def _ignore_placeholders(self, inputs: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """
        Labels of placeholders are ignored: how many of them are left is no matter of the loss. `num_items_in_batch`,
        which counted them, is reduced by their share of the labels.
        """
        inputs = dict(inputs)
        for name, (ignored, given) in plan.labels_of_placeholders(self._outputs(inputs)).items():
            labels = inputs[name]
            inputs[name] = labels.masked_fill(ignored.to(labels.device, non_blocking=True), IGNORED_LABEL)
            is_used = name == "shift_labels" or inputs.get("shift_labels") is None
            if is_used and inputs.get("num_items_in_batch") is not None:
                counted, given = int((given & ~ignored).sum()), int(given.sum())
                if counted < given:
                    inputs["num_items_in_batch"] = inputs["num_items_in_batch"] * (counted / given)
        return inputs

    def _shorten(self, inputs: dict[str, Any], prompt: ShortPrompt) -> dict[str, Any]:
        """Drop the columns from every argument that runs along the prompt."""
        inputs = dict(inputs)
        mask = inputs.get("attention_mask")
        if mask is not None and not is_flat(mask):
            got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
            raise ValueError(
                f"attention_mask must have the shape (batch, length) for a prompt that is to be shortened, got {got}. "
                "Pass the two-dimensional mask, or a prompt with one placeholder for each kept token."
            )
        if mask is None and prompt.has_added_padding:
            shape = len(prompt.keep_mask), prompt.cached_before + prompt.full_length
            mask = torch.ones(shape, dtype=torch.long, device=prompt.keep_mask.device)
        if mask is not None:
            cached, current = mask[:, : -prompt.full_length], mask[:, -prompt.full_length :]
            inputs["attention_mask"] = torch.cat([cached, prompt.take(current, fill=0)], dim=1)
        fills = {
            "input_ids": self._padding_id(),
            "inputs_embeds": 0.0,
            "labels": IGNORED_LABEL,
            "token_type_ids": 0,
            "mm_token_type_ids": 0,
            **self.along_prompt,
        }
        for name, fill in fills.items():
            if inputs.get(name) is not None:
                inputs[name] = prompt.take(inputs[name], fill)
        if inputs.get("shift_labels") is not None and inputs["shift_labels"].shape[1] == prompt.full_length:
            inputs["shift_labels"] = prompt.take_shifted_labels(inputs["shift_labels"])
        if inputs.get("position_ids") is not None:
            is_token = None if mask is None else mask[:, -prompt.full_length :] != 0
            inputs["position_ids"] = self._shorten_positions(inputs["position_ids"], prompt, is_token)
        return inputs

    def _shorten_positions(
        self, position_ids: torch.LongTensor, prompt: ShortPrompt, is_token: torch.BoolTensor | None
    ) -> torch.LongTensor:
        prompt.moved = prompt.moved_at_end(position_ids, is_token)
        return prompt.take_positions(position_ids, is_token)

    def _padding_id(self) -> int:
        """An id for added padding that is no placeholder."""
        placeholder_ids = [getattr(self.config, f"{modality}_token_id", None) for modality in PIXELS]
        padding_id = self.config.get_text_config().pad_token_id
        candidates = [0, 1, 2] if padding_id is None else [padding_id, 0, 1, 2]
        return next(candidate for candidate in candidates if candidate not in placeholder_ids)
