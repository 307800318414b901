"""The page with families of tiles, of any size and of clips: pictures, clips and every method that fits them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.app
SCRIPT = """
import sys
from torchvision_shim import add_torchvision
library = add_torchvision(sys.argv[1])
import json
from pathlib import Path
import tiny_app
from PIL import Image
from tiny_checkpoint import picture
from prunesid_cli.app_model import AppModel, Choice
from prunesid_cli.app_page import Page, example_pictures

family, folder = sys.argv[2:]
model = AppModel(str(tiny_app.save(family, Path(folder))), example_pictures())
page = Page(model)
report = {"methods": page.methods, "reads_clips": model.reads_clips}
clip = tuple(picture(seed).resize((90, 60)) for seed in range(8))
for name, subject in (("picture", picture().resize((120, 60))), ("clip", clip)):
    found = report[name] = {}
    for method in page.methods:
        status, drawn, sentences, code, part, limit = page.show(subject, "what is it", 5, method, False, 2)
        compile(code, method, "exec")
        *_, (done, full, kept, numbers) = page.ask(subject, "what is it", 5, method, False, 2)
        *_, last = model.answer(subject, "what is it", Choice(5, method))
        *_, whole = model.answer(subject, "what is it", Choice(None, model.own_method))
        assert (full, kept) == (whole.text, last.text)
        views = model.look(subject, Choice(5, method), "what is it")
        found[method] = {
            "status": status, "drawn": drawn.count("ps-kept"), "kept": [len(view.kept) for view in views],
            "grid": views[0].grid, "parts": part["maximum"] if part["visible"] else 1,
            "visual_tokens": [whole.visual_tokens, last.visual_tokens],
            "sizes": [view.picture and list(view.picture.size) for view in views],
        }
    assert "ps-small" in page.strip(subject, "what is it", "paper", 2)
    assert "only by" in page.compare(subject, "what is it", 5, "paper", page.methods[-1], 2)
print(json.dumps(report))
"""
# of a family: T of a view of the picture and of the clip, their views, and the tokens kept besides the patches of each
EXPECTED = {
    "video_llava": {"picture": ((7, 7), 1, 0), "clip": ((7, 7), 8, 1)},
    "qwen2_5_vl": {"picture": ((8, 15), 1, 0), "clip": ((8, 11), 4, 0)},
    "internvl": {"picture": ((4, 4), 3, 0), "clip": ((4, 4), 8, 0)},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_pictures_and_clips_are_shown_and_asked_about(family, tmp_path, torchvision_folder):
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(torchvision_folder), family, str(tmp_path / family)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["reads_clips"] and {"paper", "release", "spread", "divprune", "random"} <= set(report["methods"])
    for name, (grid, num_views, besides) in EXPECTED[family].items():
        for method, found in report[name].items():
            assert "alert" not in found["status"], found["status"]
            assert found["grid"] == list(grid) and found["parts"] == num_views == len(found["kept"]), (name, method)
            tokens = grid[0] * grid[1] + besides
            assert found["visual_tokens"] == [tokens * num_views, 5 * num_views], (name, method)
            own_cls = method in ("release", "visionzip") and found["drawn"] == 4 - besides
            assert found["drawn"] == 5 - besides - own_cls, (name, method)
            assert (num_views == 1) == (found["sizes"] == [None])
