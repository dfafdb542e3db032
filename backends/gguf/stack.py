"""Which layers stand in a file, and how llama.cpp runs them."""

from __future__ import annotations

from dataclasses import dataclass, field

from loopq_compile.backends.gguf.architectures import Architecture
from loopq_compile.backends.gguf.contents import Contents
from loopq_compile.errors import LoopQError

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Stack:
    """Layers of a file.

    Args:
        stored: their names in the program, in the order of the file; a name may stand several times.
        runs: how many layers run.
        blocks: what llama.cpp takes as `block_count`.
        keys: further metadata, without the architecture's name.
    """

    stored: tuple[str, ...]
    runs: int
    blocks: int
    keys: dict[str, int | bool] = field(default_factory=dict)


def read_stack(contents: Contents, architecture: Architecture) -> Stack:
    """The layers to store, and the numbers of loops that the engine is told.

    Raises:
        LoopQError: the engine does not run layers, or the final norm, in the program's order.
    """
    for name in (EMBEDDINGS, *([NORM] if architecture.norm else [])):
        if name not in contents.tensors:
            raise LoopQError(f"The program has no {name!r}, so it is not {architecture.name}. Export it as ONNX.")
    if architecture.loops == "stack":
        found = _in_turn(contents)
    elif architecture.loops == "cycles":
        found = _in_cycles(contents.order)
    else:
        order = contents.order
        found = Stack(order, len(order), len(order)) if contents.uses[NORM] == 1 else None
    if found is None:
        norms = f" with the final norm {contents.uses[NORM]} times" if architecture.norm else ""
        raise LoopQError(
            f"llama.cpp's {architecture.name} does not run layers {list(contents.order)}{norms}. Export the program as "
            "ONNX."
        )
    return found


def _in_turn(contents: Contents) -> Stack | None:
    """All layers in turn, several times, with the final norm after every loop or after the last one."""
    order, norms = contents.order, contents.uses[NORM]
    once = tuple(dict.fromkeys(order))
    loops = len(order) // max(len(once), 1)
    if order != once * loops or norms not in (1, loops):
        return None
    return Stack(once, len(order), len(once), {"num_loops": loops, "skip_loop_final_norm": norms == 1})


def _in_cycles(order: tuple[str, ...]) -> Stack | None:
    """A low stack some times, then a high stack of as many layers, and all of this again.

    llama.cpp stores the low stack first, and counts as blocks the layers that run: each has a cache of its own.
    """
    once = tuple(dict.fromkeys(order))
    size = len(once) // 2
    low, high = once[:size], once[size:]
    if not size or len(high) != size:
        return None
    outer = order.count(high[0])
    inner = order.count(low[0]) // outer
    if order != (low * inner + high) * outer:
        return None
    keys: dict[str, int | bool] = {"hrm.layers_per_stack": size, "hrm.h_cycles": outer, "hrm.l_cycles": inner}
    return Stack(once, len(order), len(order), keys)
