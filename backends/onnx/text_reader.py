"""A text in the cache of an exported file that can forget its end, for speculation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loopq_compile.backends.onnx.decoder import OnnxDecoder
from loopq_compile.errors import InternalError
from loopq_compile.generation.expectation import Experience
from loopq_compile.generation.text_reader import all_logits
from loopq_compile.graph.caches import cache_inputs
from loopq_compile.graph.signature import PAST


class OnnxText:
    """A `loopq_compile.generation.text_reader.TextReader` whose model is a file, in any form, with any cache.

    Args:
        decoder: reads tokens, and holds the cache.
        experience: of earlier texts.
    """

    first_loops = 0

    def __init__(self, decoder: OnnxDecoder, experience: Experience) -> None:
        self.decoder, self.experience = decoder, experience
        specs = cache_inputs(decoder.signature)[2]
        self.axes = {spec.name: spec.shape.index(PAST) for spec in specs}
        self.mask = torch.ones(1, 0, dtype=torch.int64)
        self.begun = 0

    def start(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Reads a prompt `[1, sequence]`; returns logits `[1, vocabulary]` of the next token."""
        self.mask = attention_mask
        return self.decoder(ids, attention_mask)

    def read(self, tokens: list[int]) -> Tensor:
        """Appends tokens; returns logits `[tokens, vocabulary]` of those that follow each.

        Raises:
            LoopQError: ONNX Runtime fails, or the file gives logits of only the last token.
        """
        self.begun = self.mask.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(1, len(tokens))], 1)
        return all_logits(self.decoder.read(torch.tensor([tokens]), self.mask), len(tokens))

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` tokens of the last `read`."""
        from onnxruntime import OrtValue

        length = self.begun + count
        if length == self.mask.shape[1] or self.decoder.past is None:
            return
        self.mask = self.mask[:, :length]
        for name, cache in self.decoder.past.items():
            kept = np.ascontiguousarray(cache.numpy()[(slice(None),) * self.axes[name] + (slice(length),)])
            self.decoder.past[name] = OrtValue.ortvalue_from_numpy(kept)

    def propose(self, token: int) -> Tensor:
        """Files run all their loops in one call."""
        raise InternalError("an ONNX file has no first loops")

    def verify(self) -> Tensor:
        """Files run all their loops in one call."""
        raise InternalError("an ONNX file has no last loops")
