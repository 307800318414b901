"""`transformers serve` answers from a folder alone, streamed or not, as `generate` does: `pytest -m engines`."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import picture, save_checkpoint

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor


pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
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
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
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
