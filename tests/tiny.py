"""Tiny random LLaVA models with their prompts, and an oracle made of stock classes. Needs no network."""

import torch
from copies import remembered
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_prunesid import (
    LayerPrunedLlavaConfig,
    LayerPrunedLlavaForConditionalGeneration,
    PruneSIDLlavaConfig,
    PruneSIDLlavaForConditionalGeneration,
)
from modeling_prunesid.select_tokens import select_tokens


PAD, BOS, EOS, IMAGE = 0, 1, 2, 100
IMAGE_SIZE, PATCH_SIZE = 28, 4
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
BUDGET = 8

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "projection_dim": 32,
    "initializer_range": 0.3,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}


def build_config(budget=BUDGET, vision=None, text=None, config_class=PruneSIDLlavaConfig, **settings):
    """A configuration of 49 patches an image; `settings` are fields of `PruneSIDConfig`."""
    return config_class(
        vision_config={**VISION, **(vision or {})},
        text_config={**TEXT, **(text or {})},
        image_token_index=IMAGE,
        image_seq_length=NUM_PATCHES,
        prunesid_config={"budget": budget, **settings},
    )


def answering(model, *unlikely):
    """A random model in float64 whose answers depend on its images and have none of the `unlikely` words."""
    model = model.double().eval()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(20)
        model.lm_head.weight[list(unlikely)] = 0  # never the best of 120 random logits
    return model


@remembered
def build(budget=BUDGET, seed=0, model_class=PruneSIDLlavaForConditionalGeneration, **config):
    """A random model of ours whose answers depend on its images and end at `max_new_tokens`."""
    torch.manual_seed(seed)
    return answering(model_class(build_config(budget, **config)), PAD, EOS, IMAGE)


def build_layer_pruned(budget, llm_budget, **config):
    """The same, which drops tokens inside its language model too."""
    classes = {"config_class": LayerPrunedLlavaConfig, "model_class": LayerPrunedLlavaForConditionalGeneration}
    return build(budget, llm_budget=llm_budget, **classes, **config)


@remembered
def random_model(model_class, fields):
    return model_class(model_class.config_class(**fields)).eval()


def stock_fields(config):
    ours = ("prunesid_config", "vitcop_config", "model_type")
    return {name: value for name, value in config.to_dict().items() if name not in ours}


def stock_twin(model, model_class=None):
    """The stock class, by default that which the class of `model` extends, with the same weights."""
    classes = (base for base in type(model).__mro__ if base.__module__.startswith("transformers.models."))
    stock = random_model(model_class or next(classes), stock_fields(model.config)).to(model.dtype)
    stock.load_state_dict(model.state_dict())
    return stock


def pixels(num_images, seed=0):
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def prompt(counts, text):
    """Token ids of one row: `counts` placeholders of each image, with a word before each, then the text."""
    ids = [BOS]
    for image, count in enumerate(counts):
        ids += [5 + image] + [IMAGE] * count
    return ids + list(text)


def batch(rows, side="left"):
    """`input_ids` and `attention_mask` of rows of different lengths."""
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        padding, ones = [PAD] * (length - len(row)), [1] * len(row)
        ids.append(padding + row if side == "left" else row + padding)
        mask.append([0] * len(padding) + ones if side == "left" else ones + [0] * len(padding))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def new_tokens(model, inputs, **kwargs):
    """What `generate` adds; what comes before it must be the caller's prompt."""
    output = model.generate(**inputs, **kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    ids = inputs["input_ids"]
    callers = ids.repeat_interleave(len(sequences) // len(ids), 0)
    assert torch.equal(sequences[:, : ids.shape[1]], callers)
    return sequences[:, ids.shape[1] :]


@torch.no_grad()
def oracle_features(stock, pixel_values, budgets=BUDGET):
    """What the stock parts give for the kept tokens: every layer of the tower runs, one image after the other."""
    if isinstance(budgets, int):
        budgets = [budgets] * len(pixel_values)
    features, indices = [], []
    for image, budget in zip(pixel_values, budgets):
        states = stock.model.vision_tower(image[None], output_hidden_states=True).hidden_states
        kept = select_tokens(states[-2][:, 1:], budget).indices[0]
        features.append(stock.model.multi_modal_projector(states[-2][0, 1:][kept]))
        indices.append(kept)
    return BaseModelOutputWithPooling(pooler_output=features), indices


def oracle_features_of_rows(stock, rows, pixel_values, budgets=BUDGET):
    """
    The same, in one piece for each row that has images: for beams, Transformers 5.18 repeats the pieces of a row one
    by one, and so mixes up the images of a row that has several.
    """
    features, _ = oracle_features(stock, pixel_values, budgets)
    counts = [row.count(IMAGE) for row in rows if IMAGE in row]
    features.pooler_output = list(torch.cat(features.pooler_output).split(counts))
    return features


def oracle_generate(stock, rows, pixel_values, budgets=BUDGET, side="left", **kwargs):
    """The new tokens of the stock `generate`, on short prompts and features of the kept tokens."""
    inputs = batch(rows, side)
    features = oracle_features_of_rows(stock, rows, pixel_values, budgets)
    output = stock.generate(**inputs, mm_encoder_outputs={"image": features}, **kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences[:, inputs["input_ids"].shape[1] :]


def image_features_of(output):
    """The rows `(tokens, hidden_size)` that an output says it put into the prompt, of every image in turn."""
    outputs = output.get("image_outputs")  # from Transformers 5.24 on
    features = output.image_hidden_states if outputs is None else outputs.pooler_output
    return features if isinstance(features, torch.Tensor) else torch.cat(list(features))


def of_kept(states, keep_mask, side="left", fill=0):
    """The kept columns of `(batch, length, ...)` rows, padded to the longest."""
    rows = [row[kept] for row, kept in zip(states, keep_mask)]
    if side == "right":
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    return torch.nn.utils.rnn.pad_sequence([row.flip(0) for row in rows], batch_first=True, padding_value=fill).flip(1)
