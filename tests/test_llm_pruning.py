"""Tokens dropped between the layers of a decoder, against a naive decoder that recomputes everything row by row."""

import pytest
import torch
from tiny import TEXT
from transformers import DynamicCache, LlamaConfig, LlamaModel, StaticCache

from modeling_prunesid.layer_pruning import prune_layers
from modeling_prunesid.upstream import CACHE_NAME


NUM_LAYERS, LENGTH = 4, 12


def build_decoder(attn_implementation="sdpa"):
    torch.manual_seed(0)
    fields = {name: value for name, value in TEXT.items() if name != "model_type"}
    config = LlamaConfig(**{**fields, "num_hidden_layers": NUM_LAYERS})
    config._attn_implementation = attn_implementation
    return LlamaModel(config).eval()


def dropper(dropped):
    """A reducer that drops the columns `dropped` of each row, and adds their mean to the last slot."""

    def reduce(seen):
        states, slots = [], []
        for row, (hidden, columns) in enumerate(zip(seen.hidden_states, seen.columns)):
            kept = torch.tensor([slot for slot, column in enumerate(columns.tolist()) if column not in dropped[row]])
            kept = kept[columns[kept] >= 0]
            gone = torch.tensor([slot for slot, column in enumerate(columns.tolist()) if column in dropped[row]])
            new = hidden[kept].clone()
            if len(gone):
                new[-1] = new[-1] + hidden[gone].mean(0)
            states.append(new)
            slots.append(kept)
        return states, slots

    return reduce


@torch.no_grad()
def naive(decoder, ids, rules):
    """
    Last hidden states `(left, dim)` of one row, and its columns that are left, recomputed without a cache. `rules` are
    `{layer: (dropped columns, column that takes their mean or None)}`.
    """
    states, columns = decoder.embed_tokens(ids), torch.arange(len(ids))
    for index, layer in enumerate(decoder.layers):
        dropped, last = rules.get(index, (set(), None))
        keep = torch.tensor([int(column) not in dropped for column in columns])
        if last is not None and not keep.all():
            states = states.clone()
            states[columns == last] += states[~keep].mean(0)
        states, columns = states[keep], columns[keep]
        mask = torch.zeros(1, 1, len(columns), len(columns))
        mask = mask.masked_fill(columns[None] > columns[:, None], float("-inf"))
        rotary = decoder.rotary_emb(states[None], position_ids=columns[None])
        states = layer(states[None], attention_mask=mask, position_embeddings=rotary)[0]
    return decoder.norm(states), columns


def run(decoder, ids, mask, dropped, cache, steps=()):
    """Last hidden states of a prompt and of the steps after it."""
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    reducers = {layer: dropper(rows) for layer, rows in dropped.items()}
    outputs = []
    with torch.no_grad():
        with prune_layers(decoder, ids, cache, reducers) as pruning:
            output = decoder(
                ids, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache}, use_cache=cache is not None
            )
        pruning.remember(cache)
        outputs.append(output.last_hidden_state)
        for step in steps:
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, step.shape[1]), value=1)
                positions = (mask.cumsum(1) - 1)[:, -step.shape[1] :]
            with prune_layers(decoder, step, cache, {}):
                output = decoder(step, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})
            outputs.append(output.last_hidden_state)
    return torch.cat(outputs, dim=1), pruning


CASES = {
    "one layer": ([{3, 4, 5}, {3, 4, 6}], None),
    "two layers": ([{3, 4, 5}, {3, 4, 6}], [{3, 4, 5, 7, 8}, {3, 4, 6, 8, 9}]),
    "unequal counts": ([{3, 4, 5}, {6}], [{3, 4, 5, 8}, {6, 7}]),
    "one row whole": ([{3, 4, 5}, set()], [{3, 4, 5}, {7, 8}]),
    "only later": (None, [{3, 4}, {8}]),
}


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_it_is_the_naive_decoder(case, padding, cache, attn_implementation):
    decoder = build_decoder(attn_implementation=attn_implementation)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (2, LENGTH + 5), generator=generator)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :padding] = 0
    first, second = CASES[case]
    dropped = {layer: rows for layer, rows in ((1, first), (3, second)) if rows is not None}
    steps = () if cache == "none" else (ids[:, LENGTH : LENGTH + 1], ids[:, LENGTH + 1 : LENGTH + 4], ids[:, -1:])
    caches = {
        "none": None,
        "dynamic": DynamicCache(config=decoder.config),
        "static": StaticCache(config=decoder.config, max_cache_len=LENGTH + 8),
    }
    got, _ = run(decoder, ids[:, :LENGTH], mask if padding else None, dropped, caches[cache], steps)
    total = LENGTH if cache == "none" else LENGTH + 5
    assert got.shape[1] == total
    for row in range(2):
        skip = padding if row == 0 else 0
        rules = {
            layer: ({column - skip for column in rows[row]}, LENGTH - 1 - skip) for layer, rows in dropped.items()
        }
        expected, columns = naive(decoder, ids[row, skip:total], rules)
        torch.testing.assert_close(got[row, columns + skip], expected, atol=1e-4, rtol=1e-4)
        for column in rules[max(rules)][0]:  # a dropped column stands for the last one left before it
            column += skip
            before = max(int(left) + skip for left in columns if int(left) + skip < column)
            assert torch.equal(got[row, column], got[row, before])


def test_caches_have_the_length_of_what_is_left_and_counts_are_measured():
    decoder, cache = build_decoder(), DynamicCache()
    ids = torch.randint(3, 90, (2, LENGTH))
    _, pruning = run(decoder, ids, None, {1: [{3, 4, 5}, {6}], 3: [{3, 4, 5, 8}, {6, 7}]}, cache)
    assert [cache.get_seq_length(layer) for layer in range(NUM_LAYERS)] == [LENGTH, LENGTH - 1, LENGTH - 1, LENGTH - 2]
    is_visual = torch.zeros(2, LENGTH, dtype=torch.bool)
    is_visual[:, 3:9] = True
    assert pruning.visual_tokens(is_visual).tolist() == [[6, 3, 3, 2], [6, 5, 5, 4]]


def test_nothing_dropped_is_the_decoder_bit_for_bit():
    decoder = build_decoder()
    ids = torch.randint(3, 90, (2, LENGTH))
    got, _ = run(decoder, ids, None, {}, DynamicCache())
    assert torch.equal(got, decoder(ids).last_hidden_state)


def test_hooks_are_gone_afterwards_also_after_an_error():
    decoder = build_decoder()

    def fail(seen):
        raise RuntimeError("stop")

    ids = torch.randint(3, 90, (1, LENGTH))
    with pytest.raises(RuntimeError, match="stop"), prune_layers(decoder, ids, None, {2: fail}):
        decoder(ids)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.layers.modules())


def test_beams_of_a_prompt_share_its_columns():
    decoder, cache = build_decoder(), DynamicCache()
    ids = torch.randint(3, 90, (2, LENGTH + 1))
    dropped = {1: [{3, 4, 5}, {6}]}
    run(decoder, ids[:, :LENGTH], None, dropped, cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
    step = ids[:, LENGTH:].repeat_interleave(2, 0)
    with torch.no_grad(), prune_layers(decoder, step, cache, {}):
        got = decoder(step, **{CACHE_NAME: cache}).last_hidden_state
    for row in range(4):
        expected, _ = naive(decoder, ids[row // 2], {1: (dropped[1][row // 2], LENGTH - 1)})
        torch.testing.assert_close(got[row, 0], expected[-1], atol=1e-4, rtol=1e-4)


def test_a_second_prompt_on_the_cache_is_pruned_as_well():
    decoder, cache = build_decoder(), DynamicCache()
    ids = torch.randint(3, 90, (1, 2 * LENGTH + 2))
    with torch.no_grad():
        for start, dropped in ((0, {1: [{3, 4}]}), (LENGTH + 1, {2: [{5, 6}]})):
            prompt = ids[:, start : start + LENGTH]
            with prune_layers(decoder, prompt, cache, {k: dropper(v) for k, v in dropped.items()}) as pruning:
                decoder(prompt, **{CACHE_NAME: cache})
            pruning.remember(cache)
            step = ids[:, start + LENGTH : start + LENGTH + 1]
            with prune_layers(decoder, step, cache, {}):
                got = decoder(step, **{CACHE_NAME: cache}).last_hidden_state
    assert [cache.get_seq_length(layer) for layer in range(NUM_LAYERS)] == [26, 24, 22, 22]
    expected, _ = naive(decoder, ids[0], {1: ({3, 4}, LENGTH - 1), 2: ({18, 19}, 2 * LENGTH)})
    torch.testing.assert_close(got[0, 0], expected[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("removed", [1, 3])
def test_a_cropped_answer_may_be_continued_and_a_cropped_prompt_may_not(removed):
    decoder, cache = build_decoder(), DynamicCache()
    ids = torch.randint(3, 90, (1, LENGTH + 1))
    run(decoder, ids[:, :LENGTH], None, {1: [{3, 4, LENGTH - 3}]}, cache)
    cache.crop(-removed)
    step = ids[:, -1:]
    if removed == 3:
        with pytest.raises(ValueError, match="cropped to 9 columns"), prune_layers(decoder, step, cache, {}):
            pass
        return
    with torch.no_grad(), prune_layers(decoder, step, cache, {}):
        got = decoder(step, **{CACHE_NAME: cache}).last_hidden_state
    # The column that was cropped had taken the mean of what was dropped; what is left is the prompt without it.
    left = torch.cat([ids[0, : LENGTH - 1], step[0]])
    expected, _ = naive(decoder, left, {1: ({3, 4, LENGTH - 3}, None)})
    torch.testing.assert_close(got[0, 0], expected[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, NUM_LAYERS, -1])
def test_layers_that_are_not_there_are_refused(layer):
    decoder, ids = build_decoder(), torch.ones(1, 4, dtype=torch.long)
    expected = pytest.raises(ValueError, match=f"1 to 3 of a language model of 4 layers, got {layer}")
    with expected, prune_layers(decoder, ids, None, {layer: dropper([set()])}):
        pass


def test_a_sliding_window_is_refused():
    decoder, ids = build_decoder(), torch.ones(1, 4, dtype=torch.long)
    decoder.config.sliding_window = 8
    with pytest.raises(ValueError, match="sliding_window=8"), prune_layers(decoder, ids, None, {1: dropper([set()])}):
        pass


def test_gradients_flow_and_checkpointing_is_refused():
    decoder, ids = build_decoder().train(), torch.randint(3, 90, (1, LENGTH))
    with prune_layers(decoder, ids, None, {2: dropper([{4, 5}])}):
        decoder(ids, use_cache=False).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.layers.parameters())
    new_name = getattr(decoder, "activation_checkpointing_enable", None)
    enable = new_name or decoder.gradient_checkpointing_enable
    enable()
    expected = pytest.raises(ValueError, match="Switch checkpointing off")
    with expected, prune_layers(decoder, ids, None, {2: dropper([{4, 5}])}):
        pass
