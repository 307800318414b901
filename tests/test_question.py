"""Selection that knows the question: whose words weigh which tokens, and what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from pretended_device import Pretended, PretendedTensor
from random_tokens import Settings, extreme_views, smooth
from tiny import BUDGET, IMAGE, NUM_PATCHES, batch, build, pixels, prompt, stock_twin
from tiny_checkpoint import build_processor, picture, save_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, DynamicCache, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_prunesid import PruneSIDConfig, PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor
from modeling_prunesid.context import Context, counts_on
from modeling_prunesid.methods import METHODS, method_of
from modeling_prunesid.question import QuestionReader, relevance, rows_of_inputs
from modeling_prunesid.upstream import CACHE_NAME
from prunesid_cli.towers import run_tower


GREEDY = {"max_new_tokens": 4, "do_sample": False}
ASKS = {"method": "spread", "method_settings": {"question": True}}
ROWS_OF_IDS = [prompt([NUM_PATCHES] * 2, [20, 21, 22]), prompt([NUM_PATCHES], [30]), prompt([NUM_PATCHES], [40, 41])]


def asking(**config):
    return build(**{**ASKS, **config})


def asked(rows=ROWS_OF_IDS, words=range(20, 60), **more):
    """A batch of prompts whose words of a question are those in `words`."""
    inputs = batch(rows)
    mask = torch.isin(inputs["input_ids"], torch.tensor(list(words))).long()
    return {
        **inputs,
        "question_mask": mask,
        "pixel_values": pixels(sum(row.count(IMAGE) for row in rows) // 49),
        **more,
    }


# Relevance


def naive(tokens, words):
    """Relevance `(T,)` of finite tokens of one view in float64."""
    units, others = (torch.nn.functional.normalize(part.double(), dim=-1) for part in (tokens, words))
    cosines = units @ others.T
    nearest = (cosines - cosines.mean(0)).amax(1)
    return (nearest - nearest.min()) / (nearest.max() - nearest.min())


def test_relevance_is_the_cosine_with_the_nearest_word_less_its_mean():
    tokens, words = smooth(3, 50, 64), smooth(3, 7, 64, seed=1)
    found = relevance(tokens, words)
    for row in range(3):
        torch.testing.assert_close(found[row].double(), naive(tokens[row], words[row]), atol=2e-5, rtol=0)
    assert found.amin(1).tolist() == [0] * 3 and found.amax(1).tolist() == [1] * 3


def test_it_has_the_same_bits_in_any_batch_and_on_any_device_without_a_wait():
    tokens, words = smooth(5, 50, 300), smooth(5, 7, 300, seed=1)
    lengths = [50, 31, 50, 7, 1]
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
        words[row, row + 1 :] = 0
    expected = [
        relevance(tokens[row : row + 1, :length], words[row : row + 1, : row + 1])[0]
        for row, length in enumerate(lengths)
    ]
    whole = relevance(tokens, words, lengths)
    with Pretended() as device:
        there = relevance(PretendedTensor(tokens), PretendedTensor(words), lengths)
        assert not device.waits, device.waits
    for row, length in enumerate(lengths):
        assert torch.equal(whole[row, :length], expected[row])
        assert torch.equal(there.data_on_cpu[row, :length], expected[row])


@pytest.mark.parametrize("name", extreme_views())
def test_any_numbers_give_values_between_0_and_1(name):
    tokens = extreme_views()[name][None]
    for words in (*(view[None].float() for view in extreme_views().values()), torch.zeros(1, 3, 16)):
        found = relevance(tokens, words)
        assert ((found >= 0) & (found <= 1)).all()
        finite = tokens[0].float().isfinite().all(1)
        assert (found[0][~finite] == 0).all()
        if not words.any():
            assert (found[0][finite] == 1).all()


@pytest.mark.parametrize("method", ["paper", "release", "spread"])
def test_methods_weigh_tokens_by_it_on_any_device_alike(method):
    views, counts = smooth(3, 60, 48), [12, 12, 12]
    settings = Settings(nms_lambda="auto", method_settings={"question": True})
    weights = torch.rand(3, 60, generator=torch.Generator().manual_seed(0))
    context = Context(counts=counts, attention=views.norm(dim=-1), projected=views.flip(-1), relevance=weights)
    found = method_of(method)(views, counts_on(views.device, counts), settings, context)
    with Pretended() as device:
        tensors = {name: PretendedTensor(getattr(context, name)) for name in ("attention", "projected", "relevance")}
        there = Context(counts=counts, **tensors)
        there = method_of(method)(PretendedTensor(views), device.put(torch.tensor(counts)), settings, there)
        assert not device.waits, device.waits
    assert torch.equal(there.indices.data_on_cpu, found.indices)
    ones = Context(
        counts=counts, attention=context.attention, projected=context.projected, relevance=torch.ones(3, 60)
    )
    none = Context(counts=counts, attention=context.attention, projected=context.projected)
    blind = [method_of(method)(views, counts_on(views.device, counts), settings, own).indices for own in (ones, none)]
    assert torch.equal(*blind) and not torch.equal(blind[0], found.indices)


@pytest.mark.parametrize("value", [1, 0, "yes", None, "True"])
@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_setting_is_a_value_error(method, value):
    with pytest.raises(ValueError, match="must be False, True or 'keep'"):
        PruneSIDConfig(method=method, method_settings={"question": value})


# Which words weigh which images


def kept_of(model, inputs):
    """The kept columns of each row, as `forward` says."""
    return model(**inputs).keep_mask


def by_hand(model, row_of_ids, words, pictures):
    """What a row keeps of its images, by the definitions, one image after the other."""
    tower = model.model.vision_tower
    kept = []
    for image in pictures:
        states = run_tower(tower, image[None], [3], cls_attention_layer=3)
        patches = states.hidden_states[3][:, 1:]
        projected = model.model.multi_modal_projector(patches)
        embedded = model.get_input_embeddings()(torch.tensor([words]))
        context = Context(
            counts=[BUDGET],
            attention=states.cls_attention[:, 1:],
            projected=projected,
            relevance=relevance(projected, embedded),
        )
        settings = model.config.prunesid_config
        kept.append(method_of("spread")(patches, counts_on(image.device, [BUDGET]), settings, context).indices)
    flags = torch.ones(len(row_of_ids), dtype=torch.bool)
    columns = (torch.tensor(row_of_ids) == IMAGE).nonzero()[:, 0].view(len(pictures), -1)
    for own, indices in zip(columns, kept):
        flags[own] = False
        flags[own[indices[0]]] = True
    return flags


@torch.no_grad()
def test_each_image_is_weighed_by_the_question_of_its_row():
    model, inputs = asking(), asked()
    keep = kept_of(model, inputs)
    pictures, first = inputs["pixel_values"].double(), 0
    for row, (ids, words) in enumerate(zip(ROWS_OF_IDS, ([20, 21, 22], [30], [40, 41]))):
        count = ids.count(IMAGE) // NUM_PATCHES
        assert torch.equal(keep[row, -len(ids) :], by_hand(model, ids, words, pictures[first : first + count]))
        first += count
    others = asked([prompt([NUM_PATCHES] * 2, [50, 51]), *ROWS_OF_IDS[1:]])
    changed = kept_of(model, others)
    assert torch.equal(changed[1:, -60:], keep[1:, -60:])
    assert not torch.equal(changed[0, -101:-3], keep[0, -102:-4])


@torch.no_grad()
def test_short_prompts_embeddings_and_generate_choose_the_same():
    model, inputs = asking(), asked()
    expected = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    short = asked([prompt([BUDGET] * 2, [20, 21, 22]), prompt([BUDGET], [30]), prompt([BUDGET], [40, 41])])
    short["pixel_values"] = inputs["pixel_values"]
    assert torch.equal(model.generate(**short, **GREEDY)[:, short["input_ids"].shape[1] :], expected)
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embedded["input_ids"]
    assert torch.equal(model.generate(**embedded, **GREEDY), expected)
    for row, ids in enumerate(ROWS_OF_IDS):
        first = (0, 2, 3)[row]
        alone = {**asked([ids]), "pixel_values": inputs["pixel_values"][first : first + (2, 1, 1)[row]]}
        assert torch.equal(model.generate(**alone, **GREEDY)[0, len(ids) :], expected[row])


@torch.no_grad()
def test_beams_and_samples_keep_what_their_row_keeps():
    model, inputs = asking(), asked()
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    together = model.generate(**inputs, **beams)[:, inputs["input_ids"].shape[1] :]
    for row, ids in enumerate(ROWS_OF_IDS):
        first = (0, 2, 3)[row]
        alone = {**asked([ids]), "pixel_values": inputs["pixel_values"][first : first + (2, 1, 1)[row]]}
        assert torch.equal(model.generate(**alone, **beams)[:, len(ids) :], together[2 * row : 2 * row + 2])


def test_rows_of_inputs():
    assert rows_of_inputs([3, 4, 5], [7, 0, 5]) == [0, 0, 2]
    assert rows_of_inputs([3, 4, 5], [12]) == [0, 0, 0]
    assert rows_of_inputs([3, 4, 5], [3, 9, 0]) == [0, 1, 1]
    for counts in ([8, 4], [12, 1], [7], [0]):
        assert rows_of_inputs([3, 4, 5], counts) is None


DYNAMIC = [{"dynamic": True, "reference_information": 0.6}, {"dynamic": True, "budget_scope": "image"}]


@pytest.mark.parametrize("settings", [{}, *DYNAMIC])
@torch.no_grad()
def test_budgets_do_not_depend_on_the_question(settings):
    found = []
    for words in (range(20, 60), range(20, 22), ()):
        model, inputs = asking(**settings), asked(words=words)
        found.append(kept_of(model, inputs).sum(1).tolist())
    blind = build(method="spread", **settings)
    inputs.pop("question_mask")
    assert found == [kept_of(blind, inputs).sum(1).tolist()] * 3


@torch.no_grad()
def test_a_row_without_words_keeps_what_spread_keeps():
    inputs = asked(words=())
    keep = kept_of(asking(), inputs)
    inputs.pop("question_mask")
    assert torch.equal(keep, kept_of(build(method="spread"), inputs))


# Refusals, and what does not opt in


@torch.no_grad()
def test_without_the_setting_a_mask_changes_nothing():
    inputs = asked()
    mask = inputs.pop("question_mask")
    for model in (build(), build(None), build(method="spread")):
        assert torch.equal(model(**inputs, question_mask=mask).logits, model(**inputs).logits)
        assert torch.equal(model.generate(**inputs, question_mask=mask, **GREEDY), model.generate(**inputs, **GREEDY))
    model = asking(budget=None)
    assert torch.equal(model(**inputs, question_mask=mask).logits, stock_twin(model)(**inputs).logits)
    assert torch.equal(model(**inputs).logits, stock_twin(model)(**inputs).logits)  # off: nothing is asked for


@torch.no_grad()
def test_without_a_mask_it_is_refused():
    model, inputs = asking(), asked()
    mask = inputs.pop("question_mask")
    for call in (model, model.generate, model.model):
        with pytest.raises(ValueError, match="question_mask=None does not say"):
            call(**inputs)
        for wrong in (mask[:, 1:], mask[0], [1, 2]):
            with pytest.raises(ValueError, match=r"question_mask must have the shape \(batch, length\) = \(3, 104\)"):
                call(**inputs, question_mask=wrong)
    with pytest.raises(ValueError, match="images alone do not have"):
        model.get_image_features(inputs["pixel_values"])
    model.generate(torch.tensor([[1, 20, 21]]), **GREEDY)  # text alone


@torch.no_grad()
def test_labels_do_not_choose_tokens():
    model, inputs = asking(), asked()
    is_image = inputs["input_ids"] == IMAGE
    labels = inputs["input_ids"].masked_fill(is_image, -100)
    keep = model(**inputs, labels=labels).keep_mask
    assert torch.equal(keep[is_image], kept_of(model, inputs)[is_image])
    with pytest.raises(ValueError, match="question_mask=None"):
        model(**{**inputs, "question_mask": None}, labels=labels)


def turn(model, cache, more):
    """The answer to a first question, and the conversation with a second one."""
    first = asked([prompt([NUM_PATCHES], [20, 21])])
    answer = model.generate(**first, **{CACHE_NAME: cache}, **GREEDY)
    ids = torch.cat([answer, torch.tensor([more])], 1)
    mask = torch.zeros_like(ids)
    mask[:, -len(more) :] = 1
    return {"input_ids": ids, "question_mask": mask}, first["pixel_values"]


@pytest.mark.parametrize("passes", ["conversation", "conversation and image", "new image"])
@torch.no_grad()
def test_another_question_on_a_cache_is_refused_unless_the_choice_is_kept(passes):
    more = [50, 51] if passes != "new image" else [50, *[IMAGE] * NUM_PATCHES, 51]
    model, cache = asking(), DynamicCache()
    second, pictures = turn(model, cache, more)
    pictures = {"conversation": None, "conversation and image": pictures, "new image": pixels(1, seed=5)}[passes]
    second |= {} if pictures is None else {"pixel_values": pictures}
    with pytest.raises(ValueError, match="holds visual tokens that were chosen for an earlier question") as error:
        model.generate(**second, **{CACHE_NAME: copy.deepcopy(cache)}, **GREEDY)
    assert "without the cache" in str(error.value) and "'keep'" in str(error.value)

    model.config.prunesid_config.method_settings = {"question": "keep"}
    kept = model.generate(**second, **{CACHE_NAME: cache}, **GREEDY)
    # The same, where the first question is asked again instead: its image keeps its tokens.
    whole = {**second, "pixel_values": torch.cat([pixels(1), pictures]) if passes == "new image" else pixels(1)}
    if passes != "new image":
        whole["question_mask"] = torch.isin(second["input_ids"], torch.tensor([20, 21])).long()
        assert torch.equal(model.generate(**whole, **GREEDY), kept)


@torch.no_grad()
def test_a_conversation_without_the_cache_chooses_anew():
    model = asking()
    second, pictures = turn(model, DynamicCache(), [50, 51])
    chosen = kept_of(model, {**second, "pixel_values": pictures})
    assert torch.equal(chosen[0], by_hand(model, second["input_ids"][0].tolist(), [50, 51], pictures.double()))


# Processors

TEMPLATES = {
    "vicuna": "{% for m in messages %}{{ m.role | upper }} : {% for p in m.content %}{% if p.type == 'image' %}<image> \n {% else %}{{ p.text }} {% endif %}{% endfor %}{% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT : {% endif %}",  # noqa: E501
    "chatml": "<start> system \n you help <end> {% for m in messages %}<start> {{ m.role }} \n {% for p in m.content %}{% if p.type == 'image' %}<image> {% else %}{{ p.text }} {% endif %}{% endfor %}<end> \n {% endfor %}{% if add_generation_prompt %}<start> assistant \n think {% endif %}",  # noqa: E501
    "inst": "{% for m in messages %}{% if m.role == 'user' %}[INST] {% for p in m.content %}{% if p.type == 'image' %}<image> {% else %}{{ p.text }} {% endif %}{% endfor %}[/INST] {% else %}{{ m.content[0].text }} </s> {% endif %}{% endfor %}",  # noqa: E501
    "gemma": "<s> {% for m in messages %}<turn> {{ 'model' if m.role == 'assistant' else m.role }} \n {% for p in m.content %}{% if p.type == 'image' %}<image> {% else %}{{ p.text }}{% endif %}{% endfor %} <end> \n {% endfor %}{% if add_generation_prompt %}<turn> model \n {% endif %}",  # noqa: E501
}
VOCABULARY = (
    "<pad> <s> </s> <unk> <image> USER ASSISTANT : <start> <end> <turn> user assistant model system you help think "
    "[INST] [/INST] red blue what is the car ? where dog picture look at this a b c"
)


def speaking(template, **settings):
    """A processor of ours with that chat template and words that it needs."""
    words = list(dict.fromkeys(VOCABULARY.split()))
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>", "<start>", "<end>", "<turn>"],
    )  # fmt: skip
    stock = build_processor()
    return PruneSIDLlavaProcessor(
        stock.image_processor, tokenizer, patch_size=stock.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template, num_visual_tokens=BUDGET, question=True, **settings,
    )  # fmt: skip


def user(*parts):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def says(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CHATS = {
    "one turn": ([user(None, "what is the car ?")], "what is the car ?"),
    "text first": ([user("where is the dog ?", None)], "where is the dog ?"),
    "between": ([user("look at", None, "what is this ?")], "what is this ?"),
    "two images": ([user(None, None, "what ?")], "what ?"),
    "an answer": ([user(None, "what ?"), says("a car")], "what ?"),
    "two turns": ([user(None, "what ?"), says("a car"), user("where is the dog ?")], "where is the dog ?"),
    "a new image": ([user(None, "what ?"), says("a"), user(None, "is this red ?")], "is this red ?"),
    "same words": ([user(None, "red"), says("red"), user("red")], "red"),
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_processor_marks_the_words_of_the_last_question(template, chat):
    processor, (messages, expected) = speaking(TEMPLATES[template]), CHATS[chat]
    text = processor.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] == "user")
    count = text.count("<image>")
    inputs = processor(images=[picture(seed) for seed in range(count)], text=text, return_tensors="pt")
    assert inputs["question_mask"].shape == inputs["input_ids"].shape
    marked = inputs["input_ids"][inputs["question_mask"].bool()]
    assert processor.tokenizer.convert_ids_to_tokens(marked) == expected.split()
    (ends,) = inputs["question_mask"][0].nonzero()[-1:]
    if chat == "same words":
        assert int(ends) > inputs["input_ids"][0].tolist().index(processor.tokenizer.convert_tokens_to_ids("red")) + 2


def test_prompts_without_the_template_are_the_question():
    processor = speaking(TEMPLATES["vicuna"])
    for text, expected in (
        ("<image> \n what is this ?", "what is this ?"),
        ("look at this <image>", "look at this"),
        ("<image> what ? ASSISTANT : a", "what ?"),
    ):
        inputs = processor(images=[picture()], text=text, return_tensors="pt")
        marked = inputs["input_ids"][inputs["question_mask"].bool()]
        assert processor.tokenizer.convert_ids_to_tokens(marked) == expected.split()


def test_batches_lists_and_other_budgets():
    processor = speaking(TEMPLATES["chatml"])
    texts = [
        processor.apply_chat_template([user(*[None] * count, words)], add_generation_prompt=True)
        for count, words in ((2, "what is this ?"), (1, "red ?"))
    ]
    pictures = [picture(seed) for seed in range(3)]
    for side in ("left", "right"):
        for budget in (None, 3, 1.0):
            inputs = processor(
                images=pictures,
                text=texts,
                padding=True,
                padding_side=side,
                num_visual_tokens=budget,
                return_tensors="pt",
            )
            words = [
                processor.tokenizer.convert_ids_to_tokens(ids[mask.bool()])
                for ids, mask in zip(inputs["input_ids"], inputs["question_mask"])
            ]
            assert words == [["what", "is", "this", "?"], ["red", "?"]]
    lists = processor(images=pictures, text=texts)
    assert [len(row) for row in lists["question_mask"]] == [len(row) for row in lists["input_ids"]]
    assert [sum(row) for row in lists["question_mask"]] == [4, 2]
    assert "question_mask" in processor.model_input_names


def test_templates_that_do_not_show_where_words_begin_are_refused():
    for template in (
        "{% for m in messages %}{{ m.content[0].text }} {% endfor %}",
        "{{ messages[0].content[0].text }}",
    ):
        with pytest.raises(ValueError, match="does not show where the words of a user begin"):
            speaking(template)(text="what is this ?")
    assert QuestionReader(SimpleNamespace(tokenizer=speaking("").tokenizer, chat_template=None)).head == []


def test_it_is_saved_with_those_that_ask_alone(tmp_path):
    processor = speaking(TEMPLATES["chatml"])
    processor(text="what ?")
    processor.save_pretrained(tmp_path / "asks")
    loaded = PruneSIDLlavaProcessor.from_pretrained(tmp_path / "asks")
    assert loaded.question is True and "question_mask" in loaded(text="what ?")
    blind = PruneSIDLlavaProcessor.from_pretrained(tmp_path / "asks", question=False)
    blind.save_pretrained(tmp_path / "blind")
    assert "question" not in json.loads((tmp_path / "blind" / "processor_config.json").read_text())
    assert "question_mask" not in blind(text="what ?")
    for settings, expected in (({}, False), (ASKS, True), ({"method_settings": {"question": "keep"}}, True)):
        assert PruneSIDLlavaProcessor.arguments_for(PruneSIDConfig(**settings))["question"] is expected


def test_engines_refuse_it_at_start():
    processor = speaking(TEMPLATES["chatml"])
    with pytest.raises(ValueError, match="Save the model with question=False") as error:
        processor._get_num_multimodal_tokens(image_sizes=[(28, 28)])
    assert "\n" not in str(error.value)
    processor.num_visual_tokens = None
    assert processor._get_num_multimodal_tokens(image_sizes=[(28, 28)]).num_image_tokens == [NUM_PATCHES]


# Repositories


@pytest.mark.parametrize("settings", [{}, {"question": True}])
def test_a_repo_carries_the_file_only_where_its_method_reads_the_question(tmp_path, settings):
    base = save_checkpoint(tmp_path / "base")
    prunesid_config = {"budget": BUDGET, "method": "spread", "method_settings": settings or None}
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config=prunesid_config).double()
    model.save_pretrained(tmp_path / "repo")
    assert (tmp_path / "repo" / "question.py").exists() is bool(settings)
    folder = str(tmp_path / "repo")
    name = "PruneSIDLlavaForConditionalGeneration"
    loaded = get_class_from_dynamic_module(f"modeling_prunesid_llava.{name}", folder).from_pretrained(folder).double()
    assert type(loaded).__module__.startswith("transformers_modules")
    inputs = asked()
    if not settings:
        with pytest.raises(ValueError, match="needs code that this model was saved without"):
            loaded.config.prunesid_config.method_settings = {"question": True}
            loaded.config.prunesid_config.check()
        return
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    processor = AutoProcessor.from_pretrained(tmp_path / "repo", trust_remote_code=True)
    assert processor.question is True
