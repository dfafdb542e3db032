"""`loopq-compile export`: ONNX and GGUF files, Hugging Face folders, and lowered programs with kernels for GPUs."""

from __future__ import annotations

import contextlib
import json as json_module
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopq_compile.cli.common import Json, TrustRemoteCode, load, note, print_json, whole_numbers
from loopq_compile.errors import LoopQError, did_you_mean

if TYPE_CHECKING:
    from loopq_compile.sources.loading import Loaded

_ONNX = ("qdq", "onnxruntime")
_TARGETS = (*_ONNX, "openvino", "triton", "gguf", "compressed-tensors")
_GOES_WITH: dict[str, tuple[str, ...]] = {
    "form": (*_ONNX, "triton"),
    "cache": (*_ONNX, "triton", "openvino"),
    "last_token": (*_ONNX, "triton", "openvino"),
    "kv_bits": (*_ONNX, "triton"),
    "products": _ONNX,
    "head_bits": (*_ONNX, "openvino"),
    "early_exit": _ONNX,
    "float_bits": (*_ONNX, "openvino"),
    "external_data_threshold": _ONNX,
    "genai": _ONNX,
    "architectures": ("triton",),
    "embeddings": ("gguf",),
    "head": ("gguf",),
    "config": ("gguf",),
    "pre_tokenizer": ("gguf",),
    "source": ("compressed-tensors",),
    "dtype": ("compressed-tensors",),
    "zero_points": ("compressed-tensors",),
    "trust_remote_code": ("compressed-tensors",),
}
"""By option of the command, the targets that take it."""


def export_command(
    context: typer.Context,
    program: Annotated[str, typer.Argument(metavar="DIR", help="Folder written by `loopq-compile compile`.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the output and the tokenizer.")],
    target: Annotated[
        str,
        typer.Option(
            help="qdq: ONNX with standard operators, for any runtime; onnxruntime: ONNX with packed products; "
            "openvino: a folder for OpenVINO; triton: fused kernels, compiled for NVIDIA GPUs; gguf: a file for "
            "llama.cpp; compressed-tensors: a folder for transformers and vLLM."
        ),
    ] = "qdq",
    form: Annotated[
        str, typer.Option(help="unrolled: every loop has its nodes; rolled: one Loop, its count an input.")
    ] = "unrolled",
    cache: Annotated[
        bool, typer.Option("--cache", help="Key-value cache: the file reads a prompt once and then token by token.")
    ] = False,
    last_token: Annotated[
        bool, typer.Option("--last-token", help="With --cache: compute logits for only the last token.")
    ] = False,
    products: Annotated[
        str,
        typer.Option(
            help="With --target onnxruntime: packed, 4-bit weights; int8, fast prompts and batches in more memory; "
            "both, by the number of tokens."
        ),
    ] = "packed",
    head_bits: Annotated[
        int | None,
        typer.Option("--head-bits", help="With --target onnxruntime or openvino: 4 or 8 bits for the head."),
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option("--kv-bits", help="With --cache: keys and values in 8 or 4 bits.")
    ] = None,
    early_exit: Annotated[
        bool,
        typer.Option("--early-exit", help="With --form rolled: stop the loop by the model's exit gate."),
    ] = False,
    float_bits: Annotated[
        int, typer.Option("--float-bits", help="16 stores scales, embeddings and head in half the bytes.")
    ] = 32,
    external_data_threshold: Annotated[
        int | None,
        typer.Option(
            "--external-data-threshold",
            metavar="BYTES",
            help="Weights above this size (64 MiB by default) get a separate file, which needs less memory.",
        ),
    ] = None,
    genai: Annotated[
        bool,
        typer.Option("--genai", help="Also write genai_config.json, for onnxruntime-genai; implies --cache."),
    ] = False,
    architectures: Annotated[
        str,
        typer.Option("--sm", metavar="LIST", help="With --target triton: compute capabilities such as 80,90; or all."),
    ] = "",
    embeddings: Annotated[
        str, typer.Option(help="With --target gguf: type of the embeddings, q8_0, q6_k, f16 or f32.")
    ] = "q8_0",
    head: Annotated[str, typer.Option(help="With --target gguf: type of the head.")] = "q8_0",
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --target gguf: the model's config.json, if the program has none."),
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            "--pre-tokenizer",
            metavar="NAME",
            help="With --target gguf: llama.cpp's name for how text is split; none leaves the tokenizer out.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --target compressed-tensors: the compiled model's folder or hub id, for its own code and "
            "weights that the program does not use.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="With --target compressed-tensors: float32, bfloat16 or float16 for all but the integers."),
    ] = None,
    zero_points: Annotated[
        bool,
        typer.Option("--zero-points", help="With --target compressed-tensors: write negative scales as zero points."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Write a compiled program as an ONNX file, for OpenVINO, llama.cpp, vLLM or transformers, or as GPU kernels.

    ONNX files pass the ONNX checker and run in ONNX Runtime: try `loopq-compile generate DIR` on one.
    """
    loaded = load(program)
    if loaded.kind != "program":
        raise LoopQError(f"{program} is not a compiled program; run `loopq-compile compile {program} --out DIR` first.")
    _check_options(context, target)  # from here on, options are taken from the context by their target
    options = {name: context.params[name] for name, targets in _GOES_WITH.items() if target in targets}
    if target == "compressed-tensors":
        _export_hugging_face(loaded, out, options, json)
    elif target == "gguf":
        _export_gguf(loaded, out, options, json)
    elif target == "openvino":
        _export_openvino(loaded, out, options, json)
    elif target == "triton":
        _export_kernels(loaded, out, options, json)
    else:
        _export_onnx(loaded, out, target, options, json)


def _check_options(context: typer.Context, target: str) -> None:
    """Refuses an unknown target, and options that were set and that it does not take."""
    if target not in _TARGETS:
        raise LoopQError(f"There is no target {target!r}.{did_you_mean(target, _TARGETS)}")
    for option in context.command.params:
        targets = _GOES_WITH.get(option.name or "", _TARGETS)
        if target not in targets and context.params[option.name or ""] != option.default:
            raise LoopQError(f"{option.opts[0]} goes with --target {', '.join(targets)}; not with {target}.")


def _export_gguf(loaded: Loaded, out: Path, options: dict[str, Any], json: bool) -> None:
    """Writes `model.gguf` into the folder `out`, or the file `out` if it ends in .gguf."""
    file = out if out.suffix == ".gguf" else out / "model.gguf"
    file.parent.mkdir(parents=True, exist_ok=True)
    with _settings_of(loaded) as folder:
        with_tokenizer = loaded.tokenizer is not None and options["pre_tokenizer"] != "none"
        config = options["config"] or folder
        report = loaded.model.export_gguf(
            file, **{**options, "config": config}, tokenizer=folder if with_tokenizer else None
        )
    _show(report, json)


def _export_hugging_face(loaded: Loaded, out: Path, options: dict[str, Any], json: bool) -> None:
    with _settings_of(loaded) as folder:
        report = loaded.model.export_hugging_face(out, tokenizer=folder, **options)
    _show(report, json)


def _export_openvino(loaded: Loaded, out: Path, options: dict[str, Any], json: bool) -> None:
    from loopq_compile.backends.openvino.folder import KIND, versions
    from loopq_compile.storage.atomic import add_files, check_folder

    check_folder(out, KIND, loaded.files())
    report = loaded.model.export_openvino(out, **{name: options[name] for name in options if name != "cache"})
    add_files(out, KIND, loaded.files(), versions())
    _show(report, json)


@contextlib.contextmanager
def _settings_of(loaded: Loaded) -> Iterator[Path]:
    """A temporary folder with the tokenizer and the settings of a program."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in loaded.files().items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        yield Path(folder)


def _show(report: Any, json: bool) -> None:
    """Prints the report of an export, a dataclass with a `path`."""
    if json:
        print_json({**asdict(report), "path": str(report.path)})
    else:
        note(json)(str(report))


def _export_onnx(loaded: Loaded, out: Path, target: str, options: dict[str, Any], json: bool) -> None:
    from loopq_compile.backends.onnx.folder import KIND
    from loopq_compile.backends.onnx.genai import CONFIG_FILE
    from loopq_compile.sources.loading import save_beside
    from loopq_compile.storage.atomic import check_folder

    genai = options.pop("genai")
    options["cache"] = options["cache"] or genai
    ends = _end_tokens(loaded, options["form"]) if genai else None
    loaded = _with_special_tokens(loaded) if genai else loaded
    check_folder(out, KIND, [*loaded.files(), *([CONFIG_FILE] if genai else [])])
    report = loaded.model.export_onnx(out, target=target, **options)
    save_beside(loaded, out)
    if ends is not None:
        _write_genai(loaded, out, ends, note(json))
    if json:
        print_json(
            {
                "path": str(report.path),
                "bytes": report.bytes,
                "target": report.target,
                "form": report.form,
                "opset": report.opset,
                "nodes": report.nodes,
                "integer_weights": report.integer_weights,
                "inputs": report.inputs,
                "outputs": report.outputs,
            }
        )
    else:
        note(json)(str(report))


def _export_kernels(loaded: Loaded, out: Path, options: dict[str, Any], json: bool) -> None:
    from loopq_compile.backends.onnx.exporter import FORMS
    from loopq_compile.backends.triton import save
    from loopq_compile.backends.triton.ahead import ARCHITECTURES

    chosen = whole_numbers("--sm", options["architectures"]) or ARCHITECTURES
    program, rolled = loaded.model, options["form"] == "rolled"
    if options["form"] not in FORMS:
        raise LoopQError(f"form must be one of {', '.join(FORMS)}; got {options['form']!r}.")
    if options["cache"]:
        program = program.with_cache(stacked=rolled, last_token=options["last_token"], kv_bits=options["kv_bits"])
    elif options["last_token"] or options["kv_bits"] is not None:
        raise LoopQError("--last-token and --kv-bits need a key-value cache: add --cache.")
    report = save(program, out, architectures=chosen, rolled=rolled, extra_files=loaded.files())
    if json:
        print_json(asdict(report))
    else:
        note(json)(str(report))


def _end_tokens(loaded: Loaded, form: str) -> int | list[int]:
    """The tokens that end a text in onnxruntime-genai; checked before anything is written."""
    from loopq_compile.backends.onnx.genai import ROLLED_REFUSAL
    from loopq_compile.generation.tokenizer import END_TOKENS
    from loopq_compile.sources.loading import end_tokens

    if form == "rolled":
        raise LoopQError(ROLLED_REFUSAL)
    ends = end_tokens(loaded)
    if ends is None:
        raise LoopQError(
            "onnxruntime-genai needs to know which token ends a text. There is no generation_config.json with an "
            f"eos_token_id, and no tokenizer with one of {', '.join(END_TOKENS)}; export without --genai and call "
            "loopq_compile.backends.onnx.write_genai_config(DIR, eos_token_id=...)."
        )
    return ends


def _with_special_tokens(loaded: Loaded) -> Loaded:
    """The model with a tokenizer_config.json that tells onnxruntime-genai what the tokenizer adds to a text."""
    from loopq_compile.backends.onnx.genai_tokenizer import TOKENIZER_CONFIG, with_special_tokens

    settings = json_module.loads(loaded.settings.get(TOKENIZER_CONFIG, "{}"))
    if loaded.tokenizer is None or not settings or with_special_tokens(settings, loaded.tokenizer) == settings:
        return loaded
    completed = json_module.dumps(with_special_tokens(settings, loaded.tokenizer), indent=2) + "\n"
    return loaded._replace(settings={**loaded.settings, TOKENIZER_CONFIG: completed})


def _write_genai(loaded: Loaded, out: Path, ends: int | list[int], say: Callable[[str], None]) -> None:
    from loopq_compile.backends.onnx.genai import write_genai_config
    from loopq_compile.backends.onnx.genai_tokenizer import TOKENIZER_CONFIG, notes_for, with_special_tokens

    settings = json_module.loads(loaded.settings.get(TOKENIZER_CONFIG, "{}"))
    longest = settings.get("model_max_length")
    known = {"context_length": longest} if isinstance(longest, int) and 0 < longest < 2**20 else {}
    write_genai_config(out, eos_token_id=ends, **known)
    if loaded.tokenizer is not None:
        settings = with_special_tokens(settings, loaded.tokenizer)
    for text in notes_for(loaded.tokenizer, settings):
        say(f"note: {text}.")
