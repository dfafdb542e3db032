"""Integer key-value caches: bytes per token and perplexity, by bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from loopq_compile.bench.cells import Values
from loopq_compile.bench.results import Report
from loopq_compile.compiler import compile as compile_model
from loopq_compile.evaluation.perplexity import Remembered, evaluate
from loopq_compile.graph.caches import cache_inputs
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.signature import Signature
from loopq_compile.graph.state import get_state
from loopq_compile.program import Program

COLUMNS = ("scheme", "cache", "bytes a token", "perplexity", "ratio", "KL", "top-1 agreement")


def caches(
    model: nn.Module,
    tokens: Tensor,
    schemes: Sequence[str] = ("w4a8",),
    bits: Sequence[int | None] = (None, 8, 4),
    length: int = 256,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Scores a text with programs that have a key-value cache of each width.

    Attention reads stored values also for a window's own tokens, so reading a window in one call gives the same as
    reading it token by token.

    Args:
        model: a causal language model.
        tokens: ids `[n]`, in windows of `length`.
        schemes: weights are rounded to nearest, data-free.
        bits: widths of keys and values; None for floating point, which comes first and is the reference of KL and
            agreement.

    Raises:
        LoopQError: the model cannot have a cache, or a scheme needs data.
    """
    example = None if hasattr(model, "prepare_inputs_for_generation") else tokens[:length].view(1, -1)
    data: list[Values] = []
    for name in schemes:
        program = compile_model(model, example, scheme=Scheme.parse(name), method="symmetric")
        teacher: Remembered | None = None
        for width in bits:
            say(f"{name}, {width or 'floating point'}")
            cached = program.with_cache(kv_bits=width)
            run = _caller(cached)
            run = run if teacher is not None else Remembered(run)
            score = evaluate(run, tokens, teacher=teacher, length=length, stride=length, batch=1)
            teacher = teacher or run  # type: ignore[assignment]
            about = {"scheme": name, "bits": width, "bytes": token_bytes(get_state(cached.graph_module).signature)}
            data.append({**about, "perplexity": score.perplexity, "kl": score.kl, "agreement": score.agreement})
    rows = []
    for x in data:
        base = next(y["perplexity"] for y in data if y["scheme"] == x["scheme"])
        numbers = [f"{x['bytes']:,.0f}", f"{x['perplexity']:.3f}", f"{x['perplexity'] / base:.4f}"]
        numbers += ["", ""] if x["kl"] is None else [f"{x['kl']:.4f}", f"{x['agreement']:.1%}"]
        rows.append((x["scheme"], f"{x['bits']} bits" if x["bits"] else "float32", *numbers))
    notes = [
        f"{len(tokens):,} tokens in windows of {length}. Bytes of keys, values and scales of one token in all layers "
        "and loops. Ratio, KL and agreement: to the same program with a cache in floating point.",
    ]
    return Report("cache", "Key-value caches", COLUMNS, rows, data, text_columns=2, notes=notes)


def token_bytes(signature: Signature) -> int:
    """Bytes that one token of a sequence takes in the cache of an unrolled program."""
    specs = cache_inputs(signature)[2]
    return sum(math.prod(size for size in s.shape if isinstance(size, int)) * s.dtype.itemsize for s in specs)


def _caller(program: Program) -> Callable[[Tensor], Tensor]:
    """Reads whole windows through the cache; a plain function, so that nothing asks the program for a decoder."""

    def run(ids: Tensor) -> Tensor:
        return program(ids, torch.ones_like(ids))["logits"]

    return run
