"""
Folders: stock checkpoints load into our class, our weights load into the stock class, and a process that cannot import
our package loads all of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clean_process import LOAD, run_clean
from safetensors.torch import load_file
from tiny import BUDGET, NUM_PATCHES, build, pixels, prompt, stock_twin
from tiny_checkpoint import build_processor, picture, save_checkpoint
from transformers import AutoModel, AutoModelForImageTextToText, LlavaForConditionalGeneration, pipeline

from modeling_prunesid import (
    PruneSIDConfig,
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaModel,
    PruneSIDLlavaProcessor,
)


GREEDY = {"max_new_tokens": 6, "do_sample": False}
LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys")


TWO_PROCESSES = """
import os, sys
import torch
from modeling_prunesid import PruneSIDLlavaForConditionalGeneration

model = PruneSIDLlavaForConditionalGeneration.from_pretrained(sys.argv[1], tp_plan="auto")
tokens = model.generate(**torch.load(f"{sys.argv[2]}/inputs.pt"), max_new_tokens=6, do_sample=False)
weight = model.model.language_model.layers[0].self_attn.q_proj.weight
local = weight.to_local() if hasattr(weight, "to_local") else weight
torch.save((tokens, len(local)), f"{sys.argv[2]}/{os.environ['RANK']}.pt")
"""


# A repo without our package: settings of its own method alone, and saved again with what it carries.
CARRIED = """
import json, sys
from pathlib import Path

sys.modules["modeling_prunesid"] = None
import torch
from transformers import AutoModelForImageTextToText

folder, other = Path(sys.argv[1]), sys.argv[2]
trust = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
output = model.get_image_features(torch.randn(1, 3, 28, 28), return_dict=True)
report = {"kept": len(output.keep_indices[0]), "refused": []}
try:
    AutoModelForImageTextToText.from_pretrained(folder, prunesid_config={"method": other}, **trust)
except ValueError as error:
    report["refused"].append(str(error))
model.config.prunesid_config.method = other
try:
    model.get_image_features(torch.randn(1, 3, 28, 28))
except ValueError as error:
    report["refused"].append(str(error))
assert len(report["refused"]) == 2
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
try:
    model.save_pretrained(folder.with_name("thin"), thin=True)
except ImportError as error:
    report["thin"] = str(error)
copy = folder.with_name("copy")
model.save_pretrained(copy)
report["code of the copy"] = sorted(path.name for path in copy.glob("*.py"))
again = AutoModelForImageTextToText.from_pretrained(copy, **trust)
report["saved again"] = again.config.prunesid_config.method
assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("base"))


def load(folder, model_class=PruneSIDLlavaForConditionalGeneration, **kwargs):
    """A model of which every weight was loaded."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[name] for name in LISTS), info
    return model.eval()


def from_base(base, **settings):
    return load(base, prunesid_config=PruneSIDConfig(budget=BUDGET, **settings))


@pytest.fixture(scope="module")
def variant(base, tmp_path_factory):
    """A saved PruneSID model, made from the stock checkpoint."""
    folder = tmp_path_factory.mktemp("variant")
    from_base(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clean(variant, tmp_path_factory):
    """What a process finds that cannot import our package."""
    return run_clean(LOAD, tmp_path_factory.mktemp("home"), variant)


class TestStockCheckpoint:
    def test_every_weight_is_loaded_and_nothing_is_left_over(self, base):
        model = from_base(base)
        stock = LlavaForConditionalGeneration.from_pretrained(base)
        expected = stock.state_dict()
        got = model.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)

    def test_settings_may_be_a_dict(self, base):
        model = load(base, prunesid_config={"budget": 5, "layer": -3})
        assert (model.config.prunesid_config.budget, model.config.prunesid_config.layer) == (5, -3)

    def test_off_is_the_stock_answer(self, base):
        model, stock = (
            load(base, prunesid_config={"budget": None}),
            LlavaForConditionalGeneration.from_pretrained(base),
        )
        inputs = {"input_ids": torch.tensor([prompt([NUM_PATCHES], [7])]), "pixel_values": pixels(1)}
        assert torch.equal(model.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))

    def test_the_generation_config_is_the_bases(self, base):
        assert from_base(base).generation_config.max_new_tokens == 6

    def test_the_base_model_alone(self, base):
        model, info = PruneSIDLlavaModel.from_pretrained(base, output_loading_info=True)
        assert not info["missing_keys"]
        expected = LlavaForConditionalGeneration.from_pretrained(base).model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


class TestSavedWeights:
    def test_they_are_the_bases_byte_for_byte(self, base, variant):
        assert Path(variant, "model.safetensors").read_bytes() == Path(base, "model.safetensors").read_bytes()

    def test_the_stock_class_reads_them(self, base, variant):
        config = LlavaForConditionalGeneration.from_pretrained(base).config
        stock = load(variant, LlavaForConditionalGeneration, config=config)
        expected = load_file(Path(base, "model.safetensors"))
        stock.save_pretrained(Path(variant, "again"))
        again = load_file(Path(variant, "again", "model.safetensors"))
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[name], expected[name]) for name in expected)

    def test_our_class_reads_them(self, base, variant):
        inputs = {"input_ids": torch.tensor([prompt([NUM_PATCHES], [7])]), "pixel_values": pixels(1)}
        assert torch.equal(load(variant).generate(**inputs, **GREEDY), from_base(base).generate(**inputs, **GREEDY))

    def test_shards(self, base, tmp_path):
        model = from_base(base)
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        loaded = load(tmp_path)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())

    def test_sharded_stock_checkpoints(self, base, tmp_path):
        save_checkpoint(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        expected = from_base(base).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in from_base(tmp_path).state_dict().items())


class TestSavedFolder:
    def test_the_configuration_names_our_classes(self, variant):
        config = json.loads(Path(variant, "config.json").read_text())
        assert config["model_type"] == "prunesid_llava"
        assert config["architectures"] == ["PruneSIDLlavaForConditionalGeneration"]
        assert config["auto_map"] == {
            "AutoConfig": "modeling_prunesid_llava.PruneSIDLlavaConfig",
            "AutoModel": "modeling_prunesid_llava.PruneSIDLlavaAutoModel",
            "AutoModelForImageTextToText": "modeling_prunesid_llava.PruneSIDLlavaForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_prunesid_llava.PruneSIDLlavaForConditionalGeneration",
            "AutoProcessor": "modeling_prunesid_llava.PruneSIDLlavaProcessor",
        }

    def test_every_module_that_is_imported_is_there(self, variant):
        modules = {path.stem for path in Path(variant).glob("*.py")}
        assert {"configuration_prunesid", "modeling_prunesid_llava", "processing", "method_paper"} <= modules
        assert not modules & {
            "publishing",
            "card",
            "method_release",
            "method_spread",
            "co_pruning",
            "qwen_vl",
            "tower_crops",
            "attention",
            "retired",
        }
        for path in Path(variant).glob("*.py"):
            for line in path.read_text().splitlines():
                if line.strip().startswith("from ."):
                    assert line.split()[1].removeprefix(".") in modules, f"{path.name}: {line}"

    def test_settings_survive(self, base, tmp_path):
        from_base(base, method="release", method_settings={"center": "tokens"}).save_pretrained(tmp_path)
        settings = load(tmp_path).config.prunesid_config
        got = (settings.budget, settings.method, settings.method_settings)
        assert got == (BUDGET, "release", {"center": "tokens"})

    def test_a_saved_setting_may_be_changed_on_loading(self, variant):
        model = load(variant, prunesid_config={"budget": 3})
        assert model.config.prunesid_config.budget == 3
        assert len(model.get_image_features(pixels(1)).keep_indices[0]) == 3

    def test_saving_twice_gives_the_same_folder(self, variant, tmp_path):
        load(variant).save_pretrained(tmp_path)
        for name in ("config.json", "model.safetensors", "modeling_prunesid_llava.py", "processor_config.json"):
            assert Path(tmp_path, name).read_bytes() == Path(variant, name).read_bytes(), name

    def test_no_code_is_there_that_no_other_imports(self, variant):
        """What a user of `trust_remote_code` has to read."""
        folder = Path(variant)
        imported = {"modeling_prunesid_llava"}
        for path in folder.glob("*.py"):
            imported |= {line.split()[1][1:] for line in path.read_text().splitlines() if line.startswith("from .")}
        assert {path.stem for path in folder.glob("*.py")} == imported

    @pytest.mark.contract
    @pytest.mark.parametrize("method", ["paper", "release", "spread"])
    def test_a_repo_carries_its_own_method_and_names_it_where_another_is_asked_for(self, base, tmp_path, method):
        folder, home = tmp_path / "variant", tmp_path / "home"
        from_base(base, method=method).save_pretrained(folder)
        assert [path.stem for path in folder.glob("method_*.py")] == [f"method_{method}"]
        other = "spread" if method == "paper" else "paper"
        report = run_clean(CARRIED, home, folder, other)
        assert report["kept"] == BUDGET and report["saved again"] == method
        message = f"prunesid_config.method must be one of ('{method}',), got '{other}'"
        assert all(message in refused for refused in report["refused"]), report
        assert sorted(path.name for path in folder.glob("*.py")) == report["code of the copy"]
        assert "thin=True needs the package prunesid-transformers" in report["thin"]

    def test_the_base_model_is_saved_for_auto_model_alone(self, tmp_path):
        build().model.save_pretrained(tmp_path)
        config = json.loads(Path(tmp_path, "config.json").read_text())
        assert config["architectures"] == ["PruneSIDLlavaModel"]
        assert config["auto_map"]["AutoModel"] == "modeling_prunesid_llava.PruneSIDLlavaModel"


class TestCleanProcess:
    @pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"])
    def test_every_auto_class_gives_a_model_that_answers(self, clean, variant, auto_class):
        found = clean[auto_class]
        assert found["class"] == "PruneSIDLlavaForConditionalGeneration"
        assert found["keys"] == []
        assert found["answer"] == clean["AutoModel"]["answer"]
        assert len(found["answer"][0]) == clean["length"] + 6
        assert found["parameters"] == sum(parameter.numel() for parameter in build().parameters())

    def test_from_config_gives_engines_the_base_model(self, clean):
        assert clean["AutoModel"]["from_config"] == "PruneSIDLlavaModel"
        assert clean["AutoModelForImageTextToText"]["from_config"] == "PruneSIDLlavaForConditionalGeneration"

    def test_configuration_and_processor(self, clean):
        assert clean["config"] == "PruneSIDLlavaConfig"
        assert clean["processor"] == "PruneSIDLlavaProcessor"
        assert clean["length"] == BUDGET + 2

    def test_the_pipeline_answers_chats_alone_and_in_batches(self, clean):
        assert clean["one chat"].split()
        assert clean["two chats"] == [clean["one chat"]] * 2


class TestInThisProcess:
    def test_auto_model_gives_a_model_that_can_generate(self, variant):
        model, info = AutoModel.from_pretrained(variant, output_loading_info=True)
        assert not any(info[name] for name in LISTS)
        assert type(model) is PruneSIDLlavaForConditionalGeneration
        assert type(AutoModel.from_config(model.config)) is PruneSIDLlavaModel

    def test_the_pipeline_answers_alike_with_the_stock_processor(self, variant):
        model = load(variant, AutoModelForImageTextToText)
        ask = {"text": "<image> word7 word8", "images": [picture()], "max_new_tokens": 4, "return_full_text": False}
        processors = (build_processor(), PruneSIDLlavaProcessor.from_pretrained(variant))
        answers = [pipeline("image-text-to-text", model=model, processor=each)(**ask) for each in processors]
        texts = [answer[0]["generated_text"] for answer in answers]
        assert texts[0].split() and texts[0] == texts[1]


class TestPlacement:
    """Accelerate's hooks move weights to where a submodule's own `forward` runs."""

    @pytest.fixture
    def inputs(self):
        return {"input_ids": torch.tensor([prompt([NUM_PATCHES] * 2, [7, 8])]), "pixel_values": pixels(2)}

    @pytest.mark.parametrize("offloaded", ["vision_tower", "multi_modal_projector", "language_model"])
    def test_a_part_on_disk_gives_the_same_tokens(self, variant, inputs, tmp_path, offloaded):
        expected = load(variant).generate(**inputs, **GREEDY)
        parts = ("vision_tower", "multi_modal_projector", "language_model")
        device_map = {f"model.{part}": "disk" if part == offloaded else "cpu" for part in parts} | {"lm_head": "cpu"}
        model = PruneSIDLlavaForConditionalGeneration.from_pretrained(
            variant, device_map=device_map, offload_folder=tmp_path
        )
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtypes(self, variant, inputs, dtype):
        model = load(variant, dtype=dtype)
        assert model.dtype == dtype
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 6

    @pytest.mark.slow
    def test_two_processes_share_the_language_model(self, variant, inputs, tmp_path):
        """Each selects by itself, and both agree."""
        script = tmp_path / "two.py"
        script.write_text(TWO_PROCESSES)
        torch.save(inputs, tmp_path / "inputs.pt")
        root = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            + [str(script), str(variant), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        expected = load(variant).generate(**inputs, **GREEDY)
        for rank in range(2):
            tokens, local_rows = torch.load(tmp_path / f"{rank}.pt")
            assert torch.equal(tokens, expected)
            assert local_rows == 16  # of 32

    def test_the_stock_twin_of_a_loaded_model(self, variant, inputs):
        model = load(variant)
        model.config.prunesid_config.budget = None
        assert torch.equal(model(**inputs).logits, stock_twin(model)(**inputs).logits)
