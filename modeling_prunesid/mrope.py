"""
Three-dimensional positions (M-RoPE, Qwen-VL) of shortened prompts.

Upstream numbers a prompt from its grids: a visual token has the time, row and column of its place, and text goes on
behind the largest of these. A token that is kept therefore has the position that upstream gives it in the full prompt,
which is rebuilt here for that purpose, whether the caller wrote it or a short one. `rope_deltas`, the distance between
the next position and the length of a cache, grows by the tokens that were dropped.
"""

import inspect
from typing import Any

import torch

from .cached_chats import does_not_fit_cache
from .cached_rows import follow_rows
from .compression import CompressedModelMixin
from .plans import generating, to_host
from .prompts import ShortPrompt, is_flat
from .upstream import CACHE_NAME, cache_of


class MRoPEModelMixin(CompressedModelMixin):
    """For a base model with upstream's `compute_3d_position_ids` and `rope_deltas`."""

    # How many coordinates a token has, and whether `generate` puts its place in the sequence before them.
    num_axes = 3
    has_text_axis = True
    # The deltas that this class computed last; upstream replaces `rope_deltas` where it computes its own.
    _short_rope_deltas: torch.LongTensor | None = None

    def encode_views(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the other families, but what positions follow stays; a cache brings back the deltas of its own prompt."""
        cache = cache_of(inputs)
        deltas = getattr(cache, "_prunesid_rope_deltas", None)
        if inputs.get("position_ids") is None and deltas is not None and cache.get_seq_length():
            self.rope_deltas = self._short_rope_deltas = deltas
        elif not torch.compiler.is_compiling():
            self._forget_deltas(inputs)
        grids = {name: inputs[name] for name in self._names_of_positions() if name in inputs}
        return {**grids, **super().encode_views(inputs)}

    def _names_of_positions(self) -> list[str]:
        """What upstream's method of positions reads."""
        return list(inspect.signature(self.compute_3d_position_ids).parameters)

    def _forget_deltas(self, inputs: dict[str, Any]) -> None:
        """Text on an empty cache is numbered from 0, whatever was before. Switched off, this is upstream's affair."""
        views = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
        if self._short_rope_deltas is None or any(inputs.get(name) is not None for name in ("position_ids", *views)):
            return
        cache = cache_of(inputs)
        if cache is None or not cache.get_seq_length():
            if self.rope_deltas is self._short_rope_deltas:
                self.rope_deltas = None
            self._short_rope_deltas = None
            if hasattr(cache, "_prunesid_rope_deltas"):  # the cache was reset
                del cache._prunesid_rope_deltas

    def forward_compressed(self, forward, **inputs):
        cache, is_eager = cache_of(inputs), not torch.compiler.is_compiling()
        if is_eager and hasattr(cache, "_prunesid_upstreams_deltas") and not cache.get_seq_length():
            del cache._prunesid_upstreams_deltas  # the cache was reset
        output = super().forward_compressed(forward, **inputs)
        if not isinstance(output, tuple) and is_eager:
            self.remember_deltas(cache_of(output))
            self._remember_upstreams_deltas(cache_of(output), inputs)
        return output

    def _remember_upstreams_deltas(self, cache: Any, inputs: dict[str, Any]) -> None:
        """
        Of a prompt whose views kept every token, which upstream places: those of a later part of its conversation may
        lose some, and go on behind it.
        """
        views = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
        has_views = any(inputs.get(name) is not None for name in views)
        is_placed = generating.get() is self or inputs.get("position_ids") is None
        if cache is not None and has_views and is_placed and self.rope_deltas is not self._short_rope_deltas:
            cache._prunesid_upstreams_deltas = self.rope_deltas
            follow_rows(cache)

    def remember_deltas(self, cache: Any) -> None:
        """A cache that views filled goes on with its own deltas, whatever else the model does in between."""
        if cache is not None and self._short_rope_deltas is not None and self.rope_deltas is self._short_rope_deltas:
            cache._prunesid_rope_deltas = self.rope_deltas
            follow_rows(cache)

    def get_rope_index(self, *args, **inputs):
        """
        Upstream's positions `(axes, batch, length)` of a full prompt, and the deltas `(batch, 1)` after them. With
        `mrope_positions="contiguous"` also those of a short one: engines number prompts before they encode images.
        """
        given = inspect.signature(super().get_rope_index).bind(*args, **inputs).arguments
        if not self._is_short(given["input_ids"], given):
            return super().get_rope_index(*args, **inputs)
        input_ids, mask = given["input_ids"], given.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device).long()
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
        return positions.expand(self.num_axes, -1, -1), positions.new_zeros(len(positions), 1)

    def _is_short(self, input_ids: torch.LongTensor, inputs: dict[str, Any]) -> bool:
        """Whether a prompt that is numbered through has fewer placeholders than its grids have merged patches."""
        settings, vision = self.config.prunesid_config, self.config.vision_config
        if settings.mrope_positions != "contiguous" or settings.budget is None:
            return False
        found = num_tokens = 0
        for modality in ("image", "video"):
            grids = inputs.get(f"{modality}_grid_thw")
            if grids is not None:
                merged = vision.spatial_merge_size**2
                merged *= getattr(vision, "temporal_merge_size", 1) if modality == "video" else 1
                num_tokens += int(grids.prod(-1).sum()) // merged
                found += int(self.find_placeholders(modality, input_ids, None).sum())
        return found < num_tokens

    def place(self, inputs: dict[str, Any], is_generation: bool, plan: Any = None) -> dict[str, Any]:
        """Adds `position_ids` of the short prompt to the arguments of `forward`, and sets `rope_deltas`."""
        cache = cache_of(inputs)
        cached_length = cache.get_seq_length() if cache is not None else 0
        continues = cached_length and getattr(cache, "_prunesid_rope_deltas", None) is not None
        has_views = self._dropped_tokens(inputs) or (continues and inputs.get("mm_encoder_outputs"))
        # Upstream's `generate` finds the positions of text behind a cache, its `forward` only without a mask.
        if inputs.get("position_ids") is not None or not (has_views or (continues and not is_generation)):
            return inputs

        columns = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        batch, length = columns.shape[:2]
        host = self._on_host(inputs)
        mask, where = host.get("attention_mask"), host["placeholders"].device
        # What is placed: the whole conversation, or its part behind the cache if only that part's views are given.
        repeats_cached = is_generation and (mask is None or mask.shape[1] == length)
        first, features = 0, self._num_features(inputs)
        found = int(host["placeholders"].any(0).sum())
        if repeats_cached and cached_length and found != features:
            first = cached_length
        length -= first
        host["placeholders"] = host["placeholders"][..., first:]
        if first and features not in (0, int(host["placeholders"].any(0).sum())):
            raise ValueError(does_not_fit_cache("view", features, found))
        if mask is None:
            before = first if repeats_cached else cached_length
            mask = torch.ones(batch, before + length, dtype=torch.long, device=where)
        mask, seen = mask[:, mask.shape[1] - length :].long(), mask[:, : mask.shape[1] - length].sum(1, keepdim=True)
        text_positions = (seen + mask.cumsum(1) - 1).masked_fill(mask == 0, 0)

        if self.config.prunesid_config.mrope_positions == "contiguous":
            positions, deltas = text_positions.expand(self.num_axes, -1, -1), torch.zeros_like(seen)
        elif has_views:
            positions, deltas = self._positions_in_full_prompt(inputs, host, mask, is_generation)
            if (first or cached_length) and seen.any():
                if not continues and getattr(cache, "_prunesid_upstreams_deltas", None) is not None:
                    host["rope_deltas"], continues = cache._prunesid_upstreams_deltas.to(where), True
                offset = seen + host["rope_deltas"] if continues else seen
                positions, deltas = self._behind(positions, offset * (mask > 0)), deltas + offset - seen
        else:
            deltas = host["rope_deltas"]
            deltas = deltas.repeat_interleave(batch // len(deltas), dim=0)
            positions = (text_positions + deltas * (mask > 0)).expand(self.num_axes, -1, -1)
        self.rope_deltas = self._short_rope_deltas = deltas.to(columns.device, non_blocking=True)
        if cached_length:
            self.remember_deltas(cache)
        if is_generation and self.has_text_axis:
            positions = torch.cat([text_positions[None], positions])
        return {**inputs, "position_ids": positions.to(columns.device, non_blocking=True)}

    def _on_host(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        What positions follow from, in one copy to the host: upstream reads it value by value. Besides arguments of
        `forward`, `placeholders` `(modalities, batch, length)`, `rope_deltas`, and the kept indices of each modality.
        """
        tensors = {name: inputs.get(name) for name in self._names_of_positions() if name != "inputs_embeds"}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        if not is_flat(tensors.get("attention_mask")):
            tensors.pop("attention_mask", None)
        ids_or_embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        tensors["placeholders"] = torch.stack(
            [self.find_placeholders(modality, *ids_or_embeds) for modality in self._modalities()]
        )
        if self.rope_deltas is not None:
            tensors["rope_deltas"] = self.rope_deltas
        for modality, output in self._dropped_tokens(inputs).items():
            tensors[f"kept of {modality}"] = torch.cat(list(output.keep_indices))
        return to_host(tensors)

    def _modalities(self) -> list[str]:
        return [name for name in ("image", "video") if getattr(self.config, f"{name}_token_id", None) is not None]

    def _behind(self, positions: torch.LongTensor, offset: torch.LongTensor) -> torch.LongTensor:
        """Positions `(axes, batch, length)` of a part of a conversation, `offset` behind the part in a cache."""
        return positions + offset

    def _num_features(self, inputs: dict[str, Any]) -> int:
        outputs = inputs.get("mm_encoder_outputs") or {}
        return sum(len(view) for output in outputs.values() for view in self.features_of(output))

    def _positions_in_full_prompt(
        self, inputs: dict[str, Any], host: dict[str, torch.Tensor], mask: torch.LongTensor, is_generation: bool
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        Positions `(axes, batch, length)` in the full prompt of the last `length` columns of the short one, and deltas
        `(batch, 1)` after them. All tensors are on the host.
        """
        length = mask.shape[1]
        before, after = self._dropped_around(inputs, host)
        ends = (before + 1 + after).cumsum(1)
        places = torch.arange(int(ends[:, -1].max()), device=ends.device).expand(len(ends), -1).contiguous()
        source = torch.searchsorted(ends, places, right=True).clamp(max=length - 1)
        full_mask = mask.gather(1, source) * (places < ends[:, -1:])
        full = {"attention_mask": full_mask}
        for name in ("input_ids", "mm_token_type_ids"):
            if name in host:
                full[name] = host[name][:, -length:].gather(1, source)

        positions, names = None, self._names_of_positions()
        # Upstream's `generate` numbers a prompt without the token types that it reads like text; `forward` raises.
        lacks_types = inputs.get("mm_token_type_ids") is None and "mm_token_type_ids" in names
        if "input_ids" in full and not (is_generation and lacks_types):
            given = {**inputs, **host, **full, "inputs_embeds": None, CACHE_NAME: None}
            positions = self.compute_3d_position_ids(**{name: given.get(name) for name in names})
        if positions is None:
            positions = (full_mask.cumsum(1) - 1).masked_fill(full_mask == 0, 0).expand(self.num_axes, -1, -1)
            next_positions = full_mask.sum(1, keepdim=True)
        else:
            next_positions = self.rope_deltas + full_mask.sum(1, keepdim=True)
        kept = (ends - 1 - after).expand(len(positions), -1, -1)
        return positions.gather(2, kept), next_positions - mask.sum(1, keepdim=True)

    def _dropped_around(
        self, inputs: dict[str, Any], host: dict[str, torch.Tensor]
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """How many tokens were dropped just before and just after each column of the short prompt."""
        placeholders = dict(zip(self._modalities(), host["placeholders"]))
        before, after = torch.zeros_like(host["placeholders"][[0, 0]], dtype=torch.long)
        for modality, output in self._dropped_tokens(inputs).items():
            gaps, views = [], output.get("view_lengths") or [[total] for total in output.num_placeholders]
            indices = host[f"kept of {modality}"].split([len(kept) for kept in output.keep_indices])
            for kept, lengths in zip(indices, views):
                # Text may stand between the views of an input (timestamps, tags), so that each ends for itself.
                sizes = torch.tensor(lengths, device=kept.device)
                view = torch.searchsorted(sizes.cumsum(0), kept, right=True)
                start, size = (sizes.cumsum(0) - sizes)[view], sizes[view]
                previous = torch.cat([kept.new_full((1,), -1), kept[:-1]]).maximum(start - 1)
                is_last = torch.cat([start[1:] != start[:-1], kept.new_ones(1, dtype=torch.bool)])
                gaps.append(torch.stack([kept - previous - 1, (start + size - 1 - kept) * is_last]))
            gaps = torch.cat(gaps, dim=1)
            before, after = (
                part.masked_scatter(placeholders[modality], gap) for part, gap in zip((before, after), gaps)
            )
        return before, after

    def _shorten(self, inputs: dict[str, Any], prompt: ShortPrompt) -> dict[str, Any]:
        types = inputs.get("mm_token_type_ids")
        if types is not None and types.shape[1] < prompt.full_length:  # answers were appended to the ids alone
            missing = prompt.full_length - types.shape[1]
            inputs = {**inputs, "mm_token_type_ids": torch.nn.functional.pad(types, (0, missing))}
        return super()._shorten(inputs, prompt)

    def _shorten_positions(
        self, position_ids: torch.LongTensor, prompt: ShortPrompt, is_token: torch.BoolTensor | None
    ) -> torch.LongTensor:
        """The caller's own positions `(batch, length)` or `(3 or 4, batch, length)`: every token keeps its own."""
        if position_ids.dim() == 2:
            return prompt.take(position_ids.expand(len(prompt.source), -1), fill=0)
        rows = [prompt.take(row.expand(len(prompt.source), -1), fill=0) for row in position_ids]
        if len(rows) == 4:  # the first are the positions in the sequence, by which packed sequences are told apart
            rows[0] = prompt.take_positions(position_ids[0], is_token)
        return torch.stack(rows)
