"""The looped language model that ships with the package, its tokenizer, and text to calibrate and measure it on.

    model, tokenizer = load_model(), load_tokenizer()
    batches = calibration_tokens(samples=32, length=128)
    text = held_out_text()

The text is read from the documentation inside the installed libraries (see `corpus`); none is stored here.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

from loopq_compile.errors import LoopQError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from loopq_compile.models import Ouro

__all__ = ["HeldOut", "calibration_tokens", "held_out_text", "load_model", "load_tokenizer", "model_card"]

CALIBRATION_SOURCES = (
    "argparse.py", "asyncio/base_events.py", "calendar.py", "collections/__init__.py",
    "concurrent/futures/_base.py", "configparser.py", "contextlib.py", "csv.py", "dataclasses.py", "datetime.py",
    "difflib.py", "doctest.py", "email/message.py", "enum.py", "fractions.py", "functools.py", "heapq.py",
    "inspect.py", "ipaddress.py", "json/__init__.py", "logging/__init__.py", "pathlib.py", "pydoc_data/topics.py",
    "random.py", "shutil.py", "statistics.py", "string.py", "subprocess.py", "tarfile.py", "textwrap.py",
    "threading.py", "typing.py", "unittest/case.py", "urllib/request.py", "zipfile.py", "torch/_tensor_docs.py",
    "torch/_torch_docs.py", "torch/distributions/distribution.py", "torch/functional.py", "torch/hub.py",
    "torch/nn/functional.py", "torch/nn/init.py", "torch/nn/modules/activation.py", "torch/nn/modules/conv.py",
    "torch/nn/modules/loss.py", "torch/nn/modules/module.py", "torch/nn/modules/normalization.py",
    "torch/nn/modules/rnn.py", "torch/nn/modules/transformer.py", "torch/nn/utils/rnn.py", "torch/optim/adam.py",
    "torch/optim/lr_scheduler.py", "torch/optim/optimizer.py", "torch/serialization.py",
    "torch/utils/data/dataloader.py", "torch/utils/data/dataset.py",
)  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """Held-out passages of the bundled model as found on this machine.

    text: the passages found, joined by an empty line, in the manifest's order.
    passages: the same, one string each.
    passages_found, passages_total, characters_found, characters_total: how much of the text behind the model card's
    figures is present here; other library versions word some passages differently.
    """

    text: str
    passages: tuple[str, ...]
    passages_found: int
    passages_total: int
    characters_found: int
    characters_total: int

    def __str__(self) -> str:
        share = self.characters_found / self.characters_total
        found = f"{self.passages_found} of {self.passages_total} held-out passages"
        return f"{found} ({share:.0%} of the characters) found in the installed libraries"


def _read_text(name: str) -> str:
    try:
        return files(__package__).joinpath(name).read_text(encoding="utf-8")
    except OSError as error:
        raise LoopQError(f"the bundled file {name!r} cannot be read ({error}); reinstall loopq-compile") from error


def _read_json(name: str) -> Any:
    return json.loads(_read_text(name))


def load_model() -> "Ouro":
    """The trained model, in fp32 and evaluation mode, with its T = 4 loops. Each call returns a new copy.

    Raises `LoopQError` when the package data is missing or does not fit the model.
    """
    import torch
    from safetensors.torch import load_file

    from loopq_compile.models import Ouro, OuroConfig

    config = OuroConfig.from_dict(_read_json("config.json"))
    with torch.random.fork_rng(devices=[]):
        model = Ouro(config)
    try:
        with as_file(files(__package__).joinpath("model.safetensors")) as path:
            tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        if config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        model.load_state_dict(tensors)
    except (OSError, KeyError, RuntimeError) as error:
        raise LoopQError(f"the bundled model cannot be loaded ({error}); reinstall loopq-compile") from error
    return model.eval()


def load_tokenizer() -> "Tokenizer":
    """The byte-level BPE tokenizer of the bundled model; id 0, `<|endoftext|>`, ends each passage in training."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_read_text("tokenizer.json"))


@cache
def held_out_text() -> HeldOut:
    """Text that the bundled model never saw, read from the installed libraries (a few seconds, then cached).

    Raises `LoopQError` if none of the manifest's passages is found; the result counts missing ones.
    """
    from loopq_compile.bundled.corpus import read_manifest

    manifest: dict[str, list[list[Any]]] = _read_json("manifest.json")
    found = tuple(passage.text for passage in read_manifest(manifest))
    total = sum(map(len, manifest.values()))
    characters = sum(size for wanted in manifest.values() for _, size in wanted)
    if not found:
        raise LoopQError(
            f"none of the {total} held-out passages stands in the installed libraries; are their Python sources there? "
            "Measure on a text file of your own instead."
        )
    return HeldOut("\n\n".join(found), found, len(found), total, sum(map(len, found)), characters)


def calibration_tokens(samples: int = 32, length: int = 128, seed: int = 0, batch: int = 4) -> "list[Tensor]":
    """Token batches for calibration, only from training passages (standard library and torch documentation).

    Returns a list of int64 tensors `[batch, length]`, `samples` rows in total (the last tensor holds the rest).
    The same seed and library versions give the same tokens. Raises `LoopQError` for sizes below one, or if the text
    is too short.
    """
    import torch

    from loopq_compile.bundled.corpus import deduplicate, read_source, shuffled

    if min(samples, length, batch) < 1:
        raise LoopQError(f"samples={samples}, length={length} and batch={batch} must all be at least 1")
    passages = deduplicate(passage for source in CALIBRATION_SOURCES for passage in read_source(source))
    tokenizer = load_tokenizer()
    ids: list[int] = []
    for passage in shuffled([passage for passage in passages if not passage.held_out], seed):
        if len(ids) >= samples * length:
            break
        ids.extend(tokenizer.encode(passage.text).ids)
        ids.append(0)
    if len(ids) < samples * length:
        raise LoopQError(
            f"the calibration text holds {len(ids)} tokens, samples={samples} of length={length} need "
            f"{samples * length}; ask for fewer"
        )
    return list(torch.tensor(ids[: samples * length]).view(samples, length).split(batch))


def model_card() -> str:
    """The model card (Markdown): data, training, loss of each loop on the held-out text, limits."""
    return _read_text("MODEL_CARD.md")
