"""
Turns kept tokens into shorter prompts, once, at the entrance of `forward` and `generate`, for every model family.

A stock processor writes one placeholder for every visual token of a view. PruneSID encodes fewer, so the placeholders
of the dropped tokens leave the prompt together with their columns of the mask, the positions and the labels. From then
on everything upstream (caches, positions, decoding) works on the short prompt as if it had been written that way.
"""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

import torch

from .prompts import (
    IGNORED_LABEL,
    CachedPrompt,
    ShortPrompt,
    gather_columns,
    is_flat,
    is_right_padded,
    padding_of,
    read_placeholders,
    run_lengths,
    shorten_cached_mask,
    shorten_shifted_labels,
    without_answer,
)
from .upstream import CACHE_NAME, cache_of


# The pixels that each modality is encoded from, by the names that Transformers uses.
_PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


# The base model whose `generate` runs.
generating: ContextVar[Any] = ContextVar("generating", default=None)
# Whether the placeholders of the prompt that goes into upstream's next `forward` were counted at its entrance.
is_counted: ContextVar[bool] = ContextVar("is_counted", default=False)


@dataclass
class HostPrompt:
    """
    What the plan for a prompt reads of it, copied to the host at once before the tower is launched.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*).
        placeholders (`dict[str, torch.BoolTensor]`): of each modality, `(batch, length)`.
        mask (`torch.BoolTensor` of shape `(batch, cached + length)`, *optional*): a flat attention mask.
        labels (`dict[str, torch.BoolTensor]`): which columns of `labels` and `shift_labels` have one.
    """

    input_ids: torch.LongTensor | None
    placeholders: dict[str, torch.BoolTensor]
    mask: torch.BoolTensor | None
    labels: dict[str, torch.BoolTensor]

    @property
    def is_labelled(self) -> torch.BoolTensor | None:
        """Which columns have a label or predict one: the loss counts padding that is labelled."""
        is_labelled = None
        for name, labels in self.labels.items():
            own = torch.nn.functional.pad(labels[:, :-1], (1, 0)) if name == "shift_labels" else labels
            own = own | torch.nn.functional.pad(own[:, 1:], (0, 1))
            is_labelled = own if is_labelled is None else is_labelled | own
        return is_labelled

    def of(self, outputs: dict[str, Any]) -> torch.BoolTensor:
        """The placeholders `(batch, length)` of all encoded views, whatever their modality."""
        masks = [self.placeholders[name] for name, output in outputs.items() if output is not None]
        return torch.stack(masks).any(0)


class _CountedFeatures:
    """Features whose number was checked: what is compared with it is equal. All else is the features'."""

    def __init__(self, features: torch.Tensor):
        self.features = features

    def numel(self):
        return _Counted()

    def __getattr__(self, name: str):
        return getattr(self.features, name)

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        return self.features[index]


class _Counted:
    """A number that was compared already, and equals whatever it is compared with. No int, which tensors look at."""

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    def __floordiv__(self, other):
        return self

    __hash__ = None  # type: ignore[assignment]


def _to_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Integers and flags of any shapes, copied to the host at once."""
    if not tensors or torch.compiler.is_compiling():
        return tensors
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return tensors
    device = next(tensor.device for tensor in tensors.values() if tensor.device.type != "cpu")
    flat = torch.cat([tensor.to(device).long().flatten() for tensor in tensors.values()]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape).to(tensor.dtype) for (name, tensor), part in zip(tensors.items(), parts)}


class CompressedModelMixin:
    """
    For a base model (vision tower, projector and language model) whose `get_image_features` or `get_video_features`
    returns, besides upstream's fields, `keep_indices` and `num_placeholders` of each view where it dropped tokens.
    """

    # The position of the first column, where `forward` is given none.
    first_position = 0
    # Further arguments of `forward` that run along the prompt, with what fills added padding.
    along_prompt: dict[str, float | int] = {}

    def is_off(self, num_visual_tokens: Any) -> bool:
        """Whether nothing is to be dropped, whatever the input."""
        return False

    def features_of(self, output: Any) -> list[torch.Tensor]:
        """The rows `(tokens, dim)` that go into the prompt, of each entry of an encoder's output."""
        return list(output.pooler_output)

    def put_features(self, output: Any, keep: Callable[[Any], list[torch.Tensor]]) -> None:
        """Replaces in an encoder's output the rows that go into the prompt; `keep` takes those kept out of a list."""
        output.pooler_output = keep(output.pooler_output)
        if output.get("deepstack_features") is not None:
            output.deepstack_features = [keep(layer) for layer in output.deepstack_features]

    def encode_views(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """
        Replace the pixels among the arguments of `forward` by encoded features, as upstream's `generate` does.

        Raises:
            `ValueError`: if a modality is given both as pixels and as encoded features.
        """
        inputs, encoded, consumed = dict(inputs), {}, {"num_visual_tokens"}
        outputs = dict(inputs.get("mm_encoder_outputs") or {})
        for modality, pixels in _PIXELS.items():
            encode = getattr(self, f"get_{modality}_features", None)
            if encode is None or all(inputs.get(name) is None for name in pixels):
                continue
            if outputs.get(modality) is not None:
                raise ValueError(
                    f"You cannot specify both {pixels[0]} and mm_encoder_outputs[{modality!r}]; drop one of them."
                )
            names = [name for name in inspect.signature(encode).parameters if inputs.get(name) is not None]
            encoded[modality] = encode(**{name: inputs[name] for name in names}, return_dict=True)
            consumed.update(names)
        inputs = {name: value for name, value in inputs.items() if name not in consumed}
        if encoded:
            inputs["mm_encoder_outputs"] = {**outputs, **encoded}
        return inputs

    def find_placeholders(
        self, modality: str, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.BoolTensor:
        """Mask `(batch, length)` of the placeholders of `modality`, found as upstream finds them."""
        token_id = getattr(self.config, f"{modality}_token_id")
        if input_ids is not None:
            return input_ids == token_id
        token = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def look_at(self, inputs: dict[str, Any]) -> HostPrompt:
        """The arguments of `forward` that the plan for its prompt reads, in one copy to the host."""
        ids, embeds, mask = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        known = dict.fromkeys([*_PIXELS, *(inputs.get("mm_encoder_outputs") or {})])
        names = [name for name in known if getattr(self.config, f"{name}_token_id", None) is not None]
        tensors = {} if ids is None else {"ids": ids}
        if ids is None:
            tensors = {name: self.find_placeholders(name, None, embeds) for name in names}
        if is_flat(mask):
            tensors["mask"] = mask != 0
        columns = ids if ids is not None else embeds
        for name in ("labels", "shift_labels"):
            if inputs.get(name) is not None and inputs[name].shape == columns.shape[:2]:
                tensors[name] = inputs[name] != IGNORED_LABEL
        found = _to_host(tensors)
        ids = found.get("ids")
        labels: dict[str, Any] = {name: found[name] for name in ("labels", "shift_labels") if name in found}
        placeholders = {
            name: found[name] if ids is None else self.find_placeholders(name, ids, None) for name in names
        }
        return HostPrompt(ids, placeholders, found.get("mask"), labels)

    def compress(
        self, inputs: dict[str, Any], is_generation: bool = False
    ) -> tuple[dict[str, Any], ShortPrompt | None]:
        """
        Encodes the views among the arguments of `forward` and shortens everything that runs along the prompt.

        Args:
            inputs (`dict`): arguments of `forward`, by name.
            is_generation (`bool`): the arguments come from `generate`: with a filled cache, `input_ids` may repeat the
                whole conversation, and padding is added on the left.

        Returns:
            The arguments to go on with, and how the prompt was shortened (None if nothing was dropped).

        Raises:
            `ValueError`: if placeholders and views do not match.
        """
        stated = inputs.get("num_visual_tokens")
        is_stated = isinstance(stated, (list, tuple, torch.Tensor))
        if not torch.compiler.is_compiling() and generating.get() is not self:
            is_counted.set(False)
        has_prompt = inputs.get("input_ids") is not None or inputs.get("inputs_embeds") is not None
        pixels = [name for names in _PIXELS.values() for name in names]
        is_encoded = any(inputs.get(name) is not None for name in pixels)
        is_off = self.is_off(stated)
        host = self.look_at(inputs) if has_prompt and is_encoded and not is_off else None
        inputs = self.encode_views(inputs)
        input_ids, inputs_embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        columns = input_ids if input_ids is not None else inputs_embeds
        cache, mask = cache_of(inputs), inputs.get("attention_mask")
        has_views = bool(self._dropped_tokens(inputs))
        if not is_generation and not has_views and not torch.compiler.is_compiling() and generating.get() is self:
            return self.place(inputs, is_generation), None  # a step of our `generate`, on what it has shortened
        # A compiled step has its mask in the form that attention takes, which fits the cache.
        has_memory = hasattr(cache, "_prunesid_prompt") or hasattr(cache, "_prunesid_rope_deltas")
        has_memory = has_memory and (is_flat(mask) or not torch.compiler.is_compiling())
        # The common decoding step, eager or compiled: nothing to look at, and no wait for the device.
        is_step = columns is not None and (columns.shape[1] == 1 or torch.compiler.is_compiling())
        if columns is None or (is_step and not is_generation and not has_views and not has_memory):
            return inputs, None
        if is_off and not has_views and not has_memory:
            return self.place(inputs, is_generation), None
        if host is None:  # later steps on a cache have no views to look for
            is_looked_for = has_views or is_generation or cache is None
            host = self.look_at(inputs) if is_looked_for else HostPrompt(None, {}, None, {})
        cached_length = int(cache.get_seq_length()) if cache is not None else 0
        earlier = CachedPrompt.recall(cache, len(columns))
        repeats_cached = is_generation and (not is_flat(mask) or mask.shape[1] == columns.shape[1])
        start = 0
        if earlier is not None and not repeats_cached:
            positions, moved = inputs.get("position_ids"), earlier.prompt.moved
            callers_mask, added = mask, earlier.prompt.has_added_padding
            if mask is None and added:  # the caller's rows have no padding
                length = earlier.prompt.full_length + cached_length - earlier.prompt.length + columns.shape[1]
                callers_mask = torch.ones(len(columns), length, dtype=torch.long, device=columns.device)
            mask = shorten_cached_mask(callers_mask, earlier.prompt, cached_length, columns.shape[1])
            inputs["attention_mask"] = mask
            # Positions along a mask of the short prompt are upstream's own.
            if positions is not None and moved is not None and (mask is None or mask is not callers_mask):
                inputs["position_ids"] = positions - moved.to(positions.device)
        elif earlier is not None:
            earlier.check_followed_by(input_ids)
            start = earlier.prompt.full_length if earlier.starts(input_ids) else 0
        # What follows the earlier prompt in the cache is its answer, where an id of a placeholder is a word.
        seen = cached_length if repeats_cached else 0
        if start:
            seen = start + max(cached_length - earlier.prompt.length, 0)
        if is_generation and (not cached_length or earlier is not None):
            self._check_not_forgotten(inputs, host, start, seen)
        elif cache is None and not is_generation:
            self._check_not_forgotten(inputs, host, start, seen, only_whole_views=True)

        # Of a mask that was shortened for the cache, the columns of this prompt are the caller's.
        current = host.mask[:, -columns.shape[1] :] if host.mask is not None else None
        keep_mask, num_dropped = self._mark_kept(inputs, host, start, seen, current, is_stated)
        padding_side = "left" if is_generation or not is_right_padded(current) else "right"
        if has_views and not is_generation:
            inputs = self._ignore_placeholders(inputs, host)
        prompt = None
        if start:
            rest = torch.ones_like(input_ids, dtype=torch.bool) if keep_mask is None else keep_mask
            rest = ShortPrompt.from_keep_mask(rest[:, start:], padding_side, num_dropped=num_dropped)
            prompt = earlier.prompt.then(rest)
        elif keep_mask is not None:
            # Padding gives way to rows that lost less; a length that the caller pads to shrinks by what was dropped.
            padding, length = None, keep_mask.shape[1] - int(num_dropped.max())
            if current is not None and not (repeats_cached and cached_length):
                padding = padding_of(current, leading_only=padding_side == "left") & ~host.of(
                    inputs["mm_encoder_outputs"]
                )
                padding = padding if host.is_labelled is None else padding & ~host.is_labelled
            prompt = ShortPrompt.from_keep_mask(
                keep_mask, padding_side, minimum_length=length, padding=padding, num_dropped=num_dropped
            )
        if prompt is not None:
            prompt.cached_before = 0 if repeats_cached else cached_length
            inputs = self._shorten(inputs, prompt)
        if repeats_cached and cached_length and (has_views or prompt is not None):
            length = columns.shape[1] if prompt is None else prompt.length
            if length <= cached_length:
                raise ValueError(
                    f"{CACHE_NAME} holds {cached_length} columns, and the prompt has no more ({length}), so that "
                    "nothing is left to answer. Pass the whole conversation of the cache, or an empty cache."
                )
        inputs = self.place(inputs, is_generation)
        if not is_generation and cached_length and (prompt is not None or earlier is not None):
            inputs = self._place_behind_cache(inputs, earlier, prompt, cached_length)
        outputs = inputs.get("mm_encoder_outputs") or {}
        settled = {modality: _settle(output) for modality, output in self._dropped_tokens(inputs).items()}
        if settled:
            inputs = {**inputs, "mm_encoder_outputs": {**outputs, **settled}}
            if not torch.compiler.is_compiling():
                is_counted.set(set(settled) == {name for name, output in outputs.items() if output is not None})
        if repeats_cached and cached_length:
            inputs = self._drop_cached_features(inputs, cached_length)
        return inputs, prompt

    def _place_behind_cache(
        self, inputs: dict[str, Any], earlier: CachedPrompt | None, prompt: ShortPrompt | None, cached_length: int
    ) -> dict[str, Any]:
        """
        Without positions upstream counts the columns of the cache. Padding that was added between a row's own columns,
        or gave way there, is none of the row's.
        """
        if inputs.get("position_ids") is not None or (earlier is not None and cached_length < earlier.prompt.length):
            return inputs
        columns = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        batch, length, device = len(columns), columns.shape[1], columns.device
        current = ShortPrompt.whole(batch, length, device) if prompt is None else prompt
        before = ShortPrompt.whole(batch, 0, device) if earlier is None else earlier.prompt
        before = before.then(ShortPrompt.whole(batch, cached_length - before.length, device))
        ahead = before.columns_ahead + current.first_ahead - before.then(current).first_ahead
        if not ahead.any():
            return inputs
        positions = (torch.arange(length) + cached_length + self.first_position - ahead).to(device, non_blocking=True)
        return {**inputs, "position_ids": positions}

    def get_placeholder_mask(self, *args, **kwargs):
        """Upstream's. What it checks was checked at the entrance, so that it need not wait for the device."""
        if torch.compiler.is_compiling() or not is_counted.get():
            return super().get_placeholder_mask(*args, **kwargs)
        signature = inspect.signature(super().get_placeholder_mask)
        arguments = signature.bind(*args, **kwargs).arguments
        for name, value in arguments.items():
            if name.endswith("features") and isinstance(value, torch.Tensor):
                arguments[name] = _CountedFeatures(value)
        return super().get_placeholder_mask(**arguments)

    def place(self, inputs: dict[str, Any], is_generation: bool) -> dict[str, Any]:
        """Gives a family the shortened arguments to add positions to that upstream cannot find from them."""
        return inputs

    def forward_compressed(
        self,
        forward: Callable,
        input_ids: torch.LongTensor | None = None,
        is_shortened: bool = False,
        **inputs,
    ):
        """
        Upstream's `forward` on the shortened arguments; what it returns has the caller's columns. The head, which has
        shortened them already (`is_shortened`), gets the short ones.
        """
        if is_shortened:
            return forward(input_ids=input_ids, **inputs)
        inputs, prompt = self.compress({"input_ids": input_ids, **inputs})
        return run_shortened(forward, inputs, input_ids, prompt, self.config)

    def _dropped_tokens(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The encoded modalities of which tokens were dropped, by name."""
        outputs = inputs.get("mm_encoder_outputs") or {}
        return {name: out for name, out in outputs.items() if getattr(out, "keep_indices", None) is not None}

    def _ignore_placeholders(self, inputs: dict[str, Any], host: HostPrompt) -> dict[str, Any]:
        """
        Labels of placeholders are ignored: how many of them are left is no matter of the loss. `num_items_in_batch`,
        which counted them, is reduced by their share of the labels.
        """
        if not host.labels:
            return inputs
        inputs, placeholders = dict(inputs), host.of(inputs["mm_encoder_outputs"])
        of_next = torch.nn.functional.pad(placeholders[:, 1:], (0, 1), value=False)
        for name, ignored in (("labels", placeholders), ("shift_labels", of_next)):
            if name not in host.labels:
                continue
            given = host.labels[name]
            if name == "labels":  # nothing predicts the first column, unless padding is added before it
                ignored = ignored.index_fill(1, torch.zeros(1, dtype=torch.long), True)
                given = given & ~torch.nn.functional.pad(torch.ones_like(given[:, :1]), (0, given.shape[1] - 1))
            labels = inputs[name]
            inputs[name] = labels.masked_fill(ignored.to(labels.device, non_blocking=True), IGNORED_LABEL)
            is_used = name == "shift_labels" or inputs.get("shift_labels") is None
            if is_used and inputs.get("num_items_in_batch") is not None:
                given, counted = int(given.sum()), int((given & ~ignored).sum())
                if counted < given:
                    inputs["num_items_in_batch"] = inputs["num_items_in_batch"] * (counted / given)
        return inputs

    def _mark_kept(
        self,
        inputs: dict[str, Any],
        host: HostPrompt,
        start: int,
        seen: int,
        mask: torch.Tensor | None,
        is_stated: bool,
    ) -> tuple[torch.BoolTensor | None, torch.LongTensor | None]:
        """
        The kept columns, None for all, and how many each row loses. Those before `start` were shortened with
        the cache, and those before `seen` are in it.

        Raises:
            `ValueError`: if columns would go that are in a cache, where they were not shortened.
        """
        keep_mask, num_dropped = None, None
        for modality, output in self._dropped_tokens(inputs).items():
            placeholders, new = host.placeholders[modality], None
            if seen:
                placeholders = without_answer(placeholders, start, seen)
                new = placeholders & (torch.arange(placeholders.shape[1]) >= seen)
            num_kept = [len(kept) for kept in output.keep_indices]
            # Either the views of the whole conversation are passed again, or the new ones alone.
            reading = read_placeholders(
                placeholders, output.num_placeholders, num_kept, modality, new=new, is_token=mask, is_stated=is_stated
            )
            if reading is None:
                continue
            if reading.drops_between(start, seen, num_kept):
                raise ValueError(
                    f"{CACHE_NAME} was filled by another prompt: input_ids have every placeholder of views in the "
                    "cache, which were not shortened there. Pass the cache that belongs to the conversation, or an "
                    "empty one."
                )
            device = self._device_of_prompt(inputs)
            views, of_views = output.get("view_lengths"), output.get("num_kept_of_views")
            kept = reading.mark_kept(output.keep_indices, device, views, of_views)
            keep_mask = kept if keep_mask is None else keep_mask & kept
            lost = reading.num_dropped(num_kept, start)
            num_dropped = lost if num_dropped is None else num_dropped + lost
        return keep_mask, num_dropped

    @staticmethod
    def _device_of_prompt(inputs: dict[str, Any]) -> torch.device:
        return (inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]).device

    def _check_not_forgotten(
        self, inputs: dict[str, Any], host: HostPrompt, start: int, seen: int, only_whole_views: bool = False
    ) -> None:
        """
        Upstream embeds a placeholder without a view like a word; with compression on, that is an error. A `forward` on
        ids that are no prompt, as profilers and tests run it, is left to upstream: `only_whole_views`.
        """
        outputs, input_ids = inputs.get("mm_encoder_outputs") or {}, host.input_ids
        if input_ids is None or inputs.get("inputs_embeds") is not None or self.config.prunesid_config.budget is None:
            return
        for modality in outputs:  # a placeholder may be that of two modalities
            if modality in host.placeholders:
                input_ids = input_ids.masked_fill(host.placeholders[modality], -1)
        for modality, pixels in _PIXELS.items():
            token_id = getattr(self.config, f"{modality}_token_id", None)
            if token_id is None or outputs.get(modality) is not None:
                continue
            placeholders = without_answer(input_ids == token_id, start, seen)[:, start:]
            found = int(placeholders.sum())
            if found and (not only_whole_views or self.are_whole_views(run_lengths(placeholders))):
                raise ValueError(
                    f"{modality.capitalize()} features and {modality} tokens do not match, tokens: {found}, "
                    f"features: 0. The prompt has {modality} placeholders but no {modality}; pass {pixels[0]}."
                )

    def are_whole_views(self, run_lengths: list[int]) -> bool:
        """Whether runs of so many placeholders each stand for whole views; False where a family cannot tell."""
        return False

    def _shorten(self, inputs: dict[str, Any], prompt: ShortPrompt) -> dict[str, Any]:
        """Drop the columns from every argument that runs along the prompt."""
        inputs = dict(inputs)
        mask, added_padding = inputs.get("attention_mask"), prompt.has_added_padding
        if mask is not None and not is_flat(mask):
            got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
            raise ValueError(
                f"attention_mask must have the shape (batch, length) for a prompt that is to be shortened, got {got}. "
                "Pass the two-dimensional mask, or a prompt with one placeholder for each kept token."
            )
        if mask is None and added_padding:
            mask = torch.ones_like(prompt.keep_mask, dtype=torch.long)
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
            inputs["shift_labels"] = shorten_shifted_labels(inputs["shift_labels"], prompt)
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
        placeholder_ids = [getattr(self.config, f"{modality}_token_id", None) for modality in _PIXELS]
        padding_id = self.config.get_text_config().pad_token_id
        candidates = [0, 1, 2] if padding_id is None else [padding_id, 0, 1, 2]
        return next(candidate for candidate in candidates if candidate not in placeholder_ids)

    def _drop_cached_features(self, inputs: dict[str, Any], cached_length: int) -> dict[str, Any]:
        """Features whose placeholders are in the cache already are not needed again."""
        outputs = dict(inputs.get("mm_encoder_outputs") or {})
        for modality, output in list(outputs.items()):
            placeholders = self.find_placeholders(modality, inputs.get("input_ids"), inputs.get("inputs_embeds"))
            is_new = torch.arange(placeholders.shape[1], device=placeholders.device) >= cached_length
            lengths = [len(entry) for entry in self.features_of(output)]
            if not (placeholders & ~is_new).any():
                continue
            if int(placeholders.sum()) != sum(lengths):
                if int((placeholders & is_new).sum()) == sum(lengths):
                    continue
                raise ValueError(
                    f"The {modality}s have {sum(lengths)} kept tokens, but {CACHE_NAME} and the prompt hold "
                    f"{int(placeholders.sum())} placeholders. Pass the budget (num_visual_tokens) that filled the "
                    f"cache, or the {modality}s of the new turn alone."
                )
            needed = is_new.expand_as(placeholders)[placeholders].split(lengths)
            del outputs[modality]
            if any(wanted.any() for wanted in needed):
                outputs[modality] = _settle(output)
                self.put_features(outputs[modality], lambda entries, needed=needed: _take_wanted(entries, needed))
        return {**inputs, "mm_encoder_outputs": outputs}


def _take_wanted(views: list[torch.Tensor], wanted: list[torch.BoolTensor]) -> list[torch.Tensor]:
    return [view[rows.to(view.device)] for view, rows in zip(views, wanted) if rows.any()]


def run_shortened(
    forward: Callable,
    inputs: dict[str, Any],
    input_ids: torch.LongTensor | None,
    prompt: ShortPrompt | None,
    config: Any,
) -> Any:
    """
    Upstream's `forward` on shortened arguments. Its logits and hidden states get the columns of the caller's prompt
    `input_ids`; a tuple, where one is asked for, has what the stock class returns.
    """
    if prompt is None and (torch.compiler.is_compiling() or not is_counted.get()):
        return forward(**inputs)
    if prompt is None:
        try:
            return forward(**inputs)
        finally:
            is_counted.set(False)
    inputs = dict(inputs)
    return_dict, keep = inputs.pop("return_dict", None), inputs.pop("logits_to_keep", 0)
    columns = prompt.callers_columns()
    wanted = _select(columns, keep)
    logits_columns = wanted
    if isinstance(keep, int) and keep:  # the caller's last columns carry no earlier ones of the short prompt
        added = int(prompt.is_own.flip(1).long().argmax(1).max())
        inputs["logits_to_keep"] = min(keep + added + 1, prompt.length)
        logits_columns = wanted - (prompt.length - inputs["logits_to_keep"])
    elif wanted is not columns:  # the head runs on the short columns that any row needs
        needed, logits_columns = wanted.unique(return_inverse=True)
        inputs["logits_to_keep"] = needed
    try:
        output = forward(**inputs, return_dict=True)
    finally:
        if not torch.compiler.is_compiling():
            is_counted.set(False)
    cache = cache_of(output)
    CachedPrompt(input_ids, prompt).behind(cache).remember(cache)
    if output.get("logits") is not None:
        output["logits"] = _gather_logits(output["logits"], logits_columns, keep)
    if output.get("last_hidden_state") is not None:
        output["last_hidden_state"] = gather_columns(output["last_hidden_state"], columns)
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(
            state if state is None else gather_columns(state, columns) for state in output["hidden_states"]
        )
    if not (config.return_dict if return_dict is None else return_dict):
        return tuple(output[field.name] for field in fields(output) if output.get(field.name) is not None)
    output["keep_mask"] = prompt.keep_mask
    return output


def _select(columns: torch.LongTensor, keep: int | torch.Tensor) -> torch.LongTensor:
    """Of `columns` `(batch, length)` those that `logits_to_keep` asks for, in the forms that upstream takes."""
    if isinstance(keep, int):
        return columns[:, -keep:] if keep else columns
    if isinstance(keep, torch.Tensor):
        keep = keep.to(columns.device)
        if keep.dim() == 2 and keep.dtype != torch.bool:
            return columns.gather(1, keep % columns.shape[1])
        if keep.dim() == 2:
            return columns[keep]
    return columns[:, keep]


def _gather_logits(logits: torch.Tensor, columns: torch.LongTensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The `columns` of logits `(batch, length, vocabulary)`; a mask of columns gives `(columns, vocabulary)`."""
    if columns.dim() == 1:
        return logits[keep.nonzero()[:, 0].to(logits.device), columns.to(logits.device)]
    return gather_columns(logits, columns)


def _settle(output: Any) -> Any:
    """A copy of an encoder's output with upstream's fields alone: it fits the prompt, and beams may repeat it."""
    settled = type(output)(
        **{field.name: output[field.name] for field in fields(output) if output.get(field.name) is not None}
    )
    settled.is_pruned = True
    return settled
