"""Speculation: tokens a second against decoding one by one, and what its calls cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loopq_compile.bench.cells import Values
from loopq_compile.bench.results import Report
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import compile as compile_model
from loopq_compile.errors import LoopQError
from loopq_compile.generation.speculation import LOOKUP, Speculation
from loopq_compile.generation.text_reader import CachedText
from loopq_compile.graph.scheme import Scheme
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.pipeline import Pipeline
from loopq_compile.program import Program

FLOAT = "float32"
"""Instead of a scheme: the model as it is."""
COLUMNS = ("runs", "tokens a second", "times plain", "tokens a step", "acceptance", "same text")
COSTS = ("call", "ms", "plain steps", "break-even acceptance")
WIDTHS = (2, 4, 8)


def program_of(model: nn.Module, scheme: str, **options: Any) -> Program:
    """The program to decode with: weights rounded to nearest, or in full precision for "float32"."""
    example: Any = None if hasattr(model, "prepare_inputs_for_generation") else torch.ones(2, 8, dtype=torch.int64)
    if scheme == FLOAT:
        return Program(Pipeline([TagLoops()]).run(capture(model, example)))
    return compile_model(model, example, scheme=Scheme.parse(scheme), method="symmetric", **options)


def rates(
    program: Program,
    prompts: Sequence[Tensor],
    methods: Sequence[str],
    new_tokens: int = 128,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Continues every prompt plainly and by every method, by turns; all times count, those of prompts included.

    Args:
        program: can have a key-value cache.
        prompts: ids `[1, sequence]` each.
        methods: as `speculate` takes them.
        new_tokens: to make after each prompt.

    Raises:
        LoopQError: the program has no cache, or a method does not fit.
    """
    names = ["plain", *methods]
    seconds, same = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    found = {name: list[Speculation]() for name in names}
    for name in names:  # makes the graphs, and is not counted
        program.generate(prompts[0], 8, speculate=None if name == "plain" else name)
    for number, prompt in enumerate(prompts):
        say(f"prompt {number + 1} of {len(prompts)}")
        texts = {}
        for name in names:
            speculation = None if name == "plain" else Speculation(name)
            began = time.perf_counter()
            texts[name] = program.generate(prompt, new_tokens, speculate=speculation)
            seconds[name] += time.perf_counter() - began
            same[name] += torch.equal(texts[name], texts["plain"])
            found[name] += [speculation] if speculation is not None else []
    total = len(prompts) * new_tokens
    data: list[Values] = []
    for name in names:
        steps, proposed = (sum(getattr(s, key) for s in found[name]) for key in ("steps", "proposed"))
        accepted, made = (sum(getattr(s, key) for s in found[name]) for key in ("accepted", "tokens"))
        data.append({
            "runs": name, "rate": total / seconds[name], "ratio": seconds["plain"] / seconds[name],
            "tokens_per_step": made / steps if steps else 1.0, "acceptance": accepted / proposed if proposed else None,
            "same": same[name], "texts": len(prompts),
        })  # fmt: skip
    rows = [
        (
            x["runs"], f"{x['rate']:,.1f}", f"{x['ratio']:.2f}", f"{x['tokens_per_step']:.2f}",
            "" if x["acceptance"] is None else f"{x['acceptance']:.0%}", f"{x['same']} of {x['texts']}",
        )
        for x in data
    ]  # fmt: skip
    notes = [
        f"{len(prompts)} prompts of {prompts[0].shape[1]} tokens, {new_tokens} greedy tokens after each, by turns, one "
        "thread, prompts included. Same text: token for token that of plain decoding.",
    ]
    return Report("speculate", f"Speculation of {program!r}", COLUMNS, rows, data, notes=notes)


def costs(
    program: Program, prompt: Tensor, first_loops: Sequence[int], repeats: int = 5,
    *, say: Callable[[str], None] = lambda text: None,
) -> Report:  # fmt: skip
    """Times of the calls of speculation after a prompt, in milliseconds and in plain steps.

    The break-even acceptance is the share of proposed tokens, each as likely as the others, from which on speculation
    with calls of this width is faster than decoding one by one. It needs no text, so weights may be random.

    Args:
        program: can have a key-value cache.
        prompt: ids `[1, sequence]`.
        first_loops: numbers of loops that propose.
        repeats: calls of each kind, of which the median counts.

    Raises:
        LoopQError: the program has no cache, or its loop cannot be cut.
    """
    token = int(prompt[0, -1])
    lookup = program.text_reader(Speculation(LOOKUP))
    lookup.start(prompt, torch.ones_like(prompt))
    say("plain steps and reading")
    plain = _median(repeats, partial(lookup.read, [token]), partial(lookup.keep, 0))
    data: list[Values] = [{"call": "plain step", "ms": plain * 1e3, "steps": 1.0, "break_even": None}]
    for width in WIDTHS:
        read = _median(repeats, partial(lookup.read, [token] * width), partial(lookup.keep, 0))
        even = break_even(partial(_expected, width), read / plain)
        data.append({
            "call": f"read {width} tokens ({width - 1} proposed)", "ms": read * 1e3, "steps": read / plain,
            "break_even": even,
        })  # fmt: skip
    for first in first_loops:
        say(f"{first} loops propose")
        data += _loop_costs(program, prompt, token, first, plain, repeats)
    rows = [
        (x["call"], f"{x['ms']:.2f}", f"{x['steps']:.2f}",
         "" if x["call"] == "plain step" or "propose:" in x["call"] else
         "never" if x["break_even"] is None else f"{x['break_even']:.0%}")
        for x in data
    ]  # fmt: skip
    notes = [f"Median of {repeats} calls after a prompt of {prompt.shape[1]} tokens, one thread."]
    return Report("speculate-costs", f"Calls of speculation, {program!r}", COSTS, rows, data, notes=notes)


def _loop_costs(program: Program, prompt: Tensor, token: int, first: int, plain: float, repeats: int) -> list[Values]:
    reader = program.text_reader(Speculation(f"loops:{first}"))
    assert isinstance(reader, CachedText)
    reader.start(prompt, torch.ones_like(prompt))
    drafts: list[float] = []
    data: list[Values] = []
    for width in WIDTHS:
        verified = []
        for _ in range(repeats):
            for _ in range(width):
                began = time.perf_counter()
                reader.propose(token)
                drafts.append(time.perf_counter() - began)
            began = time.perf_counter()
            reader.verify()
            verified.append(time.perf_counter() - began)
            reader.keep(0)
        verify, draft = statistics.median(verified), statistics.median(drafts)
        even = break_even(partial(_expected, width), (width * draft + verify) / plain)
        data.append({
            "call": f"{first} loops propose {width}, others verify: verify", "ms": verify * 1e3,
            "steps": verify / plain, "break_even": even,
        })  # fmt: skip
    draft = statistics.median(drafts)
    return [
        {"call": f"{first} loops propose: 1 token", "ms": draft * 1e3, "steps": draft / plain, "break_even": None},
        *data,
    ]


def break_even(expected: Callable[[float], float], cost: float) -> float | None:
    """The acceptance from which on `expected` tokens are worth `cost` plain steps; None if they never are."""
    if expected(1.0) <= cost:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if expected(middle) > cost else (middle, high)
    return high


def _expected(width: int, acceptance: float) -> float:
    """Tokens that a call of `width` tokens gives in the mean: one, and those accepted one after the other."""
    return sum(acceptance**place for place in range(width))


def _median(repeats: int, run: Callable[[], Any], undo: Callable[[], Any]) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
        undo()
    return statistics.median(times[1:])


def spread_prompts(tokens: Tensor, count: int, length: int) -> list[Tensor]:
    """`count` prompts `[1, length]` from a text `[n]`, at equal distances.

    Raises:
        LoopQError: the text is too short.
    """
    if len(tokens) < length:
        raise LoopQError(f"The text has {len(tokens)} tokens; a prompt needs {length}.")
    last = len(tokens) - length
    starts = [last * number // max(count - 1, 1) for number in range(count)]
    return [tokens[start : start + length].unsqueeze(0) for start in starts]
