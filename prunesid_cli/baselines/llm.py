"""Where methods that drop tokens inside the language model plug in: what they see of a prompt in front of a layer."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_prunesid import LayerPrunedLlavaConfig, LayerPrunedLlavaForConditionalGeneration, PruneSIDConfig
from modeling_prunesid.checks import resolve_budget
from modeling_prunesid.layer_pruning import LayerInput, Reducer, prune_layers
from modeling_prunesid.upstream import CACHE_NAME, cache_of

from .encoder import replaced, running_as, stock_fields


# The number of layers of the language model that the methods' settings are stated for, LLaVA-1.5-7B.
STATED_LAYERS = 32
# What is known of each column of a prompt, in the form that the model carries `visual_groups` along: the image, -1 for
# text, and 1 for a token that the tower wants kept. The other two fields are the model's own and stay 0.
_IMAGE, _IS_KEY, _NUM_FIELDS = 0, 1, 4


@dataclass
class Row:
    """
    One prompt in front of a layer of the language model, with the tokens that it kept.

    Args:
        hidden_states (`torch.Tensor` of shape `(length, hidden_size)`).
        normed (`torch.Tensor` of shape `(length, hidden_size)`): the same behind the decoder's last norm.
        rotated_keys (`torch.Tensor` of shape `(length, key_heads, head_dim)`): of the layer before, as in its cache.
        visual (`torch.LongTensor` of shape `(num_visual,)`): places of the visual tokens.
        text (`torch.LongTensor` of shape `(num_text,)`): places of the text behind them.
        is_key (`torch.BoolTensor` of shape `(num_visual,)`): the visual tokens that the tower wants kept.
        num_images (`int`).
        entered (`torch.Tensor` of shape `(num_entered, hidden_size)`): visual tokens as they entered the first layer.
        words (`torch.Tensor` of shape `(num_text, hidden_size)`): the text as it entered the first layer.
        attention (`Callable`):
            From `(n,)` places to the weights `(n, length)` that their tokens gave to all in the layer before, mean
            over heads.
    """

    hidden_states: torch.Tensor
    normed: torch.Tensor
    rotated_keys: torch.Tensor
    visual: torch.LongTensor
    text: torch.LongTensor
    is_key: torch.BoolTensor
    num_images: int
    entered: torch.Tensor
    words: torch.Tensor
    attention: Callable[[torch.LongTensor], torch.Tensor]

    @property
    def readers(self) -> torch.LongTensor:
        """Places of the text behind the visual tokens; of a prompt that ends in an image, its last token."""
        return self.text if len(self.text) else self.visual[-1:]

    def keep(self, places: torch.LongTensor) -> tuple[torch.Tensor, torch.LongTensor]:
        return self.hidden_states[places], places


# Which layers of 32 tokens are dropped in front of, and what the rule is told there, from the budget and the number of
# patches of an image.
Plan = Callable[[int, int], dict[int, Any]]
# From a row and what the plan says to the hidden states of the visual tokens left, and their ascending places.
Rule = Callable[[Row, Any], tuple[torch.Tensor, torch.LongTensor]]


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


def llm_method(plan: Plan, rule: Rule, encoder: Callable[..., AbstractContextManager] | None = None) -> Callable:
    """
    The context in which a model drops visual tokens in front of layers of its language model, and which yields a list
    that fills with the mean number of visual tokens of each image over the layers.

    Args:
        plan: where tokens are dropped. Of layers that fall together in a shallower model the last one remains.
        rule: what is kept. Tokens keep their original positions.
        encoder (*optional*): called with the model and the budget, the context that compresses in the tower before.
    """

    @contextmanager
    def install(model: Any, budget: int | float) -> Iterator[list[float]]:
        decoder = model.model.language_model
        vision, settings = model.config.vision_config, model.config.prunesid_config
        patches = (vision.image_size // vision.patch_size) ** 2
        count, depth = resolve_budget(budget, patches), len(decoder.layers)
        planned = plan(count, patches) if count < patches else {}
        stages = {scaled_layer(layer, depth): setting for layer, setting in planned.items()}
        measured: list[float] = []
        with ExitStack() as stack:
            stack.callback(setattr, model.config, "prunesid_config", settings)
            off: dict[str, Any] = {"budget": None, "layer": settings.layer}
            model.config.prunesid_config = PruneSIDConfig(**off)
            config = LayerPrunedLlavaConfig(**stock_fields(model.config), prunesid_config=off)
            stack.enter_context(running_as(LayerPrunedLlavaForConditionalGeneration, config, model))
            base_model = model.model
            if encoder is not None:
                stack.enter_context(encoder(model, count))
            encode, forward_step = base_model.get_image_features, base_model.forward_pruned

            @functools.wraps(encode)
            def get_image_features(*args, **kwargs):
                return _with_groups(encode(*args, **kwargs))

            def forward_pruned(forward, **inputs):
                groups, cache = inputs.pop("visual_groups", None), cache_of(inputs)
                inputs.pop("visual_counts", None)
                past = 0 if cache is None else int(cache.get_seq_length())
                if groups is None or past:
                    if groups is not None and (groups[:, past:, _IMAGE] >= 0).any():
                        raise ValueError(f"{CACHE_NAME} must be empty where images come, got a filled cache.")
                    return forward_step(forward, **inputs)
                output, pruning = _run_pruned(decoder, forward, inputs, groups, stages, rule)
                for row, images in enumerate(groups[..., _IMAGE]):
                    for image in images[images >= 0].unique().tolist():
                        counts = pruning.visual_tokens(groups[..., _IMAGE] == image)[row]
                        measured.append(float(counts.float().mean()))
                return output

            stack.enter_context(replaced(base_model, "get_image_features", get_image_features))
            stack.enter_context(replaced(base_model, "forward_pruned", forward_pruned))
            yield measured

    return install


def _with_groups(output: Any) -> Any:
    """What `get_image_features` returned, with the `visual_groups` of each image."""
    sizes = [len(view) for view in output.pooler_output]
    if output.get("keep_indices") is None:
        output["keep_indices"] = [torch.arange(size, device=output.pooler_output[0].device) for size in sizes]
        output["num_placeholders"] = sizes
    groups = []
    for image, kept in enumerate(output["keep_indices"]):
        group = torch.zeros(len(kept), _NUM_FIELDS, dtype=torch.long, device=kept.device)
        group[:, _IMAGE] = image
        if output.get("is_key") is not None:
            group[:, _IS_KEY] = output["is_key"][image]
        groups.append(group)
    output["visual_groups"] = groups
    return output


def _run_pruned(
    decoder: Any, forward: Callable, inputs: dict[str, Any], groups: torch.LongTensor, stages: dict, rule: Rule
) -> tuple[Any, Any]:
    """Runs a whole prompt. Returns the model's output, and which columns each layer saw."""
    columns = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    mask, cache = inputs.get("attention_mask"), cache_of(inputs)
    is_token = torch.ones_like(groups[..., _IMAGE], dtype=torch.bool) if mask is None else mask.bool()
    with ExitStack() as stack:
        embedded = stack.enter_context(_received(decoder.layers[0], "hidden_states"))
        reducers = {}
        for place, setting in stages.items():
            queries = stack.enter_context(_queries(decoder.layers[place - 1].self_attn))
            reducers[place] = _reducer(decoder, rule, setting, groups, is_token, embedded, queries)
        pruning = stack.enter_context(prune_layers(decoder, columns, cache, reducers))
        output = forward(**inputs)
    pruning.remember(cache_of(output))
    return output, pruning


@contextmanager
def _received(module: torch.nn.Module, name: str) -> Iterator[list[torch.Tensor]]:
    """A list that takes the first argument, `name`, of every call of a module."""
    received: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: received.append(args[0] if args else kwargs[name]), with_kwargs=True
    )
    try:
        yield received
    finally:
        handle.remove()


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
    setting: Any,
    groups: torch.LongTensor,
    is_token: torch.BoolTensor,
    embedded: list[torch.Tensor],
    queries: list[torch.Tensor],
) -> Reducer:
    def reduce(given: LayerInput) -> tuple[list[torch.Tensor], list[torch.LongTensor]]:
        scaling = decoder.layers[given.layer - 1].self_attn.scaling
        states, places = [], []
        for number, hidden_states in enumerate(given.hidden_states):
            columns = given.columns[number]
            is_left, columns = columns >= 0, columns.clamp(min=0)
            is_visual = is_left & (groups[number, columns, _IMAGE] >= 0)
            visual, others = is_visual.nonzero()[:, 0], (is_left & ~is_visual).nonzero()[:, 0]
            left, kept = hidden_states[visual], visual
            if len(visual):
                tokens = is_left & is_token[number, columns]
                text = (tokens & ~is_visual).nonzero()[:, 0]
                text = text[text > visual[-1]]
                keys, embeddings = given.keys[number], embedded[0][number]
                cos, sin = (
                    part.expand(len(groups), -1, -1)[number] for part in given.arguments["position_embeddings"]
                )
                images = groups[number, :, _IMAGE]
                row = Row(
                    hidden_states=hidden_states,
                    normed=decoder.norm(hidden_states),
                    rotated_keys=apply_rotary_pos_emb(keys, keys, cos, sin, unsqueeze_dim=1)[1],
                    visual=visual,
                    text=text,
                    is_key=groups[number, columns[visual], _IS_KEY] > 0,
                    num_images=len(images[images >= 0].unique()),
                    entered=embeddings[images >= 0],
                    words=embeddings[columns[text]],
                    attention=functools.partial(_attention, queries[0][number], keys, cos, sin, tokens, scaling),
                )
                left, kept = rule(row, setting)
            order = torch.cat([others, kept]).sort()
            places.append(order.values)
            states.append(torch.cat([hidden_states[others], left])[order.indices])
        return states, places

    return reduce


def _attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_token: torch.BoolTensor,
    scaling: float,
    places: torch.LongTensor,
) -> torch.Tensor:
    """The weights `(n, length)` of the tokens at `places`, mean over heads, from `(length, heads, head_dim)`."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    rotated, keys = (part.float() for part in apply_rotary_pos_emb(queries, keys, cos, sin, unsqueeze_dim=1))
    logits = torch.einsum("nhd,lhd->nhl", rotated[places], keys) * scaling
    is_seen = is_token & (torch.arange(len(keys), device=keys.device) <= places[:, None])
    return logits.masked_fill(~is_seen[:, None], -torch.inf).softmax(-1).mean(1)
