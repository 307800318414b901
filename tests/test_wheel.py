"""The wheel in an empty environment: what it holds, and its command."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest


pytestmark = pytest.mark.contract
ROOT = Path(__file__).parents[1]
SOURCES = ("modeling_prunesid", "prunesid_cli", "configuration", "embedded", "README.md", "LICENSE", "setup.cfg")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "model-00002-of-00002.safetensors*")
    for name in (*SOURCES, "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def prunesid(wheel, tmp_path_factory):
    """Runs the command of an environment that holds the wheel, and beside it the packages that this one depends on."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([sys.executable, *install], env=kept, check=True)
    [site_packages] = home.glob("lib/python*/site-packages")
    overlay = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    (site_packages / "dependencies.pth").write_text("\n".join([*overlay, sysconfig.get_paths()["purelib"]]) + "\n")

    def run(*arguments, status=0):
        done = subprocess.run(
            [home / "bin" / "prunesid", *arguments],
            cwd=home,
            env={**kept, "PRUNESID_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        return done

    return run


def test_it_holds_the_presets_the_embedded_model_and_the_marker_of_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"modeling_prunesid/configuration/{path.name}" for path in (ROOT / "configuration").iterdir()} <= names
    assert {"modeling_prunesid/py.typed", "prunesid_cli/scenes_emoji.ttf"} <= names
    packaged = {name.rpartition("/")[2] for name in names if name.startswith("prunesid_cli/embedded_model/")}
    assert packaged == {path.name for path in (ROOT / "embedded").iterdir()} - {"model-00002-of-00002.safetensors"}
    assert not [name for name in names if name.startswith(("scripts", "tests", "configuration/", "embedded/"))]


def test_its_help_lists_the_commands(prunesid):
    assert "{" not in (said := prunesid("--help").stdout)
    for name in ("demo", "generate", "convert", "calibrate", "evaluate", "benchmark", "presets", "doctor"):
        assert re.search(rf"^ +{name}\b", said, re.MULTILINE)


def test_it_finds_its_presets(prunesid):
    assert json.loads(prunesid("presets", "llava_1.5_64_spread").stdout) == {"budget": 64, "method": "spread"}
    refused = prunesid("presets", "llava_1.5_65", status=2).stderr
    assert refused.splitlines()[-1].startswith("prunesid presets: A preset must be ")


def test_its_doctor_finds_no_problem(prunesid):
    report = json.loads(prunesid("doctor").stdout.splitlines()[-1])
    assert report["problems"] == []
    assert report["works"]["embedded model"].startswith("comes with the package")
    assert report["versions"]["prunesid-transformers"] == "0.2.0"
