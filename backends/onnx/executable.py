"""Runs an exported file in ONNX Runtime with the model's own calling convention."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopq_compile.backends.onnx.convention import METADATA_KEY, from_json
from loopq_compile.backends.onnx.decoder import PREFILL_CHUNK, OnnxDecoder
from loopq_compile.backends.onnx.folder import check_references
from loopq_compile.backends.onnx.loop import LOOPS
from loopq_compile.backends.onnx.text_reader import OnnxText
from loopq_compile.errors import LoopQError, first_line
from loopq_compile.generation.decoders import Chosen, Decoder, complete, read_texts
from loopq_compile.generation.expectation import Experience
from loopq_compile.generation.speculation import LOOPS as BY_LOOPS
from loopq_compile.generation.speculation import Speculation
from loopq_compile.graph.caches import has_cache
from loopq_compile.graph.early_exit import EXIT_THRESHOLD, check_early_exit, has_early_exit
from loopq_compile.storage.atomic import settle


class OnnxExecutable:
    """An exported program in ONNX Runtime.

    Args:
        path: an `.onnx` file written by `export`, or the directory it was written to.
        threads: threads inside an operator; None leaves the choice to ONNX Runtime.
        optimize: graph optimizations of ONNX Runtime (all, or none).
        providers: execution providers by name; the CPU's by default.

    Raises:
        LoopQError: onnxruntime is not installed, the file is missing or damaged, keeps weights outside of its
            folder, or was not written by `export`.
    """

    kind = "onnx"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        optimize: bool = True,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self.path = _model_file(Path(path))
        self.session = _open(self.path, threads, optimize, providers)
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        """Everything in the file's metadata, as text."""
        if METADATA_KEY not in self.metadata:
            raise LoopQError(f"{self.path} was not written by loopq_compile; open it with onnxruntime directly.")
        self._convention = from_json(self.metadata[METADATA_KEY])
        self.signature = self._convention.signature
        self._experience = Experience()
        self.input_names: list[str] = [value.name for value in self.session.get_inputs()]
        self.output_names: list[str] = [value.name for value in self.session.get_outputs()]

    @property
    def program_info(self) -> dict[str, Any]:
        """Model name, method, scheme, loop count, target and form of the exported program."""
        return json.loads(self.metadata.get("loopq.program", "{}"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The program's result for the same call.

        A rolled file also takes `loops=`, the number of loops; the default is the program's. A file with a key-value
        cache takes `attention_mask` and `past_key_values.N.key`, `.value`; a call without them reads a prompt. A file
        written with `early_exit=True` takes `exit_threshold=`; without it all loops run.

        Takes PyTorch tensors or numpy arrays, and returns PyTorch tensors unless all inputs are numpy arrays. The
        result has the model's own structure; if its class is not importable here, it is a tuple (or one tensor).

        Raises:
            LoopQError: the arguments do not fit the captured call, or ONNX Runtime fails on them.
        """
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor | np.ndarray)]
        as_numpy = bool(given) and all(isinstance(value, np.ndarray) for value in given)
        loops = kwargs.pop(LOOPS, None) if LOOPS in self.input_names else None
        args, kwargs = tuple(_tensor(value) for value in args), {k: _tensor(v) for k, v in kwargs.items()}
        args, kwargs = complete(self.signature, args, kwargs, self._loop_count(loops))
        tensors = self.signature.bind(args, kwargs)
        feed = {
            spec.name: tensor.detach().cpu().contiguous().numpy()
            for spec, tensor in zip(self.signature.inputs, tensors, strict=True)
            if spec.name in self.input_names
        }
        if LOOPS in self.input_names:
            feed[LOOPS] = np.array(self._loop_count(loops), dtype=np.int64)
        try:
            results = self.session.run(None, feed)
        except Exception as error:
            sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in feed.items())
            raise LoopQError(f"ONNX Runtime failed on {sizes}: {str(error)[:400]}") from error
        return self._convention.restore(results if as_numpy else [torch.from_numpy(value) for value in results])

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 32,
        *,
        loops: int | None = None,
        exit_threshold: float | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        **options: Any,
    ) -> Tensor:
        """Continues token ids `[batch, sequence]`; see `loopq_compile.generation.sampling.generate`.

        A file with a key-value cache reads the prompt once; any other reads everything again for every token.

        Args:
            loops: number of loops of a rolled file; the default is the program's. Further loops use the last rows of
                its tables.
            exit_threshold: threshold of a file that may stop early.
            prefill_chunk: most tokens of a prompt that a file with a cache reads in one call, see `OnnxDecoder`.
            options: as there.
        """
        from loopq_compile.generation.sampling import generate

        chosen = Chosen(self, loops=loops, exit_threshold=exit_threshold, prefill_chunk=prefill_chunk)
        return generate(chosen, input_ids, max_new_tokens, **options)

    def decoder(
        self, loops: int | None = None, exit_threshold: float | None = None, prefill_chunk: int = PREFILL_CHUNK
    ) -> Decoder:
        """The decoder that `generate` asks for the next token.

        Raises:
            LoopQError: the file takes more than token ids and an attention mask, or no threshold; `loops` for a file
                that is not rolled.
        """
        check_early_exit(self.signature, exit_threshold)
        if loops is not None and not self._is_rolled:
            raise LoopQError(
                f"{self.path} is unrolled: its number of loops is fixed. Export the program with form='rolled' "
                "(`loopq-compile export DIR --form rolled`) to choose it at run time."
            )
        if has_cache(self.signature):
            count = self._loop_count(loops) if self._is_rolled else None
            return OnnxDecoder(self.session, self.signature, count, exit_threshold, prefill_chunk)
        extra: dict[str, Any] = {} if loops is None else {LOOPS: loops}
        if has_early_exit(self.signature):
            extra[EXIT_THRESHOLD] = exit_threshold
        return read_texts(self, self.signature, **extra)

    def text_reader(
        self,
        speculation: Speculation,
        loops: int | None = None,
        exit_threshold: float | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> OnnxText:
        """What speculation reads with: `lookup` and `auto`, which is lookup here.

        Raises:
            LoopQError: `speculation` asks for loops, or the file has no cache, may stop early, or gives logits of only
                the last token.
        """
        if speculation.name == BY_LOOPS:
            raise LoopQError(
                "Loops propose tokens in a program (`program.generate(..., speculate='loops')`); a file runs all its "
                "loops in one call. Use speculate='lookup'."
            )
        if not has_cache(self.signature):
            raise LoopQError(f"{self.path} has no key-value cache; export it with cache=True (`--cache`).")
        if has_early_exit(self.signature):
            raise LoopQError(
                "Early exit and speculation do not combine: an early exit is decided for all tokens of a call. Export "
                "without early_exit, or leave out speculate."
            )
        decoder = self.decoder(loops, exit_threshold, prefill_chunk)
        assert isinstance(decoder, OnnxDecoder)
        return OnnxText(decoder, self._experience)

    @property
    def _is_rolled(self) -> bool:
        return LOOPS in self.input_names

    def _loop_count(self, loops: Any) -> int:
        if loops is None:
            return int(self.program_info["loops"])
        if not isinstance(loops, int) or isinstance(loops, bool) or loops < 1:
            raise LoopQError(f"loops must be a whole number from 1 on; got {loops!r}.")
        return loops


def _tensor(value: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def _model_file(path: Path) -> Path:
    settle(path if path.is_dir() else path.parent)
    if path.is_dir():
        found = sorted(path.glob("*.onnx"))
        if len(found) != 1:
            raise LoopQError(f"{path} holds {len(found) or 'no'} .onnx files; give the path of one.")
        path = found[0]
    if not path.exists():
        raise LoopQError(f"{path} does not exist; write it with program.export_onnx({str(path.parent)!r}).")
    return path


def _open(path: Path, threads: int | None, optimize: bool, providers: Sequence[str]) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise LoopQError("Running ONNX files needs onnxruntime: pip install onnxruntime.") from error
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise LoopQError(f"threads must be a positive integer; got {threads!r}.")
    unknown = [name for name in providers if name not in onnxruntime.get_available_providers()]
    if unknown:
        raise LoopQError(
            f"ONNX Runtime has no {unknown[0]}; it has {', '.join(onnxruntime.get_available_providers())}."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    check_references(path)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:
        raise LoopQError(
            f"ONNX Runtime cannot open {path}; the file is damaged or incomplete: {first_line(error)}."
        ) from error
