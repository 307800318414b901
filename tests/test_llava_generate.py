"""
`generate` in every mode. The oracle is the stock class, given short prompts and the features of the kept tokens.

What is compared is the new tokens; the caller's own prompt comes before them, whatever its kind.
"""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import (
    BOS,
    BUDGET,
    EOS,
    IMAGE,
    NUM_PATCHES,
    PAD,
    batch,
    build,
    new_tokens,
    oracle_features,
    oracle_features_of_rows,
    oracle_generate,
    pixels,
    prompt,
    stock_twin,
)
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from modeling_prunesid.upstream import CACHE_NAME, cache_of


GREEDY = {"do_sample": False, "max_new_tokens": 8}
TEXTS = [[7, 8, 9], [9, 4], [3, 4, 5, 6], [11], [21, 22, 23, 24, 25, 26]]
IMAGES_OF_ROW = [2, 1, 0, 1, 3]


def rows_with(count_of_image):
    """A mixed batch, with `count_of_image(i)` placeholders of the i-th image."""
    images = itertools.count()
    return [
        prompt([count_of_image(next(images)) for _ in range(num_images)], text)
        for num_images, text in zip(IMAGES_OF_ROW, TEXTS)
    ]


def full_rows():
    return rows_with(lambda image: NUM_PATCHES)


def short_rows():
    return rows_with(lambda image: BUDGET)


def mixed_batch():
    return {**batch(full_rows()), "pixel_values": pixels(sum(IMAGES_OF_ROW))}


def one_row(num_images=1, text=(7, 8, 9)):
    return {**batch([prompt([NUM_PATCHES] * num_images, text)]), "pixel_values": pixels(num_images)}


def test_the_tiny_models_look_at_their_images(ours):
    inputs = {**batch([prompt([NUM_PATCHES], [7, 8, 9])] * 5), "pixel_values": pixels(5)}
    assert len(new_tokens(ours, inputs, **GREEDY).unique(dim=0)) == 5


MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "several sampled sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 7},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated ngrams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[41], [80]]},
    "min p": {"min_p": 0.05, "do_sample": True},
    "long": {"max_new_tokens": 40},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["full", "short"])
def test_every_mode_answers_as_the_stock_model_does_on_the_kept_tokens(ours, stock, mode, kind):
    kwargs = {**GREEDY, **MODES[mode]}
    rows = full_rows() if kind == "full" else short_rows()
    inputs = {**batch(rows), "pixel_values": pixels(sum(IMAGES_OF_ROW))}
    torch.manual_seed(3)
    got = new_tokens(ours, inputs, **kwargs)
    torch.manual_seed(3)
    assert torch.equal(got, oracle_generate(stock, short_rows(), inputs["pixel_values"], **kwargs))


def test_guidance_away_from_a_text(ours, stock):
    """Classifier-free guidance; upstream gives it one row."""
    inputs, kwargs = one_row(), {"guidance_scale": 1.7, "negative_prompt_ids": torch.tensor([[BOS, 3, 4]]), **GREEDY}
    got = new_tokens(ours, inputs, **kwargs)
    assert torch.equal(got, oracle_generate(stock, [prompt([BUDGET], [7, 8, 9])], inputs["pixel_values"], **kwargs))
    assert not torch.equal(got, new_tokens(ours, inputs, **GREEDY))


def test_an_assistant_model_gives_the_greedy_answer(ours):
    inputs = one_row(num_images=2)
    greedy = new_tokens(ours, inputs, **GREEDY)
    assert torch.equal(new_tokens(ours, inputs, assistant_model=copy.deepcopy(ours), **GREEDY), greedy)


def test_prompt_lookup_gives_the_greedy_answer(ours):
    inputs = one_row(num_images=2)
    greedy = new_tokens(ours, inputs, **GREEDY)
    assert torch.equal(new_tokens(ours, inputs, prompt_lookup_num_tokens=3, **GREEDY), greedy)


def test_a_stock_assistant_model_serves_too(ours, stock):
    inputs = one_row()
    assert torch.equal(new_tokens(ours, inputs, assistant_model=stock, **GREEDY), new_tokens(ours, inputs, **GREEDY))


def test_full_and_short_prompts_give_the_same_answer(ours):
    full = mixed_batch()
    short = {**batch(short_rows()), "pixel_values": full["pixel_values"]}
    assert torch.equal(new_tokens(ours, full, **GREEDY), new_tokens(ours, short, **GREEDY))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score": "cls_attention", "center": "features", "quota": "bounded", "keep_cls": True},
        {"dynamic": True, "reference_information": 0.6},
        {"grouping": "kmeans"},
        {"grouping": "random", "seed": 5},
        {"nms_lambda": "auto"},
        {"budget": 0.5},
    ],
    ids=["paper", "release", "dynamic", "kmeans", "random", "auto", "share"],
)
def test_each_row_of_a_mixed_batch_gets_what_it_gets_alone(settings):
    model = build(**settings)
    inputs = mixed_batch()
    together = new_tokens(model, inputs, **GREEDY)
    kept_together = model.get_image_features(pixel_values=inputs["pixel_values"]).keep_indices
    images, first = inputs["pixel_values"], 0
    for row, ids in enumerate(full_rows()):
        own = images[first : first + IMAGES_OF_ROW[row]]
        alone = {**batch([ids]), **({"pixel_values": own} if len(own) else {})}
        assert torch.equal(new_tokens(model, alone, **GREEDY)[0], together[row])
        for offset in range(len(own)):
            kept_alone = model.get_image_features(pixel_values=own[offset : offset + 1]).keep_indices[0]
            assert torch.equal(kept_alone, kept_together[first + offset])
        first += IMAGES_OF_ROW[row]


def test_text_alone_is_the_stock_answer(ours, stock):
    inputs = batch([prompt([], text) for text in TEXTS])
    assert torch.equal(ours.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))


def test_right_padding_warns_and_answers_as_upstream(ours, stock, caplog):
    images = pixels(sum(IMAGES_OF_ROW))
    got = new_tokens(ours, {**batch(full_rows(), "right"), "pixel_values": images}, **GREEDY)
    assert "right-padding was detected" in caplog.text
    assert torch.equal(got, oracle_generate(stock, short_rows(), images, side="right", **GREEDY))


def test_padding_without_a_mask_is_found_by_the_padding_id(ours):
    inputs = mixed_batch()
    masked = new_tokens(ours, inputs, **GREEDY)
    del inputs["attention_mask"]
    assert torch.equal(new_tokens(ours, inputs, **GREEDY), masked)


def test_the_prompt_may_be_given_as_inputs(ours):
    inputs = mixed_batch()
    named = ours.generate(**inputs, **GREEDY)
    ids = inputs.pop("input_ids")
    assert torch.equal(ours.generate(inputs=ids, **inputs, **GREEDY), named)
    assert torch.equal(ours.generate(ids, **inputs, **GREEDY), named)


def test_padding_before_a_shortened_prompt_changes_nothing(ours):
    row = full_rows()[0]
    images = pixels(2)
    alone = new_tokens(ours, {**batch([row]), "pixel_values": images}, **GREEDY)
    longer = batch([row, [3] * (len(row) + 30)])
    padded = {name: value[:1] for name, value in longer.items()}
    assert torch.equal(new_tokens(ours, {**padded, "pixel_values": images}, **GREEDY), alone)


def test_dynamic_budgets_differ_by_image_and_are_obeyed():
    model = build(dynamic=True, reference_information=0.6)
    stock = stock_twin(model)
    images = pixels(sum(IMAGES_OF_ROW)) * torch.linspace(0.05, 3, sum(IMAGES_OF_ROW)).view(-1, 1, 1, 1)
    counts = [len(kept) for kept in model.get_image_features(pixel_values=images).keep_indices]
    assert len(set(counts)) > 1
    got = new_tokens(model, {**batch(full_rows()), "pixel_values": images}, **GREEDY)
    assert torch.equal(got, oracle_generate(stock, rows_with(lambda i: counts[i]), images, counts, **GREEDY))
    short = {**batch(rows_with(lambda i: counts[i])), "pixel_values": images}
    assert torch.equal(new_tokens(model, short, **GREEDY), got)


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_one_budget_for_each_image(ours, stock, kind):
    counts = [3, 49, 8, 17, 1, 30, 48]
    inputs = mixed_batch()
    got = new_tokens(ours, inputs, num_visual_tokens=kind(counts), **GREEDY)
    expected = oracle_generate(stock, rows_with(lambda i: counts[i]), inputs["pixel_values"], counts, **GREEDY)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("budget, count", [(5, 5), (0.5, 25), (0.001, 1), (48, 48)])
def test_one_budget_for_this_call(ours, stock, budget, count):
    inputs = mixed_batch()
    got = new_tokens(ours, inputs, num_visual_tokens=budget, **GREEDY)
    expected = oracle_generate(stock, rows_with(lambda i: count), inputs["pixel_values"], count, **GREEDY)
    assert torch.equal(got, expected)
    assert ours.config.prunesid_config.budget == BUDGET


OFF = [None, 1.0, 49, 1000]


@pytest.mark.parametrize(
    "mode, budget",
    [
        *(("greedy", budget) for budget in OFF),
        *zip(("several sampled sequences", "several beams", "static cache"), OFF),
    ],
)
def test_off_is_the_stock_model(ours, stock, budget, mode):
    inputs, kwargs = mixed_batch(), {**GREEDY, **MODES[mode]}
    torch.manual_seed(3)
    expected = stock.generate(**inputs, **kwargs)
    ours.config.prunesid_config.budget = budget
    torch.manual_seed(3)
    assert torch.equal(ours.generate(**inputs, **kwargs), expected)


@pytest.mark.parametrize("budget", [1.0, 49, 1000])
def test_off_for_one_call(ours, stock, budget):
    inputs = mixed_batch()
    assert torch.equal(ours.generate(**inputs, num_visual_tokens=budget, **GREEDY), stock.generate(**inputs, **GREEDY))


def test_one_model_switches_back_and_forth(ours):
    inputs = mixed_batch()
    on = new_tokens(ours, inputs, **GREEDY)
    ours.config.prunesid_config.budget = None
    off = new_tokens(ours, inputs, **GREEDY)
    ours.config.prunesid_config.budget = BUDGET
    assert torch.equal(new_tokens(ours, inputs, **GREEDY), on)
    assert not torch.equal(on, off)


class TestOutputs:
    def test_return_dict(self, ours, stock):
        inputs = mixed_batch()
        wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **GREEDY}
        got = ours.generate(**inputs, **wanted)
        features, _ = oracle_features(stock, inputs["pixel_values"])
        short = batch(short_rows())
        expected = stock.generate(**short, mm_encoder_outputs={"image": features}, **wanted)
        assert type(got) is type(expected)
        assert torch.equal(got.sequences, new_sequences(inputs["input_ids"], expected.sequences, short))
        torch.testing.assert_close(got.logits, expected.logits)
        torch.testing.assert_close(got.scores, expected.scores)

    def test_return_dict_of_beams(self, ours, stock):
        inputs = mixed_batch()
        wanted = {"return_dict_in_generate": True, "output_scores": True, **MODES["several beams"], **GREEDY}
        got = ours.generate(**inputs, **wanted)
        features = oracle_features_of_rows(stock, short_rows(), inputs["pixel_values"])
        short = batch(short_rows())
        expected = stock.generate(**short, mm_encoder_outputs={"image": features}, **wanted)
        assert torch.equal(got.sequences, new_sequences(inputs["input_ids"], expected.sequences, short))
        torch.testing.assert_close(got.sequences_scores, expected.sequences_scores)
        assert torch.equal(got.beam_indices, expected.beam_indices)

    def test_attentions_and_hidden_states(self, ours):
        ours.set_attn_implementation("eager")
        inputs = mixed_batch()
        output = ours.generate(
            **inputs, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True, **GREEDY
        )
        short_length = batch(short_rows())["input_ids"].shape[1]
        assert output.attentions[0][0].shape[-2:] == (short_length, short_length)
        assert output.hidden_states[0][0].shape[1] == short_length


def new_sequences(callers_ids, sequences, short):
    times = len(sequences) // len(callers_ids)
    added = sequences[:, short["input_ids"].shape[1] :]
    return torch.cat([callers_ids.repeat_interleave(times, 0), added], dim=1)


class TestLengths:
    def test_max_length_counts_the_callers_prompt(self, ours):
        inputs = mixed_batch()
        length = inputs["input_ids"].shape[1]
        output = ours.generate(**inputs, max_length=length + 3, do_sample=False)
        assert output.shape[1] == length + 3
        assert torch.equal(output, ours.generate(**inputs, max_new_tokens=3, do_sample=False))

    def test_lengths_of_embedded_prompts(self, ours, stock):
        """Of these upstream returns the new tokens alone, and lets `max_length` count the prompt."""
        inputs = one_row()
        embeds = ours.get_input_embeddings()(inputs.pop("input_ids"))
        length = embeds.shape[1]
        for settings in ({"max_length": length + 5}, {"max_length": length + 5, "min_length": length + 4}):
            for model in (ours, stock):
                output = model.generate(
                    inputs_embeds=embeds, pixel_values=inputs["pixel_values"], do_sample=False, **settings
                )
                assert output.shape == (1, 5)

    def test_max_length_of_a_generation_config(self, ours):
        inputs = one_row()
        length = inputs["input_ids"].shape[1]
        for settings in (GenerationConfig(max_length=length + 3, do_sample=False), None):
            if settings is None:
                ours.generation_config.max_length = length + 3
            assert ours.generate(**inputs, generation_config=settings).shape[1] == length + 3

    def test_max_length_within_the_prompt_is_upstreams_error(self, ours, stock):
        inputs = one_row()
        for model in (ours, stock):
            with pytest.raises(ValueError, match="max_length` is set to 20"):
                model.generate(**inputs, max_length=20)

    def test_the_callers_generation_config_is_left_alone(self, ours):
        inputs = one_row()
        settings = GenerationConfig(max_length=100, min_length=60, do_sample=False, pad_token_id=PAD)
        before = settings.to_dict()
        ours.generate(**inputs, generation_config=settings)
        assert settings.to_dict() == before

    def test_a_default_of_twenty_new_tokens_as_upstream(self, ours, stock):
        inputs = one_row()
        assert ours.generate(**inputs).shape == stock.generate(**inputs).shape

    def test_min_length_counts_the_callers_prompt(self, ours):
        inputs = one_row()
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            ours.lm_head.weight[:] = 0  # the end is always among the best
        kwargs = {"do_sample": True, "max_new_tokens": 10, "logits_processor": prefer(EOS)}
        assert new_tokens(ours, inputs, **kwargs).shape[1] == 1
        assert new_tokens(ours, inputs, min_length=length + 4, **kwargs).shape[1] == 5
        assert new_tokens(ours, inputs, min_new_tokens=3, **kwargs).shape[1] == 4

    def test_rows_that_end_early_are_padded(self, ours):
        inputs = mixed_batch()
        free = new_tokens(ours, inputs, **GREEDY)
        end = int(free[0, 2])
        stopped = new_tokens(ours, inputs, eos_token_id=end, **GREEDY)
        assert (stopped[0, 3:] == PAD).all()
        for got, expected in zip(stopped, free):
            ended = (expected == end).nonzero()
            length = int(ended[0]) + 1 if len(ended) else len(expected)
            assert torch.equal(got[:length], expected[:length])


def prefer(token):
    class Prefer(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            return scores.index_fill(1, torch.tensor([token]), scores.max() + 100)

    # A processor of the caller's runs after upstream's: what upstream forbade stays forbidden.
    class KeepForbidden(Prefer):
        def __call__(self, input_ids, scores):
            return super().__call__(input_ids, scores).masked_fill(scores == -float("inf"), -float("inf"))

    return LogitsProcessorList([KeepForbidden()])


class Recorder(StoppingCriteria, LogitsProcessor):
    """A criterion and a processor that remember what they are shown."""

    def __init__(self, stop_after=None):
        self.seen, self.stop_after = [], stop_after

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        if self.stop_after is None:
            return scores
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.stop_after)


class TestCallbacksSeeTheCallersPrompt:
    @pytest.mark.parametrize("rows", [full_rows, short_rows])
    def test_the_callers_own_take_the_place_of_upstreams(self, ours, rows):
        inputs = {**mixed_batch(), **batch(rows())}
        processor = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.0001)])
        got = new_tokens(ours, inputs, repetition_penalty=9.0, logits_processor=processor, **GREEDY)
        assert torch.equal(got, new_tokens(ours, inputs, repetition_penalty=1.0001, **GREEDY))

        longest = StoppingCriteriaList([MaxLengthCriteria(inputs["input_ids"].shape[1] + 7)])
        got = new_tokens(ours, inputs, max_new_tokens=3, do_sample=False, stopping_criteria=longest)
        assert got.shape[1] == 7

        end = int(new_tokens(ours, inputs, **GREEDY)[0, 2])
        got = new_tokens(ours, inputs, stopping_criteria=StoppingCriteriaList([EosTokenCriteria(end)]), **GREEDY)
        assert torch.equal(got, new_tokens(ours, inputs, eos_token_id=end, **GREEDY))
        assert (got[0, 3:] == PAD).all()

    @pytest.mark.parametrize("beams", [1, 3])
    def test_stopping_criteria(self, ours, beams):
        inputs = mixed_batch()
        length = inputs["input_ids"].shape[1]
        recorder = Recorder(stop_after=length + 4)
        output = new_tokens(
            ours, inputs, stopping_criteria=StoppingCriteriaList([recorder]), num_beams=beams, **GREEDY
        )
        assert output.shape[1] == 4
        for step, seen in enumerate(recorder.seen):
            assert seen.shape[1] == length + step + 1
            callers = inputs["input_ids"].repeat_interleave(len(seen) // 5, 0)
            assert torch.equal(seen[:, :length], callers)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_logits_processors(self, ours, beams):
        inputs, recorder = mixed_batch(), Recorder()
        plain = new_tokens(ours, inputs, num_beams=beams, **GREEDY)
        watched = new_tokens(ours, inputs, logits_processor=LogitsProcessorList([recorder]), num_beams=beams, **GREEDY)
        assert torch.equal(plain, watched)
        length = inputs["input_ids"].shape[1]
        for step, seen in enumerate(recorder.seen):
            assert torch.equal(seen[:, :length], inputs["input_ids"].repeat_interleave(beams, 0))
            assert seen.shape[1] == length + step

    @pytest.mark.parametrize("beams", [1, 3])
    def test_prefix_allowed_tokens_fn(self, ours, beams):
        inputs = mixed_batch()
        length, seen = inputs["input_ids"].shape[1], []

        def allowed(batch_id, sequence):
            seen.append((batch_id, sequence.clone()))
            return [30 + (len(sequence) - length)]

        output = new_tokens(ours, inputs, prefix_allowed_tokens_fn=allowed, num_beams=beams, **GREEDY)
        assert (output == torch.arange(30, 38)).all()
        for batch_id, sequence in seen:
            assert torch.equal(sequence[:length], inputs["input_ids"][batch_id])

    def test_lists_need_not_be_upstreams_classes(self, ours):
        recorder = Recorder(stop_after=0)
        inputs = one_row()
        output = new_tokens(ours, inputs, stopping_criteria=[recorder], logits_processor=[Recorder()], **GREEDY)
        assert output.shape[1] == 1


class Collector(BaseStreamer):
    def __init__(self):
        self.received, self.ended = [], False

    def put(self, value):
        self.received.append(value.clone())

    def end(self):
        self.ended = True


class TestStreamers:
    @pytest.mark.parametrize("mode", [{}, {"prompt_lookup_num_tokens": 2}], ids=["greedy", "lookup"])
    def test_the_callers_prompt_first_then_the_answer(self, ours, mode):
        inputs, streamer = one_row(), Collector()
        answer = new_tokens(ours, inputs, streamer=streamer, **GREEDY, **mode)
        assert torch.equal(streamer.received[0], inputs["input_ids"])
        assert torch.equal(torch.cat([part.flatten() for part in streamer.received[1:]]), answer[0])
        assert streamer.ended

    def test_a_text_streamer_that_skips_the_prompt(self, ours, capsys):
        class Words:
            def decode(self, ids, **kwargs):
                return " ".join(f"w{int(token)}" for token in ids)

        inputs = one_row()
        answer = new_tokens(ours, inputs, streamer=TextStreamer(Words(), skip_prompt=True), **GREEDY)
        assert capsys.readouterr().out.split() == [f"w{token}" for token in answer[0].tolist()]


class TestChat:
    """Follow-up turns: the whole chat in `input_ids`, and what was computed for its beginning in the cache."""

    def first_turn(self, model, num_images=2, **kwargs):
        inputs = one_row(num_images)
        return inputs, model.generate(
            **inputs, return_dict_in_generate=True, do_sample=False, max_new_tokens=4, **kwargs
        )

    @pytest.mark.parametrize("images_again", [True, False])
    def test_a_question_about_the_same_images(self, ours, images_again):
        inputs, first = self.first_turn(ours)
        ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], dim=1)
        expected = new_tokens(ours, {"input_ids": ids, "pixel_values": inputs["pixel_values"]}, **GREEDY)
        second = {"input_ids": ids, **({"pixel_values": inputs["pixel_values"]} if images_again else {})}
        assert torch.equal(new_tokens(ours, second, **{CACHE_NAME: cache_of(first)}, **GREEDY), expected)

    @pytest.mark.parametrize("images", ["all", "new"])
    def test_a_question_about_another_image(self, ours, images):
        inputs, first = self.first_turn(ours)
        ids = torch.cat([first.sequences, torch.tensor([prompt([NUM_PATCHES], [11, 12])])], dim=1)
        new = pixels(1, seed=9)
        every = torch.cat([inputs["pixel_values"], new])
        expected = new_tokens(ours, {"input_ids": ids, "pixel_values": every}, **GREEDY)
        second = {"input_ids": ids, "pixel_values": every if images == "all" else new}
        assert torch.equal(new_tokens(ours, second, **{CACHE_NAME: cache_of(first)}, **GREEDY), expected)

    @pytest.mark.parametrize("images", ["all", "new"])
    def test_short_prompts(self, ours, images):
        both = pixels(2)
        ids = torch.tensor([prompt([BUDGET], [7, 8, 9])])
        first = ours.generate(
            input_ids=ids, pixel_values=both[:1], return_dict_in_generate=True, do_sample=False, max_new_tokens=4
        )
        ids = torch.cat([first.sequences, torch.tensor([prompt([BUDGET], [11, 12])])], dim=1)
        expected = new_tokens(ours, {"input_ids": ids, "pixel_values": both}, **GREEDY)
        second = {"input_ids": ids, "pixel_values": both if images == "all" else both[1:]}
        assert torch.equal(new_tokens(ours, second, **{CACHE_NAME: cache_of(first)}, **GREEDY), expected)

    def test_an_answer_may_contain_the_id_of_a_placeholder(self, ours, stock):
        def say_image(ids, scores):
            return scores.index_fill(1, torch.tensor([IMAGE]), 1e9)

        inputs, first = self.first_turn(ours, num_images=1, logits_processor=[say_image])
        assert (first.sequences[0, -4:] == IMAGE).all()
        ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], dim=1)
        short = torch.cat([torch.tensor([prompt([BUDGET], [])]), ids[:, NUM_PATCHES + 2 :]], dim=1)
        cache = copy.deepcopy(cache_of(first))
        expected = stock.generate(input_ids=short, **{CACHE_NAME: cache}, **GREEDY)[:, short.shape[1] :]
        got = new_tokens(ours, {"input_ids": ids}, **{CACHE_NAME: cache_of(first)}, **GREEDY)
        assert torch.equal(got, expected)

    def test_images_after_a_beginning_of_text(self, ours):
        first = ours.generate(input_ids=torch.tensor([prompt([], [7, 8, 9])]), return_dict_in_generate=True, **GREEDY)
        ids = torch.cat([first.sequences, torch.tensor([prompt([NUM_PATCHES], [11, 12])])], dim=1)
        second = {"input_ids": ids, "pixel_values": pixels(1)}
        expected = new_tokens(ours, second, **GREEDY)
        assert torch.equal(new_tokens(ours, second, **{CACHE_NAME: cache_of(first)}, **GREEDY), expected)

    def test_three_turns(self, ours):
        inputs, output = self.first_turn(ours, num_images=1)
        images, cache, ids = inputs["pixel_values"], cache_of(output), output.sequences
        for turn, num_new in enumerate((1, 0, 2)):
            ids = torch.cat([ids, torch.tensor([prompt([NUM_PATCHES] * num_new, [11 + turn])])], dim=1)
            images = torch.cat([images, pixels(num_new, seed=turn + 1)])
            chat = {"input_ids": ids, "pixel_values": images}
            expected = new_tokens(ours, chat, **GREEDY)
            output = ours.generate(**chat, **{CACHE_NAME: cache}, return_dict_in_generate=True, **GREEDY)
            assert torch.equal(output.sequences[:, ids.shape[1] :], expected)
            ids, cache = output.sequences, cache_of(output)

    def test_a_batch_of_chats(self, ours):
        rows, images = full_rows(), pixels(sum(IMAGES_OF_ROW))
        inputs = batch(rows)
        first = ours.generate(**inputs, pixel_values=images, return_dict_in_generate=True, **GREEDY)
        added = torch.tensor([[11, 12, 13]] * 5)
        ids = torch.cat([first.sequences, added], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(5, 11, dtype=torch.long)], dim=1)
        chat = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}
        expected = new_tokens(ours, chat, **GREEDY)
        assert torch.equal(new_tokens(ours, chat, **{CACHE_NAME: cache_of(first)}, **GREEDY), expected)

    def test_a_copied_cache_serves_several_branches(self, ours):
        inputs, first = self.first_turn(ours)
        for text in ([11, 12], [13], [14, 15, 16]):
            ids = torch.cat([first.sequences, torch.tensor([text])], dim=1)
            chat = {"input_ids": ids, "pixel_values": inputs["pixel_values"]}
            expected = new_tokens(ours, chat, **GREEDY)
            cache = copy.deepcopy(cache_of(first))
            assert torch.equal(new_tokens(ours, chat, **{CACHE_NAME: cache}, **GREEDY), expected)

    def test_a_cache_filled_by_forward(self, ours):
        """The recipe of Transformers' documentation: prefill a shared beginning once, then answer many questions."""
        beginning = one_row()
        with torch.no_grad():
            cache = cache_of(ours(**beginning, use_cache=True))
        for text in ([11, 12], [13]):
            ids = torch.cat([beginning["input_ids"], torch.tensor([text])], dim=1)
            chat = {"input_ids": ids, "pixel_values": beginning["pixel_values"]}
            expected = new_tokens(ours, chat, **GREEDY)
            got = new_tokens(ours, chat, **{CACHE_NAME: copy.deepcopy(cache)}, **GREEDY)
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("length", [4, 11, 15])
    def test_a_cropped_cache(self, ours, length):
        """Cut within the image, behind it, and within the answer."""
        inputs, first = self.first_turn(ours, num_images=1)
        ids = torch.cat([inputs["input_ids"], torch.tensor([[11, 12]])], dim=1)
        if length == 15:
            ids = torch.cat([first.sequences, torch.tensor([[11, 12]])], dim=1)
        chat = {"input_ids": ids, "pixel_values": inputs["pixel_values"]}
        expected = new_tokens(ours, chat, **GREEDY)
        cache = cache_of(first)
        cache.crop(length - cache.get_seq_length())
        assert torch.equal(new_tokens(ours, chat, **{CACHE_NAME: cache}, **GREEDY), expected)

    def test_a_static_cache_that_is_emptied_and_used_again(self, ours):
        cache = StaticCache(config=ours.config.get_text_config(), max_cache_len=64)
        for num_images in (2, 1):
            inputs = one_row(num_images)
            expected = new_tokens(ours, inputs, **GREEDY)
            got = new_tokens(ours, inputs, **{CACHE_NAME: cache}, disable_compile=True, **GREEDY)
            assert torch.equal(got, expected)
            cache.reset()

    def test_dynamic_budgets(self):
        model = build(dynamic=True, reference_information=0.6)
        inputs, first = self.first_turn(model)
        ids = torch.cat([first.sequences, torch.tensor([prompt([NUM_PATCHES], [11, 12])])], dim=1)
        chat = {"input_ids": ids, "pixel_values": torch.cat([inputs["pixel_values"], pixels(1, seed=9) * 3])}
        expected = new_tokens(model, chat, **GREEDY)
        assert torch.equal(new_tokens(model, chat, **{CACHE_NAME: cache_of(first)}, **GREEDY), expected)


class TestEmbeddings:
    def test_text_embeddings_pass_through(self, ours, stock):
        ids = torch.tensor([prompt([], [7, 8, 9])])
        embeds = ours.get_input_embeddings()(ids).detach()
        assert torch.equal(
            ours.generate(inputs_embeds=embeds, **GREEDY), stock.generate(inputs_embeds=embeds, **GREEDY)
        )

    def test_embeddings_with_images(self, ours):
        inputs = one_row()
        expected = new_tokens(ours, inputs, **GREEDY)
        embeds = ours.get_input_embeddings()(inputs["input_ids"]).detach()
        got = ours.generate(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], **GREEDY)
        assert torch.equal(got, expected)

    def test_ids_and_embeddings_together_return_the_ids_first(self, ours):
        inputs = one_row()
        embeds = ours.get_input_embeddings()(inputs["input_ids"]).detach()
        assert torch.equal(ours.generate(**inputs, inputs_embeds=embeds, **GREEDY), ours.generate(**inputs, **GREEDY))


class TestEncodedBefore:
    def test_our_features_with_a_full_or_short_prompt(self, ours):
        images = pixels(sum(IMAGES_OF_ROW))
        features = ours.get_image_features(pixel_values=images)
        expected = new_tokens(ours, {**batch(full_rows()), "pixel_values": images}, **GREEDY)
        for rows in (full_rows(), short_rows()):
            got = new_tokens(ours, {**batch(rows), "mm_encoder_outputs": {"image": features}}, **GREEDY)
            assert torch.equal(got, expected)

    def test_features_of_ones_own_with_a_short_prompt(self, ours, stock):
        """Without `keep_indices` they are taken as they are, as upstream does."""
        images = pixels(sum(IMAGES_OF_ROW))
        features, _ = oracle_features(stock, images)
        got = new_tokens(ours, {**batch(short_rows()), "mm_encoder_outputs": {"image": features}}, **GREEDY)
        assert torch.equal(got, oracle_generate(stock, short_rows(), images, **GREEDY))

    def test_pixels_and_features_together_are_refused(self, ours):
        inputs = one_row()
        features = ours.get_image_features(pixel_values=inputs["pixel_values"])
        with pytest.raises(ValueError, match="pixel_values and mm_encoder_outputs"):
            ours.generate(**inputs, mm_encoder_outputs={"image": features}, **GREEDY)


class TestErrors:
    @pytest.mark.parametrize("count", [1, BUDGET - 1, BUDGET + 1, NUM_PATCHES - 1, NUM_PATCHES + 1, 2 * NUM_PATCHES])
    def test_a_wrong_number_of_placeholders(self, ours, count):
        inputs = {**batch([prompt([count], [7, 8])]), "pixel_values": pixels(1)}
        message = rf"^Image features and image tokens do not match, tokens: {count}, features: {BUDGET}\."
        with pytest.raises(ValueError, match=message):
            ours.generate(**inputs, **GREEDY)

    def test_images_without_placeholders(self, ours):
        inputs = {**batch([prompt([], [7, 8])]), "pixel_values": pixels(1)}
        with pytest.raises(ValueError, match=r"^Image features and image tokens do not match, tokens: 0"):
            ours.generate(**inputs, **GREEDY)

    def test_placeholders_without_images(self, ours):
        with pytest.raises(ValueError, match=r"^Image features and image tokens do not match.*pass pixel_values"):
            ours.generate(**batch([prompt([NUM_PATCHES], [7, 8])]), **GREEDY)

    def test_placeholders_of_one_row_given_to_another(self, ours):
        rows = [prompt([NUM_PATCHES + 1], [7]), prompt([NUM_PATCHES - 1], [7])]
        with pytest.raises(ValueError, match=r"tokens: 50 in row 0"):
            ours.generate(**batch(rows), pixel_values=pixels(2), **GREEDY)

    @pytest.mark.parametrize("value", ["64", 0, -1, 1.5, float("nan"), True, [8, "8"], [8, 0]])
    def test_an_invalid_budget(self, ours, value):
        inputs = one_row(num_images=2)
        with pytest.raises(ValueError, match="num_visual_tokens") as error:
            ours.generate(**inputs, num_visual_tokens=value, **GREEDY)
        assert repr(value[1] if isinstance(value, list) else value) in str(error.value)

    @pytest.mark.parametrize("counts", [[], [8], [8, 8, 8], torch.tensor([8])])
    def test_another_number_of_budgets_than_of_images(self, ours, counts):
        with pytest.raises(ValueError, match="num_visual_tokens must have one count for each of the 2 encoded"):
            ours.generate(**one_row(num_images=2), num_visual_tokens=counts, **GREEDY)

    @pytest.mark.parametrize("layer", [5, -6, 100])
    def test_a_layer_that_the_tower_lacks(self, ours, layer):
        ours.config.prunesid_config.layer = layer
        with pytest.raises(ValueError, match=rf"prunesid_config.layer must lie in \[-5, 4\].*got {layer}"):
            ours.generate(**one_row(), **GREEDY)

    def test_a_budget_that_cls_alone_fills(self):
        model = build(budget=1, keep_cls=True)
        with pytest.raises(ValueError, match=r"num_visual_tokens=1 gives 1 tokens.*keep at least 2"):
            model.generate(**one_row(), **GREEDY)

    def test_fields_that_contradict_each_other_only_together(self, ours):
        ours.config.prunesid_config.dynamic = True
        with pytest.raises(ValueError, match=r"dynamic.*reference_information"):
            ours.generate(**one_row(), **GREEDY)

    def test_an_argument_nobody_knows_is_upstreams_error(self, ours):
        with pytest.raises(ValueError, match="num_visual_token"):
            ours.generate(**one_row(), num_visual_token=3, **GREEDY)

    @pytest.mark.parametrize("name", ["pixel_values_images", "pixel_values_videos", "pixel_value"])
    def test_pixels_by_a_name_of_another_family(self, ours, name):
        inputs = one_row()
        inputs[name] = inputs.pop("pixel_values")
        for call in (ours.generate, ours, ours.model):
            with pytest.raises(ValueError, match=r"^Image features and image tokens do not match.*pass pixel_values"):
                call(**inputs)

    def test_a_model_answers_after_an_error_as_before_it(self, ours):
        inputs = mixed_batch()
        before = new_tokens(ours, inputs, **GREEDY)
        wrong = {**inputs, "pixel_values": inputs["pixel_values"][:-1]}
        with pytest.raises(ValueError):
            ours.generate(**wrong, **GREEDY)
        assert torch.equal(new_tokens(ours, inputs, **GREEDY), before)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())


def test_threads_ask_one_model_for_different_budgets(ours):
    inputs, budgets = mixed_batch(), [3, 20, 8, 49]
    expected = [new_tokens(ours, inputs, num_visual_tokens=budget, **GREEDY) for budget in budgets]
    with ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda budget: new_tokens(ours, inputs, num_visual_tokens=budget, **GREEDY), budgets * 3)
        assert all(torch.equal(tokens, expected[index % 4]) for index, tokens in enumerate(got))


def test_a_placeholder_among_the_new_tokens_is_a_word_like_others(ours):
    with torch.no_grad():
        ours.lm_head.weight[:] = 0
    always = new_tokens(ours, one_row(), logits_processor=prefer(IMAGE), **GREEDY)
    assert (always == IMAGE).all()


def test_generation_leaves_no_trace_on_the_model(ours):
    names, hooks = set(vars(ours.model.vision_tower)), [len(m._forward_hooks) for m in ours.modules()]
    ours.generate(**mixed_batch(), **GREEDY)
    assert set(vars(ours.model.vision_tower)) == names
    assert [len(m._forward_hooks) for m in ours.modules()] == hooks
