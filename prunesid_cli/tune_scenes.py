"""Questions about the synthetic scenes as rows for `prunesid tune`: `train.jsonl`, and `val.jsonl` of other scenes.

python -m prunesid_cli.tune_scenes --scenes 600 --output out/rows
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from prunesid_cli.evaluate import choose_questions, scene_of


def write_rows(split: str, scenes: int, questions: int, folder: Path) -> Path:
    """Pictures of so many scenes of a split, and a file of as many questions about each."""
    path = folder / f"{split}.jsonl"
    (folder / split).mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as rows:
        for number in tqdm(range(scenes), desc=split):
            scene, name = scene_of(split, number), f"{split}/{number:05}.png"
            scene.image.save(folder / name)
            for question in choose_questions(scene, questions):
                row = {"image": name, "question": question.text, "answer": question.answer}
                rows.write(json.dumps(row) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=600, help="of training (default: %(default)s)")
    parser.add_argument("--held-out-scenes", type=int, default=96, help="of validation (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=6, help="of each scene (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and rows")
    arguments = parser.parse_args()
    write_rows("train", arguments.scenes, arguments.questions, arguments.output)
    write_rows("val", arguments.held_out_scenes, arguments.questions, arguments.output)


if __name__ == "__main__":
    main()
