"""`loopq-compile generate`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from loopq_compile.cli.common import (
    AllowPickle,
    Device,
    Dtype,
    ExitThreshold,
    Json,
    Model,
    TokenizerFile,
    TrustRemoteCode,
    load,
    print_json,
)
from loopq_compile.errors import LoopQError


def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Draw tokens at random; without it the most likely one is taken.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Below 1 more predictable, above 1 more varied.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the K most likely tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely tokens that add up to P only.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help=r"Stop after this text (\n: line break); may be given repeatedly."),
    ] = None,
    loops: Annotated[
        int | None,
        typer.Option("--loops", min=1, help="Loops to run, of ONNX files written with `export --form rolled`."),
    ] = None,
    exit_threshold: ExitThreshold = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            "--speculate",
            metavar="METHOD",
            help="Several tokens in a step, with the same text: lookup, from repetitions; loops or loops:K, from the "
            "first loops; auto.",
        ),
    ] = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Continue after the end-of-text token.")] = False,
    tokenizer: TokenizerFile = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Continue a text, with a model, a compiled program or an ONNX file.

    Tokens appear as they are made. Compiled programs, and ONNX files written with `export --cache`, read the prompt
    once and then one token at a time; models, and files without a cache, read the whole text again for every token.
    With --speculate, programs and files with a cache make several tokens in a step.

    Example: loopq-compile generate bundled --prompt "Return the" --do-sample --top-p 0.9
    """
    import torch

    from loopq_compile.generation.sampling import stream, whole_number
    from loopq_compile.generation.speculation import Speculation
    from loopq_compile.generation.tokenizer import tokenize
    from loopq_compile.sources.loading import end_tokens

    _check_sampling(do_sample, temperature, top_k, top_p)
    whole_number("--seed", seed, -(2**63), 2**64 - 1)
    _check_text("--prompt", prompt)
    stops = [unescaped(text) for text in stop or ()]
    speculation = None if speculate is None else Speculation(speculate)
    loaded = load(model, tokenizer, trust_remote_code, None, allow_pickle, dtype, device)
    ids = tokenize(loaded.tokenizer, prompt).unsqueeze(0)
    chosen = _chosen(loaded, loops, exit_threshold)
    start = time.perf_counter()
    with torch.no_grad():
        steps = stream(
            chosen,
            ids,
            max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_token_id=None if ignore_end else end_tokens(loaded),
            speculate=speculation,
        )
        tokens: list[int] = []
        if not json:
            typer.echo(prompt, nl=False)
        made = ""
        for piece in pieces(loaded.tokenizer, ids[0].tolist(), (int(step[0]) for step in steps), tokens):
            made += piece
            if not json:
                typer.echo(piece, nl=False)
            if any(text in made for text in stops):
                break
    if json:
        seconds = round(time.perf_counter() - start, 3)
        about = {} if speculation is None else {"speculation": speculation.to_dict()}
        print_json({"prompt": prompt, "text": made, "tokens": tokens, "seconds": seconds, **_spent(chosen), **about})
    else:
        typer.echo()
        if spent := _spent(chosen):
            typer.echo(f"{spent['mean_loops']:.2f} loops a call in the mean", err=True)
        if speculation is not None:
            typer.echo("\n".join([str(speculation), *speculation.notes]), err=True)


def _chosen(loaded: Any, loops: int | None, exit_threshold: float | None) -> Any:
    """The model, with its number of loops and its threshold chosen."""
    from loopq_compile.generation.decoders import Chosen

    if loops is not None and loaded.kind != "onnx":
        raise LoopQError(
            "--loops is for ONNX files, in which the number of loops is an input: write one with `loopq-compile export "
            "DIR --form rolled`. Models and compiled programs run their own number of loops."
        )
    options = {"loops": loops, "exit_threshold": exit_threshold}
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return loaded.model
    if not hasattr(loaded.model, "decoder"):
        raise LoopQError("--exit-threshold is for compiled programs and ONNX files; run `loopq-compile compile` first.")
    return Chosen(loaded.model, **given)


def _spent(chosen: Any) -> dict[str, float]:
    spent = getattr(getattr(chosen, "last", None), "loops_spent", [])
    return {"mean_loops": sum(spent) / len(spent)} if spent else {}


def _check_sampling(do_sample: bool, temperature: float, top_k: int | None, top_p: float | None) -> None:
    given = {"--temperature": temperature != 1, "--top-k": top_k is not None, "--top-p": top_p is not None}
    idle = [option for option, is_given in given.items() if is_given]
    if idle and not do_sample:
        raise LoopQError(f"{' and '.join(idle)} would change nothing: the most likely token is taken. Add --do-sample.")


def _check_text(option: str, text: str) -> None:
    """Refuses text that is not UTF-8: such bytes of an argument reach Python as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start])
        shown = f"byte {byte - 0xDC00:#04x}" if 0xDC80 <= byte <= 0xDCFF else f"a lone surrogate, {byte:#06x}"
        raise LoopQError(f"{option} is not UTF-8 text: character {error.start} is {shown}.") from error


def unescaped(text: str) -> str:
    r"""`text` with `\n`, `\t` and `\\`, as shells pass them on, replaced by the characters that they mean."""
    if not text:
        raise LoopQError("--stop is empty: give the text to stop after.")
    _check_text("--stop", text)
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)


def pieces(tokenizer: Any, prompt: list[int], steps: Iterable[int], made: list[int]) -> Iterator[str]:
    """Text to print for each new token; tokens are added to `made`. Incomplete characters wait for their other
    bytes."""
    shown = tokenizer.decode(prompt)
    for token in steps:
        made.append(token)
        text = tokenizer.decode(prompt + made)
        if not text.endswith("\ufffd") and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(prompt + made)
    if not made:
        raise LoopQError("The model made no token.")
    if len(rest) > len(shown):
        yield rest[len(shown) :]
