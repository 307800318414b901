"""`prunesid generate ROWS.jsonl`: a killed job loses and repeats nothing, and a row that fails stops no other."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_checkpoint import picture, save_checkpoint

from prunesid_cli import batch
from prunesid_cli.batch import Output, Shard, answer_rows, describe, read_messages
from prunesid_cli.command import main


ROOT = Path(__file__).parents[1]
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def job_of(source: Path) -> dict:
    return {"rows": describe(source)[0], "input": describe(source)[1], "prompt": "what?"}


def echo(requests) -> list[str]:
    """Stands in for a model: the text of the question and the sizes of the images."""
    parts = [request.messages[-1]["content"] for request in requests]
    return [" ".join(part.get("text") or str(part["image"].size) for part in own) for own in parts]


def run_stand_in(source: Path, out: Path, shard: Shard = Shard(), answer=echo, batch_size: int = 1) -> dict:  # noqa: B008
    return answer_rows(source, Output(out), job_of(source), shard, lambda: answer, batch_size)


def slow_echo(requests):
    time.sleep(0.001)
    return echo(requests)


def test_twenty_kills_at_random_lose_and_repeat_nothing(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"id": f"q{row}", "prompt": f"word{row}"} for row in range(2000)])
    out, processes = tmp_path / "out.jsonl", multiprocessing.get_context("fork")
    drawn, seen = random.Random(0), []
    for kill in range(20):
        count = 1 + kill % 3  # another number of processes each time
        started = [
            processes.Process(target=run_stand_in, args=(source, out, Shard(rank, count, rank), slow_echo))
            for rank in range(count)
        ]
        for process in started:
            process.start()
        time.sleep(drawn.uniform(0.01, 0.15))
        for process in started:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        lines = [line for part in out.with_name("out.jsonl.parts").glob("part*") for line in part.open("rb")]
        rows = [json.loads(line)["row"] for line in lines if line.endswith(b"\n")]
        assert len(rows) == len(set(rows)) and set(seen) <= set(rows)
        seen = rows
    assert 0 < len(seen) < 2000 or out.exists()
    assert run_stand_in(source, out)["answered"] == 2000
    assert read(out) == [{"row": row, "id": f"q{row}", "answer": f"word{row}"} for row in range(2000)]


def test_a_process_killed_inside_its_progress_bar_stops_no_other(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "word"}])
    run_stand_in(source, tmp_path / "before.jsonl")  # makes whatever locks a bar has
    locked, going = multiprocessing.get_context("fork").Pipe()

    def killed() -> None:
        with batch._Progress.get_lock():
            going.send("locked")
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    assert locked.recv() == "locked"
    process.kill()
    process.join()
    assert run_stand_in(source, tmp_path / "out.jsonl")["answered"] == 1


def test_half_a_line_is_dropped_wherever_it_was_cut(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"wört{row}"} for row in range(6)])
    run_stand_in(source, tmp_path / "whole.jsonl")
    written = (tmp_path / "whole.jsonl.parts/part-00000.jsonl").read_bytes()
    part = tmp_path / "out.jsonl.parts/part-00000.jsonl"
    for cut in range(len(written)):
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        Output(tmp_path / "out.jsonl").begin(job_of(source))
        part.write_bytes(written[:cut])
        asked = []
        found = run_stand_in(
            source, tmp_path / "out.jsonl", answer=lambda own, asked=asked: asked.extend(own) or echo(own)
        )
        assert found["answered"] == 6
        assert len(asked) == 6 - written[:cut].count(b"\n")
        assert part.read_bytes() == written
        assert (tmp_path / "out.jsonl").read_bytes() == written


def test_what_a_crash_of_the_machine_left_is_answered_again(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"word{row}"} for row in range(4)])
    run_stand_in(source, tmp_path / "out.jsonl")
    part = tmp_path / "out.jsonl.parts/part-00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0] + b"\0" * 20 + b"\n" + lines[2] + lines[3])
    run_stand_in(source, tmp_path / "out.jsonl")
    assert [record["answer"] for record in read(tmp_path / "out.jsonl")] == [f"word{row}" for row in range(4)]


def test_every_kind_of_broken_row_is_recorded_and_skipped(tmp_path):
    picture().save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    text = {"type": "text", "text": "a"}
    rows = [
        ({"image": "good.png", "prompt": "a"}, "(28, 28) a"),
        ({"images": ["good.png", str(tmp_path / "good.png")]}, "(28, 28) (28, 28) what?"),
        ({"id": "cut", "image": "cut.png"}, "cut.png is not a readable image"),
        ({"image": "empty.png"}, "empty.png is not a readable image"),
        ({"image": "text.png"}, "text.png is not a readable image"),
        ({"image": "none.png"}, "none.png is not a readable image"),
        ({"image": "x" * 5000}, "is not a readable image"),
        ({"image": "nul\0byte"}, "is not a readable image"),
        ({"image": str(tmp_path)}, "is not a readable image"),
        ({"image": "data:image/png;base64,AAAA"}, "is not a readable image"),
        ({"image": 7}, "An image must be a path or a URL, got '7'"),
        ({"images": "good.png"}, "images must be a list"),
        ({"prompt": 5}, "prompt must be a string"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "has a prompt and messages"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"role": "user", "content": None}]}, "content of a message must be"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "A part must be of type"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, text]}]}, "An image must be a path or a URL"),
        ({"messages": [{"role": "user", "content": "b"}], "image": "good.png"}, "more than its messages have parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, text]}], "image": "good.png"}, "(28, 28) a"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "good.png"}}]}]},
            "(28, 28)",
        ),
        ("[1, 2]", "must be a JSON object"),
        ("{broken", "The row is no JSON"),
        ("[" * 100_000, "The row is no JSON"),
        ({"prompt": "\ud800"}, "\ud800"),
        ({"id": {"any": ["thing"]}, "prompt": "last"}, "last"),
    ]
    source = write_rows(tmp_path / "rows.jsonl", [row for row, _ in rows])
    found = run_stand_in(source, tmp_path / "out.jsonl", batch_size=3)
    records = read(tmp_path / "out.jsonl")
    assert len(records) == len(rows) == found["answered"] + found["failed"]
    for record, (row, expected) in zip(records, rows):
        given = record.get("answer", record.get("error"))
        assert given == expected if "answer" in record else expected in given, row
    assert found["answered"] == 6
    assert records[2]["id"] == "cut" and records[-1]["id"] == {"any": ["thing"]} and records[0]["id"] == 0


def test_a_row_that_the_model_refuses_leaves_the_others_of_its_batch(tmp_path):
    def refuses(requests):
        if any("word2" in answer for answer in echo(requests)):
            raise ValueError("too long")
        return echo(requests)

    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"word{row}"} for row in range(5)])
    run_stand_in(source, tmp_path / "out.jsonl", answer=refuses, batch_size=4)
    assert [record.get("answer") for record in read(tmp_path / "out.jsonl")] == [
        "word0",
        "word1",
        None,
        "word3",
        "word4",
    ]
    assert read(tmp_path / "out.jsonl")[2]["error"] == "too long"


def test_another_fault_ends_the_job_and_records_nothing(tmp_path):
    def fails(requests):
        raise RuntimeError("the device is gone")

    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(RuntimeError):
        run_stand_in(source, tmp_path / "out.jsonl", answer=fails)
    assert run_stand_in(source, tmp_path / "out.jsonl")["answered"] == 1


def test_the_last_of_several_processes_merges_in_the_order_of_the_rows(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"word{row}"} for row in range(7)])
    out = tmp_path / "out.jsonl"
    assert run_stand_in(source, out, Shard(2, 3))["missing"] == 5 and not out.exists()
    assert run_stand_in(source, out, Shard(0, 3))["missing"] == 2 and not out.exists()
    assert run_stand_in(source, out, Shard(1, 3)) == {"rank": 1, "rows": 7, "answered": 7, "failed": 0, "missing": 0}
    assert [record["row"] for record in read(out)] == list(range(7))


def test_a_finished_job_loads_no_model(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, "", "  ", {"prompt": "b"}])
    run_stand_in(source, tmp_path / "out.jsonl")
    found = answer_rows(source, Output(tmp_path / "out.jsonl"), job_of(source), Shard(), pytest.fail)
    assert found["answered"] == 2


def test_other_jobs_are_refused(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    out = tmp_path / "out.jsonl"
    run_stand_in(source, out)
    write_rows(source, [{"prompt": "b"}])
    with pytest.raises(ValueError, match=r"was begun with input=.* Choose another --output"):
        run_stand_in(source, out)
    (tmp_path / "other.jsonl").write_text("kept")
    with pytest.raises(ValueError, match="is of no job that can go on"):
        run_stand_in(source, tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_text() == "kept"
    with pytest.raises(ValueError, match="must be a file, got the folder"):
        run_stand_in(source, tmp_path)


def test_a_process_that_outlived_its_launcher_is_waited_for(tmp_path, capfd):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"word{row}"} for row in range(200)])
    out, processes = tmp_path / "out.jsonl", multiprocessing.get_context("fork")
    orphan = processes.Process(target=run_stand_in, args=(source, out, Shard(), slow_echo))
    orphan.start()
    while not list(tmp_path.glob("out.jsonl.parts/part-*")):
        time.sleep(0.001)
    assert run_stand_in(source, out)["answered"] == 200
    orphan.join()
    part = read(tmp_path / "out.jsonl.parts/part-00000.jsonl")
    assert [record["row"] for record in part] == list(range(200))
    assert "is written by another process" in capfd.readouterr().err


@pytest.mark.parametrize("values", [("2", "2", "0"), ("-1", "2", "0"), ("a", "2", "0"), ("0", "1", "-1")])
def test_ranks_that_are_none(values, monkeypatch):
    for name, value in zip(RANKS, values):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="The ranks in the environment must be"):
        Shard.of_environment()


def test_the_ranks_of_mpi(monkeypatch):
    for name, value in (("RANK", "3"), ("SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert Shard.of_environment() == (3, 4, 1)


def test_a_path_is_that_beside_the_rows_first(tmp_path, monkeypatch):
    (tmp_path / "beside").mkdir()
    picture().resize((5, 6)).save(tmp_path / "beside/a.png")
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    monkeypatch.chdir(tmp_path)
    opened = read_messages({"images": ["a.png", "b.png"]}, tmp_path / "beside", "what?")[0]["content"]
    assert [part["image"].size for part in opened[:2]] == [(5, 6), (28, 28)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for seed in range(4):
        picture(seed).save(folder / f"{seed}.png")
    rows = [{"id": f"q{row}", "image": f"{row % 4}.png", "prompt": f"word{row} word9"} for row in range(8)]
    rows[3]["image"] = "none.png"
    rows[5]["images"] = ["2.png"]
    rows[6] = {"prompt": "word6"}
    write_rows(folder / "rows.jsonl", rows)
    return save_checkpoint(folder)


def generate_rows(checkpoint: Path, out: Path, *options: str) -> list[str]:
    model = ["--model", str(checkpoint), "--budget", "8", "--max-new-tokens", "4"]
    return ["generate", str(checkpoint / "rows.jsonl"), "--output", str(out), *model, *options]


def test_the_command_answers_as_for_one_image(checkpoint, tmp_path, capsys):
    main(generate_rows(checkpoint, tmp_path / "out.jsonl"))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["answered"], report["failed"], report["missing"]) == (7, 1, 0)
    answers = read(tmp_path / "out.jsonl")
    assert [record["id"] for record in answers] == ["q0", "q1", "q2", "q3", "q4", "q5", 6, "q7"]
    assert "none.png" in answers[3]["error"]
    question = ["--image", str(checkpoint / "1.png"), "--prompt", "word1 word9", "--max-new-tokens", "4"]
    main(["generate", str(checkpoint), "--budget", "8", *question])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["answers"][0]["visual_tokens"] == 8
    assert answers[1]["answer"] == report["answers"][0]["answer"] != ""

    main(generate_rows(checkpoint, tmp_path / "batched.jsonl", "--batch-size", "3"))
    assert read(tmp_path / "batched.jsonl") == answers


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL"], "A model needs --image"),
        (["MODEL", "--image", "a.png", "--model", "b"], "A model needs --image"),
        (["rows.jsonl"], "need --output"),
        (["rows.jsonl", "--output", "out.jsonl", "--image", "a.png"], "need --output"),
        (["rows.jsonl", "--output", "out.jsonl", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["rows.jsonl", "--output", "out.jsonl", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["rows.jsonl", "--output", "out.jsonl", "--merge"], "holds no job"),
        (["none.jsonl", "--output", "out.jsonl"], "none.jsonl"),
    ],
)
def test_calls_that_fit_neither_form(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(SystemExit) as ended:
        main(["generate", *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_merge_writes_what_there_is(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Other tests of this process may have registered a device that only pretends.
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    main(generate_rows(checkpoint, tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()
    main(generate_rows(checkpoint, tmp_path / "out.jsonl", "--merge"))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == {"rows": 8, "answered": 3, "failed": 1, "missing": 4}
    assert [record["row"] for record in read(tmp_path / "out.jsonl")] == [1, 3, 5, 7]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_of_a_launcher(launcher, checkpoint, tmp_path, capsys):
    """All are killed at the first answer; the same command goes on."""
    main(generate_rows(checkpoint, tmp_path / "expected.jsonl"))
    out = tmp_path / "out.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def launch(count):
        launchers = {
            "torchrun": ["torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "0"],
            "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)],
        }
        command = [sys.executable, "-m", *launchers[launcher], "-m", "prunesid_cli"]
        return subprocess.Popen(
            [*command, *generate_rows(checkpoint, out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    parts = out.with_name("out.jsonl.parts")
    first = launch(2)
    while first.poll() is None and not any(part.stat().st_size for part in parts.glob("part-*")):
        time.sleep(0.005)
    for process in (*psutil.Process(first.pid).children(recursive=True), first):
        process.kill()
    first.wait()
    begun = [line for part in parts.glob("part-*") for line in part.open("rb")]
    assert 0 < len(begun) < 8
    second = launch(2)
    said = second.communicate()[0]
    assert second.returncode == 0, said
    assert len(list(parts.glob("part-*"))) == 2, said
    assert '"rank": 1' in said
    assert all(any(line.startswith(own) for part in parts.glob("part-*") for line in part.open("rb")) for own in begun)
    assert read(out) == read(tmp_path / "expected.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_is_flat_over_100_000_rows(tmp_path):
    """In a process of its own: its largest size at row 20,000 and at the end, merged, in MiB."""
    picture().save(tmp_path / "a.png")
    write_rows(tmp_path / "rows.jsonl", [{"id": row, "image": "a.png", "prompt": "a" * 200} for row in range(100_000)])
    code = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from prunesid_cli.batch import Output, Shard, answer_rows, describe
size = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
sizes = []
def answer(requests):
    if requests[0].row == 20_000:
        sizes.append(size())
    return ["word " * 40]
folder = Path({str(tmp_path)!r})
rows = folder / "rows.jsonl"
job = dict(zip(("rows", "input"), describe(rows)), prompt="what?")
found = answer_rows(rows, Output(folder / "out.jsonl"), job, Shard(), lambda: answer, 1)
assert found["answered"] == 100_000
print(size() - sizes[0])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout.splitlines()[-1]) < 8
