"""What selection costs, and what it saves: ratios measured side by side in one run.

a. Selection alone, against the way the authors' release computes it (our own code: a randomised SVD, K copies of
   the similarity matrix, Python loops over groups and tokens), on the same inputs: time and peak memory.
b. The vision tower of LLaVA-1.5 (CLIP ViT-L/14-336, random weights), as the stock class runs it and as ours does,
   which stops after the last layer that is needed; the row of CLS attention, against `output_attentions=True`.
c. LLaVA-1.5 and LLaVA-NeXT shapes end to end, stock class and ours at every budget: time to first token, prefill of
   the language model alone, decoding, KV cache and peak memory. Random weights; a small language model on a CPU,
   the shape of a 7B in bfloat16 on a GPU.
d. Beside each time to first token its limit: the ratio of floating-point operations that remain.
e. How selection grows with tokens, images and frames.

Cases take turns; figures are medians with their range. The inputs of a. and e. are tokens of real photographs:
DINOv2-S/14's features of four layers side by side, by a random projection to 1,024 numbers, the width of CLIP-L.

Examples:
    python scripts/benchmark.py --quick       # the ratios of a. and b., and one model of c., in about a minute
    python scripts/benchmark.py --output out/benchmark.json
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from measuring import machine, peak_bytes, seconds_by_turns, spread  # first: it quietens PyTorch's profiler


# isort: split
import parts
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
    PruneSIDLlavaConfig,
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaNextConfig,
    PruneSIDLlavaNextForConditionalGeneration,
)
from modeling_prunesid.selection_prunesid import select_tokens
from modeling_prunesid.tower_prunesid import run_tower


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP_L = {
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


def release_style(hidden_states: torch.Tensor, budget: int) -> list[list[int]]:
    """Selection of `(batch, tokens, dim)` as the release computes it; quotas by cumulative rounding."""
    batch, tokens, _ = hidden_states.shape
    groups = max(budget // 4, 1)
    _, _, components = torch.pca_lowrank(hidden_states.float().sigmoid().transpose(1, 2), q=groups)
    scores, group = components.abs().max(-1)
    units = torch.nn.functional.normalize(hidden_states.float(), dim=-1)
    similarity = units @ units.transpose(1, 2)
    above = torch.ones(tokens, tokens, dtype=torch.bool, device=units.device).triu(1)
    taus = [matrix[above].mean() * budget / 32 for matrix in similarity]
    members = group[:, None, :] == torch.arange(groups, device=units.device)[None, :, None]
    pairs = members.unsqueeze(-1) & members.unsqueeze(-2)
    of_groups = similarity.unsqueeze(1).repeat(1, groups, 1, 1).masked_fill(~pairs, 0)
    selected = []
    for image in range(batch):
        survivors = []
        for number in range(groups):
            ranked = members[image, number].nonzero().flatten()
            ranked = ranked[scores[image, ranked].argsort(descending=True)]
            inside = of_groups[image, number][ranked][:, ranked]
            alive = torch.ones(len(ranked), dtype=torch.bool, device=units.device)
            kept = []
            for token in range(len(ranked)):
                if alive[token]:
                    kept.append(token)
                    alive &= ~(inside[token] >= taus[image])
            survivors.append(ranked[kept].tolist())
        total, seen, given, chosen = sum(map(len, survivors)), 0, 0, []
        for tokens_of_group in survivors:
            seen += len(tokens_of_group)
            until = round(budget * seen / total)
            chosen += tokens_of_group[: until - given]
            given = until
        selected.append(chosen)
    return selected


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


def compare_selection(tokens: torch.Tensor, cases: list[tuple[int, int, int]], rounds: int) -> dict[str, float]:
    """a. Time and memory of both computations for `(batch, tokens, budget)` cases; the ratios by name."""
    print("\na. Selection: ours against the way of the release")
    print(f"{'':16}{'release':>34}{'ours':>30}{'ratio':>8}{'peak MiB':>18}{'ratio':>8}")
    ratios = {}
    for batch, length, budget in cases:
        features = tokens[:batch, :length].contiguous()
        ways: dict[str, Callable[[], object]] = {
            "release": lambda features=features, budget=budget: release_style(features, budget),
            "ours": lambda features=features, budget=budget: select_tokens(features, budget),
        }
        seconds = seconds_by_turns(ways, rounds)
        memory = {name: peak_bytes(run) for name, run in ways.items()}
        faster = statistics.median(seconds["release"]) / statistics.median(seconds["ours"])
        smaller = memory["release"] / memory["ours"]
        both = f"{memory['release'] / 2**20:.0f} -> {memory['ours'] / 2**20:.1f}"
        print(
            f"{f'{batch} x {length} -> {budget}':16}{spread(seconds['release']):>34}{spread(seconds['ours']):>30}"
            f"{faster:7.1f}x{both:>18}{smaller:7.1f}x"
        )
        name = f"b{batch}_n{budget}"
        ratios |= {f"selection_time_ratio_{name}": faster, f"selection_memory_ratio_{name}": smaller}
    return ratios


@torch.no_grad()
def compare_tower(tokens: torch.Tensor, rounds: int, quick: bool) -> dict[str, float]:
    """b. The tower as it is run by either class, and the shares of it that selection and the CLS row take."""
    print("\nb. CLIP ViT-L/14-336, one image")
    tower = AutoModel.from_config(CLIPVisionConfig(**CLIP_L)).eval().to(DEVICE)
    pixels = torch.randn(1, 3, 336, 336, device=DEVICE)
    cases: dict[str, Callable[[], object]] = {
        "stock, every layer": lambda: tower(pixels, output_hidden_states=True),
        "ours, to layer -2": lambda: run_tower(tower, pixels, [23]),
    }
    if not quick:
        cases["ours, with the CLS row"] = lambda: run_tower(tower, pixels, [23], cls_attention_layer=23)
        eager = AutoModel.from_config(CLIPVisionConfig(**CLIP_L), attn_implementation="eager").eval().to(DEVICE)
        eager.load_state_dict(tower.state_dict())
        cases["output_attentions=True"] = lambda: eager(pixels, output_attentions=True, output_hidden_states=True)
    seconds = seconds_by_turns(cases, rounds)
    for name, run in cases.items():
        print(f"{name:28}{spread(seconds[name]):>34}{peak_bytes(run) / 2**20:10.0f} MiB")

    from modeling_prunesid.tower_prunesid import _cls_attention

    queries, keys = torch.randn(2, 1, 577, 1024, device=DEVICE)
    pieces: dict[str, Callable[[], object]] = {
        "selection of 64": lambda: select_tokens(tokens[:1], 64),
        "CLS row alone": lambda: _cls_attention(queries, keys, num_heads=16),
    }
    whole = statistics.median(seconds["stock, every layer"])
    shares = {}
    for name, times in seconds_by_turns(pieces, 15).items():
        shares[name] = statistics.median(times) / whole
        print(f"{name:28}{spread(times):>34}   {100 * shares[name]:.3f}% of the stock tower")
    return {
        "selection_share_of_tower_n64": shares["selection of 64"],
        "cls_row_share_of_tower": shares["CLS row alone"],
        "tower_time_ratio": whole / statistics.median(seconds["ours, to layer -2"]),
    }


def build(is_next: bool):
    """The stock model and ours around the same modules, with random weights."""
    text = {**TEXT, **(SEVEN_B if DEVICE == "cuda" else SMALL)}
    common = {"vision_config": CLIP_L, "text_config": text, "image_token_index": IMAGE}
    if is_next:
        common["image_grid_pinpoints"] = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        ours_class, stock_class = PruneSIDLlavaNextForConditionalGeneration, LlavaNextForConditionalGeneration
        ours_config, stock_config = PruneSIDLlavaNextConfig(**common), LlavaNextConfig(**common)
    else:
        ours_class, stock_class = PruneSIDLlavaForConditionalGeneration, LlavaForConditionalGeneration
        ours_config, stock_config = PruneSIDLlavaConfig(**common), LlavaConfig(**common)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    with torch.device(DEVICE):
        ours = ours_class._from_config(ours_config, dtype=dtype).eval()
    with torch.device("meta"):
        stock = stock_class(stock_config).eval()
    for name, module in ours.model.named_children():
        setattr(stock.model, name, module)
    if is_next:
        stock.model.image_newline = ours.model.image_newline
    stock.lm_head = ours.lm_head
    for model in (ours, stock):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return ours, stock


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


def operations(views: int, tokens: int) -> float:
    """d. Floating-point operations of the tower on `views` images and the prefill of a prompt of `tokens`."""

    def transformer(length: int, layers: int, width: int, inner: int, projections: int) -> float:
        return layers * (2 * length * (4 * width**2 + projections * width * inner) + 4 * length**2 * width)

    text = SEVEN_B if DEVICE == "cuda" else SMALL
    tower = views * transformer(577, 24, 1024, 4096, projections=2)
    return tower + transformer(tokens, text["num_hidden_layers"], text["hidden_size"], text["intermediate_size"], 3)


@torch.no_grad()
def compare_models(is_next: bool, budgets: list[int], rounds: int) -> dict[str, float]:
    """c. and d. The stock class and ours at every budget of a view."""
    name, views = ("LLaVA-NeXT", 5) if is_next else ("LLaVA-1.5", 1)
    ours, stock = build(is_next)
    inputs, settings = question(ours, is_next), ours.config.prunesid_config
    cases = {"stock": (stock, None)} | {f"{views} x {count}": (ours, count) for count in budgets}
    size = sum(parameter.numel() for parameter in ours.model.language_model.parameters()) / 1e6
    print(f"\nc. {name} shape, language model of {size:.0f} M parameters, {ours.dtype}")
    print(
        f"{'':12}{'prompt':>8}{'first token':>34}{'ratio':>8}{'limit':>8}{'prefill':>10}{'ratio':>8}{'decode':>14}",
        end="",
    )
    print(f"{'KV cache':>12}{'peak':>12}")

    def answer(model, budget):
        settings.budget = budget
        return model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)

    first = seconds_by_turns(
        {case: (lambda model=model, budget=budget: answer(model, budget)) for case, (model, budget) in cases.items()},
        rounds,
    )
    prompts = {}
    for case, (model, budget) in cases.items():
        cache = answer(model, budget).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        prompts[case] = (cache.get_seq_length(), held)
    embeddings = {
        case: torch.randn(1, length, ours.config.text_config.hidden_size, device=DEVICE, dtype=ours.dtype)
        for case, (length, _) in prompts.items()
    }
    prefill = seconds_by_turns(
        {
            case: (lambda rows=rows: ours.model.language_model(inputs_embeds=rows, use_cache=True))
            for case, rows in embeddings.items()
        },
        max(rounds, 3),
    )
    word = torch.randn(1, 1, ours.config.text_config.hidden_size, device=DEVICE, dtype=ours.dtype)

    def decode(cache):
        for _ in range(DECODED):
            ours.model.language_model(inputs_embeds=word, past_key_values=cache)

    caches = {
        case: ours.model.language_model(inputs_embeds=rows, use_cache=True).past_key_values
        for case, rows in embeddings.items()
    }
    decoding = seconds_by_turns({case: (lambda cache=cache: decode(cache)) for case, cache in caches.items()}, 3)
    ratios = {}
    for case, (model, budget) in cases.items():
        length, held = prompts[case]
        rate = DECODED / statistics.median(decoding[case])
        ratio = statistics.median(first["stock"]) / statistics.median(first[case])
        alone = statistics.median(prefill["stock"]) / statistics.median(prefill[case])
        limit = operations(views, prompts["stock"][0]) / operations(views, length)
        peak = peak_bytes(lambda model=model, budget=budget: answer(model, budget)) / 2**20
        print(
            f"{case:12}{length:8}{spread(first[case]):>34}{ratio:7.2f}x{limit:7.2f}x"
            f"{1000 * statistics.median(prefill[case]):7.0f} ms{alone:7.2f}x{rate:8.1f} tok/s"
            f"{held / 2**20:8.1f} MiB{peak:8.0f} MiB"
        )
        if budget is not None:
            key = f"{'next' if is_next else 'llava'}_{views * budget}"
            ratios |= {f"ttft_ratio_{key}": ratio, f"prefill_ratio_{key}": alone}
    return ratios


def grow(tokens: torch.Tensor, rounds: int) -> None:
    """e. Selection by tokens (a ninth is kept), images and frames."""
    print("\ne. How selection grows")
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
    for name, times in seconds_by_turns(cases, rounds).items():
        print(f"{name:20}{spread(times):>36}{peak_bytes(cases[name]) / 2**20:10.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the main ratios in about a minute")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    print(machine())

    tokens = tokens_of_photographs(5 if arguments.quick else 8)
    cases = [(5, 576, 192), (1, 576, 64)]
    if not arguments.quick:
        cases = [(batch, 576, budget) for batch in (1, 5) for budget in (192, 128, 64, 32)] + [(8, 256, 17)]
    ratios = compare_selection(tokens, cases, 5 if arguments.quick else 7)
    ratios |= compare_tower(tokens, 2 if arguments.quick else 3, arguments.quick)
    ratios |= compare_models(False, [64] if arguments.quick else [192, 128, 64, 32], 2 if arguments.quick else 3)
    if not arguments.quick:
        ratios |= compare_models(True, [128, 64, 32], 1 if DEVICE == "cpu" else 5)
        grow(tokens, 3)
    report = {"machine": machine(), **{name: round(value, 5) for name, value in ratios.items()}}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
