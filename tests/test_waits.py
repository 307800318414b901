"""How often the host waits for the device: a `forward` or a prefill with images no oftener than the stock class."""

import pytest
import torch
from oracle_prompt import CACHE
from oracle_waits import batch_of, in_float32, pair, put, views_of, waits
from pretended_device import Pretended
from transformers import DynamicCache, modeling_utils


pytestmark = pytest.mark.filterwarnings("ignore")
ANSWER = {"max_new_tokens": 1, "do_sample": False}
# One row of one view, and two rows of one and two.
several_views = pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.contract), 3])


@several_views
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("name", ["LLaVA", "LLaVA-NeXT", "Qwen2_5_VL", "ViTCoP", "LLaVA with llm_budget"])
def test_full_prompts_wait_no_oftener_than_the_stock_class(name, call, count):
    family, ours, stock = pair(name)
    inputs = batch_of(family, count)
    if call == "forward":
        found, expected = (waits(lambda model=model: model(**put(inputs))) for model in (ours, stock))
    else:
        found, expected = (
            waits(lambda model=model: model.generate(**put(inputs), **ANSWER)) for model in (ours, stock)
        )
    assert found.total() <= expected.total(), found - expected


@several_views
def test_a_dynamic_budget_waits_once_more(count):
    family, ours, stock = pair("LLaVA", reference_information=0.8, dynamic=True)
    inputs = batch_of(family, count)
    found, expected = (waits(lambda model=model: model(**put(inputs))) for model in (ours, stock))
    assert found.total() <= expected.total() + 1, found - expected


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("name", ["LLaVA", "ViTCoP", "LLaVA with llm_budget"])
def test_a_decoding_step_waits_no_oftener_than_that_of_the_stock_class(name, has_mask):
    family, ours, stock = pair(name)
    found = []
    for model in (ours, stock):
        inputs, cache = batch_of(family, 1), DynamicCache(config=model.config.get_text_config())
        length = inputs["input_ids"].shape[1] + 1

        def fill(model=model, inputs=inputs, cache=cache):
            model(**put(inputs), **{CACHE: cache})

        step = {"input_ids": torch.tensor([[11]])}
        if has_mask:
            step["attention_mask"] = torch.ones(1, length, dtype=torch.long)
        waits(fill)
        found.append(waits(lambda model=model, step=step, cache=cache: model(**put(step), **{CACHE: cache})))
    assert found[0].total() <= found[1].total(), found[0] - found[1]


def turns(name, call):
    """The waits of a second turn with an image of its own, on the cache of a first; of ours and of the stock class."""
    family, *models = pair(name)
    first, second = views_of(family, 2)
    found = []
    for model in models:
        cache = DynamicCache(config=model.config.get_text_config())
        ids = torch.tensor([[1, 5, *first.ids, 7, 8]])
        inputs, answers = {"input_ids": ids, **family.types(ids), **in_float32(family.pixels([first]))}, []

        def begin(model=model, inputs=inputs, cache=cache, answers=answers):
            if call == "forward":
                model(**put(inputs), **{CACHE: cache})
            else:
                answers.append(model.generate(**put(inputs), **{CACHE: cache}, **ANSWER))

        waits(begin)
        words = [6, *second.ids, 9]
        ids = torch.tensor([words if call == "forward" else [*answers[0].data_on_cpu[0].tolist(), *words]])
        step = {"input_ids": ids, **family.types(ids), **in_float32(family.pixels([second]))}
        if call == "forward":
            step["attention_mask"] = torch.ones(1, len(inputs["input_ids"][0]) + len(words), dtype=torch.long)

        def go_on(model=model, step=step, cache=cache):
            if call == "forward":
                model(**put(step), **{CACHE: cache})
            else:
                model.generate(**put(step), **{CACHE: cache}, **ANSWER)

        found.append(waits(go_on))
    return found


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    "name", ["LLaVA", "LLaVA-NeXT", "ViTCoP", "LLaVA with llm_budget"]
)  # stock Qwen-VL takes no images of a later turn alone
def test_a_second_turn_waits_no_oftener_than_that_of_the_stock_class(name, call):
    found, expected = turns(name, call)
    assert found.total() <= expected.total(), found - expected


@pytest.mark.parametrize("form", ["tensor", "of each row", "slice", "mask", "mask of each row"])
@several_views
def test_logits_of_some_columns_wait_no_oftener(form, count):
    family, ours, stock = pair("LLaVA")
    inputs = batch_of(family, count)
    batch, length = inputs["input_ids"].shape
    keep = {
        "tensor": torch.tensor([3, length - 1]),
        "of each row": torch.tensor([[length - 1, 4]] * batch),
        "slice": slice(-3, None),
        "mask": torch.arange(length) > length - 4,
        "mask of each row": torch.arange(length) > length - 3 - torch.arange(batch)[:, None],
    }[form]
    if "of each row" in form and not hasattr(modeling_utils, "slice_logits_to_keep"):
        keep = torch.tensor([length - 1])
    if isinstance(keep, torch.Tensor):
        (keep,) = put({"keep": keep}).values()
    found, expected = (waits(lambda model=model: model(**put(inputs), logits_to_keep=keep)) for model in (ours, stock))
    # Heads before 5.23 take the same columns of all rows, and which these are is a wait.
    more = int(batch > 1 and not hasattr(modeling_utils, "slice_logits_to_keep"))
    assert found.total() <= expected.total() + more, found - expected


def test_the_prompt_is_checked_before_the_tower_runs():
    """What waits for the device in `forward` is one copy, before anything is queued on it."""
    family, ours, _ = pair("LLaVA")
    ran = []
    ours.model.vision_tower.register_forward_pre_hook(lambda *args: ran.append(dict(Pretended.current.waits)))
    waits(lambda: ours(**put(batch_of(family, 3))))
    (before,) = ran
    assert [wait.rsplit(" ", 1)[1] for wait in before] == ["to_host"]
