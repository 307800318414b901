"""
Asks vLLM's engine, in one process, what `engine_models.py` saved, one by one and then all at once, and prints for each
family what answered otherwise. Runs in the environment of `scripts/vllm_server.py`.

    python vllm_offline.py TORCHVISION FOLDER FAMILY ...
"""

import gc
import json
import os
import pickle
import sys
from pathlib import Path

from torchvision_shim import add_torchvision


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
library = add_torchvision(sys.argv[1])

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402


def start(place: Path) -> LLM:
    return LLM(
        str(place),
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=32,  # prompts in chunks, and no room to keep what was encoded
        gpu_memory_utilization=0.1,
        limit_mm_per_prompt={"image": 3},
    )


def ask(place: Path) -> list:
    """[question, expected, given] of each answer that is another."""
    engine = start(place)
    questions = pickle.loads(place.with_suffix(".pickle").read_bytes())
    expected = json.loads(place.with_suffix(".json").read_text())
    prompts = [{"prompt": text, "multi_modal_data": {"image": images} if images else {}} for text, images in questions]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    rounds = [engine.generate([prompt], greedy, use_tqdm=False)[0] for prompt in prompts]
    rounds += engine.generate(prompts, greedy, use_tqdm=False)
    given = [[list(output.prompt_token_ids), list(output.outputs[0].token_ids)] for output in rounds]
    return [[index, *pair] for index, pair in enumerate(zip(expected * 2, given)) if pair[0] != pair[1]]


for family in sys.argv[3:]:
    try:
        found = ask(Path(sys.argv[2], family))
    except Exception as error:  # reported beside the other families
        found = [str(error)]
    print(json.dumps({family: found}), flush=True)
    gc.collect()
    cleanup_dist_env_and_memory()
