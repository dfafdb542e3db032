"""How each kind of output is run, for model cards. `DIR` stands for the folder, or its id on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What a card says about one kind of output.

    Args:
        what: in words.
        library: the hub's name of the library that loads it.
        tags: the hub's tags.
        engines: code in Markdown, by engine.
    """

    what: str
    library: str
    tags: tuple[str, ...]
    engines: Mapping[str, str]


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _shell(code: str) -> str:
    return f"```sh\n{code.strip()}\n```"


RECIPES = {
    "program": Recipe(
        "a program of loopq_compile",
        "loopq_compile",
        (),
        {
            "loopq_compile": _python(
                'import loopq_compile as lq\n\nprogram = lq.load("DIR")\nlogits = program(input_ids)'
            ),
            "transformers, where the program was compiled from one of its models": _python(
                "import loopq_compile as lq\nfrom transformers import AutoModelForCausalLM\n\n"
                'lq.register_with_transformers()\nmodel = AutoModelForCausalLM.from_pretrained("DIR")'
            ),
            "Command line": _shell(
                'loopq-compile generate DIR --prompt "Text"\nloopq-compile export DIR --out my-onnx'
            ),
        },
    ),
    "onnx": Recipe(
        "an ONNX file",
        "onnxruntime",
        ("onnx",),
        {
            "ONNX Runtime": _python(
                'import onnxruntime\n\nsession = onnxruntime.InferenceSession("DIR/model.onnx")\n'
                'logits = session.run(None, {"input_ids": ids})[0]  # session.get_inputs() lists further inputs'
            ),
            "Command line": _shell('loopq-compile generate DIR --prompt "Text"'),
        },
    ),
    "gguf": Recipe(
        "a GGUF file",
        "llama.cpp",
        ("gguf", "llama.cpp"),
        {"llama.cpp, with the name of the file for FILE": _shell('llama-cli -m DIR/FILE.gguf -p "Text" -n 64')},
    ),
    "openvino": Recipe(
        "a model for OpenVINO",
        "openvino",
        ("openvino",),
        {
            "OpenVINO": _python(
                "from loopq_compile.backends.openvino import OpenVinoExecutable\n\n"
                'tokens = OpenVinoExecutable("DIR").generate(ids, 64)'
            ),
            "optimum-intel, for models of transformers": _python(
                "from optimum.intel import OVModelForCausalLM\n\n"
                'model = OVModelForCausalLM.from_pretrained("DIR", use_cache=True, stateful=True)'
            ),
            "Command line": _shell('loopq-compile generate DIR --prompt "Text"'),
        },
    ),
    "compressed-tensors": Recipe(
        "a compressed-tensors folder",
        "transformers",
        ("compressed-tensors", "vllm"),
        {
            "transformers, with the package compressed-tensors": _python(
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                'model = AutoModelForCausalLM.from_pretrained("DIR")\n'
                'tokenizer = AutoTokenizer.from_pretrained("DIR")\n'
                'print(tokenizer.decode(model.generate(**tokenizer("Text", return_tensors="pt"))[0]))'
            ),
            "vLLM, for architectures that it has": _shell("vllm serve DIR"),
            "lm-eval": _shell("lm_eval --model hf --model_args pretrained=DIR --tasks lambada_openai"),
            "A model with its own code also needs": "`trust_remote_code=True` (vLLM: `--trust-remote-code`). Read the "
            "`.py` files first.",
        },
    ),
    "triton": Recipe(
        "a lowered program with kernels for NVIDIA GPUs",
        "loopq_compile",
        (),
        {
            "loopq_compile": _python(
                "from loopq_compile.backends.triton import load\n\n"
                'executable = load("DIR")\nlogits = executable(input_ids)'
            )
        },
    ),
}
"""By kind of output."""
