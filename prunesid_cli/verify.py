"""Load a saved variant as its users will, and let it answer.

Loads the folder or repo through Auto classes, from its own code, and prints one line of JSON: the keys that were
missing, left over or of another shape when the weights were loaded, and the tokens of a greedy answer about a picture.
`prunesid convert` runs this in a process of its own and compares the tokens with those of the model that it saved.

Examples:
    python -m prunesid_cli.verify out/llava-64
    python -m prunesid_cli.verify my-name/llava-1.5-7b-prunesid-64
"""

import argparse
import json

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


NUM_NEW_TOKENS = 8
QUESTION = "What is shown in this image?"


def answer(model, processor=None) -> list[int]:
    """The tokens of a greedy answer about a picture of seeded noise; without a processor, to a prompt without one."""
    if processor is None:
        inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]], device=model.device)}
    else:
        inputs = _ask(processor).to(model.device, model.dtype)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def _ask(processor):
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((336, 336))
    if processor.chat_template is None:
        return processor(images=image, text=f"{processor.image_token}\n{QUESTION}", return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", help="folder, or name on the Hub")
    parser.add_argument("--no-processor", action="store_true", help="the variant has none: ask without a picture")
    arguments = parser.parse_args()
    model, info = AutoModelForImageTextToText.from_pretrained(
        arguments.repo, trust_remote_code=True, dtype="auto", device_map="auto", output_loading_info=True
    )
    processor = None
    if not arguments.no_processor:
        processor = AutoProcessor.from_pretrained(arguments.repo, trust_remote_code=True)
    report = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    print(json.dumps({**report, "tokens": answer(model, processor)}))


if __name__ == "__main__":
    main()
