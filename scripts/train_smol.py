"""Train a larger embedded model in one run on a GPU: 12 layers of SmolLM2-135M behind the frozen tower.

A GPU machine may have no network and no current Transformers. So all that the run needs is packed here first, small:
the layers in 4 bits as they were published, the tower in 8 bits (features alone are made by it), the embeddings of the
words that occur and of the most frequent others, the photographs, and the Python files of Transformers. There, scenes
are drawn and their features made, and a projector, LoRA and norms are trained: first on parts of pictures that show
printed text, then on parts, then on whole pictures, each for a share of the time. The result, some 10 MB, is made into
a Hub folder here, of the tower and the layers as they are published.

    python scripts/train_smol.py pack out/gpu                         # here
    PYTHONPATH=out/gpu/site:. python scripts/train_smol.py train out/gpu --out $OUT --minutes 7  # there
    python scripts/train_smol.py train out/gpu --out out/smol --tiny  # a trial on a CPU, with its first two layers
    python scripts/train_smol.py assemble out/smol out/smol/model    # here
    prunesid evaluate --out out/smol --model out/smol/model --split val --methods prunesid-spread --budgets 192 64
"""

import argparse
import json
import math
import os
import random
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from train_demo import (
    FEATURES,
    LABELS,
    MEAN,
    PATCHES,
    PLACES,
    STD,
    TEXTS,
    part_of,
    patch_labels,
    questions_of,
    touched,
)
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from prunesid_cli import scenes
from prunesid_cli.scenes import DIGITS, KINDS, PATCH, SIZE, TEMPLATES, VARIANTS, Question, Scene, ask, make_scene


LAYERS, RANK, ALPHA = 12, 32, 64
FREQUENT = 3000  # embeddings of the most frequent tokens, which no answer is to be
BLOCK = 32  # weights of one scale, in 4 bits
BEFORE, AFTER = "<|im_start|>", "\n{}\nAnswer:"
CHAT_TEMPLATE = (  # newlines in expressions: those behind a tag are cut off
    "<|im_start|>{% for message in messages %}{% if message['content'] is string %}{{ '\n' + message['content'] }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\nAnswer:' }}{% endif %}"
)
ALIGN_WEIGHT, DROPOUT, RATE, PROJECTOR_RATE = 0.05, 0.1, 4e-4, 1e-3
STAGES = {"read": 0.1, "part": 0.4, "full": 0.5}  # shares of the time
SCENES = {"train": 9000, "crowded": 1400, "val": 240}
TINY_SCENES = {"train": 8, "crowded": 4, "val": 4}
PHOTO_SIDE = 480  # of the shorter side: scenes show squares of at least half of it at 336


# Packing


def to_4_bits(weight: torch.Tensor) -> dict[str, np.ndarray]:
    """A matrix in blocks of 32 between its least and its largest weight; what was published so is kept as it is."""
    rows = weight.shape[0]
    blocks = weight.reshape(rows, -1, BLOCK)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = ((high - low) / 15).half().float()
    low = low.half().float()
    levels = ((blocks - low) / scale.clamp(min=1e-12)).round().clamp(0, 15).to(torch.uint8).reshape(rows, -1)
    return {
        "nibbles": (levels[:, ::2] | (levels[:, 1::2] << 4)).numpy(),
        "scale": scale[..., 0].half().numpy(),
        "low": low[..., 0].half().numpy(),
    }


def from_4_bits(packed: dict[str, np.ndarray]) -> torch.Tensor:
    nibbles = torch.from_numpy(packed["nibbles"])
    levels = torch.stack([nibbles & 15, nibbles >> 4], -1).reshape(len(nibbles), -1, BLOCK).float()
    scale, low = (torch.from_numpy(packed[name]).float()[..., None] for name in ("scale", "low"))
    return (levels * scale + low).reshape(len(nibbles), -1)


def to_8_bits(weight: torch.Tensor) -> dict[str, np.ndarray]:
    """Rows between -127 and 127, each with a scale."""
    scale = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    rows = (weight.flatten(1) / scale[:, None]).round().to(torch.int8)
    return {"rows": rows.reshape(weight.shape).numpy(), "row_scale": scale.numpy()}


def from_8_bits(packed: dict[str, np.ndarray]) -> torch.Tensor:
    rows, scale = torch.from_numpy(packed["rows"]).float(), torch.from_numpy(packed["row_scale"])
    return rows * scale.reshape(-1, *[1] * (rows.dim() - 1))


def pack_state(state: dict[str, torch.Tensor], to_bits: Callable) -> dict[str, np.ndarray]:
    """Matrices by `to_bits`, vectors as they are; by name, and the part behind a colon."""
    packed = {}
    for name, value in state.items():
        if value.dim() > 1 and value.numel() > 10_000:
            packed |= {f"{name}:{part}": array for part, array in to_bits(value.detach()).items()}
        else:
            packed[name] = value.detach().numpy()
    return packed


def unpack_state(packed: Any, prefix: str) -> dict[str, torch.Tensor]:
    parts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name in packed:
        if name.startswith(prefix):
            own, _, part = name.removeprefix(prefix).partition(":")
            parts[own][part] = packed[name]
    readers = {"nibbles": from_4_bits, "rows": from_8_bits, "": lambda part: torch.from_numpy(part[""])}
    return {name: next(read for key, read in readers.items() if key in part)(part) for name, part in parts.items()}


def words_in_use(tokenizer) -> list[int]:
    """The tokens of every question and answer, and the most frequent others, ascending."""
    fills = [*scenes.NOUNS, "floor", "wall", ""]
    texts = [AFTER.format(text.format(fill)) for pair in TEMPLATES.values() for text in pair for fill in fills]
    told = ["yes", "no", "photograph", *scenes.QUADRANTS, *LABELS, "1", "2", "3"]
    used = {token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)}
    used |= {token for text in told for token in answer_ids(tokenizer, text)}
    return sorted(used | {tokenizer.convert_tokens_to_ids(BEFORE)} | set(range(FREQUENT)))


def pack(folder: Path) -> None:
    """Write `weights.npz`, `photographs/` and, in `files.tar.xz`, the tokenizer and Transformers to the folder."""
    import transformers

    from prunesid_cli import parts

    folder.mkdir(parents=True, exist_ok=True)
    language_model, tokenizer = parts.language_model()
    tower = parts.vision_tower(SIZE)
    kept = {
        name: value
        for name, value in language_model.model.state_dict().items()
        if name.startswith("layers.") and int(name.split(".")[1]) < LAYERS or name == "norm.weight"
    }
    used = words_in_use(tokenizer)
    embeddings = language_model.model.embed_tokens.weight.detach()
    last = f"encoder.layer.{tower.config.num_hidden_layers - 1}."
    seen = {name: value for name, value in tower.state_dict().items() if not name.startswith((last, "layernorm"))}
    arrays = {f"llm/{name}": array for name, array in pack_state(kept, to_4_bits).items()}
    arrays |= {f"tower/{name}": array for name, array in pack_state(seen, to_8_bits).items()}
    arrays |= {"used": np.array(used), "embeddings": embeddings[used].half().numpy()}
    np.savez_compressed(folder / "weights.npz", **arrays)  # type: ignore[arg-type]
    restored = unpack_state(arrays, "llm/")
    error = max(float((restored[name] - value).abs().max() / value.abs().max()) for name, value in kept.items())
    (folder / "llm.json").write_text(language_model.config.to_json_string())

    photos = folder / "photographs"
    photos.mkdir(exist_ok=True)
    names = {name for split in scenes.SPLITS for name in scenes.photographs(split)}
    for name in sorted(names | {f"{material}.png" for material in ("brick", "grass", "gravel")}):
        photo = scenes.photograph(name)
        scale = 1.0 if name.removesuffix(".png") in scenes.MATERIALS else min(1.0, PHOTO_SIDE / min(photo.size))
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
        photo.save(photos / f"{name}.jpg", quality=88)
    source = Path(transformers.__file__).parent
    with tarfile.open(folder / "files.tar.xz", "w:xz") as archive, tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        archive.add(saved, "tokenizer")
        for path in sorted(source.rglob("*.py")):
            if path.parent.parent.name != "models" or not path.name.startswith(("modular_", "convert_")):
                archive.add(path, Path("site", "transformers", path.relative_to(source)))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    print(json.dumps({"folder": str(folder), "mib": round(size, 1), "largest_error_of_4_bits": round(error, 5)}))


def unpack(folder: Path) -> None:
    """The tokenizer, and Transformers' files for `PYTHONPATH=FOLDER/site`."""
    with tarfile.open(folder / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")


# Scenes


def photograph_of(folder: Path, name: str) -> Image.Image:
    return Image.open(folder / "photographs" / f"{name}.jpg").convert("RGB")


def draw(task: tuple[Path, str, int]) -> tuple[Scene, np.ndarray]:
    """Scene `number` of the training, crowded or validation ones, and its pixels."""
    folder, name, number = task
    if not isinstance(scenes.photograph, partial):
        scenes.photograph = partial(_photograph, folder)  # type: ignore[assignment]
    split = "train" if name == "crowded" else name
    scene = make_scene(VARIANTS[number % 2], split, number // 2, name == "crowded")
    pixels = np.asarray(scene.image)
    scene.image = Image.new("RGB", (1, 1))
    return scene, pixels


_photographs: dict[str, Image.Image] = {}


def _photograph(folder: Path, name: str) -> Image.Image:
    if name not in _photographs:
        _photographs[name] = photograph_of(folder, name)
    return _photographs[name]


class Drawn:
    """Scenes of one kind and their features `(scenes, 576, 384)` in fp16, on the device."""

    def __init__(self, name: str, drawn: list[Scene], features: torch.Tensor):
        self.crowded, self.scenes, self.features = name == "crowded", drawn, features
        self._labels: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def labels(self, index: int) -> np.ndarray:
        if index not in self._labels:
            self._labels[index] = patch_labels(self.scenes[index])
        return self._labels[index]


@torch.inference_mode()
def extract(folder: Path, tower: nn.Module, name: str, count: int, device: str, workers: int, at_once: int) -> Drawn:
    """The scenes, drawn by `workers` processes while the tower reads them."""
    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    features = torch.empty(count, PATCHES, FEATURES, dtype=torch.float16, device=device)
    found: list[Scene] = []
    pixels: list[np.ndarray] = []

    def flush() -> None:
        if not pixels:
            return
        batch = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2) / 255
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            hidden = tower.embeddings((batch - mean) / deviation)
            for layer in tower.encoder.layer:
                hidden = layer(hidden)
        features[len(found) - len(pixels) : len(found)] = hidden[:, 1:].half()
        pixels.clear()

    tasks = ((folder, name, number) for number in range(count))
    with get_context("spawn" if device == "cuda" else "fork").Pool(workers) as pool:
        for scene, seen in tqdm(pool.imap(draw, tasks, chunksize=4), name, total=count):
            found.append(scene)
            pixels.append(seen)
            if len(pixels) == at_once:
                flush()
    flush()
    return Drawn(name, found, features)


# Prompts


def answer_ids(tokenizer, answer: str) -> list[int]:
    told = answer if answer in DIGITS else f" {answer}"
    return [*tokenizer.encode(told, add_special_tokens=False), tokenizer.eos_token_id]


def pack_questions(tokenizer, rows: list[list[Question]], pictures: int) -> dict[str, torch.Tensor]:
    """Questions of each picture side by side behind its tokens (-1 among `ids`); see `train_demo.pack`."""
    prefix, packed = 1 + pictures, []
    for questions in rows:
        ids, positions, labels, owner = [], [], [], []
        for number, question in enumerate(questions):
            asked = tokenizer.encode(AFTER.format(question.text), add_special_tokens=False)
            told = answer_ids(tokenizer, question.answer)
            ids += asked + told[:-1]
            labels += [-100] * (len(asked) - 1) + told
            positions += range(prefix, prefix + len(asked) + len(told) - 1)
            owner += [number] * (len(asked) + len(told) - 1)
        packed.append((ids, positions, labels, owner))
    length = max(len(ids) for ids, *_ in packed)

    def padded(column: int, value: int) -> torch.Tensor:
        return torch.tensor([row[column] + [value] * (length - len(row[column])) for row in packed])

    head = torch.tensor([tokenizer.convert_tokens_to_ids(BEFORE)] + [-1] * pictures).repeat(len(rows), 1)
    positions = torch.cat([torch.arange(prefix).repeat(len(rows), 1), padded(1, 0)], 1)
    labels = torch.cat([torch.full((len(rows), prefix), -100), padded(2, -100)], 1)
    owner = torch.cat([torch.full((len(rows), prefix), -2), padded(3, -1)], 1)
    return {"ids": torch.cat([head, padded(0, 0)], 1), "position_ids": positions, "labels": labels, "owner": owner}


def batch_of(tokenizer, caches: list[Drawn], stage: str, size: int, rng: random.Random) -> dict[str, Any]:
    """Which patches of which scenes a step reads, and their packed questions. Features are gathered on the device."""
    count = {"read": 48, "part": 16 * rng.randint(6, 12), "full": PATCHES}[stage]
    chosen, asked = [], []
    while len(chosen) < size:
        number = 0 if stage == "full" else rng.randrange(len(caches))
        index = rng.randrange(len(caches[number]))
        scene, left_out = caches[number].scenes[index], []
        if stage == "read":
            if not scene.texts:
                continue
            text = rng.choice(scene.texts)
            left_out = [item for item in scene.texts if item is not text]
            scene = Scene(scene.variant, scene.split, scene.seed, scene.image, texts=[text])
        elif caches[number].crowded:
            scene, left_out = part_of(scene, rng)
        shown = touched(scene.objects + scene.texts)
        order = np.random.default_rng(rng.getrandbits(32)).random(PATCHES) + 2 * shown
        order[touched(left_out) & ~shown] = -1
        chosen.append((number, index, order))
        asked.append(questions_of(scene, rng))
        count = count if stage == "full" else min(count, int((order >= 0).sum()))
    patches = [np.sort(np.argsort(-order)[:count]) for *_, order in chosen]
    return {
        "places": [(number, index) for number, index, _ in chosen],
        "patches": torch.from_numpy(np.stack(patches)),
        **pack_questions(tokenizer, asked, count),
    }


class Steps(torch.utils.data.Dataset):
    """Batches of a stage by their number, so that worker processes make them ahead of the device."""

    def __init__(self, tokenizer, caches: list[Drawn], stage: str, size: int):
        self.given = (tokenizer, [_without_features(cache) for cache in caches], stage, size)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, step: int) -> dict[str, Any]:
        tokenizer, caches, stage, size = self.given
        rng = random.Random(f"{stage}/{step}")
        own = batch_of(tokenizer, caches, stage, size, rng)
        rows = []
        for number, index in own["places"][:8]:  # some patches of some scenes, for the projector
            labels = caches[number].labels(index)
            weight = np.where((labels == 1).any(1), 6.0, 1.0)
            drawn = np.random.default_rng(rng.getrandbits(32)).choice(
                PATCHES, 64, replace=False, p=weight / weight.sum()
            )
            rows.append((number, index, torch.from_numpy(drawn), torch.from_numpy(labels[drawn])))
        return {**own, "align": rows}


def _without_features(cache: Drawn) -> Drawn:
    return Drawn("crowded" if cache.crowded else "train", cache.scenes, torch.empty(0))


# Model


class Lora(nn.Module):
    """A frozen matrix and a trained difference of low rank."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden) + (hidden @ self.down.T) @ self.up.T * (ALPHA / RANK)


class Smol(nn.Module):
    """Projector, embeddings of the words in use, and the first layers."""

    def __init__(self, weights: Any, config: LlamaConfig, layers: int):
        super().__init__()
        config.num_hidden_layers = layers
        state = unpack_state(weights, "llm/")
        kept = {
            name: value for name, value in state.items() if name == "norm.weight" or int(name.split(".")[1]) < layers
        }
        self.body = LlamaModel(config)
        found = self.body.load_state_dict(kept, strict=False)
        assert found.missing_keys == ["embed_tokens.weight"] and not found.unexpected_keys, found
        self.body.embed_tokens = nn.Identity()
        self.body.requires_grad_(False)
        for layer in self.body.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, module in list(block.named_children()):
                    if isinstance(module, nn.Linear):
                        setattr(block, name, Lora(module))
        for name, value in self.body.named_parameters():
            value.requires_grad_("norm" in name or name.endswith((".up", ".down")))
        words = torch.from_numpy(weights["embeddings"]).float()
        self.words = nn.Parameter(words, requires_grad=False)
        row = torch.zeros(int(weights["used"].max()) + 1, dtype=torch.long)
        row[torch.from_numpy(weights["used"])] = torch.arange(len(words))
        self.register_buffer("row", row, persistent=False)
        self.linear_1, self.linear_2 = nn.Linear(FEATURES, words.shape[1]), nn.Linear(words.shape[1], words.shape[1])

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))

    def answers(self, features: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of every token of an answer, and the row that should win."""
        ids, owner = batch["ids"], batch["owner"]
        embeds = self.words[self.row[ids.clamp(min=0)]]
        embeds = embeds.masked_scatter((ids == -1)[..., None], self.project(features).to(embeds.dtype))
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -2)
        mask = (same & causal)[:, None]
        hidden = self.body(
            inputs_embeds=embeds, attention_mask=mask, position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        wanted = batch["labels"] >= 0
        return F.linear(hidden[wanted], self.words), self.row[batch["labels"][wanted]]


def label_words(model: Smol, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The centred embedding of each label `(labels, width)`, and the mean embedding."""
    mean = model.words.mean(0)
    rows = [model.words[model.row[answer_ids(tokenizer, word)[:-1]]].mean(0) - mean for word in LABELS]
    return torch.stack(rows), mean


def target_of(labels: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """What a patch is to look like to the language model: the sum of the words that describe it."""
    shares = labels.float().clamp(min=0) + 0.5 * (labels < 0)
    scale = torch.tensor([0.6 if word in (*PLACES, *TEXTS) else 1.0 for word in LABELS], device=labels.device)
    return (shares * scale) @ words


@torch.no_grad()
def start_projector(
    model: Smol, words: torch.Tensor, mean: torch.Tensor, features: torch.Tensor, labels: torch.Tensor
):
    """Closed form: whitened features, random GELU features of them, and ridge regression onto the label words."""
    middle, width = features.mean(0), model.linear_1.out_features
    values, vectors = torch.linalg.eigh(torch.cov((features - middle).T).double())
    whitened = (vectors / (values + 0.01 * values.mean()).sqrt()).float()
    first = torch.linalg.qr(torch.randn(width, features.shape[1], device=features.device)).Q @ whitened.T
    model.linear_1.weight.copy_(first)
    model.linear_1.bias.copy_(-first @ middle + 0.3 * torch.randn(width, device=features.device))
    hidden = F.gelu(model.linear_1(features)).double()
    wanted = (target_of(labels, words) + mean).double()
    hidden_mean, wanted_mean = hidden.mean(0), wanted.mean(0)
    gram = (hidden - hidden_mean).T @ (hidden - hidden_mean)
    ridge = 1e-2 * gram.diagonal().mean() * torch.eye(width, dtype=torch.double, device=features.device)
    solved = torch.linalg.solve(gram + ridge, (hidden - hidden_mean).T @ (wanted - wanted_mean))
    model.linear_2.weight.copy_(solved.T.float())
    model.linear_2.bias.copy_((wanted_mean - hidden_mean @ solved).float())


# Training


def gather(caches: list[Drawn], places: list, patches: torch.Tensor) -> torch.Tensor:
    device = caches[0].features.device
    return torch.stack(
        [caches[number].features[index][own.to(device)] for (number, index), own in zip(places, patches)]
    ).float()


def train(folder: Path, out: Path, minutes: float, tiny: bool, batch: int) -> dict[str, Any]:
    """All of it, in so many minutes at most; writes `result.safetensors` and `report.json`."""
    end = time.monotonic() + 60 * minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        raise ValueError("train needs a CUDA GPU: on a CPU it takes some 15 hours. --tiny tries it on a CPU.")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    out.mkdir(parents=True, exist_ok=True)
    weights = dict(np.load(folder / "weights.npz"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    config = LlamaConfig(**json.loads((folder / "llm.json").read_text()))
    model = Smol(weights, config, 2 if tiny else LAYERS).to(device)
    workers = 2 if tiny else max(os.cpu_count() or 2, 2) - 1
    vision = Dinov2Config(
        hidden_size=FEATURES, num_attention_heads=6, image_size=SIZE, patch_size=PATCH, use_mask_token=False,
        num_hidden_layers=11,
    )  # fmt: skip
    tower = Dinov2Model(vision)
    found = tower.load_state_dict(unpack_state(weights, "tower/"), strict=False)
    assert set(found.missing_keys) <= {"layernorm.weight", "layernorm.bias"} and not found.unexpected_keys, found
    tower = tower.to(device).eval()
    drawn = {
        name: extract(folder, tower, name, count, device, workers, 4 if tiny else 64)
        for name, count in (TINY_SCENES if tiny else SCENES).items()
    }
    caches = [drawn["train"], drawn["crowded"]]
    words, mean = label_words(model, tokenizer)
    rng = np.random.default_rng(0)
    picked = [(cache, int(index)) for cache in caches for index in rng.permutation(len(cache))[:300]]
    start_projector(
        model, words, mean,
        torch.cat([cache.features[index] for cache, index in picked]).float(),
        torch.cat([torch.from_numpy(cache.labels(index)) for cache, index in picked]).to(device),
    )  # fmt: skip

    projector = [value for name, value in model.named_parameters() if name.startswith("linear_")]
    others = [v for n, v in model.named_parameters() if v.requires_grad and not n.startswith("linear_")]
    groups = [{"params": others, "lr": RATE, "base": RATE}, {"params": projector, "lr": 0, "base": PROJECTOR_RATE}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.monotonic()
    report: dict[str, Any] = {"device": machine_name(), "stages": {}}
    left, total = end - began - (0 if tiny else 30), 0  # half a minute to validate in
    if left < 60 and not tiny:
        raise ValueError(f"--minutes={minutes} leaves {left:.0f} s to train after the features. Give more.")
    until = 0.0
    for stage, share in STAGES.items():
        until += share
        loader = torch.utils.data.DataLoader(
            Steps(tokenizer, caches, stage, 2 if tiny else batch * (4 if stage == "read" else 1)),
            batch_size=None, num_workers=0 if tiny else workers, prefetch_factor=None if tiny else 4,
            multiprocessing_context=None if tiny else "fork",
        )  # fmt: skip
        steps, running = 0, 0.0
        for own in loader:
            done = steps / 3 * share + until - share if tiny else (time.monotonic() - began) / left
            if done >= until:
                break
            rate = min(1, (total + 1) / 100) * (1 if stage != "full" else 0.05 + 0.95 * (1 - done) / STAGES["full"])
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * rate
            loss = step_loss(model, caches, own, words, mean, device)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*others, *projector], 1.0)
            optimizer.step()
            steps, total = steps + 1, total + 1
            running = (
                loss.item() if steps == 1 else 0.98 * running + 0.02 * loss.item() if steps % 10 == 0 else running
            )
        report["stages"][stage] = {
            "steps": steps,
            "loss": round(running, 4),
            "seconds": round(time.monotonic() - began),
        }
        print(json.dumps({stage: report["stages"][stage]}), flush=True)
    trained = {name: value.half().cpu() for name, value in model.named_parameters() if value.requires_grad}
    save_file({name: value.contiguous() for name, value in trained.items()}, out / "result.safetensors")
    report["validation"] = validate(model, tokenizer, drawn["val"], device)
    report["mean"] = round(float(np.mean(list(report["validation"].values()))), 4)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def machine_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def step_loss(model: Smol, caches: list[Drawn], own: dict[str, Any], words, mean, device: str) -> torch.Tensor:
    tensors = {name: value.to(device) for name, value in own.items() if isinstance(value, torch.Tensor)}
    features = F.dropout(gather(caches, own["places"], own["patches"]), DROPOUT)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits, wanted = model.answers(features, tensors)
    seen = torch.cat([caches[number].features[index][rows.to(device)] for number, index, rows, _ in own["align"]])
    labels = torch.cat([labels for *_, labels in own["align"]]).to(device)
    projected = model.project(F.dropout(seen.float(), DROPOUT))
    align = (projected - mean - target_of(labels, words)).square().sum(-1).mean()
    return F.cross_entropy(logits.float(), wanted) + ALIGN_WEIGHT * align


@torch.inference_mode()
def validate(model: Smol, tokenizer, cache: Drawn, device: str) -> dict[str, float]:
    """Accuracy by question type with all tokens; all of an answer's tokens must be right."""
    right: dict[str, int] = defaultdict(int)
    count: dict[str, int] = defaultdict(int)
    for start in range(0, len(cache), 8):
        asked = [ask(scene) for scene in cache.scenes[start : start + 8]]
        packed = {name: value.to(device) for name, value in pack_questions(tokenizer, asked, PATCHES).items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits, wanted = model.answers(cache.features[start : start + 8].float(), packed)
        hits = (logits.argmax(-1) == wanted).tolist()
        for question in (question for questions in asked for question in questions):
            length = len(answer_ids(tokenizer, question.answer))
            right[question.kind] += all(hits[:length])
            count[question.kind] += 1
            hits = hits[length:]
    return {kind: round(right[kind] / count[kind], 4) for kind in KINDS if count[kind]}


# The model


def assemble(result: Path, output: Path) -> None:
    """A PruneSID Hub folder of the published tower and layers, with what was trained merged in."""
    from transformers import CLIPImageProcessorPil

    from modeling_prunesid import PruneSIDLlavaConfig, PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor
    from prunesid_cli import parts

    trained = {name: value.float() for name, value in load_file(result / "result.safetensors").items()}
    layers = 1 + max(int(name.split(".")[2]) for name in trained if name.startswith("body.layers."))
    language_model, tokenizer = parts.language_model()
    tower = parts.vision_tower(SIZE)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    language_model.config.num_hidden_layers = layers
    config = PruneSIDLlavaConfig(
        vision_config=tower.config, text_config=language_model.config, image_seq_length=PATCHES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=True,
        prunesid_config={"budget": 64, "method": "spread"},
    )  # fmt: skip
    model = PruneSIDLlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    state = merged(language_model.model.state_dict(), trained, layers)
    model.model.language_model.load_state_dict(state)
    model.tie_weights()
    own = {name: trained[name] for name in trained if name.startswith("linear_")}
    model.model.multi_modal_projector.load_state_dict(own)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    )
    tokenizer.padding_side = "left"
    processor = PruneSIDLlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    model.save_pretrained(output)
    processor.save_pretrained(output)
    print(json.dumps({"folder": str(output), "layers": layers, "parameters": model.num_parameters()}))


def merged(state: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The weights of the first layers, with norms replaced and differences added."""
    kept = {
        name: value.clone()
        for name, value in state.items()
        if not name.startswith("layers.") or int(name.split(".")[1]) < layers
    }
    for name, value in trained.items():
        own = name.removeprefix("body.")
        if own.endswith(".up"):
            down = trained[f"{name.removesuffix('.up')}.down"]
            kept[f"{own.removesuffix('.up')}.weight"] += value @ down * (ALPHA / RANK)
        elif own in kept:
            kept[own] = value
    return kept


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="task", required=True)
    commands.add_parser("pack", help="what the run needs").add_argument("folder", type=Path)
    commands.add_parser("unpack", help="tokenizer and Transformers, on the GPU machine").add_argument(
        "folder", type=Path
    )
    own = commands.add_parser("train", help="in one run")
    own.add_argument("folder", type=Path)
    own.add_argument("--out", type=Path, required=True, help="folder for the result")
    own.add_argument("--minutes", type=float, default=7, help="for all of it (default: %(default)s)")
    own.add_argument("--batch", type=int, default=16, help="scenes a step (default: %(default)s)")
    own.add_argument("--tiny", action="store_true", help="a trial on a CPU")
    own = commands.add_parser("assemble", help="a Hub folder of the result")
    own.add_argument("result", type=Path, help="the folder of the result")
    own.add_argument("output", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.task == "pack":
        pack(arguments.folder)
    elif arguments.task == "unpack":
        unpack(arguments.folder)
    elif arguments.task == "train":
        print(json.dumps(train(arguments.folder, arguments.out, arguments.minutes, arguments.tiny, arguments.batch)))
    else:
        assemble(arguments.result, arguments.output)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
