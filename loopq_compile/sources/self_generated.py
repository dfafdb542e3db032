"""Calibration text sampled by the model itself, and other sources of calibration text.

A teacher's own samples need no data set, follow its own distribution, and have only the model's licence. Each row
starts with the token that begins texts, or a random one if there is none. It continues at temperature 1 and ignores
end tokens, so all rows have one length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopq_compile.errors import LoopQError
from loopq_compile.graph.texts import logits_of
from loopq_compile.progress import progress
from loopq_compile.sources.calibration_text import read_text
from loopq_compile.storage.atomic import writing_file

CALIBRATIONS = ("self", "docs", "mixed")
"""Sources of calibration text other than files: sampled by the model; docstrings; half of each."""
SUBSTITUTES = {
    "docs": "docstrings of the installed libraries",
    "bundled": "docstrings of the installed libraries",
    "self": "text sampled by the model",
    "mixed": "docstrings and text sampled by the model",
}
"""Sources that stand in for the text that a model will read, in words."""
CHARACTERS = 16
"""Characters of a text to read per needed token, about four times as many as it takes; samples are drawn from these."""


def generate_tokens(
    model: nn.Module,
    bos: int | None,
    samples: int = 32,
    length: int = 128,
    seed: int = 0,
    batch: int = 16,
    *,
    cache: str | Path | None = None,
) -> list[Tensor]:
    """Token rows that `model` samples at temperature 1.

    Args:
        model: a causal language model. With a key-value cache like that of transformers, a row costs `length` steps;
            any other model reads the row again for every token.
        bos: first token of every row; None draws it at random from the vocabulary.
        samples, length: rows in total, and tokens in a row, the first included.
        seed: the same seed, sizes and model give the same rows.
        batch: rows sampled together.
        cache: a folder that stores every batch as soon as it is sampled; stored batches are not sampled again.

    Returns:
        Tensors `[<= batch, length]` of token ids on the CPU.

    Raises:
        LoopQError: a size is below one, `bos` is not a token of the model, or the cache cannot be written.
    """
    if min(samples, length, batch) < 1:
        raise LoopQError(f"samples={samples}, length={length} and batch={batch} must all be at least 1.")
    sizes = [min(batch, samples - begin) for begin in range(0, samples, batch)]
    folder = None if cache is None else Path(cache) / f"self-{_key(model, bos, length, seed, batch)}"
    made = []
    for number, rows in enumerate(progress(sizes, "sampling calibration text", len(sizes))):
        file = None if folder is None else folder / f"{number:04d}-{rows}.safetensors"
        tokens = _read(file)
        if tokens is None:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
            tokens = _sample(model, bos, rows, length, generator)
            _write(file, tokens)
        made.append(tokens)
    return made


def first_token(model: Any) -> int | None:
    """The token that begins texts according to a Hugging Face model's configuration; None if it names none."""
    bos = getattr(getattr(model, "config", None), "bos_token_id", None)
    return bos if isinstance(bos, int) else None


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that change with any weight, its name, its sharing, or the model's configuration."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=8)
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    digest.update(repr(sorted((k, v) for k, v in values.items() if k not in ("_name_or_path", "dtype"))).encode())
    seen: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {seen.get(id(tensor), '')}".encode())
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def calibration_data(
    source: str,
    model: nn.Module | None,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int = 0,
    *,
    cache: str | Path | None = None,
) -> list[Tensor]:
    """Calibration batches `[<= 4, length]` from `source`, `samples` rows in total.

    Args:
        source: `"self"` (`generate_tokens`), `"docs"` (docstrings of installed libraries; `"bundled"` means the same),
            `"mixed"` (half of each), or the name of a text, see `calibration_text.read_text`; of a saved data set with
            splits, `train` is used. No more is read than the samples need.
        model: the teacher; only `"self"` and `"mixed"` need one.
        tokenizer: the model's; None means the bundled model's for `"docs"`, and is refused for a file.
        samples, length, seed: number of rows, tokens in each, and which are drawn.
        cache: folder for self-generated rows.

    Raises:
        LoopQError: there is no model, the text is unreadable or too short, or a size is below one.
    """
    if min(samples, length) < 1:
        raise LoopQError(f"samples={samples} and length={length} must be at least 1.")
    own = {"self": samples, "mixed": (samples + 1) // 2}.get(source, 0)
    rows = []
    if own:
        if model is None:
            raise LoopQError(f"Calibration text {source!r} is sampled by the model; here there is none to sample.")
        rows += generate_tokens(model, first_token(model), own, length, seed, cache=cache)
    if samples > own:
        rows += _rows_of_text(source, tokenizer, samples - own, length, seed)
    every = torch.cat(rows)
    if own not in (0, samples):  # alternating, so that any part of them is mixed as well
        order = torch.argsort(torch.tensor([*range(0, 2 * own, 2), *range(1, 2 * (samples - own), 2)]))
        every = every[order]
    return list(every.split(4))


def provenance(source: str) -> str:
    """A line about the text behind a calibration, and what to do if another would be better; of a file the name only,
    since programs are passed on.

    Args:
        source: as for `calibration_data`.
    """
    if source in SUBSTITUTES:
        return f"calibrated on {SUBSTITUTES[source]}; give --calibration for the text you care about"
    return f"calibrated on {Path(source).name}"


def _rows_of_text(source: str, tokenizer: Any, samples: int, length: int, seed: int) -> list[Tensor]:
    from loopq_compile import bundled
    from loopq_compile.generation.tokenizer import tokenize

    if source in ("docs", "mixed", "bundled"):
        own = bundled.load_tokenizer()
        if tokenizer is None or tokenizer.to_str() == own.to_str():
            return bundled.calibration_tokens(samples, length, seed)
        text = own.decode(torch.cat(bundled.calibration_tokens(2 * samples, length, seed)).flatten().tolist())
        ids = tokenize(tokenizer, text)
    else:
        for characters in (CHARACTERS * samples * length, 256 * samples * length, None):
            text = read_text(source, characters, split="train")
            ids = tokenize(tokenizer, text)
            if len(ids) >= samples * length or characters is None or len(text) < characters:
                break
    if len(ids) < length:
        raise LoopQError(f"{source} has {len(ids)} tokens, fewer than one sample of length {length}. Lower --length.")
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]]]


def _sample(model: nn.Module, bos: int | None, rows: int, length: int, generator: torch.Generator) -> Tensor:
    weight = next(model.parameters(), torch.empty(0))
    with torch.no_grad():
        vocabulary = logits_of(model(torch.zeros(1, 2, dtype=torch.int64, device=weight.device))).shape[-1]
        if bos is not None and not 0 <= bos < vocabulary:
            raise LoopQError(f"bos={bos} is not a token of a model with a vocabulary of {vocabulary}.")
        first = torch.randint(vocabulary, (rows, 1), generator=generator)
        ids = [first if bos is None else torch.full_like(first, bos)]
        steps = _steps(model, weight.device)
        next(steps)
        for _ in range(length - 1):
            logits = steps.send(ids)[:, -1].float().cpu()
            ids.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
    return torch.cat(ids, 1)


def _steps(model: Any, device: torch.device) -> Generator[Any, Any, None]:
    """Takes the tokens so far, gives the next token's logits: with the model's cache, or by reading everything again.

    `model.generate` is not used: it stops at end tokens and draws from PyTorch's global generator.
    """
    cached = hasattr(model, "generate") and hasattr(model, "prepare_inputs_for_generation")
    past, ids = None, (yield)
    while True:
        if cached:
            output = model(input_ids=ids[-1].to(device), past_key_values=past, use_cache=True)
            past = output.past_key_values
        else:
            output = model(torch.cat(ids, 1).to(device))
        ids = yield logits_of(output)


def _key(model: nn.Module, *arguments: Any) -> str:
    return hashlib.blake2b(repr((fingerprint(model), arguments)).encode(), digest_size=8).hexdigest()


def _read(file: Path | None) -> Tensor | None:
    if file is None or not file.is_file():
        return None
    from safetensors.torch import load_file

    try:
        return load_file(file)["tokens"]
    except Exception:  # cut off during writing: sampled again
        return None


def _write(file: Path | None, tokens: Tensor) -> None:
    if file is None:
        return
    from safetensors.torch import save_file

    with writing_file(file) as path:
        save_file({"tokens": tokens}, path)
