"""`Program`: the one thing handed from step to step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from loopq_compile.errors import LoopQError
from loopq_compile.loops import LoopStructure
from loopq_compile.scheme import Scheme
from loopq_compile.state import LogEntry, get_state

if TYPE_CHECKING:
    from loopq_compile.backends.onnx import OnnxExport


class Program:
    """A captured and rewritten model: its graph, loop structure, scheme, and the log of its passes.

    Call it like the model; it returns the same structure. `print(program)` shows the graph as Python.

    Args:
        graph_module: a graph from `loopq_compile.capture.capture`, with whatever passes did to it.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        get_state(graph_module)
        self.graph_module = graph_module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph without gradients.

        Raises:
            LoopQError: the arguments do not fit the captured signature.
        """
        signature = get_state(self.graph_module).signature
        inputs = signature.bind(args, kwargs)
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

    @property
    def loops(self) -> LoopStructure:
        """What runs how often."""
        return get_state(self.graph_module).loops

    @property
    def scheme(self) -> Scheme | None:
        """Bits and groups; None for a program that was only captured."""
        return get_state(self.graph_module).scheme

    @property
    def log(self) -> list[LogEntry]:
        """What each pass did."""
        return get_state(self.graph_module).log

    def __str__(self) -> str:
        from loopq_compile.printer import print_graph

        return print_graph(self.graph_module)

    def __repr__(self) -> str:
        state = get_state(self.graph_module)
        scheme = f", {state.scheme.name} {state.scheme.activation}" if state.scheme else ""
        return f"Program({state.model_name}: {state.loops.describe()}{scheme}, method={state.method or 'none'})"

    def summary(self) -> str:
        """A table of loops by modules: bits, parameters, and the range of every loop."""
        from loopq_compile.summary import summarize

        return summarize(self.graph_module)

    def export_onnx(
        self, directory: str | os.PathLike[str], *, target: str = "qdq", form: str = "unrolled", cache: bool = False
    ) -> OnnxExport:
        """Writes `model.onnx` into `directory`.

        Args:
            directory: is made if needed; a file that is there stays until the new one is complete.
            target: "qdq", standard operators alone; "onnxruntime", packed products of ONNX Runtime (`MatMulNBits`).
            form: "unrolled", each loop has its nodes; "rolled", one `Loop` whose count is the input `loops`. Weights
                are stored once in both.
            cache: key-value cache; not in this version.

        Returns:
            Path, size and node counts of what was written.

        Raises:
            LoopQError: the target or form is unknown, the program cannot be rolled, or the directory cannot be written.
        """
        from loopq_compile.backends.onnx import export

        return export(self.graph_module, directory, target=target, form=form, cache=cache)

    def lower(self, backend: str, **options: Any) -> Any:
        """An executable made by `backend` ("reference" or "onnx"); see `loopq_compile.backends`."""
        from loopq_compile.backends import get_backend

        return get_backend(backend).lower(self.graph_module, **options)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 32,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_token_id: int | list[int] | None = None,
    ) -> Tensor:
        """Continues token ids `[batch, sequence]`; see `loopq_compile.generation.generate`."""
        from loopq_compile.generation import generate

        specs = get_state(self.graph_module).signature.inputs
        first, *others = [spec.name for spec in specs]
        if not set(others) <= {"attention_mask", "position_ids"} or specs[0].dtype.is_floating_point:
            raise LoopQError(
                "generate feeds token ids, an attention mask and position ids; this program takes "
                f"{[spec.name for spec in specs]}."
            )

        def run(ids: Tensor) -> Any:
            known = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}
            return self(**{first: ids}, **{name: known[name].to(ids) for name in others})

        return generate(
            run,
            input_ids,
            max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_token_id=eos_token_id,
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the program into `directory`: JSON and safetensors; see `loopq_compile.artifact`."""
        from loopq_compile.artifact import save

        save(self.graph_module, directory)
