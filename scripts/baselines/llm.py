"""Where methods that drop tokens inside the language model plug in: what they see of a prompt in front of a layer."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_prunesid import PruneSIDConfig
from modeling_prunesid.llm_pruning_prunesid import LayerInput, Reducer, prune_layers, stack_rows
from modeling_prunesid.selection_prunesid import resolve_budget

from .encoder import replaced


# The number of layers of the language model that the methods' settings are stated for, LLaVA-1.5-7B.
STATED_LAYERS = 32


@dataclass
class Row:
    """
    One prompt in front of a layer of the language model.

    Args:
        hidden_states (`torch.Tensor` of shape `(length, hidden_size)`).
        normed (`torch.Tensor` of shape `(length, hidden_size)`): the same behind the decoder's last norm.
        keys (`torch.Tensor` of shape `(length, key_heads, head_dim)`): of the layer before, as projected.
        visual (`torch.LongTensor` of shape `(num_visual,)`): places of the visual tokens.
        text (`torch.LongTensor` of shape `(num_text,)`): places of the text behind them.
        attention (`Callable`):
            From a place to the weights `(length,)` that its token gave to all in the layer before, mean over heads.
    """

    hidden_states: torch.Tensor
    normed: torch.Tensor
    keys: torch.Tensor
    visual: torch.LongTensor
    text: torch.LongTensor
    attention: Callable[[int], torch.Tensor]


# From a row and a number of visual tokens to the places of those that are kept, about so many.
Rule = Callable[[Row, int], torch.LongTensor]


def scaled_layer(layer: int, num_layers: int) -> int:
    """The layer at the same relative depth as `layer` of the 32 that settings are stated for; the second at least."""
    return max(1, int(layer * num_layers / STATED_LAYERS + 0.5))


def count_behind(layer: int, budget: int, patches: int) -> int:
    """
    Visual tokens n behind `layer` of 32, such that their mean over the layers is the budget: at least one.

    (K * T + (L - K) * n) / L = N, with the paper's settings for T = 576 and K = 2: n = 166, 98 and 30. Other depths
    keep n, so that the measured mean is above N where K, which is 1 at least, is a larger share of the layers.
    """
    return max(1, round((STATED_LAYERS * budget - layer * patches) / (STATED_LAYERS - layer)))


def llm_method(layer: int, rule: Rule) -> Callable:
    """
    The context in which a model drops visual tokens in front of a layer of its language model, and which yields a list
    that fills with the mean number of visual tokens of each image over the layers.

    Args:
        layer (`int`): K, of 32 layers.
        rule: what to keep, by which the tokens stay in order, with their original positions.
    """

    @contextmanager
    def install(model: Any, budget: int | float) -> Iterator[list[float]]:
        base_model, decoder = model.model, model.model.language_model
        vision, settings = model.config.vision_config, model.config.prunesid_config
        patches = (vision.image_size // vision.patch_size) ** 2
        count = resolve_budget(budget, patches)
        share = count_behind(layer, count, patches) / patches
        find_visual, decode = base_model.get_placeholder_mask, decoder.forward
        found: list[torch.Tensor] = []
        measured: list[float] = []

        @functools.wraps(find_visual)
        def get_placeholder_mask(*args, **kwargs):
            mask = find_visual(*args, **kwargs)
            found[:] = [mask[..., 0]]
            return mask

        @functools.wraps(decode)
        def forward(**kwargs):
            if not found:  # a later step, whose masks the model itself fits to the cache
                return decode(**kwargs)
            is_visual, cache, mask = found.pop(), kwargs.get("past_key_values"), kwargs.get("attention_mask")
            if cache is not None and cache.get_seq_length():
                raise ValueError("past_key_values must be empty where images come, got a filled cache.")
            is_token = torch.ones_like(is_visual) if mask is None else mask.bool()
            with ExitStack() as stack:
                reducers = {}
                if count < patches:
                    place = scaled_layer(layer, len(decoder.layers))
                    queries = stack.enter_context(_queries(decoder.layers[place - 1].self_attn))
                    reducers[place] = _reducer(decoder, rule, share, is_visual, is_token, queries)
                pruning = stack.enter_context(prune_layers(decoder, kwargs["inputs_embeds"], cache, reducers))
                output = decode(**kwargs)
            pruning.remember(output.past_key_values)
            images = is_visual.sum(1) / patches
            means = pruning.visual_tokens(is_visual).float().mean(1)
            for row in images.nonzero()[:, 0].tolist():
                measured.extend([float(means[row] / images[row])] * round(float(images[row])))
            return output

        try:
            model.config.prunesid_config = PruneSIDConfig(budget=None, layer=settings.layer)
            with (
                replaced(base_model, "get_placeholder_mask", get_placeholder_mask),
                replaced(decoder, "forward", forward),
            ):
                yield measured
        finally:
            model.config.prunesid_config = settings

    return install


@contextmanager
def _queries(attention: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that takes what the query projection of a layer returns, `(batch, length, heads, head_dim)`."""
    queries: list[torch.Tensor] = []
    handle = attention.q_proj.register_forward_hook(
        lambda module, args, output: queries.append(output.unflatten(-1, (-1, attention.head_dim)))
    )
    try:
        yield queries
    finally:
        handle.remove()


def _reducer(
    decoder: Any,
    rule: Rule,
    share: float,
    is_visual: torch.BoolTensor,
    is_token: torch.BoolTensor,
    queries: list[torch.Tensor],
) -> Reducer:
    def reduce(given: LayerInput) -> tuple[torch.Tensor, torch.LongTensor]:
        scaling = decoder.layers[given.layer - 1].self_attn.scaling
        states, places = [], []
        for number, hidden_states in enumerate(given.hidden_states):
            cos, sin = (part.expand(len(is_visual), -1, -1)[number] for part in given.arguments["position_embeddings"])
            visual = is_visual[number].nonzero()[:, 0]
            kept = visual
            if len(visual):
                tokens = is_token[number]
                keys = given.keys[number]
                text = tokens.nonzero()[:, 0]
                row = Row(
                    hidden_states=hidden_states,
                    normed=decoder.norm(hidden_states),
                    keys=keys,
                    visual=visual,
                    text=text[text > visual[-1]],
                    attention=functools.partial(_attention, queries[0][number], keys, cos, sin, tokens, scaling),
                )
                kept = rule(row, max(1, round(share * len(visual))))
            stays = ~is_visual[number]
            stays[kept] = True
            places.append(stays.nonzero()[:, 0])
            states.append(hidden_states[places[-1]])
        return stack_rows(states, places)

    return reduce


def _attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_token: torch.BoolTensor,
    scaling: float,
    place: int,
) -> torch.Tensor:
    """The weights `(length,)` of the token at `place`, mean over heads, from `(length, heads, head_dim)`."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    rotated, keys = (part.float() for part in apply_rotary_pos_emb(queries, keys, cos, sin, unsqueeze_dim=1))
    logits = torch.einsum("hd,lhd->hl", rotated[place], keys) * scaling
    is_seen = is_token & (torch.arange(len(keys), device=keys.device) <= place)
    return logits.masked_fill(~is_seen, -torch.inf).softmax(-1).mean(0)
