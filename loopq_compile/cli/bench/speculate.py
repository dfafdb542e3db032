"""`loopq-compile bench speculate`."""

from __future__ import annotations

from typing import Annotated

import typer

from loopq_compile.cli.bench.options import Model, Out, load_model, show, text_tokens
from loopq_compile.cli.common import (
    AllowPickle,
    Json,
    RepeatLayers,
    TextFile,
    TrustRemoteCode,
    check_text,
    names,
    note,
    whole_numbers,
)
from loopq_compile.errors import LoopQError


def speculate_command(
    model: Model = "bundled",
    repeat: RepeatLayers = None,
    scheme: Annotated[
        str, typer.Option("--scheme", help="Weights are rounded to nearest, without data; float32: not at all.")
    ] = "w4a8",
    methods: Annotated[
        str, typer.Option("--methods", help="Ways to propose: lookup, loops, loops:K, auto.")
    ] = "lookup,loops,auto",
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Number of prompts.")] = 8,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to make after each prompt.")] = 128,
    costs_only: Annotated[
        bool, typer.Option("--costs", help="What single calls cost, and the acceptance from which on they pay.")
    ] = False,
    loops: Annotated[
        str, typer.Option("--loops", metavar="LIST", help="With --costs: numbers of loops that propose.")
    ] = "1,2",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="With --costs: calls of each kind.")] = 5,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Of ouro-1.4b and ouro-2.6b: fewer layers, to try it out.")
    ] = None,
    text: TextFile = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Decoding with fewer steps than tokens, against plain decoding, by turns in one run.

    Prompts are spread over held-out text. ouro-1.4b and ouro-2.6b have random weights, whose text says nothing about
    acceptance: for these, and with --costs, calls are timed instead.

    Example: loopq-compile bench speculate bundled --methods lookup,loops:1,loops:2,auto
    """
    import torch

    from loopq_compile.bench.random_models import SIZES, random_model, sized
    from loopq_compile.bench.speculate import costs, program_of, rates, spread_prompts

    torch.set_num_threads(1)
    say = note(True)
    if model in SIZES:
        program = program_of(random_model(sized(model, layers)), scheme, **({} if scheme == "float32" else _RELEASE))
        prompt = torch.randint(5, 500, (1, length), generator=torch.Generator().manual_seed(0))
        show(costs(program, prompt, whole_numbers("--loops", loops), repeats, say=say), out, json, model=model)
        return
    if layers is not None:
        raise LoopQError(f"--layers is for models with random weights: {', '.join(SIZES)}.")
    check_text(text)
    loaded = load_model(model, None, trust_remote_code, repeat, allow_pickle)
    tokens, source = text_tokens(loaded, text, 16_384)
    program = program_of(loaded.model, scheme)
    chosen = spread_prompts(tokens, prompts, length)
    if costs_only:
        report = costs(program, chosen[0], whole_numbers("--loops", loops), repeats, say=say)
    else:
        report = rates(program, chosen, names(methods), new_tokens, say=say)
    show(report, out, json, model=model, text=source)


_RELEASE = {"release_model": True}
"""A model of published size is not held beside its program."""
