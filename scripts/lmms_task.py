"""Write our scenes as tasks of lmms-eval, so that the paper's client asks what our own evaluation asks.

One task for each scene variant: a YAML file, and the pictures, questions and answers as Parquet beside it. The prompt
is the chat template's around the bare question; an answer is right if it is the expected one, in any case.

    python scripts/lmms_task.py FOLDER --scenes 50
    lmms-eval --model prunesid --model_args pretrained=embedded --include_path FOLDER \
        --tasks prunesid_scenes_salient,prunesid_scenes_context
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from prunesid_cli.scenes import SPLITS, VARIANTS, ask, make_scene


FEATURES = Features(
    {"image": Image(), "question": Value("string"), "answer": Value("string"), "kind": Value("string")}
)
TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""


def rows_of(variant: str, split: str, count: int) -> list[dict]:
    """Every question of the first `count` scenes; `image`, `question`, `answer` and `kind` of each."""
    drawn = [make_scene(variant, split, seed) for seed in range(count)]
    return [
        {"image": scene.image, "question": question.text, "answer": question.answer, "kind": question.kind}
        for scene in drawn
        for question in ask(scene)
    ]


def write_task(folder: Path, name: str, rows: list[dict]) -> None:
    """Write `folder/name.yaml` and `folder/name.parquet`."""
    folder.mkdir(parents=True, exist_ok=True)
    parquet = folder.resolve() / f"{name}.parquet"
    Dataset.from_list(rows, features=FEATURES).to_parquet(parquet)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, parquet=parquet))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=50, help="scenes of each variant, about ten questions each")
    parser.add_argument("--split", choices=SPLITS, default="test")
    arguments = parser.parse_args(argv)
    if arguments.scenes < 1:
        raise ValueError(f"--scenes must be at least 1, got {arguments.scenes}. Ask for more.")
    for variant in VARIANTS:
        rows = rows_of(variant, arguments.split, arguments.scenes)
        write_task(arguments.folder, f"prunesid_scenes_{variant}", rows)
        print(f"prunesid_scenes_{variant}: {len(rows)} questions about {arguments.scenes} pictures")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
