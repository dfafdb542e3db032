"""llama.cpp as a contestant of `bench speed`, through llama-cpp-python and our own GGUF files.

The high-level class of llama-cpp-python reads one sequence at a time, so batches take its functions of the C library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopq_compile.errors import LoopQError
from loopq_compile.generation.decoders import Decoder

WAY = "llamacpp"


class Engine:
    """A loaded model with a context for each number of rows, on one thread.

    Args:
        file: a GGUF file.
        longest: most tokens that a row will have.

    Raises:
        LoopQError: llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, longest: int) -> None:
        import llama_cpp

        self.library, self.longest = llama_cpp, longest
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept alive for the library
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        if not self.model:
            raise LoopQError(f"llama.cpp cannot load {file.name}; it may not know the model's architecture.")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self._contexts: dict[int, Any] = {}

    def fresh(self, rows: int) -> Any:
        """The context for so many rows, emptied.

        Raises:
            LoopQError: llama.cpp cannot make it.
        """
        if rows not in self._contexts:
            settings = self.library.llama_context_default_params()
            settings.n_ctx = settings.n_batch = rows * -(-self.longest // 256) * 256  # it rounds rows up itself
            settings.n_seq_max, settings.n_threads, settings.n_threads_batch = rows, 1, 1
            self._contexts[rows] = self.library.llama_init_from_model(self.model, settings)
        context = self._contexts[rows]
        if not context:
            raise LoopQError(f"llama.cpp cannot make a context for {rows} rows of {self.longest} tokens.")
        self.library.llama_memory_clear(self.library.llama_get_memory(context), True)
        return context


class LlamaDecoder:
    """Sequences without padding, side by side in one context."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.context, self.read = engine, None, 0

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `loopq_compile.generation.decoders.Decoder`.

        Raises:
            LoopQError: llama.cpp fails.
        """
        library, (rows, length) = self.engine.library, new_ids.shape
        self.context = self.context or self.engine.fresh(rows)
        batch = library.llama_batch_init(rows * length, 0, 1)
        try:
            batch.n_tokens = rows * length
            for at, token in enumerate(new_ids.flatten().tolist()):
                row, column = divmod(at, length)
                batch.token[at], batch.pos[at] = token, self.read + column
                batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, row, column == length - 1
            status = library.llama_decode(self.context, batch)
        finally:
            library.llama_batch_free(batch)
        if status:
            raise LoopQError(f"llama.cpp failed on {rows} x {length} tokens with status {status}.")
        self.read += length
        last = [library.llama_get_logits_ith(self.context, (row + 1) * length - 1) for row in range(rows)]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(x, (self.engine.vocabulary,)).copy() for x in last]))


def decoders(file: Path, longest: int) -> Callable[[], Decoder]:
    """A function that makes fresh decoders of a file; only the newest one may be used.

    Raises:
        LoopQError: llama.cpp cannot load the file.
    """
    engine = Engine(file, longest)
    return lambda: LlamaDecoder(engine)
