"""What a selector that is told where everything is drawn keeps of the accuracy: a ceiling beside `prunesid evaluate`.

It knows the scene and not the question. In every round each printed text contributes four patches in reading order,
each object the one that it covers most, each band of a material a random one, until the budget is met; what is left of
it goes to random patches of the photograph. Scenes, questions, prompts and decoding are those of `prunesid evaluate`.

    python scripts/ceiling.py                                           # test scenes; some 10 minutes of one core
"""

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from train_demo import coverage

from prunesid_cli.answer_statistics import summarise
from prunesid_cli.baselines import METHODS, Method
from prunesid_cli.baselines.encoder import Kept, encoder_method, patch_features
from prunesid_cli.evaluate import BUDGETS, Answers, collect, list_cases, load_model, num_patches, scene_of
from prunesid_cli.evaluation_pages import percent, ranged
from prunesid_cli.measuring import machine
from prunesid_cli.scenes import KINDS, SPLITS, Scene
from prunesid_cli.tables import print_rows


TEXT_PATCHES = 4


def ranked(scene: Scene) -> list[int]:
    """All patches, in the order in which the selector that knows the scene keeps them."""
    rng = np.random.default_rng(scene.seed)
    covered = {id(item): coverage(item.box).reshape(-1) for item in scene.objects + scene.texts}
    free = sum(covered.values(), np.zeros(coverage((0, 0, 0, 0)).size)) == 0
    rounds = [(iter(np.flatnonzero(covered[id(text)] > 0.1)), TEXT_PATCHES) for text in scene.texts]
    for item in scene.objects:
        order = np.argsort(-covered[id(item)], kind="stable")
        rounds.append((iter(order[covered[id(item)][order] > 0.1]), 1))
    for band, _ in scene.bands:
        whole = np.flatnonzero(free & (coverage(band.box).reshape(-1) > 0.9))
        rounds.append((iter(rng.permutation(whole)), 1))
    kept: list[int] = []
    while given := [int(patch) for patches, count in rounds for patch in itertools.islice(patches, count)]:
        kept += given
    return list(dict.fromkeys([*kept, *rng.permutation(len(free)).tolist()]))


def measure(model, processor, split: str, num_scenes: int, count: int) -> dict:
    """What `answer_statistics.summarise` says of all tokens and of the selector at every budget."""
    number = {budget: itertools.count() for budget in BUDGETS}  # `collect` shows each budget the pictures in order

    @functools.cache
    def order(picture: int) -> list[int]:
        return ranked(scene_of(split, picture))

    def encode(base_model, pixel_values: torch.Tensor, layers: list[int], budget: int) -> list[Kept]:
        kept = []
        for features in patch_features(base_model, pixel_values, layers):
            patches = torch.tensor(sorted(order(next(number[budget]))[:budget]))
            kept.append(Kept(features[patches], patches))
        return kept

    METHODS["knows the scene"] = Method("Knows the scene", "encoder", encoder_method(encode))
    cases = list_cases(["knows the scene"], BUDGETS, num_patches(model))
    with TemporaryDirectory() as folder:
        known = Answers(Path(folder) / "answers.jsonl", "", None)
        found = collect(model, processor, cases, num_scenes, split, count, known)
    return summarise(found, lambda question: "")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--questions", type=int, default=6, help="of a scene")
    arguments = parser.parse_args(argv)
    for name in ("scenes", "questions"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}. Ask for more.")
    model, processor = load_model(None)
    result = measure(model, processor, arguments.split, arguments.scenes, arguments.questions)
    print(f"{machine()}; {result['questions']} questions, {result['scenes']} {arguments.split} scenes")
    rows = [
        {"tokens": str(row["budget"]), "relative accuracy, %": ranged(row["share_of_full"])}
        | {kind: percent(share) for kind, share in zip(KINDS, row["by_type"].values())}
        for row in result["rows"]
    ]
    print_rows(rows)
    print(json.dumps({str(row["budget"]): row["share_of_full"]["value"] for row in result["rows"]}))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
