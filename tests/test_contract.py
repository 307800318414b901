"""
What every declared family must do, whatever its kind: one contract for all rows of `families.py`.

The oracle is the stock class with the same weights. It encodes all tokens itself, and is run on prompts that are
shortened by hand with the kept rows of its own features. Logits are compared in float64. `TOLERANCE` is that of
layers that upstream computes in float32 all the same (norms, routers, linear attention, of which sums in another order
were 42 steps of float32 apart); a token more or less is over 1e-3, which is asserted beside.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import random

import pytest
import torch
from families import BOS, EOS, IMAGE, PAD, ROWS, VIDEO, flat
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.utils import logging

from modeling_prunesid.family import stock_class
from modeling_prunesid.upstream import CACHE_NAME, cache_of


TOLERANCE = 128 * torch.finfo(torch.float32).eps  # of the largest logit
NEW_TOKENS = 4

every_row = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xdist_group(row.family), id=name.replace(" ", "-"))
        for name, row in ROWS.items()
        if row.is_installed
    ],
)


@functools.cache
def build(name):
    """A random model of a row's family, the stock class with its weights, and the row."""
    row = ROWS[name]
    stock = stock_class(row.head)
    torch.manual_seed(0)
    settings = {"budget": row.budget, **row.settings}
    ours = row.head(row.head.config_class(**copy.deepcopy(row.config), prunesid_config=settings)).double().eval()
    reference = stock(stock.config_class(**copy.deepcopy(row.config))).double().eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if not torch.isfinite(parameter).all() or (
                parameter.numel() > 1 and parameter.dim() > 1 and parameter.std() == 0
            ):
                parameter.copy_(0.3 * torch.randn(parameter.shape))  # exact in float32, in which some are loaded
        weight = (ours.get_output_embeddings() or ours.language_model.lm_head).weight
        unlikely = (PAD, EOS, IMAGE, VIDEO, row.token, *row.special)  # never the best of random logits
        weight[[token for token in unlikely if token < len(weight)]] = 0
    reference.load_state_dict(ours.state_dict(), strict=True)
    for model in (ours, reference):
        model.requires_grad_(False)
        if row.prepare is not None:
            row.prepare(model)
    return ours, reference, row


def base_of(model):
    return getattr(model, "model", model)


def rows_of(row):
    """The indices of the inputs of each row of the batch."""
    ends = torch.tensor(row.rows).cumsum(0).tolist()
    return [list(range(end - count, end)) for count, end in zip(row.rows, ends)]


def write(row, indices, counts, answer=0):
    """The ids of one row of the batch, with so many placeholders for its inputs."""
    ids = [BOS]
    for index, count in zip(indices, counts):
        ids += [5 + index, *row.write(count, index, row.token)]
    return ids + [7, 8, 9][: 3 - answer]


def batch(rows):
    """`input_ids` and `attention_mask` of rows of different lengths, padded on the left."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows]),
    }


def prompt(row, layout=None):
    """The arguments of our classes for a batch of full prompts."""
    layout = rows_of(row) if layout is None else layout
    texts = [write(row, own, [row.tokens[index] for index in own], place) for place, own in enumerate(layout)]
    inputs = batch(texts)
    return {**inputs, **row.along(inputs["input_ids"]), **row.inputs(layout)}


def for_stock(row, inputs):
    return {name: value for name, value in inputs.items() if name not in row.ours}


def encode_ours(model, row, **ours):
    """What our encoder gives for the inputs of the batch."""
    encode = getattr(base_of(model), f"get_{row.modality}_features")
    return encode(**row.inputs(rows_of(row)), **ours, return_dict=True)


def encode(model, row):
    """What the stock class puts into prompts for the inputs of the batch."""
    inputs = for_stock(row, row.inputs(rows_of(row)))
    if row.stock_encodes_as_images:
        return base_of(model).get_image_features(inputs["pixel_values_videos"], return_dict=True)
    mask = inputs.pop("video_compression_mask", None)
    output = getattr(base_of(model), f"get_{row.modality}_features")(**inputs, return_dict=True)
    if mask is not None:  # upstream's `forward` applies it
        output.pooler_output = [torch.cat(list(output.pooler_output))[mask]]
    return output


def shorten(row, ids, kept):
    """Which of the ids `(length,)` of one row remain: a mask."""
    keep = torch.ones_like(ids, dtype=torch.bool)
    flags = []
    for index, indices in kept.items():
        flag = torch.zeros(row.tokens[index], dtype=torch.bool)
        flag[indices[indices >= 0]] = True
        if row.several_runs:
            flag = level(row, flag, row.write(len(flag), index, row.token))
        flags.append(flag)
    keep[ids == row.token] = torch.cat(flags)
    return keep


def level(row, flag, ids):
    """The placeholders that stay where a view is several runs: equal shares of each, remainders to the first ones."""
    lengths = [
        len(list(group)) for is_token, group in itertools.groupby(token == row.token for token in ids) if is_token
    ]
    of_run = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    levelled = torch.zeros_like(flag)
    for view in torch.arange(len(flag)).split(row.view_length or len(flag)):
        own = [view[of_run[view] == run] for run in of_run[view].unique()]
        assert len({len(places) for places in own}) == 1
        share, rest = divmod(int(flag[view].sum()), len(own))
        for number, places in enumerate(own):
            levelled[places[: share + (number < rest)]] = True
    return levelled


def hand_shortened(reference, row, kept):
    """For each row of the batch the stock class's arguments for its short prompt, and the mask of its columns."""
    output = encode(reference, row)
    shortened = []
    for place, own in enumerate(rows_of(row)):
        ids = torch.tensor([write(row, own, [row.tokens[index] for index in own], place)])
        along = row.along(ids)
        keep = shorten(row, ids[0], {index: kept[index] for index in own})
        arguments = {
            "input_ids": ids[:, keep],
            "attention_mask": torch.ones_like(ids[:, keep]),
            **{name: value[:, keep] for name, value in along.items()},
        }
        if row.mrope:
            arguments["position_ids"] = positions(reference, row, ids, along, place)[0][..., keep]
        encoded = copy.copy(output)
        put(row, encoded, output, own, kept)
        arguments["mm_encoder_outputs"] = {row.modality: encoded}
        shortened.append((arguments, keep))
    return shortened


def put(row, encoded, output, own, kept):
    """Replaces what the stock class puts into prompts by the kept rows of some inputs."""

    def choose(entries):
        every = torch.cat(list(entries)).split(list(row.tokens[: row.num_inputs]))
        return [every[index][kept[index]] for index in own]

    if row.put_features is not None:
        row.put_features(encoded, output, choose)
        return
    chosen = choose(output.pooler_output)
    encoded.pooler_output = torch.cat(chosen)[None] if isinstance(output.pooler_output, torch.Tensor) else chosen
    if output.get("deepstack_features") is not None:
        encoded.deepstack_features = [choose(layer) for layer in output.deepstack_features]


def positions(reference, row, ids, along, place):
    """The stock class's own positions of a full prompt, and the deltas behind it."""
    inputs = row.inputs([rows_of(row)[place]])
    names = inspect.signature(reference.model.get_rope_index).parameters
    inputs["second_per_grids"] = inputs.get("video_second_per_grid")
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **along, **inputs}
    return reference.model.get_rope_index(**{name: value for name, value in arguments.items() if name in names})


def fresh(arguments):
    """Arguments of one call: upstream changes the encoder's outputs that it is given."""
    outputs = {name: copy.copy(output) for name, output in arguments["mm_encoder_outputs"].items()}
    return {**arguments, "mm_encoder_outputs": outputs}


def close(ours, theirs, tolerance=TOLERANCE):
    return float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


@contextlib.contextmanager
def budget_of(model, budget):
    """Another budget for a while, of a model that other tests share."""
    settings = model.config.prunesid_config
    saved = settings.budget
    settings.budget = budget
    try:
        yield
    finally:
        settings.budget = saved


@every_row
@torch.no_grad()
def test_each_input_keeps_exactly_n(name):
    ours, reference, row = build(name)
    output = encode_ours(ours, row)
    count = row.num_inputs
    assert [len(kept) for kept in output["keep_indices"]] == list(row.kept[:count])
    assert list(output["num_placeholders"]) == list(row.tokens[:count])
    whole = row.features(encode(reference, row)).split(list(row.tokens[:count]))
    for kept in output["keep_indices"]:
        assert (kept.diff() > 0).all()
    expected = torch.cat([features[kept] for features, kept in zip(whole, output["keep_indices"])])
    assert close(row.features(output), expected)


@every_row
@torch.no_grad()
def test_off_is_the_stock_class_bit_for_bit(name):
    ours, reference, row = build(name)
    inputs = prompt(row)
    expected = reference(**for_stock(row, inputs)).logits
    for budget in (None, 10_000):
        with budget_of(ours, budget):
            assert torch.equal(ours(**inputs).logits, expected)


@every_row
@torch.no_grad()
def test_full_prompts_equal_the_stock_class_on_short_ones(name):
    ours, reference, row = build(name)
    inputs = prompt(row)
    output = ours(**inputs)
    kept = encode_ours(ours, row)["keep_indices"]
    whole = reference(**for_stock(row, inputs)).logits
    assert not close(output.logits[:, -1], whole[:, -1], 1e-3)  # dropping tokens changes the answer
    for place, (arguments, keep) in enumerate(hand_shortened(reference, row, kept)):
        assert torch.equal(output.keep_mask[place, -len(keep) :], keep)
        expected = reference(**fresh(arguments)).logits[0]
        assert close(output.logits[place, -len(keep) :][keep], expected)


@every_row
@torch.no_grad()
def test_greedy_answers_are_those_of_the_stock_class_on_short_prompts(name):
    ours, reference, row = build(name)
    inputs, read = prompt(row), []
    hook = ours.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    answers = ours.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    hook.remove()
    length = inputs["input_ids"].shape[1]
    assert 0 < read[0] < length  # what the commands count
    assert torch.equal(answers[:, :length], inputs["input_ids"])
    kept = encode_ours(ours, row)["keep_indices"]
    for place, (arguments, keep) in enumerate(hand_shortened(reference, row, kept)):
        expected = greedy(reference, row, arguments, place, int(len(keep)))
        assert answers[place, length : length + NEW_TOKENS].tolist() == expected


def greedy(reference, row, arguments, place, full_length):
    """The stock class's answer; with three-dimensional positions step by step, at those behind the full prompt."""
    if not row.mrope:
        output = reference.generate(**fresh(arguments), max_new_tokens=NEW_TOKENS, do_sample=False)
        return output[0, arguments["input_ids"].shape[1] :].tolist()
    own = rows_of(row)[place]
    ids = torch.tensor([write(row, own, [row.tokens[index] for index in own], place)])
    delta = positions(reference, row, ids, row.along(ids), place)[1].item()
    answer, arguments = [], {**arguments}
    for step in range(NEW_TOKENS):
        answer.append(int(reference(**fresh(arguments)).logits[0, -1].argmax()))
        arguments["input_ids"] = torch.nn.functional.pad(arguments["input_ids"], (0, 1), value=answer[-1])
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        at = arguments["position_ids"]
        following = at.new_full((*at.shape[:-1], 1), full_length + delta + step)
        arguments["position_ids"] = torch.cat([at, following], -1)
        for argument in row.along(ids):
            arguments[argument] = torch.nn.functional.pad(arguments[argument], (0, 1))
    return answer


@every_row
def test_stock_checkpoints_load(name, tmp_path):
    ours, reference, row = build(name)
    if not row.checks_loading:
        return check_loads_what_the_stock_class_loads(ours, reference, tmp_path)
    reference.save_pretrained(tmp_path)
    for cls in {type(ours), type(base_of(ours))}:
        loaded, info = cls.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert not info["unexpected_keys"] or cls is not type(ours)
        expected = (reference if cls is type(ours) else base_of(reference)).state_dict()
        assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in loaded.state_dict().items())


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in ROWS if " " not in name and ROWS[name].is_installed])
def test_thin_variants_are_saved_of_the_very_weights_of_a_base(name, tmp_path):
    ours, reference, row = build(name)
    if not row.checks_loading:
        return
    reference.save_pretrained(tmp_path / "base")
    model = type(ours).from_pretrained(tmp_path / "base", dtype=torch.float64)
    model.save_pretrained(tmp_path / "thin", thin=True)
    loaded, info = type(ours).from_pretrained(tmp_path / "thin", dtype=torch.float64, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    for parameter in random.Random(name).sample(list(model.parameters()), 4):
        place = (-1,) * parameter.dim()
        parameter.data[place] += 1
        with pytest.raises(ValueError, match="not those of its base"):
            model.save_pretrained(tmp_path / "changed", thin=True)
        parameter.data[place] -= 1


def check_loads_what_the_stock_class_loads(ours, reference, folder):
    reference.save_pretrained(folder)
    for mine, theirs in ((type(ours), type(reference)), (type(base_of(ours)), type(base_of(reference)))):
        found, expected = (cls.from_pretrained(folder, output_loading_info=True)[1] for cls in (mine, theirs))
        assert set(found["missing_keys"]) <= set(expected["missing_keys"])


@every_row
def test_signatures_are_those_of_the_stock_class(name):
    ours, reference, row = build(name)
    for mine, theirs in ((type(ours), type(reference)), (type(base_of(ours)), type(base_of(reference)))):
        for method in ("forward", "get_image_features", "get_video_features"):
            if not hasattr(theirs, method):
                continue
            own = list(inspect.signature(getattr(mine, method)).parameters)
            stock = list(inspect.signature(getattr(theirs, method)).parameters)
            assert [parameter for parameter in own if parameter in stock] == stock
            forward = inspect.signature(theirs.forward).parameters
            assert set(own) - set(stock) <= {"num_visual_tokens", *row.ours, *forward}
            assert "num_visual_tokens" in own


@pytest.mark.full
@every_row
@torch.no_grad()
def test_a_batch_is_its_rows_alone(name):
    ours, _, row = build(name)
    whole = ours(**prompt(row)).logits
    for place, own in enumerate(rows_of(row)):
        ids = batch([write(row, own, [row.tokens[index] for index in own], place)])
        alone = ours(**ids, **row.along(ids["input_ids"]), **row.inputs([own])).logits[0]
        assert close(whole[place, -len(alone) :], alone)


@pytest.mark.full
@every_row
@torch.no_grad()
def test_short_prompts_equal_full_ones(name):
    ours, _, row = build(name)
    inputs = prompt(row)
    output = ours(**inputs)
    rows = [
        ids[keep & mask.bool()].tolist()
        for ids, keep, mask in zip(inputs["input_ids"], output.keep_mask, inputs["attention_mask"])
    ]
    short = batch(rows)
    arguments = {**short, **row.along(short["input_ids"]), **row.inputs(rows_of(row))}
    for ids, logits, full, keep, mask in zip(
        rows, ours(**arguments).logits, output.logits, output.keep_mask, inputs["attention_mask"]
    ):
        assert torch.equal(logits[-len(ids) :], full[keep & mask.bool()])
    lengths = [inputs["input_ids"].shape[1], short["input_ids"].shape[1]]
    answers = [ours.generate(**each, max_new_tokens=NEW_TOKENS, do_sample=False) for each in (inputs, arguments)]
    assert torch.equal(*(answer[:, length:] for answer, length in zip(answers, lengths)))


@pytest.mark.full
@every_row
@torch.no_grad()
def test_beams_of_rows_with_several_inputs_have_the_scores_of_their_answers(name):
    ours, _, row = build(name)
    if not row.beams:
        return
    inputs = prompt(row)
    length = inputs["input_ids"].shape[1]
    output = ours.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        num_beams=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    along = {
        key: torch.nn.functional.pad(value, (0, NEW_TOKENS), value=row.answer)
        for key, value in row.along(inputs["input_ids"]).items()
    }
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW_TOKENS), value=1)
    again = {**inputs, "input_ids": output.sequences, "attention_mask": mask, **along}
    logits = ours(**again).logits[:, -NEW_TOKENS - 1 : -1].log_softmax(-1)
    scores = logits.gather(2, output.sequences[:, length:, None]).sum((1, 2)) / NEW_TOKENS
    assert close(output.sequences_scores.double(), scores, 1e-5)  # upstream scores beams in float32


@pytest.mark.full
@pytest.mark.parametrize("gives_all", [True, False])
@every_row
@torch.no_grad()
def test_a_second_turn_on_a_cache_is_the_whole_conversation(name, gives_all):
    ours, _, row = build(name)
    if not row.cached_chat or row.fixed_layout:
        return
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    first = write(row, [0], [row.tokens[0]])
    ids = batch([first])
    turn = ours.generate(
        **ids, **row.along(ids["input_ids"]), **row.inputs([[0]]), **options, return_dict_in_generate=True
    )
    second = [8, *row.write(row.tokens[1], 1, row.token), 9]
    conversation = batch([turn.sequences[0].tolist() + second])
    conversation |= row.along(conversation["input_ids"])
    expected = ours.generate(**conversation, **row.inputs([[0, 1]]), **options)
    cached = {CACHE_NAME: cache_of(turn)}
    given = row.inputs([[0, 1]] if gives_all else [[1]])
    assert torch.equal(ours.generate(**conversation, **given, **cached, **options), expected)


@pytest.mark.full
@every_row
@torch.no_grad()
def test_a_static_cache_gives_the_same_answer(name):
    ours, _, row = build(name)
    if not row.static_cache:
        return
    inputs = prompt(row)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = ours.generate(**inputs, **options)
    assert torch.equal(
        ours.generate(**inputs, **options, cache_implementation="static", disable_compile=True), expected
    )


@pytest.mark.full
@every_row
@torch.no_grad()
def test_saved_models_load_through_auto_classes(name, tmp_path):
    ours, _, row = build(name)
    logging.disable_progress_bar()
    ours.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(ours.config) and config.prunesid_config.budget == row.budget
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(loaded) is type(ours)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if row.prepare is not None:
        row.prepare(loaded)
    inputs = prompt(row)
    expected = ours.state_dict()
    assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in loaded.state_dict().items())
    # Some parts are loaded in float32.
    assert close(loaded.eval()(**inputs).logits, ours(**inputs).logits, 1e-5)
    assert type(base_of(AutoModel.from_pretrained(tmp_path, dtype=torch.float64))) is type(base_of(ours))


@pytest.mark.full
@every_row
def test_gradients_reach_the_tower_and_the_embeddings(name):
    ours, _, row = build(name)
    inputs = prompt(row)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == row.token, -100)
    ours.requires_grad_(True)
    try:
        ours(**inputs, labels=labels).loss.backward()
        norms = {key: parameter.grad for key, parameter in ours.named_parameters() if parameter.grad is not None}
        assert all(torch.isfinite(gradient).all() for gradient in norms.values())
        vision = [
            key for key in norms if any(word in key for word in ("vision", "visual", "image_tower", "video_tower"))
        ]
        assert any(norms[key].abs().sum() > 0 for key in vision)
    finally:
        ours.zero_grad()
        ours.requires_grad_(False)


@pytest.mark.full
@every_row
@torch.no_grad()
def test_an_entry_of_a_list_is_the_total_of_one_input(name):
    ours, _, row = build(name)
    views = [max(kept // row.budget, 1) for kept in row.kept[: row.num_inputs]]
    totals = [min(2 * count + index, tokens) for index, (count, tokens) in enumerate(zip(views, row.tokens))]
    for given in (totals, torch.tensor(totals)):
        output = encode_ours(ours, row, num_visual_tokens=given)
        assert [len(kept) for kept in output["keep_indices"]] == totals
    answer = ours.generate(**prompt(row), num_visual_tokens=totals, max_new_tokens=1)
    assert answer.shape == (len(row.rows), prompt(row)["input_ids"].shape[1] + 1)
    with pytest.raises(ValueError, match=f"one count for each of the {row.num_inputs}"):
        encode_ours(ours, row, num_visual_tokens=[*totals, 3])


@pytest.mark.full
@every_row
@torch.no_grad()
def test_a_forgotten_input_is_an_error(name):
    ours, _, row = build(name)
    inputs = prompt(row)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask", *row.along(inputs["input_ids"]))}
    with pytest.raises(ValueError, match=f"no {row.modality}|no image"):
        ours.generate(**text, max_new_tokens=1)


def test_rows_name_what_they_give():
    """Every input of a row's batches has a T and an N, and a row of the batch has several."""
    for row in ROWS.values():
        assert max(row.rows) > 1 and len(row.tokens) == len(row.kept) >= row.num_inputs
        assert sum(row.kept[: row.num_inputs]) < sum(row.tokens[: row.num_inputs])
        assert flat(rows_of(row)) == list(range(row.num_inputs))
