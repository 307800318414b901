"""
Thins out visual tokens inside a language model: what the tower's side knows of every token travels along the prompt
as `visual_groups`, and reducers between the layers read it.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .layer_pruning import CachedColumns, LayerInput, Reducer, hooked_output, prune_layers, stack_rows
from .prompts import is_flat
from .upstream import cache_of
from .vitcop import keep_smallest


# What `visual_groups` holds of each column: the image, the token's cluster in it, and how many tokens of the image are
# left in front of the first and of the second layer that drops any. All are -1 where the column is no visual token.
_IMAGE, _CLUSTER, _FIRST_COUNT, _SECOND_COUNT = range(4)
NUM_GROUP_FIELDS = 4

# From hidden states, norms of keys, clusters and a count: the hidden states that are left, and their ascending places.
Rule = Callable[
    [torch.Tensor, torch.Tensor, torch.LongTensor, int],
    tuple[torch.Tensor, torch.LongTensor],
]


def describe_tokens(image: int, clusters: torch.LongTensor, counts: tuple[int, int]) -> torch.LongTensor:
    """The `visual_groups` `(tokens, 4)` of one image, from the cluster `(tokens,)` of each of its tokens."""
    constant = torch.tensor([image, *counts], device=clusters.device).expand(len(clusters), -1)
    return torch.cat([constant[:, :1], clusters[:, None], constant[:, 1:]], dim=1)


def leave_smallest(
    hidden_states: torch.Tensor, norms: torch.Tensor, clusters: torch.LongTensor, count: int
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Keeps the tokens of smallest norm, whatever their clusters."""
    places = keep_smallest(norms, count)
    return hidden_states[places], places


def thin_out(groups: torch.LongTensor, counts: int, rule: Rule) -> Reducer:
    """
    A reducer that applies `rule` to every image of every row.

    Args:
        groups (`torch.LongTensor` of shape `(batch, length, 4)`): the `visual_groups` of the prompt.
        counts (`int`): which field of the groups says how many tokens are left.
        rule (`Rule`).
    """

    def reduce(seen: LayerInput) -> tuple[torch.Tensor, torch.LongTensor]:
        norms = seen.keys.float().mean(2).norm(dim=-1)
        rows = []
        for hidden_states, norm, columns, row in zip(seen.hidden_states, norms, seen.columns, groups):
            row = row.to(columns.device)[columns.clamp(min=0)].masked_fill(columns[:, None] < 0, -1)
            places = ((columns >= 0) & (row[:, _IMAGE] < 0)).nonzero()[:, 0]
            parts = [(hidden_states[places], places)]
            for image in row[:, _IMAGE].unique().tolist():
                if image >= 0:
                    tokens = (row[:, _IMAGE] == image).nonzero()[:, 0]
                    count = int(row[tokens[0], counts])
                    states, left = rule(hidden_states[tokens], norm[tokens], row[tokens, _CLUSTER], count)
                    parts.append((states, tokens[left]))
            places, order = torch.cat([part[1] for part in parts]).sort()
            rows.append((torch.cat([part[0] for part in parts])[order], places))
        return stack_rows(*map(list, zip(*rows)))

    return reduce


class CoPrunedModelMixin:
    """For a [`CompressedModelMixin`] whose `get_image_features` may return `visual_groups`, a list for each image."""

    def pruning_layers(self) -> tuple[int, int]:
        """The two layers of the language model that tokens are dropped in front of."""
        raise NotImplementedError

    # What the first of them leaves of the tokens of an image.
    _first_rule: Rule = staticmethod(leave_smallest)

    def place(self, inputs: dict[str, Any], is_generation: bool) -> dict[str, Any]:
        """Lays the groups of the visual tokens along the columns of the cache and of the shortened prompt."""
        inputs = super().place(inputs, is_generation)
        groups = [
            part for output in self._dropped_tokens(inputs).values() for part in output.get("visual_groups") or []
        ]
        if is_generation and (groups or CachedColumns.are_known_of(cache_of(inputs))):
            inputs = {**inputs, "disable_compile": True}  # a setting of `generate`
        if not groups:
            return inputs
        input_ids, inputs_embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        placeholders = self.find_placeholders("image", input_ids, inputs_embeds)
        groups = torch.cat(groups).to(placeholders.device)
        mask, cache = inputs.get("attention_mask"), cache_of(inputs)
        past = 0 if cache is None else int(cache.get_seq_length())
        before = past  # the columns of the cache that are not repeated in front of the prompt
        if is_generation:
            is_flat = isinstance(mask, torch.Tensor) and mask.dim() == 2
            before = mask.shape[1] - placeholders.shape[1] if is_flat else 0
        if int(placeholders.sum()) != len(groups):  # of a conversation, the new views alone were encoded
            placeholders = placeholders & (torch.arange(placeholders.shape[1], device=groups.device) >= past - before)
        laid = torch.full((*placeholders.shape, NUM_GROUP_FIELDS), -1, device=groups.device)
        laid[placeholders] = groups
        return {**inputs, "visual_groups": torch.nn.functional.pad(laid, (0, 0, before, 0), value=-1)}

    def forward(self, *, num_visual_tokens=None, visual_groups: torch.LongTensor | None = None, **inputs):
        """As in every family; `visual_groups` `(batch, columns, 4)` come from `generate` and the head's `forward`."""
        return super().forward(num_visual_tokens=num_visual_tokens, visual_groups=visual_groups, **inputs)

    def forward_compressed(self, forward: Callable, **inputs):
        """As for every family, with `forward_pruned` on the shortened arguments."""
        return super().forward_compressed(partial(self.forward_pruned, forward), **inputs)

    def forward_pruned(self, forward: Callable, **inputs):
        """Upstream's `forward`, with tokens dropped between the layers of the language model."""
        if inputs.get("visual_groups") is None and not CachedColumns.are_known_of(cache_of(inputs)):
            inputs.pop("visual_groups", None)
            return forward(**inputs)
        return self._run_pruned(forward, **inputs)

    @torch.compiler.disable  # the hooks between the layers come and go, and lengths follow the images
    def _run_pruned(self, forward: Callable, **inputs):
        groups, cache = inputs.pop("visual_groups", None), cache_of(inputs)
        columns = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        groups = None if groups is None else _align(groups, cache, columns.shape[1])
        reducers = {}
        if groups is not None:
            first, second = self.pruning_layers()
            reducers[first] = thin_out(groups, _FIRST_COUNT, self._first_rule)
            if second < len(self.language_model.layers):
                reducers[second] = thin_out(groups, _SECOND_COUNT, leave_smallest)
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

    def forward(self, *, num_visual_tokens=None, visual_groups: torch.LongTensor | None = None, **inputs):
        """As for every family; `visual_groups` `(batch, columns, 4)` are made by `generate`."""
        return super().forward(num_visual_tokens=num_visual_tokens, visual_groups=visual_groups, **inputs)

    def forward_compressed(self, forward: Callable, **inputs):
        """As for every family, with `forward_pruned` on the shortened arguments."""
        return super().forward_compressed(partial(self.forward_pruned, forward), **inputs)

    def forward_pruned(self, forward: Callable, **inputs):
        """Upstream's `forward`; the output says how many visual tokens each layer saw."""
        if inputs.get("visual_groups") is None:
            inputs.pop("visual_groups", None)
            return forward(**inputs)
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
            model_kwargs = {
                name: value for name, value in model_kwargs.items() if name != "visual_groups" or name in names
            }
        return super()._get_candidate_generator(model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs)


def _align(groups: torch.LongTensor, cache: Any, length: int) -> torch.LongTensor | None:
    """
    The groups of the `length` columns that follow the cache; None where no visual token is among them.

    Raises:
        `ValueError`: if visual tokens come after them, in a later part of the prompt.
    """
    if length == 1:
        return None
    past = 0 if cache is None else int(cache.get_seq_length())
    groups, later = groups[:, past : past + length], groups[:, past + length :]
    if (later >= 0).any():
        raise ValueError(
            "Dropping visual tokens inside the language model needs the whole prompt at once, but the prompt is split "
            f"after {past + length} columns, before its last visual token. Set prefill_chunk_size=None."
        )
    if not (groups >= 0).any():
        return None
    return torch.nn.functional.pad(groups, (0, 0, 0, length - groups.shape[1]), value=-1)
