"""What selection costs and what it saves: ratios measured side by side in one run.

a. Selection alone against the reference implementation (our own code, step by step as the authors' release computes):
   time, memory, and how often groups agree with exact eigenvectors.
b. The vision tower of LLaVA-1.5 (CLIP ViT-L/14-336, random weights): the stock class, and ours with its early exit.
c. LLaVA-1.5 and LLaVA-NeXT shapes end to end, stock class and ours at every budget: first token, prefill, decoding, KV
   cache, peak memory. Random weights; a small language model on a CPU, the shape of a 7B in bfloat16 on a GPU.
d. Their theoretical limits: the ratio of operations, of bytes read for each decoded token, and of cached tokens.
e. How selection scales with tokens, images and frames.

Cases are interleaved; figures are medians with their range. The inputs of a. and e. are features of real photographs.

Examples:
    prunesid benchmark --quick       # the ratios of a. and b., and one model of c., in about a minute
    prunesid benchmark --output out/benchmark.json
    prunesid benchmark --gpu         # 7B shapes on a GPU
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock, patch

from prunesid_cli.measuring import (  # first: it quietens PyTorch's profiler
    machine,
    peak_bytes,
    seconds_interleaved,
    spread,
)


# isort: split
import torch
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.utils import logging

from modeling_prunesid import (
    LayerPrunedLlavaConfig,
    LayerPrunedLlavaForConditionalGeneration,
    PruneSIDLlavaConfig,
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaNextConfig,
    PruneSIDLlavaNextForConditionalGeneration,
    ViTCoPLlavaConfig,
    ViTCoPLlavaForConditionalGeneration,
    selection,
    similarity,
)
from modeling_prunesid.select_tokens import select_tokens
from modeling_prunesid.upstream import CACHE_NAME, cache_of
from prunesid_cli import parts
from prunesid_cli.tables import print_rows
from prunesid_cli.tower_memo import remembered
from prunesid_cli.towers import run_tower


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP_L: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9}
SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TEXT = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "pad_token_id": 0}
IMAGE = 32000
TEXT_TOKENS, DECODED = 50, 16


@torch.no_grad()
def release_style(hidden_states: torch.Tensor, budget: int) -> list[list[int]]:
    """The tokens of `(batch, tokens, dim)` that the release keeps of each image, group by group, best first.

    As the release does, all images at once: a randomised SVD; a copy of the similarity matrix for every group, and a
    mask as large, filled by rows and then by columns; NMS that takes the best token left of every group in each round.
    A group gets one token and others by cumulative rounding of its survivors' share, halves to the even number, up to
    a bound that rises until all groups together hold `budget`, suppressed tokens behind survivors. CLS and its scores
    are left out.
    """
    batch, tokens, _ = hidden_states.shape
    groups = max(budget // 4, 1)
    components = torch.pca_lowrank(hidden_states.float().sigmoid().mT, q=groups)[2].abs()
    members = components.argmax(-1, keepdim=True) == torch.arange(groups, device=components.device)
    scores = components.clone()
    scores[torch.where(~members)] = 0

    units = torch.nn.functional.normalize(hidden_states, dim=-1)
    similarity = torch.bmm(units, units.mT).float()
    above = torch.ones_like(similarity).triu(1).bool()
    taus = budget / 32 * (similarity * above).sum((1, 2)) / above.sum((1, 2))
    of_groups = similarity[:, None].repeat(1, groups, 1, 1)
    masks = torch.zeros_like(of_groups)
    masks[members.mT] = 1
    masks[torch.where(masks.mT == 1)] = 1
    of_groups[masks != 1] = 0
    survivors, ranks = _nms_by_rounds(of_groups, scores, taus)

    sizes = members.sum(1)
    lower = sizes.clamp(max=1)
    upper = sizes.minimum(survivors).clamp(max=5 * math.ceil(budget / 64))
    while (short := upper.sum(1) < budget).any():
        upper[short] += 1
        upper = upper.minimum(sizes)
    shared, total = (budget - lower.sum(1))[:, None], survivors.sum(1)[:, None]
    until = (shared * survivors.cumsum(1) / total).round().long()
    quotas = (lower + until.diff(prepend=torch.zeros_like(shared))).minimum(upper)
    for image, group in enumerate(survivors.argsort(descending=True, stable=True)):
        for number in group:
            missing = budget - quotas[image].sum()
            if missing <= 0:
                break
            quotas[image, number] += missing.minimum(upper[image, number] - quotas[image, number])
    best = ranks.argsort(dim=1, descending=True)
    kept = []
    for image in range(batch):
        picks = [best[image, : int(quotas[image, number]), number] for number in range(groups)]
        kept.append(torch.cat(picks).tolist())
    return kept


def _nms_by_rounds(similarity: torch.Tensor, scores: torch.Tensor, taus: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The release's NMS on `(batch, groups, tokens, tokens)` and `(batch, tokens, groups)`, scores 0 outside a group:
    survivors of each group `(batch, groups)`, and scores that put them first, in the order they were taken."""
    batch, groups, tokens, _ = similarity.shape
    shape, device = (batch, groups, tokens), scores.device
    images = torch.arange(batch, device=device)[:, None, None].expand(shape)
    numbers = torch.arange(groups, device=device)[:, None].expand(shape)
    columns = torch.arange(tokens, device=device).expand(shape)
    remaining, ranks = scores.clone(), scores.clone()
    survivors = torch.zeros(batch, groups, dtype=torch.long, device=device)
    rank = tokens + 1
    while remaining.sum() > 0:
        score, token = remaining.max(1)
        rows = similarity[images, numbers, token[:, :, None].expand(shape), columns]
        image, number = torch.where(score > 0)
        taken = (image, token[image, number], number)
        ranks[taken], remaining[taken] = rank, 0
        survivors[image, number] += 1
        remaining[(rows >= taus[:, None, None]).mT] = 0
        rank -= 1
    return survivors, ranks


@torch.no_grad()
def tokens_of_photographs(count: int) -> torch.Tensor:
    """Tokens `(count, 576, 1024)` of real photographs, repeated where there are fewer."""
    tower = parts.vision_tower().eval()
    generator = torch.Generator().manual_seed(0)
    project = torch.randn(4 * tower.config.hidden_size, 1024, generator=generator)
    project /= math.sqrt(len(project))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    tokens = []
    for photograph in list(parts.photographs().values())[:count]:
        side = min(photograph.size)
        left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
        square = photograph.convert("RGB").crop((left, top, left + side, top + side)).resize((336, 336))
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(336, 336, 3) / 255
        pixels = ((pixels - mean) / deviation).permute(2, 0, 1)[None]
        states = tower(pixels, output_hidden_states=True).hidden_states
        tokens.append(torch.cat([states[layer][0, 1:] for layer in (-2, -4, -6, -8)], dim=-1) @ project)
    return torch.stack([tokens[index % len(tokens)] for index in range(count)]).to(DEVICE)


def time_stages(features: torch.Tensor, budget: int, rounds: int) -> dict[str, float]:
    """a. The shares of our selection's time that its stages take, each run again on what it was called with."""
    stages = {name: getattr(selection, name) for name in ("principal_components", "survivors")}
    stages["similarity"] = similarity.Pairs.similarity
    spies = {name: Mock(wraps=stage) for name, stage in stages.items()}
    in_groups = patch.object(similarity.Pairs, "similarity", lambda *arguments: spies["similarity"](*arguments))
    with in_groups, patch.multiple(selection, **{name: spies[name] for name in ("principal_components", "survivors")}):
        select_tokens(features, budget)
    cases: dict[str, Callable[[], object]] = {"whole": lambda: select_tokens(features, budget)}
    cases |= {name: partial(stages[name], *spy.call_args.args) for name, spy in spies.items() if spy.called}
    seconds = seconds_interleaved(cases, rounds)
    taken = {name: statistics.median(times) / statistics.median(seconds["whole"]) for name, times in seconds.items()}
    components = taken["principal_components"]
    nms = taken.get("similarity", 0) + taken.get("survivors", 0)
    shares = {"principal_components": components, "similarity_and_nms": nms, "rest": 1 - components - nms}
    described = ", ".join(f"{name.replace('_', ' ')} {100 * share:.0f}%" for name, share in shares.items())
    print(f"Our time of {features.shape[0]} x {features.shape[1]} -> {budget}: {described}")
    return shares


def compare_selection(tokens: torch.Tensor, cases: list[tuple[int, int, int]], rounds: int) -> dict[str, float]:
    """a. Time and memory of both computations for `(batch, tokens, budget)` cases; the ratios by name."""
    ratios, rows = {}, []
    for batch, length, budget in cases:
        features = tokens[:batch, :length].contiguous()
        ways: dict[str, Callable[[], object]] = {
            "release": lambda features=features, budget=budget: release_style(features, budget),
            "ours": lambda features=features, budget=budget: select_tokens(features, budget),
        }
        seconds = seconds_interleaved(ways, rounds)
        memory = {name: peak_bytes(run) for name, run in ways.items()}
        faster = statistics.median(seconds["release"]) / statistics.median(seconds["ours"])
        smaller = memory["release"] / memory["ours"]
        rows.append(
            {
                "images x tokens -> kept": f"{batch} x {length} -> {budget}",
                "release": spread(seconds["release"]),
                "ours": spread(seconds["ours"]),
                "speed-up": f"{faster:.1f}x",
                "peak MiB": f"{memory['release'] / 2**20:.0f} -> {memory['ours'] / 2**20:.1f}",
                "smaller": f"{smaller:.1f}x",
            }
        )
        name = f"b{batch}_n{budget}"
        ratios |= {f"selection_time_ratio_{name}": faster, f"selection_memory_ratio_{name}": smaller}
    print_rows(rows, "\na. Selection: ours against the reference implementation")
    return ratios


def compare_groups(tokens: torch.Tensor, budgets: list[int]) -> dict[str, float]:
    """a. The share of tokens in the group that exact eigenvectors in float64 give them, by budget."""
    rescaled = tokens.double().sigmoid()
    rescaled -= rescaled.mean(1, keepdim=True)
    vectors = torch.linalg.eigh(rescaled @ rescaled.mT).eigenvectors.flip(-1).abs()
    shares = {}
    for budget in budgets:
        groups = select_tokens(tokens, budget, return_details=True).groups
        shares[str(budget)] = (groups == vectors[..., : budget // 4].argmax(-1)).double().mean().item()
    described = ", ".join(f"{100 * share:.2f}% at {budget}" for budget, share in shares.items())
    print(f"Tokens in the group of exact float64 eigenvectors, {len(tokens)} photographs: {described}")
    return shares


@torch.no_grad()
def compare_tower(tokens: torch.Tensor, rounds: int, quick: bool) -> dict[str, float]:
    """b. The tower as it is run by either class, and the shares of it that selection and the CLS row take."""
    tower = AutoModel.from_config(CLIPVisionConfig(**CLIP_L)).eval().to(DEVICE)
    pixels = torch.randn(1, 3, 336, 336, device=DEVICE)
    needed = CLIP_L["num_hidden_layers"] - 1  # layer -2
    cases: dict[str, Callable[[], object]] = {
        "stock, every layer": lambda: tower(pixels, output_hidden_states=True),
        "ours, to layer -2": lambda: run_tower(tower, pixels, [needed]),
    }
    if not quick:
        cases["ours, with the CLS row"] = lambda: run_tower(tower, pixels, [needed], cls_attention_layer=needed)
        eager = AutoModel.from_config(CLIPVisionConfig(**CLIP_L), attn_implementation="eager").eval().to(DEVICE)
        eager.load_state_dict(tower.state_dict())
        cases["output_attentions=True"] = lambda: eager(pixels, output_attentions=True, output_hidden_states=True)
    seconds = seconds_interleaved(cases, rounds)
    rows = [
        {
            "": name,
            "time": spread(seconds[name]),
            "peak": f"{peak_bytes(run) / 2**20:.0f} MiB",
            "of the stock tower": "",
        }
        for name, run in cases.items()
    ]

    from modeling_prunesid.cls_attention import cls_attention

    queries, keys = torch.randn(2, 1, 577, 1024, device=DEVICE)
    pieces: dict[str, Callable[[], object]] = {
        "selection of 64": lambda: select_tokens(tokens[:1], 64),
        "CLS row alone": lambda: cls_attention(queries, keys, num_heads=16),
    }
    whole = statistics.median(seconds["stock, every layer"])
    shares = {}
    for name, times in seconds_interleaved(pieces, 15).items():
        shares[name] = statistics.median(times) / whole
        rows.append({"": name, "time": spread(times), "of the stock tower": f"{100 * shares[name]:.3f}%"})
    print_rows(rows, "\nb. CLIP ViT-L/14-336, one image")
    return {
        "selection_share_of_tower_n64": shares["selection of 64"],
        "cls_row_share_of_tower": shares["CLS row alone"],
        "tower_time_ratio": whole / statistics.median(seconds["ours, to layer -2"]),
    }


def around(modules_of, model_class, config):
    """A model of another class with the modules of `modules_of`."""
    with torch.device("meta"):
        model = model_class(config).eval()
    for name, module in modules_of.model.named_children():
        setattr(model.model, name, module)
    model.lm_head = modules_of.lm_head
    return model


def build(is_next: bool) -> dict:
    """The stock model, PruneSID and, for LLaVA-1.5, PruneSID with `llm_budget` and ViTCoP: around the same modules,
    with random weights."""
    text = {**TEXT, **(SEVEN_B if DEVICE == "cuda" else SMALL)}
    common = {"vision_config": CLIP_L, "text_config": text, "image_token_index": IMAGE}
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    if is_next:
        common["image_grid_pinpoints"] = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        ours_class, ours_config = PruneSIDLlavaNextForConditionalGeneration, PruneSIDLlavaNextConfig(**common)
    else:
        ours_class, ours_config = PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaConfig(**common)
    with torch.device(DEVICE):
        ours = ours_class._from_config(ours_config, dtype=dtype).eval()
    if is_next:
        stock = around(ours, LlavaNextForConditionalGeneration, LlavaNextConfig(**common))
        stock.model.image_newline = ours.model.image_newline
        models = {"stock": stock, "prunesid": ours}
    else:
        stock = around(ours, LlavaForConditionalGeneration, LlavaConfig(**common))
        layer_pruned = around(ours, LayerPrunedLlavaForConditionalGeneration, LayerPrunedLlavaConfig(**common))
        vitcop = around(ours, ViTCoPLlavaForConditionalGeneration, ViTCoPLlavaConfig(**common))
        models = {"stock": stock, "prunesid": ours, "layer_pruned": layer_pruned, "vitcop": vitcop}
    for model in models.values():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return models


class Case(NamedTuple):
    """A model, what is set in its `prunesid_config`, and its budget's name in the JSON."""

    model: Any
    settings: Mapping[str, int | None]
    budget: str

    def set_up(self):
        for name, value in self.settings.items():
            setattr(self.model.config.prunesid_config, name, value)
        return self.model


def list_cases(is_next: bool, budgets: list[int], inside: bool) -> dict[str, Case]:
    """The stock class; at every budget of a view PruneSID; and, `inside` LLaVA-1.5, at the same mean over the layers
    PruneSID with `llm_budget`, which half as many tokens again enter, and ViTCoP."""
    models, views = build(is_next), 5 if is_next else 1
    ours = models["prunesid"]
    cases = {"stock": Case(models["stock"], {}, "all")}
    for count in budgets:
        total = str(views * count)
        cases[f"{views} x {count}"] = Case(ours, {"budget": count}, total)
        if inside:
            entering = count + count // 2
            thinned = {"budget": entering, "llm_budget": count}
            cases[f"{entering}, mean {count}"] = Case(models["layer_pruned"], thinned, f"{total}_llm_budget")
            cases[f"ViTCoP {count}"] = Case(models["vitcop"], {"budget": count}, f"{total}_vitcop")
    return cases


def question(model, is_next: bool) -> dict[str, torch.Tensor]:
    """One square image and a question of 50 tokens, with a placeholder for every visual token."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 5, 3, 336, 336) if is_next else (1, 3, 336, 336)
    inputs = {"pixel_values": torch.randn(shape, generator=generator).to(DEVICE, model.dtype)}
    placeholders = 576
    if is_next:
        inputs["image_sizes"] = torch.tensor([[672, 672]])
        placeholders = 576 + 48 * 48 + 48
    words = torch.randint(10, 30000, (TEXT_TOKENS,), generator=generator).tolist()
    ids = [1, *words[:10], *[IMAGE] * placeholders, *words[10:]]
    return {**inputs, "input_ids": torch.tensor([ids], device=DEVICE)}


def operations(views: int, tower_layers: int, lengths: list[int]) -> float:
    """d. Floating-point operations of so many layers of the tower on `views` images, and of a prefill of so many
    tokens in each layer of the language model. Embeddings, projector and head are left out."""

    def layer(length: int, width: int, inner: int, projections: int) -> float:
        return 2 * length * (4 * width**2 + projections * width * inner) + 4 * length**2 * width

    text = SEVEN_B if DEVICE == "cuda" else SMALL
    patches = (CLIP_L["image_size"] // CLIP_L["patch_size"]) ** 2
    tower_layer = layer(patches + 1, CLIP_L["hidden_size"], CLIP_L["intermediate_size"], projections=2)
    prefill = sum(layer(length, text["hidden_size"], text["intermediate_size"], projections=3) for length in lengths)
    return views * tower_layers * tower_layer + prefill


@torch.no_grad()
def compare_models(
    is_next: bool, budgets: list[int], rounds: int, inside: bool = False
) -> dict[str, dict[str, float]]:
    """c. and d. The stock class and ours at every budget of a view; the ratios and limits by measure and budget."""
    name, views, suffix = ("LLaVA-NeXT", 5, "_next") if is_next else ("LLaVA-1.5", 1, "")
    cases = list_cases(is_next, budgets, inside)
    stock = cases["stock"].model
    inputs = question(stock, is_next)
    prompt = {name: value for name, value in inputs.items() if name != "pixel_values"}
    word = inputs["input_ids"][:, -1:]

    def answer(case: Case):
        return case.set_up().generate(**inputs, max_new_tokens=1, do_sample=False)

    def encode(case: Case):
        pixels = {name: value for name, value in inputs.items() if name != "input_ids"}
        return case.set_up().get_image_features(**pixels, return_dict=True)

    def prefill(case: Case, features):
        return cache_of(case.set_up().model(**prompt, mm_encoder_outputs={"image": features}, use_cache=True))

    def decode(case: Case, cache):
        for _ in range(DECODED):
            case.model.model(input_ids=word, **{CACHE_NAME: cache})

    first = seconds_interleaved({label: partial(answer, case) for label, case in cases.items()}, rounds)
    with remembered(stock.model.vision_tower):
        prefills = {label: partial(prefill, case, encode(case)) for label, case in cases.items()}
    seconds = seconds_interleaved(prefills, max(rounds, 3))
    caches = {label: run() for label, run in prefills.items()}
    held = {label: sum(row.keys.nbytes + row.values.nbytes for row in cache.layers) for label, cache in caches.items()}
    lengths = {label: [row.get_seq_length() for row in cache.layers] for label, cache in caches.items()}
    decoding = seconds_interleaved({label: partial(decode, case, caches[label]) for label, case in cases.items()}, 3)
    peaks = {label: peak_bytes(partial(answer, case)) for label, case in cases.items()}

    weights = sum(parameter.nbytes for parameter in stock.model.language_model.layers.parameters())

    def model_cost(label: str) -> dict[str, float]:
        layers = CLIP_L["num_hidden_layers"] - (label != "stock")  # ours stops at layer -2
        return {
            "ttft": operations(views, layers, lengths[label]),
            "prefill": operations(0, 0, lengths[label]),
            "decode": weights + held[label],
            "kv_cache": sum(lengths[label]),
        }

    size = sum(parameter.numel() for parameter in stock.model.language_model.parameters()) / 1e6
    rows = []
    report: dict[str, dict[str, float]] = {}
    for label, case in cases.items():
        rate = DECODED / statistics.median(decoding[label])
        limits = {what: cost / model_cost(label)[what] for what, cost in model_cost("stock").items()}
        against = {
            "ttft": statistics.median(first["stock"]) / statistics.median(first[label]),
            "prefill": statistics.median(seconds["stock"]) / statistics.median(seconds[label]),
            "decode": statistics.median(decoding["stock"]) / statistics.median(decoding[label]),
            "kv_cache": held["stock"] / held[label],
            "peak_memory": peaks["stock"] / peaks[label],
        }
        beside = {what: f" {against[what]:.2f}x ({limit:.2f}x)" for what, limit in limits.items()}
        rows.append(
            {
                "": label,
                "prompt": f"{statistics.fmean(lengths[label]):.0f}",
                "first token": spread(first[label]) + beside["ttft"],
                "prefill": f"{1000 * statistics.median(seconds[label]):.0f} ms" + beside["prefill"],
                "decode": f"{rate:.1f} tok/s" + beside["decode"],
                "KV cache": f"{held[label] / 2**20:.1f} MiB" + beside["kv_cache"],
                "peak": f"{peaks[label] / 2**20:.0f} MiB",
            }
        )
        if label != "stock":
            for what, ratio in against.items():
                report.setdefault(f"{what}_ratio{suffix}", {})[case.budget] = ratio
            for what, limit in limits.items():
                report.setdefault(f"{what}_limit{suffix}", {})[case.budget] = limit
    shape = f"{name} shape, language model of {size:.0f} M parameters, {stock.dtype}"
    print_rows(rows, f"\nc. {shape}; speed-ups with their theoretical limits in brackets")
    return report


def grow(tokens: torch.Tensor, rounds: int) -> None:
    """e. Selection by tokens (a ninth is kept), images and frames."""
    long = torch.cat([tokens.flatten(0, 1)] * math.ceil(4096 / tokens.flatten(0, 1).shape[0]))
    cases: dict[str, Callable[[], object]] = {}
    for length in (576, 1024, 2304, 4096):
        cases[f"1 x {length} -> {length // 9}"] = lambda length=length: select_tokens(long[None, :length], length // 9)
    for batch in (5, 16, 32):
        images = tokens[torch.arange(batch) % len(tokens)]
        cases[f"{batch} x 576 -> 64"] = lambda images=images: select_tokens(images, 64)
    for frames in (8, 32, 64):
        clip = tokens[torch.arange(frames) % len(tokens), :256]
        cases[f"{frames} x 256 -> 17"] = lambda clip=clip: select_tokens(clip, 17)
    rows = [
        {"views": name, "time": spread(times), "peak": f"{peak_bytes(cases[name]) / 2**20:.1f} MiB"}
        for name, times in seconds_interleaved(cases, rounds).items()
    ]
    print_rows(rows, "\ne. How selection grows")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the main ratios in about a minute")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument(
        "--gpu", action="store_true", help="selection and 7B models on a GPU, in less than six minutes"
    )
    parser.add_argument("--tiny", action="store_true", help="with --gpu: tiny models, and a CPU will do")
    parser.add_argument("--seconds", type=float, default=330, help="with --gpu: after these, cases are skipped")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    logging.disable_progress_bar()
    if arguments.gpu:
        if not arguments.tiny and DEVICE == "cpu":
            raise ValueError("--gpu measures 7B models on a CUDA GPU, and there is none. --gpu --tiny runs on a CPU.")
        from prunesid_cli.benchmark_gpu import run_all

        return run_all(arguments.tiny, arguments.seconds, arguments.output)
    print(machine())

    tokens = tokens_of_photographs(5 if arguments.quick else 8)
    cases = [(5, 576, 192), (1, 576, 64)]
    if not arguments.quick:
        cases = [(batch, 576, budget) for batch in (1, 5) for budget in (192, 128, 64, 32)] + [(8, 256, 17)]
    figures: dict[str, Any] = {**compare_selection(tokens, cases, 5 if arguments.quick else 7)}
    figures["selection_stage_shares_b1_n64"] = time_stages(tokens[:1], 64, 15)
    figures["group_agreement"] = compare_groups(tokens, [192, 128, 64, 32])
    figures |= compare_tower(tokens, 2 if arguments.quick else 3, arguments.quick)
    if arguments.quick:
        figures |= compare_models(False, [64], 1)
    else:
        figures |= compare_models(False, [192, 128, 64, 32], 3, inside=True)
        figures |= compare_models(True, [128, 64, 32], 1 if DEVICE == "cpu" else 5)
        grow(tokens, 3)
    rounded = json.loads(json.dumps(figures), parse_float=lambda digits: round(float(digits), 5))
    report = {"machine": machine(), **rounded}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print()
    return report
