"""The command `prunesid`: one parser, one way to fail, one line of JSON at the end."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny_checkpoint import picture, save_checkpoint

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration
from prunesid_cli import command, embedded_folder
from prunesid_cli.command import COMMANDS, main
from prunesid_cli.generate import load_processor


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base")


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_or_names_the_extra_that_it_needs(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    said, refused = capsys.readouterr()
    if ended.value.code:
        assert f"prunesid {name}: this command needs " in refused and f"extra {COMMANDS[name][1]!r}" in refused
        return
    assert "usage: prunesid " + name in said
    assert "Examples:" in said
    assert ".py" not in said and "scripts/" not in said


def test_an_unknown_command_lists_the_known_ones(capsys):
    assert "invalid choice: 'train'" in refusal(capsys, "train")


def raises(error):
    def fail(name):
        raise error

    return fail


def test_a_missing_package_names_the_extra_that_has_it(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "presets", ("", "demo"))
    monkeypatch.setattr(command, "import_command", raises(ModuleNotFoundError("No module", name="onnx.helper")))
    message = refusal(capsys, "presets")
    assert message.startswith("prunesid presets: this command needs the package 'onnx'") and "'demo'" in message


def test_a_processor_that_lacks_a_package_names_it(monkeypatch, capsys):
    """As Transformers refuses a video processor without torchvision."""
    error = ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found.")
    monkeypatch.setattr(command, "import_command", raises(error))
    assert refusal(capsys, "generate").endswith(
        "'torchvision', which is not installed. Install it: pip install torchvision"
    )


@pytest.mark.contract
def test_a_reader_that_has_read_enough_is_no_error():
    script = "from prunesid_cli.command import entry_point; entry_point()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "presets"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


@pytest.mark.parametrize(
    "error", [KeyError("a bug"), ImportError("a bug"), ModuleNotFoundError("a bug", name="prunesid_cli.pars")]
)
def test_a_bug_is_not_hidden(monkeypatch, error):
    monkeypatch.setattr(command, "import_command", raises(error))
    with pytest.raises(type(error), match="a bug"):
        main(["presets"])


def test_presets_shows_all_of_them_and_one(capsys):
    main(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["llava_1.5_64", "llava_1.5_64_release", "llava_1.5_64_spread"]
    main(["presets", "qwen_vl_33_percent"])
    assert json.loads(capsys.readouterr().out)["min_budget"] == 16


def test_doctor_finds_nothing_wrong_here(capsys):
    main(["doctor"])
    said = capsys.readouterr().out
    assert "Problems: none" in said
    assert json.loads(said.splitlines()[-1])["problems"] == []


def test_doctor_says_what_fails(monkeypatch, capsys):
    def fail(device):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("prunesid_cli.doctor._answer", fail)
    main(["doctor"])
    assert "- Pruning fails on cpu: RuntimeError: no kernel image" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [["--budget", "8"], ["--preset", "llava_1.5_vitcop_64", "--budget", "8"]])
def test_generate_answers_with_fewer_tokens_and_with_all(base, tmp_path, capsys, settings):
    picture().save(tmp_path / "picture.png")
    asked = ["--image", str(tmp_path / "picture.png"), "--max-new-tokens", "2", "--compare"]
    main(["generate", str(base), *settings, *asked])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["answers"][1]["visual_tokens"] == 49
    assert report["answers"][0]["visual_tokens"] < 49


def test_generate_asks_a_processor_without_a_chat_template(base, tmp_path, capsys):
    """As PaliGemma's."""
    folder = shutil.copytree(base, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    picture().save(tmp_path / "picture.png")
    main(["generate", str(folder), "--budget", "8", "--image", str(tmp_path / "picture.png"), "--max-new-tokens", "2"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["answers"][0]["visual_tokens"] == 8
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(folder)
    read = load_processor(str(folder), model).apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "word7"}, {"type": "image"}]}]
    )
    assert read == "<image>word7"


def test_generate_takes_our_processor_for_a_stock_checkpoint(base, tmp_path, capsys):
    """It writes what our class alone reads, as the mask of the question."""
    picture().save(tmp_path / "picture.png")
    (tmp_path / "by_question.json").write_text(
        json.dumps({"budget": 8, "method": "spread", "method_settings": {"question": True}})
    )
    asked = ["--image", str(tmp_path / "picture.png"), "--prompt", "word7 word8", "--max-new-tokens", "2"]
    main(["generate", str(base), "--preset", str(tmp_path / "by_question.json"), *asked])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["answers"][0]["visual_tokens"] == 8


def test_generate_refuses_a_preset_of_another_model(base, tmp_path, capsys):
    picture().save(tmp_path / "picture.png")
    asked = ["--image", tmp_path / "picture.png", "--preset", "qwen_vl_33_percent"]
    assert "is for models of type 'qwen2_vl' or" in refusal(capsys, "generate", base, *asked)


def test_what_the_wheel_carries_is_unpacked_once(tmp_path, monkeypatch):
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    (packaged / "config.json").write_text("{}")
    monkeypatch.setattr(embedded_folder, "_PACKAGED", packaged)
    monkeypatch.setattr(embedded_folder, "FOLDER", tmp_path / "cache" / "embedded")
    assert "unpacks it" in embedded_folder.describe()
    embedded_folder.unpack()
    assert [path.name for path in (tmp_path / "cache" / "embedded").iterdir()] == ["config.json"]
    (packaged / "config.json").write_text("another")
    embedded_folder.unpack()
    assert (tmp_path / "cache" / "embedded" / "config.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["embedded"]
