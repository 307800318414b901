"""How often the host waits for the pretended device: our class and the stock one."""

import random

import torch
from oracle_prompt import FAMILIES
from pretended_device import Pretended, PretendedTensor


def put(values):
    return {
        name: PretendedTensor(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()
    }


def put_model(model):
    with Pretended():
        for module in model.modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    moved = PretendedTensor(value.detach())
                    module._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
            for name, value in list(module._buffers.items()):
                if value is not None:
                    module._buffers[name] = PretendedTensor(value)
    return model


def pair(name, **settings):
    family = FAMILIES[name]
    ours = family.build()
    stock = family.stock(ours)
    for setting, value in settings.items():
        setattr(ours.config.prunesid_config, setting, value)
    return family, put_model(ours.float()), put_model(stock.float())


def views_of(family, count):
    if family.name == "LLaVA-NeXT":
        return [family.view_of(size, seed) for seed, size in enumerate([(40, 50), (30, 90), (60, 30)][:count])]
    if family.is_qwen:
        return [
            family.view_of("image", grid, seed)
            for seed, grid in enumerate([(1, 8, 12), (1, 4, 12), (1, 6, 16)][:count])
        ]
    return [family.view(random.Random(seed)) for seed in range(count)]


def batch_of(family, count):
    """One row of one view, or two rows of one and two, padded on the left."""
    views = views_of(family, count)
    rows = [[1, 5, *views[0].ids, 7, 8]]
    if count > 1:
        rows.append([1, *views[1].ids, 6, *views[2].ids, 9])
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    pixels = in_float32(family.pixels(views))
    return {"input_ids": ids, "attention_mask": mask, **family.types(ids), **pixels}


def in_float32(values):
    return {name: value.float() if value.is_floating_point() else value for name, value in values.items()}


def waits(run):
    with torch.no_grad(), Pretended() as device:
        run()
    return device.waits
