"""What we touch of Transformers beyond its public interface: one line names what another release lacks."""

import ast
import importlib
import inspect
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import tiny_qwen
import torch
import transformers
from tiny import NUM_PATCHES as FULL
from tiny import batch, build, pixels, prompt, stock_twin
from transformers import DynamicCache, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling_prunesid import upstream
from modeling_prunesid.families import FAMILIES, release_with
from modeling_prunesid.upstream import CACHE_NAME, cache_of, rename_cache


# Families that a later release brings are absent before it.
ABSENT = {f"modeling_prunesid_{family}" for family in FAMILIES if release_with(family) is not None}
SOURCES = sorted(path for path in Path(upstream.__file__).parent.glob("*.py") if path.stem not in ABSENT)
QWEN = ("qwen2_vl.modeling_qwen2_vl.Qwen2VL", "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VL")
QWEN = (*QWEN, "qwen3_vl.modeling_qwen3_vl.Qwen3VL")
STOCK = (
    "llava.modeling_llava.Llava",
    "llava_next.modeling_llava_next.LlavaNext",
    "video_llava.modeling_video_llava.VideoLlava",
    *QWEN,
)
# Overridden, called or set, by its place.
TOUCHED = [
    "configuration_utils.PreTrainedConfig._attn_implementation",
    "generation.GenerationMixin._expand_multimodal_outputs",
    "generation.GenerationMixin._get_candidate_generator",
    "generation.GenerationMixin._merge_criteria_processor_list",
    "integrations.peft.PeftAdapterMixin._hf_peft_config_loaded",
    "modeling_utils.PreTrainedModel._from_config",
    "modeling_utils.PreTrainedModel.register_for_auto_class",
    "models.llava.processing_llava.LlavaProcessor._get_num_multimodal_tokens",
    "models.llava_next.processing_llava_next.LlavaNextProcessor._get_num_multimodal_tokens",
    "processing_utils.ProcessorMixin._merge_kwargs",
    "processing_utils.ProcessorMixin._process_images",
    "processing_utils.ProcessorMixin._process_videos",
    "processing_utils.ProcessorMixin.replace_image_token",
    "processing_utils.ProcessorMixin.replace_video_token",
    "processing_utils.ProcessorMixin.validate_init_kwargs",
    "cache_utils.Cache.get_mask_sizes",
    "models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "models.auto.modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    *(f"models.{name}Model.{method}" for name in STOCK for method in ("get_image_features", "get_placeholder_mask")),
    *(f"models.{name}{kind}.forward" for name in STOCK for kind in ("Model", "ForConditionalGeneration")),
    *(f"models.{name}Model.compute_3d_position_ids" for name in QWEN),
    *(f"models.{name}Model.get_rope_index" for name in QWEN),
]
# Set on an instance, where the class has none.
OF_CONFIGURATIONS = ("_attn_implementation_internal",)
# Private names of PyTorch, Accelerate and `typing`.
OF_OTHERS = {"_assert_async", "_defaults", "_mkl_linear", "_mkl_reorder_linear_weight", "_old_forward", "_orig_mod"}
# What upstream takes the cache by.
NAMES = sorted({"past_key_values", CACHE_NAME})
# Arguments that we pass or read, by the function that takes them.
ARGUMENTS = {
    "modeling_utils.PreTrainedModel.save_pretrained": ("is_main_process", "push_to_hub"),
    **{f"models.{name}Model.forward": ("attention_mask", "position_ids", "mm_encoder_outputs") for name in STOCK},
    **{f"models.{name}ForConditionalGeneration.forward": ("labels", "logits_to_keep") for name in STOCK},
    **{f"models.{name}Model.compute_3d_position_ids": ("inputs_embeds", CACHE_NAME) for name in QWEN},
    "models.llama.modeling_llama.LlamaDecoderLayer.forward": ("position_embeddings", CACHE_NAME),
}
CONVERSIONS = ("llava", "LlavaModel", "llava_next", "LlavaNextModel", "video_llava", "VideoLlavaModel")
# Qwen3-VL's checkpoints have the names of its modules.
CONVERSIONS += tuple(
    family + part for family in ("Qwen2VL", "Qwen2_5_VL") for part in ("Model", "ForConditionalGeneration")
)


def find(path):
    """What `path`, below `transformers`, names; None if it is not there."""
    found = transformers
    for name in path.split("."):
        inside = getattr(found, name, None)
        if inside is None and inspect.ismodule(found):
            try:
                inside = importlib.import_module(f"{found.__name__}.{name}")
            except ImportError:
                return None
        found = inside
    return found


def imported(source):
    """The names that a file of ours imports from `transformers`, by their place below it."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            place = node.module.split(".")[1:]
            yield from (".".join([*place, name.name]) for name in node.names)


def private(source):
    """The private attributes that a file of ours uses, and the names that it defines or gives `self`."""
    used, own = set(), set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            is_own = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
            (own if is_own else used).add(node.attr)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
    return used, own


def test_the_list_has_every_private_attribute_that_we_use():
    found = [private(source) for source in SOURCES]
    used, own = (set().union(*names) for names in zip(*found))
    known = {path.rpartition(".")[2] for path in TOUCHED} | {*OF_CONFIGURATIONS} | OF_OTHERS | own
    ours = {name for name in used if name.startswith("_prunesid")} | {"_says_what_it_keeps"}
    assert used <= known | ours, f"add them to TOUCHED: {sorted(used - known - ours)}"


def test_this_release_has_every_name_that_we_touch():
    names = {*TOUCHED, *(name for source in SOURCES for name in imported(source))}
    lacking = sorted(name for name in names if find(name) is None)
    for path, wanted in ARGUMENTS.items():
        parameters = inspect.signature(find(path)).parameters if find(path) is not None else {}
        lacking += [f"{path}({name}=)" for name in wanted if name not in parameters]
    lacking += [f"PreTrainedConfig().{name}" for name in OF_CONFIGURATIONS if not hasattr(PreTrainedConfig(), name)]
    lacking += [f"conversion mapping of {name}" for name in CONVERSIONS if not get_checkpoint_conversion_mapping(name)]
    if CACHE_NAME not in {field.name for field in fields(CausalLMOutputWithPast)}:
        lacking.append("the cache of CausalLMOutputWithPast by a known name")
    assert not lacking, f"Transformers {transformers.__version__} lacks: {', '.join(lacking)}"


def test_the_list_names_what_is_missing():
    assert find("generation.GenerationMixin._no_such_method") is None
    assert find("no_such_module.Thing") is None


class TestEitherName:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_second_turn(self, ours, name):
        ids, image = torch.tensor([prompt([FULL], [7, 8])]), {"pixel_values": pixels(1)}
        settings = {"max_new_tokens": 3, "do_sample": False}
        cache = DynamicCache()
        answered = ours.generate(ids, **image, **{name: cache}, **settings)
        chat = torch.cat([answered, torch.tensor([[9, 10]])], dim=1)
        expected = ours.generate(chat, **image, **settings)
        assert torch.equal(ours.generate(chat, **image, **{name: cache}, **settings), expected)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
    @torch.no_grad()
    def test_a_step_of_ones_own_loop(self, family, name):
        ours = tiny_qwen.build(family).double()
        row = tiny_qwen.prompt(family, 5, ("image", (1, 8, 8)), 6, 7)
        inputs = tiny_qwen.batch(family, row)
        longer = tiny_qwen.batch(family, (row[0] + [11], row[1]))
        cache = cache_of(ours(**inputs, use_cache=True))
        expected = ours(**longer).logits[:, -1]
        ours(**tiny_qwen.batch(family, tiny_qwen.prompt(family, ("image", (1, 4, 12)), 6)))  # sets other deltas
        torch.testing.assert_close(ours(input_ids=torch.tensor([[11]]), **{name: cache}).logits[:, -1], expected)

    def test_both_names_are_upstreams_affair(self):
        assert rename_cache({"cache": 1, "past_key_values": 2}) == {"cache": 1, "past_key_values": 2}
        assert rename_cache({"past_key_values": 2, "use_cache": True}) == {CACHE_NAME: 2, "use_cache": True}


def test_no_warning_of_a_deprecated_name(ours, caplog):
    """Upstream logs the old names of fields once a process, and warns of those of arguments."""
    transformers.utils.logging.get_logger("transformers").addHandler(caplog.handler)
    transformers.utils.generic.logger.warning_once.cache_clear()
    inputs = batch([prompt([FULL], [7]), prompt([FULL], [7, 8])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(**inputs, pixel_values=pixels(2), use_cache=True)
        ours.generate(**inputs, pixel_values=pixels(2), max_new_tokens=2, do_sample=False)
    assert "past_key_values" not in caplog.text


def test_off_is_stock_by_the_installed_name():
    ours = build(budget=None)
    inputs = {"input_ids": torch.tensor([prompt([FULL], [7])]), "pixel_values": pixels(1), "use_cache": True}
    got, expected = ours(**inputs), stock_twin(ours)(**inputs)
    assert torch.equal(got.logits, expected.logits)
    assert cache_of(got).get_seq_length() == cache_of(expected).get_seq_length()
