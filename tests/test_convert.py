"""`prunesid convert`, its verification, `prunesid calibrate` and the presets of `configuration/`."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import clean_process
import datasets
import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import IMAGE_SIZE, build
from tiny_checkpoint import picture, save_checkpoint
from transformers import BertConfig

from modeling_prunesid import (
    PruneSIDConfig,
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaNextConfig,
    PruneSIDQwen2VLConfig,
    ViTCoPConfig,
    ViTCoPLlavaForConditionalGeneration,
    explain,
)
from modeling_prunesid.dynamic import information_budgets, redundancy
from modeling_prunesid.presets import read_preset
from prunesid_cli import calibrate, convert
from prunesid_cli.baselines import applied
from prunesid_cli.command import build_parser, main


ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "configuration").glob("*.json"))


@pytest.fixture(autouse=True)
def forked(request, monkeypatch):
    """The clean process that verifies is forked, but for the one test that has it started."""
    if "started" not in request.node.name:
        monkeypatch.setattr(convert, "subprocess", clean_process)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base")


def arguments(base, output, *more):
    return [str(base), "--budget", "8", "--output", str(output), *more]


def run(*argv):
    main([str(argument) for argument in argv])


def refusal(*argv, command="convert"):
    """The message with which a command ends."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        run(command, *argv)
    assert ended.value.code == 2
    return said.getvalue()


def load_preset(name):
    return read_preset(name).fields


class TestPresets:
    @pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
    def test_is_valid_and_loads_by_name_and_as_a_file(self, path):
        preset = read_preset(path.stem)
        assert preset[:2] == read_preset(path)[:2]
        assert preset.model_types
        settings_class = {"prunesid": PruneSIDConfig, "vitcop": ViTCoPConfig}[preset.method]
        settings = settings_class.from_preset(path.stem)
        assert settings.to_dict() == settings_class.from_preset(path).to_dict()
        assert settings.to_dict() == settings_class.from_pretrained(path).to_dict()

    @pytest.mark.parametrize("budget", [192, 128, 64])
    def test_of_llava_are_the_papers_and_the_releases(self, budget):
        assert load_preset(f"llava_1.5_{budget}") == {"budget": budget}
        assert load_preset(f"llava_1.5_{budget}_release") == {"budget": budget, "method": "release"}

    @pytest.mark.parametrize("budget", [192, 128, 64])
    def test_ours_selects_as_the_method_of_the_tables(self, budget):
        model = build()
        with applied(model, "prunesid-spread", budget):
            of_tables = model.config.prunesid_config.to_dict()
        assert PruneSIDConfig(**load_preset(f"llava_1.5_{budget}_spread")).to_dict() == of_tables

    @pytest.mark.parametrize("name", ["640_128", "320_64", "160_32"])
    def test_the_release_for_llava_next_is_that_of_llava_for_each_crop(self, name):
        crop = int(name.split("_")[1])
        release = {**load_preset("llava_1.5_64_release"), "budget": crop, "budget_scope": "view"}
        assert load_preset(f"llava_next_{name}_per_crop_release") == release
        PruneSIDLlavaNextConfig(prunesid_config=release)

    @pytest.mark.parametrize(("percent", "published"), [(11, 64), (22, 128), (33, 192)])
    def test_the_release_for_qwen_vl_has_its_threshold_but_for_a_share_of_the_diagonal(self, percent, published):
        """
        The release: lambda = max(N / (n / 18), 1), and rho is the mean over n x n of the upper triangle with the
        diagonal in it, which is rho / 2 + (1 - rho / 2) / n.
        """
        preset = load_preset(f"qwen_vl_{percent}_percent_release")
        tokens = 576
        units = torch.nn.functional.normalize(torch.randn(tokens, 8, dtype=torch.double) + 1, dim=1)
        similarity = units @ units.T
        scale = max(published / (tokens / 18), 1)
        tau = scale * similarity.triu().mean()
        rho = similarity.triu(1).sum() / (tokens * (tokens - 1) / 2)
        assert preset["budget"] == pytest.approx(published / 576)
        assert tau - preset["nms_lambda"] * rho == pytest.approx(float(scale / tokens * (1 - rho / 2)))
        assert scale / tokens < 0.011
        method = {"method": "release", "method_settings": {"keep_cls": False, "score": "component"}}
        fixed = {"min_budget": 16, "budget_scope": "view", **method}
        assert preset == {**fixed, "budget": preset["budget"], "nms_lambda": scale / 2}
        PruneSIDQwen2VLConfig(prunesid_config=preset)

    def test_unknown_name_lists_the_known_ones(self):
        with pytest.raises(ValueError, match=r"one of llava_1.5_64, .*, got 'llava_1.5_65'"):
            PruneSIDConfig.from_preset("llava_1.5_65")

    def test_invalid_file_is_refused(self, tmp_path):
        (tmp_path / "broken.json").write_text("{")
        with pytest.raises(ValueError, match="is no JSON"):
            load_preset(tmp_path / "broken.json")
        (tmp_path / "misspelt.json").write_text('{"bugdet": 64}')
        with pytest.raises(ValueError, match="no field 'bugdet'"):
            PruneSIDConfig.from_preset(tmp_path / "misspelt.json")


class TestConvert:
    @pytest.mark.parametrize("kind", ["thin", "full", pytest.param("thin, started", marks=pytest.mark.contract)])
    def test_writes_a_verified_variant(self, base, tmp_path, capsys, kind):
        output = tmp_path / "new" / "variant"
        run("convert", *arguments(base, output, *([] if kind == "full" else ["--thin"])))
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report == {
            "model": str(base),
            "class": "PruneSIDLlavaForConditionalGeneration",
            "budget": 8,
            "thin": kind != "full",
            "processor": True,
            "output": str(output),
            "bytes": sum(path.stat().st_size for path in output.iterdir()),
        }
        if kind != "full":
            assert report["bytes"] < 310_000
            assert not list(output.glob("*.safetensors"))
        else:
            assert (output / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
        assert f'repo = "{output}"' in (output / "README.md").read_text()
        assert os.listdir(tmp_path) == ["new"]
        assert os.listdir(tmp_path / "new") == ["variant"]

    def test_settings_come_from_preset_and_arguments(self, base):
        given = ["convert", str(base), "--output", "out", "--preset", "llava_1.5_64_release"]

        def read(*more):
            return convert.read_settings(build_parser("convert", convert).parse_args([*given, *more]))[0]

        settings = read("--budget", "0.25")
        assert settings == {**load_preset("llava_1.5_64_release"), "budget": 0.25}
        settings = read("--dynamic", "--reference-information", "0.4")
        assert (settings["dynamic"], settings["reference_information"]) == (True, 0.4)

    def test_a_dynamic_budget_without_its_reference_says_how_to_get_it(self, base, tmp_path):
        assert "prunesid calibrate" in refusal(*arguments(base, tmp_path / "out", "--dynamic"))

    @pytest.mark.parametrize("budget", ["0", "-3", "1.5"])
    def test_invalid_budget(self, base, tmp_path, budget):
        message = refusal(base, "--budget", budget, "--output", tmp_path / "out")
        assert "budget must be a positive integer" in message
        assert budget in message

    @pytest.mark.contract
    def test_a_preset_of_vitcop_makes_a_variant_of_vitcop(self, base, tmp_path, capsys):
        run("convert", base, "--preset", "llava_1.5_vitcop_64", "--budget", 8, "--thin", "--output", tmp_path / "out")
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report["class"] == "ViTCoPLlavaForConditionalGeneration"
        saved = json.loads((tmp_path / "out" / "config.json").read_text())["vitcop_config"]
        assert (saved["budget"], saved["keep_share"], saved["center_share"]) == (8, 0.3, 0.12)

    def test_a_preset_of_another_model_is_refused(self, base, tmp_path):
        message = refusal(base, "--preset", "llava_next_320_64_per_crop", "--output", tmp_path / "out")
        assert "'llava_next_320_64_per_crop' is for models of type 'llava_next', got one of type 'llava'" in message
        assert "llava_1.5_64_spread" in message

    @pytest.mark.parametrize("place", ["link", "link/variant", "file/variant"])
    def test_a_place_that_cannot_become_a_folder_is_refused_before_the_work(self, base, tmp_path, monkeypatch, place):
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        (tmp_path / "file").touch()
        monkeypatch.setattr(PruneSIDLlavaForConditionalGeneration, "from_pretrained", None)
        message = refusal(*arguments(base, tmp_path / place))
        assert f"--output must be a new or an empty folder, got {tmp_path / place}" in message
        assert ("a file" if "file" in place else f"a link to {tmp_path / 'gone'}, which does not exist") in message
        assert sorted(os.listdir(tmp_path)) == ["file", "link"]

    @pytest.mark.contract
    def test_a_link_to_an_empty_folder_is_kept(self, base, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to("folder")
        run("convert", *arguments(base, tmp_path / "link", "--thin"))
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "config.json").exists()

    @pytest.mark.contract
    def test_the_next_run_removes_what_a_killed_one_left(self, base, tmp_path, capsys):
        command = [sys.executable, "-m", "prunesid_cli", "convert", *arguments(base, tmp_path / "out" / "variant")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(".convert-*/variant")):
            time.sleep(0.01)
        process.kill()
        process.wait()
        [left] = tmp_path.glob(".convert-*")
        with convert.staging_folder(tmp_path) as running:  # of a run beside it, which is left alone
            assert not left.exists()
            run("convert", *arguments(base, tmp_path / "out" / "variant", "--thin"))
            assert running.exists()
        assert f"removing {left}" in capsys.readouterr().err
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.contract
    def test_a_thin_variant_becomes_a_full_one(self, base, tmp_path):
        run("convert", *arguments(base, tmp_path / "thin", "--thin"))
        run("convert", str(tmp_path / "thin"), "--output", str(tmp_path / "full"))
        assert (tmp_path / "full" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
        thin, full = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("thin", "full"))
        assert thin["prunesid_config"].pop("base_model_name_or_path") == str(base)
        assert full["prunesid_config"].pop("base_model_name_or_path") is None
        assert full["prunesid_config"] == thin["prunesid_config"]

    @pytest.mark.contract
    def test_a_variant_of_vitcop_becomes_a_full_one(self, base, tmp_path):
        model = ViTCoPLlavaForConditionalGeneration.from_pretrained(base, vitcop_config={"budget": 8})
        model.save_pretrained(tmp_path / "thin", thin=True)
        run("convert", str(tmp_path / "thin"), "--output", str(tmp_path / "full"))
        assert (tmp_path / "full" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()

    def test_settings_are_required_of_a_checkpoint_without(self, base, tmp_path):
        message = refusal(base, "--output", tmp_path / "out")
        assert "one of --budget and --preset is required: " in message and "has no settings of its own" in message

    @pytest.mark.contract
    def test_nothing_is_left_behind_when_it_is_terminated(self, base, tmp_path):
        command = [sys.executable, "-m", "prunesid_cli", "convert", *arguments(base, tmp_path / "out" / "variant")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(".convert-*/variant")):
            time.sleep(0.01)
        process.terminate()
        assert process.wait() == 143
        assert not list(tmp_path.iterdir())

    def test_unsupported_family_lists_the_supported_ones(self, tmp_path):
        BertConfig().save_pretrained(tmp_path / "bert")
        message = refusal(*arguments(tmp_path / "bert", tmp_path / "out"))
        assert "No PruneSID family is declared for model_type='bert'" in message and "llava_next" in message

    def test_missing_checkpoint(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "has no config.json" in refusal(*arguments(tmp_path / "empty", tmp_path / "out"))
        assert "nowhere" in refusal(*arguments(tmp_path / "nowhere", tmp_path / "out"))
        assert os.listdir(tmp_path) == ["empty"]

    def test_incomplete_checkpoint(self, base, tmp_path):
        broken = shutil.copytree(base, tmp_path / "broken")
        weights = load_file(broken / "model.safetensors")
        weights.pop("language_model.lm_head.weight")
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        assert "lacks weights: lm_head.weight" in refusal(*arguments(broken, tmp_path / "out"))
        assert os.listdir(tmp_path) == ["broken"]

    def test_output_that_is_not_empty(self, base, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        assert f"--output must be a new or an empty folder, got {tmp_path}" in refusal(*arguments(base, tmp_path))
        assert os.listdir(tmp_path) == ["notes.txt"]

    def test_output_that_cannot_be_written(self, base):
        """No user may create anything in /proc."""
        assert "/proc" in refusal(*arguments(base, "/proc/variant"))

    @pytest.mark.contract
    def test_full_disk_leaves_nothing_behind(self, base, tmp_path):
        """A limit on the size of files refuses the weights in the way a full disk does."""

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        done = subprocess.run(
            [sys.executable, "-m", "prunesid_cli", "convert", *arguments(base, tmp_path / "out")],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            preexec_fn=limit,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("prunesid convert: ")
        assert "File too large" in done.stderr.splitlines()[-1]
        assert os.listdir(tmp_path) == []

    def test_a_variant_that_answers_otherwise_is_not_kept(self, base, tmp_path, monkeypatch):
        said = subprocess.CompletedProcess([], 0, stdout='{"tokens": [4, 5, 6], "missing_keys": []}', stderr="")
        monkeypatch.setattr(convert, "subprocess", SimpleNamespace(run=lambda *_, **__: said))
        monkeypatch.setattr(convert, "answer", lambda model, processor: [1, 2, 3])
        message = refusal(*arguments(base, tmp_path / "out", "--thin"))
        assert "a clean process answers [4, 5, 6], and the model in memory [1, 2, 3]" in message
        assert os.listdir(tmp_path) == []

    def test_a_thin_variant_of_a_folder_is_not_pushed(self, base, tmp_path):
        message = refusal(*arguments(base, tmp_path / "out", "--thin", "--push-to-hub", "owner/variant"))
        assert "is a folder of this machine, from which nobody else can load a thin variant" in message
        assert os.listdir(tmp_path) == []


def varied_images(count=24):
    """From flat to busy."""
    generator = np.random.default_rng(0)
    for index in range(count):
        side = 2 ** (index % 6)
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        yield Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for index, image in enumerate(varied_images()):
        image.save(folder / f"{index:02}.png")
    return folder


class TestCalibrate:
    def test_the_mean_budget_is_the_one_asked_for(self, base, photographs, tmp_path, capsys):
        output = tmp_path / "settings" / "calibrated.json"
        run("calibrate", str(base), str(photographs), "--budget", "12", "--output", str(output))
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        settings = load_preset(output)
        assert report["views"] == 24
        assert abs(report["mean_budget"] - 12) < 0.5
        assert (settings["budget"], settings["dynamic"]) == (12, True)

        model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config=settings)
        processor = model._processor_class.from_pretrained(base)
        inputs = processor.image_processor(images=list(varied_images()), return_tensors="pt")
        kept = model.get_image_features(pixel_values=inputs["pixel_values"]).keep_indices
        assert sum(map(len, kept)) / len(kept) == pytest.approx(report["mean_budget"], abs=1e-3)
        with torch.no_grad():
            states = model.model.vision_tower(**inputs, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert settings["reference_information"] == pytest.approx((1 - redundancy(states)).mean().item(), abs=1e-4)

    def test_draws_the_histogram(self, base, photographs, tmp_path):
        run("calibrate", str(base), str(photographs), "--budget", "12", "--output", str(tmp_path / "calibrated.json"))
        drawn = matplotlib.image.imread(tmp_path / "calibrated.png")
        assert drawn.shape[:2] == (600, 1050)
        blue = (np.abs(drawn[..., :3] - np.array([0x3B, 0x6F, 0xB6]) / 255) < 0.02).all(-1)
        assert blue.mean() > 0.02

    def test_it_says_which_lambda_fits_the_tower(self, base, photographs, tmp_path, capsys):
        """Survivors are counted as a saved `explain` of each image has them; rho is that of the images."""
        run("calibrate", str(base), str(photographs), "--budget", "12", "--output", str(tmp_path / "calibrated.json"))
        said = capsys.readouterr().out
        report = json.loads(said.splitlines()[-1])
        model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config={"budget": 12})
        processor = model._processor_class.from_pretrained(base)
        found = [explain(model, processor, image) for image in varied_images()]
        assert report["rho"] == pytest.approx(np.mean([own.rho for own in found]), abs=1e-3)
        survivors = [int((own.suppressors < 0).sum()) for own in found]
        idle, short = (np.mean([test(count) for count in survivors]) for test in ((49).__eq__, (12).__gt__))
        assert f"suppresses nothing in {idle:.0%} of the views, and leaves fewer than N in {short:.0%}" in said
        assert report["lambda"] == ("N/32" if 1 - idle - short >= 0.5 else "auto")

    @pytest.mark.parametrize(("scale", "rule"), [(0.05, "auto"), (3.0, "auto"), (0.9, "N/32")])
    def test_the_lambda_that_fits_leaves_n_and_suppresses_some(self, scale, rule):
        """At N of T tau is scale; similarities of all pairs are 0.5, but for the pairs of equal tokens."""
        found = [calibrate.Survival(scale, {0.05: 3, 3.0: 49, 0.9: 30}[scale], 12, 49)] * 3
        name, said = calibrate.judge_lambda(found)
        assert name == rule and ("it fits this tower" in said) == (rule == "N/32")

    def test_a_limit_of_no_image_is_refused(self, base, tmp_path):
        message = refusal(base, tmp_path, "--budget", 12, "--limit", 0, "--output", "out.json", command="calibrate")
        assert "--limit must be at least 1 image, got 0" in message

    def test_reads_a_saved_dataset_and_stops_at_the_limit(self, base, photographs, tmp_path, capsys):
        rows = {"id": list(range(24)), "photo": [str(path) for path in sorted(photographs.iterdir())]}
        dataset = datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())
        dataset.save_to_disk(tmp_path / "dataset")
        output = tmp_path / "calibrated.json"
        run(
            "calibrate",
            str(base),
            str(tmp_path / "dataset"),
            "--budget",
            "12",
            "--limit",
            "9",
            "--output",
            str(output),
        )
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["views"] == 9

    def test_few_images_and_budgets_without_a_floor_are_said(self, base, photographs, tmp_path, capsys):
        given = ["calibrate", base, photographs, "--budget", 12, "--output", tmp_path / "calibrated.json"]
        run(*given)
        said = capsys.readouterr().err
        assert "24 views are few: take some hundreds" in said
        assert re.search(r"Budgets go down to [12] tokens. Give the plainest images a floor: --min-budget 3\n", said)
        run(*given, "--min-budget", 6)
        assert "a floor" not in capsys.readouterr().err
        assert read_preset(tmp_path / "calibrated.json").fields["min_budget"] == 6

    def test_bounds_are_made_up_for(self):
        views = [(rho, 49) for rho in np.linspace(0.05, 0.95, 40).tolist()]
        settings = PruneSIDConfig(budget=16, max_budget=20)
        reference = calibrate.find_reference(views, settings)
        budgets = information_budgets(torch.tensor([rho for rho, _ in views]), 16, 49, reference, maximum=20)
        assert abs(budgets.double().mean() - 16) < 0.5
        assert reference < np.mean([1 - rho for rho, _ in views])

    def test_bounds_that_exclude_the_budget_are_refused(self):
        with pytest.raises(ValueError, match="No reference gives a mean of budget=16 within min_budget=20"):
            calibrate.find_reference([(0.2, 49), (0.7, 49)], PruneSIDConfig(budget=16, min_budget=20))

    def test_no_images(self, base, tmp_path):
        message = refusal(base, tmp_path, "--budget", 12, "--output", tmp_path / "out.json", command="calibrate")
        assert f"The folder {tmp_path} has no images" in message

    @pytest.mark.parametrize("broken", [b"no image", bytes(100)])
    def test_unreadable_image_of_a_dataset(self, base, tmp_path, broken):
        picture().save(tmp_path / "a.png")
        rows = {"photo": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, {"bytes": broken, "path": None}]}
        features = datasets.Features({"photo": datasets.Image(decode=False)})
        dataset = datasets.Dataset.from_dict(rows, features=features).cast_column("photo", datasets.Image())
        dataset.save_to_disk(tmp_path / "dataset")
        given = (base, tmp_path / "dataset", "--budget", 12, "--output", tmp_path / "out.json")
        message = refusal(*given, command="calibrate")
        assert f"'photo' in row 1 of {tmp_path / 'dataset'} is not a readable image" in message

    def test_unreadable_image(self, base, tmp_path):
        picture().save(tmp_path / "a.png")
        (tmp_path / "b.png").write_bytes(b"no image")
        message = refusal(base, tmp_path, "--budget", 12, "--output", tmp_path / "out.json", command="calibrate")
        assert "b.png is not a readable image" in message
        assert not (tmp_path / "out.json").exists()
