"""Train the projector under a token budget on your own questions, optionally with LoRA on the language model.

Rows are a CSV, TSV or JSONL file with `image` (a path relative to the file, or a URL), `question` and `answer`. The
loss is that of the answers. Checkpoints are kept in `OUTPUT.training/`, and the same command continues from there.
Accuracy on held-out rows, split by image, is measured before and after. The result is a variant with its weights,
ready to publish.

Examples:
    prunesid tune rows.jsonl --model llava-hf/llava-1.5-7b-hf --budget 64 --output out/llava-64-tuned
    prunesid tune rows.csv --model out/llava-64 --lora 16 --epochs 2 --output out/llava-64-tuned
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed

from modeling_prunesid.presets import read_preset
from prunesid_cli.answer_statistics import as_compared, resample
from prunesid_cli.convert import find_family, find_place, parse_budget, staging_folder
from prunesid_cli.images import open_image
from prunesid_cli.own_rows import COLUMNS, ENDINGS, fields_of
from prunesid_cli.picture_memo import remembered_pictures


TRAINED, JOB, STATE = "trained.safetensors", "job.json", "trainer_state.json"
IGNORED = -100
# Modules of base models that see pixels, and what in them maps their tokens for the language model.
TOWERS = re.compile(r"(vision|visual|image|video|audio|sam|embed_vision.*encoder)")
CONNECTORS = re.compile(
    r"(^|[._])(merger|mergers|projector|projection|connector|adapter|aligner|resampler"
    r"|head_linear|head_norm|visual_embeddings_table)([._]|$)"
)
INSIDE = re.compile(r"(^|\.)(encoder|layers?|blocks?|embeddings|patch_embed)\.")  # what a tower has of its own


@dataclass(frozen=True)
class Row:
    """`source` is a path or a URL of an image."""

    source: str
    question: str
    answer: str


def read_rows(path: Path) -> list[Row]:
    """
    The rows of a file.

    Raises:
        `ValueError`: for another kind of file, one without rows, or a row that lacks something, by its number.
    """
    if path.suffix.lower() not in ENDINGS or not path.is_file():
        raise ValueError(f"The rows must be a file ({', '.join(ENDINGS)}), got {path}.")
    rows = []
    for number, fields in fields_of(path):
        values = [fields.get(name) for name in COLUMNS]
        for name, value in zip(COLUMNS, values):
            if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
                raise ValueError(f"Row {number} of {path} must have some text as its {name}, got {value!r:.80}.")
        source, question, answer = (str(value).strip() for value in values)
        is_path = not source.startswith(("http://", "https://", "data:image/"))
        rows.append(Row(str(path.parent / source) if is_path else source, question, answer))
    if not rows:
        raise ValueError(f"{path} has no rows. Give some questions about images, with their answers.")
    return rows


def split_rows(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: those of a share of the pictures, chosen by a hash of their names."""
    if not 0 <= share < 1:
        raise ValueError(f"--held-out must be a share in [0, 1) or a file of rows, got {share}.")
    sources = sorted({row.source for row in rows}, key=lambda source: hashlib.sha256(source.encode()).hexdigest())
    held = set(sources[: round(share * len(sources))])
    return [row for row in rows if row.source not in held], [row for row in rows if row.source in held]


def between(model: Any) -> list[str]:
    """
    The names of the parameters between the tower and the language model: those of the base model's own parts that are
    neither, and of a tower's part that maps its tokens for the language model (the merger of Qwen-VL).
    """
    prefix = "" if model.model is model else "model."
    found = []
    for name, _ in model.model.named_parameters():
        first, _, rest = name.partition(".")
        if first == "language_model":
            continue
        if CONNECTORS.search(first) or not TOWERS.search(first) or CONNECTORS.search(INSIDE.split(rest)[0]):
            found.append(f"{prefix}{name}")
    return found


def choose_parameters(model: Any, pattern: str | None) -> list[str]:
    """
    The names of what is trained, all else frozen: what `pattern` (a regular expression) finds, or `between`.

    Raises:
        `ValueError`: if there is none.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = set(between(model)) if pattern is None else {name for name in names if re.search(pattern, name)}
    if not chosen:
        parts = sorted({".".join(name.split(".")[:3]) for name in names})
        raise ValueError(
            f"--train {pattern or ''} finds nothing to train in {type(model).__name__}, whose parts are "
            f"{', '.join(parts[:12])}. Give a regular expression of parameter names."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return sorted(chosen)


def add_lora(model: Any, rank: int) -> Any:
    """Low-rank adapters on the linear layers of the language model, by peft; they are merged in the end."""
    from peft import LoraConfig, get_peft_model

    language_model = model.model.language_model
    linear = sorted(
        {name.rsplit(".", 1)[-1] for name, module in language_model.named_modules() if isinstance(module, nn.Linear)}
    )
    target = rf".*language_model\..*\.({'|'.join(map(re.escape, linear))})"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target))
    parameters = dict(model.named_parameters())
    for name in trained:
        parameters[name].requires_grad_(True)
    return adapted


class Examples:
    """Batches of rows: short prompts with their answers, of which alone the labels are."""

    def __init__(self, processor: Any, ends: Sequence[int], dtype: torch.dtype = torch.float32):
        self.processor, self.tokenizer, self.ends, self.dtype = processor, processor.tokenizer, set(ends), dtype

    def texts(self, row: Row) -> tuple[str, str]:
        """The prompt, and the prompt with the answer and what ends it."""
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": row.answer}]}
        prompt = self.processor.apply_chat_template([asked], add_generation_prompt=True)
        whole = self.processor.apply_chat_template([asked, said])
        if not whole.startswith(prompt.rstrip()):
            whole = f"{prompt}{row.answer}"
        if not self.ends & set(self.tokenizer(whole)["input_ids"][-2:]):
            whole = whole.rstrip() + self.tokenizer.eos_token
        return prompt, whole

    def _process(self, rows: list[Row], texts: list[str], side: str) -> Any:
        images = [[open_image(row.source)] for row in rows]
        inputs = self.processor(images=images, text=texts, padding=True, padding_side=side, return_tensors="pt")
        return inputs.to(self.dtype)

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        pairs = [self.texts(row) for row in rows]
        inputs = self._process(rows, [whole for _, whole in pairs], "right")
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for number, texts in enumerate(pairs):
            prompt, whole = (self.tokenizer(text)["input_ids"] for text in texts)
            differ = (place for place, (one, other) in enumerate(zip(prompt, whole)) if one != other)
            same = next(differ, min(len(prompt), len(whole)))
            end = int(inputs["attention_mask"][number].sum())
            answer = slice(end - (len(whole) - same), end)
            labels[number, answer] = inputs["input_ids"][number, answer]
        return {**inputs, "labels": labels}

    def prompts(self, rows: list[Row]) -> Any:
        """Rows without their answers, to generate them."""
        return self._process(rows, [self.texts(row)[0] for row in rows], "left")


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


@torch.inference_mode()
def answers(model: Any, examples: Examples, rows: list[Row], batch_size: int, max_new_tokens: int) -> list[str]:
    """The model's greedy answers."""
    model.eval()
    told: list[str] = []
    for first in tqdm(range(0, len(rows), batch_size), desc="held out"):
        inputs = examples.prompts(rows[first : first + batch_size]).to(model.device)
        half = torch.autocast(model.device.type, examples.dtype) if is_half(examples.dtype) else nullcontext()
        with half:
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        told += [text.strip() for text in examples.processor.batch_decode(new, skip_special_tokens=True)]
    return told


def compare(rows: list[Row], before: list[str], after: list[str]) -> dict[str, Any]:
    """Shares of right answers before and after, and the difference with a 95% interval, paired over pictures."""
    sources = {source: place for place, source in enumerate(dict.fromkeys(row.source for row in rows))}
    sums = np.zeros((len(sources), 3))
    for row, *told in zip(rows, before, after):
        right = [as_compared(text) == as_compared(row.answer) for text in told]
        sums[sources[row.source]] += [*right, 1]
    drawn = resample(len(sources)) @ sums
    shares = 100 * drawn[:, :2] / drawn[:, 2:]
    gain = shares[:, 1] - shares[:, 0]
    low, high = np.percentile(gain[1:], (2.5, 97.5))
    return {
        "before": round(shares[0, 0], 1),
        "after": round(shares[0, 1], 1),
        "gain": {"value": round(gain[0], 1), "low": round(low, 1), "high": round(high, 1)},
    }


class Tuner(Trainer):
    """Keeps what is trained alone; the frozen rest is in the checkpoint that it came from."""

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: own for name, own in self.model.named_parameters() if own.requires_grad}
        save_file({name: own.detach().cpu().contiguous() for name, own in trained.items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_trained(self.model, Path(resume_from_checkpoint))


def load_trained(model: Any, folder: Path) -> None:
    """Put what was trained so far into a model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(folder / TRAINED).items():
            parameters[name].copy_(value)


def last_checkpoint(folder: Path) -> Path | None:
    """The last that was written whole."""
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE).exists() and (path / TRAINED).exists()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def begin(folder: Path, job: dict[str, Any]) -> None:
    """
    Make the folder of a job, or find that of the same one.

    Raises:
        `ValueError`: if it is another's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / JOB
    if not path.exists():
        unfinished = folder / f"{JOB}.{os.getpid()}"
        unfinished.write_text(json.dumps(job))
        unfinished.replace(path)
    begun = json.loads(path.read_text())
    for name, value in job.items():
        if begun.get(name) != value:
            raise ValueError(
                f"{folder} was begun with {name}={begun.get(name)!r}, and now it is {value!r}. Choose another "
                f"--output, or remove {folder}."
            )


def settings_of(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The fields of `prunesid_config` that the command line asks for; None for those of the model."""
    settings: dict[str, Any] = {}
    if arguments.preset is not None:
        settings, method, _ = read_preset(arguments.preset)
        if method != "prunesid":
            raise ValueError(f"--preset must be of PruneSID, got {arguments.preset!r} of {method}.")
    for name in ("budget", "method"):
        if getattr(arguments, name) is not None:
            settings[name] = getattr(arguments, name)
    return settings or None


def load(name: str, settings: dict[str, Any] | None) -> tuple[Any, Any]:
    """A model of a checkpoint with these settings, and its own processor, which writes short prompts."""
    model_class = find_family(name)
    given = {} if settings is None else {"prunesid_config": settings}
    model = model_class.from_pretrained(name, dtype="auto", **given)
    processor_class = model_class._processor_class
    if not hasattr(processor_class, "arguments_for"):
        raise ValueError(f"{name} has no processor of ours, which writes short prompts to train on.")
    own = processor_class.arguments_for(model.config.prunesid_config)
    processor = processor_class.from_pretrained(name, **own)
    for field, value in own.items():  # None is the saved value for `from_pretrained`
        if value is None and hasattr(processor, field):
            setattr(processor, field, None)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"The processor of {name} has no chat template, which writes prompts. Save it with one.")
    if torch.cuda.is_available():
        return model.to("cuda"), processor
    return (model.float() if model.dtype == torch.float16 else model), processor  # CPUs do not train in fp16


def training_arguments(folder: Path, dtype: torch.dtype, arguments: argparse.Namespace) -> TrainingArguments:
    """Those of Transformers, of the command's."""
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulate,
        learning_rate=arguments.learning_rate,
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.warmup_steps,
        save_strategy="steps",
        save_steps=arguments.save_steps,
        save_total_limit=2,
        logging_steps=arguments.save_steps,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        seed=arguments.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, score and save; returns the report."""
    rows = read_rows(arguments.rows)
    held: list[Row]
    if isinstance(arguments.held_out, Path):
        train, held = rows, read_rows(arguments.held_out)
    else:
        train, held = split_rows(rows, arguments.held_out)
    if not train:
        raise ValueError(f"{arguments.rows} leaves no row to train on. Hold out a smaller share.")
    target, existing = find_place(arguments.output)
    folder = target.with_name(f"{target.name}.training")
    names = ("model", "preset", "budget", "method", "train", "lora", "epochs", "max_steps", "batch_size",
             "accumulate", "learning_rate", "seed")  # fmt: skip
    job: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    job["rows"] = hashlib.sha256(repr((train, held)).encode()).hexdigest()
    set_seed(arguments.seed)
    name = arguments.model
    if name is None:
        from prunesid_cli.embedded import complete

        name = str(complete())
    model, processor = load(name, settings_of(arguments))
    chosen = choose_parameters(model, arguments.train)
    begin(folder, job)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    dtype = model.dtype
    for own in model.parameters():
        if own.requires_grad and is_half(dtype):
            own.data = own.data.float()  # steps are smaller than what half precision tells apart
    examples = Examples(processor, [end for end in ends if end is not None], dtype)
    with remembered_pictures(model.model):
        before = _remember(folder / "before.json", lambda: _ask(model, examples, held, arguments))
        adapted = None if arguments.lora is None else add_lora(model, arguments.lora)
        trainer = Tuner(
            model,
            training_arguments(folder, dtype, arguments),
            data_collator=examples,
            train_dataset=train,
        )
        last, started = last_checkpoint(folder), time.process_time()
        done = trainer.train(resume_from_checkpoint=None if last is None else str(last))
        cpu_minutes = (time.process_time() - started) / 60
        model.requires_grad_(True)
        if adapted is not None:
            model = adapted.merge_and_unload()
        scored = {} if not held else compare(held, before, _ask(model, examples, held, arguments))
    for own_name, own in model.named_parameters():
        own.data = own.data.to(dtype) if own_name in chosen else own.data
    report = {
        "output": str(arguments.output),
        "rows": len(train),
        "held_out": len(held),
        "steps": done.global_step,
        "cpu_minutes": round(cpu_minutes, 1),
        "loss": round(done.training_loss, 4),
        "trained": len(chosen),
        **scored,
    }
    with staging_folder(existing) as staging:
        variant = staging / "variant"
        model.save_pretrained(variant, repo_id=str(arguments.output))
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(variant, target)
        target.chmod(0o755)
    if not arguments.keep:
        shutil.rmtree(folder)
    return report


def _ask(model: Any, examples: Examples, rows: list[Row], arguments: argparse.Namespace) -> list[str]:
    return answers(model, examples, rows, arguments.batch_size, arguments.max_new_tokens)


def _remember(path: Path, measure: Any) -> list[str]:
    """What was measured by the run that this one goes on with, or is now."""
    if not path.exists():
        found = measure()
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(found))
        unfinished.replace(path)
    return json.loads(path.read_text())


def share_or_file(text: str) -> float | Path:
    """What `--held-out` names."""
    try:
        return float(text)
    except ValueError:
        return Path(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", type=Path, help="a .csv, .tsv or .jsonl file with image, question and answer")
    parser.add_argument("--output", type=Path, required=True, help="folder for the variant")
    parser.add_argument("--model", help="checkpoint or variant: a folder or a Hub name; default: the embedded model")
    parser.add_argument("--preset", help="a name of `prunesid presets`, or a JSON file")
    parser.add_argument("--budget", type=parse_budget, help="tokens kept of each view, or their share as in 0.25")
    parser.add_argument("--method", help="paper, release or spread (default: the model's)")
    parser.add_argument("--train", metavar="REGEX", help="parameters to train (default: the projector)")
    parser.add_argument(
        "--lora", type=int, metavar="RANK", help="also LoRA adapters on the language model, merged at the end"
    )
    parser.add_argument(
        "--held-out", type=share_or_file, default=0.1, help="a share of the images, or a file (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after this many steps (default: no limit)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at once (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--warmup-steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--save-steps", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of held-out answers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep OUTPUT.training/ when the variant is saved")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    for name in ("batch_size", "accumulate", "save_steps", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}.")
    if arguments.lora is not None and arguments.lora < 1:
        raise ValueError(f"--lora must be a rank of at least 1, got {arguments.lora}. Leave it out for none.")
    return tune(arguments)
