"""
The shell commands of the pages, run as they stand: with a tiny checkpoint in place of that on the Hub, smaller budgets
and scenes, and without the upload. What cannot run here is named, with where it is tested.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT, code_of
from tiny_checkpoint import picture, save_checkpoint

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration


NOT_RUN = {
    r"pip install|venv": "installs: .ci/run and tests/test_wheel.py",
    r"pytest": "these tests",
    r"hf upload|hf auth|push-space": "the Hub: tests/test_hub.py and tests/test_push_space.py have a stand-in",
    r"vllm serve|transformers serve|load_test": "servers: pytest -m engines",
    r"prunesid app": "a server: pytest -m app",
    r"--nnodes|accelerate launch": "several machines or GPUs",
    r"lmms-eval|paper_tables|lmms_task": "lmms-eval: tests/test_lmms_eval.py and tests/test_results_pages.py",
    r"MGM-7B": "published checkpoints: tests/test_convert_mini_gemini.py",
    r"train_smol|--gpu|out/smol": "a GPU: tests/test_train_smol.py and tests/test_benchmark.py",
    r"prunesid evaluate (?!--out out/mine)|results_pages|ceiling": "an hour: tests/test_evaluate.py",
    r"^python -m prunesid_cli.embedded": "fetches the tower: tests/test_embedded.py",
    r"tune_embedded": "an hour and a half: tests/test_tune.py",
}
SMALLER = {
    r" --push-to-hub ORG/NAME( --private)?": "",
    r"ORG/NAME": "out/llava-64",
    r"--budget 64": "--budget 8",
    r"--min-budget 16": "--min-budget 2",
    r"--budgets 192 128 64": "--budgets 16 8",
    r"--nproc-per-node 8": "--nproc-per-node 2",
    r"--scenes \d+": "--scenes 2",
    r"(?=--output out/llava-64-(tuned|lora))": "--max-steps 2 --max-new-tokens 2 ",
}


def commands_of(page):
    lines = "".join(code_of(page, "bash")).replace("\\\n", " ").splitlines()
    lines = [" ".join(shlex.split(line, comments=True)).strip() for line in lines]
    return [line for line in lines if line and not any(re.search(pattern, line) for pattern in NOT_RUN)]


RUN = {page: commands_of(page) for page in PAGES if commands_of(page)}


@pytest.fixture
def folder(tmp_path):
    """What the pages take for granted: a checkpoint, a variant, images, and rows of questions."""
    save_checkpoint(base := tmp_path / "llava-hf" / "llava-1.5-7b-hf")
    (tmp_path / "photos").mkdir()
    rows = []
    for seed in range(8):
        picture(seed).save(tmp_path / "photos" / f"{seed}.png")
        rows.append({"image": f"photos/{seed}.png", "question": f"word{10 + seed}", "answer": "word40"})
    given = [{**row, "prompt": row["question"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    for name, own in (("rows.csv", rows[:6]), ("val.csv", rows[6:])):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(own)
    variant = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config={"budget": 8})
    variant.save_pretrained(tmp_path / "out" / "variant", thin=True)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run(page, folder):
    if not any(re.search(r"--output out/llava-64( |$)", line) for line in RUN[page]):
        (folder / "out" / "llava-64").symlink_to("variant")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    bin_folder = Path(sys.executable).parent
    for line in RUN[page]:
        for pattern, text in SMALLER.items():
            line = re.sub(pattern, text, line)
        words = shlex.split(line)
        program = [sys.executable, "-m", "prunesid_cli"] if words[0] == "prunesid" else [bin_folder / words[0]]
        if "--output" in words and (folder / words[words.index("--output") + 1]).is_file():
            (folder / words[words.index("--output") + 1]).unlink()
        done = subprocess.run(
            [*program, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_what_is_run():
    """Every reason not to run a command, and every smaller number, still has a command on some page."""
    lines = "".join(code for page in PAGES for code in code_of(page, "bash"))
    assert RUN
    assert [pattern for pattern in [*NOT_RUN, *SMALLER] if not re.search(pattern, lines, re.MULTILINE)] == []
