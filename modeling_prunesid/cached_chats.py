"""What changes where a cache holds the start of a conversation, of which upstream knows nothing but the length."""

from dataclasses import fields
from typing import Any

import torch

from .plans import Plan, is_counted, to_host
from .prompts import ShortPrompt, columns_of
from .upstream import CACHE_NAME


class ContinuesCacheMixin:
    """The steps of a [`CompressedModelMixin`] that bring the arguments of `forward` into line with a filled cache."""

    # The position of the first column, where `forward` is given none.
    first_position = 0

    def _go_on_with_cache(self, inputs: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """A caller's mask and positions, which count the full prompt that filled the cache, count the short one."""
        earlier, mask = plan.earlier, inputs.get("attention_mask")
        if earlier is None or plan.repeats_cached:
            plan.check_cache()
            return inputs
        columns, prompt, callers_mask = columns_of(inputs), earlier.prompt, mask
        if mask is None and prompt.has_added_padding:  # the caller's rows have no padding
            length = prompt.full_length + plan.cached_length - prompt.length + columns.shape[1]
            callers_mask = torch.ones(len(columns), length, dtype=torch.long, device=columns.device)
        mask = prompt.take_cached_mask(callers_mask, plan.cached_length, columns.shape[1])
        inputs = {**inputs, "attention_mask": mask}
        positions, moved = inputs.get("position_ids"), prompt.moved
        # Positions along a mask of the short prompt are upstream's own.
        if positions is not None and moved is not None and (mask is None or mask is not callers_mask):
            inputs["position_ids"] = positions - moved.to(positions.device)
        return inputs

    @staticmethod
    def _check_prompt_goes_on(plan: Plan, length: int, has_changed: Any) -> None:
        if plan.repeats_cached and plan.cached_length and has_changed and length <= plan.cached_length:
            raise ValueError(
                f"{CACHE_NAME} holds {plan.cached_length} columns, and the prompt has no more ({length}), so that "
                "nothing is left to answer. Pass the whole conversation of the cache, or an empty cache."
            )

    def _place_behind_cache(self, inputs: dict[str, Any], plan: Plan, prompt: ShortPrompt | None) -> dict[str, Any]:
        """
        Without positions upstream counts the columns of the cache. Padding that was added between a row's own columns,
        or gave way there, is none of the row's.
        """
        earlier, cached_length = plan.earlier, plan.cached_length
        if inputs.get("position_ids") is not None or (earlier is not None and cached_length < earlier.prompt.length):
            return inputs
        columns = columns_of(inputs)
        batch, length, device = len(columns), columns.shape[1], columns.device
        current = ShortPrompt.whole(batch, length, device) if prompt is None else prompt
        before = ShortPrompt.whole(batch, 0, device) if earlier is None else earlier.prompt
        before = before.then(ShortPrompt.whole(batch, cached_length - before.length, device))
        ahead = before.columns_ahead + current.first_ahead - before.then(current).first_ahead
        if not ahead.any():
            return inputs
        positions = torch.arange(length) + cached_length + self.first_position - ahead
        return {**inputs, "position_ids": positions.to(device, non_blocking=True)}

    def _settle(self, inputs: dict[str, Any], plan: Plan, num_dropped: int) -> dict[str, Any]:
        """Encoders' outputs become upstream's again, which fit the prompt, and lose what the cache has seen."""
        outputs = dict(inputs.get("mm_encoder_outputs") or {})
        settled = {modality: _settled(output) for modality, output in self._dropped_tokens(inputs).items()}
        if settled:
            inputs = {**inputs, "mm_encoder_outputs": {**outputs, **settled}}
            if not torch.compiler.is_compiling():
                is_counted.set(settled.keys() == self._outputs(inputs).keys())
        if plan.repeats_cached and plan.cached_length and not self._has_new_views_alone(inputs, plan, num_dropped):
            inputs = self._drop_cached_features(inputs, plan.cached_length)
        return inputs

    def _has_new_views_alone(self, inputs: dict[str, Any], plan: Plan, num_dropped: int) -> bool:
        """Whether the host knows that the features are those of the columns behind the cache."""
        outputs = self._outputs(inputs)
        if len(outputs) != 1 or not plan.start or plan.cached_length < plan.earlier.prompt.length:
            return False
        ((modality, output),) = outputs.items()
        found = int(plan.placeholders[modality][:, plan.seen :].sum()) - num_dropped
        return found == sum(len(entry) for entry in self.features_of(output))

    def _drop_cached_features(self, inputs: dict[str, Any], cached_length: int) -> dict[str, Any]:
        """Features whose placeholders are in the cache already are not needed again."""
        outputs, ids_or_embeds = self._outputs(inputs), (inputs.get("input_ids"), inputs.get("inputs_embeds"))
        found = to_host({modality: self.find_placeholders(modality, *ids_or_embeds) for modality in outputs})
        for modality, placeholders in found.items():
            is_new = torch.arange(placeholders.shape[1], device=placeholders.device) >= cached_length
            lengths = [len(entry) for entry in self.features_of(outputs[modality])]
            if not (placeholders & ~is_new).any():
                continue
            if int(placeholders.sum()) != sum(lengths):
                if int((placeholders & is_new).sum()) == sum(lengths):
                    continue
                raise ValueError(does_not_fit_cache(modality, sum(lengths), int(placeholders.sum())))
            wanted = [own.nonzero()[:, 0] for own in is_new.expand_as(placeholders)[placeholders].split(lengths)]
            output = _settled(outputs.pop(modality))
            if any(map(len, wanted)):
                outputs[modality] = output
                self.put_features(output, lambda entries, wanted=wanted: _rows_of_entries(entries, wanted))
        return {**inputs, "mm_encoder_outputs": outputs}


def does_not_fit_cache(kind: str, num_features: int, num_placeholders: int) -> str:
    """What is wrong with views (images, videos) of a conversation whose start a cache holds."""
    return (
        f"The {kind}s have {num_features} kept tokens, but {CACHE_NAME} and the prompt hold {num_placeholders} "
        "placeholders. Pass the budget (num_visual_tokens) that filled the cache, or the "
        f"{kind}s of the new turn alone."
    )


def _rows_of_entries(entries: list[torch.Tensor], rows: list[torch.LongTensor]) -> list[torch.Tensor]:
    return [entry[own.to(entry.device, non_blocking=True)] for entry, own in zip(entries, rows) if len(own)]


def _settled(output: Any) -> Any:
    """A copy of an encoder's output with upstream's fields alone: it fits the prompt, and beams may repeat it."""
    settled = type(output)(
        **{field.name: output[field.name] for field in fields(output) if output.get(field.name) is not None}
    )
    settled.is_pruned = True
    return settled
