"""Decoding with an exported file that has a key-value cache."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopq_compile.backends.onnx.loop import LOOPS
from loopq_compile.errors import LoopQError
from loopq_compile.graph.caches import cache_inputs, empty_cache, present_name
from loopq_compile.graph.early_exit import EXIT_THRESHOLD, LOOPS_SPENT, has_early_exit, threshold_tensor
from loopq_compile.graph.signature import Signature
from loopq_compile.graph.texts import last_logits

_LOGITS = "logits"
PREFILL_CHUNK = 128
"""Tokens of a prompt that one call reads. `Attention` of ONNX Runtime computes the scores of all pairs of tokens and
then hides the later ones. Read in parts, a prompt needs half of these scores, and never has all of them in memory.
Products of 128 rows are as fast as longer ones."""


class OnnxDecoder:
    """Runs only new tokens. Caches stay inside ONNX Runtime: what one call returns is bound as input of the next. Of
    the other outputs, only the logits are computed.

    Args:
        session: an `onnxruntime.InferenceSession` of a file with a cache.
        signature: its calling convention.
        loops: iterations of a rolled file, None for an unrolled one.
        exit_threshold: for files that may stop early; `loops_spent` lists the loops of every call.
        prefill_chunk: most tokens that one call of the session reads; a longer prompt is read in equal parts, with the
            same result. Files that may stop early read it at once, since all of its tokens decide when to stop.

    Raises:
        LoopQError: the file returns no `logits`, or `prefill_chunk` is not a positive number.
    """

    def __init__(
        self,
        session: Any,
        signature: Signature,
        loops: int | None,
        exit_threshold: float | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        if not isinstance(prefill_chunk, int) or prefill_chunk < 1:
            raise LoopQError(f"prefill_chunk must be a positive number of tokens; got {prefill_chunk!r}.")
        if _LOGITS not in [value.name for value in session.get_outputs()]:
            raise LoopQError("The file has no output called logits; text cannot be generated with it.")
        self.session, self.signature, self.loops, self.prefill_chunk = session, signature, loops, prefill_chunk
        self.threshold = threshold_tensor(exit_threshold).numpy() if has_early_exit(signature) else None
        self.past: dict[str, Any] | None = None
        self.loops_spent: list[int] = []

    def __call__(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` of the next token; see `loopq_compile.generation.decoders.Decoder`.

        Raises:
            LoopQError: ONNX Runtime fails, for instance on a token id that is out of range.
        """
        new, total = new_ids.shape[1], attention_mask.shape[1]
        self.signature.check_sizes({"batch": len(new_ids), "sequence": total})
        parts = 1 if self.threshold is not None else max(1, -(-new // self.prefill_chunk))
        ends = [new * part // parts for part in range(parts + 1)]
        for begin, end in itertools.pairwise(ends):
            logits = self.read(new_ids[:, begin:end], attention_mask[:, : total - new + end])
        return last_logits(logits, len(new_ids))

    def read(self, new_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Appends tokens in one call; returns the logits that the file gives, of all new tokens or of the last one.

        Raises:
            LoopQError: ONNX Runtime fails.
        """
        from onnxruntime import OrtValue

        ids, mask, caches = cache_inputs(self.signature)
        if self.past is None:
            empty = {spec.name: empty_cache(spec, len(new_ids), self.loops or 1) for spec in caches}
            self.past = {name: OrtValue.ortvalue_from_numpy(value.numpy()) for name, value in empty.items()}
        binding = self.session.io_binding()
        for spec, value in ((ids, new_ids), (mask, attention_mask)):
            binding.bind_cpu_input(spec.name, value.detach().cpu().to(spec.dtype).contiguous().numpy())
        if self.loops is not None:
            binding.bind_cpu_input(LOOPS, np.array(self.loops, dtype=np.int64))
        binding.bind_output(_LOGITS)
        if self.threshold is not None:
            binding.bind_cpu_input(EXIT_THRESHOLD, self.threshold)
            binding.bind_output(LOOPS_SPENT)
        for name, cache in self.past.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_output(present_name(name))
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise LoopQError(f"ONNX Runtime failed on {list(new_ids.shape)} tokens: {str(error)[:400]}") from error
        logits, *presents = binding.get_outputs()
        if self.threshold is not None:
            self.loops_spent.append(int(presents.pop(0).numpy()))
        self.past = dict(zip(self.past, presents, strict=True))
        return torch.from_numpy(logits.numpy())
