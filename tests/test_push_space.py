"""`prunesid push-space`: the Space that arrives on the Hub has its page, code, model, requirements and card."""

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import TOKEN, Hub

from prunesid_cli.push_space import CPU_WHEELS, REQUIREMENTS


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


def push(hub, home, *arguments, token=TOKEN):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    if token is not None:
        own["HF_TOKEN"] = token
    command = [sys.executable, "-m", "prunesid_cli", "push-space", *arguments]
    return subprocess.run(command, env=kept | own, cwd=home, capture_output=True, text=True, check=False)


def card(files):
    return yaml.safe_load(files["README.md"].decode().split("---\n")[1])


def test_a_space_is_complete_and_a_second_push_replaces_it(hub, tmp_path):
    result = push(hub, tmp_path, "owner/page")
    assert result.returncode == 0, result.stderr
    files = hub.files("owner/page")
    repo = hub.repos["owner/page"]
    assert (repo.kind, repo.sdk, repo.private) == ("space", "gradio", False)
    assert json.loads(result.stdout.splitlines()[-1])["files"] == len(files) - 1  # and .gitattributes
    settings = card(files)
    assert settings["sdk"] == "gradio" and settings["app_file"] == "app.py" and "models" not in settings
    assert len(settings["short_description"]) <= 60
    compile(files["app.py"], "app.py", "exec")
    assert b"model=None" in files["app.py"]
    names = set(files)
    assert {"embedded/config.json", "embedded/model-00001-of-00002.safetensors", "embedded/README.md"} <= names
    assert {"prunesid_cli/app_files/page.js", "prunesid_cli/app_files/example_1.jpg"} <= names
    assert {f"modeling_prunesid/{path.name}" for path in (ROOT / "modeling_prunesid").glob("*.py")} <= names
    assert not any("00002-of-00002" in name or "pycache" in name for name in names)

    result = push(hub, tmp_path, "owner/page", "--model", "owner/llava")
    assert result.returncode == 0, result.stderr
    files = hub.files("owner/page")
    assert card(files)["models"] == ["owner/llava"] and b"model='owner/llava'" in files["app.py"]
    assert not any(name.startswith("embedded/") for name in files)


def test_what_a_space_cannot_have_is_a_sentence(hub, tmp_path):
    (tmp_path / "model").mkdir()
    for arguments, sentence in (
        (["page"], "The Space must be named ORG/NAME, got 'page'."),
        (["owner/other", "--model", "model"], "--model must be on the Hub for a Space to load it"),
    ):
        result = push(hub, tmp_path, *arguments)
        assert result.returncode == 2 and sentence in result.stderr and "Traceback" not in result.stderr
    result = push(hub, tmp_path, "owner/other", token=None)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "owner/other" not in hub.repos


def test_the_requirements_are_those_of_the_package_and_its_extra():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"].split() + setup["options.extras_require"]["app"].split()
    assert sorted(REQUIREMENTS) == sorted(name for name in wanted if not name.startswith("gradio"))
    assert CPU_WHEELS.startswith("--extra-index-url https://")
