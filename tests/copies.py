"""Copies of tiny models, which take a sixth of the time that making one takes."""

import copy
import functools
import io
import pickle

import torch


class _Pickler(pickle.Pickler):
    """Leaves tensors where they are, and a number of each in the pickle."""

    def __init__(self, file):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors = []

    def persistent_id(self, value):
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return next(number for number, tensor in enumerate(self.tensors) if tensor is value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, tensors):
        super().__init__(file)
        self.persistent_load = functools.cache(lambda number: copy.deepcopy(tensors[number]))


def remembered(make):
    """`make`, but that equal arguments give copies of what they gave first, and leave the same random state."""
    made = {}

    @functools.wraps(make)
    def copied(*args, **kwargs):
        key = repr((args, sorted(kwargs.items()), torch.get_default_dtype()))
        if key not in made:
            file = io.BytesIO()
            pickler = _Pickler(file)
            pickler.dump(make(*args, **kwargs))
            made[key] = file.getvalue(), pickler.tensors, torch.get_rng_state()
        pickled, tensors, state = made[key]
        torch.set_rng_state(state)
        return _Unpickler(io.BytesIO(pickled), tensors).load()

    return copied
