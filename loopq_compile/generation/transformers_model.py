"""A program as a transformers model, with all of Hugging Face's `generate` (beams, streamers, processors).

Releases have different names for the argument that holds keys and values (`past_key_values`, `cache`); both work here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from loopq_compile.errors import LoopQError
from loopq_compile.generation.text_program import TextProgram
from loopq_compile.graph.caches import PAST_PREFIX, empty_cache, present_name
from loopq_compile.graph.state import get_state
from loopq_compile.graph.texts import given_logits
from loopq_compile.storage.hub_config import MODEL_TYPE

_CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The installed release's name for keys and values of earlier calls."""


_ASSISTED = ("prompt_lookup_num_tokens", "assistant_model")
"""Options of transformers with which several tokens are read in one call."""


def _option(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An option of `generate`, given by name or in a `generation_config`."""
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    return kwargs[name] if name in kwargs else getattr(given, name, None)


class ProgramConfig(PretrainedConfig):
    """The configuration that transformers needs: size of the vocabulary, and number of pairs of keys and values."""

    model_type = MODEL_TYPE


class ProgramForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Program` that generates text through Hugging Face's interface; made by `Program.as_hugging_face`.

    Its `DynamicCache` has a layer for every attention that runs: loops times layers. A program that cannot have a cache
    reads the whole text again for every token. The program itself is not changed. It cannot be trained; save it with
    `Program.save`.
    """

    config_class = ProgramConfig
    main_input_name = "input_ids"

    def __init__(
        self, program: TextProgram, generation_config: GenerationConfig | str | os.PathLike[str] | None
    ) -> None:
        """Args: as in `Program.as_hugging_face`."""
        pairs = len(_caches(program.cached(last_token=True))) // 2
        sizes: dict[str, Any] = {
            "vocab_size": _vocabulary(program), "num_hidden_layers": pairs, "use_cache": pairs > 0,
        }  # fmt: skip
        super().__init__(ProgramConfig(**sizes))
        self.program, self.takes_cache = program, pairs > 0
        if generation_config is not None:
            self.generation_config = _generation_config(generation_config)
        if not self.takes_cache:
            self.generation_config.use_cache = False
        self.eval()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. A program without a cache reads prompts at once and ignores `prefill_chunk_size`.

        Raises:
            LoopQError: assisted generation is asked for (`prompt_lookup_num_tokens`, `assistant_model`). It gave
                another text than plain decoding here.
        """
        asked = [name for name in _ASSISTED if _option(name, args, kwargs) is not None]
        if asked:
            raise LoopQError(
                f"Assisted generation of transformers ({' and '.join(asked)}) may change the text of a program, so it "
                "is not supported. Leave it out, or use program.generate(ids, speculate='lookup'), which does not."
            )
        if not self.takes_cache and kwargs.get("prefill_chunk_size") is not None:
            kwargs["prefill_chunk_size"] = None
        return super().generate(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where the program's tensors are."""
        return next((tensor.device for tensor in self._tensors()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the program's floating-point tensors."""
        return next((tensor.dtype for tensor in self._tensors() if tensor.is_floating_point()), torch.float32)

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.program.graph_module.parameters()
        yield from self.program.graph_module.buffers()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits of the new tokens.

        Args:
            input_ids: `[batch, new]`, tokens that the cache has not seen.
            attention_mask: `[batch, cached + new]`, 0 on padding, which is on the left; None: there is no padding.
            past_key_values, cache: a `DynamicCache`, which grows; None: nothing is cached yet.
            use_cache: whether to return keys and values, in a new cache if none was given.
            logits_to_keep: 1 computes logits of only the last token; 0 all.
            return_dict: False for a tuple.

        Raises:
            LoopQError: the cache is of another kind, or there is padding but the model has no attention mask.
        """
        held = cache if cache is not None else past_key_values
        if self.takes_cache:
            if held is None and use_cache:
                held = DynamicCache()
            logits = self._read_new(input_ids, attention_mask, held, last_token=logits_to_keep == 1)
        else:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            logits = self.program.reader().read_given(input_ids, mask.to(input_ids))
        logits = logits[:, -logits_to_keep:]
        output = CausalLMOutputWithPast(**{"logits": logits, _CACHE: held})
        return output.to_tuple() if return_dict is False else output

    def _read_new(self, input_ids: Tensor, attention_mask: Tensor | None, held: Any, last_token: bool) -> Tensor:
        """Logits of new tokens; puts their keys and values into `held`."""
        past = _cached_length(held)
        cached = self.program.cached(last_token)
        assert cached is not None
        ids, mask, *_ = get_state(cached.graph_module).signature.inputs
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        given = {ids.name: input_ids, mask.name: attention_mask.to(mask.dtype)}
        specs = _caches(cached)
        for layer, (keys, values) in enumerate(zip(specs[::2], specs[1::2], strict=True)):
            for spec, name in ((keys, "keys"), (values, "values")):
                kept = getattr(held.layers[layer], name) if past else empty_cache(spec, len(input_ids), 1)
                given[spec.name] = kept
        result = cached(**given)
        for layer, (keys, values) in enumerate(zip(specs[::2], specs[1::2], strict=True)):
            present = result[present_name(keys.name)], result[present_name(values.name)]
            if past:  # the layer's old content is already included; `update` would append it once more
                held.layers[layer].keys, held.layers[layer].values = present
            elif held is not None:
                held.update(*present, layer)
        return given_logits(result, len(input_ids))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The arguments of the next call of `forward`: `input_ids` `[batch, all]` without the tokens in the cache."""
        held = cache if cache is not None else past_key_values
        past = held.get_seq_length() if held is not None else 0
        whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
        given = {
            "input_ids": input_ids[:, past:] if whole else input_ids,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            _CACHE: held,
        }
        return given | ({} if logits_to_keep is None else {"logits_to_keep": logits_to_keep})

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: `Program.save` writes a program.

        Raises:
            LoopQError: always.
        """
        raise LoopQError("A program is saved by program.save(directory), and read by loopq_compile.load(directory).")


def _cached_length(held: Any) -> int:
    """Number of tokens in a cache; 0 without one.

    Raises:
        LoopQError: the cache is of another kind.
    """
    if held is None:
        return 0
    if type(held) is not DynamicCache:
        raise LoopQError(f"A program keeps keys and values in a DynamicCache; got {type(held).__name__}.")
    return held.get_seq_length()


def _caches(cached: TextProgram | None) -> list[Any]:
    """Inputs with keys and values, for each attention in turn."""
    inputs = get_state(cached.graph_module).signature.inputs if cached is not None else ()
    return [spec for spec in inputs if spec.name.startswith(PAST_PREFIX)]


def _vocabulary(program: TextProgram) -> int:
    """Entries of the logits."""
    reader = program.reader()
    return reader.read_given(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64)).shape[-1]


def _generation_config(given: GenerationConfig | str | os.PathLike[str]) -> GenerationConfig:
    if isinstance(given, GenerationConfig):
        return GenerationConfig.from_dict(given.to_dict())
    folder = Path(given)
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        raise LoopQError(
            f"There is no {GENERATION_CONFIG_NAME} in {folder}; leave generation_config out, or give an object."
        )
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise LoopQError(f"{folder / GENERATION_CONFIG_NAME} cannot be read: {error}") from error
