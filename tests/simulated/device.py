"""A simulated accelerator: a device named `sim` that keeps its numbers in memory and refuses to mix with the CPU.

With CUDA an operator fails if its tensors lie on different devices, if it draws random numbers for one device from a
generator of another, or if NumPy asks for the memory of a GPU. So does this device, on a machine without any. It shows
where code forgets to place a tensor. It has no streams, no limit of memory, and none of a GPU's rounding: what passes
here may still fail on CUDA.

    with simulated():
        model.to(DEVICE)  # modules move like to any device
        torch.ones(3, device=DEVICE) + torch.ones(3)  # RuntimeError

A tensor of the device is a `SimTensor`, whose `held` is the CPU tensor with its numbers. PyTorch knows it under the
device type that it reserves for other vendors ("PrivateUse1"), so `torch.export`, autograd and optimizers take it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "sim"
_aten = torch.ops.aten
_CPU_INDICES = {
    *(_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default),
    *(_aten._index_put_impl_.default, _aten._unsafe_index.Tensor),
}
"""Operators that take indices from the CPU for a tensor elsewhere, as CUDA's do."""


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """What PyTorch asks of `torch.sim`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast runs, and casts nothing


class SimTensor(Tensor):
    """A tensor of the simulated device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SimTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; use Tensor.cpu() first.")

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {NAME}"


class Mixed(RuntimeError):
    """What CUDA would have refused."""


@contextlib.contextmanager
def simulated() -> Iterator[torch.device]:
    """Inside, tensors can be made on, and moved to, the simulated device."""
    with _FromLists(), _Mode():
        yield DEVICE


class _FromLists(TorchFunctionMode):
    """`torch.tensor(numbers, device="sim")`: PyTorch writes numbers into memory without calling an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and device is not None and _is_ours(device):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device") if not _is_tracing() else None
        if any(issubclass(kind, SimTensor) for kind in types) or (device is not None and _is_ours(device)):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _is_tracing() -> bool:
    """Whether PyTorch makes tensors without values, on whatever device, by itself."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _is_ours(device: Any) -> bool:
    return torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = _leaves((*args, *kwargs.values()), [])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    for tensor in tensors:
        if isinstance(tensor, FakeTensor):
            return _run_without_values(func, args, kwargs, tensor)
    ours = [tensor for tensor in tensors if isinstance(tensor, SimTensor)]
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    there = _is_ours(device) if device is not None else bool(ours)
    if func is _aten._to_copy.default:
        copied = func(_held(args[0]), **kwargs)
        return SimTensor(copied) if there else copied
    if func is _aten.copy_.default:
        _held(args[0]).copy_(_held(args[1]))
        return args[0]
    if func is _aten._local_scalar_dense.default:
        return func(_held(args[0]))
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise Mixed(f"Expected a '{NAME}' device type for generator but found 'cpu': {func}")
    if ours and len(ours) < len(tensors):
        _refuse_mixed(func, args, tensors)
    results = func(*_map(_held, args), **_map(_held, kwargs))
    own = {id(tensor.held): tensor for tensor in ours}  # operators in place return their own argument
    return _map(lambda x: own[id(x)] if id(x) in own else SimTensor(x), results, Tensor) if there else results


def _refuse_mixed(func: Any, args: Any, tensors: list[Tensor]) -> None:
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, SimTensor) and tensor.ndim]
    if elsewhere and not (func in _CPU_INDICES and isinstance(args[0], SimTensor)):
        raise Mixed(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu: {func}")


def _run_without_values(func: Any, args: Any, kwargs: dict[str, Any], fake: FakeTensor) -> Any:
    """Shapes and devices only, where PyTorch traces: its own rules for devices hold."""
    mode = fake.fake_mode

    def without_values(x: SimTensor) -> Any:
        return FakeTensor(mode, x.held.to("meta"), DEVICE)

    with mode:
        return func(*_map(without_values, args), **_map(without_values, kwargs))


def _held(tensor: SimTensor) -> Tensor:
    return tensor.held if isinstance(tensor, SimTensor) else tensor


def _map(function: Any, value: Any, kind: type = SimTensor) -> Any:
    """`value`, what operators take or return, with `function` applied to everything of a `kind` in it."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)([_map(function, item, kind) for item in value])
    if isinstance(value, dict):
        return {key: _map(function, item, kind) for key, item in value.items()}
    return value


def _leaves(values: Any, found: list[Any]) -> list[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            _leaves(value, found)
        else:
            found.append(value)
    return found
