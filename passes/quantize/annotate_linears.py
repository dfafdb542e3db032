"""`annotate-linears`: decides which linears are quantized, and which share an input."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import fx

from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.graph.keys import SITE
from loopq_compile.graph.names import shown_name
from loopq_compile.graph.recurrence import MATRIX_PRODUCTS
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import CompilerState, Site, get_tensor
from loopq_compile.passes.base import Pass, PassResult
from loopq_compile.passes.quantize.other_products import OTHER_PRODUCTS, other_products

_aten = torch.ops.aten
LARGEST_GATE = 8
"""Linears with at most this many outputs (exit gates, routers) stay in floating point."""
HEADS = ("lm_head", "*.lm_head", "embed_out", "*.embed_out")


class AnnotateLinears(Pass):
    """Lists the linears in `state.sites` and marks their nodes with `node.meta[SITE]`.

    Before: linears are `aten.linear` with a weight as second argument. After: the same graph; every weight of a linear
    has a `Site`, which is quantized or has a reason why not. It belongs to a transform-weight group: the linears
    that read the same tensor.

    Left in floating point by default: language-model heads (tied to an embedding, or with as many outputs as an
    embedding has rows and no product after them), gates, and linears that do not depend on the input tokens (time
    embeddings, modulation).
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        if self.state(graph_module).scheme is None:
            raise LoopQError("annotate-linears needs a scheme; run it in a pipeline.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        state = self.state(graph_module)
        assert state.scheme is not None
        calls = linear_calls(graph_module.graph)
        state.sites = {}
        vocabularies = _vocabularies(graph_module)
        for weight, nodes in calls.items():
            shape = tuple(get_tensor(graph_module, weight).shape)
            site = Site(shown_name(weight).removesuffix(".weight"), weight, (shape[0], shape[1]))
            site.reason = _default_reason(graph_module, weight, nodes, vocabularies)
            state.sites[weight] = site
            for node in nodes:
                node.meta[SITE] = site.name
        _apply_patterns(state.sites.values(), state.scheme)
        _leave_misfits(state.sites.values(), state.scheme)
        _name_groups(state, calls)
        self._report(state, graph_module)
        return PassResult(graph_module, False)

    def _report(self, state: CompilerState, graph_module: fx.GraphModule) -> None:
        quantized = [site for site in state.sites.values() if site.reason is None]
        if not quantized:
            found = {site.name: site.reason for site in state.sites.values()} | other_products(graph_module)
            reasons = "; ".join(f"{name}: {why}" for name, why in found.items()) or "it has no linear layer"
            raise LoopQError(f"There is nothing to quantize in {state.model_name}: {reasons}.")
        state.note(f"{len(quantized)} linears quantized in {len({site.group for site in quantized})} groups")
        for site in state.sites.values():
            if site.reason is not None:
                state.note(f"{site.name} stays in floating point: {site.reason}")
        others = other_products(graph_module)
        state.results[OTHER_PRODUCTS] = others
        for weight, why in others.items():
            state.note(f"{weight} stays in floating point: {why}")


def linear_calls(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The linear nodes of every weight that is a plain parameter."""
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is _aten.linear.default and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr":
            calls[str(node.args[1].target)].append(node)
    return dict(calls)


def _vocabularies(graph_module: fx.GraphModule) -> set[int]:
    """Row counts of the tables that an input indexes."""
    return {
        get_tensor(graph_module, str(node.args[0].target)).shape[0]
        for node in graph_module.graph.nodes
        if node.target is _aten.embedding.default
        and node.args[0].op == "get_attr"
        and node.args[1].op == "placeholder"  # not tables of positions or types
    }


def _default_reason(
    graph_module: fx.GraphModule, weight: str, nodes: list[fx.Node], vocabularies: set[int]
) -> str | None:
    tensor = get_tensor(graph_module, weight)
    if tensor.ndim != 2 or not tensor.is_floating_point():
        return f"its weight is {tensor.ndim}-dimensional {tensor.dtype}"
    uses = nodes[0].args[1].users  # type: ignore[union-attr]
    if any(user.target is _aten.embedding.default for user in uses):
        return "tied to an embedding"
    other = next((user for user in uses if user.target is not _aten.linear.default), None)
    if other is not None:
        return f"its weight is also used by {other.target}"
    if not tensor.numel():
        return "its weight is empty"
    if tensor.shape[0] <= LARGEST_GATE:
        return f"a gate with {tensor.shape[0]} output{'s' if tensor.shape[0] != 1 else ''}"
    name = shown_name(weight).removesuffix(".weight")
    if any(fnmatchcase(name, head) for head in HEADS):
        return "a language-model head"
    if tensor.shape[0] in vocabularies and not any(_feeds_a_product(node) for node in nodes):
        return "a language-model head"
    if not any(_depends_on_input(node.args[0]) for node in nodes):
        return "it does not depend on the input"
    return None


def _depends_on_input(start: object) -> bool:
    """Whether values (not only sizes) of an input reach `start`."""
    stack, seen = [start], set()
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            return True
        if node.target is not _aten.sym_size.int:
            stack.extend(node.all_input_nodes)
    return False


def _feeds_a_product(start: fx.Node) -> bool:
    """Whether another matrix product depends on `start`; this holds for all but a model's last layer."""
    stack, seen = list(start.users), set[fx.Node]()
    while stack:
        node = stack.pop()
        if node.target in MATRIX_PRODUCTS:
            return True
        stack.extend(user for user in node.users if user not in seen)
        seen.update(node.users)
    return False


def _apply_patterns(sites: Iterable[Site], scheme: Scheme) -> None:
    sites = list(sites)
    for field, patterns in (("skip", scheme.skip), ("quantize", scheme.quantize)):
        for pattern in patterns:
            matched = [site for site in sites if fnmatchcase(site.name, pattern)]
            if not matched:
                leaves = {site.name.rpartition(".")[2] for site in sites}
                hint = did_you_mean(pattern.rpartition(".")[2], leaves)
                raise LoopQError(f"Scheme({field}=...): no linear is called {pattern!r}.{hint}")
            for site in matched:
                site.reason = f"skip={pattern!r}" if field == "skip" else None


def _leave_misfits(sites: Iterable[Site], scheme: Scheme) -> None:
    """Leaves linears in floating point if the group size does not divide their inputs, as with adapters of a low rank.

    Raises:
        LoopQError: that would leave nothing to quantize, or `Scheme(quantize=...)` names one of them.
    """
    candidates = [site for site in sites if site.reason is None]
    misfits = [site for site in candidates if scheme.group_size != -1 and site.shape[1] % scheme.group_size]
    named = [site for site in misfits if any(fnmatchcase(site.name, pattern) for pattern in scheme.quantize)]
    if named or (misfits and len(misfits) == len(candidates)):
        site = (named or misfits)[0]
        inputs = site.shape[1]
        fitting = [size for size in range(2, inputs + 1) if inputs % size == 0]
        near = sorted(sorted(fitting, key=lambda size: abs(size - scheme.group_size))[:4])
        sizes = f"{' or '.join(map(str, near))}, -1" if near else "-1"
        raise LoopQError(
            f"group_size={scheme.group_size} does not divide the {inputs} inputs of {site.name!r}. Use group_size "
            f"{sizes} for whole rows, or leave it out: Scheme(skip=({site.name!r},))."
        )
    for site in misfits:
        site.reason = f"group_size={scheme.group_size} does not divide its {site.shape[1]} inputs"


def _name_groups(state: CompilerState, calls: dict[str, list[fx.Node]]) -> None:
    """Linears that read one tensor in any loop form a group; its name lists them."""
    parent = {weight: weight for weight in calls}

    def root(weight: str) -> str:
        while parent[weight] != weight:
            weight = parent[weight]
        return weight

    reader: dict[object, str] = {}
    for weight, nodes in calls.items():
        if state.sites[weight].reason is None:
            for node in nodes:
                parent[root(weight)] = root(reader.setdefault(node.args[0], weight))
    members: dict[str, list[Site]] = defaultdict(list)
    for weight in calls:
        if state.sites[weight].reason is None:
            members[root(weight)].append(state.sites[weight])
    for sites in members.values():
        names = [site.name for site in sites]
        prefix = _common_module(names)
        group = prefix + "+".join(name.removeprefix(prefix) for name in names)
        for site in sites:
            site.group = group


def _common_module(names: list[str]) -> str:
    """The longest dotted prefix of all `names`, with its last dot; "" if there is none."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0] + ".")
    return "".join(shared)
