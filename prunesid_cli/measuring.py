"""How the commands measure: interleaved, medians, and the tensors that PyTorch holds at its peak."""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when PyTorch is first imported: its profiler is not to print

import torch
from torch.profiler import ProfilerActivity, profile


def machine() -> str:
    """The machine in words: processor or GPU, threads, and the versions that matter."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        names = [line.split(":", 1)[1].strip() for line in _cpu_info() if line.startswith("model name")]
        threads = torch.get_num_threads()
        device = f"{names[0] if names else platform.processor() or 'CPU'}, {threads} thread{'s' * (threads > 1)}"
    return f"{device}, {platform.system()}, PyTorch {torch.__version__}"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if os.path.exists(path) else []


def seconds_interleaved(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The wall time of every round of each case. The cases take turns, and a first round warms up uncounted."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_number in range(1 + rounds):
        for name, run in cases.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> str:
    """Median and range in milliseconds."""
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"{1000 * middle:.2f} ms ({1000 * low:.2f}-{1000 * high:.2f})"


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest sum of tensors alive at once that PyTorch allocated during `run`, beside what was there before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    alive: dict[int, int] = {}
    total = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            alive[address] = size
            total += size
        else:
            total -= alive.pop(address, 0)
        peak = max(peak, total)
    return peak
