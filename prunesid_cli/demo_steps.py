"""What the demo does with pictures and with a clip alike."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoModel, AutoProcessor


ROUNDS = 3


def load_assembled(folder: Path):
    """Assemble and save a model of pretrained parts in another process; load it from the code in its folder alone."""
    command = [sys.executable, "-m", "prunesid_cli.assemble", str(folder)]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise OSError(f"prunesid_cli.assemble could not write {folder}; its message is above.")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.num_visual_tokens = None  # full prompts, which the stock class and every budget accept
    return model, processor


def answer(model, processor, inputs) -> tuple[str, int]:
    """The answer, and the length of the prompt that the language model itself received."""
    lengths: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    hook.remove()
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), lengths[0]
