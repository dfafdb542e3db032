"""`Program`: the one object that all steps take and return."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from loopq_compile.errors import InternalError, LoopQError
from loopq_compile.exports import Exports
from loopq_compile.generation.decoders import (
    CachedDecoder,
    Chosen,
    Decoder,
    RecomputingDecoder,
    Variants,
    complete,
    read_texts,
)
from loopq_compile.generation.program_texts import ProgramTexts
from loopq_compile.generation.speculation import Speculation
from loopq_compile.generation.text_reader import TextReader
from loopq_compile.graph.caches import has_cache
from loopq_compile.graph.device import device_of, find_device, place
from loopq_compile.graph.early_exit import EXIT_THRESHOLD, check_early_exit, has_early_exit
from loopq_compile.graph.loops import LoopStructure
from loopq_compile.graph.scheme import Scheme
from loopq_compile.graph.state import LogEntry, attach_state, copy_graph, get_state

if TYPE_CHECKING:
    from loopq_compile.generation.transformers_model import ProgramForCausalLM
    from loopq_compile.graph.signature import Signature
    from loopq_compile.passes.base import Pass


class Program(Exports):
    """A captured and rewritten model: its graph, loop structure, scheme, and the log of its passes.

    Call it like the model; it returns the same structure. `print(program)` shows the graph as Python.

    Args:
        graph_module: a graph from `loopq_compile.capture.to_graph.capture`, perhaps changed by passes.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        get_state(graph_module)
        self.graph_module = graph_module
        self._variants: Variants[Program] = Variants()
        self._texts = ProgramTexts()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph without gradients, on the program's device: inputs from elsewhere are moved there.

        With a key-value cache, a call without cache inputs reads a prompt. With early exit (`with_early_exit`),
        `exit_threshold=0.9` stops when all tokens are done; without it all loops run.

        Raises:
            LoopQError: the arguments do not fit the captured signature.
        """
        signature = get_state(self.graph_module).signature
        args, kwargs = complete(signature, args, kwargs, self.loops.count)
        device = self.device
        inputs = [value.to(device) for value in signature.bind(args, kwargs)]
        try:
            with torch.no_grad():
                return signature.restore(self.graph_module(*inputs))
        except IndexError as error:
            raise LoopQError(f"An index in the inputs is out of range, such as a token id: {error}.") from error
        except RuntimeError as error:
            if "size" not in str(error) and "shape" not in str(error):
                raise
            sizes = ", ".join(
                f"{spec.name} {list(value.shape)}" for spec, value in zip(signature.inputs, inputs, strict=True)
            )
            raise LoopQError(
                f"The program cannot run on {sizes}: {error} The model's code took another branch for the example "
                "it was captured from; models that work in chunks need an example longer than one, no multiple of it."
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return Program(deepcopy(self.graph_module, memo))

    def __copy__(self) -> Program:
        return Program(self.graph_module)

    def __reduce__(self) -> Any:
        raise LoopQError(
            "A program cannot be pickled, since a pickle can run code when it is read. Write it with "
            "program.save(folder), and read it with loopq_compile.load(folder), in another process as well."
        )

    @property
    def loops(self) -> LoopStructure:
        """The loop structure: which blocks run how often."""
        return get_state(self.graph_module).loops

    @property
    def device(self) -> torch.device:
        """Where the program's tensors are, and where it runs."""
        return device_of(self.graph_module)

    def to(self, device: str | torch.device) -> Program:
        """This program, moved to `device`; like `nn.Module.to` it changes the program and returns it.

        Moved tensors are copies, so a model that shares its weights with the program stays where it is.

        Args:
            device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", or another that PyTorch knows.

        Raises:
            LoopQError: there is no such device here.
        """
        place(self.graph_module, find_device(device))
        return self

    @property
    def scheme(self) -> Scheme | None:
        """Bits and groups; None for a program that was only captured."""
        return get_state(self.graph_module).scheme

    @property
    def log(self) -> list[LogEntry]:
        """What each pass did."""
        return get_state(self.graph_module).log

    def __str__(self) -> str:
        from loopq_compile.graph.printer import print_graph

        return print_graph(self.graph_module)

    def __repr__(self) -> str:
        state = get_state(self.graph_module)
        scheme = f", {state.scheme.name} {state.scheme.activation}" if state.scheme else ""
        return f"Program({state.model_name}: {state.loops.describe()}{scheme}, method={state.method or 'none'})"

    def summary(self) -> str:
        """A table of loops by modules: bits, parameters, and the range of every loop."""
        from loopq_compile.analysis.summary import summarize

        return summarize(self.graph_module)

    def with_cache(self, *, stacked: bool = False, last_token: bool = False, kv_bits: int | None = None) -> Program:
        """This program with a key-value cache: a call takes new tokens and the cache of earlier calls, and returns a
        dict.

        Inputs are `input_ids` `[batch, sequence]`, `attention_mask` `[batch, past + sequence]` (0 on padding, which is
        on the left), and for every attention that runs, number `N`, `past_key_values.N.key` and `.value`
        `[batch, heads, past, size]`; results are the program's own and `present.N.key`, `.value`, which the next call
        takes. `past` is 0 for a prompt. `loopq_compile.generation.sampling` feeds it.

        Args:
            stacked: one cache for all iterations of a loop's layer, `[loops, batch, heads, past, size]`.
            last_token: `logits` for only the last token.
            kv_bits: 8 or 4 stores keys and values as integers, int8 `[..., past, size]` or two per byte, uint8 `[...,
                past, size / 2]`, and their scales in `past_key_values.N.key_scale`, `.value_scale`.

        Raises:
            LoopQError: the model's attention is not recognised, is not causal, or tokens mix elsewhere.
        """
        return self._deployed(cache=True, stacked=stacked, last_token=last_token, kv_bits=kv_bits)

    def rolled(self) -> Program:
        """This program with every loop as one node, whose body reads scales, transforms and adapters by row number.

        Results are the same to the last bit. A cache must be there before: `with_cache(stacked=True).rolled()`.

        Raises:
            LoopQError: iterations differ in more than data; the message names the node and the loop.
        """
        return self._deployed(rolled=True)

    def with_early_exit(self, *, cache: bool = False, last_token: bool = False, kv_bits: int | None = None) -> Program:
        """This program, rolled, with a loop that stops when the model's exit gate reports every token as done.

        A call takes `exit_threshold` and returns a dict that has `loops_spent`. The loop stops after the first
        iteration in which every new token's probability of having stopped, `1 - prod(1 - sigmoid(exit logit))`, is at
        least the threshold. From 1 on, or without it, all loops run. For skipped loops, keys and values included, the
        results of the last computed loop are returned. See the pass `exit-early`.

        Args:
            cache: whether to add a key-value cache, `[loops, batch, heads, past, size]` for every layer.
            last_token, kv_bits: as in `with_cache`.

        Raises:
            LoopQError: there is no loop, the loops return no exit gate, or the loop cannot be rolled or cached.
        """
        return self._deployed(cache=cache, rolled=True, early_exit=True, last_token=last_token, kv_bits=kv_bits)

    def _deployed(self, **options: Any) -> Program:
        from loopq_compile.passes.loops.deployment import deployment

        return self._rewritten(deployment(self.graph_module, **options))

    def _rewritten(self, passes: Sequence[Pass]) -> Program:
        """A copy of this program after `passes`."""
        from loopq_compile.pipeline import Pipeline

        copied = copy_graph(self.graph_module)
        attach_state(copied, replace(get_state(self.graph_module), log=list(self.log)))
        with failures_with_programs():
            return Program(Pipeline(list(passes)).run(copied))

    def lower(self, backend: str, **options: Any) -> Any:
        """An executable made by `backend` ("reference", "onnx" or "triton"); see `loopq_compile.backends`."""
        from loopq_compile.backends import get_backend

        return get_backend(backend).lower(self.graph_module, **options)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 32,
        *,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        exit_threshold: float | None = None,
        speculate: str | Speculation | None = None,
    ) -> Tensor:
        """Continues token ids `[batch, sequence]`; see `loopq_compile.generation.sampling.generate`.

        Uses a key-value cache if the model can have one (`with_cache`); otherwise reads everything again for every
        token. With `exit_threshold`, loops stop early (`with_early_exit`). `speculate` makes several tokens in a step,
        with the same result: "lookup", "loops", "loops:K", "auto", or a `Speculation` to read acceptance from.
        """
        from loopq_compile.generation.sampling import generate

        return generate(
            Chosen(self, exit_threshold=exit_threshold),
            input_ids,
            max_new_tokens,
            attention_mask=attention_mask,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_token_id=eos_token_id,
            speculate=speculate,
        )

    def as_hugging_face(self, generation_config: Any = None) -> ProgramForCausalLM:
        """This program as a transformers model, for its `generate`: beams, streamers, logits processors.

            model = program.as_hugging_face("my-program")
            model.generate(**tokenizer(texts, return_tensors="pt", padding=True), num_beams=4, max_new_tokens=40)

        Args:
            generation_config: a `GenerationConfig`, or a folder with a `generation_config.json`, such as that of a
                saved program; it names the tokens at which text ends.

        Raises:
            LoopQError: the program takes more than token ids and an attention mask, or the folder has no such file.
        """
        from loopq_compile.generation.transformers_model import ProgramForCausalLM

        return ProgramForCausalLM(self, generation_config)

    def decoder(self, exit_threshold: float | None = None) -> Decoder:
        """The decoder that `generate` asks for the next token.

        Raises:
            LoopQError: the program takes more than token ids and an attention mask, or `exit_threshold` is given but
                there is no exit gate.
        """
        signature = get_state(self.graph_module).signature
        if has_cache(signature):
            check_early_exit(signature, exit_threshold)
            return CachedDecoder(self, signature, self.loops.count, exit_threshold)
        if has_early_exit(signature):
            return self.reader(exit_threshold)
        if exit_threshold is not None:
            make = partial(self.with_early_exit, cache=True, last_token=True)
            early = self._variants.get(self.graph_module, "early exit", make)
            return (self.with_early_exit() if early is None else early).decoder(exit_threshold)
        reader, cached = self.reader(), self.cached(last_token=True)
        return reader if cached is None else cached.decoder()

    def text_reader(self, speculation: Speculation, exit_threshold: float | None = None) -> TextReader:
        """What speculation reads and proposes with: this program, and its loop in two parts if `speculation` asks for
        loops.

        Raises:
            LoopQError: the program cannot have a cache, it may stop early, or its loop cannot be cut.
        """
        if exit_threshold is not None or has_early_exit(self.signature):
            raise LoopQError(
                "Early exit and speculation do not combine: an early exit is decided for all tokens of a call, so "
                "reading several at once would change the text. Leave out exit_threshold or speculate."
            )
        cached = has_cache(self.signature)
        whole = self if cached else self.cached() or self.with_cache()  # the last raises the reason
        return self._texts.reader(whole.graph_module, self if cached else self.cached(True) or whole, speculation)

    def reader(self, exit_threshold: float | None = None) -> RecomputingDecoder:
        """A decoder that gives logits of whole texts, from token ids and an attention mask.

        Raises:
            LoopQError: the program takes inputs other than these, position ids and token types.
        """
        signature = self.signature
        return read_texts(self, signature, **({EXIT_THRESHOLD: exit_threshold} if has_early_exit(signature) else {}))

    @property
    def signature(self) -> Signature:
        """Parameters, tensor inputs and outputs of a call."""
        return get_state(self.graph_module).signature

    def cached(self, last_token: bool = False) -> Program | None:
        """`with_cache`, kept for further calls; None if the program cannot have a cache.

        Made again after a pass has changed graph or tensors. If `last_token` is not possible, all logits are returned.
        """
        for wanted in dict.fromkeys((last_token, False)):
            make = partial(self.with_cache, last_token=wanted)
            found = self._variants.get(self.graph_module, f"last_token={wanted}", make)
            if found is not None:
                return found
        return None

    def report(
        self,
        file: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        tokens: Sequence[Tensor] = (),
        tokenizer: Any = None,
        others: Mapping[str, Program] | None = None,
        samples: int = 2,
    ) -> Path:
        """Writes what quantization did to every loop as one HTML file that needs no network.

        Args:
            file: such as `report.html`; replaced when the new one is complete.
            model: the model this was compiled from; without it, or without tokens, errors and samples are left out.
            tokens: held-out token ids, `[batch, sequence]` each; a few hundred are enough.
            tokenizer: tokenizer of the `tokenizers` library, to show text instead of token ids.
            others: more programs of the same model, by name, to compare with.
            samples: how many continuations to show.

        Raises:
            LoopQError: tokens do not fit, two programs have one name, or the file cannot be written.
        """
        from loopq_compile.analysis.report import measure, write
        from loopq_compile.analysis.report.measure import check_names

        state = get_state(self.graph_module)
        name = f"{state.method or 'captured'} {state.scheme.name if state.scheme else ''}".strip()
        programs = {name: self} | dict(others or {})
        check_names([name, *(others or {})])
        found = {
            title: measure(program, model, tokens, tokenizer=tokenizer, samples=samples)
            for title, program in programs.items()
        }
        return write(file, found)

    def browse(self, file: str | os.PathLike[str]) -> Path:
        """Writes every node, with its code, loop, module, type, pass, inputs and users, as one HTML page to search in.

        Raises:
            LoopQError: the file cannot be written.
        """
        from loopq_compile.analysis.report import browse, write_page

        return write_page(file, browse(self.graph_module))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the program into `directory`: JSON and safetensors; see `loopq_compile.storage.artifact`."""
        from loopq_compile.storage.artifact import save

        save(self.graph_module, directory)


@contextlib.contextmanager
def failures_with_programs() -> Iterator[None]:
    """While it is open, an error of a pass carries `failure.program`, the last valid program."""
    try:
        yield
    except (LoopQError, InternalError) as error:
        failure = error.failure
        if failure is not None and failure.program is None:
            failure.program = Program(failure.graph_module)
        raise
