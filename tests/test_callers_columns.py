"""
Random prompts against the contract: whatever a caller passes, the outputs have the caller's columns, and each row
scores as it does alone in the stock class on the prompt shortened by hand (`oracle_prompt`).

A few hundred prompts by default; `PRUNESID_FUZZ=10000` runs as many. A failure names the seed: `run_forward(family,
seed)` and its neighbours run one prompt again.
"""

import dataclasses
import itertools
import os
import random
import traceback
import warnings

import pytest
import torch
from oracle_prompt import (
    BOS,
    CACHE,
    FAMILIES,
    IGNORED,
    PAD,
    alone,
    check_columns,
    expand,
    in_float64,
    make_rows,
    naive_loss,
    random_words,
    short_positions,
)
from transformers import DynamicCache, StaticCache, modeling_utils


NUM_PROMPTS = int(os.environ.get("PRUNESID_FUZZ", 360))
TAKES_ROWS = hasattr(modeling_utils, "slice_logits_to_keep")  # `logits_to_keep` of two dimensions, from 5.24 on
pytestmark = [
    pytest.mark.timeout(300 + NUM_PROMPTS),
    pytest.mark.filterwarnings("ignore"),
]
_MODELS: dict = {}
_TOLD = [""]  # what the prompt is that runs


@pytest.fixture(autouse=True)
def float64():
    with in_float64():
        yield


def models(family):
    if family.name not in _MODELS:
        ours = family.build()
        _MODELS[family.name] = (ours, family.stock(ours) if family.has_stock else None)
    return _MODELS[family.name]


# Random batches


def random_parts(rng, family, least_words=1):
    """Words and views of one row."""
    parts = [BOS] if rng.random() < 0.6 else []
    for _ in range(min(rng.choice([0, 1, 1, 1, 2, 3]), family.max_views)):
        parts += [*random_words(rng, 0, 3), family.view(rng)]
    return parts + random_words(rng, least_words, 5)


def is_view(part):
    return hasattr(part, "modality")


def length_of(part):
    part = part[1] if isinstance(part, tuple) else part
    return len(part.ids) if is_view(part) else 1


def hide(rng, family, rows):
    """Holes: words that a mask hides anywhere, and views."""
    if rng.random() < 0.3:
        rows = [[("hidden", part) if not is_view(part) and rng.random() < 0.2 else part for part in r] for r in rows]
    if rng.random() < 0.15:
        places = [(row, at) for row, parts in enumerate(rows) for at, part in enumerate(parts) if is_view(part)]
        # Upstream takes the grids of Qwen-VL in the order of the views that are shown: only the last can be hidden.
        hidden = places[rng.randrange(len(places)) :] if family.is_qwen and places else places
        for row, at in hidden:
            if family.is_qwen or rng.random() < 0.5:
                rows[row][at] = ("hidden", rows[row][at])
    if family.is_qwen:  # upstream numbers no row that shows nothing
        shows = [any(not isinstance(part, tuple) for part in row) for row in rows]
        rows = [row if shown else [*row[:-1], row[-1][1]] for row, shown in zip(rows, shows)]
    if rng.random() < 0.04 and not family.is_qwen:
        rows[-1] = [part if isinstance(part, tuple) else ("hidden", part) for part in rows[-1]]
    return rows


def pad(rng, rows, layout):
    """Rows of one length: padded on the left, the right, on both sides, or with further words."""
    length = max(sum(map(length_of, row)) for row in rows) + (rng.choice([0, 0, 3]) if layout != "words" else 0)
    padded = []
    for row in rows:
        missing = length - sum(map(length_of, row))
        left = {"left": missing, "right": 0, "words": 0}.get(layout, rng.randint(0, missing))
        if layout == "words":
            padded.append(row + random_words(rng, missing, missing))
        else:
            padded.append([("hidden", PAD)] * left + row + [("hidden", PAD)] * (missing - left))
    return padded


def random_batch(rng, family, ours):
    """Parts of every row, of one length."""
    rows = [random_parts(rng, family) for _ in range(rng.choice([1, 2, 2, 3]))]
    if rng.random() < 0.3:  # reinforcement learning: prompts padded on the left, answers on the right
        rows = pad(rng, hide(rng, family, rows), "left")
        answers = pad(rng, [random_words(rng, 1, 5) for _ in rows], "right")
        return [row + answer for row, answer in zip(rows, answers)]
    return pad(rng, hide(rng, family, rows), rng.choice(["left", "right", "both", "words"]))


def inputs_of(family, rows, use_mask=True):
    input_ids = torch.tensor([row.ids for row in rows])
    inputs = {"input_ids": input_ids, **family.types(input_ids)}
    if use_mask:
        inputs["attention_mask"] = torch.tensor([row.mask for row in rows])
    return {**inputs, **family.pixels([view for row in rows for view, _ in row.views])}


def pass_positions(rng, family, stock, rows, inputs):
    """A caller's own positions; returns the rule that wrote them."""
    if family.is_qwen:
        if rng.random() < 0.25 and all(
            any(row.mask[c] for c, _ in columns) for row in rows for _, columns in row.views
        ):
            places = [family.full_positions(stock, row) for row in rows]
            inputs["position_ids"] = torch.cat(places, dim=1)
            if rng.random() < 0.5:
                text = torch.tensor([short_positions("zeros", row.mask) for row in rows])
                inputs["position_ids"] = torch.cat([text[None], inputs["position_ids"]])
        return None
    rule = rng.choice([None, None, None, "cumsum", "ones", "zeros", "arange"])
    if rule is not None:
        inputs["position_ids"] = torch.tensor([short_positions(rule, row.mask) for row in rows])
    return rule


def describe(rows_of_parts):
    """`w*3` is three words, `_*4` padding of four columns; what is in parentheses is masked."""

    def kind(part):
        if isinstance(part, tuple):
            return "_" if part[1] == PAD else f"({kind(part[1])})"
        return f"{part.modality}{length_of(part)}" if is_view(part) else "w"

    def story(row):
        runs = [(name, len(list(run))) for name, run in itertools.groupby(map(kind, row))]
        return " ".join(name + (f"*{count}" if count > 1 else "") for name, count in runs)

    return "; ".join(map(story, rows_of_parts))


# Forward


def run_forward(family, seed):
    """One random prompt through `forward`: what is wrong with the output, and what the prompt was."""
    rng = random.Random(seed)
    ours, stock = models(family)
    parts = random_batch(rng, family, ours)
    rows = make_rows(family, ours, parts)
    use_mask = rng.random() < 0.8 or not all(all(row.mask) for row in rows)
    inputs = inputs_of(family, rows, use_mask)
    rule = pass_positions(rng, family, stock, rows, inputs)
    kinds = ["plain", "keep", "labels", "labels", "hidden_states", "tuple", "base", "short"]
    kind = rng.choice(kinds)
    story = f"{kind}, positions {rule if 'position_ids' in inputs else None}, mask {use_mask}: {describe(parts)}"
    _TOLD[0] = story
    problems: list[str] = []

    single = [alone(family, ours, stock, row, rule, output_hidden_states=True) for row in rows]
    logits = [expand(output.logits[0], row) for output, row in zip(single, rows)]
    shortened = any(any(row.is_dropped) for row in rows)
    length = len(rows[0].ids)

    with torch.no_grad():
        if kind == "keep":
            keep, wanted = random_keep(rng, length, len(rows))
            output = ours(**inputs, logits_to_keep=keep)
            if isinstance(keep, torch.Tensor) and keep.dtype == torch.bool:
                values = [[row[c] for row, flags in zip(logits, wanted) for c in flags]]
                check_columns(f"logits_to_keep of {kind_of(keep)}", output.logits[None], values, problems)
            else:
                values = [[row[c] for c in columns] for row, columns in zip(logits, wanted)]
                check_columns(f"logits_to_keep of {kind_of(keep)}", output.logits, values, problems)
        elif kind == "labels":
            check_loss(rng, ours, inputs, rows, logits, problems)
        elif kind == "tuple":
            output = ours(**inputs, return_dict=False, output_hidden_states=True)
            names = [name for name in ours(**inputs, output_hidden_states=True) if name not in OURS_ALONE]
            if not isinstance(output, tuple) or len(output) != len(names):
                problems.append(f"return_dict=False: {len(output)} values, the fields are {names}")
            check_columns("tuple[0]", output[0], logits, problems)
            states = output[names.index("hidden_states")]
            check_states(states, single, rows, problems)
        elif kind == "base":
            output = ours.model(**inputs, output_hidden_states=True)
            last = [expand(o.hidden_states[-1][0], row) for o, row in zip(single, rows)]
            check_columns("last_hidden_state", output.last_hidden_state, last, problems)
            check_states(output.hidden_states, single, rows, problems)
        elif kind == "short" and not any(row.is_padding(c) or not row.mask[c] for row in rows for c in range(length)):
            short = len({len(row.short_ids) for row in rows}) == 1
            chosen = rows if short else rows[:1]
            short_ids = torch.tensor([row.short_ids for row in chosen])
            pixels = family.pixels([view for row in chosen for view, _ in row.views])
            output = ours(input_ids=short_ids, **family.types(short_ids), **pixels)
            values = [list(o.logits[0]) for o in single[: len(chosen)]] if rule is None else None
            if values is not None:
                check_columns("short prompt", output.logits, values, problems)
        else:
            output = ours(**inputs, output_hidden_states=kind == "hidden_states")
            check_columns("logits", output.logits, logits, problems)
            if kind == "hidden_states":
                check_states(output.hidden_states, single, rows, problems)
            keep_mask = output.get("keep_mask")
            if (keep_mask is not None) != shortened:
                problems.append(f"keep_mask is {'missing' if shortened else 'there'}")
            elif keep_mask is not None:
                check_keep_mask(keep_mask, rows, problems)
    return problems, story


def kind_of(keep):
    return f"shape {tuple(keep.shape)}, {keep.dtype}" if isinstance(keep, torch.Tensor) else keep


OURS_ALONE = ("keep_mask", "layer_visual_tokens")


def random_keep(rng, length, batch):
    """A `logits_to_keep`, and the columns of each row that it names."""
    count = rng.randint(1, length)
    columns = [rng.randrange(length) for _ in range(count)]
    kind = rng.choice(["int", "int", "1d", "negative"] + ["2d", "bool"] * TAKES_ROWS)
    if kind == "int":
        return count, [range(length - count, length)] * batch
    if kind == "1d":
        return torch.tensor(columns), [columns] * batch
    if kind == "negative":
        return torch.tensor([column - length for column in columns]), [columns] * batch
    rows = [[rng.randrange(length) for _ in range(count)] for _ in range(batch)]
    if kind == "2d":
        return torch.tensor(rows), rows
    flags = torch.tensor([[rng.random() < 0.3 for _ in range(length)] for _ in range(batch)])
    flags[0, -1] = True
    return flags, [row.nonzero()[:, 0].tolist() for row in flags]


def check_states(states, single, rows, problems):
    if len(states) != len(single[0].hidden_states):
        problems.append(f"hidden_states: {len(states)}, expected {len(single[0].hidden_states)}")
    for layer, state in enumerate(states):
        values = [expand(o.hidden_states[layer][0], row) for o, row in zip(single, rows)]
        if all(len(o.hidden_states[layer][0]) == len(row.short_ids) for o, row in zip(single, rows)):
            check_columns(f"hidden_states[{layer}]", state, values, problems)


def check_keep_mask(keep_mask, rows, problems):
    for index, (flags, row) in enumerate(zip(keep_mask.tolist(), rows)):
        if len(flags) != len(row.ids):
            problems.append(f"keep_mask: {len(flags)} columns, the prompt has {len(row.ids)}")
        elif any(flags[c] == row.is_dropped[c] for c in range(len(flags)) if row.mask[c] or row.is_placeholder[c]):
            problems.append(f"keep_mask: row {index}")


def check_loss(rng, ours, inputs, rows, logits, problems):
    """The loss inside, with labels of placeholders or without, and `num_items_in_batch`."""
    length = len(rows[0].ids)
    labels_placeholders, has_items, share = rng.random() < 0.5, rng.random() < 0.5, rng.choice([0.2, 0.7, 1.0])
    labels, counted_labels = [], []
    for row, values in zip(rows, logits):
        given = [
            token if column and rng.random() < share and values[column - 1] is not None else IGNORED
            for column, token in enumerate(row.ids)
        ]
        if not has_items and rng.random() < 0.5:
            given[0] = row.ids[0]  # no column predicts it
        if not labels_placeholders:
            given = [IGNORED if is_placeholder else label for label, is_placeholder in zip(given, row.is_placeholder)]
        labels.append(given)
        counted_labels.append([IGNORED if placeholder else g for g, placeholder in zip(given, row.is_placeholder)])
    total, counted = naive_loss(logits, counted_labels)
    if not counted:
        return
    given_count = sum(label != IGNORED for row in labels for label in row[1:])
    kwargs, expected = {}, total / counted
    if has_items:
        items = rng.choice([given_count, given_count + 7])
        # Nothing is scaled where nothing was shortened: then the class is the stock class.
        expected = total / (items * counted / given_count)
        kwargs["num_items_in_batch"] = rng.choice([items, torch.tensor(items)])
    if not any(any(row.is_dropped) for row in rows):
        total, counted = naive_loss(logits, labels)
        expected = total / (kwargs["num_items_in_batch"] if has_items else counted)
    output = ours(**inputs, labels=torch.tensor(labels), **kwargs)
    check_columns("logits beside labels", output.logits, logits, problems)
    if not abs(float(output.loss) - float(expected)) <= 1e-8 * (1 + abs(float(expected))):
        problems.append(
            f"loss {float(output.loss):.6f}, expected {float(expected):.6f} (placeholders labelled: "
            f"{labels_placeholders}, num_items_in_batch {kwargs.get('num_items_in_batch')}, {counted} counted of "
            f"{given_count} given, {length} columns)"
        )


# Several forwards on one cache


def run_cached(family, seed):
    """A conversation in several forwards on one cache, each of ids, pixels and mask of its own."""
    rng = random.Random(seed)
    ours, stock = models(family)
    batch = rng.choice([1, 2, 2])
    segments = []
    for turn in range(rng.choice([2, 2, 3])):
        layout = (
            rng.choice(["left", "right", "both", "words", "words"]) if turn == 0 else rng.choice(["left", "words"])
        )
        rows = [random_parts(rng, family, least_words=1) for _ in range(batch)]
        if turn and rng.random() < 0.3:
            rows = [random_words(rng, 1, 3) for _ in range(batch)]
        # Where no row has a view yet, upstream numbers the columns of Qwen-VL, padding and all.
        so_far = itertools.chain(*itertools.chain(*segments, rows))
        if family.is_qwen and not any(map(is_view, so_far)):
            layout = "words"
        segments.append(pad(rng, rows, layout))
    parts = [[part for segment in segments for part in segment[row]] for row in range(batch)]
    rows = make_rows(family, ours, parts)
    use_mask = rng.random() < 0.7 or not all(all(row.mask) for row in rows)
    rule = None if family.is_qwen else rng.choice([None, None, "cumsum", "ones", "zeros", "arange"])
    kind = rng.choice(["dynamic", "dynamic", "bare", "static"])
    story = f"{kind} cache, positions {rule}, mask {use_mask}: " + " | ".join(map(describe, segments))
    problems: list[str] = []

    single = [alone(family, ours, stock, row, rule) for row in rows]
    length = len(rows[0].ids)
    cache = DynamicCache() if kind == "bare" else DynamicCache(config=ours.config.get_text_config())
    if kind == "static":
        cache = StaticCache(config=ours.config.get_text_config(), max_cache_len=length + 8)
    positions = None if rule is None else torch.tensor([short_positions(rule, row.mask) for row in rows])
    ends = list(itertools.accumulate(sum(map(length_of, segment[0])) for segment in segments))
    # The stock Qwen-VL finds no positions behind a cache where a mask is passed; ours are it until a token is dropped.
    is_lost = use_mask and not any(any(row.is_dropped[: ends[1]]) for row in rows)
    if family.is_qwen and (rng.random() < 0.5 or is_lost):
        positions = torch.cat([family.full_positions(stock, row) for row in rows], dim=1)
    first = 0
    story += "" if positions is None else ", own positions"
    _TOLD[0] = story
    for number, (segment, last) in enumerate(zip(segments, ends)):
        input_ids = torch.tensor([row.ids[first:last] for row in rows])
        inputs = {"input_ids": input_ids, **family.types(input_ids), CACHE: cache, "use_cache": True}
        inputs |= family.pixels([part for row in segment for part in row if is_view(part)])
        if use_mask:
            inputs["attention_mask"] = torch.tensor([row.mask[:last] for row in rows])
        if positions is not None:
            inputs["position_ids"] = positions[..., first:last]
        with torch.no_grad():
            output = ours(**inputs)
        values = [expand(o.logits[0], row, first, last) for o, row in zip(single, rows)]
        if not family.has_stock:  # dropped inside, behind nothing of this forward: no value of the row alone
            for row, of_row in zip(rows, values):
                words = (
                    c for c in range(first, last) if not (row.is_placeholder[c] or row.is_padding(c, first, last))
                )
                leading = next(words, last) - first
                of_row[:leading] = [None] * leading
        check_columns(f"forward {number}", output.logits, values, problems)
        first = last
    return problems, story


# Generation


def answer_naively(family, ours, stock, row, count):
    """Greedy: one forward of the whole short prompt for each new token."""
    ids, mask = [], []
    for _ in range(count):
        longer = dataclasses.replace(row, ids=row.ids + ids, mask=row.mask + mask, is_with_views=True)
        rule = None if family.is_qwen else "ones"
        ids = [*ids, int(alone(family, ours, stock, longer, rule).logits[0, -1].argmax())]
        mask = [*mask, 1]
    return ids


def run_generate(family, seed, turns=None):
    """A chat with a cache, or one turn without; every answer against greedy search without a cache, row by row."""
    rng = random.Random(seed)
    ours, stock = models(family)
    batch, num_turns = rng.choice([1, 1, 2]), rng.choice([1, 1, 2, 3])
    has_cache, passes = rng.random() < 0.8, rng.choice(["all", "new", "ids"])
    static = has_cache and rng.random() < 0.2
    history: list[list] = [[] for _ in range(batch)]
    cache = DynamicCache(config=ours.config.get_text_config())
    if static:
        cache = StaticCache(config=ours.config.get_text_config(), max_cache_len=2500)
    story, problems = f"generate, cache {has_cache}, static {static}, pixels {passes}: ", []
    for turn in range(num_turns):
        new = [random_parts(rng, family) for _ in range(batch)]
        if turn == 0:
            # Upstream takes the grids of Qwen-VL in the order of the views that are shown, and none is the last here.
            is_last = num_turns == 1 or not family.is_qwen
            new = hide(rng, family, new) if rng.random() < 0.5 and is_last else new
            # What follows a masked column is not defined.
            new = [row[:-1] + [row[-1][1] if isinstance(row[-1], tuple) else row[-1]] for row in new]
        new = pad(rng, new, "left")
        history = [row + part for row, part in zip(history, new)]
        story += " | " + describe(new)
        _TOLD[0] = story
        rows = make_rows(family, ours, history)
        inputs = inputs_of(family, rows)
        if has_cache and passes != "all":
            pixels = inputs_of(family, make_rows(family, ours, new))
            inputs = {name: value for name, value in inputs.items() if "pixel" not in name and "grid" not in name}
            inputs.pop("image_sizes", None)
            inputs |= {
                n: v for n, v in pixels.items() if n not in ("input_ids", "attention_mask", "mm_token_type_ids")
            }
        kwargs = {CACHE: cache} if has_cache else {}
        if turn and has_cache and passes == "ids":  # the last token of an answer is not in the cache
            inputs["input_ids"] = inputs["input_ids"][:, -sum(map(length_of, new[0])) - 1 :]
            inputs |= family.types(inputs["input_ids"])
        before = [row.ids[: len(row.ids) - inputs["input_ids"].shape[1]] for row in rows]
        with torch.no_grad():
            output = ours.generate(**inputs, max_new_tokens=3, do_sample=False, disable_compile=True, **kwargs)
        length = len(rows[0].ids)
        output = torch.cat([torch.tensor(before, dtype=torch.long), output], dim=1)
        if output[:, :length].tolist() != [row.ids for row in rows]:
            problems.append(f"turn {turn}: the output does not begin with the caller's prompt")
        for index, row in enumerate(rows):
            got, expected = output[index, length:].tolist(), answer_naively(family, ours, stock, row, 3)
            if got != expected:
                problems.append(f"turn {turn}, row {index}: {got}, expected {expected}")
        history = [row + output[index, length:].tolist() for index, row in enumerate(history)]
    return problems, story


# The tests


def run_all(run, family, seeds):
    failures = []
    for seed in seeds:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                problems, story = run(family, seed)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            problems, story = [f"{type(error).__name__}: {str(error)[:200]} ({where.name}:{where.lineno})"], _TOLD[0]
        if problems:
            failures.append(f"seed {seed}: {problems[0]}\n      {story}")
    if failures:
        shown = "\n".join(failures[:8])
        pytest.fail(f"{len(failures)} of {len(seeds)} prompts fail for {family.name}:\n{shown}", pytrace=False)


QUICK = ("LLaVA", "LLaVA-NeXT", "Qwen3VL")
every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.contract) for name in FAMILIES]
)


def share(part):
    """Seeds of one family for `part` of all prompts."""
    return range(max(int(NUM_PROMPTS * part / len(FAMILIES)), 1))


@every_family
def test_forward_has_the_callers_columns(name):
    run_all(run_forward, FAMILIES[name], share(0.6))


@every_family
def test_several_forwards_on_one_cache(name):
    run_all(run_cached, FAMILIES[name], share(0.25))


@every_family
def test_generate_answers_as_without_a_cache(name):
    run_all(run_generate, FAMILIES[name], share(0.15))


@every_family
def test_whatever_indexes_columns_can_be_kept(name):
    """Forms of `logits_to_keep` that the stock class takes because a tensor can be indexed so."""
    family = FAMILIES[name]
    ours, _ = models(family)
    rows = make_rows(
        family, ours, [[BOS, 11, equal_view(family, 1), 20, 21], [BOS, 12, equal_view(family, 2), 22, 23]]
    )
    inputs = inputs_of(family, rows)
    with torch.no_grad():
        logits = ours(**inputs).logits
        length = logits.shape[1]
        flags = torch.zeros(length, dtype=torch.bool)
        flags[[1, length // 2, length - 1]] = True
        for keep in ([1, 3, length - 1], flags, slice(2, 5), 10 * length, -2, 2 - length):
            wanted = logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
            torch.testing.assert_close(ours(**inputs, logits_to_keep=keep).logits, wanted, msg=str(keep))


# A picture a turn, all of them passed again: at turn k the T new placeholders are as many as the N of k pictures

DIVISORS = {
    "LLaVA": ({"image_size": 24}, 36, [18, 12, 9]),
    "LLaVA-NeXT": ({}, 126, [14, 21]),
    "Video-LLaVA": ({"image_size": 24}, 36, [18, 12, 9]),
    "Mini-Gemini": ({}, 49, [7]),
    "ViTCoP": ({"image_size": 24}, 36, [9, 6]),
    "LLaVA with llm_budget": ({"image_size": 24}, 36, [18, 12, 9]),
    "Qwen2VL": ({}, 36, [1 / 2, 1 / 3, 1 / 4]),
    "Qwen2_5_VL": ({}, 36, [1 / 2, 1 / 3, 1 / 4]),
    "Qwen3VL": ({}, 36, [1 / 2, 1 / 3, 1 / 4]),
}
CHATS = [
    pytest.param(name, vision, total, budget, marks=() if name in QUICK and not index else pytest.mark.contract)
    for name, (vision, total, budgets) in DIVISORS.items()
    for index, budget in enumerate(budgets)
]


@pytest.mark.parametrize("passes", ["all", "new"])
@pytest.mark.parametrize("name, vision, total, budget", CHATS)
def test_a_chat_with_a_picture_a_turn(name, vision, total, budget, passes):
    family = type(FAMILIES[name]).__new__(type(FAMILIES[name]))
    family.__dict__.update(FAMILIES[name].__dict__, vision=vision, budget=budget)
    ours = family.build()
    stock = family.stock(ours) if family.has_stock else None
    cache = DynamicCache(config=ours.config.get_text_config())
    history, views, kept = [BOS], [], None
    for turn in range(7 if total == 49 else 4):
        view = equal_view(family, turn)
        views, history = [*views, view], [*history, 20 + turn, view, 30 + turn, 31]
        rows = make_rows(family, ours, [history])
        kept = len(rows[0].kept[view])
        inputs = inputs_of(family, rows) if passes == "all" else only_pixels(family, ours, history, view)
        with torch.no_grad():
            output = ours.generate(**inputs, max_new_tokens=3, do_sample=False, **{CACHE: cache})
        answer = output[0, -3:].tolist()
        assert answer == answer_naively(family, ours, stock, rows[0], 3), f"turn {turn + 1}, {kept} of {total} kept"
        history = history + answer
    assert total % kept == 0 or family.name == "ViTCoP"


def equal_view(family, seed):
    """A view of as many tokens at every turn."""
    rng = random.Random(seed)
    if family.is_qwen:
        return family.view_of("image", (1, 12, 12), seed)
    if family.name == "LLaVA-NeXT":
        return family.view_of((28, 36), seed)
    return next(view for view in iter(lambda: family.view(rng), None) if view.modality == "image")


def only_pixels(family, ours, history, view):
    """The ids of the whole conversation with the pixels of its last view alone."""
    inputs = inputs_of(family, make_rows(family, ours, [history]))
    inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    return {**inputs, **family.types(inputs["input_ids"]), **family.pixels([view])}


# Caches that do not fit, prompts that fit two readings


def one_turn(family, *words):
    view = equal_view(family, words[0])
    return [BOS, words[0], view, *words[1:]]


@pytest.mark.parametrize("passes", ["all", "new"])
@pytest.mark.parametrize("second", [(12, 30, 31), (12, 30, 31, 32, 33, 34, 35), (11, 30, 31, 32)])
@every_family
def test_a_cache_of_another_conversation_is_an_error(name, second, passes):
    family = FAMILIES[name]
    ours, _ = models(family)
    cache = DynamicCache(config=ours.config.get_text_config())
    settings = {"max_new_tokens": 3, "do_sample": False, CACHE: cache}
    ours.generate(**inputs_of(family, make_rows(family, ours, [one_turn(family, 11, 20, 21)])), **settings)
    history = one_turn(family, *second)
    if passes == "new":
        history += [40, equal_view(family, 5), 41]
    rows = make_rows(family, ours, [history])
    inputs = inputs_of(family, rows) if passes == "all" else only_pixels(family, ours, history, history[-2])
    with pytest.raises(ValueError):
        ours.generate(**inputs, **settings)


class Interrupts:
    def __init__(self, puts):
        self.puts = puts

    def put(self, value):
        self.puts -= 1
        if self.puts < 0:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.mark.parametrize("puts", [1, 2, 3])
@every_family
def test_a_cache_that_an_interrupted_call_left_is_an_error_or_right(name, puts):
    family = FAMILIES[name]
    ours, stock = models(family)
    cache = DynamicCache(config=ours.config.get_text_config())
    settings = {"max_new_tokens": 4, "do_sample": False, CACHE: cache}
    rows = make_rows(family, ours, [one_turn(family, 11, 20, 21)])
    with pytest.raises(KeyboardInterrupt):
        ours.generate(**inputs_of(family, rows), streamer=Interrupts(puts), **settings)
    for history in (one_turn(family, 11, 20, 21), one_turn(family, 11, 20, 21) + [22, 23, 24, 25, 26]):
        rows = make_rows(family, ours, [history])
        try:
            output = ours.generate(**inputs_of(family, rows), **settings)
        except ValueError:
            continue
        assert output[0, -4:].tolist() == answer_naively(family, ours, stock, rows[0], 4)


@pytest.mark.parametrize("call", ["forward", "generate"])
@every_family
def test_a_full_prompt_cut_to_as_many_placeholders_as_are_kept_is_an_error(name, call):
    family = FAMILIES[name]
    ours, _ = models(family)
    row = make_rows(family, ours, [[BOS, 5, equal_view(family, 3)]])[0]
    inputs = inputs_of(family, [row])
    ((view, columns),) = row.views
    cut = columns[len(row.kept[view])][0]
    for along in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if along in inputs:
            inputs[along] = inputs[along][:, :cut]
    with pytest.raises(ValueError), torch.no_grad():
        ours(**inputs) if call == "forward" else ours.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("name", ["LLaVA", "Video-LLaVA", "LLaVA with llm_budget"])
def test_one_full_run_for_two_pictures_is_an_error(name, call):
    """T = 2N: one picture's placeholders as the stock processor writes them, or two pictures' as ours does."""
    family = type(FAMILIES[name]).__new__(type(FAMILIES[name]))
    family.__dict__.update(FAMILIES[name].__dict__, vision={"image_size": 24}, budget=18)
    ours = family.build()
    views = [equal_view(family, 1), equal_view(family, 2)]
    inputs = inputs_of(family, make_rows(family, ours, [[BOS, 5, views[0], 20, 21]]))
    inputs |= family.pixels(views)
    with pytest.raises(ValueError), torch.no_grad():
        ours(**inputs) if call == "forward" else ours.generate(**inputs, max_new_tokens=2)
