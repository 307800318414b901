"""The model behind the page, with a tiny checkpoint: what it says is what the model does, and visitors do not mix."""

import re
import threading
from xml.etree import ElementTree

import pytest
import torch
from tiny import NUM_PATCHES
from tiny_checkpoint import picture, save_checkpoint
from transformers import AutoProcessor

from modeling_prunesid import PruneSIDForImageTextToText
from modeling_prunesid.methods import METHODS
from prunesid_cli import app_model, baselines
from prunesid_cli.app_model import AppModel, Choice, cache_bytes
from prunesid_cli.app_picture import COLOURS, describe, draw, draw_pair, draw_small, draw_whole, explain_numbers
from prunesid_cli.baselines import applied
from prunesid_cli.generate import ask


QUESTION = "what is it?"
MAX_NEW_TOKENS = 6
COMPARED = [name for name in baselines.METHODS if name not in ("full", "downsample-enlarged", "visionzip-dyn")]
COMPARED = [name for name in COMPARED if not name.startswith("prunesid-") or name in ("prunesid-auto", "prunesid-llm")]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Tiny models say nothing that ends."""
    monkeypatch.setattr(app_model, "MAX_NEW_TOKENS", MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("app") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return AppModel(str(folder), [picture()])


@pytest.mark.parametrize("choice", [Choice(None), Choice(8), Choice(8, "spread"), Choice(8, "release")])
def test_an_answer_is_that_of_the_model_and_its_numbers_are_counted(model, folder, choice):
    *parts, last = model.answer(picture(), QUESTION, choice)
    theirs = PruneSIDForImageTextToText.from_pretrained(folder, prunesid_config=model.settings_of(choice)).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.num_visual_tokens = None
    inputs = ask(processor, picture(), QUESTION)
    output = theirs.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    assert last.text == processor.decode(tokens, skip_special_tokens=True).strip()
    assert len(parts) == len(tokens) and all(last.text.startswith(part.text.rstrip("\ufffd")) for part in parts)
    assert last.visual_tokens == (NUM_PATCHES if choice.budget is None else choice.budget)
    config = theirs.config.text_config
    length = inputs["input_ids"].shape[1] - NUM_PATCHES + last.visual_tokens + len(tokens) - 1
    heads = config.num_key_value_heads * config.head_dim
    assert last.cache_bytes == 2 * config.num_hidden_layers * heads * length * torch.finfo(theirs.dtype).bits // 8
    assert last.cache_bytes == cache_bytes(output["cache" if "cache" in output else "past_key_values"])
    assert last.first_token_seconds > 0


def test_settings_are_as_before_after_each_call(model):
    before, own_class = model.model.config.prunesid_config.to_dict(), type(model.model)
    for method in METHODS:
        model.look(picture(), Choice(5, method, True))
        list(model.answer(picture(), QUESTION, Choice(5, method)))
    for method in ("hired", "prumerge+", "tome", "cdpruner", "fastv", "vitcop"):
        model.look(picture(), Choice(12, method), QUESTION)
        with pytest.raises(ValueError, match="keeps as many squares of every picture"):
            model.look(picture(), Choice(12, method, True), QUESTION)
        assert type(model.model) is own_class and set(vars(model.model.model)).isdisjoint({"get_image_features"})
    with pytest.raises(ValueError, match="Nothing is dropped"):
        model.look(picture(), Choice(None))
    assert model.model.config.prunesid_config.to_dict() == before


@pytest.mark.parametrize("method", COMPARED)
def test_a_compared_method_keeps_what_it_keeps_elsewhere(model, method):
    """What is drawn and counted is what `applied` measures."""
    [seen] = model.look(picture(), Choice(12, method), QUESTION)
    *_, last = model.answer(picture(), QUESTION, Choice(12, method))
    assert 0 < len(seen.kept) <= NUM_PATCHES and seen.kept.max() < NUM_PATCHES
    with applied(model.model, method, 12) as run:
        output = model.model.generate(
            **ask(model.processor, picture(), QUESTION), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
    answer = model.processor.decode(output[0], skip_special_tokens=True)
    assert answer.endswith(last.text) and last.visual_tokens == round(run.measured_tokens)
    if baselines.METHODS[method].place == "encoder" and method not in ("visionzip", "prumerge", "prumerge+"):
        assert len(seen.kept) == last.visual_tokens
    assert len(describe(seen)) == NUM_PATCHES and "kept" in draw(picture(), seen)


def test_what_is_left_in_the_last_layer_is_drawn_for_a_method_inside_the_language_model(model):
    """FastV's rule, from the attentions of the stock model's first layer."""
    [seen] = model.look(picture(), Choice(12, "fastv"), QUESTION)
    inputs = ask(model.processor, picture(), QUESTION)
    model.model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), model._settled(Choice(None)):
            attention = model.model(**inputs, output_attentions=True).attentions[0][0].mean(0)[-1]
    finally:
        model.model.set_attn_implementation("sdpa")
    attention = attention[inputs["input_ids"][0] == model.model.config.image_token_id]
    assert seen.kept.tolist() == sorted(attention.topk(len(seen.kept)).indices.tolist())


def test_another_question_is_another_choice_where_the_method_reads_it(model):
    for method, is_read in (("paper", False), ("hired", False), ("cdpruner", True), ("fastv", True)):
        assert Choice(9, method).reads_question == is_read
        before = len(model._seen)
        for question in ("word7 word8", "word9 word10"):
            model.look(picture(5), Choice(9, method), question)
        assert len(model._seen) == before + 1 + is_read


def test_an_answer_that_its_visitor_left_is_stopped(model):
    left = model.answer(picture(), QUESTION, Choice(None))
    next(left)
    stop = model._stop
    *_, last = model.answer(picture(), QUESTION, Choice(8))  # another visitor: does not wait for the first one's end
    assert stop.is_set() and last.visual_tokens == 8
    left.close()
    assert threading.active_count() < 20


def test_an_error_of_the_model_reaches_its_visitor_alone(model, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(model.model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        list(model.answer(picture(), QUESTION, Choice(8)))
    assert list(model.answer(picture(), QUESTION, Choice(8)))[-1].visual_tokens == 8


@pytest.mark.parametrize("method", METHODS)
def test_the_drawing_has_a_sentence_for_every_square_and_is_well_formed(model, method):
    seen = model.look(picture(), Choice(9, method))[0]
    kept = len(seen.kept)
    svg = re.search("<svg.*</svg>", draw(picture(), seen), re.DOTALL)[0]
    cells = [cell for cell in ElementTree.fromstring(svg).iter("rect")]
    assert [cell.find("title").text for cell in cells] == describe(seen)
    assert [int(cell.get("data-i")) for cell in cells if cell.get("class") == "ps-kept"] == seen.kept.tolist()
    assert [": kept" in sentence for sentence in describe(seen)].count(True) == kept
    outlines = re.findall('class="ps-line" d="[^"]+" stroke="(#[0-9A-F]+)"', svg)
    assert outlines and set(outlines) <= set(COLOURS)
    if seen.suppressors is not None:
        linked = {int(cell.get("data-i")): int(cell.get("data-by")) for cell in cells if cell.get("data-by")}
        assert linked == {i: by for i, by in enumerate(seen.suppressors.tolist()) if by >= 0}
    text = explain_numbers(seen)
    assert f"{kept} of {NUM_PATCHES} squares" in text and f"= {seen.rho:.2f}" in text
    assert "<title>" not in draw_small(picture(), seen, "<b>") and "&lt;b&gt;" in draw_small(picture(), seen, "<b>")
    assert "ps-dropped" not in draw_whole(picture(), seen.grid, True)


def test_two_methods_are_compared_square_by_square(model):
    first, second = (model.look(picture(), Choice(9, method))[0] for method in ("paper", "spread"))
    both = len(set(first.kept.tolist()) & set(second.kept.tolist()))
    text = draw_pair(picture(), first, second, ("A", "B"))
    assert f"{both} kept by both" in text and f"{9 - both} only by A" in text and f"{9 - both} only by B" in text
