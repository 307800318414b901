"""
Every command on every family: `calibrate`, `demo --model`, `evaluate --data`, `tune`, and the lmms-eval class answer
about images through the checkpoint's own processor. One process, which has torchvision, runs them all.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import ROWS, SHIPPED, is_at_least
from tiny_processors import SINCE

from modeling_prunesid import FAMILIES


pytestmark = [pytest.mark.contract, pytest.mark.timeout(1800)]
NEEDS = {"smolvlm": "num2words"}
FAMILIES_OF = [
    name
    for name in FAMILIES
    if name in ROWS
    and ROWS[name].is_installed
    and is_at_least(SINCE.get(name, SHIPPED))
    and importlib.util.find_spec(NEEDS.get(name, "torch")) is not None
]


@pytest.fixture(scope="module")
def reports(request, torchvision_folder, tmp_path_factory):
    """What the commands reported for each family whose test is run."""
    asked = {item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)}
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), *filter(None, sys.path)]
    script = [sys.executable, str(Path(__file__).with_name("drive_commands.py")), str(torchvision_folder)]
    done = subprocess.run(
        [*script, str(tmp_path_factory.mktemp("commands") / "all"), *sorted(asked)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {report["family"]: report for report in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", FAMILIES_OF)
def test_every_command_takes_it(name, reports):
    report = reports[name]
    if name in ("aria", "idefics2"):  # whose tokens are queries, and no patches of a grid
        assert "tokens of a view form no grid that could be drawn." in report.pop("explain")["error"]
    else:
        rows, columns = report["explain"]["grid"]
        assert report["explain"]["kept"] == report["budget"] < rows * columns
    errors = {command: own["error"] for command, own in report.items() if isinstance(own, dict) and "error" in own}
    assert not errors, "\n".join(f"{command}: {error}" for command, error in errors.items())

    found = report["calibrate"]
    assert abs(found["mean_budget"] - report["budget"]) < 0.5 and found["views"] >= 4

    stock, off, pruned = report["demo"]
    assert stock["answer"] == off["answer"] and stock["visual_tokens"] == off["visual_tokens"]
    assert report["budget"] <= pruned["visual_tokens"] < off["visual_tokens"]

    stock, off, *methods = report["evaluate"]
    assert stock["tokens"] == off["tokens"] and stock["accuracy"] == off["accuracy"]
    assert {"prunesid-paper", "prunesid-auto", "random"} <= {row["method"] for row in methods}
    assert all(report["budget"] <= row["tokens"] < off["tokens"] and row["first_token_ms"] > 0 for row in methods)

    assert report["tune"]["steps"] == 2 and report["tune"]["trained"] > 0

    found = report["lmms_eval"]
    assert len(found["answers"]) == 3
    assert report["budget"] <= found["kept_visual_tokens"] < found["all_visual_tokens"]
