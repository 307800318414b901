"""
Runs the commands that answer, calibrate and train, and the lmms-eval class, on tiny checkpoints of families, in one
process that has torchvision. Arguments: the folder of torchvision, a folder to write to, families. Each family gets a
line of JSON: for each command what it reports, or what it raised.
"""

import sys


if __name__ == "__main__":
    from torchvision_shim import add_torchvision

    library = add_torchvision(sys.argv[1])

import io
import json
import logging
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiny_families
import torch
import transformers
from families import ROWS
from lmms_stand_in import stand_in
from PIL import Image

from modeling_prunesid import explain, visualize
from prunesid_cli import demo, own_rows
from prunesid_cli.command import build_parser, import_command
from prunesid_cli.generate import load_processor


# Budgets of a view, where it has fewer tokens than ten.
FEW_TOKENS = {
    **dict.fromkeys(("step3p7", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "perception_lm"), 2),
    "inkling_mm_model": 1,
}
QUESTION = "word20 word21"
TUNE = ("--batch-size", "2", "--max-steps", "2", "--save-steps", "2", "--warmup-steps", "0", "--held-out", "0.25")
METRICS: list = []


def make_rows(folder):
    """Pictures of two shapes with questions; returns the file of rows."""
    (folder / "pictures").mkdir(parents=True)
    rows = ["image,question,answer"]
    for seed in range(4):
        shape = (40, 64, 3) if seed % 2 else (64, 64, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{seed}.png")
        rows.append(f"pictures/{seed}.png,{QUESTION},word{40 + seed % 2}")
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")
    return folder / "rows.csv"


def call(name, *arguments):
    module = import_command(name)
    return module.run(build_parser(name, module).parse_args([name, *map(str, arguments)]))


def calibrate(checkpoint, rows, out, budget):
    pictures = rows.parent / "pictures"
    bounds = ("--budget", budget, "--min-budget", 1)
    return call("calibrate", checkpoint, pictures, *bounds, "--output", out / "calibrated.json")


def show(checkpoint, rows, out, budget):
    picture = rows.parent / "pictures" / "0.png"
    asked = ("--image", picture, "--prompt", QUESTION, "--budgets", budget, "--output", out / "demo")
    return call("demo", "--model", checkpoint, *asked)["rows"]


def evaluate(checkpoint, rows, out, budget):
    given = ("--data", rows, "--budgets", budget, "--max-new-tokens", 2, "--batch-size", 2, "--out", out / "evaluated")
    call("evaluate", "--model", checkpoint, *given)
    return json.loads((out / "evaluated" / "accuracy.json").read_text())["rows"]


def tune(checkpoint, rows, out, budget):
    given = ("--budget", budget, "--output", out / "tuned", "--max-new-tokens", 2)
    return call("tune", rows, "--model", checkpoint, *given, *TUNE)


def lmms_eval(checkpoint, rows, out, budget):
    """Three questions to a saved variant, two at a time."""
    ROWS[checkpoint.name].head.from_pretrained(checkpoint, prunesid_config={"budget": budget}).save_pretrained(
        out / "variant"
    )
    model = PLUGIN.PruneSIDForLmmsEval(pretrained=str(out / "variant"), batch_size=2, device="cpu")
    model.task_dict = {"task": {"test": [Image.open(rows.parent / "pictures" / f"{seed}.png") for seed in (0, 2, 1)]}}

    def messages(image):
        content = [{"type": "image", "url": image.convert("RGB")}, {"type": "text", "text": QUESTION}]
        return [{"role": "user", "content": content}]

    asked = [
        SimpleNamespace(args=("", messages, {"max_new_tokens": 3}, index, "task", "test"), task_name="task")
        for index in range(3)
    ]
    return {"answers": [answer.text for answer in model.generate_until(asked)], **METRICS[-1]}


def draw(checkpoint, rows, out, budget):
    """What `explain` finds, and that it can be drawn."""
    model = ROWS[checkpoint.name].head.from_pretrained(checkpoint, prunesid_config={"budget": budget})
    picture = Image.open(rows.parent / "pictures" / "0.png")
    found = explain(model, load_processor(str(checkpoint), model), picture)
    visualize(picture, found)
    return {"grid": found.grid, "kept": len(found.kept)}


COMMANDS = {"calibrate": calibrate, "demo": show, "evaluate": evaluate, "tune": tune, "lmms_eval": lmms_eval}
COMMANDS["explain"] = draw


def report_of(family, folder, rows):
    report, checkpoint = {}, tiny_families.save(family, folder / "checkpoints" / family)
    for name, run in COMMANDS.items():
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                report[name] = run(checkpoint, rows, folder / "out" / family, FEW_TOKENS.get(family, 5))
        except Exception:
            report[name] = {"error": traceback.format_exc()[-3000:]}
    return {"family": family, "budget": FEW_TOKENS.get(family, 5), **report}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    demo.ROUNDS = own_rows.ROUNDS = 1
    place = Path(sys.argv[2])
    questions = make_rows(place)
    with stand_in(METRICS) as PLUGIN:
        for own in sys.argv[3:]:
            print(json.dumps(report_of(own, place, questions)), flush=True)
