"""
The plugin for lmms-eval. Its parts run here on a stand-in of lmms-eval's interface; the slow tests run the real
client, unmodified, in an environment of its own, and compare what it records with our own `generate`.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from lmms_stand_in import stand_in
from tiny_checkpoint import CHAT_TEMPLATE, build_processor, picture, save_checkpoint
from tiny_video_llava import build as build_video_llava
from transformers import AutoModelForImageTextToText

from modeling_prunesid import (
    PruneSIDLlavaForConditionalGeneration,
    PruneSIDLlavaProcessor,
    ViTCoPLlavaForConditionalGeneration,
)


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def metrics():
    """What the plugin logs with `log_metrics`."""
    return []


@pytest.fixture(scope="module")
def plugin(metrics):
    """The plugin's module, imported with a stand-in of lmms-eval."""
    with stand_in(metrics) as module:
        yield module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def variant(base, tmp_path_factory):
    """A saved variant that keeps 8 of 49 tokens."""
    folder = tmp_path_factory.mktemp("variant")
    PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config={"budget": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vitcop(base, tmp_path_factory):
    """A saved ViTCoP variant that leaves 20 of 49 tokens in the mean over its layers."""
    folder = tmp_path_factory.mktemp("vitcop")
    ViTCoPLlavaForConditionalGeneration.from_pretrained(base, vitcop_config={"budget": 20}).save_pretrained(folder)
    return folder


QUESTIONS = [" ".join(["word7"] * (1 + seed % 3)) + f" word{seed + 20}" for seed in range(7)]
DOCS = [{"image": picture(seed), "question": question} for seed, question in enumerate(QUESTIONS)]


def ask(model, gen_kwargs=None, docs=DOCS, kind="image"):
    """Requests about `docs` as lmms-eval makes them; `gen_kwargs` may be one of each document."""
    model.task_dict = {"scenes": {"test": docs}}

    def messages(doc):
        content = [{"type": kind, "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": content}]

    each = gen_kwargs if isinstance(gen_kwargs, list) else [gen_kwargs or {"max_new_tokens": 5}] * len(docs)
    return [
        SimpleNamespace(args=("", messages, dict(each[index]), index, "scenes", "test"), task_name="scenes")
        for index in range(len(docs))
    ]


def own_inputs(doc):
    """The full prompt of the stock processor."""
    text = f"USER: <image> {doc['question']} ASSISTANT:"
    return build_processor()(images=doc["image"], text=text, return_tensors="pt")


def own_answers(variant, budget, lengths=None):
    """The answers of the class itself to `DOCS`, one at a time, in 5 tokens or their own number of them."""
    model = AutoModelForImageTextToText.from_pretrained(variant).eval()
    model.config.prunesid_config.budget = budget
    answers = []
    for doc, length in zip(DOCS, lengths or [5] * len(DOCS), strict=True):
        inputs = own_inputs(doc)
        output = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        answers.append(build_processor().decode(answer, skip_special_tokens=True))
    return answers


class TestEntryPoint:
    def test_setup_cfg_declares_it(self):
        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        declared = setup["options.entry_points"]["lmms_eval.models"].split()
        assert declared == ["prunesid", "=", "modeling_prunesid.lmms_eval:manifest"]
        assert "lmms-eval==0.7.3" in setup["options.extras_require"]["lmms-eval"].split()

    def test_it_resolves_to_the_model(self, plugin):
        entry = importlib.metadata.EntryPoint("prunesid", "modeling_prunesid.lmms_eval:manifest", "lmms_eval.models")
        found = entry.load()()
        assert found.model_id == "prunesid"
        module, name = found.chat_class_path.rsplit(".", 1)
        assert getattr(importlib.import_module(module), name) is plugin.PruneSIDForLmmsEval
        assert plugin.PruneSIDForLmmsEval.is_simple is False


class TestAnswers:
    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("budget", [None, 3])
    def test_they_are_those_of_the_class_itself(self, plugin, variant, batch_size, budget):
        model = plugin.PruneSIDForLmmsEval(str(variant), device="cpu", batch_size=batch_size, num_visual_tokens=budget)
        results = model.generate_until(ask(model))
        expected = own_answers(variant, budget or 8)
        assert [result.text for result in results] == expected
        assert [result.token_counts.output_tokens for result in results] == [5] * len(DOCS)
        assert len(set(expected)) > 3

    def test_each_question_has_its_own_generation_arguments(self, plugin, variant):
        model = plugin.PruneSIDForLmmsEval(str(variant), device="cpu", batch_size=4)
        lengths = [5, 2, 2, 5, 3, 2, 5]
        results = model.generate_until(ask(model, [{"max_new_tokens": length} for length in lengths]))
        assert [result.token_counts.output_tokens for result in results] == lengths
        assert [result.text for result in results] == own_answers(variant, 8, lengths)

    @pytest.mark.parametrize("budget, kept", [(None, 8), (3, 3), (1.0, 49)])
    def test_visual_tokens_are_counted_where_they_are_dropped(self, plugin, metrics, variant, budget, kept):
        model = plugin.PruneSIDForLmmsEval(str(variant), device="cpu", num_visual_tokens=budget)
        model.generate_until(ask(model))
        assert model.visual_tokens == {"views": len(DOCS), "kept": kept * len(DOCS), "all": 49 * len(DOCS)}
        assert metrics[-1] == {"kept_visual_tokens": kept, "all_visual_tokens": 49}

    @pytest.mark.parametrize("budget", [None, 30])
    def test_a_vitcop_repo_answers_as_its_class_does(self, plugin, metrics, vitcop, budget):
        """What it kept is counted as the mean over the layers, which drop tokens too, beams or none."""
        model = plugin.PruneSIDForLmmsEval(str(vitcop), device="cpu", batch_size=3, num_visual_tokens=budget)
        results = model.generate_until(ask(model))
        expected = own_answers(vitcop, budget or 20)
        assert [result.text for result in results] == expected
        assert len(set(expected)) > 3
        own = AutoModelForImageTextToText.from_pretrained(vitcop).eval()
        seen = own(**own_inputs(DOCS[0]), num_visual_tokens=budget or 20).layer_visual_tokens[0].tolist()
        assert seen[0] > seen[-1]
        assert metrics[-1] == {"kept_visual_tokens": pytest.approx(sum(seen) / len(seen)), "all_visual_tokens": 49}
        model.generate_until(ask(model, {"max_new_tokens": 2, "num_beams": 2}))
        assert metrics[-1] == {"kept_visual_tokens": pytest.approx(sum(seen) / len(seen)), "all_visual_tokens": 49}

    def test_a_task_with_a_medium_that_the_model_does_not_take_is_named(self, plugin, variant):
        model = plugin.PruneSIDForLmmsEval(str(variant), device="cpu")
        for kind in ("video", "audio"):
            with pytest.raises(ValueError, match=f"'scenes' has {kind}.*Choose another task"):
                model.generate_until(ask(model, kind=kind))

    @pytest.mark.parametrize("method", ["loglikelihood", "generate_until_multi_round"])
    def test_other_outputs_are_refused_with_a_mend(self, plugin, variant, method):
        model = plugin.PruneSIDForLmmsEval(str(variant), device="cpu")
        with pytest.raises(NotImplementedError, match="'scenes' asks for.*output_type: generate_until"):
            getattr(model, method)(ask(model))


class TestArguments:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({}, "pretrained must name"),
            ({"pretrained": "x", "budget": 3}, "no argument budget"),
            ({"pretrained": "x", "dtype": "float17"}, "dtype must be .* got 'float17'"),
            ({"pretrained": "x", "dtype": "nn"}, "dtype must be .* got 'nn'"),
            ({"pretrained": "x", "num_visual_tokens": 0}, "num_visual_tokens must be .* got 0"),
            ({"pretrained": "x", "num_visual_tokens": "all"}, "num_visual_tokens must be .* got 'all'"),
            ({"pretrained": "x", "batch_size": "auto"}, "batch_size must be .* got 'auto'"),
            ({"pretrained": "x", "max_frames_num": 0}, "max_frames_num must be .* got 0"),
            ({"pretrained": "x", "video_fps": -1.0}, "video_fps must be .* got -1.0"),
        ],
    )
    def test_wrong_ones_are_named_before_anything_is_loaded(self, plugin, arguments, message):
        with pytest.raises(ValueError, match=message):
            plugin.PruneSIDForLmmsEval(**arguments)

    def test_a_stock_checkpoint_is_refused(self, plugin, base):
        with pytest.raises(ValueError, match="is no PruneSID or ViTCoP repo but a 'llava'.*prunesid convert"):
            plugin.PruneSIDForLmmsEval(str(base))


class TestParts:
    def test_generation_is_greedy_unless_a_temperature_asks_otherwise(self, plugin):
        tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=None)
        plain = plugin.generation_arguments({"temperature": 0.0, "top_p": 0.5, "until": ["\n"]}, tokenizer)
        assert plain == {
            "max_new_tokens": 1024, "num_beams": 1, "do_sample": False, "temperature": None, "top_p": None,
            "eos_token_id": 2, "pad_token_id": 2,
        }  # fmt: skip
        warm = plugin.generation_arguments({"temperature": 0.7, "top_p": 0.5, "num_beams": 2}, tokenizer)
        assert (warm["do_sample"], warm["temperature"], warm["top_p"], warm["num_beams"]) == (True, 0.7, 0.5, 2)

    @pytest.mark.parametrize(
        "until, expected",
        [(None, "a b\n\nc"), ("b", "a "), (["c", "b"], "a "), (["\n\n"], "a b\n\nc"), ([None, ""], "a b\n\nc")],
    )
    def test_an_answer_ends_at_the_first_stop(self, plugin, until, expected):
        assert plugin.cut("a b\n\nc", until) == expected

    def test_frames_are_evenly_spaced_and_never_more_than_there_are(self, plugin):
        rng = np.random.default_rng(0)
        for _ in range(200):
            total, most = (int(number) for number in rng.integers(1, 200, 2))
            seconds, fps = float(rng.uniform(0.1, 20)), [None, float(rng.uniform(0.1, 30))][rng.integers(2)]
            metadata = SimpleNamespace(total_num_frames=total, duration=seconds)
            indices = plugin.frame_indices(metadata, max_frames_num=most, video_fps=fps)
            assert 1 <= len(indices) <= min(total, most)
            assert fps is None or len(indices) <= max(1, seconds * fps)
            assert indices[0] == 0 and (len(indices) == 1 or indices[-1] == total - 1)
            gaps = np.diff(indices)
            assert (gaps >= 1).all() and (len(gaps) == 0 or gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize("count", [0, -1])
def test_a_task_without_scenes_is_refused_and_nothing_is_written(scripts, tmp_path, count):
    with pytest.raises(ValueError, match=f"--scenes must be at least 1, got {count}. Ask for more"):
        scripts[0].main([str(tmp_path / "task"), "--scenes", str(count)])
    assert not (tmp_path / "task").exists()


# Lets the client's environment import a torchvision whose operators do not fit its build of PyTorch.
SITECUSTOMIZE = """
import sysconfig
from torchvision_shim import add_torchvision

library = add_torchvision(sysconfig.get_path("purelib"))
"""


@pytest.fixture(scope="module")
def client():
    """The Python of an environment outside the repo that has the client, as docs/lmms_eval.md installs it."""
    folder = Path(os.environ.get("PRUNESID_LMMS_VENV", ROOT.parent / "lmms-venv"))
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"torch=={torch.__version__.partition('+')[0]}"], check=True)
        subprocess.run([*pip, "--no-deps", "torchvision==0.28.0"], check=True)
        command = [*pip, "-e", f"{ROOT}[lmms-eval]", f"transformers=={transformers.__version__}"]
        subprocess.run(command, check=True)
    return python


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("lmms_task"), importlib.import_module("train_demo")


@pytest.fixture(scope="module")
def demo_variant(scripts, tmp_path_factory):
    """The demo's model with random weights, large enough that its answers depend on the picture and the question."""
    base, folder = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("demo_variant")
    train = scripts[1]
    torch.manual_seed(0)
    tokenizer = train.build_tokenizer()
    stock = train.build_model(len(tokenizer))
    for parameter in stock.model.language_model.layers.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(stock.model.multi_modal_projector.linear_2.weight, std=0.2)
    stock.save_pretrained(base)
    train.build_processor(tokenizer).save_pretrained(base)
    PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config={"budget": 64}).save_pretrained(folder)
    return folder


def answers_by_hand(folder, rows, prompt, budget):
    """The answers of the class itself to `rows` of a task, one at a time, on the prompt of our own evaluation."""
    settings = {"prunesid_config": {"budget": budget}}
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(folder, **settings).eval()
    processor = PruneSIDLlavaProcessor.from_pretrained(folder, num_visual_tokens=budget)
    eos = processor.tokenizer.eos_token_id
    answers = []
    for row in rows:
        inputs = processor(images=row["image"], text=prompt.format(row["question"]), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=eos)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def offline(home):
    """The environment variables of the client, with a `home` of its own."""
    home.mkdir()
    (home / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {
        **os.environ, "PYTHONPATH": f"{home}:{ROOT / 'tests'}", "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def evaluate(python, folder, task, arguments, batch_size):
    """Run the client on `task` of `folder`. Returns its samples by number, its results and its log."""
    home = folder / "home"
    environment = offline(home)
    command = [python, "-m", "lmms_eval", "--model", "prunesid", "--model_args", arguments, "--tasks", task]
    command += ["--include_path", folder, "--log_samples", "--batch_size", batch_size, "--output_path", home / "out"]
    done = subprocess.run(
        [str(part) for part in command], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    samples = [json.loads(line) for line in next(home.glob("out/*/*_samples_*.jsonl")).read_text().splitlines()]
    results = json.loads(next(home.glob("out/*/*_results.json")).read_text())["results"][task]
    return {sample["doc_id"]: sample for sample in samples}, results, log


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_client_records_our_own_answers(client, scripts, demo_variant, tmp_path):
    """A task whose expected answers are the model's own for every other question: the accuracy must be a half."""
    task, train = scripts
    rows = task.rows_of("context", "test", 1)[:8]
    expected = answers_by_hand(demo_variant, rows, train.PROMPT, 32)
    assert len(set(expected)) > 3
    for row, answer in list(zip(rows, expected))[::2]:
        row["answer"] = answer.upper()
    task.write_task(tmp_path, "scenes", rows)
    arguments = f"pretrained={demo_variant},device_map=cpu,num_visual_tokens=32"
    samples, results, log = evaluate(client, tmp_path, "scenes", arguments, batch_size=3)

    assert [samples[index]["filtered_resps"].strip() for index in range(8)] == expected
    assert results["exact_match,none"] == 0.5
    assert f"PruneSIDLlavaForConditionalGeneration kept {8 * 32} of {8 * 576} visual tokens of 8 images" in log
    assert not re.findall("Error|Traceback|Failed", log)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("budget", [1.0, 32])
def test_the_embedded_model_is_as_accurate_as_in_our_own_evaluation(client, scripts, budget, tmp_path):
    """Two questions about each of six scenes, chosen and answered as `evaluate.py` does it."""
    own, embedded = importlib.import_module("evaluate"), importlib.import_module("embedded")
    model, processor = own.load_model(None)
    model.config.prunesid_config.budget = budget
    scenes = [own.scene_of("test", number) for number in range(6)]
    chunk = own.build_chunk(processor, model.device, 0, scenes, 2)
    answers = own.answer(model, processor, chunk)
    hits = [answer == question.answer for answer, question in zip(answers, chunk.questions)]

    rows = [
        {"image": scenes[row].image, "question": question.text, "answer": question.answer, "kind": question.kind}
        for row, question in zip(chunk.rows, chunk.questions)
    ]
    scripts[0].write_task(tmp_path, "scenes", rows)
    arguments = f"pretrained={embedded.complete()},device_map=cpu,dtype=float32,num_visual_tokens={budget}"
    samples, results, log = evaluate(client, tmp_path, "scenes", arguments, batch_size=4)

    found = [samples[index]["filtered_resps"].strip() == row["answer"] for index, row in enumerate(rows)]
    assert found == hits
    assert results["exact_match,none"] == pytest.approx(sum(hits) / len(hits), abs=1e-4)
    kept = 12 * (576 if budget == 1.0 else budget)
    assert f"PruneSIDLlavaForConditionalGeneration kept {kept} of {12 * 576} visual tokens of 12 images" in log
    assert not re.findall("Error|Traceback|Failed", log)


# Completes a folder that has the weights of a tiny Video-LLaVA by a processor of 100 words, and prints the answers of
# the class itself to questions about clips, of whose 10 frames it is given 4. Needs torchvision, as the client does.
VIDEO_ANSWERS = """
import json, sys
import decord
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, VideoLlavaImageProcessor, VideoLlavaVideoProcessor
from modeling_prunesid import PruneSIDVideoLlavaForConditionalGeneration, PruneSIDVideoLlavaProcessor

folder, template, *asked = sys.argv[1:]
words = [f"word{index}" for index in range(120)]
words[:4], words[100], words[101] = ["<pad>", "<s>", "</s>", "<unk>"], "<image>", "<video>"
tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                    unk_token="<unk>", additional_special_tokens=["<image>", "<video>"])
sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
processor = PruneSIDVideoLlavaProcessor(image_processor=VideoLlavaImageProcessor(**sizes), tokenizer=tokenizer,
                                        video_processor=VideoLlavaVideoProcessor(**sizes), patch_size=4,
                                        num_visual_tokens=6, chat_template=template)
processor.save_pretrained(folder)
model = PruneSIDVideoLlavaForConditionalGeneration.from_pretrained(folder).eval()
answers = []
for clip, question in zip(asked[::2], asked[1::2]):
    frames = decord.VideoReader(clip).get_batch([0, 3, 6, 9]).asnumpy()
    inputs = processor(text=f"USER: <video> {question} ASSISTANT:", videos=[frames], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
print(json.dumps(answers))
"""


def write_clip(path, seed):
    """Ten frames of coloured noise, which comes in blocks that survive compression."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(10):
            blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(blocks.repeat(16, 0).repeat(16, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_client_records_our_own_answers_about_clips(client, scripts, tmp_path):
    folder = tmp_path / "repo"
    build_video_llava(6).save_pretrained(folder)
    clips = [tmp_path / f"{seed}.mp4" for seed in range(5)]
    for seed, clip in enumerate(clips):
        write_clip(clip, seed)
    template = CHAT_TEMPLATE.replace("{% else %}", "{% elif part.type == 'video' %}<video> {% else %}")
    asked = [str(part) for pair in zip(clips, QUESTIONS) for part in pair]
    run = subprocess.run(
        [client, "-c", VIDEO_ANSWERS, folder, template, *asked],
        env=offline(tmp_path / "own"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    expected = json.loads(run.stdout.splitlines()[-1])
    assert len(set(expected)) > 2

    rows = [{"video": str(clip), "question": question, "answer": ""} for clip, question in zip(clips, QUESTIONS)]
    for row, answer in list(zip(rows, expected))[:3]:
        row["answer"] = answer
    parquet = tmp_path / "clips.parquet"
    Dataset.from_list(rows).to_parquet(parquet)
    yaml = scripts[0].TASK.format(name="clips", parquet=parquet)
    (tmp_path / "clips.yaml").write_text(yaml.replace("doc_to_visual: image", "doc_to_visual: video"))
    arguments = f"pretrained={folder},device_map=cpu,max_frames_num=4"
    samples, results, log = evaluate(client, tmp_path, "clips", arguments, batch_size=2)

    assert [samples[index]["filtered_resps"].strip() for index in range(5)] == expected
    assert results["exact_match,none"] == 0.6
    assert "PruneSIDVideoLlavaForConditionalGeneration kept " in log
    assert not re.findall("Error|Traceback|Failed", log)
