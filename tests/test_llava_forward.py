"""`forward` and training: shortened ids, mask, positions and labels agree, and gradients flow."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    BOS,
    BUDGET,
    IMAGE,
    NUM_PATCHES,
    batch,
    build,
    image_features_of,
    of_kept,
    oracle_features,
    oracle_generate,
    pixels,
    prompt,
    stock_twin,
)
from transformers import CompileConfig, DynamicCache, StaticCache, Trainer, TrainingArguments

from modeling_prunesid.upstream import CACHE_NAME, cache_of


IGNORED = -100


def rows_with(count):
    return [prompt([count] * 2, [7, 8, 9]), prompt([count], [9, 4]), prompt([], [3, 4, 5, 6])]


def full_batch(side="left"):
    return {**batch(rows_with(NUM_PATCHES), side), "pixel_values": pixels(3)}


def one_row(text=(7, 8, 9)):
    return {"input_ids": torch.tensor([prompt([NUM_PATCHES], text)]), "pixel_values": pixels(1)}


def labels_of(inputs):
    """Every word is a target, and so is every placeholder: a shift of one column would show in the loss."""
    is_target = inputs["attention_mask"].bool() & (inputs["input_ids"] != BOS)
    return inputs["input_ids"].masked_fill(~is_target, IGNORED)


@torch.no_grad()
def stock_logits(stock, ids, images, budget=BUDGET, **kwargs):
    """Logits of one unpadded short prompt."""
    features = {"mm_encoder_outputs": {"image": oracle_features(stock, images, budget)[0]}} if len(images) else {}
    return stock(input_ids=torch.tensor([ids]), **features, **kwargs).logits[0]


def each_row(inputs):
    """Number, ids and images of each row without its padding."""
    first = 0
    for row, count in enumerate((2, 1, 0)):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        yield row, ids, inputs["pixel_values"][first : first + count]
        first += count


class TestLogits:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_each_row_is_the_stock_answer_for_its_kept_tokens(self, ours, stock, side):
        inputs = full_batch(side)
        output = ours(**inputs)
        logits = of_kept(output.logits, output.keep_mask, side)
        short = rows_with(BUDGET)
        for row, _, images in each_row(inputs):
            expected = stock_logits(stock, short[row], images)
            length = len(expected)
            got = logits[row, -length:] if side == "left" else logits[row, :length]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)

    def test_the_base_model_compresses_too(self, ours, stock):
        inputs = one_row()
        output = ours.model(**inputs)
        assert output.last_hidden_state.shape[:2] == inputs["input_ids"].shape
        hidden = of_kept(output.last_hidden_state, output.keep_mask)
        expected = stock_logits(stock, prompt([BUDGET], [7, 8, 9]), inputs["pixel_values"])
        torch.testing.assert_close(ours.lm_head(hidden)[0], expected)

    def test_full_and_short_prompts_give_the_same_logits(self, ours):
        short = {**batch(rows_with(BUDGET)), "pixel_values": pixels(3)}
        full = ours(**full_batch())
        is_token = short["attention_mask"].bool()
        assert torch.equal(full.logits[full.keep_mask], ours(**short).logits[is_token])

    def test_without_a_mask(self, ours):
        inputs = one_row()
        masked = ours(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits
        torch.testing.assert_close(ours(**inputs).logits, masked)

    def test_explicit_positions_are_moved_up(self, ours):
        inputs = one_row()
        positions = torch.arange(inputs["input_ids"].shape[1])[None]
        torch.testing.assert_close(ours(**inputs, position_ids=positions).logits, ours(**inputs).logits)

    def test_sequences_packed_in_one_row(self, ours):
        """Positions that start anew tell them apart, as upstream reads them."""
        rows = [prompt([NUM_PATCHES], [7, 8, 9]), prompt([NUM_PATCHES], [9, 4])]
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        packed = ours(
            input_ids=torch.tensor([rows[0] + rows[1]]),
            pixel_values=pixels(2),
            position_ids=positions,
            use_cache=False,
        )
        alone = [ours(input_ids=torch.tensor([row]), pixel_values=pixels(2)[[i]]).logits for i, row in enumerate(rows)]
        torch.testing.assert_close(packed.logits, torch.cat(alone, dim=1), atol=1e-4, rtol=1e-4)

    def test_logits_to_keep(self, ours):
        inputs = full_batch()
        hidden_states = ours.model(**inputs).last_hidden_state
        for kept in (1, 7, 60, torch.tensor([0, 3]), torch.tensor([-1, 20, 3])):
            wanted = hidden_states[:, -kept:] if isinstance(kept, int) else hidden_states[:, kept]
            torch.testing.assert_close(ours(**inputs, logits_to_keep=kept).logits, ours.lm_head(wanted))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_keep_mask_maps_the_logits_to_the_callers_columns(self, ours, side):
        inputs = full_batch(side)
        output = ours(**inputs)
        assert output.keep_mask.shape == inputs["input_ids"].shape
        kept = ours.get_image_features(pixel_values=inputs["pixel_values"]).keep_indices
        images = iter(kept)
        for row, ids, own in each_row(inputs):
            padding = int((inputs["attention_mask"][row] == 0).sum())
            keep = output.keep_mask[row][inputs["attention_mask"][row].bool()]
            assert keep[ids != IMAGE].all()
            flags = [torch.zeros(NUM_PATCHES).index_fill(0, next(images), 1).bool() for _ in range(len(own))]
            if flags:
                assert torch.equal(keep[ids == IMAGE], torch.cat(flags))
            if padding:
                alone = ours(input_ids=ids[None], **({"pixel_values": own} if len(own) else {})).logits[0]
                got = output.logits[row][inputs["attention_mask"][row].bool()]
                # The same distances at other positions: upstream takes rotary angles in float32.
                torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)

    def test_a_tuple_where_one_is_asked_for(self, ours):
        inputs = full_batch()
        output = ours(**inputs, return_dict=False)
        assert isinstance(output, tuple)
        assert torch.equal(output[0], ours(**inputs).logits)

    def test_hidden_states_have_the_callers_length_and_attentions_the_short_one(self, ours):
        ours.set_attn_implementation("eager")
        inputs = one_row()
        output = ours(**inputs, output_hidden_states=True, output_attentions=True)
        length = len(prompt([BUDGET], [7, 8, 9]))
        assert [state.shape[:2] for state in output.hidden_states] == [inputs["input_ids"].shape] * 3
        torch.testing.assert_close(ours.lm_head(output.hidden_states[-1]), output.logits)
        assert [attention.shape[-2:] for attention in output.attentions] == [(length, length)] * 2

    def test_image_hidden_states_are_the_kept_ones(self, ours):
        inputs = full_batch()
        output = ours(**inputs)
        features = ours.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        assert torch.equal(image_features_of(output), torch.cat(features))


class TestFeatures:
    def test_one_tensor_and_its_indices_for_each_image(self, ours, stock):
        images = pixels(3)
        output = ours.get_image_features(pixel_values=images)
        expected, indices = oracle_features(stock, images)
        assert [view.shape for view in output.pooler_output] == [(BUDGET, 32)] * 3
        for got, wanted in zip(output.pooler_output, expected.pooler_output):
            torch.testing.assert_close(got, wanted)
        assert all(torch.equal(got, wanted) for got, wanted in zip(output.keep_indices, indices))
        assert list(output.num_placeholders) == [NUM_PATCHES] * 3

    def test_the_output_class_is_upstreams(self, ours, stock):
        images = pixels(1)
        assert type(ours.get_image_features(pixel_values=images)) is type(stock.get_image_features(images))

    def test_a_tuple_where_one_is_asked_for(self, ours):
        for model in (ours, ours.model):
            assert isinstance(model.get_image_features(pixels(1), return_dict=False), tuple)
            assert not isinstance(model.get_image_features(pixels(1), return_dict=True), tuple)

    @pytest.mark.parametrize("budget", [None, 1.0, 49, 200])
    def test_off_is_the_stock_output(self, ours, stock, budget):
        ours.config.prunesid_config.budget = budget
        images = pixels(2)
        got, expected = ours.get_image_features(images), stock.get_image_features(images)
        assert got.keys() == expected.keys()
        assert all(torch.equal(a, b) for a, b in zip(got.pooler_output, expected.pooler_output))

    @pytest.mark.parametrize("budget", range(1, 49, 5))
    def test_exactly_n_sorted_unique_indices(self, ours, budget):
        for kept in ours.get_image_features(pixels(3), num_visual_tokens=budget).keep_indices:
            assert kept.tolist() == sorted(set(kept.tolist()))
            assert len(kept) == budget and kept[0] >= 0 and kept[-1] < NUM_PATCHES

    def test_all_hidden_states_on_request(self, ours):
        output = ours.get_image_features(pixels(1), output_hidden_states=True)
        assert len(output.hidden_states) == 5

    def test_several_feature_layers_and_the_full_strategy(self):
        model = build()
        model.config.vision_feature_layer = [-2, -3]
        with pytest.raises(RuntimeError):  # the projector is for one layer
            model.get_image_features(pixels(1))
        kept = model.get_image_features(pixels(1), vision_feature_layer=-2, vision_feature_select_strategy="full")
        assert kept.num_placeholders == [NUM_PATCHES + 1]
        assert kept.keep_indices[0][0] == 0 and len(kept.keep_indices[0]) == BUDGET

    def test_the_full_strategy_end_to_end(self, ours, stock):
        """CLS has a placeholder of its own there, and stays one of the N."""
        for model in (ours, stock):
            model.config.vision_feature_select_strategy = "full"
        full = {"input_ids": torch.tensor([prompt([NUM_PATCHES + 1], [7, 8])]), "pixel_values": pixels(1)}
        features = ours.get_image_features(pixels(1))
        short = torch.tensor([prompt([BUDGET], [7, 8])])
        expected = stock(input_ids=short, mm_encoder_outputs={"image": features}).logits
        output = ours(**full)
        torch.testing.assert_close(output.logits[output.keep_mask][None], expected)
        torch.testing.assert_close(ours(input_ids=short, pixel_values=pixels(1)).logits, expected)

    def test_cls_may_be_one_of_the_n(self, stock):
        model = build(keep_cls=True)
        output = model.get_image_features(pixels(2))
        states = stock_twin(model).model.vision_tower(pixels(2), output_hidden_states=True).hidden_states[-2]
        for image, (kept, features) in enumerate(zip(output.keep_indices, output.pooler_output)):
            assert kept[0] == -1 and len(kept) == BUDGET and kept[1] >= 0
            torch.testing.assert_close(features, model.model.multi_modal_projector(states[image][kept + 1]))
        assert output.num_placeholders == [NUM_PATCHES] * 2

    def test_nothing_is_projected_but_what_is_kept(self, ours):
        sizes = []
        projector = ours.model.multi_modal_projector
        projector.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[:-1].numel()))
        ours.get_image_features(pixels(3))
        assert sizes == [3 * BUDGET]


class TestOff:
    @pytest.mark.parametrize("budget", [None, 1.0, 49, 200])
    def test_logits_and_loss_are_bit_identical(self, ours, stock, budget):
        ours.config.prunesid_config.budget = budget
        inputs = full_batch("right")
        got = ours(**inputs, labels=labels_of(inputs))
        expected = stock(**inputs, labels=labels_of(inputs))
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.loss, expected.loss)
        assert got.keys() == expected.keys()

    def test_nothing_is_selected_or_shortened(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("called")

        monkeypatch.setattr("modeling_prunesid.encoding.choose_tokens", refuse)
        monkeypatch.setattr("modeling_prunesid.encoding.watch_tower", refuse)
        monkeypatch.setattr("modeling_prunesid.prompts.ShortPrompt.from_keep_mask", refuse)
        build(budget=None).generate(**full_batch(), max_new_tokens=2)

    def test_gradients_are_bit_identical(self, stock):
        model = build(budget=None)
        inputs = full_batch("right")
        for either in (model, stock):
            either.train()
            either(**inputs, labels=labels_of(inputs)).loss.backward()
        for (name, got), expected in zip(model.named_parameters(), stock.parameters()):
            assert (got.grad is None) == (expected.grad is None), name
            assert got.grad is None or torch.equal(got.grad, expected.grad), name

    def test_a_short_prompt_is_upstreams_error(self, stock):
        model = build(budget=None)
        short = {"input_ids": torch.tensor([prompt([BUDGET], [7])]), "pixel_values": pixels(1)}
        for either in (model, stock):
            with pytest.raises(ValueError, match="Image features and image tokens do not match"):
                either(**short)


class TestLabels:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_the_loss_is_the_mean_over_the_kept_positions(self, ours, stock, side):
        inputs = full_batch(side)
        labels = labels_of(inputs)
        output = ours(**inputs, labels=labels)
        losses, short = [], rows_with(BUDGET)
        for row, _, images in each_row(inputs):
            logits = stock_logits(stock, short[row], images)
            kept = output.keep_mask[row] & inputs["attention_mask"][row].bool()
            wanted = labels[row].masked_fill(inputs["input_ids"][row] == IMAGE, IGNORED)[kept][1:]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="none")[wanted != IGNORED])
        torch.testing.assert_close(
            output.loss.double(), torch.cat(losses).mean(), rtol=1e-5, atol=1e-5
        )  # upstream sums in float32

    def test_ignored_labels_stay_ignored(self, ours):
        inputs = full_batch()
        labels = labels_of(inputs)
        answers_only = labels.masked_fill(inputs["input_ids"] == IMAGE, IGNORED)
        got = ours(**inputs, labels=answers_only).loss
        short = {**batch(rows_with(BUDGET)), "pixel_values": inputs["pixel_values"]}
        expected = ours(**short, labels=labels_of(short).masked_fill(short["input_ids"] == IMAGE, IGNORED)).loss
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    def test_num_items_in_batch_of_the_trainer(self, ours):
        inputs = full_batch("right")
        labels = labels_of(inputs).masked_fill(inputs["input_ids"] == IMAGE, IGNORED)
        count = (labels != IGNORED).sum()
        mean = ours(**inputs, labels=labels).loss
        targets = sum(int((row[1:] != IGNORED).sum()) for row in labels)
        scaled = ours(**inputs, labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(scaled * count, mean * targets, rtol=1e-5, atol=1e-5)

    def test_shifted_labels_are_shortened_to_the_next_kept_column(self, ours):
        inputs = full_batch("left")
        labels = labels_of(inputs)
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        got = ours(**inputs, labels=labels, shift_labels=shifted).loss
        torch.testing.assert_close(got, ours(**inputs, labels=labels).loss, rtol=1e-5, atol=1e-5)


class TestCaches:
    def greedy_by_hand(self, model, inputs, output, steps=6):
        mask, cache, tokens = inputs["attention_mask"], cache_of(output), []
        logits = output.logits[:, -1]
        for _ in range(steps):
            token = logits.argmax(-1, keepdim=True)
            tokens.append(token)
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
            logits = model(input_ids=token, attention_mask=mask, **{CACHE_NAME: cache}).logits[:, -1]
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    @pytest.mark.parametrize("count", [NUM_PATCHES, BUDGET], ids=["full", "short"])
    def test_a_loop_of_ones_own(self, ours, stock, count):
        """The mask grows from the caller's prompt, as it does for the stock model."""
        inputs = {**batch(rows_with(count)), "pixel_values": pixels(3)}
        got = self.greedy_by_hand(ours, inputs, ours(**inputs, use_cache=True))
        short = batch(rows_with(BUDGET))
        features = oracle_features(stock, pixels(3))[0]
        start = stock(**short, mm_encoder_outputs={"image": features}, use_cache=True)
        assert torch.equal(got, self.greedy_by_hand(stock, short, start))

    @torch.no_grad()
    def test_a_loop_without_masks(self, ours):
        inputs = one_row()
        output = ours(**inputs, use_cache=True)
        cache, logits, tokens = cache_of(output), output.logits[:, -1], []
        for _ in range(6):
            tokens.append(logits.argmax(-1, keepdim=True))
            logits = ours(input_ids=tokens[-1], **{CACHE_NAME: cache}).logits[:, -1]
        expected = ours.generate(**inputs, max_new_tokens=6, do_sample=False)[:, -6:]
        assert torch.equal(torch.cat(tokens, dim=1), expected)

    @torch.no_grad()
    def test_text_then_image_in_pieces(self, ours):
        inputs = one_row()
        ids = inputs["input_ids"]
        whole = ours(**inputs).logits[:, -1]
        cache = DynamicCache(config=ours.config)
        ours(input_ids=ids[:, :2], **{CACHE_NAME: cache})
        ours(input_ids=ids[:, 2:-1], pixel_values=inputs["pixel_values"], **{CACHE_NAME: cache})
        torch.testing.assert_close(ours(input_ids=ids[:, -1:], **{CACHE_NAME: cache}).logits[:, -1], whole)

    @torch.no_grad()
    def test_a_second_image_behind_a_cached_one(self, ours):
        images = pixels(2)
        ids = torch.tensor([prompt([NUM_PATCHES] * 2, [7, 8])])
        whole = ours(input_ids=ids, pixel_values=images).logits[:, -1]
        cache = DynamicCache(config=ours.config)
        ours(input_ids=ids[:, : NUM_PATCHES + 2], pixel_values=images[:1], **{CACHE_NAME: cache})
        mask = torch.ones_like(ids)
        rest = ours(
            input_ids=ids[:, NUM_PATCHES + 2 :],
            pixel_values=images[1:],
            attention_mask=mask,
            **{CACHE_NAME: cache},
        )
        torch.testing.assert_close(rest.logits[:, -1], whole)

    @torch.no_grad()
    @pytest.mark.parametrize("count", [NUM_PATCHES, BUDGET], ids=["full", "short"])
    def test_a_loop_with_positions_of_ones_own(self, ours, stock, count):
        """Positions are counted along the caller's mask, as they are for the stock model."""

        def loop(model, inputs):
            inputs, steps, cache = dict(inputs), [], DynamicCache(config=ours.config.get_text_config())
            for token in (3, 4, 5):
                mask = inputs["attention_mask"]
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
                steps.append(model(**inputs, position_ids=positions, **{CACHE_NAME: cache}).logits[:, -1])
                mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
                inputs = {"input_ids": torch.full((len(mask), 1), token), "attention_mask": mask}
            return torch.stack(steps)

        features = oracle_features(stock, pixels(3))[0]
        expected = loop(stock, {**batch(rows_with(BUDGET)), "mm_encoder_outputs": {"image": features}})
        got = loop(ours, {**batch(rows_with(count)), "pixel_values": pixels(3)})
        torch.testing.assert_close(got, expected)

    @torch.no_grad()
    @pytest.mark.parametrize("first_turn", ["text", "image"])
    @pytest.mark.parametrize("count", [NUM_PATCHES, BUDGET], ids=["full", "short"])
    def test_turns_of_padded_rows_on_one_cache(self, ours, stock, count, first_turn):
        """The steps behind a second turn with images, whose rows lost different numbers of columns before."""

        def turns(count):
            first = [prompt([], [5, 6, 7, 8, 9]), prompt([], [3])]
            if first_turn == "image":
                first = [prompt([count], [7]), prompt([], [9, 3, 4])]
            second = [prompt([count], [8, 6]), prompt([], [4])]
            return [batch(rows) for rows in (first, second, [[5], [6]], [[7], [3]])]

        def run(model, count, views):
            cache, mask, logits = DynamicCache(config=ours.config.get_text_config()), torch.ones(2, 0).long(), []
            for turn, images in zip(turns(count), (*views, {}, {})):
                mask = torch.cat([mask, turn["attention_mask"]], dim=1)
                # Without positions a turn's padding would count, of which the full prompts have more.
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -turn["input_ids"].shape[1] :]
                inputs = {"input_ids": turn["input_ids"], "attention_mask": mask, "position_ids": positions, **images}
                logits.append(model(**inputs, **{CACHE_NAME: cache}).logits[:, -1])
            return torch.stack(logits), cache

        images = [pixels(1, seed) for seed in range(2)]
        encoded = [{"mm_encoder_outputs": {"image": oracle_features(stock, image)[0]}} for image in images]
        given = [{"pixel_values": image} for image in images]
        if first_turn == "text":
            encoded[0] = given[0] = {}
        got, cache = run(ours, count, given)
        torch.testing.assert_close(got, run(stock, BUDGET, encoded)[0])

    @torch.no_grad()
    def test_a_row_taken_out_of_the_tensors_of_a_cache_is_refused(self, ours):
        inputs = full_batch()
        cache = cache_of(ours(**inputs, use_cache=True))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:2], layer.values[:2]
        mask = torch.nn.functional.pad(inputs["attention_mask"][:2], (0, 1), value=1)
        with pytest.raises(ValueError, match="filled by 3 rows and is continued by 2"):
            ours(input_ids=torch.tensor([[4], [5]]), attention_mask=mask, **{CACHE_NAME: cache})

    @torch.no_grad()
    def test_generate_goes_on_with_a_cache_that_was_filled_in_parts(self, ours):
        parts = [torch.tensor([prompt([NUM_PATCHES], [7, 8])]), torch.tensor([prompt([NUM_PATCHES], [9, 3])])]
        cache = DynamicCache(config=ours.config.get_text_config())
        for part, image in zip(parts, pixels(2).split(1)):
            ours(input_ids=part, pixel_values=image, **{CACHE_NAME: cache})
        chat = torch.cat([*parts, torch.tensor([[4, 5]])], dim=1)
        expected = ours.generate(chat, pixel_values=pixels(2), max_new_tokens=5, do_sample=False)
        assert torch.equal(ours.generate(chat, **{CACHE_NAME: cache}, max_new_tokens=5, do_sample=False), expected)

    @torch.no_grad()
    def test_another_budget_for_a_cached_image_is_refused(self, ours):
        inputs = one_row()
        start = ours.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        chat = torch.cat([start.sequences, torch.tensor([[4, 5]])], dim=1)
        again = {"pixel_values": inputs["pixel_values"], CACHE_NAME: cache_of(start)}
        with pytest.raises(ValueError, match="Pass the budget .num_visual_tokens. that filled the cache"):
            ours.generate(chat, **again, num_visual_tokens=16)

    @torch.no_grad()
    def test_a_static_cache(self, ours):
        inputs = one_row()
        expected = ours.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:]
        cache = StaticCache(config=ours.config.get_text_config(), max_cache_len=64)
        output = ours(**inputs, **{CACHE_NAME: cache})
        tokens = [output.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(4):
            logits = ours(input_ids=tokens[-1], **{CACHE_NAME: cache}).logits[:, -1]
            tokens.append(logits.argmax(-1, keepdim=True))
        assert torch.equal(torch.cat(tokens, dim=1), expected)


class TestEmbeddings:
    def test_without_images_they_pass_through(self, ours, stock):
        embeds = stock.get_input_embeddings()(torch.tensor([prompt([], [7, 8, 9])])).detach()
        assert torch.equal(ours(inputs_embeds=embeds).logits, stock(inputs_embeds=embeds).logits)

    def test_with_images(self, ours):
        inputs = one_row()
        embeds = ours.get_input_embeddings()(inputs["input_ids"])
        got = ours(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]).logits
        assert torch.equal(got, ours(**inputs).logits)

    def test_ids_and_embeddings_together_are_upstreams_error(self, ours, stock):
        inputs = one_row()
        embeds = ours.get_input_embeddings()(inputs["input_ids"])
        for model in (ours, stock):
            with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
                model(**inputs, inputs_embeds=embeds)

    def test_neither_is_upstreams_error(self, ours):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            ours(pixel_values=pixels(1))


class TestErrors:
    @pytest.mark.parametrize("count", [0, 1, BUDGET + 1, NUM_PATCHES - 1, NUM_PATCHES + 1])
    def test_a_wrong_number_of_placeholders(self, ours, count):
        ids = torch.tensor([prompt([count], [7, 8])])
        for model in (ours, ours.model):
            with pytest.raises(ValueError, match=rf"^Image features and image tokens do not match, tokens: {count},"):
                model(input_ids=ids, pixel_values=pixels(1))

    @pytest.mark.parametrize("count", [NUM_PATCHES, BUDGET])
    def test_a_forgotten_image(self, ours, count):
        with pytest.raises(ValueError, match=r"^Image features and image tokens do not match.*pass pixel_values"):
            ours(input_ids=torch.tensor([prompt([count], [7, 8])]))

    def test_a_mask_of_four_dimensions_needs_a_short_prompt(self, ours):
        inputs = one_row()
        length = inputs["input_ids"].shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        with pytest.raises(ValueError, match=r"attention_mask must have the shape \(batch, length\)"):
            ours(**inputs, attention_mask=mask)
        short = torch.tensor([prompt([BUDGET], [7, 8, 9])])
        mask = torch.ones(1, 1, short.shape[1], short.shape[1], dtype=torch.bool).tril()
        got = ours(input_ids=short, pixel_values=inputs["pixel_values"], attention_mask=mask).logits
        output = ours(**inputs)
        torch.testing.assert_close(got, output.logits[output.keep_mask][None])

    @pytest.mark.parametrize("value", ["64", 0, -1, 1.5, True])
    def test_an_invalid_budget(self, ours, value):
        for call in (ours, ours.model):
            with pytest.raises(ValueError, match="num_visual_tokens") as error:
                call(**one_row(), num_visual_tokens=value)
            assert repr(value) in str(error.value)

    def test_vision_feature_layer_is_checked(self, ours):
        with pytest.raises(ValueError, match=r"vision_feature_layer must lie in \[-5, 4\].*got 9"):
            ours(**one_row(), vision_feature_layer=9)


class TestTraining:
    def test_gradients_reach_projector_language_model_and_tower(self, ours):
        ours.train()
        inputs = full_batch("right")
        ours(**inputs, labels=labels_of(inputs)).loss.backward()
        without = [name for name, parameter in ours.named_parameters() if parameter.grad is None]
        # Of the tower, what comes behind the feature layer takes no part.
        assert all(".layers.3." in name or "post_layernorm" in name for name in without), without
        for name, parameter in ours.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
            assert parameter.grad is None or parameter.grad.abs().sum() > 0 or "k_proj.bias" in name, name

    def test_gradients_equal_those_of_the_stock_model_on_the_kept_tokens(self, ours, stock):
        inputs = one_row()
        kept = ours.get_image_features(inputs["pixel_values"]).keep_indices[0]
        ours(**inputs, labels=inputs["input_ids"]).loss.backward()

        states = stock.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        embeds = stock.get_input_embeddings()(torch.tensor([prompt([BUDGET], [7, 8, 9])]))
        features = stock.model.multi_modal_projector(states[:, 1:][:, kept])
        embeds = torch.cat([embeds[:, :2], features, embeds[:, 2 + BUDGET :]], dim=1)
        short = torch.tensor([prompt([BUDGET], [7, 8, 9])])
        stock(inputs_embeds=embeds, labels=short.masked_fill(short == IMAGE, IGNORED)).loss.backward()
        for (name, got), expected in zip(ours.named_parameters(), stock.parameters()):
            assert (got.grad is None) == (expected.grad is None), name
            if got.grad is not None and "embed_tokens" not in name:
                torch.testing.assert_close(got.grad, expected.grad, atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing(self, ours, use_reentrant):
        inputs = full_batch("right")
        inputs["labels"] = labels_of(inputs)
        ours.train()
        ours(**inputs).loss.backward()
        expected = {name: parameter.grad for name, parameter in ours.named_parameters()}
        ours.zero_grad()
        # Renamed in Transformers 5.2x, where the old name warns.
        new_name = getattr(ours, "activation_checkpointing_enable", None)
        enable = new_name or ours.gradient_checkpointing_enable
        enable({"use_reentrant": use_reentrant})
        ours.enable_input_require_grads()
        assert ours.model.language_model.layers[0].gradient_checkpointing
        ours(**inputs, use_cache=False).loss.backward()
        for name, parameter in ours.named_parameters():
            assert (parameter.grad is None) == (expected[name] is None), name
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)

    def test_a_frozen_tower(self, ours):
        ours.model.vision_tower.requires_grad_(False)
        inputs = full_batch("right")
        ours(**inputs, labels=labels_of(inputs)).loss.backward()
        assert all(parameter.grad is None for parameter in ours.model.vision_tower.parameters())
        assert all(parameter.grad is not None for parameter in ours.model.multi_modal_projector.parameters())

    @pytest.mark.parametrize("count", [NUM_PATCHES, BUDGET], ids=["full", "short"])
    def test_the_trainer_trains_evaluates_and_predicts(self, ours, tmp_path, count):
        examples = [
            {
                "input_ids": torch.tensor(prompt([count], [7, text])),
                "labels": torch.tensor([IGNORED] * (count + 2) + [7, text]),
                "pixel_values": pixels(1, seed=text)[0],
            }
            for text in (8, 9, 10, 11)
        ]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=30,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            prediction_loss_only=True,
        )
        trainer = Trainer(model=ours, args=arguments, train_dataset=examples, eval_dataset=examples)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before / 2

    # peft asks by the old name.
    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
    def test_peft_trains_and_generates(self, ours):
        inputs = one_row()
        plain = ours.generate(**inputs, max_new_tokens=5, do_sample=False)
        model = get_peft_model(ours, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM"))
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), plain)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert trained and any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        model = build().to(dtype)
        inputs = full_batch()
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        output = model(**inputs)
        assert output.logits.dtype == dtype and output.logits.isfinite().all()
        assert len(model.generate(**inputs, max_new_tokens=3, do_sample=False)) == 3
        features = model.get_image_features(inputs["pixel_values"])
        expected = stock_twin(model)
        assert all(
            torch.equal(got, wanted)
            for got, wanted in zip(features.keep_indices, oracle_features(expected, inputs["pixel_values"])[1])
        )

    def test_autocast(self, ours):
        inputs = full_batch("right")
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours(**inputs, labels=labels_of(inputs)).loss
        loss.backward()
        assert loss.isfinite()
        assert ours.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0

    def test_a_tower_and_a_language_model_of_different_dtypes(self):
        model = build()
        model.model.language_model.to(torch.bfloat16)
        model.lm_head.to(torch.bfloat16)
        assert model(**one_row()).logits.dtype == torch.bfloat16


class TestAttention:
    @pytest.mark.parametrize("cache", [None, "static"])
    def test_a_language_model_with_a_sliding_window(self, cache):
        """Upstream gives such a model a dict of masks."""
        text = {"model_type": "mistral", "sliding_window": 16, "head_dim": 8}
        model = build(text=text)
        stock = stock_twin(model)
        kwargs = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
        inputs = full_batch()
        got = model.generate(**inputs, **kwargs)[:, -6:]
        assert torch.equal(got, oracle_generate(stock, rows_with(BUDGET), inputs["pixel_values"], **kwargs))

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_every_implementation_gives_the_same_logits(self, ours, implementation):
        expected = ours(**one_row()).logits
        ours.set_attn_implementation(implementation)
        # Upstream's eager attention takes its softmax in float32.
        torch.testing.assert_close(ours(**one_row()).logits, expected, rtol=1e-4, atol=1e-5)


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_answer_alike_and_are_switched_alone(self, ours, copied):
        inputs = full_batch()
        expected = ours(**inputs).logits
        twin = copied(ours)
        assert torch.equal(twin(**inputs).logits, expected)
        twin.config.prunesid_config.budget = None
        assert "keep_mask" not in twin(**inputs)
        assert torch.equal(ours(**inputs).logits, expected)

    def test_outputs_can_be_pickled(self, ours):
        output = ours(**full_batch(), use_cache=True)
        loaded = pickle.loads(pickle.dumps({"logits": output.logits.detach(), "keep_mask": output.keep_mask}))
        assert torch.equal(loaded["keep_mask"], output.keep_mask)


class TestCompile:
    @pytest.fixture
    def ours(self):
        """Every layer is traced by itself."""
        return build(vision={"num_hidden_layers": 2}, text={"num_hidden_layers": 1})

    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.contract
    @pytest.mark.parametrize("compiled", ["decoding step", "forward"])
    def test_generate_compiles_nothing_for_a_second_image(self, ours, compiled):
        images, text = pixels(2), one_row()["input_ids"]
        greedy = {"input_ids": text, "max_new_tokens": 5, "do_sample": False}
        first, second = (ours.generate(pixel_values=image[None], **greedy) for image in images)
        assert not torch.equal(first, second)
        graphs, static = [], {"cache_implementation": "static"}

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        if compiled == "forward":
            ours.forward = torch.compile(ours.forward, backend=backend)
        else:
            static["compile_config"] = CompileConfig(backend=backend, mode=None)
            static["compile_config"]._compile_all_devices = True
        assert torch.equal(ours.generate(pixel_values=images[:1], **greedy, **static), first)
        count = len(graphs)
        assert count > 0
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(ours.generate(pixel_values=images[1:], **greedy, **static), second)
        assert len(graphs) == count

    @torch.no_grad()
    def test_a_decoding_step_is_one_graph(self, ours):
        inputs = one_row()
        cache = StaticCache(config=ours.config.get_text_config(), max_cache_len=32)
        token = ours(**inputs, **{CACHE_NAME: cache}).logits[:, -1].argmax(-1, keepdim=True)
        twin = copy.deepcopy(cache)
        step = torch.compile(ours, backend="eager", fullgraph=True)
        position = torch.tensor([[cache.get_seq_length()]])
        got = step(input_ids=token, **{CACHE_NAME: cache}, position_ids=position).logits
        torch.testing.assert_close(got, ours(input_ids=token, **{CACHE_NAME: twin}, position_ids=position).logits)
