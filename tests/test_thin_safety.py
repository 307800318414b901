"""Thin variants are safe to trust: no code of the base runs unasked, the base is pinned, the weights are its own."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import tiny_qwen
import torch
from clean_process import run_clean
from hub_server import TOKEN, Hub
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from tiny import build, stock_twin
from tiny_checkpoint import load_variant, picture, save_checkpoint
from tiny_vitcop import build_vitcop
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor


ROOT = Path(__file__).parents[1]
NUMBER_CODE = "import pathlib\npathlib.Path({witness!r}).touch()\n"
# What the base brings: a tokenizer and an image processor of its own, and another `generate`.
BASE_CODE = """
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
class OwnImageProcessor(CLIPImageProcessorPil):
    pass
def generate(model, *args, custom_generate=None, **kwargs):
    return "of the base"
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base")


def load(folder, **kwargs):
    return PruneSIDLlavaForConditionalGeneration.from_pretrained(folder, **kwargs)


@pytest.fixture
def model(base):
    return load_variant(base)


def edit(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


class TestCodeOfTheBase:
    @pytest.fixture
    def witness(self, tmp_path):
        """The file that the base's code makes when it runs."""
        return tmp_path / "witness"

    @pytest.fixture
    def coded(self, base, thin, tmp_path, witness):
        """The thin variant, of a base that now has Python files of its own."""
        folder = shutil.copytree(base, tmp_path / "coded")
        code = NUMBER_CODE.format(witness=str(witness)) + BASE_CODE
        (folder / "own.py").write_text(code)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
        edit(
            folder / "tokenizer_config.json",
            lambda fields: fields.update(
                tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]}
            ),
        )

        def own_image_processor(fields):
            fields["image_processor"].update(
                image_processor_type="OwnImageProcessor", auto_map={"AutoImageProcessor": "own.OwnImageProcessor"}
            )

        edit(folder / "processor_config.json", own_image_processor)
        for file in ("config.json", "processor_config.json"):
            text = (thin / file).read_text()
            (thin / file).write_text(text.replace(json.dumps(str(base)), json.dumps(str(folder))))
        (thin / "generation_config.json").unlink()  # so that the base's is read, and with it its `custom_generate`
        return thin

    def test_a_model_runs_none_unasked(self, coded, witness):
        model = load(coded, trust_remote_code=True)
        assert not witness.exists()
        assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1).shape == (1, 4)

    def test_a_model_runs_it_where_it_is_asked_to(self, coded, witness):
        load(coded, trust_remote_code=True, base_trust_remote_code=True)
        assert witness.exists()

    def test_a_processor_that_needs_it_says_so(self, coded, witness):
        with pytest.raises(ValueError, match="base .* Python files of its own.*pass `base_trust_remote_code=True`"):
            AutoProcessor.from_pretrained(coded, trust_remote_code=True)
        assert not witness.exists()
        processor = AutoProcessor.from_pretrained(coded, trust_remote_code=True, base_trust_remote_code=True)
        assert type(processor.tokenizer).__name__ == "OwnTokenizer" and witness.exists()

    def test_a_tokenizer_is_a_stock_one_unless_it_is_asked_for(self, coded, witness):
        AutoTokenizer.from_pretrained(coded, trust_remote_code=True)
        assert not witness.exists()
        tokenizer = AutoTokenizer.from_pretrained(coded, trust_remote_code=True, base_trust_remote_code=True)
        assert type(tokenizer).__name__ == "OwnTokenizer" and witness.exists()

    def test_an_image_processor_is_that_of_the_variant(self, coded, witness):
        AutoImageProcessor.from_pretrained(coded, trust_remote_code=True)
        assert not witness.exists()

    def test_the_card_says_what_runs(self, thin, model, tmp_path):
        card = " ".join((thin / "README.md").read_text().split())
        assert "runs the Python files of this repo and no other" in card
        assert "only with `base_trust_remote_code=True`" in card
        model.save_pretrained(tmp_path / "full")
        assert "base_trust_remote_code" not in (tmp_path / "full" / "README.md").read_text()

    def test_a_full_variant_has_no_base_to_trust(self, model, tmp_path):
        model.save_pretrained(tmp_path / "full")
        load(tmp_path / "full", base_trust_remote_code=True)
        PruneSIDLlavaProcessor.from_pretrained(tmp_path / "full", base_trust_remote_code=True)


PUBLISH = """
import importlib
import json
from pathlib import Path
from tiny_checkpoint import build_processor, save_checkpoint
from tiny import build, stock_twin
from transformers import LlavaForConditionalGeneration
from modeling_prunesid import PruneSIDLlavaForConditionalGeneration as Ours
from prunesid_cli.command import main

stock = LlavaForConditionalGeneration.from_pretrained(save_checkpoint(Path("stock")))
commits = []
stock.push_to_hub("owner/base")
commits.append(build_processor().push_to_hub("owner/base").oid)
model = Ours.from_pretrained("owner/base", prunesid_config={"budget": 8})
main(["convert", "owner/base", "--budget", "8", "--thin", "--output", "converted"])
commits.append(stock_twin(build(seed=1)).push_to_hub("owner/base").oid)  # main moves on
model.save_pretrained("saved", thin=True)
model.push_to_hub("owner/thin", thin=True)
loaded = Ours.from_pretrained("owner/thin")
same = all((value == model.state_dict()[name]).all().item() for name, value in loaded.state_dict().items())
config = Path("saved/config.json")
config.write_text(config.read_text().replace(json.dumps(commits[0]), "null"))  # as saved by an earlier version
moved = Ours.from_pretrained("saved")
moved.save_pretrained("again", thin=True)
model.config.prunesid_config.base_model_name_or_path = "owner/base"
model.config.prunesid_config.base_model_revision = "main"  # and no longer what was loaded
try:
    model.save_pretrained("newest", thin=True)
except ValueError as error:
    refused = str(error)
print(json.dumps({"commits": commits, "same": same, "refused": refused}))
"""


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    paths = [str(ROOT), str(ROOT / "tests")]
    script = f"import sys\nsys.path[:0] = {paths!r}\n{PUBLISH}"
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return home, run_clean(script, home, **environment)


@pytest.mark.contract
class TestPinnedBase:
    def test_saving_and_converting_name_the_commit_that_was_loaded(self, published):
        home, report = published
        for folder, commit in (("converted", 0), ("again", 1)):
            for file in ("config.json", "processor_config.json"):
                fields = json.loads((home / folder / file).read_text())
                found = fields.get("prunesid_config", fields)["base_model_revision"]
                assert found == report["commits"][commit], f"{folder}/{file}"

    def test_pushing_names_it_though_main_has_moved(self, published, hub):
        _, report = published
        config = json.loads(hub.files("owner/thin")["config.json"])
        assert config["prunesid_config"]["base_model_revision"] == report["commits"][0]
        assert report["same"]
        assert f"commit `{report['commits'][0]}`" in hub.files("owner/thin")["README.md"].decode()

    def test_other_weights_of_the_newest_commit_are_refused(self, published):
        assert "are not those of its base 'owner/base'" in published[1]["refused"]


class TestWeightsOfTheBase:
    def refuse(self, model, tmp_path, match):
        with pytest.raises(ValueError, match=match):
            model.save_pretrained(tmp_path / "refused", thin=True)
        assert not (tmp_path / "refused").exists()

    def test_resized_embeddings_are_refused(self, model, tmp_path):
        model.resize_token_embeddings(128)
        self.refuse(model, tmp_path, "2 of this model's are not those of its base .*embed_tokens.*resized")

    @pytest.mark.parametrize("name", ["model.vision_tower", "model.multi_modal_projector", "lm_head"])
    def test_one_changed_number_is_refused(self, model, tmp_path, name):
        parameters = dict(model.get_submodule(name).named_parameters())
        part, parameter = next(item for item in parameters.items() if item[1].dim() == 2)
        parameter.data.view(-1)[-1] += 1e-3
        self.refuse(model, tmp_path, f"1 of this model's are not those of its base .*{name}.{part}")

    def test_swapped_layers_are_refused(self, model, tmp_path):
        layers = model.model.language_model.layers
        layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp
        self.refuse(model, tmp_path, "6 of this model's are not those of its base")

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
    def test_merged_adapters_are_refused(self, model, tmp_path):
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        self.refuse(model, tmp_path, "are not those of its base")
        self.refuse(adapted.merge_and_unload(), tmp_path, "are not those of its base .*q_proj")

    def test_other_weights_of_the_same_shape_are_refused(self, base, tmp_path):
        other = build(seed=1)
        other.config.prunesid_config.base_model_name_or_path = str(base)
        self.refuse(other, tmp_path, "are not those of its base")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_dtype_is_no_change(self, base, tmp_path, dtype):
        load(base, dtype=dtype).save_pretrained(tmp_path / "thin", thin=True)
        assert load(tmp_path / "thin", dtype="auto").dtype == dtype

    def test_weights_on_disk_are_compared(self, base, tmp_path):
        parts = ("vision_tower", "multi_modal_projector", "language_model")
        device_map = {f"model.{part}": "disk" if part == "language_model" else "cpu" for part in parts} | {
            "lm_head": "cpu"
        }
        model = load(base, device_map=device_map, offload_folder=tmp_path / "offload")
        model.save_pretrained(tmp_path / "thin", thin=True)
        weights = load_file(base / "model.safetensors")
        name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
        other = shutil.copytree(base, tmp_path / "other")
        save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
        model.config.prunesid_config.base_model_name_or_path = str(other)
        self.refuse(model, tmp_path, "1 of this model's are not those of its base .*layers.1.mlp.down_proj")

    def test_tied_weights_and_shards(self, tmp_path):
        stock = stock_twin(build(text={"tie_word_embeddings": True}))
        stock.config.tie_word_embeddings = stock.config.text_config.tie_word_embeddings = True
        stock.tie_weights()
        stock.save_pretrained(tmp_path / "tied", max_shard_size="100KB")
        model = load(tmp_path / "tied")
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        model.save_pretrained(tmp_path / "thin", thin=True)
        with torch.no_grad():
            model.lm_head.weight[0] += 1
        self.refuse(model, tmp_path, "1 of this model's are not those of its base")

    def test_a_base_without_weights_cannot_be_compared(self, model, base, tmp_path):
        empty = shutil.copytree(base, tmp_path / "empty")
        (empty / "model.safetensors").unlink()
        model.config.prunesid_config.base_model_name_or_path = str(empty)
        with pytest.raises(OSError, match="thin=True compares the weights .* has no model.safetensors"):
            model.save_pretrained(tmp_path / "thin", thin=True)


def nested(depth):
    return "[" * depth + "]" * depth


class TestBrokenFiles:
    def test_no_revision_is_the_newest(self, thin, model):
        edit(thin / "config.json", lambda fields: fields["prunesid_config"].pop("base_model_revision"))
        edit(thin / "processor_config.json", lambda fields: fields.pop("base_model_revision"))
        assert PruneSIDLlavaProcessor.from_pretrained(thin).num_visual_tokens == 8
        assert load(thin).config.prunesid_config.budget == 8

    @pytest.mark.parametrize(
        "content", ["null", "5", '"text"', "[]", "{", '{"a": ' + nested(200) + "}", nested(100_000)]
    )
    @pytest.mark.parametrize("file", ["config.json", "generation_config.json", "processor_config.json"])
    def test_a_file_that_is_no_object(self, thin, file, content):
        (thin / file).write_text(content)
        part = PruneSIDLlavaProcessor if file == "processor_config.json" else PruneSIDLlavaForConditionalGeneration
        with pytest.raises(ValueError, match=f"{file} of .*thin must hold a JSON object, but"):
            part.from_pretrained(thin)

    @pytest.mark.parametrize("value", [5, True, [], {}, ""])
    @pytest.mark.parametrize("name", ["base_model_name_or_path", "base_model_revision"])
    def test_a_base_that_is_no_name(self, thin, name, value):
        edit(thin / "config.json", lambda fields: fields["prunesid_config"].update({name: value}))
        edit(thin / "processor_config.json", lambda fields: fields.update({name: value}))
        for part in (PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor):
            with pytest.raises(ValueError, match=f"{name} must be a non-empty string"):
                part.from_pretrained(thin)

    def test_settings_that_are_no_preset(self, thin):
        edit(thin / "config.json", lambda fields: fields.update(prunesid_config="text"))
        with pytest.raises(ValueError, match="prunesid_config in config.json of .* must be a JSON object or null"):
            load(thin)
        with pytest.raises(ValueError, match="A preset must be .* or one of"):
            AutoConfig.from_pretrained(thin)

    @pytest.mark.parametrize("value", [5, [], True])
    def test_settings_that_are_no_object(self, thin, value):
        edit(thin / "config.json", lambda fields: fields.update(prunesid_config=value))
        with pytest.raises(ValueError, match="prunesid_config in config.json of .* must be a JSON object or null"):
            load(thin)
        with pytest.raises(
            StrictDataclassFieldValidationError, match="Field 'prunesid_config' with value .* any type"
        ):
            AutoConfig.from_pretrained(thin)

    def test_settings_that_are_null_are_the_defaults(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        edit(tmp_path / "config.json", lambda fields: fields.update(prunesid_config=None))
        assert load(tmp_path).config.prunesid_config.budget == 64


class TestPartsOfTheProcessor:
    @pytest.mark.contract
    def test_auto_tokenizer_and_auto_image_processor(self, thin, base, tmp_path):
        script = f"""
import importlib
import json
from transformers import AutoImageProcessor, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(thin)!r}, trust_remote_code=True)
images = AutoImageProcessor.from_pretrained({str(thin)!r})
print(json.dumps([tokenizer("word7 <image> word8").input_ids, type(images).__name__, images.crop_size["height"]]))
"""
        expected = AutoTokenizer.from_pretrained(base), AutoImageProcessor.from_pretrained(base)
        assert run_clean(script, tmp_path) == [
            expected[0]("word7 <image> word8").input_ids,
            type(expected[1]).__name__,
            expected[1].crop_size["height"],
        ]

    def test_a_budget_of_none_is_the_saved_one(self, thin, model, tmp_path):
        model.save_pretrained(tmp_path / "full")
        for folder in (thin, tmp_path / "full"):
            for auto_class in (AutoProcessor, PruneSIDLlavaProcessor):
                processor = auto_class.from_pretrained(folder, num_visual_tokens=None)
                assert processor(text="<image>", images=picture())["num_visual_tokens"] == [8]
                assert auto_class.from_pretrained(folder, num_visual_tokens=4).num_visual_tokens == 4

    def test_a_dynamic_variant_of_a_full_one_has_no_budget(self, model, tmp_path):
        model.save_pretrained(tmp_path / "full")
        settings = {"dynamic": True, "reference_information": 0.5}
        load(tmp_path / "full", prunesid_config=settings).save_pretrained(tmp_path / "dynamic")
        assert PruneSIDLlavaProcessor.from_pretrained(tmp_path / "dynamic").num_visual_tokens is None

    def test_saving_with_weights_over_a_thin_variant_leaves_nothing_of_it(self, thin, model, base):
        model.save_pretrained(thin)
        assert "base_model_name_or_path" not in json.loads((thin / "processor_config.json").read_text())
        assert "BaseTokenizer" not in (thin / "tokenizer_config.json").read_text()
        assert (
            AutoTokenizer.from_pretrained(thin)("word7").input_ids
            == AutoTokenizer.from_pretrained(base)("word7").input_ids
        )


@pytest.mark.contract
class TestTravellingCode:
    def test_two_folders_of_one_name_keep_their_own(self, model, tmp_path):
        for name in ("first", "second"):
            model.save_pretrained(tmp_path / name / "variant", thin=True)
            path = tmp_path / name / "variant" / "selection.py"
            path.write_text(path.read_text() + f"\nWHOSE = {name!r}\n")
        script = f"""
import json, sys
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
found = []
for folder in ({str(tmp_path / "first" / "variant")!r}, {str(tmp_path / "second" / "variant")!r}):
    for auto_class in (AutoModelForImageTextToText, AutoModel, AutoProcessor):
        loaded = auto_class.from_pretrained(folder, trust_remote_code=True)
        package = type(loaded).__module__.rpartition(".")[0]
        found.append(sys.modules[f"{{package}}.selection"].WHOSE)
print(json.dumps(found))
"""
        assert run_clean(script, tmp_path) == ["first"] * 3 + ["second"] * 3

    def test_servers_find_the_classes_by_name_once_they_know_the_configuration(self, thin, tmp_path):
        script = f"""
import json, sys
from transformers import AutoConfig
from transformers.models.auto import modeling_auto as tables
model_type = AutoConfig.from_pretrained({str(thin)!r}, trust_remote_code=True).model_type
print(json.dumps([
    tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type],
    tables.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type],
    tables.MODEL_MAPPING_NAMES[model_type],
]))
"""
        name = "PruneSIDLlavaForConditionalGeneration"
        assert run_clean(script, tmp_path) == [name, name, "PruneSIDLlavaModel"]

    def test_the_names_are_those_of_our_classes(self):
        from transformers.models.auto import modeling_auto

        import modeling_prunesid

        ours = [name for name in modeling_prunesid.__all__ if name.endswith("ForConditionalGeneration")]
        for name in ours:
            config_class = getattr(modeling_prunesid, name).config_class
            if config_class.model_type.startswith(("prunesid", "vitcop")):
                assert modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config_class.model_type] == name
                base_name = modeling_auto.MODEL_MAPPING_NAMES[config_class.model_type]
                assert base_name == name.replace("ForConditionalGeneration", "Model")

    def test_configurations_survive_pickling_by_value(self, thin, tmp_path):
        """As vLLM sends them to its engine: the module itself does not travel, what its functions use does."""
        script = f"""
import json, pickle, sys
import cloudpickle
from transformers import AutoConfig
from transformers.dynamic_module_utils import init_hf_modules
config = AutoConfig.from_pretrained({str(thin)!r}, trust_remote_code=True)
init_hf_modules()
import transformers_modules
cloudpickle.register_pickle_by_value(transformers_modules)
again = pickle.loads(cloudpickle.dumps(config))
print(json.dumps(again.prunesid_config.to_dict()["budget"]))
"""
        assert run_clean(script, tmp_path) == 8


def _of_module(name, **arguments):
    def make():
        module = importlib.import_module(name)
        model = module.build(**arguments)
        return model, module.stock_twin(model)

    return make


def _of_qwen(family):
    def make():
        model = tiny_qwen.build(family)
        return model, tiny_qwen.stock_twin(model, family)

    return make


def _of_vitcop():
    model = build_vitcop()
    return model, stock_twin(model)


FAMILIES = {
    "llava": lambda: (model := build(), stock_twin(model)),
    "llava_next": _of_module("test_llava_next"),
    "video_llava": _of_module("test_video_llava"),
    "mini_gemini": _of_module("test_mini_gemini"),
    "vitcop": _of_vitcop,
    **{family: _of_qwen(family) for family in tiny_qwen.FAMILIES},
}


@pytest.mark.contract
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_knows_its_weights_again(family, tmp_path):
    """Under whatever names the stock class saves them."""
    model, stock = FAMILIES[family]()
    stock.save_pretrained(tmp_path / "base")
    for model_class in (type(model), type(model.model)):
        ours = model_class.from_pretrained(tmp_path / "base")
        folder = tmp_path / model_class.__name__
        ours.save_pretrained(folder, thin=True)
        again = model_class.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in ours.state_dict().items())
        parameters = [(name, value) for name, value in ours.named_parameters() if value.dim() > 1]
        for name, value in parameters[:: max(1, len(parameters) // 8)]:
            kept = value.detach().clone()
            value.data.view(-1)[0] += 1
            with pytest.raises(ValueError, match=f"1 of this model's are not those of its base .* {name}"):
                ours.save_pretrained(tmp_path / "refused", thin=True)
            value.data.copy_(kept)
