"""
Publishing and loading over HTTP, against a stand-in for the Hub on loopback. What loads runs in clean processes, where
our package is not imported, so that the code comes from the repo.
"""

import json
import os
import sys
from pathlib import Path

import clean_process
import pytest
from hub_server import TOKEN, Hub
from tiny_checkpoint import CARD


pytestmark = pytest.mark.contract
ROOT = Path(__file__).parents[1]

PUBLISH = """
import json, sys
from pathlib import Path
from prunesid_cli.command import main
from huggingface_hub import ModelCard
from tiny_checkpoint import CARD, build_processor, save_checkpoint
from transformers import LlavaForConditionalGeneration
from prunesid_cli.verify import answer
from modeling_prunesid import PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor

save_checkpoint(Path("stock"))
LlavaForConditionalGeneration.from_pretrained("stock").push_to_hub("owner/base")
build_processor().push_to_hub("owner/base")
ModelCard(CARD).push_to_hub("owner/base")

model = PruneSIDLlavaForConditionalGeneration.from_pretrained("owner/base", prunesid_config={"budget": 8})
report = {"answers": {}, "commits": {}}
for budget in (8, 4):
    model.config.prunesid_config.budget = budget
    report["commits"][budget] = model.push_to_hub("owner/thin", thin=True).oid
    processor = PruneSIDLlavaProcessor.from_pretrained("owner/base", num_visual_tokens=budget)
    report["answers"][budget] = answer(model, processor)
model.push_to_hub("owner/full", max_shard_size="100KB")
model.push_to_hub("owner/slimmed")
model.push_to_hub("owner/slimmed", thin=True)
model.push_to_hub("owner/branched", thin=True, revision="experiment")
model.save_pretrained("saved", thin=True, push_to_hub=True, repo_id="owner/saved", commit_message="From a folder")
to_hub = ["--push-to-hub", "owner/converted", "--private"]
main(["convert", "owner/base", "--budget", "4", "--thin", "--output", "out", *to_hub])

stock = LlavaForConditionalGeneration.from_pretrained("stock")
stock.push_to_hub("owner/secret-base", private=True)
secret = PruneSIDLlavaForConditionalGeneration.from_pretrained("owner/secret-base", prunesid_config={"budget": 8})
secret.push_to_hub("owner/secret", thin=True, private=True)
print(json.dumps(report))
"""

LOAD = """
import json, sys
import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

sys.path.insert(0, COMMANDS)
from verify import QUESTION, answer

report = {}
for repo in ("owner/thin", "owner/full"):
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model, info = auto_class.from_pretrained(repo, trust_remote_code=True, output_loading_info=True)
        report[f"{repo} {auto_class.__name__}"] = {
            "lost": [sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")],
            "answer": answer(model, processor),
            "class": type(model).__module__.split(".")[0],
            "max_new_tokens": model.generation_config.max_new_tokens,
        }
    pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8)).resize((336, 336))
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    text = pipe(chat, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    expected = processor.decode(report[f"{repo} AutoModel"]["answer"], skip_special_tokens=True)
    report[f"{repo} pipeline"] = [text, expected]

first = {"trust_remote_code": True, "revision": FIRST}
model = AutoModel.from_pretrained("owner/thin", **first)
report["pinned"] = answer(model, AutoProcessor.from_pretrained("owner/thin", **first))
placed = AutoModel.from_pretrained(
    "owner/thin", trust_remote_code=True, dtype=torch.bfloat16, device_map="cpu", prunesid_config={"budget": 2}
)
report["placed"] = [str(placed.dtype), placed.config.prunesid_config.budget]
report["base class"] = type(AutoModel.from_config(model.config, trust_remote_code=True)).__name__
assert "modeling_prunesid" not in sys.modules
print(json.dumps(report))
"""

LOAD_SECRET = """
import json
from transformers import AutoModel
try:
    AutoModel.from_pretrained("owner/secret", trust_remote_code=True)
except Exception as error:
    refused = [type(error).__name__, str(error)]
model = AutoModel.from_pretrained("owner/secret", trust_remote_code=True, token=TOKEN)
print(json.dumps({"refused": refused, "loaded": type(model).__name__}))
"""

LOAD_OFFLINE = """
import json, sys
sys.path.insert(0, COMMANDS)
from transformers import AutoModel, AutoProcessor
from verify import answer
model = AutoModel.from_pretrained("owner/thin", trust_remote_code=True, local_files_only=True)
print(json.dumps(answer(model, AutoProcessor.from_pretrained("owner/thin", trust_remote_code=True))))
"""

# Retries of broken uploads wait for seconds; here they do not.
PUSH_SHARDS = """
import time
time.sleep = lambda seconds: None
from modeling_prunesid import PruneSIDLlavaForConditionalGeneration
model = PruneSIDLlavaForConditionalGeneration.from_pretrained("owner/base", prunesid_config={"budget": 8})
model.push_to_hub("owner/broken", max_shard_size="100KB")
"""


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The cache and the working folder of all processes."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run(hub, home):
    """Runs a script in a process of its own; `with_package` puts our package and the tests on its path."""

    def run(script, with_package=False, token=None, **environment):
        if with_package:
            paths = [str(ROOT), str(ROOT / "tests")]
            script = f"import sys\nsys.path[:0] = {paths!r}\n{script}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment = {
            **kept,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            **({"HF_TOKEN": token} if token else {}),
            **environment,
        }
        return clean_process.run([sys.executable, "-I", "-c", script], cwd=home, env=environment)

    return run


def output_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def published(run):
    return output_of(run(PUBLISH, with_package=True, token=TOKEN))


@pytest.fixture(scope="module")
def loaded(run, published):
    preamble = f"COMMANDS = {str(ROOT / 'prunesid_cli')!r}\nFIRST = {published['commits']['8']!r}\n"
    return output_of(run(preamble + LOAD))


AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
@pytest.mark.parametrize("repo", ["owner/thin", "owner/full"])
def test_a_clean_process_loads_every_weight_and_answers_as_the_model_in_memory(loaded, published, repo, auto_class):
    found = loaded[f"{repo} {auto_class}"]
    assert found == {
        "lost": [[], [], []],
        "answer": published["answers"]["4"],
        "class": "transformers_modules",
        "max_new_tokens": 6,
    }


@pytest.mark.parametrize("repo", ["owner/thin", "owner/full"])
def test_a_pipeline_gives_the_same_answer(loaded, repo):
    text, expected = loaded[f"{repo} pipeline"]
    assert text.split() == expected.split()


def test_a_pinned_revision_loads_what_was_pushed_first(loaded, published):
    assert loaded["pinned"] == published["answers"]["8"] != published["answers"]["4"]


def test_the_callers_dtype_device_and_settings_reach_the_base(loaded):
    assert loaded["placed"] == ["torch.bfloat16", 2]


def test_from_config_gives_the_base_model(loaded):
    assert loaded["base class"] == "PruneSIDLlavaModel"


def test_a_thin_repo_is_small_and_has_no_weights(hub, published):
    files = hub.files("owner/thin")
    assert not any(path.endswith((".safetensors", ".bin", "tokenizer.json")) for path in files)
    assert sum(map(len, files.values())) < 310_000
    assert {"config.json", "generation_config.json", "processor_config.json", "README.md"} < set(files)


def test_the_weights_of_a_full_repo_are_sharded(hub, published):
    shards = [path for path in hub.files("owner/full") if path.endswith(".safetensors")]
    assert len(shards) > 1
    assert "model.safetensors.index.json" in hub.files("owner/full")


def test_saving_with_push_to_hub_publishes_the_same_files(hub, published):
    assert set(hub.files("owner/saved")) == set(hub.files("owner/thin"))


def test_convert_pushes_what_it_verified(hub, published, home):
    assert hub.repos["owner/converted"].private
    written = {path.name: path.read_bytes() for path in (home / "out").iterdir()}
    pushed = {path: content for path, content in hub.files("owner/converted").items() if path != ".gitattributes"}
    assert written == pushed
    assert b'"base_model_name_or_path": "owner/base"' in pushed["config.json"]
    assert b'repo = "owner/converted"' in pushed["README.md"]


def test_every_push_is_one_commit(hub, published):
    assert len(hub.repos["owner/thin"].commits) == 3  # the empty repo, and two pushes
    assert len(hub.repos["owner/full"].commits) == 2


def test_a_branch_is_created_and_main_left_alone(hub, published):
    assert "config.json" in hub.files("owner/branched", "experiment")
    assert set(hub.files("owner/branched")) == {".gitattributes"}


def test_the_card_names_the_base_and_carries_its_licence_over(hub, published):
    card = hub.files("owner/thin")["README.md"].decode()
    assert "license: llama2" in CARD
    for line in ("license: llama2", "base_model: owner/base", "base_model_relation: adapter", 'repo = "owner/thin"'):
        assert line in card


def test_a_private_variant_of_a_private_base_needs_a_token_and_says_so(run, published, hub):
    assert hub.repos["owner/secret"].private
    report = output_of(run(f"TOKEN = {TOKEN!r}\n{LOAD_SECRET}"))
    kind, message = report["refused"]
    assert kind == "OSError"
    assert "owner/secret" in message
    assert "make sure to pass a token" in message
    assert report["loaded"] == "PruneSIDLlavaForConditionalGeneration"


def test_a_loaded_variant_loads_again_without_the_hub(run, loaded, published):
    script = f"COMMANDS = {str(ROOT / 'prunesid_cli')!r}\n{LOAD_OFFLINE}"
    assert output_of(run(script, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")) == published["answers"]["4"]


def test_an_upload_that_is_broken_off_publishes_nothing_and_the_next_one_completes_it(run, hub, published):
    hub.large_files.clear()
    hub.uploads_until_cut = 1
    try:
        broken = run(PUSH_SHARDS, with_package=True, token=TOKEN)
    finally:
        hub.uploads_until_cut = float("inf")
    assert broken.returncode != 0
    assert "Error while uploading" in broken.stderr
    assert set(hub.files("owner/broken")) == {".gitattributes"}
    received = set(hub.large_files)
    assert len(received) == 1

    hub.requests.clear()
    again = run(PUSH_SHARDS, with_package=True, token=TOKEN)
    assert again.returncode == 0, again.stderr
    shards = [path for path in hub.files("owner/broken") if path.endswith(".safetensors")]
    uploads = [request for request in hub.requests if request.startswith("PUT /large/")]
    assert len(uploads) == len(shards) - 1
    assert not any(oid in request for oid in received for request in uploads)
    assert hub.files("owner/broken")["model.safetensors.index.json"]


def test_a_thin_push_removes_the_weights_of_an_earlier_full_one(hub, published):
    first, second = list(hub.repos["owner/slimmed"].commits.values())[1:]
    assert "model.safetensors" in first
    assert "model.safetensors" not in second
