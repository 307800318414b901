"""Accuracy of every method at every token budget, on synthetic scenes, or on questions of your own.

Answers are greedy, and correct if they equal the scene's answer word for word (case and a full stop are ignored).
Accuracy is the mean over the question types. It is reported with

- relative accuracy: accuracy / accuracy with all tokens;
- relative accuracy above the question-only baseline, which is fitted on training scenes without their pictures;
- 95% confidence intervals of a paired bootstrap over scenes.

Answers are appended to OUT/answers.jsonl under a hash of weights, code, scenes and settings, so that an interrupted
run continues. Dynamic budgets have the mean of the fixed ones on the evaluated images.

With --data, your own questions are used: a CSV, TSV or JSONL file with `image` (a path relative to the file, or a
URL), `question` and `answer` (`yes|yeah` for alternatives), or a folder that has one. Any supported model can answer
them. The stock class, our class with pruning off, and the methods at each budget are compared; default budgets are a
third, two ninths and a ninth of the tokens. The report says which budget has no measurable loss on these rows.

Examples:
    prunesid evaluate --out out/mine --data rows.csv --model Qwen/Qwen2.5-VL-3B-Instruct
    prunesid evaluate --out out/mine --data rows.csv --model out/llava-64 --methods prunesid-spread --budgets 192 64
    prunesid evaluate --out out/quick --quick                    # 200 questions, a few minutes
    prunesid evaluate --out out/some --methods prunesid-auto visionzip divprune --budgets 64 16
    prunesid evaluate --out out/ablations --page ablations --ablations
    prunesid evaluate --out out/all --all                        # every method at every budget
"""

import argparse
import hashlib
import json
import random
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration, PruneSIDLlavaProcessor
from modeling_prunesid.question import QuestionReader
from modeling_prunesid.selection import redundancy
from prunesid_cli.ablations import ablations
from prunesid_cli.answer_statistics import fit_prior, summarise
from prunesid_cli.baselines import METHODS, applied
from prunesid_cli.convert import parse_budget
from prunesid_cli.evaluation_pages import print_table, write_pages
from prunesid_cli.lines import append_to, read_lines
from prunesid_cli.measuring import machine, peak_bytes, seconds_interleaved
from prunesid_cli.scenes import SPLITS, VARIANTS, Question, Scene, ask, make_scene
from prunesid_cli.tower_memo import remembered


BUDGETS = (192, 128, 64, 32, 16)
COMPARED = (
    "full", "prunesid-paper", "prunesid-dyn", "prunesid-release", "prunesid-auto", "prunesid-spread", "random",
    "uniform",
)  # fmt: skip
BESIDE_ABLATIONS = ("prunesid-release", "prunesid-spread", "hired", "divprune")  # importance, coverage, and both
QUICK = ("full", "prunesid-paper", "random")
AT_ONCE = 8  # scenes
PRIOR_SCENES = 300
LONGEST_ANSWER = 4  # two words, the end, and one more that would be wrong
ROUNDS = 3
METHOD_CODE = (  # all that can change an answer to given inputs
    "modeling_prunesid/modeling_prunesid_llava.py", "modeling_prunesid/modeling_vitcop_llava.py",
    "modeling_prunesid/configuration_prunesid.py", "modeling_prunesid/modeling_layer_pruned_llava.py",
    "modeling_prunesid/*_pruning.py", "modeling_prunesid/compression.py",
    "modeling_prunesid/selection.py", "modeling_prunesid/components.py", "modeling_prunesid/similarity.py",
    "modeling_prunesid/exact.py", "modeling_prunesid/single_views.py", "modeling_prunesid/method*.py",
    "modeling_prunesid/tower.py", "modeling_prunesid/upstream.py", "modeling_prunesid/budgets.py",
    "modeling_prunesid/encoding.py", "modeling_prunesid/question.py",
    "modeling_prunesid/generation.py", "modeling_prunesid/plans.py", "modeling_prunesid/prompts.py",
    "modeling_prunesid/family.py", "modeling_prunesid/vitcop.py", "modeling_prunesid/checks.py",
    "modeling_prunesid/cached_*.py", "modeling_prunesid/context.py", "modeling_prunesid/grouping.py",
    "modeling_prunesid/attention.py", "modeling_prunesid/arguments.py", "modeling_prunesid/outputs.py",
    "modeling_prunesid/readings.py", "modeling_prunesid/layers.py", "modeling_prunesid/views.py",
    "modeling_prunesid/runs.py", "modeling_prunesid/parts.py", "modeling_prunesid/patches.py",
    "modeling_prunesid/cls_attention.py",
    "prunesid_cli/baselines/*.py", "prunesid_cli/towers.py", "prunesid_cli/ablations.py", "prunesid_cli/evaluate.py",
    "prunesid_cli/tower_memo.py",
)  # fmt: skip
ROWS_CODE = (  # the same for rows of any family
    "modeling_prunesid/*.py", "prunesid_cli/baselines/*.py", "prunesid_cli/own_rows.py", "prunesid_cli/generate.py",
    "prunesid_cli/images.py",
)  # fmt: skip


@dataclass
class Chunk:
    """Some scenes and what is asked: `questions` of all scenes and, for each, the row of its scene among `scenes`."""

    number: int
    scenes: list[Scene]
    questions: list[Question]
    rows: list[int]
    inputs: dict[str, torch.Tensor]


def scene_of(split: str, number: int) -> Scene:
    """The scenes of an evaluation, numbered from 0; the variants take turns."""
    return make_scene(VARIANTS[number % len(VARIANTS)], split, number // len(VARIANTS))


def choose_questions(scene: Scene, count: int) -> list[Question]:
    """`count` of the scene's questions, drawn by its name: one of each type before a second of any."""
    questions = ask(scene)
    random.Random(f"evaluate/{scene.variant}/{scene.split}/{scene.seed}").shuffle(questions)
    seen: Counter[str] = Counter()
    rounds = []
    for question in questions:
        rounds.append(seen[question.kind])
        seen[question.kind] += 1
    order = sorted(range(len(questions)), key=lambda index: rounds[index])
    return [questions[index] for index in order[:count]]


def write_prompt(processor, question: Question) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def build_chunk(processor, device, number: int, scenes: list[Scene], count: int) -> Chunk:
    """The chunk with `count` questions a scene. Its inputs have a picture a scene and a prompt a question."""
    asked = [choose_questions(scene, count) for scene in scenes]
    rows = [row for row, questions in enumerate(asked) for _ in questions]
    questions = [question for questions in asked for question in questions]
    inputs = processor(
        images=[scenes[row].image for row in rows],
        text=[write_prompt(processor, question) for question in questions],
        padding=True, padding_side="left", return_tensors="pt",
    ).to(device)  # fmt: skip
    first = [rows.index(row) for row in range(len(scenes))]
    pixel_values = inputs["pixel_values"][first]
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return Chunk(number, scenes, questions, rows, {**inputs, "pixel_values": pixel_values})


def repeat_views(encoded, rows: list[int]) -> BaseModelOutputWithPooling:
    """What `get_image_features` returned for pictures, with that of picture `rows[i]` at place i."""
    repeated = BaseModelOutputWithPooling(pooler_output=[encoded.pooler_output[row] for row in rows])
    for name in ("keep_indices", "num_placeholders", "visual_groups", "visual_counts"):
        if encoded.get(name) is not None:
            repeated[name] = [encoded[name][row] for row in rows]
    return repeated


@torch.inference_mode()
def answer(model, processor, chunk: Chunk, reads_question: bool = False) -> list[str]:
    """
    The model's answer to each question. Every picture is encoded once for all its questions, but where the method
    reads them.
    """
    prompt = {name: value for name, value in chunk.inputs.items() if name != "pixel_values"}
    pixel_values = chunk.inputs["pixel_values"]
    if reads_question:
        visual = {"pixel_values": pixel_values[chunk.rows]}
        if model.model.reads_question:
            mask = QuestionReader(processor).mask(processor, prompt["input_ids"].tolist())
            visual["question_mask"] = torch.tensor(mask, device=model.device)
    else:
        encoded = model.get_image_features(pixel_values=pixel_values, return_dict=True)
        visual = {"mm_encoder_outputs": {"image": repeat_views(encoded, chunk.rows)}}
    output = model.generate(
        **prompt,
        **visual,
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
    )
    words = processor.batch_decode(output[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return [word.strip() for word in words]


class Answers:
    """A JSON-lines file of records, one for each method, budget and chunk, found by a hash of what they depend on.

    The file is appended to and never rewritten. A line that is no record, such as the half line of a run that was
    killed, is skipped and named. Dynamic methods also depend on the `reference`, the information score that receives
    the budget.
    """

    def __init__(self, path: Path, basis: str, reference: float | None):
        self.path, self.basis, self.reference = path, basis, reference
        self.records = {record["key"]: record for _, record in read_lines(path, check_record)}

    def key(self, method: str, budget: int, chunk: Chunk) -> str:
        reference = self.reference if is_dynamic(method) else None
        digest = hashlib.sha256(f"{self.basis}/{method}/{budget}/{reference}".encode())
        for value in chunk.inputs.values():
            digest.update(value.cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    def add(self, record: dict) -> None:
        self.records[record["key"]] = record
        with append_to(self.path) as lines:
            lines.write(json.dumps(record) + "\n")


def check_record(line: str) -> dict:
    """The record in a line of answers; a `ValueError` that says what it lacks."""
    record = json.loads(line)
    fields = record if isinstance(record, dict) else {}
    answers = fields.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("no list of answers")
    if not isinstance(fields.get("key"), str) or not isinstance(fields.get("tokens"), int | float):
        raise ValueError("no key or no number of tokens")
    return record


def is_dynamic(method: str) -> bool:
    return method.endswith("-dyn")


def basis_of(model, code: Iterable[str] = METHOD_CODE) -> str:
    """A hash of the model's weights and settings and of the code that the methods are made of."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.flatten().view(torch.uint8).cpu().numpy().tobytes())
    for pattern in code:
        for path in sorted(Path(__file__).parents[1].glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def collect(
    model, processor, cases: list[tuple[str, int]], num_scenes: int, split: str, count: int, known: Answers
) -> dict:
    """Put `count` questions of each scene to the model in each case (method and budget), where it is not `known`.

    Returns the `questions`, the `scenes` and `variants` (name of each scene) they belong to, and for each case the
    `answers` and the mean `tokens` of a picture.
    """
    found: dict = {"questions": [], "scenes": [], "variants": [], "answers": {}, "tokens": {}}
    starts = range(0, num_scenes, AT_ONCE)
    with tqdm(total=len(starts) * len(cases), desc="chunks x methods") as bar:
        for start in starts:
            scenes = [scene_of(split, number) for number in range(start, min(start + AT_ONCE, num_scenes))]
            chunk = build_chunk(processor, model.device, start // AT_ONCE, scenes, count)
            first = len(found["variants"])
            found["questions"] += chunk.questions
            found["scenes"] += [first + row for row in chunk.rows]
            found["variants"] += [scene.variant for scene in scenes]
            with remembered(model.model.vision_tower):
                for case in cases:
                    record = _ask(model, processor, case, chunk, known)
                    found["answers"].setdefault(case, []).extend(record["answers"])
                    found["tokens"].setdefault(case, []).extend([record["tokens"]] * len(scenes))
                    bar.update()
    found["tokens"] = {case: statistics.fmean(tokens) for case, tokens in found["tokens"].items()}
    return found


def _ask(model, processor, case: tuple[str, int], chunk: Chunk, known: Answers) -> dict:
    """The record of a method and budget on a chunk, made if it is not `known`."""
    method, budget = case
    key = known.key(method, budget, chunk)
    if key not in known.records:
        with applied(model, method, budget) as run:
            answers = answer(model, processor, chunk, METHODS[method].reads_question)
        record = {"key": key, "method": method, "budget": budget, "chunk": chunk.number}
        known.add({**record, "tokens": run.measured_tokens, "answers": answers})
    return known.records[key]


@torch.inference_mode()
def reference_information(model, processor, split: str, num_scenes: int) -> float:
    """The mean information score 1 - rho of the evaluated scenes, at which dynamic budgets are N (section 3.4)."""
    scores: list[float] = []
    for number in tqdm(range(num_scenes), desc="scenes for dynamic budgets"):
        inputs = processor.image_processor(scene_of(split, number).image, return_tensors="pt").to(model.device)
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        patches = states[model.config.prunesid_config.layer][:, -num_patches(model) :]
        scores += (1 - redundancy(patches)).tolist()
    return round(statistics.fmean(scores), 6)


def num_patches(model) -> int:
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def measure_cost(model, processor, cases: list[tuple[str, int]], split: str) -> dict[tuple[str, int], dict]:
    """Median time to the first token and peak memory of one question about one picture, the cases interleaved."""
    inputs = build_chunk(processor, model.device, 0, [scene_of(split, 0)], 1).inputs

    def first_token(case):
        with applied(model, *case):
            model.generate(**inputs, max_new_tokens=1, do_sample=False)

    runs = {str(case): partial(first_token, case) for case in cases}
    seconds = seconds_interleaved(runs, ROUNDS)
    return {
        case: {
            "first_token_ms": round(1000 * statistics.median(seconds[str(case)]), 1),
            "peak_mib": round(peak_bytes(runs[str(case)]) / 2**20, 1),
        }
        for case in cases
    }


def list_cases(methods: Iterable[str], budgets: Iterable[int], patches: int) -> list[tuple[str, int]]:
    """Every method at every budget; "full", which all are compared with, once and first.

    Raises:
        ValueError: an unknown method, none to compare, or a budget that is not between 1 and the number of patches.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods must be among {', '.join(METHODS)}, got {method!r}. Correct the name.")
    for budget in budgets:
        if not isinstance(budget, int) or not 0 < budget < patches:
            raise ValueError(f"--budgets must be between 1 and {patches - 1} tokens, got {budget}. Ask for fewer.")
    others = [method for method in dict.fromkeys(methods) if method != "full"]
    if not others:
        raise ValueError(f"--methods must name one besides full, got {' '.join(methods)}. Add what it is to compare.")
    return [("full", patches), *((method, budget) for method in others for budget in dict.fromkeys(budgets))]


def load_model(folder: str | Path | None):
    """The model and processor of `folder`, by default the embedded one; in float32, on the GPU if there is one."""
    if folder is None:
        from prunesid_cli.embedded import complete

        folder = complete()
    model_type = AutoConfig.from_pretrained(folder).model_type
    if model_type not in ("llava", "prunesid_llava"):
        raise ValueError(
            f"--model must be a LLaVA-1.5 checkpoint (model_type 'llava'), whose tower the other methods are written "
            f"for, got {model_type!r} in {folder}. docs/lmms_eval.md evaluates any family."
        )
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = PruneSIDLlavaProcessor.from_pretrained(folder)
    processor.num_visual_tokens = None  # full prompts, which every method accepts
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def prior_questions() -> Iterator[Question]:
    for number in tqdm(range(PRIOR_SCENES), desc="questions for the prior"):
        yield from ask(scene_of("train", number))


def evaluate(arguments: argparse.Namespace, model, processor) -> dict:
    """Answer, count and write the pages; returns the result."""
    methods = arguments.methods
    if arguments.ablations:
        changed = ablations(model.config.vision_config.num_hidden_layers)
        METHODS.update(changed)
        methods = methods or ("full", "prunesid-paper", *changed, *BESIDE_ABLATIONS)
    for name in ("scenes", "questions"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}. Ask for more.")
    cases = list_cases(methods, arguments.budgets, num_patches(model))
    arguments.out.mkdir(parents=True, exist_ok=True)
    basis, reference = basis_of(model), None
    if any(is_dynamic(method) for method, _ in cases):
        reference = reference_information(model, processor, arguments.split, arguments.scenes)
        model.config.prunesid_config.reference_information = reference
    known = Answers(arguments.out / "answers.jsonl", basis, reference)
    found = collect(model, processor, cases, arguments.scenes, arguments.split, arguments.questions, known)
    result = {"machine": machine(), "split": arguments.split, **summarise(found, fit_prior(prior_questions()))}
    if reference is not None:
        result["reference_information"] = reference
    for row in result["rows"]:
        row["place"] = METHODS[row["method"]].place
    if not arguments.quick:
        for case, cost in measure_cost(model, processor, cases, arguments.split).items():
            next(row for row in result["rows"] if (row["method"], row["budget"]) == case).update(cost)
    write_pages(arguments.out, arguments.page, result)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for answers and pages")
    parser.add_argument("--page", default="accuracy", help="name and title of the pages (default: %(default)s)")
    parser.add_argument(
        "--model",
        help="a folder or Hub name with a processor: LLaVA, or with --data any family (default: the embedded model)",
    )
    parser.add_argument("--methods", nargs="+", help=f"of {', '.join(METHODS)} (default: {' '.join(COMPARED)})")
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=parse_budget,
        help=f"default: {' '.join(map(str, BUDGETS))}; with --data shares too",
    )
    parser.add_argument("--split", choices=SPLITS, help="default: test; val with --ablations")
    parser.add_argument("--scenes", type=int, help="default: 400")
    parser.add_argument("--questions", type=int, help="questions per scene, at most (default: 6)")
    parser.add_argument("--all", action="store_true", help="every method")
    parser.add_argument(
        "--quick", action="store_true", help="200 fixed questions, two budgets, three methods; times are left out"
    )
    parser.add_argument("--ablations", action="store_true", help="PruneSID with one setting changed at a time")
    rows = parser.add_argument_group("rows of your own")
    rows.add_argument("--data", type=Path, help="a CSV, TSV or JSONL file of image, question, answer, or its folder")
    rows.add_argument("--contains", action="store_true", help="an answer is correct if it contains the expected one")
    rows.add_argument("--batch-size", type=int, default=1, help="rows answered at once (default: %(default)s)")
    rows.add_argument("--max-new-tokens", type=int, default=16, help="of an answer (default: %(default)s)")


def set_defaults(arguments: argparse.Namespace) -> None:
    """Fill in what the command line leaves open, which depends on --quick, --all and --ablations."""
    defaults: dict = {"methods": COMPARED, "budgets": BUDGETS, "split": "test", "scenes": 400, "questions": 6}
    if arguments.quick:
        defaults |= {"methods": QUICK, "budgets": (64, 32), "scenes": 40, "questions": 5}
    if arguments.all:
        defaults |= {"methods": tuple(METHODS)}
    if arguments.ablations:
        scenes = 40 if arguments.quick else 200
        defaults |= {"methods": None, "budgets": (64, 32), "split": "val", "scenes": scenes}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def run(arguments: argparse.Namespace) -> dict:
    if not re.fullmatch(r"\w[\w-]*", arguments.page):
        raise ValueError(f"--page must be a name such as accuracy, got {arguments.page!r}. Give folders by --out.")
    if arguments.data is not None:
        from prunesid_cli.own_rows import evaluate_rows

        for name in ("split", "scenes", "questions", "all", "ablations"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} is of the scenes, and --data asks rows of your own. Leave it out.")
        return evaluate_rows(arguments, partial(basis_of, code=ROWS_CODE))
    set_defaults(arguments)
    result = evaluate(arguments, *load_model(arguments.model))
    print_table(result)
    shares: dict[str, dict] = {}
    for row in result["rows"][1:]:
        shares.setdefault(row["method"], {})[str(row["budget"])] = row["share_of_full"]["value"]
    named = {name: result[name] for name in ("full_accuracy", "by_type", "prior", "prior_by_type")}
    return {**named, "share_of_full": shares}
