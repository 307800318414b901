"""Train the small LLaVA that the demo and the evaluation use: a frozen DINOv2-S/14, a projector and a 4-layer Llama.

Four stages, all on patch features that the frozen tower gives once and a cache on disk keeps:

1. align: every patch's projection is pulled to the embeddings of the words that describe it (what, colour, where, and
   "word" or "number" where text is printed, so that a question finds it); goes on beside the later stages at a lower
   weight.
2. read: 48 tokens, one printed text and what lies around it. Letters span patches, so that only the language model
   can put a word together, and does not learn to while it has to find the text among hundreds of tokens.
3. part: 96-192 of the 576 tokens, everything drawn and some of the rest, in raster order: cheap steps. Half of them
   on parts of crowded scenes, which hold four times as much and so teach names and words at a quarter of the cost.
4. full: all 576 tokens.

The language model reads a dozen questions of a scene in one sequence; each sees the picture and itself only, and
answers alone carry loss. Every step draws from a generator seeded by its number, and training resumes where it was
stopped. It trains on the scenes that the cache holds when it starts: extract all first for the same weights again.
It needs PyTorch 2.9 or later, for `torch.optim.Muon`. It computes in bfloat16 where the CPU has instructions for that,
as far as PyTorch can tell, and in float32 elsewhere: without them bfloat16 takes 15 times as long.

    python scripts/train_demo.py features WORK            # once; about 0.3 s a scene on 2 idle cores
    python scripts/train_demo.py train WORK               # stop and start again at will; on 2 cores rather
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 scripts/train_demo.py train WORK
    python scripts/train_demo.py validate WORK            # accuracy by question type, all 576 tokens
    python scripts/train_demo.py export WORK              # the Hub folder embedded/, which `prunesid demo` completes
"""

import argparse
import json
import math
import os
import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    CLIPImageProcessorPil,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from modeling_prunesid import (
    PruneSIDLlavaConfig,
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaProcessor,
)
from prunesid_cli.embedded import FOLDER, TOWER, TRAINED, link_code
from prunesid_cli.lines import append_to, count_lines, read_lines
from prunesid_cli.parts import vision_tower
from prunesid_cli.scenes import (
    COLOURS,
    DIGITS,
    KINDS,
    MATERIALS,
    NOUNS,
    PATCH,
    QUADRANTS,
    SIZE,
    TEMPLATES,
    VARIANTS,
    WORDS,
    Item,
    Question,
    Scene,
    ask,
    make_scene,
    rephrase,
)


SIDE = SIZE // PATCH
PATCHES = SIDE * SIDE
NO_PICTURE = Image.new("RGB", (1, 1))
FEATURES = 384
ROW_BYTES = PATCHES * FEATURES * 2  # of a scene's features
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PLACES = ("top", "bottom", "left", "right")
TEXTS = ("word", "number")
LABELS = NOUNS + tuple(COLOURS) + WORDS + DIGITS + MATERIALS + PLACES + TEXTS
PROMPT = "USER: <image>\n{} ASSISTANT:"
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ message['role'] | upper }}: {% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif %} {% endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{% endif -%}
"""
LEARNING_RATE = 1e-3
MUON_RATE = 4e-3
ROPE_THETA = 1e7  # slow rotations: likeness is seen across 600 positions, and across those that pruning closes up
FEATURE_DROPOUT = 0.1
STAGES = ("align", "read", "part", "full")
GLIMPSE = 48  # patches: a printed word covers up to 40
ALIGN_WEIGHT = 0.3
SETTINGS: dict[str, Any] = {"budget": 64, "nms_lambda": "auto"}
STOCK_NAMES = ("model_type", "architectures", "transformers_version")


# Features


def normalise(image) -> torch.Tensor:
    """The (3, 336, 336) pixel values that the exported image processor gives for a 336 px picture."""
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


def extract(tower, work: Path, name: str, count: int, batch: int = 4) -> None:
    """Append the tower's `hidden_states[-2]` patches (576, 384) of scenes to the cache until it holds `count` of them.

    `name` is "train", "val" or "crowded", crowded scenes of the training split. Features are kept in fp16. Line i of
    `name`.jsonl is scene number i and row i of the features; a line that a killed run left by half keeps its place.

    Raises:
        ValueError: there are fewer features than lines.
    """
    crowded = name == "crowded"
    split = "train" if crowded else name
    listed = work / f"{name}.jsonl"
    done = count_lines(listed)
    with (work / f"{name}.f16").open("ab") as features, append_to(listed) as lines, torch.inference_mode():
        if features.tell() < done * ROW_BYTES:
            raise ValueError(
                f"{features.name} has {features.tell() // ROW_BYTES} of the {done} scenes in {listed}. Remove both, "
                "and extract them again."
            )
        features.truncate(done * ROW_BYTES)  # those that no line was written for
        for start in tqdm(range(done, count, batch), desc=f"features {name}"):
            numbers = range(start, min(start + batch, count))
            drawn = [make_scene(VARIANTS[number % 2], split, number // 2, crowded) for number in numbers]
            hidden = tower.embeddings(torch.stack([normalise(scene.image) for scene in drawn]))
            for layer in tower.encoder.layer[:-1]:
                hidden = layer(hidden)
            features.write(hidden[:, 1:].to(torch.float16).numpy().tobytes())
            features.flush()
            lines.write("".join(json.dumps(describe(scene)) + "\n" for scene in drawn))
            lines.flush()


def describe(scene: Scene) -> dict:
    """The scene without its picture, as JSON."""
    return {
        "variant": scene.variant, "split": scene.split, "seed": scene.seed,
        "objects": [[item.name, item.box, item.colour] for item in scene.objects],
        "texts": [[item.name, item.box] for item in scene.texts],
        "bands": [[[item.name, item.box, item.colour], material] for item, material in scene.bands],
    }  # fmt: skip


def recall(line: str) -> Scene:
    """The scene that `describe` wrote, with `NO_PICTURE`."""
    row = json.loads(line)
    return Scene(
        row["variant"], row["split"], row["seed"], NO_PICTURE,
        [Item(name, tuple(box), colour) for name, box, colour in row["objects"]],
        [Item(name, tuple(box)) for name, box in row["texts"]],
        [(Item(item[0], tuple(item[1]), item[2]), material) for item, material in row["bands"]],
    )  # fmt: skip


class Rows:
    """Some rows of an array, by their place among them; nothing is copied before it is asked for."""

    def __init__(self, values: np.ndarray, places: np.ndarray):
        self.values, self.places = values, places

    def __getitem__(self, index: int | slice) -> np.ndarray:
        return self.values[self.places[index]]


class Cache:
    """The scenes of a split and their features, a read-only (scenes, 576, 384) fp16 map of the file.

    Lines that are no scene, and scenes without features, are skipped and named.
    """

    def __init__(self, work: Path, name: str):
        if not (work / f"{name}.jsonl").exists():
            raise FileNotFoundError(f"{work} has no {name!r} scenes; run `train_demo.py features {work}` first")
        file = work / f"{name}.f16"
        rows = file.stat().st_size // ROW_BYTES if file.exists() else 0
        listed = list(read_lines(work / f"{name}.jsonl", recall))
        if listed and listed[-1][0] >= rows:
            print(f"{file} ends after {rows} scenes; those of further lines are skipped.", file=sys.stderr)
        kept = [(row, scene) for row, scene in listed if row < rows]
        if not kept:
            raise ValueError(f"{work} has no whole {name!r} scenes. Run `train_demo.py features {work}` again.")
        self.scenes = [scene for _, scene in kept]
        features = np.memmap(file, np.float16, "r", shape=(rows, PATCHES, FEATURES))
        places = np.array([row for row, _ in kept])
        is_whole = np.array_equal(places, np.arange(len(places)))
        self.features = features[: len(places)] if is_whole else Rows(features, places)

        self.crowded = name == "crowded"
        self._labels = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def labels(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`patch_labels` of a scene, and how often to draw each patch: six times as often where something is drawn."""
        if index not in self._labels:
            scene = self.scenes[index]
            weight = np.where(touched(scene.objects + scene.texts), 6.0, 1.0)
            self._labels[index] = patch_labels(scene), weight / weight.sum()
        return self._labels[index]


# Model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: all words of the questions and answers, lower case. The chat template writes BOS."""
    text = " ".join([PROMPT, "yes no photograph floor wall", *QUADRANTS, *LABELS, *sum(TEMPLATES.values(), ())])
    words = sorted(set(re.findall(r"\w+|[^\w\s]", re.sub(r"<image>|{}", " ", text.lower()))))
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=2048,
    )  # fmt: skip


def build_model(vocabulary: int) -> LlavaForConditionalGeneration:
    """The stock LLaVA with random weights: DINOv2-S/14 at 336 px, two-layer projector, 4-layer Llama of width 192."""
    vision = Dinov2Config(
        hidden_size=FEATURES, num_attention_heads=6, image_size=SIZE, patch_size=PATCH, use_mask_token=False
    )
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=SPECIAL.index("<image>"), image_seq_length=PATCHES,
        vision_feature_layer=-2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    for layer in model.model.language_model.layers:
        start_by_likeness(layer.self_attn)
    model.model.language_model.set_attn_implementation("by_rows")
    return model


def attend_by_rows(module, query, key, value, attention_mask, scaling: float, **kwargs) -> tuple[torch.Tensor, None]:
    """Causal attention of (B, heads, T, width) under a boolean mask, 160 queries at a time, no keys after them.

    PyTorch's own CPU kernel has a slow backward pass for heads this narrow.
    """
    parts = []
    for rows in torch.arange(query.shape[2]).split(160):
        first, last = int(rows[0]), int(rows[-1]) + 1
        barred = ~attention_mask[:, :, first:last, :last]
        scores = scaling * query[:, :, first:last] @ key[:, :, :last].mT
        parts.append(scores.masked_fill(barred, -torch.inf).softmax(-1) @ value[:, :, :last])
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register("by_rows", attend_by_rows)


@torch.no_grad()
def start_by_likeness(attention: torch.nn.Module) -> None:
    """Let a token first attend to tokens like itself: the noun of a question finds its patches from the first step.

    Queries and keys are one orthogonal matrix, values and output another one and its transpose, scaled (mimetic
    initialisation, Trockman and Kolter 2023, arXiv:2305.09828).
    """
    size = attention.q_proj.weight.shape[0]
    alike, carried = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    attention.q_proj.weight.copy_(alike)
    attention.k_proj.weight.copy_(alike)
    attention.v_proj.weight.copy_(0.3 * carried)
    attention.o_proj.weight.copy_(0.3 * carried.T)


# Stage 1: what each patch shows


def coverage(box: tuple[int, int, int, int]) -> np.ndarray:
    """The share (24, 24) of every patch that `box` covers."""
    edges = np.arange(SIDE) * PATCH
    wide = np.clip(np.minimum(box[2], edges + PATCH) - np.maximum(box[0], edges), 0, PATCH)
    high = np.clip(np.minimum(box[3], edges + PATCH) - np.maximum(box[1], edges), 0, PATCH)
    return np.outer(high, wide) / PATCH**2


def touched(items: list[Item]) -> np.ndarray:
    """(576,) bool: the patches of which an item covers more than a tenth."""
    return sum((coverage(item.box) for item in items), np.zeros((SIDE, SIDE))).reshape(-1) > 0.1


def patch_labels(scene: Scene) -> np.ndarray:
    """(576, labels) in int8: 1 where a word describes a patch, 0 where it does not, -1 where it half does."""
    labels = np.zeros((SIDE, SIDE, len(LABELS)), np.int8)

    def mark(box, *words):
        share = coverage(box)
        for word in words:
            column = labels[..., LABELS.index(word)]
            column[share > 0.45] = 1
            column[(share > 0.1) & (share <= 0.45) & (column == 0)] = -1

    for item, material in scene.bands:
        mark(item.box, item.colour, material)
    for item in scene.objects:
        mark(item.box, item.name, *([item.colour] if item.colour else []))
    for item in scene.texts:
        mark(item.box, item.name, TEXTS[item.name in DIGITS])
    half = SIZE // 2
    mark((0, 0, SIZE, half), "top")
    mark((0, half, SIZE, SIZE), "bottom")
    mark((0, 0, half, SIZE), "left")
    mark((half, 0, SIZE, SIZE), "right")
    return labels.reshape(PATCHES, -1)


def align_loss(model, ids: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the label words `ids` against the patches' projections, summed over the words."""
    projected = model.model.multi_modal_projector(features)
    logits = 4 * projected @ model.get_input_embeddings().weight[ids].T - 2
    loss = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).float(), reduction="none")
    return (loss * (labels >= 0)).sum(1).mean()


def align_batch(caches: list, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (2048, 384) and labels of 64 patches each of 32 scenes."""
    features, wanted = [], []
    for _ in range(32):
        cache = rng.choice(caches)
        index = rng.randrange(len(cache))
        labels, weight = cache.labels(index)
        rows = np.random.default_rng(rng.getrandbits(32)).choice(PATCHES, 64, replace=False, p=weight)
        features.append(cache.features[index][rows])
        wanted.append(labels[rows])
    return torch.from_numpy(np.concatenate(features)).float(), torch.from_numpy(np.concatenate(wanted))


# Stages 2 and 3: questions about a picture


def questions_of(scene: Scene, rng: random.Random) -> list[Question]:
    """Up to 16 questions of a training visit, absent nouns drawn afresh, some in their second wording."""
    questions = ask(scene, rng)
    rng.shuffle(questions)
    return [Question(q.kind, rephrase(q, rng), q.answer, q.words) if rng.random() < 0.3 else q for q in questions[:16]]


def pack(tokenizer, rows: list[list[Question]], pictures: int) -> dict[str, torch.Tensor]:
    """Questions of each picture side by side after its `pictures` tokens.

    Returns `ids`, `position_ids`, `labels` (rows, T) and the boolean `mask` (rows, 1, T, T), True to attend.
    """
    before, after = PROMPT.split("<image>")
    head = [tokenizer.bos_token_id, *tokenizer(before).input_ids]
    prefix = len(head) + pictures
    packed = []
    for questions in rows:
        ids, positions, labels, owner = [], [], [], []
        for number, question in enumerate(questions):
            asked = tokenizer(after.format(question.text), add_special_tokens=False).input_ids
            answered = [*tokenizer(question.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids += asked + answered[:-1]
            labels += [-100] * (len(asked) - 1) + answered
            positions += range(prefix, prefix + len(asked) + len(answered) - 1)
            owner += [number] * (len(asked) + len(answered) - 1)
        packed.append((ids, positions, labels, owner))
    length = max(len(ids) for ids, *_ in packed)

    def padded(column: int, value: int) -> torch.Tensor:
        return torch.tensor([row[column] + [value] * (length - len(row[column])) for row in packed])

    ids = torch.cat([torch.tensor(head + [tokenizer.image_token_id] * pictures).repeat(len(rows), 1), padded(0, 0)], 1)
    positions = torch.cat([torch.arange(prefix).repeat(len(rows), 1), padded(1, 0)], 1)
    labels = torch.cat([torch.full((len(rows), prefix), -100), padded(2, -100)], 1)
    owner = torch.cat([torch.full((len(rows), prefix), -2), padded(3, -1)], 1)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -2)
    return {"ids": ids, "position_ids": positions, "labels": labels, "mask": (same & causal)[:, None]}


def answer_logits(model, features: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (answers, vocabulary) and the tokens (answers,) that should win, for every answer token of the batch."""
    embeds = model.get_input_embeddings()(batch["ids"])
    picture = (batch["ids"] == model.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(picture, model.model.multi_modal_projector(features).to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch["mask"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    wanted = batch["labels"] >= 0
    return model.lm_head(hidden[wanted]), batch["labels"][wanted]


def part_of(scene: Scene, rng: random.Random) -> tuple[Scene, list[Item]]:
    """A scene of ordinary size out of a crowded one, and what of the crowded scene it leaves out."""
    kinds = sorted({item.name for item in scene.objects})
    rng.shuffle(kinds)
    kept = []
    for kind in kinds[: rng.randint(2, 3)]:
        alike = [item for item in scene.objects if item.name == kind]
        kept += rng.sample(alike, rng.randint(1, min(3, len(alike))))
    for texts in ([t for t in scene.texts if t.name in WORDS], [t for t in scene.texts if t.name in DIGITS]):
        kept += [rng.choice(texts)] if texts and rng.random() < 0.8 else []
    names = WORDS + DIGITS
    objects, texts = [i for i in kept if i.name not in names], [i for i in kept if i.name in names]
    part = Scene(scene.variant, scene.split, scene.seed, NO_PICTURE, objects, texts, scene.bands)
    return part, [item for item in scene.objects + scene.texts if not any(item is other for other in kept)]


def question_batch(tokenizer, caches: list, size: int, full: bool, rng: random.Random) -> tuple[torch.Tensor, dict]:
    """Features (size, n, 384) and packed questions: n is 576, or 96-192 where not `full`, then of every cache."""
    pictures, asked, count = [], [], PATCHES if full else 16 * rng.randint(6, 12)
    for _ in range(size):
        cache = caches[0] if full else rng.choice(caches)
        index = rng.randrange(len(cache))
        scene, left_out = cache.scenes[index], []
        if cache.crowded:
            scene, left_out = part_of(scene, rng)
        shown = touched(scene.objects + scene.texts)
        order = np.random.default_rng(rng.getrandbits(32)).random(PATCHES) + 2 * shown
        order[touched(left_out) & ~shown] = -1
        pictures.append((cache.features[index], order))
        asked.append(questions_of(scene, rng))
        count = count if full else min(count, int((order >= 0).sum()))
    kept = [features if full else features[np.sort(np.argsort(-order)[:count])] for features, order in pictures]
    return torch.from_numpy(np.stack(kept)).float(), pack(tokenizer, asked, count)


def reading_batch(tokenizer, caches: list, size: int, rng: random.Random) -> tuple[torch.Tensor, dict]:
    """Features (size, 48, 384) of one printed text each, with some patches that show no other, and its question."""
    pictures, asked = [], []
    while len(pictures) < size:
        cache = rng.choice(caches)
        index = rng.randrange(len(cache))
        scene = cache.scenes[index]
        if not scene.texts:
            continue
        text = rng.choice(scene.texts)
        shown = touched([text])
        order = np.random.default_rng(rng.getrandbits(32)).random(PATCHES) + 2 * shown
        order[touched([item for item in scene.texts if item is not text]) & ~shown] = -1
        pictures.append(cache.features[index][np.sort(np.argsort(-order)[:GLIMPSE])])
        alone = Scene(scene.variant, scene.split, scene.seed, NO_PICTURE, texts=[text])
        asked.append(questions_of(alone, rng))
    return torch.from_numpy(np.stack(pictures)).float(), pack(tokenizer, asked, GLIMPSE)


# Training


def train(work: Path, steps: dict[str, int], batch: int) -> None:
    """Run the stages from where `work/state.pt` stands; `steps` gives each stage's length."""
    torch.manual_seed(0)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    model.model.vision_tower.requires_grad_(False)
    caches = [Cache(work, "train"), Cache(work, "crowded")]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in LABELS])
    trained = [parameter for name, parameter in model.named_parameters() if "vision_tower" not in name]
    optimizers = build_optimizers(model)
    at = dict.fromkeys(STAGES, 0)
    if (work / "state.pt").exists():
        saved = torch.load(work / "state.pt")
        model.load_state_dict(saved["model"], strict=False)
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        at = saved["at"]

    for stage in at:
        bar = tqdm(range(at[stage], steps[stage]), stage, initial=at[stage], total=steps[stage], disable=rank > 0)
        running = None
        for step in bar:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * warmth(stage, step, steps[stage])
            rng = random.Random(f"{stage}/{step}/{rank}")
            torch.manual_seed(rng.getrandbits(63))
            features, labels = align_batch(caches, rng)
            loss = align_loss(model, ids, F.dropout(features, FEATURE_DROPOUT), labels)
            if stage != "align":
                if stage == "read":
                    features, packed = reading_batch(tokenizer, caches, 6 * batch, rng)
                else:
                    features, packed = question_batch(tokenizer, caches, batch, stage == "full", rng)
                with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16()):
                    logits, wanted = answer_logits(model, F.dropout(features, FEATURE_DROPOUT), packed)
                loss = F.cross_entropy(logits.float(), wanted) + ALIGN_WEIGHT * loss
            model.zero_grad()
            loss.backward()
            average_gradients(trained, ranks)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
            bar.set_postfix(loss=f"{running:.3f}", refresh=False)
            at[stage] = step + 1
            if rank == 0 and (at[stage] % 100 == 0 or at[stage] == steps[stage]):
                save(work, model, optimizers, at)
        if rank == 0 and stage in ("part", "full") and len(bar):
            print(json.dumps({"stage": stage, "val": validate(model, tokenizer, Cache(work, "val"), limit=80)}))


def average_gradients(parameters: list[torch.nn.Parameter], ranks: int) -> None:
    """The mean over the processes of a run; every rank holds the same weights and draws its own scenes."""
    if ranks == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = (flat / ranks).split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter) if parameter.grad is not None else None


def computes_in_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16, by what PyTorch knows of it."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch cannot tell
    return any(value for name, value in known.items() if "bf16" in name)


class FloatMuon(torch.optim.Muon if hasattr(torch.optim, "Muon") else object):  # type: ignore[misc]
    """Muon in float32, where `torch.optim.Muon` computes in bfloat16. State and settings are the same."""

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            momentum = group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                mean = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight.grad))
                mean.lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(mean, momentum) if group["nesterov"] else mean
                update = orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = group["lr"] * 0.2 * max(weight.shape) ** 0.5  # adjust_lr_fn="match_rms_adamw"
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rate * update)


def orthogonalized(matrix: torch.Tensor, coefficients: tuple[float, ...], steps: int, eps: float) -> torch.Tensor:
    """
    `steps` of Newton and Schulz, each X -> aX + b(XX^T)X + c(XX^T)^2X, that bring the singular values of a matrix
    towards 1 from at most 1, in the matrix's own precision.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        square = found @ found.T
        found = coefficients[0] * found + (coefficients[1] * square + coefficients[2] * square @ square) @ found
    return found if wide is matrix else found.T


def build_optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the projector and the layers, AdamW for the embeddings, norms and biases."""
    if not hasattr(torch.optim, "Muon"):
        raise OSError(f"training needs PyTorch 2.9 or later, for torch.optim.Muon, and this is {torch.__version__}")
    trained = [(name, value) for name, value in model.named_parameters() if "vision_tower" not in name]
    matrices = [value for name, value in trained if value.ndim == 2 and "embed_tokens" not in name]
    others = [value for name, value in trained if value.ndim == 1 or "embed_tokens" in name]
    muon = torch.optim.Muon if computes_in_bfloat16() else FloatMuon
    optimizers = [
        muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def warmth(stage: str, step: int, steps: int) -> float:
    """The share of the learning rate: warm-up over 100 steps; in the last stage down a cosine to a twentieth."""
    fall = 0.525 + 0.475 * math.cos(math.pi * step / steps) if stage == "full" else 1.0
    return min(1.0, (step + 1) / 100) * fall


def save(work: Path, model, optimizers: list[torch.optim.Optimizer], at: dict[str, int]) -> None:
    weights = {name: value for name, value in model.state_dict().items() if "vision_tower" not in name}
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"model": weights, "optimizers": states, "at": at}, work / "state.tmp")
    (work / "state.tmp").rename(work / "state.pt")


@torch.inference_mode()
def validate(model, tokenizer, cache: Cache, limit: int | None = None, batch: int = 8) -> dict[str, float]:
    """Accuracy by question type, 576 tokens, on the first `limit` scenes; all of an answer's tokens must be right."""
    right, asked = defaultdict(int), defaultdict(int)
    count = min(limit or len(cache), len(cache))
    for start in range(0, count, batch):
        scenes = cache.scenes[start : min(start + batch, count)]
        rows = [ask(scene) for scene in scenes]
        packed = pack(tokenizer, rows, PATCHES)
        features = torch.from_numpy(cache.features[start : start + len(scenes)].astype(np.float32))
        logits, wanted = answer_logits(model, features, packed)
        hits = (logits.argmax(-1) == wanted).tolist()
        for scene, questions in zip(scenes, rows, strict=True):
            for question in questions:
                length = len(tokenizer(question.answer, add_special_tokens=False).input_ids) + 1
                correct, hits = all(hits[:length]), hits[length:]
                for name in (question.kind, f"{scene.variant}/{question.kind}"):
                    right[name] += correct
                    asked[name] += 1
    names = [*KINDS, *(f"{variant}/{kind}" for variant in VARIANTS for kind in KINDS)]
    return {name: round(right[name] / asked[name], 4) for name in names if asked[name]}


# Export


def load(work: Path) -> tuple[PreTrainedTokenizerFast, LlavaForConditionalGeneration]:
    """The tokenizer and the model with the weights trained so far; the tower's stay random."""
    if not (work / "state.pt").exists():
        raise FileNotFoundError(f"{work} has no state.pt; run `train_demo.py train {work}` first")
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    model.load_state_dict(torch.load(work / "state.pt")["model"], strict=False)
    return tokenizer, model.eval()


def build_processor(tokenizer: PreTrainedTokenizerFast, budget: int | None = None) -> PruneSIDLlavaProcessor:
    """336 px pictures, a placeholder for every patch or for `budget` of them, the prompt of the training."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    )
    return PruneSIDLlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE, num_visual_tokens=budget,
    )  # fmt: skip


def export(work: Path, folder: Path) -> None:
    """Write the PruneSID Hub folder that `prunesid demo` completes: all but the frozen tower.

    In this repository the folder's code files are links to the package.
    """
    tokenizer, stock = load(work)
    fields = {name: value for name, value in stock.config.to_dict().items() if name not in STOCK_NAMES}
    model = PruneSIDLlavaForConditionalGeneration(PruneSIDLlavaConfig(**fields, prunesid_config=SETTINGS))
    model.load_state_dict(stock.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for link in folder.glob("*.py"):
        link.unlink()
    model.save_pretrained(folder)
    build_processor(tokenizer, SETTINGS["budget"]).save_pretrained(folder)

    whole = folder / "model.safetensors"
    weights = load_file(whole)
    trained = {name: value for name, value in weights.items() if not name.startswith("vision_tower.")}
    save_file(trained, folder / TRAINED, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in weights.values())},
        "weight_map": {name: TRAINED if name in trained else TOWER for name in weights},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    whole.unlink()
    if folder.resolve() == FOLDER:
        link_code(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("features", "train", "validate", "export"))
    parser.add_argument("work", type=Path, help="folder for the cache and the training state")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the export (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=9000, help="training scenes to extract")
    parser.add_argument("--crowded", type=int, default=1400, help="crowded training scenes to extract")
    parser.add_argument("--steps", type=int, nargs=4, default=(800, 700, 1500, 1600), metavar=STAGES)
    parser.add_argument("--batch", type=int, default=8, help="scenes a step and process")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.task == "features":
        tower = vision_tower(SIZE)
        extract(tower, arguments.work, "val", 240)
        extract(tower, arguments.work, "train", arguments.scenes)
        extract(tower, arguments.work, "crowded", arguments.crowded)
    elif arguments.task == "train":
        train(arguments.work, dict(zip(STAGES, arguments.steps, strict=True)), arguments.batch)
    elif arguments.task == "validate":
        tokenizer, model = load(arguments.work)
        print(json.dumps(validate(model, tokenizer, Cache(arguments.work, "val"))))
    else:
        export(arguments.work, arguments.out)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
