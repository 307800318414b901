"""`prunesid push-space`: the Space that arrives on the Hub has its page, code, model, requirements and card."""

import configparser
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from app_browser import SECONDS, visit
from hub_server import TOKEN, Hub

from prunesid_cli.push_space import CPU_WHEELS, REQUIREMENTS


ROOT = Path(__file__).parents[1]


# One process for all, for its imports take longer than what it does: (arguments, whether there is a token).
CALLS = (
    (["owner/page"], True),
    (["owner/page", "--model", "owner/llava"], True),
    (["page"], True),
    (["owner/other", "--model", "model"], True),
    (["owner/other"], False),
)
SCRIPT = """
import contextlib, io, json, os, sys
from prunesid_cli.command import main
for arguments, has_token in json.loads(sys.argv[1]):
    if not has_token:
        del os.environ["HF_TOKEN"]
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main(["push-space", *arguments])
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([status, output.getvalue(), errors.getvalue()]))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The Hub after all calls, and the status, output and errors of each."""
    home = tmp_path_factory.mktemp("home")
    (home / "model").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with Hub() as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(CALLS)],
            env=kept | own | {"PYTHONPATH": str(ROOT)},
            cwd=home,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return hub, [json.loads(line) for line in process.stdout.splitlines()]


def card(files):
    return yaml.safe_load(files["README.md"].decode().split("---\n")[1])


@pytest.mark.contract
def test_a_space_is_complete_and_a_second_push_replaces_it(pushed):
    hub, [(status, output, _), (second_status, *_), *_] = pushed
    assert status == second_status == 0
    repo = hub.repos["owner/page"]
    assert (repo.kind, repo.sdk, repo.private) == ("space", "gradio", False)
    _, files, replaced = repo.commits.values()
    assert json.loads(output.splitlines()[-1])["files"] == len(files) - 1  # and .gitattributes
    settings = card(files)
    assert settings["sdk"] == "gradio" and settings["app_file"] == "app.py" and "models" not in settings
    assert len(settings["short_description"]) <= 60
    compile(files["app.py"], "app.py", "exec")
    assert b"model=None" in files["app.py"]
    names = set(files)
    assert {"embedded/config.json", "embedded/model-00001-of-00002.safetensors", "embedded/README.md"} <= names
    assert {"prunesid_cli/app_files/page.js", "prunesid_cli/app_files/example_1.jpg"} <= names
    assert {f"modeling_prunesid/{path.name}" for path in (ROOT / "modeling_prunesid").glob("*.py")} <= names
    assert "modeling_prunesid/configuration/llava_1.5_64.json" in names
    assert not any("00002-of-00002" in name or "pycache" in name for name in names)

    assert card(replaced)["models"] == ["owner/llava"] and b"model='owner/llava'" in replaced["app.py"]
    assert not any(name.startswith("embedded/") for name in replaced)


@pytest.mark.app
@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_the_space_answers_a_question(pushed, tmp_path):
    """Its files alone, as the Hub holds them, beside the packages of its requirements."""
    hub, _ = pushed
    _, files, _ = hub.repos["owner/page"].commits.values()
    for name, content in files.items():
        path = tmp_path / "space" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = files["app.py"].decode()
    assert script.count("port=7860") == 1 and script.count('host="0.0.0.0"') == 1
    script = script.replace("port=7860", f"port={port}").replace("0.0.0.0", "127.0.0.1")
    (tmp_path / "space" / "app.py").write_text(script)
    overlay = [path for path in sys.path if path and Path(path, "gradio").is_dir()]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(overlay), "PYTHONSAFEPATH": ""}
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=tmp_path / "space", env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + SECONDS
        while "The page is at" not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.5)
        with visit((f"http://127.0.0.1:{port}/", None)) as visitor:
            visitor.example("A sign")
            assert visitor.ask("what word is printed?")[0] == "park"
    finally:
        process.terminate()
        process.wait()
    loaded = json.loads(subprocess.run(
        [sys.executable, "-c", "import json, prunesid_cli; print(json.dumps(prunesid_cli.__file__))"],
        cwd=tmp_path / "space", env=environment, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout)  # fmt: skip
    assert Path(loaded).is_relative_to(tmp_path)


@pytest.mark.contract
def test_what_a_space_cannot_have_is_a_sentence(pushed):
    hub, [_, _, *refused] = pushed
    sentences = (
        "The Space must be named ORG/NAME, got 'page'.",
        "--model must be on the Hub for a Space to load it",
        "Invalid username or password",
    )
    for (status, _, errors), sentence in zip(refused, sentences, strict=True):
        assert status == 2 and sentence in errors and "Traceback" not in errors
    assert set(hub.repos) == {"owner/page"}


def test_the_requirements_are_those_of_the_package_and_its_extra():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"].split() + setup["options.extras_require"]["app"].split()
    assert sorted(REQUIREMENTS) == sorted(name for name in wanted if not name.startswith("gradio"))
    assert CPU_WHEELS.startswith("--extra-index-url https://")
