"""
A device that only pretends: its tensors hold CPU data and say `pretended`, and it counts what a GPU would do.

`Pretended` counts operations (what launches kernels: neither views nor allocations) and waits of the host: values
read by it, copies between host and device that block, shapes that depend on data, LAPACK calls that check results.
Each comes with the file and line that asked for it, so that a test can name what made it wait. `fp64=False` refuses
fp64, as Apple's MPS does.

    with Pretended() as device:
        select(device.put(views), ...)
    assert not device.waits, device.waits
"""

import collections
import operator
import sys
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def is_autocast_enabled(self):
        return False

    def set_autocast_enabled(self, value):
        pass

    def current_device(self):
        return 0

    def is_bf16_supported(self):
        return True


NAME = "pretended"
backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
VIEWS = set(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "t",
        "transpose",
        "slice",
        "select",
        "expand",
        "unsqueeze",
        "squeeze",
        "permute",
        "split",
        "split_with_sizes",
        "detach",
        "alias",
        "as_strided",
        "unbind",
        "diagonal",
        "view_as",
        "unfold",
        "lift_fresh",
        "_reshape_alias",
        "chunk",
        "movedim",
        "real",
        "is_same_size",
        "squeeze_",
        "unsqueeze_",
        "t_",
        "transpose_",
        "sym_size",
        "size",
        "stride",
        "numel",
        "dim",
        "is_pinned",
    ]
)
ALLOCATIONS = set(
    ["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "resize_"]
)
# What CUDA has to tell the host before it can go on.
READS = set(
    [
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "unique_consecutive",
        "_unique2",
        "bincount",
        "unique_dim",
        "is_nonzero",
        "item",
        "_linalg_eigh",
        "linalg_eigh",
        "linalg_qr",
        "linalg_svd",
        "_linalg_svd",
        "linalg_cholesky",
    ]
)
READS -= {"linalg_qr"}


class PretendedTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=f"{NAME}:0",
            requires_grad=False,
        )

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __init__(self, data):
        self.data_on_cpu = data

    def __repr__(self):
        return f"PretendedTensor({self.data_on_cpu})"

    def tolist(self):
        Pretended.current.note_wait("tolist")
        return self.data_on_cpu.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Pretended.current.run(function, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """
    Attributes:
        operations (`collections.Counter`): of operations, by name.
        waits (`collections.Counter`): of `"what file:line function"`.
        largest (`int`): bytes of the largest tensor that was made.
    """

    current: "Pretended"

    def __init__(self, fp64: bool = True):
        super().__init__()
        self.fp64 = fp64
        self.operations: collections.Counter = collections.Counter()
        self.waits: collections.Counter = collections.Counter()
        self.largest = 0

    def __enter__(self):
        Pretended.current = self
        self._tensor = torch.tensor
        torch.tensor = self._from_list
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self._tensor
        return super().__exit__(*error)

    @staticmethod
    def put(tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the device, without a copy that counts."""
        return PretendedTensor(tensor)

    def note_wait(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame is not None and not _is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        place = (
            "?" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        )
        self.waits[f"{what} {place}"] += 1

    def _read(self, value):
        if not isinstance(value, PretendedTensor):
            return value
        self.note_wait("item")
        return value.data_on_cpu.item()

    def _from_list(self, data, *args, device=None, **kwargs):
        if isinstance(data, (list, tuple)):
            data = [self._read(value) for value in data]
        made = self._tensor(data, *args, **kwargs)
        if device is None or torch.device(device).type != NAME:
            return made
        self.note_wait("copy of a Python list")
        return PretendedTensor(made)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        name = function.overloadpacket.__name__
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        tensors = _has_tensors(args) or _has_tensors(kwargs.values())
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if target == NAME:
            kwargs["device"] = torch.device("cpu")
        if tensors or target == NAME:
            self._count(name, args, kwargs, tensors, target)
        plain_args, plain_kwargs = _plain(args), {key: _plain(value) for key, value in kwargs.items()}
        out = function(*plain_args, **plain_kwargs)
        if not ((tensors and target != "cpu") or target == NAME):
            return out
        if function._schema.name.endswith("_") and isinstance(args[0], PretendedTensor):
            return args[0]
        if plain_kwargs.get("out") is not None:
            return kwargs["out"]
        return self._made(out)

    def _count(self, name, args, kwargs, is_here, target):
        non_blocking = bool(kwargs.get("non_blocking"))
        indices = args[1] if name.lstrip("_").startswith("index") and len(args) > 1 else None
        if name == "_to_copy" and target == NAME and not is_here and not non_blocking:
            self.note_wait("copy to the device")
        elif name == "_to_copy" and target == "cpu" and is_here:
            self.note_wait("copy to the host")
        elif name == "copy_" and isinstance(args[0], PretendedTensor) != isinstance(args[1], PretendedTensor):
            self.note_wait("copy between host and device")
        elif isinstance(indices, (list, tuple)):
            for index in indices:
                if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.note_wait("boolean index")
                elif isinstance(index, torch.Tensor) and not isinstance(index, PretendedTensor):
                    self.note_wait("index from the host")
        elif name == "repeat_interleave" and isinstance(args[0], PretendedTensor):
            self.note_wait("repeat_interleave")
        elif name in READS:
            self.note_wait(name)
        if name not in VIEWS and name not in ALLOCATIONS and name != "_local_scalar_dense":
            self.operations[name] += 1

    def _made(self, value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._made, value))
        if not isinstance(value, torch.Tensor) or isinstance(value, PretendedTensor):
            return value
        if value.dtype == torch.float64 and not self.fp64:
            raise TypeError("This device has no float64.")
        self.largest = max(self.largest, value.untyped_storage().nbytes())
        return PretendedTensor(value)


def _has_tensors(values):
    return any(isinstance(own, (PretendedTensor, list, tuple)) and _plain(own) is not own for own in values)


def _plain(value):
    """`value` with the data of what is of the device; itself where nothing is."""
    if isinstance(value, (list, tuple)):
        plain = [_plain(own) for own in value]
        return type(value)(plain) if any(map(operator.is_not, plain, value)) else value
    return value.data_on_cpu if isinstance(value, PretendedTensor) else value


def _is_ours(file: str) -> bool:
    return "modeling_prunesid" in file or "transformers_modules" in file
