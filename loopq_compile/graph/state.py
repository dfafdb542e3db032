"""What passes know beyond the graph, kept in `graph_module.meta["loopq"]`. `Program` is the public view of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from loopq_compile.errors import InternalError
from loopq_compile.graph.loops import LoopStructure, LoopTag
from loopq_compile.graph.names import safe_name, shown_name
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.origin import Origin
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.signature import Signature

_KEY = "loopq"


@dataclass
class LogEntry:
    """What one pass did: its name, whether it changed the graph, and notes for people."""

    pass_name: str
    modified: bool
    notes: list[str] = field(default_factory=list)


@dataclass
class Site:
    """A linear layer, identified by its weight: quantized, or left in floating point for a stated `reason`.

    Args:
        name: dotted name for people, such as `layers.0.mlp.down_proj`.
        weight: parameter name of the weight.
        shape: `(outputs, inputs)`.
        reason: why it stays in floating point, None if it is quantized.
        group: name of its transform-weight group: the linears that read the same tensor.
    """

    name: str
    weight: str
    shape: tuple[int, int]
    reason: str | None = None
    group: str = ""


@dataclass
class RunContext:
    """What passes share while one pipeline runs; it is dropped at the end.

    Args:
        calibration: an iterable of inputs; None if there is no calibration data.
        teacher: the captured graph before any pass, with the same node names; None if no pass needs it.
        targets: stores of the teacher's outputs, by watched nodes; later phases that watch the same nodes reuse them.
        statistics: what `collect-ranges` measured, by group and row of its per-loop table.
        release_model: whether to free each weight of the captured model when its integers are stored.
        snapshot: the `loopq_compile.debugging.Snapshot` from before the running pass; None outside a pipeline.
        notes: lines for the log entry of the pass that is running.
    """

    calibration: Any = None
    teacher: fx.GraphModule | None = None
    targets: dict[tuple[str, ...], Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    release_model: bool = False
    snapshot: Any = None
    notes: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Deletes the files of the stores."""
        for store in self.targets.values():
            store.close()


@dataclass(frozen=True)
class Figure:
    """One measured number of a program.

    Args:
        data: what it was measured on: a text or a task.
        metric: its name.
        details: how much of the data, and how.
        value: the number.
    """

    data: str
    metric: str
    details: str
    value: float


@dataclass
class CompilerState:
    """Compiler state that travels with a graph.

    Args:
        signature: calling convention.
        model_name: class name of the captured model.
        origin: its configuration, and names of tensors that it shares.
        loops: loop structure, empty before `tag-loops`.
        tags: loop tags by node name as `tag-loops` set them; None before it ran.
        scheme: bits and groups; None before a pipeline runs.
        method: name of the pipeline.
        sites: linears by weight name, filled by `annotate-linears`.
        options: options of calibration.
        results: findings of passes by topic, as plain values for JSON.
        log: one entry per pass.
        figures: measured of this very program, kept beside it when it is saved; a pass that changes it drops them.
        run: state of the current run of a pipeline; never saved.
    """

    signature: Signature
    model_name: str
    origin: Origin = field(default_factory=Origin)
    loops: LoopStructure = field(default_factory=LoopStructure)
    tags: dict[str, LoopTag] | None = None
    scheme: Scheme | None = None
    method: str = ""
    sites: dict[str, Site] = field(default_factory=dict)
    options: CalibrationOptions = field(default_factory=CalibrationOptions)
    results: dict[str, Any] = field(default_factory=dict)
    log: list[LogEntry] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    run: RunContext = field(default_factory=RunContext)

    def note(self, text: str) -> None:
        """Adds a line to the log entry of the pass that is running."""
        self.run.notes.append(text)


def attach_state(graph_module: fx.GraphModule, state: CompilerState) -> None:
    """Attaches `state` to `graph_module`."""
    graph_module.meta[_KEY] = state


def get_state(graph_module: fx.GraphModule) -> CompilerState:
    """The state of a captured graph.

    Raises:
        InternalError: the graph did not come from `loopq_compile.capture.to_graph`, or a pass lost the state.
    """
    state = graph_module.meta.get(_KEY)
    if not isinstance(state, CompilerState):
        raise InternalError("This GraphModule has no loopq state; passes must return the module they were given.")
    return state


def copy_nodes(graph: fx.Graph) -> fx.Graph:
    """A graph with copies of all nodes, their metadata shared value by value."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with a fresh state, for another pipeline. Tensors are shared; passes never change them."""
    copied = fx.GraphModule(graph_module, copy_nodes(graph_module.graph))
    state = get_state(graph_module)
    attach_state(copied, CompilerState(state.signature, state.model_name, state.origin))
    return copied


def get_tensor(graph_module: fx.GraphModule, name: str) -> Tensor:
    """Parameter or buffer `name` (dotted) of a graph module."""
    owner: Any = graph_module
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def set_tensor(graph_module: fx.GraphModule, name: str, tensor: Tensor) -> None:
    """Registers a buffer (a parameter if `tensor` is one) under the dotted `name`; creates the modules in between."""
    owner: nn.Module = graph_module
    *path, leaf = name.split(".")
    for part in path:
        if not isinstance(getattr(owner, part, None), nn.Module):
            _forget(owner, part)
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    _forget(owner, leaf)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def _forget(owner: nn.Module, leaf: str) -> None:
    for held in (owner._parameters, owner._buffers, owner._modules):
        held.pop(leaf, None)  # type: ignore[attr-defined]


def remove_tensor(graph_module: fx.GraphModule, name: str) -> None:
    """Removes the parameter or buffer `name` (dotted)."""
    owner, _, leaf = name.rpartition(".")
    delattr(graph_module.get_submodule(owner), leaf)


def free_name(graph_module: fx.GraphModule, name: str) -> str:
    """A target for a new tensor called `name`; a number is added if the graph reads another tensor of that name.

    The end of the name (`_scale`, `.left`) says what the tensor is, and stays.
    """
    name = shown_name(name)
    found, number = safe_name(name), 0
    while _exists(graph_module, found) and _is_used(graph_module, found):
        number += 1
        found = safe_name(_numbered(name, number))
        if _exists(graph_module, found) and _is_used(graph_module, found):  # a tensor where a module is needed
            first, dot, rest = name.partition(".")
            found = safe_name(f"{first}_{number}{dot}{rest}")
    return found


def _numbered(name: str, number: int) -> str:
    *path, leaf = name.split(".")
    stem, _, end = leaf.rpartition("_")
    if stem:
        return ".".join([*path, f"{stem}_{number}_{end}"])
    return ".".join([f"{path[0]}_{number}", *path[1:], leaf]) if path else f"{leaf}_{number}"


def _is_used(graph_module: fx.GraphModule, name: str) -> bool:
    """Whether something reads the tensor `name`, a tensor inside a module of that name, or one above it."""
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            target = str(node.target)
            if target == name or target.startswith(f"{name}.") or name.startswith(f"{target}."):
                return True
    return False


def _exists(graph_module: fx.GraphModule, name: str) -> bool:
    owner: Any = graph_module
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
        if not isinstance(owner, nn.Module):  # there is a tensor where a module is needed
            return True
    return hasattr(owner, leaf)
