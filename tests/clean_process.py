"""
Processes that load a saved repo and have nothing of this one: neither its package, nor its caches.

To import PyTorch takes longer than most of what they do. So one process has it, and is forked for each of them before
anything of Transformers or of the Hub's client is imported, which read their environment then.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


PARENT = """
import importlib, json, os, sys

for name in (
    "torch._dynamo", "torch.distributed.tensor", "torch.export", "scipy.optimize", "sklearn", "PIL.Image",
    "tokenizers", "safetensors.torch", "jinja2", "regex", "yaml",
):
    importlib.import_module(name)
assert not {"transformers", "huggingface_hub", "modeling_prunesid"} & set(sys.modules)
for line in sys.stdin:
    request, child = json.loads(line), os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.environ.clear()
os.environ.update(request["env"])
os.chdir(request["cwd"])
for number, path in enumerate([os.devnull, *request["outputs"]]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
sys.argv = request["argv"]
exec(compile(request["code"], sys.argv[0], "exec"), globals())
"""
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


@functools.cache
def parent():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    return subprocess.Popen(
        [sys.executable, "-I", "-c", PARENT],
        env={**kept, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(command, cwd, env, **_):
    """
    As `subprocess.run` with its output captured as text, of `python -I` with a script or with `-c` and its code. What
    PyTorch reads of the environment when it is imported is that of the tests.
    """
    python, isolated, first, *rest = command
    assert (python, isolated) == (sys.executable, "-I")
    code, argv = (rest[0], ["-c", *rest[1:]]) if first == "-c" else (Path(first).read_text(), [first, *rest])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        request = {"code": code, "argv": argv, "env": env, "cwd": str(cwd), "outputs": outputs}
        process = parent()
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        return subprocess.CompletedProcess(command, status, *(Path(path).read_text() for path in outputs))


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
    done = run([sys.executable, "-I", "-c", script, *map(str, arguments)], cwd=home, env=kept | own)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
