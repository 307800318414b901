"""Measure the reference information that dynamic budgets need, on images of your own.

With a dynamic budget an image keeps N' = N * phi / reference tokens, where phi = 1 - rho is its information score
(section 3.4 of the paper, equation 7). The images go through the vision tower; the reference is chosen such that the
mean N' over them is the N that you ask for. The distributions of phi and N' are printed, and a histogram of phi is
drawn (figure 5). Use some hundreds of images that are like those of your task, and --min-budget as a floor.

It also says which lambda fits the tower (section 3.3): how many tokens survive tau = lambda * rho with the paper's
lambda, and whether `nms_lambda="auto"` fits better.

The images are a folder, a dataset that the datasets library saved to a folder, or the name of a dataset on the Hub.
The settings are written as JSON for `prunesid convert --preset`.

Examples:
    prunesid calibrate llava-hf/llava-1.5-7b-hf photos --budget 64 --min-budget 16 --output out/calibrated.json
    prunesid calibrate llava-hf/llava-1.5-7b-hf lmms-lab/MMMU --split validation --column image_1 \\
        --budget 128 --output out/mmmu.json
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from PIL import Image
from tqdm import tqdm

from modeling_prunesid import PruneSIDConfig
from modeling_prunesid.checks import resolve_budget
from modeling_prunesid.connector import BehindConnectorModelMixin
from modeling_prunesid.context import Context
from modeling_prunesid.dynamic import information_budgets, redundancy
from modeling_prunesid.presets import read_preset
from modeling_prunesid.select_tokens import select_tokens
from modeling_prunesid.suppression import WITH_NMS, find_suppressors
from prunesid_cli.convert import find_family, parse_budget
from prunesid_cli.generate import ask, load_processor
from prunesid_cli.images import open_image
from prunesid_cli.tables import print_rows


PROMPT = "What is in this image?"  # of no consequence: processors of whole prompts read images too
FEW_VIEWS = 100
CENTILES = (0, 5, 25, 50, 75, 95, 100)
LAMBDA_VIEWS = 100  # whose survivors are counted
INK, MUTED, FILL = "#1f2430", "#6b7280", "#3b6fb6"


def find_images(source: str, split: str, column: str | None) -> Iterator[Image.Image]:
    """
    The images of a folder, of a saved dataset or of a dataset on the Hub, as RGB.

    Raises:
        `ValueError`: if there are none, or a file that is named like an image is none.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        endings = set(Image.registered_extensions())
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)
        if not paths:
            raise ValueError(f"The folder {source} has no images.")
        for path in paths:
            yield open_image(path)
        return
    yield from _images_of_dataset(source, split, column)


def _images_of_dataset(source: str, split: str, column: str | None) -> Iterator[Image.Image]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source} is no folder of images; for a dataset install the `datasets` library.") from error
    if Path(source).is_dir():
        rows = datasets.load_from_disk(source)
        rows = rows[split] if isinstance(rows, dict) else rows
    else:
        rows = datasets.load_dataset(source, split=split, streaming=True)
    columns = [name for name, feature in (rows.features or {}).items() if isinstance(feature, datasets.Image)]
    if column is None and len(columns) != 1:
        raise ValueError(f"--column must name the images of {source}, which has {columns or 'no image columns'}.")
    column = column or columns[0]
    for number, row in enumerate(rows.cast_column(column, datasets.Image(decode=False))):
        image = row[column]
        if image is not None:
            yield open_image(image["bytes"] or image["path"], f"{column!r} in row {number} of {source}")


class Survival(NamedTuple):
    """What NMS with the paper's lambda leaves of a view of `tokens`, of which `wanted` are to stay."""

    tau: float
    survivors: int
    wanted: int
    tokens: int


@torch.no_grad()
def survival(view: torch.Tensor, budget: int | float, of_share: bool) -> Survival | None:
    """
    Args:
        view (`torch.Tensor` of shape `(tokens, dim)`): the features that are compared.
        budget: N, a count or a share; None is returned where it drops nothing.
        of_share (`bool`): the paper's lambda is 18 N/T in place of N/32, as where T differs from image to image.
    """
    tokens = len(view)
    count = resolve_budget(budget, tokens)
    if count >= tokens:
        return None
    context = Context(counts=[count], lambda_of_share=of_share)
    selection = select_tokens(view[None], count, return_details=True)
    found = find_suppressors(view[None], selection, SimpleNamespace(method="paper", nms_lambda=None), context)
    assert found is not None
    return Survival(found[0], int((found[1] < 0).sum()), count, tokens)


def judge_lambda(found: list[Survival]) -> tuple[str, str]:
    """The rule that fits, `"N/32"` or `"auto"`, and a sentence that says why."""
    idle = sum(own.survivors == own.tokens for own in found) / len(found)
    short = sum(own.survivors < own.wanted for own in found) / len(found)
    tau = float(np.median([own.tau for own in found]))
    rule = "N/32" if 1 - idle - short >= 0.5 else "auto"
    verdict = "it fits this tower" if rule == "N/32" else 'take nms_lambda="auto", or another method, on this tower'
    return rule, (
        f"The paper's lambda gives tau {tau:.3f} (median of {len(found)} views): it suppresses nothing in {idle:.0%} "
        f"of the views, and leaves fewer than N in {short:.0%}; {verdict}."
    )


@contextmanager
def recorded_views(watch: Callable[[torch.Tensor], None] | None = None) -> Iterator[list[tuple[float, int]]]:
    """
    The redundancy and the number of tokens of every view whose dynamic budget is computed meanwhile; each is shown to
    `watch`.
    """
    views: list[tuple[float, int]] = []

    def record(hidden_states: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
        rho = redundancy(hidden_states, lengths)
        own = lengths or [hidden_states.shape[1]] * len(hidden_states)
        views.extend(zip(rho.tolist(), own))
        if watch is not None:
            for view, length in zip(hidden_states, own):
                watch(view[:length])
        return rho

    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("modeling_prunesid.") and getattr(module, "redundancy", None) is redundancy
    ]
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(mock.patch.object(module, "redundancy", record))
        yield views


def measure(
    model: Any,
    processor: Any,
    images: Iterable[Image.Image],
    watch: Callable[[torch.Tensor], None] | None = None,
) -> list[tuple[float, int]]:
    """Redundancy and number of tokens of each view (image, crop or slice) that the model encodes."""
    with recorded_views(watch) as views, torch.no_grad():
        for image in tqdm(images, desc="images", unit=""):
            inputs = ask(processor, image, PROMPT).to(model.device, model.dtype)
            model.model.encode_views(dict(inputs))
    return views


def budgets_at(reference: float, views: list[tuple[float, int]], settings: PruneSIDConfig) -> np.ndarray:
    """N' of each view."""
    assert settings.budget is not None
    bounds = {"minimum": settings.min_budget, "maximum": settings.max_budget}
    return np.array(
        [
            int(information_budgets(torch.tensor([rho]), settings.budget, tokens, reference, **bounds))
            for rho, tokens in views
        ]
    )


def find_reference(views: list[tuple[float, int]], settings: PruneSIDConfig) -> float:
    """
    The reference at which the mean of N' over the views is N: the mean information score, unless its bounds cut in.

    Raises:
        `ValueError`: if the bounds keep every mean away from N.
    """
    assert settings.budget is not None
    asked = np.mean([resolve_budget(settings.budget, tokens) for _, tokens in views])
    reference = float(np.mean([1 - rho for rho, _ in views]))
    low, high = reference / 64, reference * 64
    for _ in range(60):
        mean = budgets_at(reference, views, settings).mean()
        if abs(mean - asked) < 0.5:
            return reference
        low, high = (reference, high) if mean > asked else (low, reference)
        reference = (low * high) ** 0.5
    raise ValueError(
        f"No reference gives a mean of budget={settings.budget} within min_budget={settings.min_budget} and "
        f"max_budget={settings.max_budget}: the nearest mean is {mean:.1f}. Widen the bounds."
    )


def draw_histogram(scores: np.ndarray, reference: float, title: str, path: Path) -> None:
    """The distribution of the information score, as in the paper's figure 5."""
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    axes.hist(scores, bins=min(40, max(8, len(scores) // 8)), color=FILL, edgecolor="white", linewidth=0.6)
    axes.axvline(reference, color=INK, linewidth=1.2, linestyle="--")
    is_left = reference < np.mean(axes.get_xlim())
    axes.annotate(
        f"reference {reference:.3f}",
        xy=(reference, 0.98),
        xycoords=("data", "axes fraction"),
        xytext=(6 if is_left else -6, 0),
        textcoords="offset points",
        ha="left" if is_left else "right",
        va="top",
        color=INK,
    )
    axes.set_title(f"{title}: {len(scores)} views", loc="left", color=INK)
    axes.set_xlabel(r"information score  $\varphi = 1 - \rho$", color=INK)
    axes.set_ylabel("views", color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    axes.margins(y=0.12)
    figure.savefig(path)
    plt.close(figure)


def calibrate(
    checkpoint: str, images: Iterable[Image.Image], settings: dict[str, Any], output: Path, title: str
) -> dict[str, Any]:
    """
    Write the calibrated settings to `output` and the histogram beside it.

    Args:
        checkpoint: stock checkpoint or variant.
        images: RGB images.
        settings: fields of `PruneSIDConfig`, with the budget to reach on average.
        output: JSON file to write.
        title: of the histogram.

    Returns:
        `dict`: the distribution, for the last line of the script.
    """
    model_class = find_family(checkpoint)
    started = {**settings, "dynamic": True, "reference_information": 1.0}
    model = model_class.from_pretrained(checkpoint, prunesid_config=started, dtype="auto", device_map="auto")
    if model.config.prunesid_config.budget_scope == "image":
        raise ValueError(
            "budget_scope='image' shares out a fixed total, which needs no calibration. Set budget_scope='view'."
        )
    processor = load_processor(checkpoint, model)
    if hasattr(processor, "num_visual_tokens"):
        processor.num_visual_tokens = None  # else the budget of its prompts would replace the dynamic one
    survived: list[Survival] = []

    def watch(view: torch.Tensor) -> None:
        own = model.config.prunesid_config
        if own.method in WITH_NMS and len(survived) < LAMBDA_VIEWS:
            found = survival(view, own.budget, of_share=isinstance(model.model, BehindConnectorModelMixin))
            survived.extend([] if found is None else [found])

    views = measure(model, processor, images, watch)
    if not views:
        raise ValueError(
            "No view was compressed: there are no images, or none has more tokens than the budget of "
            f"{model.config.prunesid_config.budget}. Give images, or a smaller --budget."
        )
    settings = PruneSIDConfig(**model.config.prunesid_config.to_dict())
    settings.reference_information = reference = round(find_reference(views, settings), 6)
    budgets, scores = budgets_at(reference, views, settings), np.array([1 - rho for rho, _ in views])

    output.parent.mkdir(parents=True, exist_ok=True)
    histogram = output.with_suffix(".png")
    draw_histogram(scores, reference, title, histogram)
    fields = {name: value for name, value in settings.to_dict().items() if not name.startswith("base_model")}
    output.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    shown = {f"{share}th centile": [np.percentile(own, share) for own in (scores, budgets)] for share in CENTILES}
    shown["mean"] = [scores.mean(), budgets.mean()]
    print_rows([{"": name, "phi": f"{phi:.4f}", "N prime": f"{count:.1f}"} for name, (phi, count) in shown.items()])
    rule, said = judge_lambda(survived) if survived else (None, "")
    if rule is not None:
        print(f"\n{said}")
    if len(views) < FEW_VIEWS:
        print(f"{len(views)} views are few: take some hundreds that are like those of your task.", file=sys.stderr)
    if settings.min_budget is None and budgets.min() < budgets.mean() / 4:
        print(
            f"Budgets go down to {int(budgets.min())} tokens. Give the plainest images a floor: --min-budget "
            f"{max(int(budgets.mean() / 4), 1)}",
            file=sys.stderr,
        )
    return {
        "model": checkpoint,
        "views": len(views),
        "budget": settings.budget,
        "reference_information": reference,
        "mean_budget": round(float(budgets.mean()), 3),
        "rho": round(float(1 - scores.mean()), 4),
        "lambda": rule,
        "settings": str(output),
        "histogram": str(histogram),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="stock checkpoint or variant: a folder, or a name on the Hub")
    parser.add_argument("images", help="folder of images, or dataset")
    parser.add_argument("--budget", type=parse_budget, help="the mean number of tokens (default: that of the preset)")
    parser.add_argument("--min-budget", type=int, help="the fewest tokens that a view may keep")
    parser.add_argument("--preset", help="further settings: a name of `prunesid presets`, or a JSON file")
    parser.add_argument("--limit", type=int, default=1000, help="images at most (default: %(default)s)")
    parser.add_argument("--split", default="train", help="of a dataset (default: %(default)s)")
    parser.add_argument("--column", help="column of images of a dataset (default: the only one)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the histogram is written beside it")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.limit < 1:
        raise ValueError(f"--limit must be at least 1 image, got {arguments.limit}. Ask for more.")
    if arguments.budget is None and arguments.preset is None:
        raise ValueError("one of --budget and --preset is required. Give for example --budget 64.")
    settings = {} if arguments.preset is None else read_preset(arguments.preset).fields
    settings |= {
        name: getattr(arguments, name) for name in ("budget", "min_budget") if getattr(arguments, name) is not None
    }
    images = itertools.islice(find_images(arguments.images, arguments.split, arguments.column), arguments.limit)
    return calibrate(arguments.model, images, settings, arguments.output, Path(arguments.images).name)
