"""
The oracle of the family contract: the models of a row, and the stock class on prompts that are shortened by hand.

The stock class has the same weights. It encodes all tokens itself, and is given the kept rows of its own features.
Logits are compared in float64. `TOLERANCE` is that of layers that upstream computes in float32 all the same (norms,
routers, linear attention, of which sums in another order were 42 steps of float32 apart).
"""

import contextlib
import copy
import functools
import inspect
import itertools

import torch
from families import BOS, EOS, IMAGE, PAD, ROWS, VIDEO

from modeling_prunesid.family import stock_class


TOLERANCE = 128 * torch.finfo(torch.float32).eps  # of the largest logit
NEW_TOKENS = 4


@functools.cache
def build(name):
    """A random model of a row's family, the stock class with its weights, and the row."""
    row = ROWS[name]
    stock = stock_class(row.head)
    torch.manual_seed(0)
    settings = {"budget": row.budget, **row.settings}
    ours = row.head(row.head.config_class(**copy.deepcopy(row.config), prunesid_config=settings)).double().eval()
    reference = stock(stock.config_class(**copy.deepcopy(row.config))).double().eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if not torch.isfinite(parameter).all() or (
                parameter.numel() > 1 and parameter.dim() > 1 and parameter.std() == 0
            ):
                parameter.copy_(0.3 * torch.randn(parameter.shape))  # exact in float32, in which some are loaded
        weight = (ours.get_output_embeddings() or ours.language_model.lm_head).weight
        unlikely = (PAD, EOS, IMAGE, VIDEO, row.token, *row.special)  # never the best of random logits
        weight[[token for token in unlikely if token < len(weight)]] = 0
    reference.load_state_dict(ours.state_dict(), strict=True)
    for model in (ours, reference):
        model.requires_grad_(False)
        if row.prepare is not None:
            row.prepare(model)
    return ours, reference, row


@functools.cache
@torch.no_grad()
def output_of(name):
    """What our class gives for the batch of full prompts. Tests read it alone."""
    ours, _, row = build(name)
    return ours(**prompt(row))


@functools.cache
@torch.no_grad()
def kept_of(name):
    """`keep_indices` of the inputs of the batch."""
    ours, _, row = build(name)
    return encode_ours(ours, row)["keep_indices"]


@functools.cache
@torch.no_grad()
def shortened_of(name):
    """For each row of the batch the stock class's arguments for its short prompt, and the mask of its columns."""
    _, reference, row = build(name)
    return hand_shortened(reference, row, kept_of(name))


def base_of(model):
    return getattr(model, "model", model)


def rows_of(row):
    """The indices of the inputs of each row of the batch."""
    ends = torch.tensor(row.rows).cumsum(0).tolist()
    return [list(range(end - count, end)) for count, end in zip(row.rows, ends)]


def write(row, indices, counts, answer=0):
    """The ids of one row of the batch, with so many placeholders for its inputs."""
    ids = [BOS]
    for index, count in zip(indices, counts):
        ids += [5 + index, *row.write(count, index, row.token)]
    return ids + [7, 8, 9][: 3 - answer]


def batch(rows):
    """`input_ids` and `attention_mask` of rows of different lengths, padded on the left."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows]),
    }


def prompt(row, layout=None):
    """The arguments of our classes for a batch of full prompts."""
    layout = rows_of(row) if layout is None else layout
    texts = [write(row, own, [row.tokens[index] for index in own], place) for place, own in enumerate(layout)]
    inputs = batch(texts)
    return {**inputs, **row.along(inputs["input_ids"]), **row.inputs(layout)}


def for_stock(row, inputs):
    return {name: value for name, value in inputs.items() if name not in row.ours}


def encode_ours(model, row, **ours):
    """What our encoder gives for the inputs of the batch."""
    encode = getattr(base_of(model), f"get_{row.modality}_features")
    return encode(**row.inputs(rows_of(row)), **ours, return_dict=True)


def encode(model, row):
    """What the stock class puts into prompts for the inputs of the batch."""
    inputs = for_stock(row, row.inputs(rows_of(row)))
    if row.stock_encodes_as_images:
        return base_of(model).get_image_features(inputs["pixel_values_videos"], return_dict=True)
    mask = inputs.pop("video_compression_mask", None)
    output = getattr(base_of(model), f"get_{row.modality}_features")(**inputs, return_dict=True)
    if mask is not None:  # upstream's `forward` applies it
        output.pooler_output = [torch.cat(list(output.pooler_output))[mask]]
    return output


def shorten(row, ids, kept):
    """Which of the ids `(length,)` of one row remain: a mask."""
    keep = torch.ones_like(ids, dtype=torch.bool)
    flags = []
    for index, indices in kept.items():
        flag = torch.zeros(row.tokens[index], dtype=torch.bool)
        flag[indices[indices >= 0]] = True
        if row.several_runs:
            flag = level(row, flag, row.write(len(flag), index, row.token))
        flags.append(flag)
    keep[ids == row.token] = torch.cat(flags)
    return keep


def level(row, flag, ids):
    """The placeholders that stay where a view is several runs: equal shares of each, remainders to the first ones."""
    lengths = [
        len(list(group)) for is_token, group in itertools.groupby(token == row.token for token in ids) if is_token
    ]
    of_run = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    levelled = torch.zeros_like(flag)
    for view in torch.arange(len(flag)).split(row.view_length or len(flag)):
        own = [view[of_run[view] == run] for run in of_run[view].unique()]
        assert len({len(places) for places in own}) == 1
        share, rest = divmod(int(flag[view].sum()), len(own))
        for number, places in enumerate(own):
            levelled[places[: share + (number < rest)]] = True
    return levelled


def hand_shortened(reference, row, kept):
    output = encode(reference, row)
    shortened = []
    for place, own in enumerate(rows_of(row)):
        ids = torch.tensor([write(row, own, [row.tokens[index] for index in own], place)])
        along = row.along(ids)
        keep = shorten(row, ids[0], {index: kept[index] for index in own})
        arguments = {
            "input_ids": ids[:, keep],
            "attention_mask": torch.ones_like(ids[:, keep]),
            **{name: value[:, keep] for name, value in along.items()},
        }
        if row.mrope:
            arguments["position_ids"] = positions(reference, row, ids, along, place)[0][..., keep]
        encoded = copy.copy(output)
        put(row, encoded, output, own, kept)
        arguments["mm_encoder_outputs"] = {row.modality: encoded}
        shortened.append((arguments, keep))
    return shortened


def put(row, encoded, output, own, kept):
    """Replaces what the stock class puts into prompts by the kept rows of some inputs."""

    def choose(entries):
        every = torch.cat(list(entries)).split(list(row.tokens[: row.num_inputs]))
        return [every[index][kept[index]] for index in own]

    if row.put_features is not None:
        row.put_features(encoded, output, choose)
        return
    chosen = choose(output.pooler_output)
    encoded.pooler_output = torch.cat(chosen)[None] if isinstance(output.pooler_output, torch.Tensor) else chosen
    if output.get("deepstack_features") is not None:
        encoded.deepstack_features = [choose(layer) for layer in output.deepstack_features]


def positions(reference, row, ids, along, place):
    """The stock class's own positions of a full prompt, and the deltas behind it."""
    inputs = row.inputs([rows_of(row)[place]])
    names = inspect.signature(reference.model.get_rope_index).parameters
    inputs["second_per_grids"] = inputs.get("video_second_per_grid")
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **along, **inputs}
    return reference.model.get_rope_index(**{name: value for name, value in arguments.items() if name in names})


def fresh(arguments):
    """Arguments of one call: upstream changes the encoder's outputs that it is given."""
    outputs = {name: copy.copy(output) for name, output in arguments["mm_encoder_outputs"].items()}
    return {**arguments, "mm_encoder_outputs": outputs}


def close(ours, theirs, tolerance=TOLERANCE):
    return float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


@contextlib.contextmanager
def settings_of(model, **changes):
    """Other settings for a while, of a model that other tests share."""
    settings = model.config.prunesid_config
    saved = {name: getattr(settings, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(settings, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(settings, name, value)
