"""
What every declared family must do, whatever its kind: one contract for all rows of `families.py`.

The oracle is the stock class (`oracle_family.py`). A token more or less changes logits by over 1e-3, which is asserted
beside what is equal.
"""

import copy
import functools
import inspect
import json
import random
from dataclasses import replace

import pytest
import torch
from families import BOS, PAD, ROWS, every_row, flat, is_at_least
from oracle_family import (
    NEW_TOKENS,
    base_of,
    batch,
    build,
    close,
    encode,
    encode_ours,
    for_stock,
    fresh,
    output_of,
    positions,
    prompt,
    rows_of,
    settings_of,
    shortened_of,
    write,
)
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.utils import ModelOutput, logging

from modeling_prunesid.family import stock_class
from modeling_prunesid.method_paper import select as paper
from modeling_prunesid.methods import METHODS
from modeling_prunesid.upstream import CACHE_NAME, cache_of
from prunesid_cli.repo_check import check_repo


# The rows of a family are further inputs of one model.
every_family = every_row(lambda row: " " not in row.name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a row's model, ours or the stock one, that is saved once."""

    @functools.cache
    def folder_of(name, is_ours=False):
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        build(name)[0 if is_ours else 1].save_pretrained(folder)
        return folder

    logging.disable_progress_bar()
    return folder_of


@every_row()
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


@every_row()
@torch.no_grad()
def test_off_is_the_stock_class_bit_for_bit(name):
    ours, reference, row = build(name)
    inputs = prompt(row)
    expected = reference(**for_stock(row, inputs)).logits
    for budget in (None, 10_000):
        with settings_of(ours, budget=budget):
            assert torch.equal(ours(**inputs).logits, expected)


@every_row()
@torch.no_grad()
def test_full_prompts_equal_the_stock_class_on_short_ones(name):
    _, reference, row = build(name)
    output = output_of(name)
    whole = reference(**for_stock(row, prompt(row))).logits
    assert not close(output.logits[:, -1], whole[:, -1], 1e-3)  # dropping tokens changes the answer
    for place, (arguments, keep) in enumerate(shortened_of(name)):
        assert torch.equal(output.keep_mask[place, -len(keep) :], keep)
        expected = reference(**fresh(arguments)).logits[0]
        assert close(output.logits[place, -len(keep) :][keep], expected)


@every_row()
@torch.no_grad()
def test_tuples_have_the_values_of_the_stock_classes_tuple(name):
    ours, reference, row = build(name)
    inputs, settings = prompt(row), {"output_hidden_states": True, "return_dict": False}
    found = ours(**inputs, **settings)
    short, _ = shortened_of(name)[0]
    # Before 5.24 a tuple lacks what upstream did not compute itself: features of pixels, offsets of positions.
    expected = [reference(**given, **settings) for given in (for_stock(row, inputs), fresh(short))]
    kinds = [[tuple if isinstance(value, ModelOutput) else type(value) for value in values] for values in expected]
    assert [type(value) for value in found] in kinds[: 1 if is_at_least("5.24.0") else 2]
    assert torch.equal(found[0], output_of(name).logits)


@every_row()
@torch.no_grad()
def test_an_input_that_keeps_all_its_tokens_beside_one_that_does_not(name):
    """It keeps those of no view (newlines) too, as it does alone, and as its processor writes it."""
    ours, _, row = build(name)
    if row.fixed_layout:
        return
    texts = [write(row, [index], [row.tokens[index]]) for index in (0, 1)]
    inputs, totals = batch(texts), [row.tokens[0], row.kept[1]]
    arguments = {**inputs, **row.along(inputs["input_ids"]), **row.inputs([[0], [1]])}
    output = ours(**arguments, num_visual_tokens=totals)
    one = batch(texts[:1])
    alone = ours(**one, **row.along(one["input_ids"]), **row.inputs([[0]]), num_visual_tokens=1.0).logits[0]
    assert close(output.logits[0, -len(texts[0]) :], alone)
    kept = output.keep_mask & inputs["attention_mask"].bool()
    short = batch([ids[keep].tolist() for ids, keep in zip(inputs["input_ids"], kept)])
    arguments |= {**short, **row.along(short["input_ids"])}
    logits = ours(**arguments, num_visual_tokens=totals).logits
    for own, whole, keep, mask in zip(logits, output.logits, kept, short["attention_mask"]):
        assert close(own[mask.bool()], whole[keep])


@every_row(lambda row: "projector_name" in row.mechanisms and row.family != "mini_gemini")
@torch.no_grad()
def test_an_input_that_keeps_all_its_tokens_beside_one_that_keeps_its_cls(name):
    ours, reference, row = build(name)
    with settings_of(ours, method="release"):
        output = encode_ours(ours, row, num_visual_tokens=[*row.tokens[:1], *row.kept[1 : row.num_inputs]])
    assert output["keep_indices"][0].tolist() == [*range(row.tokens[0])]
    assert not all((kept >= 0).all() for kept in output["keep_indices"]) or row.modality == "video"
    whole = row.features(encode(reference, row))[: row.tokens[0]]
    assert close(row.features(output)[: row.tokens[0]], whole)


@every_row(lambda row: "projector_name" not in row.mechanisms)
@torch.no_grad()
def test_what_a_method_merges_takes_the_place_of_kept_tokens(name, monkeypatch):
    ours, _, row = build(name)
    plain, num_merged = row.features(encode_ours(ours, row)), 0

    def select(views, counts, settings, context):
        nonlocal num_merged
        found = paper(views, counts, settings, context)
        num_merged += sum(context.counts)
        places = found.indices.clamp(max=views.shape[1] - 1)
        return replace(found, merged=2 * views[torch.arange(len(views))[:, None], places])

    monkeypatch.setitem(METHODS, "paper", select)
    merged = row.features(encode_ours(ours, row))
    is_merged = (merged != plain).any(-1, keepdim=True)
    assert torch.equal(merged, torch.where(is_merged, 2 * plain, plain))
    assert int(is_merged.sum()) == num_merged > 0


@every_row()
@torch.no_grad()
def test_logits_to_keep_are_of_the_callers_columns_where_the_stock_class_reads_it(name):
    ours, reference, row = build(name)
    inputs = prompt(row, [rows_of(row)[0]])
    whole, length = ours(**inputs).logits, inputs["input_ids"].shape[1]
    for keep in (4, torch.tensor([3, length - 2])):
        expected = reference(**for_stock(row, inputs), logits_to_keep=keep).logits
        found = ours(**inputs, logits_to_keep=keep).logits
        assert found.shape == expected.shape
        wanted = whole if found.shape[1] == length else whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
        assert close(found, wanted)


def shown_of(output):
    """The hidden states and attentions of an encoder's output, tensors or None, whatever tuples they are in."""

    def flat(values):
        return [entry for value in values for entry in flat(value)] if isinstance(values, (tuple, list)) else [values]

    return [flat(output.get(kind) or ()) for kind in ("hidden_states", "attentions")]


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
@every_row()
@torch.no_grad()
def test_what_callers_ask_to_see_of_encoders_is_the_stock_classes(name, option):
    ours, reference, row = build(name)
    if option == "output_attentions":
        if name == "unlimited_ocr":
            return  # upstream's eager attention needs as many heads of keys as of queries
        ours, reference = copy.deepcopy(ours), copy.deepcopy(reference)
        ours.set_attn_implementation("eager")
        reference.set_attn_implementation("eager")
    layout, asked = [rows_of(row)[0]], {option: True, "return_dict": True}
    inputs = prompt(row, layout)
    expected = reference(**for_stock(row, inputs), **asked)
    encode = f"get_{'image' if row.stock_encodes_as_images else row.modality}_features"
    for budget in (row.budget, None):
        with settings_of(ours, budget=budget):
            found = ours(**inputs, **asked)
        encoders = [key for key, value in expected.items() if isinstance(value, ModelOutput)]
        pairs = [(found[key], expected[key]) for key in encoders]
        if not row.stock_encodes_as_images and hasattr(base_of(reference), encode):
            pixels = row.inputs(layout)
            stock_pixels = {
                key: value for key, value in for_stock(row, pixels).items() if key != "video_compression_mask"
            }
            try:
                pairs.append((None, getattr(base_of(reference), encode)(**stock_pixels, **asked)))
            except (TypeError, IndexError):  # an encoder that has none of these
                continue
            with settings_of(ours, budget=budget):
                pairs[-1] = (getattr(base_of(ours), encode)(**pixels, **asked), pairs[-1][1])
        for own, stock in pairs:
            for mine, theirs in zip(shown_of(own), shown_of(stock)):
                # A tower that would stop early hands on all that it has been asked for.
                assert len(mine) == len(theirs) or (budget is not None and not theirs)
                for value, wanted in zip(mine, theirs):
                    assert wanted is None or torch.equal(value, wanted)


@every_row()
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
    for place, (arguments, keep) in enumerate(shortened_of(name)):
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


@every_family
def test_stock_checkpoints_load(name, saved):
    ours, reference, row = build(name)
    if not row.checks_loading:
        return check_loads_what_the_stock_class_loads(ours, reference, saved(name))
    for cls in {type(ours), type(base_of(ours))}:
        loaded, info = cls.from_pretrained(saved(name), dtype=torch.float64, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert not info["unexpected_keys"] or cls is not type(ours)
        expected = (reference if cls is type(ours) else base_of(reference)).state_dict()
        assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in loaded.state_dict().items())


@every_family
def test_thin_variants_are_saved_of_the_very_weights_of_a_base(name, saved, tmp_path):
    ours, _, row = build(name)
    if not row.checks_loading:
        return
    model = type(ours).from_pretrained(saved(name), dtype=torch.float64)
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
    for mine, theirs in ((type(ours), type(reference)), (type(base_of(ours)), type(base_of(reference)))):
        found, expected = (cls.from_pretrained(folder, output_loading_info=True)[1] for cls in (mine, theirs))
        assert set(found["missing_keys"]) <= set(expected["missing_keys"])


@every_family
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


# Families, or rows of them, of which T is known only when the encoder has run.
COUNTED_BY_THE_ENCODER = {
    "gemma4",
    "gemma4_unified",
    "nemotron_h_omni",
}


@every_row()
@torch.no_grad()
def test_a_prompt_that_does_not_fit_is_refused_before_the_tower_runs(name):
    ours, _, row = build(name)
    base, inputs, runs = base_of(ours), prompt(row), []
    place = tuple((inputs["input_ids"] == row.token).nonzero()[0])
    inputs["input_ids"][place] = 7
    encode = base._encode
    base._encode = lambda *args: runs.append(1) or encode(*args)
    try:
        with pytest.raises(ValueError, match="features and .* tokens do not match"):
            ours(**inputs)
    finally:
        del base._encode
    assert bool(runs) == bool({row.family, name} & COUNTED_BY_THE_ENCODER)


@every_row()
@torch.no_grad()
def test_a_batch_is_its_rows_alone(name):
    ours, _, row = build(name)
    whole = output_of(name).logits
    for place, own in enumerate(rows_of(row)):
        ids = batch([write(row, own, [row.tokens[index] for index in own], place)])
        alone = ours(**ids, **row.along(ids["input_ids"]), **row.inputs([own])).logits[0]
        assert close(whole[place, -len(alone) :], alone)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@every_row()
@torch.no_grad()
def test_short_prompts_equal_full_ones(name, positions):
    ours, _, row = build(name)
    if positions == "contiguous" and not row.mrope:
        return
    with settings_of(ours, mrope_positions=positions):
        inputs = prompt(row)
        output = output_of(name) if positions == "original" else ours(**inputs)
        kept = output.keep_mask & inputs["attention_mask"].bool()
        rows = [ids[keep].tolist() for ids, keep in zip(inputs["input_ids"], kept)]
        short = batch(rows)
        arguments = {**short, **row.along(short["input_ids"]), **row.inputs(rows_of(row))}
        for ids, logits, full, keep in zip(rows, ours(**arguments).logits, output.logits, kept):
            assert torch.equal(logits[-len(ids) :], full[keep])
        lengths = [inputs["input_ids"].shape[1], short["input_ids"].shape[1]]
        answers = [ours.generate(**each, max_new_tokens=NEW_TOKENS, do_sample=False) for each in (inputs, arguments)]
        assert torch.equal(*(answer[:, length:] for answer, length in zip(answers, lengths)))


@every_row()
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


@pytest.mark.parametrize("gives_all", [True, False])
@every_row()
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


@every_row()
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


@every_family
@torch.no_grad()
def test_saved_models_load_through_auto_classes(name, saved):
    ours, _, row = build(name)
    folder = saved(name, is_ours=True)
    assert check_repo(str(folder))[1] == []
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is type(ours.config) and config.prunesid_config.budget == row.budget
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert type(loaded) is type(ours)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if row.prepare is not None:
        row.prepare(loaded)
    expected = ours.state_dict()
    assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in loaded.state_dict().items())
    # Some parts are loaded in float32.
    assert close(loaded.eval()(**prompt(row)).logits, output_of(name).logits, 1e-5)
    assert type(base_of(AutoModel.from_pretrained(folder, dtype=torch.float64))) is type(base_of(ours))


@every_family
def test_weights_are_saved_as_those_of_the_stock_class_which_loads_them(name, saved):
    ours, reference, row = build(name)
    folder = saved(name, is_ours=True)
    assert (folder / "model.safetensors").read_bytes() == (saved(name) / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(ours).__name__]
    if row.checks_loading:
        options = {"config": copy.deepcopy(reference.config), "dtype": torch.float64, "output_loading_info": True}
        _, info = type(reference).from_pretrained(folder, **options)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@every_row()
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


@every_row()
@torch.no_grad()
def test_the_loss_is_that_of_the_stock_class_on_short_prompts(name):
    ours, reference, row = build(name)
    inputs = prompt(row)
    total = counted = 0
    for arguments, _ in shortened_of(name):
        labels = arguments["input_ids"].masked_fill(arguments["input_ids"] == row.token, -100)
        count = int((labels[:, 1:] != -100).sum())
        total += count * reference(**fresh(arguments), labels=labels).loss
        counted += count
    is_word = ~torch.isin(inputs["input_ids"], torch.tensor([PAD, BOS, row.token]))  # nothing real predicts BOS
    loss = ours(**inputs, labels=inputs["input_ids"].masked_fill(~is_word, -100)).loss
    assert close(loss, total / counted, 1e-5)  # upstream takes losses in float32


@every_row()
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


@every_row()
@torch.no_grad()
def test_a_forgotten_input_is_an_error(name):
    ours, _, row = build(name)
    inputs = prompt(row)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask", *row.along(inputs["input_ids"]))}
    with pytest.raises(ValueError, match=f"no {row.modality}|no image"):
        ours.generate(**text, max_new_tokens=1)


@every_family
def test_no_name_of_ours_hides_a_part_of_the_stock_model(name):
    for model in (build(name)[0], base_of(build(name)[0])):
        stock = stock_class(type(model))
        parts = {part for part, _ in model.named_children()}
        assert not {part for part in parts if hasattr(type(model), part) and not hasattr(stock, part)}


def test_rows_name_what_they_give():
    """Every input of a row's batches has a T and an N, and a row of the batch has several."""
    for row in ROWS.values():
        assert max(row.rows) > 1 and len(row.tokens) == len(row.kept) >= row.num_inputs
        assert sum(row.kept[: row.num_inputs]) < sum(row.tokens[: row.num_inputs])
        assert flat(rows_of(row)) == list(range(row.num_inputs))
