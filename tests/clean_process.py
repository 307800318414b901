"""Processes that load a saved repo and have nothing of this one: neither its package, nor its caches."""

import json
import os
import subprocess
import sys


# Loads a repo of LLaVA's kind by every Auto class and as a pipeline, where our package cannot be imported.
LOAD = """
import json, sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_prunesid":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPackage())
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import pipeline

folder = sys.argv[1]
trust = {"trust_remote_code": True}
found = {"config": type(AutoConfig.from_pretrained(folder, **trust)).__name__}
processor = AutoProcessor.from_pretrained(folder, **trust)
found["processor"] = type(processor).__name__
picture = Image.frombytes("RGB", (28, 28), bytes(range(256)) * 9 + bytes(48))
inputs = processor(images=picture, text="<image> word7 word8", return_tensors="pt")
found["length"] = inputs["input_ids"].shape[1]
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model, info = auto.from_pretrained(folder, **trust, output_loading_info=True)
    found[auto.__name__] = {
        "class": type(model).__name__,
        "keys": sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]])),
        "answer": model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    built = auto.from_config(AutoConfig.from_pretrained(folder, **trust), **trust)
    found[auto.__name__]["from_config"] = type(built).__name__
chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "word7"}]}]
answer = pipeline("image-text-to-text", model=folder, **trust)
found["one chat"] = answer(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
batch = answer(text=[chat, chat], max_new_tokens=4, return_full_text=False, batch_size=2)
found["two chats"] = [part[0]["generated_text"] for part in batch]
print(json.dumps(found))
"""


def run_clean(script, home, *arguments, **environment):
    """
    The last line that `script` prints, as JSON.

    Args:
        script (`str`): Python code, which finds `arguments` in `sys.argv`.
        home (`Path`): the folder that it runs in, and in which Transformers keeps what it loads.
        environment: further variables, or other values of those that are set here.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    own = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, arguments)],
        cwd=home,
        env=kept | own,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
