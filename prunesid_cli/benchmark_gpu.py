"""What selection and whole models cost on a GPU: `prunesid benchmark --gpu`, in less than six minutes on an H100.

7B shapes with random bf16 weights, the stock class against ours at each budget, 1 and 8 images: selection (eager and
as a CUDA graph), kernels launched, waits of the host, encoding, prefill, first token, decoding, KV cache, peak memory;
and whether an image alone gets the tokens that it gets in a batch. After `seconds`, cases that are left are skipped,
and one that fails does not cost the others. With `tiny` the same code runs tiny models, on a CPU too.
"""

import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

import modeling_prunesid
from modeling_prunesid.context import Context, counts_on
from modeling_prunesid.methods import method_of
from modeling_prunesid.upstream import cache_of


CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TEXT_TOKENS = 50
METHODS: dict[str, tuple[str, Any]] = {
    "paper": ("paper", SimpleNamespace(num_groups=None, nms_lambda=None, method_settings={})),
    "auto": ("paper", SimpleNamespace(num_groups=None, nms_lambda="auto", method_settings={})),
    "release": ("release", SimpleNamespace(num_groups=None, nms_lambda=None, method_settings={})),
    "spread": ("spread", SimpleNamespace(num_groups=None, nms_lambda=None, method_settings={})),
}
SELECTIONS = [(1, 576, 64), (5, 576, 32), (5, 576, 128), (5, 576, 192), (8, 256, 17), (32, 576, 64)]
COLUMNS = ("visual", "encode_ms", "prefill_ms", "first_token_ms", "decode_tokens_per_s", "kv_mib", "peak_mib", "waits")


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median wall time of a call that begins and ends with an idle device, and of the device's own (CUDA events)."""
    run()
    wall, device = [], []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if CUDA else []
        for event in events[:1]:
            event.record()
        run()
        for event in events[1:]:
            event.record()
        synchronize()
        wall.append(1000 * (time.perf_counter() - start))
        device.append(events[0].elapsed_time(events[1]) if CUDA else wall[-1])
    return {"wall_ms": round(statistics.median(wall), 4), "device_ms": round(statistics.median(device), 4)}


def launches_and_waits(run: Callable[[], object]) -> dict[str, int]:
    """Kernels and copies of the device (operations on a CPU), and how often the host waited: CUDA's own warnings."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA, activity.CPU] if CUDA else [activity.CPU]) as profiler:
        run()
        synchronize()
    kind = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    found = {"launches": sum(event.device_type == kind for event in profiler.events())}
    if CUDA:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found["waits"] = sum("synchronizing" in str(warning.message) for warning in caught)
    return found


def graph_milliseconds(run: Callable[[], object], rounds: int) -> dict[str, Any]:
    """The time of the device as a CUDA graph, or why none can be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return {"graph_ms": milliseconds(graph.replay, rounds)["device_ms"]}
    except Exception as error:
        synchronize()
        return {"graph_ms": f"{type(error).__name__}: {str(error)[:80]}"}


def smooth_features(views: int, side: int = 24, dim: int = 1024) -> torch.Tensor:
    """Features `(views, side^2, dim)` that vary smoothly over the picture, with a spectrum like photographs'."""
    frequency = torch.fft.fftfreq(side)[:, None].square() + torch.fft.rfftfreq(side).square()
    noise = torch.fft.rfft2(torch.randn(views, dim, side, side, generator=torch.Generator().manual_seed(0)))
    smooth = torch.fft.irfft2(noise / (frequency + side**-2), s=(side, side))
    return (smooth / smooth.std()).flatten(2).mT.contiguous().to(DEVICE)


def selecting(name: str, views: torch.Tensor, budget: int) -> Callable[[], torch.Tensor]:
    """A call of a method on features, and on an attention that is made up of them."""
    method, settings = METHODS[name]
    counts = counts_on(views.device, [budget] * len(views))
    context = Context(counts=[budget] * len(views), attention=views.sigmoid().mean(-1) ** 8)
    return lambda: method_of(method)(views, counts, settings, context).indices


def check_selection(record: Callable, tiny: bool, rounds: int) -> None:
    for views, tokens, budget in SELECTIONS[:2] if tiny else SELECTIONS:
        features = smooth_features(views, int(tokens**0.5))
        for name in METHODS:
            run = selecting(name, features, budget)

            def measure(run=run):
                found = milliseconds(run, rounds) | launches_and_waits(run)
                return found | (graph_milliseconds(run, rounds) if found.get("waits") == 0 else {})

            record({"part": "selection", "method": name, "views": views, "tokens": tokens, "kept": budget}, measure)


def check_invariance(record: Callable, tiny: bool) -> None:
    """Images alone and in random batches, with and without TF32."""
    features = smooth_features(32)
    for name in METHODS:

        def measure(name=name):
            alone = torch.cat([selecting(name, features[view : view + 1], 64)() for view in range(len(features))])
            generator, different, seen = torch.Generator().manual_seed(0), 0, 0
            before = torch.get_float32_matmul_precision()
            try:
                for number in range(4 if tiny else 60):
                    torch.set_float32_matmul_precision(("highest", "high")[number % 2])
                    size = int(torch.randint(1, 33, (), generator=generator))
                    chosen = torch.randint(0, len(features), (size,), generator=generator).to(DEVICE)
                    rows = selecting(name, features[chosen], 64)() != alone[chosen]
                    different, seen = different + int(rows.any(1).sum()), seen + size
            finally:
                torch.set_float32_matmul_precision(before)
            return {"images": seen, "different": different}

        record({"part": "invariance", "method": name}, measure)


def shapes(family: str, tiny: bool) -> dict[str, Any]:
    """The configuration of a family at 7B, or tiny."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision: dict[str, Any]
    text: dict[str, Any]
    rope: dict[str, Any]
    if family == "Qwen2_5_VL":
        vision = {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        }
        text = {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
        }
        text |= {"num_key_value_heads": 4, "vocab_size": 152064}
        rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
        if tiny:
            vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
            vision |= {"fullatt_block_indexes": [1]}
            text |= small | {"num_key_value_heads": 2}
            rope |= {"mrope_section": [2, 3, 3]}
        return {"vision_config": vision, "text_config": text | {"rope_parameters": rope}}
    vision = {
        "model_type": "clip_vision_model",
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "pad_token_id": 0}
    if tiny:
        vision, text = vision | small, text | small
    else:
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        text |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = {"vision_config": vision, "text_config": text, "image_token_index": 32000}
    if family == "LlavaNext":
        config["image_grid_pinpoints"] = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return config


def build(family: str, tiny: bool) -> tuple[Any, Any]:
    """The stock class and ours, with the same modules."""
    name = f"{family}ForConditionalGeneration"
    config = shapes(family, tiny) | {"attn_implementation": "sdpa"}
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        with torch.device(DEVICE):
            settings = getattr(modeling_prunesid, f"PruneSID{family}Config")(**config, prunesid_config={"budget": 64})
            ours = getattr(modeling_prunesid, f"PruneSID{name}")(settings).eval()
        with torch.device("meta"):
            stock = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**config)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for part, module in ours.model.named_children():
        setattr(stock.model, part, module)
    if hasattr(ours.model, "image_newline"):
        stock.model.image_newline = ours.model.image_newline
    stock.lm_head = ours.lm_head
    return stock, ours


def images_of(family: str, model: Any, batch: int) -> dict[str, torch.Tensor]:
    """Random images, as the processor would pass them."""
    if family == "Qwen2_5_VL":
        grid = torch.tensor([[1, 36, 36]] * batch)
        pixels = torch.randn(batch * 36 * 36, 3 * 2 * 14 * 14, device=DEVICE, dtype=model.dtype)
        return {"pixel_values": pixels, "image_grid_thw": grid.to(DEVICE)}
    shape = (batch, 5, 3, 336, 336) if family == "LlavaNext" else (batch, 3, 336, 336)
    encoded = {"pixel_values": torch.randn(shape, device=DEVICE, dtype=model.dtype)}
    return encoded | ({"image_sizes": torch.tensor([[672, 672]] * batch)} if family == "LlavaNext" else {})


@torch.no_grad()
def check_model(family: str, budgets: list, record: Callable, tiny: bool, rounds: int) -> None:
    stock, ours = build(family, tiny)
    token = stock.config.image_token_id if family == "Qwen2_5_VL" else stock.config.image_token_index
    for batch in (1, 2) if tiny else (1, 8):
        encoded = images_of(family, ours, batch)
        length = len(stock.get_image_features(**encoded).pooler_output[0])
        ids = torch.tensor([[1, *[token] * length, *range(10, 10 + TEXT_TOKENS - 1)]] * batch, device=DEVICE)
        inputs = {**encoded, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if family == "Qwen2_5_VL":
            inputs["mm_token_type_ids"] = (ids == token).long()
        for budget in [None, *budgets]:
            model = stock if budget is None else ours
            if budget is not None:
                ours.config.prunesid_config.budget = budget
            case = {"part": family, "class": "stock" if budget is None else "ours", "images": batch, "budget": budget}
            record(case, partial(measure_model, model, encoded, inputs, batch, tiny, rounds))
    del stock, ours
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def measure_model(model: Any, encoded: dict, inputs: dict, batch: int, tiny: bool, rounds: int) -> dict[str, Any]:
    rounds, new = max(rounds // 4, 2), 4 if tiny else 32
    decoder = model.model.language_model
    visual = len(model.get_image_features(**encoded).pooler_output[0])
    prompt = torch.randn(batch, visual + TEXT_TOKENS, decoder.config.hidden_size, device=DEVICE, dtype=model.dtype)

    def generate(count: int):
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        return model.generate(**inputs, **options, return_dict_in_generate=True)

    found: dict[str, Any] = {
        "visual": visual,
        "encode_ms": milliseconds(lambda: model.get_image_features(**encoded), rounds)["wall_ms"],
        "prefill_ms": milliseconds(lambda: decoder(inputs_embeds=prompt, use_cache=True), rounds)["wall_ms"],
        "first_token_ms": milliseconds(lambda: generate(1), rounds)["wall_ms"],
    }
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    output = generate(new + 1)
    if CUDA:
        found["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    layers = cache_of(output).layers
    found["kv_mib"] = round(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / 2**20, 2)
    both = milliseconds(lambda: generate(new + 1), rounds)["wall_ms"]
    if both > found["first_token_ms"]:
        found["decode_tokens_per_s"] = round(1000 * new * batch / (both - found["first_token_ms"]), 1)
    return found | launches_and_waits(lambda: model(**inputs))


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown, for README."""
    lines = ["| selection | method | eager ms | graph ms | launches | waits |", "|---|---|---|---|---|---|"]
    for row in (row for row in results if row["part"] == "selection"):
        cells = [f"{row['views']} x {row['tokens']} -> {row['kept']}", row["method"]]
        lines.append(_line(cells + [row.get(name, "") for name in ("wall_ms", "graph_ms", "launches", "waits")]))
    lines += ["", _line(["model", "class", "images", *COLUMNS]), _line(["---"] * (3 + len(COLUMNS)))]
    for row in (row for row in results if "class" in row):
        lines.append(_line([row["part"], row["class"], row["images"], *[row.get(name, "") for name in COLUMNS]]))
    lines += ["", "| images in random batches | different from alone |", "|---|---|"]
    for row in (row for row in results if row["part"] == "invariance"):
        lines.append(_line([f"{row.get('images', '')} ({row['method']})", row.get("different", "")]))
    return "\n".join(lines)


def _line(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def run_all(tiny: bool, seconds: float, output: Path | None) -> dict[str, Any]:
    """Measures everything, prints each case and then a table, and returns what `output` is written with after each."""
    rounds = 2 if tiny else 20
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report: dict[str, Any] = {"device": device, **versions, "results": []}
    end = time.monotonic() + seconds

    def record(case: dict, measure: Callable[[], dict]) -> None:
        if time.monotonic() > end:
            found: dict[str, Any] = {"skipped": "out of time"}
        else:
            try:
                found = measure()
            except Exception as error:  # the device time of the others is not to be lost
                found = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        report["results"].append(case | found)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(case | found), flush=True)

    check_selection(record, tiny, rounds)
    check_invariance(record, tiny)
    check_model("Llava", [192, 128, 64], record, tiny, rounds)
    check_model("LlavaNext", [128, 64, 32], record, tiny, rounds)
    check_model("Qwen2_5_VL", [1 / 3, 2 / 9, 1 / 9], record, tiny, rounds)
    print(f"\n{device}, PyTorch {torch.__version__}, Transformers {transformers.__version__}\n")
    print(table(report["results"]))
    return report
