"""
Trainers and adapters that compute losses, metrics and scores outside the model, unmodified, for every family, with
full prompts. What they compute must be what the rows give alone in the stock class (`oracle_prompt`).
"""

import contextlib
import copy
import math

import pytest
import torch
from oracle_prompt import CACHE, FAMILIES, IGNORED, alone, check_columns, expand, in_float64, make_rows, naive_loss
from tiny_training import Collator, Examples, build_processor, picture, view_of
from transformers import Trainer, TrainingArguments


pytestmark = pytest.mark.filterwarnings("ignore")
OURS_ALONE = ("keep_mask", "layer_visual_tokens")
every_family = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("LLaVA", "Qwen3VL") else pytest.mark.contract) for name in FAMILIES],
)


@pytest.fixture(autouse=True)
def float64(request):
    """TRL's own kernels are written for float32."""
    with contextlib.nullcontext() if "trl" in request.node.name else in_float64():
        yield


def pair(name):
    family = FAMILIES[name]
    with in_float64():
        ours = family.build()
        return family, ours, family.stock(ours)


def oracle_logits(family, ours, stock, rows):
    with in_float64():
        return [expand(alone(family, ours, stock, row).logits[0], row) for row in rows]


def without_placeholders(labels, rows):
    return [
        [IGNORED if flag else label for label, flag in zip(given, row.is_placeholder)]
        for given, row in zip(labels, rows)
    ]


class Records(Trainer):
    """Remembers every loss, before it is divided by anything."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        result = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append(float(result[0] if isinstance(result, tuple) else result))
        return result


def trainer_of(family, model, tmp_path, collator, metrics=None, loss=None, **settings):
    settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 1, **settings}
    arguments = TrainingArguments(
        str(tmp_path),
        learning_rate=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **settings,
    )
    trainer = Records(
        model, arguments, data_collator=collator, train_dataset=Examples(family), eval_dataset=Examples(family),
        compute_metrics=metrics, compute_loss_func=loss,
    )  # fmt: skip
    trainer.losses = []
    trainer._get_train_sampler = lambda *args, **kwargs: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def micro_batches(collator, family, count=2):
    """Rows and labels of the first batches of two."""
    parts = Examples(family).parts
    batches = [collator.rows(parts[first : first + 2]) for first in range(0, 2 * count, 2)]
    return [(rows, collator.labels(rows)) for rows in batches]


@every_family
@pytest.mark.parametrize("label_all", [pytest.param(False, marks=pytest.mark.contract), True])
def test_gradient_accumulation(name, label_all, tmp_path):
    """
    The loss inside the model ignores labels of placeholders, and `num_items_in_batch` counts what is left: each micro
    batch by its own share.
    """
    family, ours, stock = pair(name)
    collator = Collator(family, ours, label_all=label_all)
    trainer = trainer_of(family, ours, tmp_path, collator, gradient_accumulation_steps=2)
    trainer.train()
    batches = micro_batches(collator, family)
    items = sum(label != IGNORED for _, labels in batches for row in labels for label in row[1:])
    assert len(trainer.losses) == 2
    for loss, (rows, labels) in zip(trainer.losses, batches):
        given = sum(label != IGNORED for row in labels for label in row[1:])
        if any(any(row.is_dropped) for row in rows):
            labels = without_placeholders(labels, rows)
        total, counted = naive_loss(oracle_logits(family, ours, stock, rows), labels)
        # Upstream's later Qwen-VL do not take the number of items: each micro batch has its own mean.
        takes_items = trainer.model_accepts_loss_kwargs
        assert math.isclose(loss, total / (items * counted / given if takes_items else counted), rel_tol=1e-6)
    beside = trainer_of(family, stock, tmp_path, collator, gradient_accumulation_steps=2)
    beside.train()
    assert len(beside.losses) == 2


@every_family
def test_label_smoothing(name, tmp_path):
    family, ours, stock = pair(name)
    collator, epsilon = Collator(family, ours), 0.1
    trainer = trainer_of(family, ours, tmp_path, collator, label_smoothing_factor=epsilon)
    trainer.train()
    ((rows, labels),) = micro_batches(collator, family, 1)
    logits = oracle_logits(family, ours, stock, rows)
    total, counted = 0.0, 0
    for values, wanted in zip(logits, labels):
        for column, label in enumerate(wanted):
            if label != IGNORED:  # upstream does not shift the labels of these classes
                scores = -values[column].log_softmax(0)
                total += float((1 - epsilon) * scores[label] + epsilon * scores.mean())
                counted += 1
    assert math.isclose(trainer.losses[0], total / counted, rel_tol=1e-6)
    trainer_of(family, stock, tmp_path, collator, label_smoothing_factor=epsilon).train()


def outside_loss(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1], labels[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / num_items_in_batch


@every_family
def test_a_loss_function_of_the_callers(name, tmp_path):
    family, ours, stock = pair(name)
    collator = Collator(family, ours)
    trainer = trainer_of(family, ours, tmp_path, collator, loss=outside_loss)
    trainer.train()
    ((rows, labels),) = micro_batches(collator, family, 1)
    total, counted = naive_loss(oracle_logits(family, ours, stock, rows), labels)
    assert math.isclose(trainer.losses[0], total / counted, rel_tol=1e-6)
    trainer_of(family, stock, tmp_path, collator, loss=outside_loss).train()


@every_family
def test_metrics_and_predictions(name, tmp_path):
    """`predict` pads the batches to one length; ours has the fields and the columns of the stock class."""
    family, ours, stock = pair(name)
    collator, seen = Collator(family, ours), []

    def metrics(prediction):
        logits = prediction.predictions
        seen.append(logits[0] if isinstance(logits, tuple) else logits)
        return {"columns": len(seen[-1][0])}

    ignored = [CACHE, "image_outputs", "video_outputs", "image_hidden_states", "video_hidden_states", *OURS_ALONE]
    results = []
    for model in (ours, stock):
        trainer = trainer_of(family, model, tmp_path, collator, metrics=metrics)
        trainer.evaluate(ignore_keys=ignored)
        results.append(trainer.predict(Examples(family), ignore_keys=ignored))
    predicted = results[0].predictions  # in Transformers 5.18 with the deltas of positions of Qwen-VL
    predicted = predicted[0] if isinstance(predicted, tuple) else predicted
    assert seen[0].shape == seen[2].shape == predicted.shape
    assert seen[0].shape[:2] == results[0].label_ids.shape
    parts = Examples(family).parts
    for index, row in enumerate([*collator.rows(parts[:2]), *collator.rows(parts[2:])]):
        logits = expand(alone(family, ours, stock, row).logits[0], row)
        for column, value in enumerate(logits):
            if value is not None:
                torch.testing.assert_close(torch.as_tensor(seen[0][index, column]), value, rtol=1e-5, atol=1e-5)


@every_family
def test_predictions_have_the_fields_of_the_stock_class(name, tmp_path):
    """Nothing of ours is among them."""
    family, ours, stock = pair(name)
    trainers = [trainer_of(family, model, tmp_path, Collator(family, ours)) for model in (stock, ours)]
    # Ours leaves out the encoders' outputs besides, which are no tensors.
    ignored = ["past_key_values", "cache", "image_outputs", "video_outputs"]
    ignored += getattr(stock.config, "keys_to_ignore_at_inference", [])
    expected = trainers[0].predict(Examples(family), ignore_keys=ignored).predictions
    predictions = trainers[1].predict(Examples(family)).predictions
    assert type(predictions) is type(expected)
    assert not isinstance(expected, tuple) or len(predictions) == len(expected)


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(name, tmp_path):
    family, ours, _ = pair(name)
    inputs = Collator(family, ours)([{"parts": parts} for parts in Examples(family).parts[:2]])
    gradients = []
    if name in ("ViTCoP", "LLaVA with llm_budget"):
        ours.train()
        ours.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
            ours(**inputs)
        return
    for checkpoints in (False, True):
        ours.train()
        ours.zero_grad()
        if checkpoints:
            ours.gradient_checkpointing_enable()
        outside_loss(ours(**inputs), inputs["labels"], 1).backward()
        gradients.append([parameter.grad for parameter in ours.model.language_model.parameters()])
    for one, other in zip(*gradients):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-8)


# PEFT


@every_family
def test_lora(name):
    peft = pytest.importorskip("peft")
    family, ours, stock = pair(name)
    rows = Collator(family, ours).rows(Examples(family).parts[:2])
    inputs = Collator(family, ours)([{"parts": parts} for parts in Examples(family).parts[:2]])
    labels = inputs.pop("labels")
    before = ours.generate(**first_row(family, ours), max_new_tokens=3, do_sample=False)
    adapted = peft.get_peft_model(
        ours, peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
    )
    output = adapted(**inputs)
    problems: list[str] = []
    check_columns("logits", output.logits.detach(), oracle_logits(family, ours, stock, rows), problems)
    assert not problems, problems
    outside_loss(output, labels, 1).backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    after = adapted.generate(**first_row(family, ours), max_new_tokens=3, do_sample=False)
    assert torch.equal(before, after)


def first_row(family, ours):
    inputs = Collator(family, ours)([{"parts": Examples(family).parts[0]}])
    inputs.pop("labels")
    return inputs


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_stock])
def test_prefix_tuning(name):
    """
    Each row scores as it does alone in the stock class behind the same prefix. (The stock Qwen-VL find no positions of
    a prompt with images behind one, and stop: the oracle gives them those of the prompt, behind the prefix.)
    """
    peft = pytest.importorskip("peft")
    family, ours, stock = pair(name)
    text = ours.config.get_text_config()
    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=text.num_hidden_layers,
        token_dim=text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // 4),
        num_attention_heads=text.num_key_value_heads,
    )  # fmt: skip
    torch.manual_seed(0)
    adapted = peft.get_peft_model(ours, settings).eval()
    rows = Collator(family, ours).rows(Examples(family).parts[:2])
    inputs = Collator(family, ours)([{"parts": parts} for parts in Examples(family).parts[:2]])
    inputs.pop("labels")
    with torch.no_grad():
        output = adapted(**inputs)
        prefixes = [adapted.get_prompt(batch_size=1) for _ in rows]
        if CACHE == "past_key_values":  # PEFT 0.21's `generate` knows no other name, for the stock class neither
            first = adapted(**first_row(family, ours)).logits[0, -1].argmax()
            answer = adapted.generate(**first_row(family, ours), max_new_tokens=3, do_sample=False)
            assert answer[0, -3] == first
    single = [alone(family, ours, stock, row, prefix=p, use_cache=True) for row, p in zip(rows, prefixes)]
    problems: list[str] = []
    logits = [expand(one.logits[0], row) for one, row in zip(single, rows)]
    check_columns("logits", output.logits, logits, problems)
    assert not problems, problems
    bare = [expand(alone(family, ours, stock, row).logits[0], row) for row in rows]
    check_columns("logits", output.logits, bare, problems)
    assert problems, "the prefix is no matter"


# TRL


TRL = dict(report_to=[], use_cpu=True, gradient_checkpointing=False, bf16=False, save_strategy="no", max_steps=1,
           disable_tqdm=True, learning_rate=0.0, logging_steps=1)  # fmt: skip


def narrow(model):
    """A copy in float32."""
    return copy.deepcopy(model).float()


def says(text):
    return [{"role": "assistant", "content": text}]


def asks(index):
    return [{"role": "user", "content": "word7 " + " ".join(f"word{j + 10}" for j in range(index + 1))}]


def oracle_of(family, ours, stock, texts, seeds, side="right"):
    """Rows of the chat template's texts, with their logits."""
    processor = build_processor(family)
    parts = []
    for text, seed in zip(texts, seeds):
        words = [view_of(family, seed) if w == "<image>" else processor.tokenizer.convert_tokens_to_ids(w)
                 for w in text.split()]  # fmt: skip
        parts.append(words)
    with in_float64():
        rows = make_rows(family, ours, parts)
    return rows, oracle_logits(family, ours, stock, rows)


@pytest.mark.slow
@every_family
def test_trl_sft(name, tmp_path):
    import trl
    from datasets import Dataset

    family, ours, stock = pair(name)
    data = [{"messages": asks(i) + says(f"word3{i} word4{i}"), "images": [picture(i)]} for i in range(2)]

    def train(model):
        arguments = trl.SFTConfig(str(tmp_path), per_device_train_batch_size=2, max_length=None, **TRL)
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(data), processing_class=build_processor(family)
        )
        trainer.train()
        return next(log["loss"] for log in trainer.state.log_history if "loss" in log)

    train(narrow(stock))
    loss = train(narrow(ours))
    texts = [f"word3 <image> word7 {' '.join(f'word{j + 10}' for j in range(i + 1))} word4 word3{i} word4{i}" for i in
             range(2)]  # fmt: skip
    rows, logits = oracle_of(family, ours, stock, texts, range(2))
    total, counted = naive_loss(logits, [row.ids for row in rows])  # TRL labels placeholders, as for the stock class
    assert math.isclose(loss, total / counted, rel_tol=1e-3)


@pytest.mark.slow
@every_family
def test_trl_dpo(name, tmp_path):
    import trl
    from datasets import Dataset

    family, ours, stock = pair(name)
    data = [{"prompt": asks(i), "chosen": says(f"word3{i} word4{i}"), "rejected": says(f"word5{i}"),
             "images": [picture(i)]} for i in range(2)]  # fmt: skip

    def train(model, reference):
        arguments = trl.DPOConfig(str(tmp_path), per_device_train_batch_size=2, max_length=None, **TRL)
        trainer = trl.DPOTrainer(
            model, reference, arguments, train_dataset=Dataset.from_list(data),
            processing_class=build_processor(family),
        )  # fmt: skip
        trainer.train()
        return next(log for log in trainer.state.log_history if "logps/chosen" in log)

    train(narrow(stock), narrow(stock))
    log = train(narrow(ours), narrow(ours))
    assert math.isclose(log["loss"], math.log(2), rel_tol=1e-3)
    for kind, answers in (("chosen", ["word30 word40", "word31 word41"]),
                          ("rejected", ["word50", "word51"])):  # fmt: skip
        asked = [f"word3 <image> word7 {' '.join(f'word{j + 10}' for j in range(i + 1))} word4" for i in range(2)]
        rows, logits = oracle_of(family, ours, stock, [f"{a} {b}" for a, b in zip(asked, answers)], range(2))
        total = 0.0
        for row, values, answer in zip(rows, logits, answers):
            kept = len(row.ids) - len(answer.split())
            total += naive_loss([values], [[IGNORED] * kept + row.ids[kept:]])[0]
        assert math.isclose(log[f"logps/{kind}"], -total / 2, rel_tol=1e-3)


@pytest.mark.slow
@every_family
def test_trl_grpo(name, tmp_path):
    """The scores of what was sampled are those of the model that sampled it: nothing to correct or clip."""
    import trl
    from datasets import Dataset

    family, ours, stock = pair(name)
    data = Dataset.from_list([{"prompt": asks(i), "image": picture(i)} for i in range(2)])

    def train(model):
        arguments = trl.GRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=5, **TRL
        )
        trainer = trl.GRPOTrainer(
            model, reward_funcs=lambda completions, **kwargs: [float(len(str(c))) for c in completions],
            args=arguments, train_dataset=data, processing_class=build_processor(family),
        )  # fmt: skip
        scored = []
        original = trainer._get_per_token_logps_and_entropies

        def record(*args, **kwargs):
            scored.append((args, kwargs, original(*args, **kwargs)))
            return scored[-1][2]

        trainer._get_per_token_logps_and_entropies = record
        trainer.train()
        return scored

    if name == "Mini-Gemini":  # TRL hands on the pixels that it knows
        for model in (stock, ours):
            with pytest.raises(ValueError, match="high_res_pixel_values is missing"):
                train(narrow(model))
        return
    train(narrow(stock))
    scored = train(narrow(ours))
    assert scored
    for args, kwargs, result in scored:
        check_scores(family, ours, stock, args, kwargs, result)


def check_scores(family, ours, stock, args, kwargs, result):
    """Every completion against its row alone, read back from the padded batch."""
    _, ids, mask, kept = args[:4]
    for at in range(len(ids)):
        real = ids[at][mask[at].bool()].tolist()
        completion = int(mask[at, -kept:].sum())
        seed = 0 if real.count(11) == 0 or 11 not in real[: len(real) - completion] else 1
        words = real_parts(family, real, view_of(family, seed))
        with in_float64():
            (row,) = make_rows(family, ours, [words])
        (values,) = oracle_logits(family, ours, stock, [row])
        for step in range(completion):
            column = len(row.ids) - completion + step
            expected = float(values[column - 1].log_softmax(0)[row.ids[column]])
            assert math.isclose(float(result[0][at, step]), expected, rel_tol=1e-4, abs_tol=1e-4)


def real_parts(family, ids, view):
    """Words and the view of a row of ids."""
    start = next(at for at in range(len(ids)) if tuple(ids[at : at + len(view.ids)]) == view.ids)
    return ids[:start] + [view] + ids[start + len(view.ids) :]
