"""
Turns kept tokens into shorter prompts, once, at the entrance of `forward` and `generate`, for every model family.

A stock processor writes one placeholder for every visual token of a view. PruneSID encodes fewer, so the placeholders
of the dropped tokens leave the prompt together with their columns of the mask, the positions and the labels. From then
on everything upstream (caches, positions, decoding) works on the short prompt as if it had been written that way.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from .prompts import (
    IGNORED_LABEL,
    CachedPrompt,
    ShortPrompt,
    gather_columns,
    is_flat,
    is_right_padded,
    mark_kept_placeholders,
    padding_of,
    run_lengths,
    shorten_cached_mask,
    shorten_shifted_labels,
    without_answer,
)
from .upstream import CACHE_NAME, cache_of


# The pixels that each modality is encoded from, by the names that Transformers uses.
_PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


class CompressedModelMixin:
    """
    For a base model (vision tower, projector and language model) whose `get_image_features` or `get_video_features`
    returns, besides upstream's fields, `keep_indices` and `num_placeholders` of each view where it dropped tokens.
    """

    # The position of the first column, where `forward` is given none.
    first_position = 0
    # Further arguments of `forward` that run along the prompt, with what fills added padding.
    along_prompt: dict[str, float | int] = {}

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
        stated = inputs.get("num_visual_tokens")
        is_stated = isinstance(stated, (list, tuple, torch.Tensor))
        inputs = self.encode_views(inputs)
        input_ids, inputs_embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        columns = input_ids if input_ids is not None else inputs_embeds
        cache, mask = cache_of(inputs), inputs.get("attention_mask")
        has_views = bool(self._dropped_tokens(inputs))
        if not is_generation and not has_views and getattr(cache, "_prunesid_interrupted", False):
            return self.place(inputs, is_generation), None  # a step of our `generate`, on what it has shortened
        # A compiled step has its mask in the form that attention takes, which fits the cache.
        has_memory = hasattr(cache, "_prunesid_prompt") or hasattr(cache, "_prunesid_rope_deltas")
        has_memory = has_memory and (is_flat(mask) or not torch.compiler.is_compiling())
        # The common decoding step, eager or compiled: nothing to look at, and no wait for the device.
        is_step = columns is not None and (columns.shape[1] == 1 or torch.compiler.is_compiling())
        if columns is None or (is_step and not is_generation and not has_views and not has_memory):
            return inputs, None
        cached_length = int(cache.get_seq_length()) if cache is not None else 0
        earlier = CachedPrompt.recall(cache, len(columns))
        repeats_cached = is_generation and (not is_flat(mask) or mask.shape[1] == columns.shape[1])
        start = 0
        if earlier is not None and not repeats_cached:
            positions, moved = inputs.get("position_ids"), earlier.prompt.moved
            if positions is not None and positions.dim() == 2 and moved is None:
                moved = earlier.prompt.dropped.sum(1, keepdim=True) - earlier.prompt.first_ahead()
            callers_mask, added = mask, bool((earlier.prompt.source < 0).any())
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
            self._check_not_forgotten(inputs, start, seen)
        elif cache is None and not is_generation:
            self._check_not_forgotten(inputs, start, seen, only_whole_views=True)

        current = mask[:, -columns.shape[1] :] if is_flat(mask) else None
        keep_mask = self._mark_kept(inputs, start, seen, current, is_stated)
        if keep_mask is not None and not bool(keep_mask[:, start:seen].all()):
            raise ValueError(
                f"{CACHE_NAME} was filled by another prompt: input_ids have every placeholder of views in the cache, "
                "which were not shortened there. Pass the cache that belongs to the conversation, or an empty one."
            )
        padding_side = "left" if is_generation or not is_right_padded(current) else "right"
        if has_views and not is_generation:
            inputs = self._ignore_placeholders(inputs)
        prompt = None
        if start:
            rest = torch.ones_like(input_ids, dtype=torch.bool) if keep_mask is None else keep_mask
            prompt = earlier.prompt.then(ShortPrompt.from_keep_mask(rest[:, start:], padding_side))
        elif keep_mask is not None:
            # Padding gives way to rows that lost less; a length that the caller pads to shrinks by what was dropped.
            padding, length = None, int(keep_mask.sum(1).min())
            if current is not None and not (repeats_cached and cached_length):
                padding = padding_of(current, leading_only=padding_side == "left") & ~self._placeholders(inputs)
                padding = padding & ~_labelled(inputs, padding)
            prompt = ShortPrompt.from_keep_mask(keep_mask, padding_side, minimum_length=length, padding=padding)
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
        ahead = before.columns_ahead() + current.first_ahead() - before.then(current).first_ahead()
        if not bool(ahead.any()):
            return inputs
        positions = torch.arange(length, device=device) + cached_length + self.first_position - ahead
        return {**inputs, "position_ids": positions}

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

    def _placeholders(self, inputs: dict[str, Any]) -> torch.BoolTensor:
        """Mask `(batch, length)` of the placeholders of all encoded views, whatever their modality."""
        outputs = inputs.get("mm_encoder_outputs") or {}
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        masks = [self.find_placeholders(name, ids, embeds) for name, output in outputs.items() if output is not None]
        return torch.stack(masks).any(0)

    def _ignore_placeholders(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """
        Labels of placeholders are ignored: how many of them are left is no matter of the loss. `num_items_in_batch`,
        which counted them, is reduced by their share of the labels.
        """
        inputs, placeholders = dict(inputs), self._placeholders(inputs)
        of_next = torch.nn.functional.pad(placeholders[:, 1:], (0, 1), value=False)
        for name, ignored in (("labels", placeholders), ("shift_labels", of_next)):
            labels = inputs.get(name)
            if labels is None or labels.shape != ignored.shape:
                continue
            if name == "labels":  # nothing predicts the first column, unless padding is added before it
                labels = labels.index_fill(1, labels.new_zeros(1, dtype=torch.long), IGNORED_LABEL)
            inputs[name] = labels.masked_fill(ignored.to(labels.device), IGNORED_LABEL)
            given, counted = ((part != IGNORED_LABEL).sum() for part in (labels, inputs[name]))
            is_used = name == "shift_labels" or inputs.get("shift_labels") is None
            if is_used and inputs.get("num_items_in_batch") is not None and counted < given:
                inputs["num_items_in_batch"] = inputs["num_items_in_batch"] * (counted / given)
        return inputs

    def _mark_kept(
        self, inputs: dict[str, Any], start: int, seen: int, mask: torch.Tensor | None, is_stated: bool
    ) -> torch.BoolTensor | None:
        """
        The columns that remain, None for all. Those before `start` were shortened with the cache, and those before
        `seen` are in it.
        """
        keep_mask = None
        for modality, output in self._dropped_tokens(inputs).items():
            placeholders = self.find_placeholders(modality, inputs.get("input_ids"), inputs.get("inputs_embeds"))
            new = None
            if seen:
                placeholders = without_answer(placeholders, start, seen)
                new = placeholders & (torch.arange(placeholders.shape[1], device=placeholders.device) >= seen)
            # Either the views of the whole conversation are passed again, or the new ones alone.
            kept = mark_kept_placeholders(
                placeholders,
                output.num_placeholders,
                output.keep_indices,
                modality,
                new=new,
                is_token=mask,
                is_stated=is_stated,
                views=output.get("view_lengths"),
            )
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
        for modality in outputs:  # a placeholder may be that of two modalities
            if hasattr(self.config, f"{modality}_token_id"):
                input_ids = input_ids.masked_fill(self.find_placeholders(modality, input_ids, None), -1)
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
        mask, added_padding = inputs.get("attention_mask"), bool((prompt.source < 0).any())
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
    if prompt is None:
        return forward(**inputs)
    inputs = dict(inputs)
    return_dict, keep = inputs.pop("return_dict", None), inputs.pop("logits_to_keep", 0)
    columns = prompt.callers_columns()
    wanted = _select(columns, keep)
    logits_columns = wanted
    if wanted is not columns:  # the head runs on the short columns that any row needs
        needed, logits_columns = wanted.unique(return_inverse=True)
        inputs["logits_to_keep"] = needed
    output = forward(**inputs, return_dict=True)
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


def _labelled(inputs: dict[str, Any], columns: torch.Tensor) -> torch.BoolTensor:
    """Which columns `(batch, length)` have a label, or predict one: the loss counts padding that is labelled."""
    is_labelled = torch.zeros_like(columns, dtype=torch.bool)
    for name, is_shifted in (("labels", False), ("shift_labels", True)):
        labels = inputs.get(name)
        if labels is not None and labels.shape == columns.shape:
            own = (labels != IGNORED_LABEL).to(columns.device)
            own = torch.nn.functional.pad(own[:, :-1], (1, 0)) if is_shifted else own
            is_labelled = is_labelled | own | torch.nn.functional.pad(own[:, 1:], (0, 1))
    return is_labelled


def _settle(output: Any) -> Any:
    """A copy of an encoder's output with upstream's fields alone: it fits the prompt, and beams may repeat it."""
    settled = type(output)(
        **{field.name: output[field.name] for field in fields(output) if output.get(field.name) is not None}
    )
    settled.is_pruned = True
    return settled
