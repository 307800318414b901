"""
How many requests a second a server answers, after what time their first token comes, and how much of the KV cache they
hold, with all visual tokens and with budgets of them: one server of vLLM on CPUs, asked through its web interface.

Every request has a picture of its own, so that no cache answers it. All tokens (1.0) are what the stock model would
process on the same backend. Without `--model` a random LLaVA in the proportions of LLaVA-1.5 is served, whose language
model is about 25 times its tower; its answers mean nothing, and their length is fixed.

    python scripts/load_test.py                                # makes the environment first: some minutes
    python scripts/load_test.py --clients 1 8 --requests 8     # shorter
"""

import argparse
import base64
import io
import json
import math
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging
from vllm_server import serve

import modeling_prunesid
from prunesid_cli.measuring import machine


BUDGETS = (1.0, 192, 128, 64)


def save_model(folder: Path) -> Path:
    """A full variant with random weights, 24 x 24 patches and 64 tokens of them, and words for a vocabulary."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(f"word{index}" for index in range(5, 1000))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=["<image>"], **names)
    template = (
        "{{ bos_token }} {% for message in messages %}{% for part in message.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
    )
    size = {"height": 336, "width": 336}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    torch.manual_seed(0)
    text = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000, "max_position_embeddings": 1024}
    vision = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5}
    vision |= {"num_attention_heads": 2, "image_size": 336, "patch_size": 14}
    with tempfile.TemporaryDirectory() as base:
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=576)
        LlavaForConditionalGeneration(config).save_pretrained(base)
        processor.save_pretrained(base)
        ours = modeling_prunesid.PruneSIDLlavaForConditionalGeneration
        model = ours.from_pretrained(base, dtype=torch.float32, prunesid_config={"budget": 64})
        model.save_pretrained(folder)
    return folder


def picture(seed: int) -> str:
    """A picture of its own for each seed, as a data URL."""
    colours = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((336, 336)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(address: str, budget: int | float, url: str, max_tokens: int) -> tuple[float, int]:
    """Seconds until the first token of a request, and how many tokens its prompt has."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "word7 word8 word9"}]
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "mm_processor_kwargs": {"num_visual_tokens": budget},
    }
    header = {"Content-Type": "application/json"}
    sent = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), header)
    begin, first, prompt = time.monotonic(), math.nan, 0
    with urllib.request.urlopen(sent, timeout=600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if any("content" in choice["delta"] and choice["delta"]["content"] for choice in chunk["choices"]):
                first = time.monotonic() - begin if math.isnan(first) else first
            prompt = (chunk.get("usage") or {}).get("prompt_tokens", prompt)
    return first, prompt


def metric(address: str, name: str, label: str = "") -> float:
    """A value of the server's metrics, or that of a label."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    line = next(line for line in lines if line.startswith(name))
    if label:
        return float(line.split(f'{label}="')[1].split('"')[0])
    return float(line.rsplit(" ", 1)[1])


class Blocks(threading.Thread):
    """The most KV-cache blocks that were in use at once, by the server's own count."""

    def __init__(self, address: str):
        super().__init__(daemon=True)
        self.address, self.most, self.is_done = address, 0.0, threading.Event()
        self.total = metric(address, "vllm:cache_config_info", "num_gpu_blocks")
        self.size = metric(address, "vllm:cache_config_info", "block_size")  # in tokens

    def run(self):
        while not self.is_done.wait(0.05):
            self.most = max(self.most, metric(self.address, "vllm:kv_cache_usage_perc") * self.total)


def load(address: str, budget: int | float, clients: int, requests: int, max_tokens: int, seed: int) -> dict:
    """One cell of the table: `requests` of `clients` at once."""
    pictures = [picture(seed + index) for index in range(requests)]
    blocks = Blocks(address)
    blocks.start()
    begin = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda url: ask(address, budget, url, max_tokens), pictures))
    seconds = time.monotonic() - begin
    blocks.is_done.set()
    blocks.join()
    tokens = found[0][1] + max_tokens
    return {
        "budget": budget,
        "clients": clients,
        "requests": requests,
        "rate": requests / seconds,
        "first": statistics.median(first for first, _ in found),
        "blocks": round(blocks.most),
        "fits": int(blocks.total // math.ceil(tokens / blocks.size)),
    }


def table(cells: list[dict]) -> str:
    """Markdown; in brackets the ratio to all tokens with as many clients."""
    lines = [
        "| tokens | clients | requests a second | first token, median | KV-cache blocks at most | requests that fit |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        stock = next(other for other in cells if other["clients"] == cell["clients"])
        rate, first, blocks, fits = (cell[name] / stock[name] for name in ("rate", "first", "blocks", "fits"))
        lines.append(
            f"| {'all' if cell['budget'] == 1.0 else cell['budget']} | {cell['clients']} "
            f"| {cell['rate']:.2f} ({rate:.2f}x) | {cell['first']:.2f} s ({first:.2f}x) "
            f"| {cell['blocks']} ({blocks:.2f}x) | {cell['fits']} ({fits:.1f}x) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a full variant of fixed budgets; by default a random LLaVA")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32, help="of each cell with 8 clients or more; half with one")
    parser.add_argument("--max-tokens", type=int, default=16, help="of each answer")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or save_model(Path(folder, "model"))
        options = ["--trust-request-mm-kwargs", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "32"]
        options += ["--block-size", "32"]  # the smallest on CPUs
        with serve(model.resolve(), Path(folder, "home"), *options) as address:
            cells, seed = [], 0
            for budget in BUDGETS:
                ask(address, budget, picture(10**6 + seed), 2)
                for clients in arguments.clients:
                    requests = max(clients, arguments.requests if clients > 1 else arguments.requests // 2)
                    cells.append(load(address, budget, clients, requests, arguments.max_tokens, seed))
                    seed += requests
                    print(json.dumps(cells[-1]), file=sys.stderr)
    print(f"{machine()}\n\n{table(cells)}")


if __name__ == "__main__":
    main()
