"""
Thins out visual tokens inside a language model: what the tower's side knows of every token travels along the prompt
as `visual_groups`, and reducers between the layers read it. How many tokens each image has at which layer is known on
the host, where `visual_counts` stays, so that nothing waits for the device.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .layer_pruning import CachedColumns, LayerInput, Reducer, hooked_output, prune_layers
from .plans import Plan
from .prompts import is_flat
from .readings import Reading
from .upstream import cache_of
from .vitcop import keep_smallest, leading_true


# What `visual_groups` holds of each column: the image, and the token's cluster in it; -1 for no visual token.
_IMAGE, _CLUSTER = range(2)
# What `visual_counts` holds of each image of a row: how many tokens enter the language model, how many are left in
# front of the first and of the second layer that drops any, how many clusters they may have, and how many columns the
# cache had before. Rows of fewer images have zeros besides.
_NUM_CLUSTERS, _PAST = 3, 4
_ALONG = ("visual_groups", "visual_counts")

# From hidden states, norms of keys, clusters, a count and how many clusters there may be: the hidden states that are
# left, and their ascending places.
Rule = Callable[
    [torch.Tensor, torch.Tensor, torch.LongTensor, int, int],
    tuple[torch.Tensor, torch.LongTensor],
]


def describe_tokens(
    output: Any, clusters: list[torch.LongTensor], counts: list[tuple[int, int]], num_clusters: list[int]
) -> None:
    """
    Adds `visual_groups` and `visual_counts` of each image to an encoder's output.

    Args:
        clusters (`list[torch.LongTensor]`): the cluster `(tokens,)` of each of an image's tokens.
        counts (`list[tuple[int, int]]`): how many of them are left in front of the two layers.
        num_clusters (`list[int]`): how many clusters they may have.
    """
    output["visual_groups"] = [
        torch.stack([torch.full_like(own, image), own], dim=1) for image, own in enumerate(clusters)
    ]
    output["visual_counts"] = [
        (len(own), min(len(own), first), min(len(own), first, second), most)
        for own, (first, second), most in zip(clusters, counts, num_clusters)
    ]


def leave_smallest(
    hidden_states: torch.Tensor, norms: torch.Tensor, clusters: torch.LongTensor, count: int, num_clusters: int
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Keeps the tokens of smallest norm, whatever their clusters."""
    places = keep_smallest(norms, count)
    return hidden_states[places], places


def thin_out(groups: torch.LongTensor, counts: list[list[list[int]]], stage: int, rule: Rule) -> Reducer:
    """
    A reducer that applies `rule` to every image of every row.

    Args:
        groups (`torch.LongTensor` of shape `(batch, length, 2)`): the `visual_groups` of the prompt.
        counts (`list`): the `visual_counts` of the prompt.
        stage (`int`): 1 in front of the first layer that drops tokens, 2 in front of the second.
        rule (`Rule`).
    """

    def reduce(seen: LayerInput) -> tuple[list[torch.Tensor], list[torch.LongTensor]]:
        norms = seen.keys.float().mean(2).norm(dim=-1)
        states, slots = [], []
        for row, images in enumerate(counts):
            columns, hidden_states = seen.columns[row], seen.hidden_states[row]
            own = groups[row].to(columns.device).index_select(0, columns.clamp(min=0))
            is_visual = own[:, _IMAGE] >= 0
            num_others = groups.shape[1] - sum(image[0] for image in images)
            places = leading_true(~is_visual & (columns >= 0), num_others)
            visual = leading_true(is_visual & (columns >= 0), sum(image[stage - 1] for image in images))
            parts = [(hidden_states[places], places)]
            for tokens, image in zip(visual.split([image[stage - 1] for image in images]), images):
                if len(tokens):
                    clusters = own[:, _CLUSTER][tokens]
                    kept, left = rule(
                        hidden_states[tokens], norms[row][tokens], clusters, image[stage], image[_NUM_CLUSTERS]
                    )
                    parts.append((kept, tokens[left]))
            places, order = torch.cat([part[1] for part in parts]).sort()
            states.append(torch.cat([part[0] for part in parts])[order])
            slots.append(places)
        return states, slots

    return reduce


class CoPrunedModelMixin:
    """For a [`CompressedModelMixin`] whose `get_image_features` may return `visual_groups`, a list for each image."""

    def pruning_layers(self) -> tuple[int, int]:
        """The two layers of the language model that tokens are dropped in front of."""
        raise NotImplementedError

    # What the first of them leaves of the tokens of an image.
    _first_rule: Rule = staticmethod(leave_smallest)

    def place(self, inputs: dict[str, Any], is_generation: bool, plan: Plan | None = None) -> dict[str, Any]:
        """Lays the groups of the visual tokens along the columns of the cache and of the shortened prompt."""
        inputs = super().place(inputs, is_generation, plan)
        output = self._dropped_tokens(inputs).get("image")
        groups = None if output is None else output.get("visual_groups")
        if is_generation and (groups or CachedColumns.are_known_of(cache_of(inputs))):
            inputs = {**inputs, "disable_compile": True}  # a setting of `generate`
        if not groups:
            return inputs
        placeholders = self.find_placeholders("image", inputs.get("input_ids"), inputs.get("inputs_embeds"))
        groups = torch.cat(groups).to(placeholders.device)
        mask, cache = inputs.get("attention_mask"), cache_of(inputs)
        past = 0 if cache is None else int(cache.get_seq_length())
        before = past  # the columns of the cache that are not repeated in front of the prompt
        if is_generation:
            before = mask.shape[1] - placeholders.shape[1] if is_flat(mask) else 0
        # Of a conversation, the new views alone may have been encoded.
        is_new = torch.arange(placeholders.shape[1], device=groups.device) >= past - before
        placeholders = placeholders & (is_new | (placeholders.sum() == len(groups)))
        order = placeholders.flatten().cumsum(0).clamp(min=1, max=len(groups)) - 1
        laid = groups[order].view(*placeholders.shape, -1).masked_fill(~placeholders[..., None], -1)
        inputs = {**inputs, "visual_groups": torch.nn.functional.pad(laid, (0, 0, before, 0), value=-1)}
        if output.get("visual_counts") is not None:
            reading = plan.readings["image"]
            if reading is None:  # in a graph, which cannot count
                ends = placeholders.sum(1).cumsum(0).tolist()
                reading = Reading(placeholders, [], list(map(len, output.keep_indices)), False, ends)
            is_new = [True] * len(groups)
            if plan.seen:
                first = reading.places[torch.tensor(reading.view_ends[:-1])] % reading.placeholders.shape[1]
                is_new = (first >= plan.seen).tolist()
            rows = reading.views_of_rows
            counts = [[output["visual_counts"][view] for view in views if is_new[view]] for views in rows]
            most = max(map(len, counts))
            counts = [row + [(0,) * _PAST] * (most - len(row)) for row in counts]
            inputs["visual_counts"] = torch.tensor([[(*image, past) for image in row] for row in counts])
        return inputs

    def forward(
        self,
        *,
        num_visual_tokens=None,
        visual_groups: torch.LongTensor | None = None,
        visual_counts: torch.LongTensor | None = None,
        **inputs,
    ):
        """
        As in every family; `visual_groups` `(batch, columns, 2)` and `visual_counts` `(batch, images, 5)` come from
        `generate` and the head's `forward`.
        """
        inputs |= {"visual_groups": visual_groups, "visual_counts": visual_counts}
        return super().forward(num_visual_tokens=num_visual_tokens, **inputs)

    def forward_compressed(self, forward: Callable, **inputs):
        """As for every family, with `forward_pruned` on the shortened arguments."""
        return super().forward_compressed(partial(self.forward_pruned, forward), **inputs)

    def forward_pruned(self, forward: Callable, **inputs):
        """Upstream's `forward`, with tokens dropped between the layers of the language model."""
        if inputs.get("visual_groups") is None and not CachedColumns.are_known_of(cache_of(inputs)):
            return forward(**_without_groups(inputs))
        return self._run_pruned(forward, **inputs)

    @torch.compiler.disable  # the hooks between the layers come and go, and lengths follow the images
    def _run_pruned(self, forward: Callable, **inputs):
        groups, cache = inputs.get("visual_groups"), cache_of(inputs)
        counts: Any = None if groups is None else inputs["visual_counts"].tolist()
        inputs = _without_groups(inputs)
        columns = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        groups = None if groups is None else _align(groups, counts, cache, columns.shape[1])
        reducers = {}
        if groups is not None:
            first, second = self.pruning_layers()
            reducers[first] = thin_out(groups, counts, 1, self._first_rule)
            if second < len(self.language_model.layers):
                reducers[second] = thin_out(groups, counts, 2, leave_smallest)
        mask = inputs.get("attention_mask")
        with prune_layers(self.language_model, columns, cache, reducers) as pruning:
            if groups is not None and is_flat(mask):
                is_filled = mask[:, -columns.shape[1] :].bool() | (groups[..., _IMAGE] >= 0).to(mask.device)
                pruning.is_filled = is_filled.cumsum(1) > 0
            output = forward(**inputs)
        if groups is None:
            return output
        if isinstance(output, tuple):
            pruning.remember(cache)
        else:
            pruning.remember(cache_of(output))
            output["layer_visual_tokens"] = pruning.visual_tokens(groups[..., _IMAGE] >= 0)
            if output.get("hidden_states") is not None:  # what went into the first layer, and what each returned
                output["hidden_states"] = tuple(
                    state
                    if state is None or index == 0 or state is output["last_hidden_state"]
                    else pruning.in_prompt(state, index - 1)
                    for index, state in enumerate(output["hidden_states"])
                )
        return output


class CoPrunedGenerationMixin:
    """For a model with a language-modelling head whose `self.model` is a [`CoPrunedModelMixin`]."""

    def forward(
        self,
        *,
        num_visual_tokens=None,
        visual_groups: torch.LongTensor | None = None,
        visual_counts: torch.LongTensor | None = None,
        **inputs,
    ):
        """
        As for every family; `visual_groups` `(batch, columns, 2)` and `visual_counts` `(batch, images, 5)` are made by
        `generate`.
        """
        inputs |= {"visual_groups": visual_groups, "visual_counts": visual_counts}
        return super().forward(num_visual_tokens=num_visual_tokens, **inputs)

    def forward_compressed(self, forward: Callable, **inputs):
        """As for every family, with `forward_pruned` on the shortened arguments."""
        return super().forward_compressed(partial(self.forward_pruned, forward), **inputs)

    def forward_pruned(self, forward: Callable, **inputs):
        """Upstream's `forward`; the output says how many visual tokens each layer saw."""
        if inputs.get("visual_groups") is None:
            return forward(**_without_groups(inputs))
        return self._run_measured(forward, **inputs)

    @torch.compiler.disable
    def _run_measured(self, forward: Callable, **inputs):
        with hooked_output(self.model) as outputs:
            output = forward(**inputs)
        if not isinstance(output, tuple) and outputs[0].get("layer_visual_tokens") is not None:
            output["layer_visual_tokens"] = outputs[0]["layer_visual_tokens"]
        return output

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], assistant_model=None, **kwargs):
        """Upstream's; an assistant that drops nothing inside its language model is not told of groups."""
        if assistant_model is not None:
            names = inspect.signature(assistant_model.forward).parameters
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in _ALONG or name in names}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs)


def _without_groups(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in _ALONG}


def _align(groups: torch.LongTensor, counts: list, cache: Any, length: int) -> torch.LongTensor | None:
    """
    The groups of the `length` columns that follow the cache; None where no visual token is among them, as in steps
    that come after the prompt.

    Raises:
        `ValueError`: if visual tokens come after them, in a later part of the prompt.
    """
    past = 0 if cache is None else int(cache.get_seq_length())
    if not counts[0] or past != counts[0][0][_PAST]:
        return None
    groups, later = groups[:, past : past + length], groups[:, past + length :]
    if later.shape[1] and (later >= 0).any():
        raise ValueError(
            "Dropping visual tokens inside the language model needs the whole prompt at once, but the prompt is split "
            f"after {past + length} columns, before its last visual token. Set prefill_chunk_size=None."
        )
    return torch.nn.functional.pad(groups, (0, 0, 0, length - groups.shape[1]), value=-1)
