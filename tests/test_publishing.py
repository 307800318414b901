"""Saved variants: thin ones take weights and processor from their base; each has its card, and nothing is lost."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import batch, build, pixels, prompt, stock_twin
from tiny_checkpoint import CHAT_TEMPLATE, load_variant, picture, save_checkpoint
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from modeling_prunesid import PruneSIDConfig, PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaModel


NOTHING_LOST = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture
def model(base):
    return load_variant(base)


def load(folder, **kwargs):
    """A model and what was lost when it was loaded."""
    model, info = PruneSIDLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **kwargs)
    return model, {kind: info[kind] for kind in NOTHING_LOST}


def settings_in(folder):
    return json.loads((folder / "config.json").read_text())["prunesid_config"]


def edit_config(folder, change):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def same_weights(ours, other):
    weights = other.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in ours.state_dict().items())


def new_tokens(model):
    inputs = batch([prompt([49], [7, 8, 9])])
    return model.generate(**inputs, pixel_values=pixels(1), do_sample=False, max_new_tokens=6).tolist()


class TestThin:
    def test_is_small_and_names_its_base(self, thin, base):
        names = {path.name for path in thin.iterdir()}
        assert not any(name.endswith((".safetensors", ".bin")) or name == "tokenizer.json" for name in names)
        assert {"config.json", "generation_config.json", "processor_config.json", "README.md"} < names
        assert sum(path.stat().st_size for path in thin.iterdir()) < 310_000
        assert settings_in(thin)["base_model_name_or_path"] == str(base)

    def test_has_all_weights_of_the_base_and_its_own_settings(self, thin, model):
        loaded, lost = load(thin)
        assert lost == NOTHING_LOST
        assert same_weights(loaded, model)
        assert loaded.config.prunesid_config.budget == 8
        assert loaded.config.name_or_path == loaded.name_or_path == str(thin)
        assert new_tokens(loaded) == new_tokens(model)

    def test_loads_as_the_base_model_too(self, thin, model):
        assert same_weights(PruneSIDLlavaModel.from_pretrained(thin), model.model)

    def test_the_callers_arguments_reach_the_base(self, thin):
        loaded, _ = load(thin, dtype=torch.bfloat16, device_map={"": "cpu"}, attn_implementation="eager")
        assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
        assert loaded.config._attn_implementation == "eager"
        assert loaded.config.text_config._attn_implementation == "eager"
        loaded, _ = load(thin, prunesid_config={"budget": 4})
        assert loaded.config.prunesid_config.budget == 4

    @pytest.mark.parametrize("loader", [PruneSIDLlavaForConditionalGeneration, AutoModelForImageTextToText])
    def test_all_that_the_caller_asks_for_is_asked_of_the_base(self, model, tmp_path, monkeypatch, loader):
        model.loaded_revision = "v1.0"
        model.save_pretrained(tmp_path, thin=True)
        asked = {
            "dtype": torch.float16,
            "device_map": "cpu",
            "quantization_config": {"load_in_4bit": True},
            "cache_dir": str(tmp_path / "cache"),
            "token": "hf_secret",
            "local_files_only": True,
            "force_download": False,
        }
        seen = {}

        def record(cls, name, **kwargs):
            seen.update(kwargs, name=name)
            raise OSError("recorded")

        monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(record))
        with pytest.raises(OSError, match="recorded"):
            loader.from_pretrained(tmp_path, revision="of-the-variant", **asked)
        assert {name: seen[name] for name in asked} == asked
        assert seen["name"] == model.config.name_or_path
        assert seen["revision"] == "v1.0"

    def test_its_own_generation_config_wins(self, model, thin):
        assert load(thin)[0].generation_config.max_new_tokens == 6
        model.generation_config.max_new_tokens = 3
        model.save_pretrained(thin, thin=True)
        assert load(thin)[0].generation_config.max_new_tokens == 3

    @pytest.mark.parametrize("loaded_from", ["base", "thin"])
    def test_base_may_be_sharded(self, loaded_from, model, tmp_path):
        sharded = save_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
        assert len(list(sharded.glob("*.safetensors"))) > 1
        variant, lost = load(sharded, prunesid_config={"budget": 8})
        assert lost == NOTHING_LOST
        if loaded_from == "thin":
            variant.save_pretrained(tmp_path / "thin-of-sharded", thin=True)
            variant, lost = load(tmp_path / "thin-of-sharded")
            assert lost == NOTHING_LOST
        assert same_weights(variant, model)

    def test_of_a_thin_variant_has_the_same_base(self, thin, base, tmp_path):
        loaded, _ = load(thin)
        loaded.config.prunesid_config.budget = 4
        loaded.save_pretrained(tmp_path / "again", thin=True)
        assert settings_in(tmp_path / "again")["base_model_name_or_path"] == str(base)
        assert load(tmp_path / "again")[0].config.prunesid_config.budget == 4

    def test_the_revision_of_the_base_is_kept(self, base, tmp_path):
        model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, revision="v1.0")
        model.save_pretrained(tmp_path, thin=True)
        assert settings_in(tmp_path)["base_model_revision"] == "v1.0"
        assert json.loads((tmp_path / "processor_config.json").read_text())["base_model_revision"] == "v1.0"

    def test_weights_in_the_folder_win_over_the_base(self, thin, model, tmp_path):
        trained = build(seed=1)
        stock_twin(trained).save_pretrained(tmp_path / "trained")
        shutil.copy(tmp_path / "trained" / "model.safetensors", thin)
        assert same_weights(load(thin)[0], trained)

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
    def test_an_adapter_on_a_thin_variant_loads_with_the_base(self, thin, tmp_path):
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(load(thin)[0], LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
        assert new_tokens(loaded) == new_tokens(adapted.merge_and_unload())


class TestFull:
    def test_the_weights_are_the_stock_checkpoints_byte_for_byte(self, model, base, tmp_path):
        model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
        stock = LlavaForConditionalGeneration.from_pretrained(tmp_path, config=LlavaConfig.from_pretrained(base))
        assert same_weights(stock, model)

    def test_of_a_thin_variant_has_trained_weights_of_its_own(self, thin, base, tmp_path):
        loaded, _ = load(thin)
        with torch.no_grad():
            loaded.lm_head.weight.add_(1)
        loaded.save_pretrained(tmp_path / "full", max_shard_size="100KB")
        assert settings_in(tmp_path / "full")["base_model_name_or_path"] is None
        assert loaded.config.prunesid_config.base_model_name_or_path == str(base)
        again, lost = load(tmp_path / "full")
        assert lost == NOTHING_LOST
        assert same_weights(again, loaded)

    def test_has_the_code_for_every_auto_class(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {
            "AutoConfig",
            "AutoModel",
            "AutoModelForImageTextToText",
            "AutoModelForMultimodalLM",
            "AutoProcessor",
        }
        for reference in auto_map.values():
            module, name = reference.split(".")
            made = (f"class {name}(", f"{name} = register_family(")
            assert any(line in (tmp_path / f"{module}.py").read_text() for line in made)


class TestErrors:
    def test_missing_base(self, thin, base):
        edit_config(thin, lambda fields: fields["prunesid_config"].update(base_model_name_or_path=f"{base}-moved"))
        with pytest.raises(
            OSError, match=f"{thin.name} takes its weights from .*{base.name}-moved.* cannot be loaded"
        ):
            load(thin)

    def test_base_without_weights(self, thin, model, tmp_path):
        model.save_pretrained(tmp_path / "empty", thin=True)
        edit_config(
            thin, lambda fields: fields["prunesid_config"].update(base_model_name_or_path=str(tmp_path / "empty"))
        )
        with pytest.raises(OSError, match=r"takes its weights from .*empty.* cannot be loaded.*model.safetensors"):
            load(thin)

    @pytest.mark.parametrize(
        "change, message",
        [
            (
                lambda fields: fields.update(model_type="llava_next"),
                "its model_type is 'llava_next', expected 'llava'",
            ),
            (
                lambda fields: fields["text_config"].update(model_type="mistral"),
                "its text_config.model_type is 'mistral', expected 'llama'",
            ),
        ],
        ids=["family", "language model"],
    )
    def test_base_of_another_kind(self, thin, base, tmp_path, change, message):
        other = shutil.copytree(base, tmp_path / "other")
        edit_config(other, change)
        edit_config(thin, lambda fields: fields["prunesid_config"].update(base_model_name_or_path=str(other)))
        with pytest.raises(ValueError, match=message):
            load(thin)

    @pytest.mark.parametrize(
        "text, kind",
        [
            ({"num_hidden_layers": 1}, "missing keys"),
            ({"num_hidden_layers": 3}, "unexpected keys"),
            ({"intermediate_size": 48}, "mismatched keys"),
        ],
        ids=["shallower", "deeper", "narrower"],
    )
    def test_base_whose_architecture_changed(self, thin, tmp_path, text, kind):
        stock_twin(build(text=text)).save_pretrained(tmp_path / "changed")
        edit_config(
            thin, lambda fields: fields["prunesid_config"].update(base_model_name_or_path=str(tmp_path / "changed"))
        )
        with pytest.raises(ValueError, match=f"do not fit this variant: .* {kind}, for example .*language_model"):
            load(thin)

    def test_thin_without_a_base(self, tmp_path):
        with pytest.raises(ValueError, match="thin=True needs a base"):
            build().save_pretrained(tmp_path / "variant", thin=True)
        assert not (tmp_path / "variant").exists()

    def test_thin_over_weights(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="thin=True saves no weights, but save_directory"):
            model.save_pretrained(tmp_path, thin=True)

    def test_a_file_for_a_folder(self, model, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="save_directory must be a folder, got the file"):
            model.save_pretrained(tmp_path / "file")

    def test_pushing_a_thin_variant_of_a_folder_is_refused_before_anything_is_sent(self, model, base):
        with pytest.raises(ValueError, match=f"base_model_name_or_path='{base}' is a folder of this machine"):
            model.push_to_hub("owner/variant", thin=True)


class TestProcessor:
    @pytest.mark.parametrize("thin", [True, False], ids=["thin", "full"])
    def test_is_the_bases_with_the_budget_of_the_model(self, model, tmp_path, thin):
        model.save_pretrained(tmp_path, thin=thin)
        processor = AutoProcessor.from_pretrained(tmp_path)
        assert processor.chat_template == CHAT_TEMPLATE
        inputs = processor(text="<image> word7", images=picture(), return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 8
        assert inputs["num_visual_tokens"].tolist() == [8]

    def test_of_a_dynamic_budget_writes_the_full_prompt(self, model, tmp_path):
        model.config.prunesid_config = {"dynamic": True, "reference_information": 0.5, "budget": 8}
        model.save_pretrained(tmp_path, thin=True)
        inputs = AutoProcessor.from_pretrained(tmp_path)(text="<image>", images=picture(), return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 49

    def test_that_the_user_saved_is_left_alone_but_for_the_budget(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        processor = AutoProcessor.from_pretrained(tmp_path)
        processor.chat_template = "{{ 'mine' }}"
        processor.save_pretrained(tmp_path)
        model.config.prunesid_config.budget = 4
        model.save_pretrained(tmp_path)
        processor = AutoProcessor.from_pretrained(tmp_path)
        assert (processor.chat_template, processor.num_visual_tokens) == ("{{ 'mine' }}", 4)

    def test_a_model_without_one_is_saved_all_the_same(self, tmp_path):
        built = build()
        built.save_pretrained(tmp_path)
        assert not (tmp_path / "processor_config.json").exists()
        assert "AutoProcessor" not in json.loads((tmp_path / "config.json").read_text())["auto_map"]
        assert same_weights(load(tmp_path)[0], built)


class TestCard:
    def test_metadata(self, model, tmp_path):
        model.config.prunesid_config.base_model_name_or_path = "owner/base"
        from modeling_prunesid.card import write_card

        write_card(tmp_path, model.config, "owner/base", thin=True, repo_id="me/variant", tags=["mine"])
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.to_dict() == {
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "base_model": "owner/base",
            "base_model_relation": "adapter",
            "tags": ["prunesid", "visual-token-pruning", "mine"],
        }
        assert 'repo = "me/variant"' in card.text
        assert "keeps 8 visual tokens of each encoded view" in card.text
        assert "| `budget` | `8` |" in card.text
        assert "@inproceedings{fang2026prunesid" in card.text

    def test_of_a_local_base_carries_its_licence_over_and_names_no_repo(self, thin):
        data = ModelCard.load(thin / "README.md").data
        assert data.license == "llama2"
        assert data.base_model is None

    def test_names_the_processors_budget_where_it_has_one(self, model, thin, tmp_path):
        from modeling_prunesid.card import write_card

        own = "and the processor with `num_visual_tokens=32`"
        assert own in (thin / "README.md").read_text()
        (tmp_path / "processor_config.json").write_text('{"processor_class": "PruneSIDQwen2VLProcessor"}')
        write_card(tmp_path, model.config, None, thin=False)
        assert own not in (tmp_path / "README.md").read_text()

    def test_follows_the_settings_and_replaces_no_card_of_the_users(self, model, tmp_path):
        readme = tmp_path / "README.md"
        model.save_pretrained(tmp_path)
        model.config.prunesid_config.budget = 0.25
        model.save_pretrained(tmp_path)
        assert "keeps 25.0% of the visual tokens" in readme.read_text()
        readme.write_text("---\ntags:\n- mine\n---\nMine.\n")
        model.save_pretrained(tmp_path)
        assert readme.read_text().endswith("Mine.\n")


def test_names_of_the_base_are_checked():
    for name in ("base_model_name_or_path", "base_model_revision"):
        for value in ("", 3, True):
            with pytest.raises(ValueError, match=f"{name} must be a non-empty string or None, got {value!r}"):
                PruneSIDConfig(**{name: value})
