"""What a newcomer tries first: names of presets, None, the wrong class, budgets that seem to do nothing."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import ROWS
from tiny import NUM_PATCHES, build, pixels, prompt
from tiny_checkpoint import build_processor, picture, save_checkpoint
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaNextConfig

from modeling_prunesid import (
    PruneSIDConfig,
    PruneSIDForImageTextToText,
    PruneSIDLlavaConfig,
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaNextConfig,
    PruneSIDLlavaProcessor,
    PruneSIDQwen2VLConfig,
    PruneSIDQwen2VLForConditionalGeneration,
    ViTCoPConfig,
    ViTCoPLlavaConfig,
    checks,
)
from modeling_prunesid import families as families_of_package
from modeling_prunesid.presets import MODEL_TYPES, preset_names, read_preset
from prunesid_cli import command


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture(scope="module")
def variant(base, tmp_path_factory):
    """A variant with weights that keeps 8 tokens."""
    folder = tmp_path_factory.mktemp("checkpoints") / "variant"
    PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config={"budget": 8}).save_pretrained(folder)
    return folder


@pytest.fixture
def said(monkeypatch):
    """The warnings that are logged once in a process."""
    messages: list[str] = []
    monkeypatch.setattr(checks, "_said", set())
    monkeypatch.setattr(checks.logger, "warning", messages.append)
    return messages


class TestPresetsByName:
    def test_one_word_loads_a_model_with_its_settings(self, base):
        model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config="llava_1.5_128_spread")
        settings = model.config.prunesid_config
        assert (settings.budget, settings.method) == (128, "spread")
        assert settings.to_dict() == PruneSIDConfig.from_preset("llava_1.5_128_spread").to_dict()

    def test_every_class_that_loads_a_family_takes_it(self, base):
        model = PruneSIDForImageTextToText.from_pretrained(base, prunesid_config="llava_1.5_64_release")
        assert model.config.prunesid_config.method == "release"

    def test_defaults_of_the_family_fill_what_it_leaves_open(self, tmp_path):
        (tmp_path / "mine.json").write_text('{"budget": 0.1}')
        settings = PruneSIDQwen2VLConfig(prunesid_config=str(tmp_path / "mine.json")).prunesid_config
        assert (settings.budget, settings.min_budget) == (0.1, 16)

    def test_an_unknown_name_lists_the_known_ones(self):
        with pytest.raises(ValueError, match=r"one of llava_1.5_64, llava_1.5_64_release, .*got 'llava_1.5_46'"):
            PruneSIDLlavaConfig(prunesid_config="llava_1.5_46")

    @pytest.mark.parametrize("as_object", [False, True])
    def test_that_of_another_family_is_refused(self, as_object):
        preset = "llava_next_320_64_per_crop"
        given = PruneSIDConfig.from_preset(preset) if as_object else preset
        with pytest.raises(
            ValueError, match=r"for models of type 'llava_next', got one of type 'llava'. .*llava_1.5_64"
        ):
            PruneSIDLlavaConfig(prunesid_config=given)
        assert PruneSIDLlavaNextConfig(prunesid_config=given).prunesid_config.budget == 64

    def test_settings_that_are_refused_change_nothing(self):
        config = PruneSIDQwen2VLConfig(prunesid_config={"budget": 0.2})
        for refused in ({"budget": 0.1, "method": "spread"}, "llava_1.5_64"):
            with pytest.raises(ValueError, match="needs cls_attention of|is for models of type"):
                config.prunesid_config = refused
            assert (config.prunesid_config.budget, config.prunesid_config.method) == (0.2, "paper")

    def test_vitcop_has_its_own(self):
        assert ViTCoPLlavaConfig(vitcop_config="llava_1.5_vitcop_128").vitcop_config.keep_share == 0.4
        assert ViTCoPConfig.from_preset("llava_1.5_vitcop_64").budget == 64
        with pytest.raises(ValueError, match="has settings of 'vitcop', and PruneSIDConfig takes those of 'prunesid'"):
            PruneSIDConfig.from_preset("llava_1.5_vitcop_64")
        with pytest.raises(ValueError, match=r"takes those of 'vitcop'. Take one of llava_1.5_vitcop_64, "):
            ViTCoPLlavaConfig(vitcop_config="llava_1.5_64")

    def test_every_preset_says_whose_it_is(self):
        assert all(read_preset(name).model_types for name in preset_names())
        assert all(any(name.startswith(start) for name in preset_names()) for start in MODEL_TYPES)

    def test_its_name_is_not_saved(self, tmp_path):
        PruneSIDLlavaConfig(prunesid_config="llava_1.5_64").save_pretrained(tmp_path)
        assert "preset" not in (tmp_path / "config.json").read_text()

    def test_a_thin_variant_keeps_its_base(self, base, tmp_path):
        model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config={"budget": 8})
        model.save_pretrained(tmp_path, thin=True)
        loaded = PruneSIDLlavaForConditionalGeneration.from_pretrained(tmp_path, prunesid_config="llava_1.5_64")
        assert loaded.config.prunesid_config.budget == 64
        assert loaded.config.prunesid_config.base_model_name_or_path == str(base)


class TestNone:
    def test_on_loading_it_is_as_saved(self, variant):
        for load in (PruneSIDLlavaForConditionalGeneration, AutoConfig):
            loaded = load.from_pretrained(variant, prunesid_config=None)
            assert getattr(loaded, "config", loaded).prunesid_config.budget == 8

    def test_at_construction_it_is_the_default(self):
        assert PruneSIDLlavaConfig(prunesid_config=None).prunesid_config.budget == 64

    @pytest.mark.parametrize(
        "config", [PruneSIDLlavaConfig(prunesid_config={"num_groups": 5}), ViTCoPLlavaConfig()], ids=["ours", "vitcop"]
    )
    def test_set_later_it_is_off(self, config):
        fields = config.prunesid_config.to_dict()
        config.prunesid_config = None
        assert config.prunesid_config.to_dict() == {**fields, "budget": None}

    def test_in_a_call_it_is_the_models_budget_and_the_message_says_so(self):
        model = build()
        with pytest.raises(
            ValueError, match=r"num_visual_tokens must be .* None \(the model's budget; 1.0 keeps all\)"
        ):
            model.get_image_features(pixel_values=pixels(1), num_visual_tokens=0)
        with pytest.raises(ValueError, match=r"prunesid_config.budget must be .* or None \(off\), got 0"):
            model.config.prunesid_config.budget = 0
        kept = model.get_image_features(pixel_values=pixels(1), num_visual_tokens=None)["keep_indices"]
        assert len(kept[0]) == 8


class TestTheRightClass:
    def test_a_stock_checkpoint_loads_in_silence(self, base, caplog):
        library = logging.getLogger("transformers")
        library.propagate, before = True, library.propagate
        try:
            PruneSIDLlavaForConditionalGeneration.from_pretrained(base)
        finally:
            library.propagate = before
        assert "instantiate" not in caplog.text

    def test_another_models_checkpoint_names_the_class_that_loads_it(self, base, tmp_path):
        LlavaNextConfig().save_pretrained(tmp_path)
        advice = "Load it with PruneSIDLlavaNextForConditionalGeneration"
        with pytest.raises(
            ValueError, match=f"model_type 'llava_next', and PruneSIDLlava .* those of 'llava'. {advice}"
        ):
            PruneSIDLlavaForConditionalGeneration.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="Load it with PruneSIDLlavaForConditionalGeneration"):
            PruneSIDQwen2VLForConditionalGeneration.from_pretrained(base)
        with pytest.raises(ValueError, match="Load it with PruneSIDLlavaForConditionalGeneration"):
            PruneSIDQwen2VLConfig.from_pretrained(base)

    def test_a_model_without_a_family_lists_the_families(self, tmp_path):
        transformers.BertConfig().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="PruneSID does not support that model; it supports .*llava"):
            PruneSIDLlavaForConditionalGeneration.from_pretrained(tmp_path)

    def test_the_stock_class_answers_from_a_variant_with_weights_as_from_its_base(self, base, variant):
        stock, info = LlavaForConditionalGeneration.from_pretrained(variant, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        of_base = LlavaForConditionalGeneration.from_pretrained(base)
        inputs = {"input_ids": torch.tensor([prompt([NUM_PATCHES], [7, 8])]), "pixel_values": pixels(1)}
        assert torch.equal(stock(**inputs).logits, of_base(**inputs).logits)


@pytest.mark.contract
class TestVersions:
    @pytest.mark.parametrize("version", ["4.57.1", "5.17.0", "5.17.3"])
    def test_an_older_transformers_is_refused_with_its_version(self, monkeypatch, version):
        monkeypatch.setattr(checks.transformers, "__version__", version)
        with pytest.raises(ImportError, match=f"needs transformers 5.18 or newer, found {version}. Upgrade it: pip"):
            checks.check_transformers()

    @pytest.mark.parametrize("version", ["5.18.0", "5.18.0.dev0", "5.24.0", "6.0.0"])
    def test_others_are_not(self, monkeypatch, version):
        monkeypatch.setattr(checks.transformers, "__version__", version)
        checks.check_transformers()

    def test_it_is_said_before_anything_else_fails(self, tmp_path):
        script = "import sys, transformers; transformers.__version__ = '5.17.0'; import modeling_prunesid"
        assert self.last_error(script, tmp_path, str(Path(__file__).parents[1])).endswith("found 5.17.0")

    def test_published_code_says_it_too(self, variant, tmp_path):
        folder = shutil.copytree(variant, tmp_path / "variant")
        (folder / "checks.py").write_text((folder / "checks.py").read_text().replace('"5.18"', '"99.0"'))
        load = f"AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)"
        script = f"from transformers import AutoConfig; {load}"
        assert self.last_error(script, tmp_path).startswith("ImportError: PruneSID needs transformers 99.0 or newer")

    def test_a_published_family_names_the_release_that_has_it(self, monkeypatch, tmp_path):
        """It says so before the imports of what an older Transformers lacks."""
        row = ROWS["internvl"]
        model = row.head(row.head.config_class(**row.config))
        monkeypatch.setitem(families_of_package._RELEASES, "internvl", "99.0")
        model.save_pretrained(tmp_path / "repo")
        code = tmp_path / "repo" / "modeling_prunesid_internvl.py"
        assert code.read_text().index('check_transformers("99.0")') < code.read_text().index("from transformers")
        script = "import transformers; transformers.AutoConfig.from_pretrained('repo', trust_remote_code=True)"
        assert self.last_error(script, tmp_path).startswith("ImportError: PruneSID needs transformers 99.0 or newer")

    def test_a_command_says_it_in_one_sentence(self, monkeypatch, capsys):
        monkeypatch.setattr(command, "import_command", lambda name: checks.check_transformers("99.0"))
        with pytest.raises(SystemExit) as stopped:
            command.main(["doctor"])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith(
            "prunesid doctor: PruneSID needs transformers 99.0 or newer"
        )

    def last_error(self, script, folder, path=""):
        overlay = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if "ov" in Path(part).parts]
        paths = {"PYTHONPATH": os.pathsep.join([path, *overlay]), "HF_MODULES_CACHE": str(folder / "modules")}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True
        )
        return done.stderr.splitlines()[-1].partition(". Upgrade")[0]


class TestBudgetsThatSeemToDoNothing:
    @pytest.mark.parametrize("budget", [4, None])
    def test_a_prompt_that_brings_another_one_says_so_once(self, variant, said, budget):
        model = PruneSIDLlavaForConditionalGeneration.from_pretrained(variant)
        processor = PruneSIDLlavaProcessor.from_pretrained(variant)
        inputs = processor(images=picture(), text="<image> word7", return_tensors="pt")
        model.generate(**inputs, max_new_tokens=1)
        assert not said
        model.config.prunesid_config.budget = budget
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=1)
        assert len(said) == 1
        assert (
            f"num_visual_tokens=[8], which replaces the model's own prunesid_config.budget={budget}. Set proc"
            in said[0]
        )

    def test_full_prompts_follow_the_model(self, variant, said):
        model = PruneSIDLlavaForConditionalGeneration.from_pretrained(variant)
        processor = PruneSIDLlavaProcessor.from_pretrained(variant)
        processor.num_visual_tokens = None
        inputs = processor(images=picture(), text="<image> word7", return_tensors="pt")
        model.config.prunesid_config.budget = 4
        assert len(model.get_image_features(pixel_values=inputs["pixel_values"])["keep_indices"][0]) == 4
        model.generate(**inputs, max_new_tokens=1)
        assert not said

    def test_a_budget_above_all_tokens_says_so_once(self, said):
        model = build(budget=NUM_PATCHES + 1)
        for _ in range(2):
            assert "keep_indices" not in model.get_image_features(pixel_values=pixels(1))
        total = f"above the {NUM_PATCHES} that there are: all of them are kept."
        assert said == [f"A budget of {NUM_PATCHES + 1} visual tokens is {total}"]

    @pytest.mark.parametrize("budget", [NUM_PATCHES, 1.0, None])
    def test_one_that_asks_for_all_of_them_does_not(self, said, budget):
        build(budget=budget).get_image_features(pixel_values=pixels(1))
        assert not said

    def test_a_processor_says_it_too(self, said):
        stock = build_processor()
        processor = PruneSIDLlavaProcessor(
            stock.image_processor, stock.tokenizer, patch_size=stock.patch_size, num_additional_image_tokens=1,
            vision_feature_select_strategy="default", num_visual_tokens=500,
        )  # fmt: skip
        text = processor(images=picture(), text="<image> word7", return_tensors="pt")
        assert (text["input_ids"] == processor.image_token_id).sum() == NUM_PATCHES
        assert len(said) == 1 and "A budget of 500 visual tokens is above the 49" in said[0]
