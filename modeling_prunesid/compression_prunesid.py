"""
Turns kept tokens into shorter prompts, once, at the entrance of `forward` and `generate`, for every model family.

A stock processor writes one placeholder for every visual token of a view. PruneSID encodes fewer, so the placeholders
of the dropped tokens leave the prompt together with their columns of the mask, the positions and the labels. From then
on everything upstream (caches, positions, decoding) works on the short prompt as if it had been written that way; what
`generate` returns begins with the caller's own prompt again.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from .upstream_prunesid import CACHE_NAME, cache_of, rename_cache


# The pixels that each modality is encoded from, by the names that Transformers uses.
_PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
_IGNORED_LABEL = -100


@dataclass
class ShortPrompt:
    """
    Which columns of a prompt remain.

    Args:
        source (`torch.LongTensor` of shape `(batch, short_length)`):
            For each column of the short prompt, its column in the full prompt; -1 where padding was added because rows
            of a batch lost different numbers of columns.
        keep_mask (`torch.BoolTensor` of shape `(batch, full_length)`):
            The columns of the full prompt that remain.
        moved (`torch.LongTensor` of shape `(batch, 1)`, *optional*):
            By how much the positions that the caller gave were moved up at the end of the prompt.
        cached_before (`int`): columns of a cache that come before the prompt.
    """

    source: torch.LongTensor
    keep_mask: torch.BoolTensor
    moved: torch.LongTensor | None = None
    cached_before: int = 0

    @classmethod
    def from_keep_mask(cls, keep_mask: torch.BoolTensor, padding_side: str, minimum_length: int = 0) -> "ShortPrompt":
        """
        The columns that `keep_mask` `(batch, full_length)` marks, moved together. Rows shorter than the longest one,
        or than `minimum_length`, are filled up on the `padding_side`, `"left"` or `"right"`.
        """
        lengths = keep_mask.sum(1)
        length = max(int(lengths.max()), minimum_length)
        # A stable sort moves the kept columns to the front and leaves them in order.
        source = (~keep_mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]
        columns = torch.arange(length, device=keep_mask.device)
        if padding_side == "left":
            columns = columns - (length - lengths)[:, None]
            source = source.gather(1, columns.clamp(min=0))
            return cls(source.masked_fill(columns < 0, -1), keep_mask)
        return cls(source.masked_fill(columns >= lengths[:, None], -1), keep_mask)

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device) -> "ShortPrompt":
        """All of `length` columns."""
        source = torch.arange(length, device=device).expand(batch, -1)
        return cls(source, torch.ones_like(source, dtype=torch.bool))

    @property
    def full_length(self) -> int:
        return self.keep_mask.shape[1]

    @property
    def length(self) -> int:
        return self.source.shape[1]

    def take(self, columns: torch.Tensor, fill: float | int) -> torch.Tensor:
        """The remaining columns of a `(batch, full_length, ...)` tensor, with `fill` in added padding."""
        source = self.source.to(columns.device)
        shape = (*source.shape, *[1] * (columns.dim() - 2))
        index = source.clamp(min=0).view(shape).expand(-1, -1, *columns.shape[2:])
        return columns.gather(1, index).masked_fill((source < 0).view(shape), fill)

    def take_positions(self, position_ids: torch.LongTensor) -> torch.LongTensor:
        """
        Positions `(batch, full_length)` of the remaining columns, moved up to be contiguous. A sequence packed behind
        another one in the same row, where positions start anew, is moved within itself.
        """
        keep_mask = self.keep_mask.to(position_ids.device)
        position_ids = position_ids.expand(keep_mask.shape[0], -1)
        return self.take(position_ids - self._dropped_before(position_ids), fill=0)

    def moved_at_end(self, position_ids: torch.LongTensor) -> torch.LongTensor:
        """By how much [`take_positions`] moves what follows each row's last position, of shape `(batch, 1)`."""
        position_ids = position_ids.expand(self.keep_mask.shape[0], -1)
        # Positions of padding behind a row do not rise.
        rises = torch.nn.functional.pad(position_ids.diff(dim=1) > 0, (1, 0), value=True)
        columns = torch.arange(self.full_length, device=position_ids.device)
        last = columns.masked_fill(~rises, 0).amax(1, keepdim=True)
        dropped = (~self.keep_mask.to(position_ids.device)).long()
        return (self._dropped_before(position_ids) + dropped).gather(1, last)

    def _dropped_before(self, position_ids: torch.LongTensor) -> torch.LongTensor:
        """How many columns were dropped before each column of its sequence: `(batch, full_length)`."""
        keep_mask = self.keep_mask.to(position_ids.device)
        dropped = (~keep_mask).cumsum(1) - (~keep_mask).long()
        starts = torch.ones_like(keep_mask)
        starts[:, 1:] = position_ids.diff(dim=1) != 1
        columns = torch.arange(self.full_length, device=position_ids.device).expand_as(position_ids)
        first = columns.masked_fill(~starts, 0).cummax(1).values
        return dropped - dropped.gather(1, first)

    def then(self, rest: "ShortPrompt") -> "ShortPrompt":
        """This prompt continued by the columns of `rest`."""
        shifted = rest.source + self.full_length * (rest.source >= 0)
        moved = [part.moved for part in (self, rest) if part.moved is not None]
        return ShortPrompt(
            torch.cat([self.source, shifted], dim=1),
            torch.cat([self.keep_mask, rest.keep_mask], dim=1),
            sum(moved) if moved else None,
        )

    def repeat_rows(self, times: int) -> "ShortPrompt":
        """Each row `times` times in succession, as `generate` repeats them for beams."""
        return ShortPrompt(
            self.source.repeat_interleave(times, 0),
            self.keep_mask.repeat_interleave(times, 0),
            None if self.moved is None else self.moved.repeat_interleave(times, 0),
        )


@dataclass
class CachedPrompt:
    """
    The prompt that filled a cache: its caller's ids `(batch, full_length)`, if known, and how it was shortened.
    Columns that another call put into the cache have the id -1.
    """

    input_ids: torch.LongTensor | None
    prompt: ShortPrompt

    def remember(self, cache: Any) -> None:
        """Leave this on a cache, for the calls that go on with it."""
        if cache is not None:
            cache._prunesid_prompt = self

    def behind(self, cache: Any) -> "CachedPrompt":
        """This as the end of all that fills `cache`, which remembers the part before if that was shortened."""
        held, batch, device = self.prompt.cached_before, len(self.prompt.source), self.prompt.source.device
        if cache is None or not held:
            return self
        earlier = CachedPrompt.recall(cache, batch)
        if earlier is None:
            nothing = torch.zeros(batch, 0, dtype=torch.long, device=device)
            earlier = CachedPrompt(nothing, ShortPrompt.whole(batch, 0, device))
        followed = held - earlier.prompt.length
        if followed < 0:  # the cache was cropped
            return self
        input_ids = None
        if self.input_ids is not None and earlier.input_ids is not None:
            unknown = self.input_ids.new_full((batch, followed), -1)
            input_ids = torch.cat([earlier.input_ids.to(unknown.device), unknown, self.input_ids], dim=1)
        before = earlier.prompt.then(ShortPrompt.whole(batch, followed, device))
        return CachedPrompt(input_ids, before.then(self.prompt))

    @staticmethod
    def recall(cache: Any, batch: int) -> "CachedPrompt | None":
        """
        What filled `cache`, for `batch` rows (beams repeat the rows of a cache); None where nothing was dropped.

        Raises:
            `ValueError`: if the rows of the cache are not those of the prompt that filled it.
        """
        cached = getattr(cache, "_prunesid_prompt", None)
        if cached is None or cache.get_seq_length() == 0:
            return None
        rows = len(cached.prompt.source)
        if batch % rows:
            raise ValueError(
                f"{CACHE_NAME} was filled by {rows} rows and is continued by {batch}, so that it is unknown what "
                "was dropped from which. Pass a multiple of its rows, or start from an empty cache."
            )
        times = batch // rows
        input_ids = cached.input_ids if cached.input_ids is None else cached.input_ids.repeat_interleave(times, 0)
        return CachedPrompt(input_ids, cached.prompt.repeat_rows(times))

    def starts(self, input_ids: torch.LongTensor | None) -> bool:
        """Whether `input_ids` `(batch, length)` begin with this prompt, as those of a whole conversation do."""
        length = self.prompt.full_length
        if self.input_ids is None or input_ids is None or input_ids.shape[1] < length:
            return False
        expected = self.input_ids.to(input_ids.device)
        return bool(((input_ids[:, :length] == expected) | (expected < 0)).all())


def mark_kept_placeholders(
    placeholders: torch.BoolTensor,
    num_placeholders: list[int],
    keep_indices: list[torch.LongTensor],
    modality: str = "image",
) -> torch.BoolTensor | None:
    """
    Marks the columns of a prompt that remain.

    Args:
        placeholders (`torch.BoolTensor` of shape `(batch, length)`): visual placeholders, in the order of the views.
        num_placeholders (`list[int]`): T of each view, the placeholders that the stock processor writes for it.
        keep_indices (`list[torch.LongTensor]`): the kept of these, N of each view. -1 stands for a token that has no
            placeholder of its own (the CLS token) and takes the view's first free one.
        modality (`str`): named in errors.

    Returns:
        A mask of the shape of `placeholders`, or None if the prompt has N placeholders for each view already.

    Raises:
        `ValueError`: if the prompt has neither T nor N placeholders for each view.
    """
    full, short = sum(num_placeholders), sum(len(kept) for kept in keep_indices)
    # A compiled graph cannot count; a prompt too short for T placeholders is checked by upstream inside the graph.
    if torch.compiler.is_compiling() and placeholders.numel() < full:
        return None
    rows = placeholders.sum(1).tolist()
    found = sum(rows)
    label = modality.capitalize()
    if found not in (full, short):
        raise ValueError(
            f"{label} features and {modality} tokens do not match, tokens: {found}, features: {short}. A prompt holds "
            f"either every placeholder that the stock processor writes ({full} for these {len(num_placeholders)} "
            f"{modality}s) or one for each kept token ({short}); build it with the model's processor."
        )

    counts = [len(kept) for kept in keep_indices] if found == short else num_placeholders
    ends = set(torch.tensor([0, *counts]).cumsum(0).tolist())
    for row, end in enumerate(torch.tensor(rows).cumsum(0).tolist()):
        if end not in ends:
            raise ValueError(
                f"{label} features and {modality} tokens do not match, tokens: {rows[row]} in row {row}, which is no "
                f"whole number of {modality}s of {counts} tokens; build the prompt with the model's processor."
            )
    if found == short:
        return None

    flags = []
    for total, kept in zip(num_placeholders, keep_indices):
        flag = torch.zeros(total, dtype=torch.bool, device=placeholders.device)
        flag[kept[kept >= 0].to(placeholders.device)] = True
        without_place = int((kept < 0).sum())
        if without_place:
            flag[(~flag).nonzero()[:without_place, 0]] = True
        flags.append(flag)
    keep_mask = torch.ones_like(placeholders)
    keep_mask[placeholders] = torch.cat(flags)
    return keep_mask


class CompressedModelMixin:
    """
    For a base model (vision tower, projector and language model) whose `get_image_features` or `get_video_features`
    returns, besides upstream's fields, `keep_indices` and `num_placeholders` of each view where it dropped tokens.
    """

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
            The arguments to go on with, and what became of the prompt (None if nothing was dropped).

        Raises:
            `ValueError`: if placeholders and views do not match.
        """
        inputs = self.encode_views(inputs)
        input_ids, inputs_embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        columns = input_ids if input_ids is not None else inputs_embeds
        cache, mask = cache_of(inputs), inputs.get("attention_mask")
        has_views = bool(self._dropped_tokens(inputs))
        # A compiled step has its mask in the form that attention takes, which fits the cache.
        has_memory = hasattr(cache, "_prunesid_prompt") or hasattr(cache, "_prunesid_rope_deltas")
        has_memory = has_memory and (_is_flat(mask) or not torch.compiler.is_compiling())
        # The common decoding step, eager or compiled: nothing to look at, and no wait for the device.
        is_step = columns is not None and (columns.shape[1] == 1 or torch.compiler.is_compiling())
        if columns is None or (is_step and not is_generation and not has_views and not has_memory):
            return inputs, None
        cached_length = int(cache.get_seq_length()) if cache is not None else 0
        earlier = CachedPrompt.recall(cache, len(columns))
        repeats_cached = is_generation and (not _is_flat(mask) or mask.shape[1] == columns.shape[1])
        start = 0
        if earlier is not None and not repeats_cached:
            callers_mask = mask
            mask = _shorten_cached_mask(callers_mask, earlier.prompt, cached_length, columns.shape[1])
            inputs["attention_mask"] = mask
            positions, moved = inputs.get("position_ids"), earlier.prompt.moved
            # Positions along a mask of the short prompt are upstream's own.
            if positions is not None and moved is not None and (mask is None or mask is not callers_mask):
                inputs["position_ids"] = positions - moved.to(positions.device)
        elif earlier is not None and earlier.starts(input_ids):
            start = earlier.prompt.full_length
        # What follows the earlier prompt in the cache is its answer, where an id of a placeholder is a word.
        seen = cached_length if repeats_cached else 0
        if start:
            seen = start + max(cached_length - earlier.prompt.length, 0)
        if is_generation and (not cached_length or earlier is not None):
            self._check_not_forgotten(inputs, start, seen)
        elif cache is None and not is_generation:
            self._check_not_forgotten(inputs, start, seen, only_whole_views=True)

        keep_mask = self._mark_kept(inputs, start, seen)
        padding_side = "left" if is_generation or _is_left_padded(mask) else "right"
        prompt = None
        if start:
            rest = torch.ones_like(input_ids, dtype=torch.bool) if keep_mask is None else keep_mask
            prompt = earlier.prompt.then(ShortPrompt.from_keep_mask(rest[:, start:], padding_side))
        elif keep_mask is not None:
            # Padding gives way to rows that lost less; a length that the caller pads to shrinks by what was dropped.
            length = int(keep_mask.sum(1).min())
            if _is_flat(mask) and not (repeats_cached and cached_length):
                current = mask[:, -keep_mask.shape[1] :]
                keep_mask = keep_mask & ~_padding(current, leading_only=is_generation)
            prompt = ShortPrompt.from_keep_mask(keep_mask, padding_side, minimum_length=length)
        if prompt is not None:
            prompt.cached_before = 0 if repeats_cached else cached_length
            inputs = self._shorten(inputs, prompt)
        inputs = self.place(inputs, is_generation)
        outputs = inputs.get("mm_encoder_outputs") or {}
        settled = {modality: _settle(output) for modality, output in self._dropped_tokens(inputs).items()}
        if settled:
            inputs = {**inputs, "mm_encoder_outputs": {**outputs, **settled}}
        if repeats_cached and cached_length:
            inputs = self._drop_cached_features(inputs, cached_length)
        return inputs, prompt

    def place(self, inputs: dict[str, Any], is_generation: bool) -> dict[str, Any]:
        """Gives a family the shortened arguments to add positions to that upstream cannot find from them."""
        return inputs

    def forward_compressed(self, forward: Callable, input_ids: torch.LongTensor | None = None, **inputs):
        """Upstream's `forward` on the shortened arguments."""
        inputs, prompt = self.compress({"input_ids": input_ids, **inputs})
        return _finish_forward(forward(**inputs), input_ids, prompt)

    def _dropped_tokens(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The encoded modalities of which tokens were dropped, by name."""
        outputs = inputs.get("mm_encoder_outputs") or {}
        return {name: out for name, out in outputs.items() if getattr(out, "keep_indices", None) is not None}

    def _mark_kept(self, inputs: dict[str, Any], start: int, seen: int) -> torch.BoolTensor | None:
        """
        The columns that remain, None for all. Those before `start` were shortened with the cache, and those before
        `seen` are in it.
        """
        keep_mask = None
        for modality, output in self._dropped_tokens(inputs).items():
            placeholders = self.find_placeholders(modality, inputs.get("input_ids"), inputs.get("inputs_embeds"))
            new = placeholders
            if seen:
                placeholders = _without_answer(placeholders, start, seen)
                new = placeholders & (torch.arange(placeholders.shape[1], device=placeholders.device) >= seen)
                # Either the new views alone are passed, or those of the whole conversation again.
                counts = (sum(output.num_placeholders), sum(len(kept) for kept in output.keep_indices))
                new = new if int(new.sum()) in counts else placeholders
            kept = mark_kept_placeholders(new, output.num_placeholders, output.keep_indices, modality)
            if kept is not None:
                keep_mask = kept if keep_mask is None else keep_mask & kept
        return keep_mask

    def _check_not_forgotten(
        self, inputs: dict[str, Any], start: int, seen: int, only_whole_views: bool = False
    ) -> None:
        """
        Upstream embeds a placeholder without a view like a word; with compression on, that is an error. A `forward` on
        ids that are no prompt, as profilers and tests run it, is left to upstream: `only_whole_views`.
        """
        outputs, input_ids = inputs.get("mm_encoder_outputs") or {}, inputs.get("input_ids")
        if input_ids is None or inputs.get("inputs_embeds") is not None or self.config.prunesid_config.budget is None:
            return
        for modality, pixels in _PIXELS.items():
            token_id = getattr(self.config, f"{modality}_token_id", None)
            if token_id is None or outputs.get(modality) is not None:
                continue
            placeholders = _without_answer(input_ids == token_id, start, seen)[:, start:]
            found = int(placeholders.sum())
            if found and (not only_whole_views or self.are_whole_views(_run_lengths(placeholders))):
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
        mask, added_padding = inputs.get("attention_mask"), bool((prompt.source < 0).any())
        if mask is not None and not _is_flat(mask):
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
            "labels": _IGNORED_LABEL,
            "token_type_ids": 0,
            "mm_token_type_ids": 0,
        }
        for name, fill in fills.items():
            if inputs.get(name) is not None:
                inputs[name] = prompt.take(inputs[name], fill)
        if inputs.get("shift_labels") is not None and inputs["shift_labels"].shape[1] == prompt.full_length:
            inputs["shift_labels"] = _shorten_shifted_labels(inputs["shift_labels"], prompt)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = self._shorten_positions(inputs["position_ids"], prompt)
        return inputs

    def _shorten_positions(self, position_ids: torch.LongTensor, prompt: ShortPrompt) -> torch.LongTensor:
        prompt.moved = prompt.moved_at_end(position_ids)
        return prompt.take_positions(position_ids)

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
            features = torch.cat(list(output.pooler_output))
            if not (placeholders & ~is_new).any():
                continue
            if int(placeholders.sum()) != len(features):
                if int((placeholders & is_new).sum()) == len(features):
                    continue
                raise ValueError(
                    f"The {modality}s have {len(features)} kept tokens, but {CACHE_NAME} and the prompt hold "
                    f"{int(placeholders.sum())} placeholders. Pass the budget (num_visual_tokens) that filled the "
                    f"cache, or the {modality}s of the new turn alone."
                )
            needed = is_new.expand_as(placeholders)[placeholders].to(features.device)
            needed = needed.split([len(view) for view in output.pooler_output])
            del outputs[modality]
            if any(wanted.any() for wanted in needed):
                changes = {"pooler_output": _take_wanted(output.pooler_output, needed)}
                if output.get("deepstack_features") is not None:
                    changes["deepstack_features"] = [
                        _take_wanted(layer, needed) for layer in output.deepstack_features
                    ]
                outputs[modality] = _settle(output, **changes)
        return {**inputs, "mm_encoder_outputs": outputs}


def _take_wanted(views: list[torch.Tensor], wanted: list[torch.BoolTensor]) -> list[torch.Tensor]:
    return [view[rows.to(view.device)] for view, rows in zip(views, wanted) if rows.any()]


def _finish_forward(output: Any, input_ids: torch.LongTensor | None, prompt: ShortPrompt | None) -> Any:
    """Record on an output, and on its cache, what became of the prompt."""
    if prompt is not None and not isinstance(output, tuple):
        cache = cache_of(output)
        CachedPrompt(input_ids, prompt).behind(cache).remember(cache)
        output["keep_mask"] = prompt.keep_mask
    return output


def _settle(output: Any, **changes: Any) -> Any:
    """A copy of an encoder's output with upstream's fields alone: it fits the prompt, and upstream may reorder it."""
    return type(output)(
        **{
            field.name: changes.get(field.name, output[field.name])
            for field in fields(output)
            if output.get(field.name) is not None
        }
    )


def _is_flat(mask: Any) -> bool:
    """Whether a mask has the shape `(batch, length)`. Upstream also takes `(batch, 1, queries, keys)` and dicts."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 2


def _shorten_shifted_labels(shift_labels: torch.LongTensor, prompt: ShortPrompt) -> torch.LongTensor:
    """`shift_labels` holds at each column the label of the next one; in the short prompt, of the next that remains."""
    labels = torch.nn.functional.pad(shift_labels[:, :-1], (1, 0), value=_IGNORED_LABEL)
    return torch.cat([prompt.take(labels, _IGNORED_LABEL)[:, 1:], shift_labels[:, -1:]], dim=1)


def _without_answer(placeholders: torch.BoolTensor, start: int, seen: int) -> torch.BoolTensor:
    """
    The placeholders but for ids in the answer to an earlier prompt of length `start`, which are words: the columns up
    to `seen`, that are in its cache, and a last one that is not.
    """
    if not start:
        return placeholders
    is_answer = torch.zeros_like(placeholders)
    is_answer[:, start:seen] = True
    alone = placeholders & ~torch.nn.functional.pad(placeholders[:, 1:], (0, 1))
    is_answer[:, seen : seen + 1] = alone[:, seen : seen + 1]
    return placeholders & ~is_answer


def _run_lengths(placeholders: torch.BoolTensor) -> list[int]:
    """The lengths of the runs of adjacent placeholders in the rows."""
    edges = torch.nn.functional.pad(placeholders.long(), (1, 1)).diff(dim=1)
    return ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()


def _padding(mask: torch.Tensor, leading_only: bool) -> torch.BoolTensor:
    """The columns before the first and after the last token of each row; padding is added anew where it is needed."""
    padding = mask.cumsum(1) == 0
    return padding if leading_only else padding | (mask.flip(1).cumsum(1) == 0).flip(1)


def _is_left_padded(mask: Any) -> bool:
    return _is_flat(mask) and bool((mask[:, 0] == 0).any())


def _shorten_cached_mask(mask: Any, prompt: ShortPrompt, cached_length: int, new_length: int) -> Any:
    """A mask over the caller's full prompt, what followed it, and the new columns, for a cache of the short prompt."""
    followed = cached_length - prompt.length
    if not _is_flat(mask) or mask.shape[1] != prompt.full_length + followed + new_length:
        return mask
    return torch.cat([prompt.take(mask[:, : prompt.full_length], fill=0), mask[:, prompt.full_length :]], dim=1)


class _CallersPrompt:
    """Puts the caller's prompt back in front of what follows the short one."""

    def __init__(self, input_ids: torch.LongTensor, short_length: int):
        self.input_ids = input_ids
        self.short_length = short_length

    def restore(self, sequences: torch.LongTensor) -> torch.LongTensor:
        prompt = self.input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(self.input_ids), 0)
        return torch.cat([prompt, sequences[:, self.short_length :]], dim=1)

    def restore_row(self, batch_id: int, sequence: torch.LongTensor) -> torch.LongTensor:
        return torch.cat([self.input_ids[batch_id].to(sequence.device), sequence[self.short_length :]])


class _SeesCallersPrompt:
    """A caller's logits processor or stopping criterion, shown sequences that begin with the caller's prompt."""

    def __init__(self, function: Callable, prompt: _CallersPrompt):
        self.function, self.prompt = function, prompt

    def __call__(self, input_ids, scores):
        return self.function(self.prompt.restore(input_ids), scores)

    @property
    def eos_token_id(self):
        """Upstream pads what follows the end of a row if any criterion has this attribute."""
        return self.function.eos_token_id


class _StreamsCallersPrompt:
    """A caller's streamer, given the caller's prompt first."""

    def __init__(self, streamer, prompt: _CallersPrompt):
        self.streamer, self.prompt = streamer, prompt

    def put(self, value):
        if self.prompt is not None:
            value, self.prompt = self.prompt.restore(value), None
        self.streamer.put(value)

    def end(self):
        self.streamer.end()


class CompressedGenerationMixin:
    """For a model with a language-modelling head whose `self.model` is a [`CompressedModelMixin`]."""

    def forward_compressed(self, forward: Callable, input_ids: torch.LongTensor | None = None, **inputs):
        """Upstream's `forward` on the shortened arguments."""
        inputs, prompt = self.model.compress({"input_ids": input_ids, **inputs})
        return _finish_forward(forward(**inputs), input_ids, prompt)

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        synced_gpus=None,
        assistant_model=None,
        streamer=None,
        **kwargs,
    ):
        r"""
        Upstream's `generate`, on a shortened prompt. All arguments, and what is returned, are upstream's: sequences
        begin with the caller's own `input_ids`, and `max_length` and `min_length` count from them.

        Args:
            num_visual_tokens (`int`, `float`, `list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                The budget of this call, in place of `config.prunesid_config.budget`.

        Raises:
            `ValueError`: if placeholders and views do not match, or the budget is invalid.
        """
        if inputs is not None and kwargs.get("input_ids") is None and not inputs.is_floating_point():
            kwargs["input_ids"], inputs = inputs, None
        kwargs = rename_cache(kwargs)
        callers_ids, cache = kwargs.get("input_ids"), cache_of(kwargs)
        if callers_ids is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._mask_padding(callers_ids, generation_config, kwargs)
        kwargs, prompt = self.model.compress(kwargs, is_generation=True)
        arguments = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "streamer": streamer,
        }
        if prompt is not None:
            self._count_from_callers_prompt(generation_config, kwargs, prompt)
        if prompt is None or callers_ids is None:
            return super().generate(inputs, **arguments, **kwargs)

        callers_prompt = _CallersPrompt(callers_ids, prompt.length)
        if logits_processor is not None:
            wrapped = [_SeesCallersPrompt(processor, callers_prompt) for processor in logits_processor]
            arguments["logits_processor"] = LogitsProcessorList(wrapped)
        if stopping_criteria is not None:
            wrapped = [_SeesCallersPrompt(criterion, callers_prompt) for criterion in stopping_criteria]
            arguments["stopping_criteria"] = StoppingCriteriaList(wrapped)
        if prefix_allowed_tokens_fn is not None:
            arguments["prefix_allowed_tokens_fn"] = lambda batch_id, sequence: prefix_allowed_tokens_fn(
                batch_id, callers_prompt.restore_row(batch_id, sequence)
            )
        if streamer is not None:
            arguments["streamer"] = _StreamsCallersPrompt(streamer, callers_prompt)

        output = super().generate(inputs, **arguments, **kwargs)
        if isinstance(output, torch.Tensor):
            sequences, output = output, callers_prompt.restore(output)
        else:
            sequences = output.sequences
            output.sequences = callers_prompt.restore(sequences)
            cache = cache_of(output) if cache_of(output) is not None else cache
        if cache is not None:
            CachedPrompt(callers_ids, prompt).behind(cache).remember(cache)
        return output

    def _merge_criteria_processor_list(self, default_list, custom_list):
        """Upstream's rule, by the types of the caller's own processors and criteria."""
        wrapped = {id(item.function): item for item in custom_list if isinstance(item, _SeesCallersPrompt)}
        bare = [item.function if isinstance(item, _SeesCallersPrompt) else item for item in custom_list]
        merged = super()._merge_criteria_processor_list(default_list, type(custom_list)(bare))
        return type(merged)([wrapped.get(id(item), item) for item in merged])

    def _setting(self, name: str, generation_config, kwargs: dict[str, Any]) -> Any:
        """A generation setting, from where upstream takes it."""
        sources = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name))
        return next((value for value in sources if value is not None), None)

    def _mask_padding(self, input_ids, generation_config, kwargs: dict[str, Any]) -> torch.LongTensor | None:
        """Upstream's rule for a prompt without a mask: padding ids are padding unless they also end a sequence."""
        pad, eos = (self._setting(name, generation_config, kwargs) for name in ("pad_token_id", "eos_token_id"))
        if pad is None or not (input_ids == pad).any() or pad in (eos if isinstance(eos, list) else [eos]):
            return None
        return (input_ids != pad).long()

    def _count_from_callers_prompt(self, generation_config, kwargs: dict[str, Any], prompt: ShortPrompt) -> None:
        """Lengths that count the caller's prompt are reduced by what was dropped from it."""

        def setting(name):
            return self._setting(name, generation_config, kwargs)

        dropped = prompt.full_length - prompt.length
        max_length = setting("max_length")
        if max_length is not None and setting("max_new_tokens") is None:
            if max_length <= prompt.full_length:
                name = "inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"
                raise ValueError(
                    f"Input length of {name} is {prompt.full_length}, but `max_length` is set to {max_length}. "
                    "Increase `max_length` or, better yet, set `max_new_tokens`."
                )
            kwargs["max_length"] = max_length - dropped
        min_length = setting("min_length")
        if min_length is not None and setting("min_new_tokens") is None:
            kwargs["min_length"] = max(min_length - dropped, 0)
