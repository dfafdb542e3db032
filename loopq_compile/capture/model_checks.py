"""What a model must be before it can be captured: complete, in floating point, on one device, and deterministic."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from loopq_compile.errors import CaptureError, LoopQError

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""PyTorch's wrappers around a model, and the attribute that holds it."""


def check_model(model: object) -> None:
    """Refuses anything but an `nn.Module` with its weights in floating point on one device.

    Raises:
        LoopQError: the message says what the object is and what to pass instead.
    """
    inner = _WRAPPERS.get(type(model).__name__)
    if inner and type(model).__module__.startswith("torch."):
        raise LoopQError(f"model is wrapped in {type(model).__name__}; pass model.{inner}.")
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise LoopQError(f"model must be an instance, not a class; write {model.__name__}(...).")
    if not isinstance(model, nn.Module):
        hint = " Load it first." if isinstance(model, str) else ""
        raise LoopQError(f"model must be a torch.nn.Module; got {type(model).__name__}.{hint}")
    _check_devices(model)
    _check_kinds(model)


def _check_devices(model: nn.Module) -> None:
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    devices |= {str(parameter.device) for parameter in model.parameters()} - {"meta"}
    if len(devices) > 1:
        raise LoopQError(
            f"model is spread over {', '.join(sorted(devices))} (device_map), and a graph runs on one device: load it "
            "without device_map, on the CPU if no accelerator has the memory; torch.bfloat16 halves what it needs."
        )


def _check_kinds(model: nn.Module) -> None:
    """Refuses weights that another library quantized, sharded, or has not made yet."""
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if method is not None:
        raise LoopQError(f"{type(model).__name__} is already quantized ({type(method).__name__}). {_ORIGINAL}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise LoopQError(f"Weight {name!r} has no shape yet (a lazy module); run the model once, then compile it.")
        kind = type(tensor)
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or not _is_plain_function(kind):
            package = kind.__module__.split(".")[0]
            if kind.__name__ == "DTensor":
                raise LoopQError(f"Weight {name!r} is sharded (DTensor); gather it with full_tensor() first.")
            raise LoopQError(f"Weight {name!r} is a {kind.__name__} of {package}: already quantized. {_ORIGINAL}")


_ORIGINAL = "Load the original weights, in floating point: what was rounded once cannot be rounded better."


def _is_plain_function(kind: type[Tensor]) -> bool:
    """Whether operators see tensors of this type as plain ones."""
    return kind.__torch_function__ in (Tensor.__torch_function__, nn.Parameter.__torch_function__)


def check_weights(model: nn.Module) -> None:
    """Refuses weights without data, and values that are not finite.

    Raises:
        LoopQError: names the weight.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise LoopQError(f"Weight {name!r} has no data (it is on the meta device); load the checkpoint first.")
        _check_type(name, tensor.dtype)
        if not (tensor.is_floating_point() and tensor.numel() and tensor.ndim):
            continue
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():
            infinite_mask = isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
            if infinite_mask and not torch.isnan(tensor).any():
                continue  # a causal mask that is stored as a buffer
            raise LoopQError(f"Weight {name!r} contains NaN or infinite values; the checkpoint is damaged.")


def check_deterministic(graph: fx.Graph) -> None:
    """Refuses to calibrate graphs that draw random numbers: teacher and student would disagree by chance.

    Raises:
        CaptureError: names the operator and the model's line.
    """
    for node in graph.nodes:
        if _is_random(node):
            raise CaptureError(
                f"The model draws random numbers ({node.target}) at {_line(node)}. "
                "Calibration compares two runs, which must agree: switch the noise off, or make it an input."
            )


def check_stored_weights(graph: fx.Graph) -> None:
    """Refuses linears whose weights are drawn at random while the model runs: modules that a first call makes.

    Raises:
        CaptureError: names the model's line.
    """
    drawn: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_random(node) or (node.op == "call_function" and any(source in drawn for source in node.all_input_nodes)):
            drawn.add(node)
        if node.target is torch.ops.aten.linear.default and node.args[1] in drawn and node.args[0] not in drawn:
            raise CaptureError(
                f"The model makes weights when it is first called, at {_line(node)}. Run it once with the example "
                "inputs, and compile again."
            )


def _line(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()[-2:]]
    return " ".join(lines) or "an unknown source line"


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _draws(node)


def _draws(node: fx.Node) -> bool:
    """Whether an operator does use random numbers; attention and dropout do so only with a rate above 0."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in arguments}
    given |= {**dict(zip(given, node.args, strict=False)), **node.kwargs}
    rate = given.get("dropout_p", given.get("p", 1.0) if "dropout" in str(node.target) else 1.0)
    return rate != 0 and given.get("train", given.get("training", True)) is not False


def _check_type(name: str, dtype: torch.dtype) -> None:
    """Refuses weights stored in a type that models do not compute in.

    Raises:
        LoopQError: a floating-point type other than float64, float32, bfloat16 and float16.
    """
    if dtype.is_floating_point and dtype not in _PLAIN:
        kind = str(dtype).removeprefix("torch.")
        raise LoopQError(
            f"Weight {name!r} is stored in {kind}, which is quantized already. Load the model in bfloat16 or float32 "
            "(with transformers: dequantize=True in its quantization_config), then compile it."
        )
