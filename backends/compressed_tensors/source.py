"""Where the parts of a folder come from that a program does not hold: code, tokenizer, tensors that nothing reads."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loopq_compile.errors import LoopQError, first_line
from loopq_compile.graph.origin import Origin

_SETTINGS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
"""Files beside configuration and weights that say how a model is used."""
GENERATION = _SETTINGS[-1]
_CODE_NAME = "auto_map"


@dataclass(frozen=True)
class Source:
    """The model that a program was compiled from: in memory, in a folder, or on the hub.

    Args:
        model: the module itself, or the name of a folder or hub id, or None.
        trusted: whether code of a folder may run.
        given: whether the user named it. Otherwise it is only looked up on this machine, and may be missing.
    """

    model: nn.Module | str | None
    trusted: bool
    given: bool = True

    @cached_property
    def folder(self) -> Path | None:
        """The folder with the model's files; for a hub id, that of the cache, without weights.

        Raises:
            LoopQError: there is no such folder, and the hub does not give it.
        """
        if isinstance(self.model, nn.Module):
            file = getattr(sys.modules.get(type(self.model).__module__), "__file__", None)
            return Path(file).parent if file and self._is_remote(self.model) else None
        return self._find("*.json", "*.py", "*.jinja", "*.txt", "*.model")

    def model_class(self, name: str, origin: Origin) -> Any:
        """The class that was captured.

        Raises:
            LoopQError: it is none of transformers, and there is no code for it, or the code is not trusted.
        """
        import transformers

        if isinstance(self.model, nn.Module) and type(self.model).__name__ == name:
            return type(self.model)
        if isinstance(found := getattr(transformers, name, None), type):
            return found
        reference = (origin.config.get(_CODE_NAME) or {}).get("AutoModelForCausalLM")
        if not reference:
            raise LoopQError(
                f"{name} is not a model of transformers, so transformers and vLLM cannot load it. Export the program "
                "as ONNX."
            )
        if self.folder is None:
            raise LoopQError(
                f"{name} has its own Python code, which goes into the folder. Name the model's folder or hub id: "
                "source=FOLDER (--source FOLDER)."
            )
        if not self.trusted:
            raise LoopQError(
                f"{name} brings its own Python code, which would run on this machine with all your rights. Read the "
                f".py files of {self.model} first; then allow it with trust_remote_code=True (--trust-remote-code)."
            )
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(_plain(reference), str(self.folder))

    def code_files(self, origin: Origin) -> list[Path]:
        """The Python files that `auto_map` names, and those that they import.

        Raises:
            LoopQError: one is missing.
        """
        references = (origin.config.get(_CODE_NAME) or {}).values()
        if not references or self.folder is None:
            return []
        from transformers.dynamic_module_utils import get_relative_import_files

        found: dict[Path, None] = {}
        for entry in references:
            for reference in entry if isinstance(entry, list | tuple) else [entry]:
                if reference is None:
                    continue
                file = self.folder / f"{_plain(reference).partition('.')[0]}.py"
                if not file.is_file():
                    raise LoopQError(
                        f"{self.folder} lacks {file.name}, which its config.json names. Download it again."
                    )
                found |= dict.fromkeys([file, *map(Path, get_relative_import_files(str(file)))])
        return list(found)

    def copy_settings(self, goal: Path, first: Path | None) -> None:
        """Copies tokenizer and generation settings into `goal`; files of `first` win.

        Raises:
            LoopQError: `first` is not a folder.
        """
        if first is not None and not first.is_dir():
            raise LoopQError(f"{first} is not a folder. Name the one that has tokenizer.json.")
        for folder in filter(None, (self.folder, first)):
            for name in _SETTINGS:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, goal / name)
        generation = getattr(self.model, "generation_config", None)
        if generation is not None and not (goal / GENERATION).exists():
            (goal / GENERATION).write_text(generation.to_json_string(), encoding="utf-8")

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the model's stored tensors that are among `names`."""
        wanted = set(names)
        if isinstance(self.model, nn.Module):
            return {name: value.detach() for name, value in self.model.state_dict().items() if name in wanted}
        from safetensors import safe_open

        folder, found = self._find("*.safetensors", "*.json"), dict[str, Tensor]()
        for file in sorted(folder.glob("*.safetensors")) if folder else []:
            with safe_open(file, "pt") as stored:
                found |= {name: stored.get_tensor(name) for name in wanted & set(stored.keys())}
        return found

    def _find(self, *patterns: str) -> Path | None:
        if not self.model:
            return None
        name = str(self.model)
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=not self.given))
        except Exception as error:  # the hub raises many kinds of errors
            if not self.given:
                return None
            raise LoopQError(
                f"{name!r} is not a folder here, and the Hugging Face hub could not give it: {first_line(error)} Name "
                "the folder of the model: source=FOLDER (--source FOLDER)."
            ) from error

    @staticmethod
    def _is_remote(model: nn.Module) -> bool:
        return type(model).__module__.startswith("transformers_modules.")


def plain_references(auto_map: Any) -> dict[str, Any]:
    """`auto_map` with the code in the folder itself, not in another repository of the hub."""
    return {
        name: [value and _plain(value) for value in entry] if isinstance(entry, list | tuple) else _plain(entry)
        for name, entry in auto_map.items()
    }


def _plain(reference: str) -> str:
    """`REPOSITORY--module.Class` as `module.Class`."""
    return reference.rpartition("--")[2]
