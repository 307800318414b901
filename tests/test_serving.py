"""What engines ask for at start and with each request, without an engine: sizes, positions, and what is refused."""

import subprocess
import sys

import pytest
import torch
from tiny import build
from tiny_checkpoint import build_processor, save_checkpoint
from tiny_processor import ask, build_ours, count
from tiny_qwen import IMAGE, VISION_END, VISION_START
from tiny_qwen import build as build_qwen

import modeling_prunesid
from modeling_prunesid import PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor
from modeling_prunesid.families import release_with
from modeling_prunesid.processing import PrunedProcessorMixin


QWEN = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
SIZES = [(28, 28)]


def one_sentence(error) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "value", [0, -1, -5.0, 1.5, "64", "null", b"1", True, [3], [], {"a": 1}, float("nan"), float("inf"), 10**9, 10**30]
)
def test_a_request_with_a_wrong_budget_is_a_value_error(value):
    processor = build_ours()
    calls = [
        lambda: ask(processor, num_visual_tokens=value),
        lambda: ask(processor, images_kwargs={"num_visual_tokens": value}),
        lambda: processor._get_num_multimodal_tokens(image_sizes=SIZES, num_visual_tokens=value),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="num_visual_tokens must be") as error:
            call()
        assert one_sentence(error)


@pytest.mark.parametrize("value", [None, 1, 7, 49, 1000, 1_000_000, 1e-300, 0.5, 1.0])
def test_a_request_gets_the_prompt_that_was_announced(value):
    processor = build_ours()
    announced = processor._get_num_multimodal_tokens(image_sizes=SIZES, num_visual_tokens=value).num_image_tokens
    assert count(ask(processor, num_visual_tokens=value)) == announced
    assert count(ask(processor, images_kwargs={"num_visual_tokens": value})) == announced


def saved(model, folder) -> PrunedProcessorMixin:
    """The processor as an engine loads it, of a saved model."""
    build_processor().save_pretrained(folder)
    arguments = PruneSIDLlavaProcessor.arguments_for(model.config.prunesid_config)
    PruneSIDLlavaProcessor.from_pretrained(folder, **arguments).save_pretrained(folder)
    return PruneSIDLlavaProcessor.from_pretrained(folder)


def test_an_engine_passes_its_own_tokenizer(tmp_path):
    """As vLLM does, with the processor arguments of a server or a request."""
    processor = saved(build(), tmp_path)
    own = build_processor().tokenizer
    loaded = PruneSIDLlavaProcessor.from_pretrained(tmp_path, tokenizer=own, num_visual_tokens=3, unknown=1)
    assert loaded.tokenizer is own
    assert count(ask(loaded)) == [3]
    assert count(ask(PruneSIDLlavaProcessor.from_pretrained(tmp_path, tokenizer=own))) == count(ask(processor)) == [8]
    with pytest.raises(ValueError, match="num_visual_tokens must be at most") as error:
        PruneSIDLlavaProcessor.from_pretrained(tmp_path, tokenizer=own, num_visual_tokens=10**9)
    assert one_sentence(error)


def test_an_engine_gets_the_number_of_each_image_for_itself():
    """vLLM cuts tensors by rows of pixels, of which a tiled image has several: it caches images one by one."""
    processor = build_ours()
    asked = ask(processor, num_images=2, return_text_replacement_offsets=True)
    assert isinstance(asked["num_visual_tokens"], list)
    assert [int(number) for number in asked["num_visual_tokens"]] == [8, 8]
    chat = ask(processor, num_images=2, return_text_replacement_offsets=True, return_offsets_mapping=True)
    assert chat["num_visual_tokens"].tolist() == [8, 8]  # of a chat whose answers are marked, for the model


def test_placeholders_that_see_each_other_are_announced():
    """vLLM knows them by stock model types alone, and would otherwise run our models causally without a word."""
    for family, sees in (("Gemma3", True), ("PaliGemma", True), ("Molmo2", True), ("Llava", False)):
        config = getattr(modeling_prunesid, f"PruneSID{family}Config", None)
        if config is not None:  # Molmo 2 is not in every release
            assert getattr(config(), "is_mm_prefix_lm", False) == sees
            assert "is_mm_prefix_lm" not in config().to_dict()
            assert getattr(modeling_prunesid, f"PruneSID{family}Processor").is_mm_prefix_lm == sees


def test_an_engine_that_may_hide_placeholders_from_each_other_says_so(caplog, monkeypatch):
    """vLLM on CPUs runs stock Gemma 3 causally as well."""
    processor = modeling_prunesid.PruneSIDGemma3Processor.__new__(modeling_prunesid.PruneSIDGemma3Processor)
    processor.num_visual_tokens, processor.dynamic = 8, False
    monkeypatch.setattr(modeling_prunesid.checks, "_said", set())
    with caplog.at_level("WARNING"):
        processor._check_is_served(None)
    assert "can differ from those of `generate`" in caplog.text


def test_dynamic_budgets_of_views_are_refused_at_start(tmp_path):
    processor = saved(build(dynamic=True, reference_information=0.6), tmp_path)
    for value in (None, 8):
        with pytest.raises(ValueError, match="Save the model with budget_scope='image'") as error:
            processor._get_num_multimodal_tokens(image_sizes=SIZES, num_visual_tokens=value)
        assert one_sentence(error)
    assert count(ask(processor)) == [49]  # elsewhere it writes full prompts
    processor = saved(build(dynamic=True, budget_scope="image"), tmp_path)
    assert processor._get_num_multimodal_tokens(image_sizes=SIZES).num_image_tokens == count(ask(processor)) == [8]


def test_deepstack_features_are_refused_at_start():
    """vLLM 0.32 drops them, for stock Qwen3-VL on that backend as well."""
    processor = modeling_prunesid.PruneSIDQwen3VLProcessor.__new__(modeling_prunesid.PruneSIDQwen3VLProcessor)
    with pytest.raises(ValueError, match="without the deepstack features of later ones. Use `transformers") as error:
        processor._get_num_multimodal_tokens(image_sizes=SIZES)
    assert one_sentence(error)
    assert not modeling_prunesid.PruneSIDQwen2VLProcessor.has_deepstack
    assert not PruneSIDLlavaProcessor.has_deepstack


@pytest.mark.parametrize("family", ("Qwen2VL", "Qwen2_5_VL"))
def test_positions_of_the_full_prompt_are_refused_at_start(family):
    cls = getattr(modeling_prunesid, f"PruneSID{family}Processor")
    for positions, budget, request, is_refused in (
        ("original", 1 / 3, None, True),
        ("original", None, None, False),
        ("original", None, 8, True),
        ("contiguous", 1 / 3, None, False),
        ("contiguous", None, 8, False),
    ):
        processor = cls.__new__(cls)  # its parts are not asked for
        processor.num_visual_tokens, processor.dynamic, processor.mrope_positions = budget, False, positions
        if not is_refused:
            processor._check_is_served(request)
            continue
        with pytest.raises(ValueError, match="Save the model with mrope_positions='contiguous'") as error:
            processor._get_num_multimodal_tokens(image_sizes=SIZES, num_visual_tokens=request)
        assert one_sentence(error)


def test_a_model_without_such_positions_is_not_refused():
    assert not PruneSIDLlavaProcessor.has_mrope
    assert build_ours(mrope_positions="original")._get_num_multimodal_tokens(image_sizes=SIZES).num_image_tokens == [8]


def as_vllm_asks(model, ids, grids):
    """Its call of the base model, from `get_mrope_input_positions` of its Transformers backend."""
    types = (ids == IMAGE).int()
    return model.model.get_rope_index(input_ids=ids, mm_token_type_ids=types, image_grid_thw=grids)


@pytest.mark.parametrize("family", QWEN)
def test_contiguous_positions_of_short_prompts_are_those_of_generate(family):
    grids = torch.tensor([[1, 8, 8], [1, 4, 8]])  # 16 and 8 tokens
    images = [[VISION_START, *[IMAGE] * count, VISION_END] for count in (5, 3)]
    ids = torch.tensor([[1, 7, *images[0], 8, *images[1], 9, 10]])
    model = build_qwen(family, mrope_positions="contiguous")
    positions, deltas = as_vllm_asks(model, ids, grids)
    assert torch.equal(positions, torch.arange(ids.shape[1]).expand(3, 1, -1))
    assert deltas.tolist() == [[0]]
    full = [[VISION_START, *[IMAGE] * count, VISION_END] for count in (16, 8)]
    ids = torch.tensor([[1, 7, *full[0], 8, *full[1], 9, 10]])
    stock = build_qwen(family, mrope_positions="original")
    for got, expected in zip(as_vllm_asks(model, ids, grids), as_vllm_asks(stock, ids, grids)):
        assert torch.equal(got, expected)


PICKLED = """
import pickle, sys
import cloudpickle
import modeling_prunesid
from modeling_prunesid import FAMILIES
cloudpickle.register_pickle_by_value(modeling_prunesid)
for stem in sys.argv[1:]:
    config = getattr(modeling_prunesid, f"PruneSID{FAMILIES[stem]}Config")(prunesid_config={"budget": 7})
    again = pickle.loads(cloudpickle.dumps(config))
    assert again.to_dict() == config.to_dict(), stem
    assert again.prunesid_config.budget == 7
    print(stem)
"""


@pytest.mark.contract
def test_configurations_survive_pickling_by_value():
    """As an engine sends them to its workers, in a process of its own: registering is for good."""
    families = ["llava", "llava_next", "internvl", "paligemma", "gemma3", "mistral3", "smolvlm"]
    families += ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"]
    families = [stem for stem in families if release_with(stem) is None]
    run = subprocess.run([sys.executable, "-c", PICKLED, *families], capture_output=True, text=True)
    assert run.stdout.split() == families, run.stderr


def test_a_thin_variant_says_what_makes_a_full_one(tmp_path):
    save_checkpoint(tmp_path / "base")
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", prunesid_config={"budget": 8})
    model.save_pretrained(tmp_path / "thin", thin=True)
    processor = PruneSIDLlavaProcessor.from_pretrained(tmp_path / "thin")
    with pytest.raises(ValueError, match=f"`prunesid convert {tmp_path / 'thin'} --output FOLDER`") as error:
        processor._get_num_multimodal_tokens(image_sizes=SIZES)
    assert one_sentence(error)
    assert count(ask(processor)) == [8]
    processor.save_pretrained(tmp_path / "whole")
    whole = PruneSIDLlavaProcessor.from_pretrained(tmp_path / "whole")
    assert whole._get_num_multimodal_tokens(image_sizes=SIZES).num_image_tokens == [8]
    assert str(tmp_path / "thin") not in (tmp_path / "whole/processor_config.json").read_text()
