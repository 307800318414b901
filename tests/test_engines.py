"""
Engines answer from a folder alone as `generate` does, and nothing that a client sends ends them: `pytest -m engines`.

Installs `transformers serve` beside the tests, and vLLM for CPUs into `out/vllm`, and asks them on loopback.
"""

import base64
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoint import picture, save_checkpoint

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor


pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import vllm_server  # noqa: E402


sys.path.remove(str(ROOT / "scripts"))
# What `transformers[serving]` needs beside what the tests have, without torch.
SERVING = (
    "fastapi==0.165.0",
    "starlette==1.10.0",
    "uvicorn==0.54.0",
    "openai==3.57.0",
    "distro==1.9.0",
    "jiter==0.19.0",
    "sniffio==1.3.1",
    "opentelemetry-api==1.45.2",
)
# The server, in a process that cannot import our package.
SERVE = """
import sys
sys.modules["modeling_prunesid"] = None
from transformers.cli.transformers import main
sys.argv = ["transformers", "serve", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def serving(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *SERVING]
    subprocess.run(install, check=True)
    return folder


@pytest.fixture(scope="module", params=["random", "embedded"])
def variant(request, tmp_path_factory) -> tuple[Path, list[list]]:
    """A folder, and five questions: pictures, then a text."""
    if request.param == "embedded":
        from prunesid_cli.embedded import complete
        from prunesid_cli.scenes import ask, make_scene

        scenes = [make_scene("salient", "test", index) for index in range(5)]
        return complete(), [[scene.image, ask(scene)[0].text] for scene in scenes]
    base = save_checkpoint(tmp_path_factory.mktemp("base"))
    folder = tmp_path_factory.mktemp("variant")
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(
        base, dtype=torch.float32, prunesid_config={"budget": 8}
    )
    model.save_pretrained(folder)
    one = [[picture(seed), f"word{seed} word9"] for seed in range(3)]
    return folder, [*one, [picture(3), picture(4), "word11"], ["word12 word13"]]


@pytest.fixture
def server(serving, variant, tmp_path):
    """The address of a server of the variant."""
    port = vllm_server.free_port()
    place = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "PYTHONPATH": str(serving), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(variant[0]), "--trust-remote-code", *place],
            env=environment,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def part_of(given) -> dict:
    if isinstance(given, str):
        return {"type": "text", "text": given}
    buffer = io.BytesIO()
    given.save(buffer, "PNG")
    return part_of_data(buffer.getvalue())


def part_of_data(data: bytes) -> dict:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"},
    }


def request(address: str, folder: Path, parts: list[dict], stream: bool) -> tuple[str, int | None]:
    """The text of an answer, and how many tokens the prompt had."""
    messages = [{"role": "user", "content": parts}]
    body = {"model": str(folder), "messages": messages, "max_tokens": 6, "temperature": 0, "stream": stream}
    sent = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(sent, timeout=300) as answer:
        said = answer.read().decode()
    if not stream:
        found = json.loads(said)
        return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]
    chunks = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in json.loads(chunk)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas), None


def expected_of(folder: Path, questions: list[list]) -> list[tuple[str, int]]:
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = PruneSIDLlavaProcessor.from_pretrained(folder)
    answers = []
    for question in questions:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in question
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        length = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, length:]
        answers.append((processor.decode(output, skip_special_tokens=True), length))
    return answers


def test_a_server_answers_as_generate_does(server, variant):
    folder, questions = variant
    expected = expected_of(folder, questions)
    assert len({text for text, _ in expected}) > 1
    for question, (text, length) in zip(questions, expected):
        parts = [part_of(given) for given in question]
        assert request(server, folder, parts, stream=False) == (text, length)
        with pytest.raises(urllib.error.HTTPError):  # a broken picture ends its own request alone
            request(server, folder, [part_of_data(b"no picture"), part_of("word7")], stream=False)
        assert request(server, folder, parts, stream=True)[0] == text


# What vLLM is asked for that it must refuse, in one sentence and with a 4xx.
BAD = {
    "a budget of 0": {"mm_processor_kwargs": {"num_visual_tokens": 0}},
    "a negative budget": {"mm_processor_kwargs": {"num_visual_tokens": -3}},
    "a huge budget": {"mm_processor_kwargs": {"num_visual_tokens": 10**12}},
    "a budget above 1": {"mm_processor_kwargs": {"num_visual_tokens": 1.5}},
    "a budget that is a text": {"mm_processor_kwargs": {"num_visual_tokens": "64"}},
    "a budget that is a list": {"mm_processor_kwargs": {"num_visual_tokens": [64]}},
    "a budget that is a dictionary": {"mm_processor_kwargs": {"num_visual_tokens": {}}},
    "a budget that is true": {"mm_processor_kwargs": {"num_visual_tokens": True}},
    "a budget that is no number": {"mm_processor_kwargs": {"num_visual_tokens": math.nan}},
    "a budget of images": {"mm_processor_kwargs": {"images_kwargs": {"num_visual_tokens": -1}}},
    "more tokens than fit": {"pictures": 3, "mm_processor_kwargs": {"num_visual_tokens": 1.0}},
    "too many pictures": {"pictures": 4},
    "no picture": {"data": b"no picture"},
    "nothing": {"data": b""},
    "half a picture": {"data": 0.5},
    "a picture of one pixel": {"size": (1, 1)},
}
# Unusual, and answered.
ODD = {
    "no budget": {"mm_processor_kwargs": {"num_visual_tokens": None}},
    "all tokens": {"mm_processor_kwargs": {"num_visual_tokens": 1_000_000}},
    "a narrow picture": {"size": (2, 1500)},
    "a huge picture": {"size": (5000, 5000)},
    "CMYK": {"mode": "CMYK", "kind": "JPEG"},
    "an animation": {"mode": "P", "kind": "GIF", "append_images": [Image.new("P", (40, 40), 1)], "save_all": True},
    "a palette with an alpha channel": {"mode": "LA"},
}


def odd_parts(pictures=1, data=None, size=(40, 40), mode="RGB", kind="PNG", mm_processor_kwargs=None, **settings):
    """The parts of a request of `BAD` or `ODD`."""
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **settings)
    whole = buffer.getvalue()
    whole = whole[: len(whole) // 2] if data == 0.5 else whole if data is None else data
    return [*[part_of_data(whole)] * pictures, part_of("how many ?")]


def ask_vllm(address: str, parts: list[dict], mm_processor_kwargs: dict | None = None) -> tuple[int, list | str]:
    """The status, and the ids of prompt and answer, or the words of a refusal."""
    body = {"model": "model", "messages": [{"role": "user", "content": parts}], "max_tokens": 6, "temperature": 0}
    body |= {"return_token_ids": True, "mm_processor_kwargs": mm_processor_kwargs}
    sent = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(sent, timeout=600) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]
    return 200, [found["usage"]["prompt_tokens"], found["choices"][0]["token_ids"]]


def embedded_questions(number: int) -> list[tuple[list, int | float | None]]:
    """Pictures and a text, or a text alone, and the budget of the request."""
    from prunesid_cli.scenes import VARIANTS, ask, make_scene

    scenes = [make_scene(variant, "test", index) for index in range(6) for variant in VARIANTS]
    texts = [[question.text for question in ask(scene)] for scene in scenes]
    budgets = itertools.cycle([None, 32, None, 0.25, 128])
    kinds = itertools.cycle([1, 1, 2, 1, 0, 3, 1])
    found = []
    for index, pictures, budget in zip(range(number), kinds, budgets):
        chosen = [(index + place) % len(scenes) for place in range(pictures)]
        asked = texts[index % len(scenes)]
        images = [scenes[each].image for each in chosen]
        found.append(([*images, asked[index * 5 % len(asked)]], budget if pictures else None))
    return found


def embedded_answers(questions: list[tuple[list, int | float | None]], default: int | None = None) -> list[list]:
    """The length of the prompt and the new tokens of each; the model's own budget is `default`, or what is saved."""
    from prunesid_cli.embedded import complete

    folder = complete()
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = PruneSIDLlavaProcessor.from_pretrained(folder)
    answers = []
    for (*images, text), budget in questions:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(
            text=prompt, images=images or None, num_visual_tokens=budget or default, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, length:]
        answers.append([length, ids.tolist()])
    return answers


def at_least(given, number: int) -> list:
    """All of them, and again from the first up to a number."""
    return list(itertools.islice(itertools.cycle(given), max(len(given), number)))


def wrong_with(address: str, job: str | tuple) -> str | None:
    """What is wrong with the answer to a name of `BAD` or `ODD`, or to a question, given with the right answer."""
    if isinstance(job, str):
        case = {**BAD, **ODD}[job]
        status, said = ask_vllm(address, odd_parts(**case), case.get("mm_processor_kwargs"))
        is_right = 400 <= status < 500 and "\n" not in said if job in BAD else status == 200
        return None if is_right else f"{job}: {status} {said}"
    ((*images, text), budget), answer = job
    parts = [part_of(part) for part in [*images, text]]
    kwargs = None if budget is None else {"num_visual_tokens": budget}
    status, said = ask_vllm(address, parts, kwargs)
    return None if [status, said] == [200, answer] else f"{text} ({budget}): {status} {said}, not {answer}"


# Of a server that clients may send budgets to.
SERVER = ("--trust-request-mm-kwargs", "--max-model-len", "1024", "--limit-mm-per-prompt", '{"image": 3}')


@pytest.mark.timeout(3600)
def test_vllm_answers_eight_clients_as_generate_does_with_bad_input_in_between(tmp_path):
    """
    With `PRUNESID_REQUESTS` as many requests, one in ten of them bad; `PRUNESID_VLLM` holds further arguments of the
    server. Prints how many were sent, and the server's memory.
    """
    from prunesid_cli.embedded import complete

    questions = embedded_questions(50)
    expected = embedded_answers(questions)
    assert len({str(ids) for _, ids in expected}) > 4
    number = int(os.environ.get("PRUNESID_REQUESTS", 0))
    bad, odd = at_least(BAD, number // 10), at_least(ODD, number // 20)
    good = at_least(list(zip(questions, expected)), number - len(bad) - len(odd))
    jobs = [*good, *bad, *odd]
    random.Random(0).shuffle(jobs)

    home = tmp_path / "home"
    arguments = shlex.split(os.environ.get("PRUNESID_VLLM", ""))
    with vllm_server.serve(complete(), home, *SERVER, *arguments) as address:
        do = functools.partial(wrong_with, address)
        memory, wrong, half = [vllm_server.memory(home)], [], len(jobs) // 2
        for part in (jobs[:half], jobs[half:]):
            with ThreadPoolExecutor(8) as clients:
                wrong += [found for found in clients.map(do, part) if found]
            memory.append(vllm_server.memory(home))
        megabytes = ", ".join(str(size // 2**20) for size in memory)
        print(f"{len(good)} questions, {len(bad)} bad and {len(odd)} unusual requests.")
        print(f"Memory at the start, half way and at the end: {megabytes} MiB.")
        assert not wrong
        assert not [found for found in map(do, good[:7]) if found]


# Arguments of a server, beside those of the test above, whose server compiles and caches prefixes.
SERVERS = {
    "eager, nothing cached": ["--enforce-eager", "--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"],
    "a budget of the server": ["--enforce-eager", "--mm-processor-kwargs", '{"num_visual_tokens": 32}'],
    "two processes": ["--enforce-eager", "--tensor-parallel-size", "2"],
}


@pytest.mark.parametrize("name", SERVERS)
def test_vllm_answers_as_generate_does_with_other_arguments(tmp_path, name):
    from prunesid_cli.embedded import complete

    questions = embedded_questions(12)
    jobs = list(zip(questions, embedded_answers(questions, 32 if name == "a budget of the server" else None)))
    with vllm_server.serve(complete(), tmp_path / "home", *SERVER, *SERVERS[name]) as address:
        do = functools.partial(wrong_with, address)
        with ThreadPoolExecutor(8) as clients:
            wrong = list(clients.map(do, [*jobs, *BAD, *ODD]))
        assert not list(filter(None, wrong))
        assert not list(filter(None, map(do, jobs)))


FAMILIES = ["llava", "llava_next", "internvl", "gemma3", "paligemma", "mistral3", "smolvlm"]
FAMILIES += ["idefics3", "aya_vision", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "glm4v"]
REFUSED = {
    "llava-thin": "--output FOLDER`",
    "llava-dynamic": "Save the model with budget_scope='image'",
    "llava-question": "Save the model with question=False",
    "idefics2-fixed": "does not say how many tokens an image gets. Use `prunesid generate`",
    "qwen2_vl-original": "Save the model with mrope_positions='contiguous'",
    "qwen3_vl-original": "Use `transformers serve`",
}


@pytest.mark.timeout(3600)
def test_vllm_runs_families_as_generate_does_and_refuses_what_it_cannot(tmp_path):
    """Tiny variants; one, two and three pictures and none, one by one and together, with its caches."""
    python = vllm_server.make_environment().parent / "python"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "vision"]
    subprocess.run([*install, "torchvision==0.28.0", "num2words==0.5.14", "docopt==0.6.2"], check=True)
    here, variants = ROOT / "tests", [*FAMILIES, *REFUSED]
    environment = vllm_server.environment(tmp_path / "home")
    save = [sys.executable, here / "engine_models.py", tmp_path / "vision", tmp_path, *variants]
    subprocess.run(save, check=True, env={**environment, "PYTHONPATH": str(ROOT)})
    assert len(pickle.loads((tmp_path / "llava.pickle").read_bytes())) == 7
    ask = [python, here / "vllm_offline.py", tmp_path / "vision", tmp_path, *variants]
    run = subprocess.run(ask, capture_output=True, text=True, env=environment, cwd=tmp_path)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    found = {name: wrong for line in lines for name, wrong in line.items()}
    assert [*found] == variants, run.stderr[-4000:]
    assert {name: found[name] for name in FAMILIES} == {name: [] for name in FAMILIES}, run.stderr[-4000:]
    for name, words in REFUSED.items():
        assert words in found[name][0]
