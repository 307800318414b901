"""Whether the weights of a model are those of the base that a thin variant takes them from. It does not travel."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from .repo_files import read_fields


def check_weights(model: Any, base: str, source: dict[str, Any]) -> None:
    """
    Raise a `ValueError` unless every weight of the model is the base's, bit for bit in the model's dtype.

    Names differ by what upstream renames when it loads: the base's tensor is the one of the same shape that shares
    most of the last parts of the name, or any of those that share as many. Tied weights count as one. Weights that
    are not found so are compared in the layout in which upstream saves them (a merged tensor of experts is one for
    each expert in the files).
    """
    quantised = getattr(model, "hf_quantizer", None) is not None
    of_base = _BaseWeights(base, source)
    verdicts: dict[Any, bool] = {}
    names: dict[Any, list[str]] = {}
    for name, identity, tensor in _weights_in(model):
        if quantised and not (type(tensor) is torch.Tensor and tensor.is_floating_point()):
            continue
        if quantised and not of_base.nearest(name, tensor):
            continue
        names.setdefault(identity, []).append(name)
        if not verdicts.get(identity):
            verdicts[identity] = of_base.holds(name, tensor)
    wanted = {name for key, is_same in verdicts.items() if not is_same for name in names[key]}
    if wanted:
        weights = {name: tensor for name, _, tensor in _weights_in(model) if name in wanted}
        try:
            saved = revert_weight_conversion(model, weights)
        except NotImplementedError:  # a conversion that upstream cannot revert
            saved = weights
        if sum(map(torch.numel, saved.values())) < sum(map(torch.numel, weights.values())):
            saved = weights
        names_here = {tensor.data_ptr(): name for name, tensor in weights.items()}
        found: dict[int, bool] = {}
        shown: dict[int, str] = {}
        for name, own in saved.items():  # tied weights have one address
            place = own.data_ptr()
            shown.setdefault(place, names_here.get(place, name))
            found[place] = found.get(place, False) or of_base.holds(name, own)
        differ = [shown[place] for place, is_same in found.items() if not is_same]
        if differ:
            raise ValueError(
                f"thin=True saves no weights, but {len(differ)} of this model's are not those of its base {base!r}, "
                f"for example {', '.join(differ[:3])}: they were trained, merged, resized or loaded from elsewhere. "
                "Save the model with its weights (thin=False)."
            )


class _BaseWeights:
    """The weights in the files of a base, by their names there."""

    def __init__(self, base: str, source: dict[str, Any]):
        self._weights = _weights_of(base, source)
        self._by_last: dict[str, list[str]] = {}
        for name in self._weights:
            self._by_last.setdefault(name.rpartition(".")[2], []).append(name)

    def nearest(self, name: str, tensor: torch.Tensor) -> list[str]:
        """Those of the shape of `tensor` whose names share most of the last parts of `name`."""
        shares = {other: _shared_parts(name, other) for other in self._by_last.get(name.rpartition(".")[2], [])}
        shares = {other: count for other, count in shares.items() if self._weights[other][0] == tuple(tensor.shape)}
        return [other for other, count in shares.items() if count == max(shares.values())]

    def holds(self, name: str, tensor: torch.Tensor) -> bool:
        return any(_is_same(self._weights[other][1](), tensor) for other in self.nearest(name, tensor))


def _shared_parts(name: str, other: str) -> int:
    count = 0
    for ours, theirs in zip(reversed(name.split(".")), reversed(other.split("."))):
        if ours != theirs:
            break
        count += 1
    return count


def _is_same(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    theirs, ours = (value.contiguous().reshape(-1).view(torch.uint8) for value in (theirs.to(ours.dtype), ours.cpu()))
    return torch.equal(theirs, ours)


def _weights_in(model: Any) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """
    Name, identity and value of what would be saved. Tied weights have one identity; those that are offloaded or spread
    over devices are brought together one at a time.
    """
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            from accelerate.utils import align_module_device

            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            with align_module_device(module, "cpu"):
                yield name, name, getattr(module, leaf).detach().clone()
        elif hasattr(tensor, "full_tensor"):
            yield name, name, tensor.full_tensor()
        else:
            yield name, (tensor.data_ptr() or name, tuple(tensor.shape)), tensor.detach()


def _weights_of(base: str, source: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Shape of each of the base's weights and what reads it, by its name in the files."""
    weights: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {}
    for path in _weight_files(base, source):
        if path.endswith(".safetensors"):
            file = safe_open(path, "pt")
            for name in file.keys():  # noqa: SIM118
                weights[name] = (
                    tuple(file.get_slice(name).get_shape()),
                    lambda file=file, name=name: file.get_tensor(name),
                )
        else:
            for name, tensor in torch.load(path, map_location="cpu", mmap=True, weights_only=True).items():
                weights[name] = tuple(tensor.shape), lambda tensor=tensor: tensor
    return weights


def _weight_files(base: str, source: dict[str, Any]) -> list[str]:
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        path = cached_file(base, single, _raise_exceptions_for_missing_entries=False, **source)
        if path is not None:
            return [path]
        fields = read_fields(base, index, source)
        if fields is not None:
            shards = sorted(set(fields["weight_map"].values()))
            return [cached_file(base, shard, **source) for shard in shards]
    raise OSError(
        f"thin=True compares the weights with those of the base, but {base!r} has no {SAFE_WEIGHTS_NAME}. Name a base "
        "that has weights, or save the model with its own (thin=False)."
    )
