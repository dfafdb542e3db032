"""Checks of a public looped model's own code, unchanged: `python -m tests.upstream.check CHECKOUT`.

CHECKOUT is a clone of LoopedLMs/ouro_rl (needs transformers 4.57.6), armenjeddi/loopformer, sandyresearch/parcae or
seal-rg/recurrent-pretraining (Huginn; needs transformers 4.57.6). A tiny model with random weights is captured (logits
equal those of the code), its loop is found, it is compiled to w8a8 (close to the code's logits) and w4a4 (a random
model is far off: a figure, not a check), and the w4a4 program is compared with its ONNX files, unrolled and rolled.
Every way of calling the code that it has is captured and compared, and decoding with a key-value cache is compared with
the code on all tokens. The status is 1 if anything is off by more than stated. The last results:
loopq_compile/bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import loopq_compile as lq
from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.capture.to_graph import capture
from loopq_compile.graph.state import get_state
from loopq_compile.program import Program
from tests import decoding

Inputs = Callable[[nn.Module, Tensor], dict[str, Any]]
"""Makes the arguments of a call from the model and token ids `[batch, sequence]`."""


class Upstream(NamedTuple):
    """A public model: a file that identifies its checkout, how a tiny one is made, and what is expected.

    `forms` are arguments with which its code is also called, in addition to those of `inputs`.
    """

    marker: str
    make: Callable[[Path], nn.Module]
    inputs: Inputs
    structure: str
    forms: Mapping[str, Inputs]


def ouro(checkout: Path) -> nn.Module:
    """The remote code of the hub's Ouro repositories; its package's own imports are left out."""
    package = types.ModuleType("ouro_code")
    package.__path__ = [str(checkout / "ouro_rl/modeling")]
    sys.modules["ouro_code"] = package
    config = importlib.import_module("ouro_code.configuration_ouro").OuroConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, total_ut_steps=3,
    )  # fmt: skip
    return importlib.import_module("ouro_code.modeling_ouro").OuroForCausalLM(config)


def loopformer(checkout: Path) -> nn.Module:
    """The code prints its size."""
    sys.path.insert(0, str(checkout))
    code = importlib.import_module("models.loopformer")
    with contextlib.redirect_stdout(io.StringIO()):
        return code.GPT(
            code.GPTConfig(block_size=64, vocab_size=64, n_layer=1, n_head=2, n_embd=32, intermediate_dim=64)
        )


def parcae(checkout: Path) -> nn.Module:
    """The initial state is zero, since logits of a random one cannot be compared."""
    sys.path.insert(0, str(checkout))
    config = importlib.import_module("parcae_lm.models.parcae.config").ParcaeConfig(
        block_size=64, vocab_size=64, padding_multiple=64, n_embd=32, intermediate_size=64, num_attention_heads=2,
        recurrent_embedding_dimension=32, recurrent_intermediation_embedding_dimension=64, n_layers_in_prelude=1,
        n_layers_in_recurrent_block=1, n_layers_in_coda=1, mean_recurrence=3, mean_backprop_depth=3,
        norm_class_name="RMSNorm", nonlin_name="ReLU2", tie_embeddings=True, qk_norm=True, prelude_norm=True,
        init_strategy="scaled", state_init="zero",
    )  # fmt: skip
    return config.construct_model()


def huginn(checkout: Path) -> nn.Module:
    """The file that the hub's repository has; its package's own imports are left out."""
    package = types.ModuleType("recpre")
    package.__path__ = [str(checkout / "recpre")]
    sys.modules["recpre"] = package
    code = importlib.import_module("recpre.raven_modeling_minimal")
    config = importlib.import_module("recpre.raven_config_minimal").RavenConfig(
        n_embd=32, n_heads=2, n_layers=3, block_size=64, vocab_size=64, padding_multiple=64, intermediate_size=64,
        n_layers_in_prelude=1, n_layers_in_recurrent_block=1, n_layers_in_coda=1, mean_recurrence=3,
    )  # fmt: skip
    return code.RavenForCausalLM(config)


STATE = torch.randn(32, generator=torch.Generator().manual_seed(1))


def states(ids: Tensor) -> Tensor:
    """An initial state `[batch, length, 32]` for Huginn, which otherwise draws one for every call."""
    return STATE.expand(*ids.shape, -1)


def mask(ids: Tensor) -> Tensor:
    """Padding in the first row on the left, in the last on the right; a third of the row each."""
    made, third = torch.ones_like(ids), ids.shape[1] // 3
    made[0, :third] = 0
    made[-1, -third:] = 0
    return made


def embedded(model: Any, ids: Tensor) -> Tensor:
    """What the model's embedding makes of token ids."""
    return model.get_input_embeddings()(ids).detach()


def backwards(ids: Tensor) -> Tensor:
    """Positions `[sequence]` that are not the usual ones."""
    return torch.arange(ids.shape[1]).flip(0)


UPSTREAMS = {
    "ouro": Upstream(
        "ouro_rl/modeling/modeling_ouro.py",
        ouro,
        lambda model, ids: {"input_ids": ids, "use_cache": False},
        "3 x (model.layers, model.norm, model.early_exit_gate)",
        {
            "padding": lambda model, ids: {"attention_mask": mask(ids)},
            # Without a mask transformers takes other steps than 1 for texts packed into a row, which no export shows.
            "position ids": lambda model, ids: {
                "position_ids": backwards(ids).expand(len(ids), -1),
                "attention_mask": torch.ones_like(ids),
            },
            "inputs_embeds": lambda model, ids: {"input_ids": None, "inputs_embeds": embedded(model, ids)},
            "labels": lambda model, ids: {"labels": ids},
            "tuples": lambda model, ids: {"return_dict": False},  # `output_hidden_states` fails in the code itself
        },
    ),
    "loopformer": Upstream(
        "models/loopformer.py",
        loopformer,
        lambda model, ids: {"idx": ids, "targets": ids},  # with targets it returns the logits of all positions
        "8 x (time_embedder, dt_embedder, transformer.h)",
        {"without targets": lambda model, ids: {"targets": None}},
    ),
    "parcae": Upstream(
        "parcae_lm/models/parcae/parcae.py",
        parcae,
        lambda model, ids: {"input_ids": ids, "return_logits": True},
        "3 x (transformer.adapter, transformer.core_block)",
        {
            "position ids": lambda model, ids: {"position_ids": backwards(ids)},
            "labels": lambda model, ids: {"labels": ids},
        },
    ),
    "huginn": Upstream(
        "recpre/raven_modeling_minimal.py",
        huginn,
        lambda model, ids: {"input_ids": ids, "input_states": states(ids), "num_steps": 3, "use_cache": False},
        "3 x (transformer.adapter, transformer.core_block)",
        {
            "position ids": lambda model, ids: {"position_ids": backwards(ids)},
            "input_embeds": lambda model, ids: {"input_embeds": embedded(model, ids)},
            "labels": lambda model, ids: {"labels": ids},
        },
    ),
}


class OfTokens(nn.Module):
    """A public model as a function of only token ids, to which a key-value cache can be added."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of all positions."""
        return logits(self.model(**self.inputs(self.model, input_ids)))


def logits(output: Any) -> Tensor:
    """From a tuple or a mapping."""
    return output[0] if isinstance(output, tuple) else output["logits"]


def tokens(batch: int, length: int) -> Tensor:
    """Token ids `[batch, length]`."""
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(length))


Results = Iterator[tuple[str, float, float]]
"""Name, largest difference of a result in units of the largest of its numbers, and the tolerance."""


def check(upstream: Upstream, checkout: Path) -> Results:
    """Every comparison.

    Raises:
        AssertionError: another loop was found.
    """
    model = upstream.make(checkout).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around = 0.0 if name.endswith("bias") else 1.0
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else around + 0.1 * noise)
    yield from _programs(upstream, model)
    yield from _forms(upstream, model)
    yield _cache(upstream, model)


def _programs(upstream: Upstream, model: nn.Module) -> Results:
    example = upstream.inputs(model, tokens(2, 11))
    captured = Program(capture(model, example))
    finer = lq.compile(model, example, scheme="w8a8", method="symmetric")
    program = lq.compile(model, example, scheme="w4a4", method="symmetric")
    assert program.loops.describe() == upstream.structure, program.loops.describe()
    with tempfile.TemporaryDirectory() as folder:
        forms = ("unrolled", "rolled")
        files = {form: program.export_onnx(Path(folder) / form, form=form).path for form in forms}
        runs = {form: OnnxExecutable(path, threads=1) for form, path in files.items()}
        for batch, length in ((2, 11), (1, 20)):
            inputs = upstream.inputs(model, tokens(batch, length))
            with torch.no_grad():
                exact = logits(model(**inputs))
            quantized = logits(program(**inputs))
            yield f"captured, {batch} x {length}", _relative(logits(captured(**inputs)), exact), 1e-5
            yield f"w8a8 program, {batch} x {length}", _relative(logits(finer(**inputs)), exact), 0.1
            yield f"w4a4 program, {batch} x {length}", _relative(quantized, exact), float("inf")
            given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
            for form, run in runs.items():
                name = f"{form} ONNX against program, {batch} x {length}"
                yield name, _relative(logits(run(**given)), quantized), 3e-2


def _forms(upstream: Upstream, model: nn.Module) -> Results:
    """The captured program against the code, every tensor that they return, for every way of calling them."""
    for form, more in upstream.forms.items():

        def inputs(ids: Tensor, more: Inputs = more) -> dict[str, Any]:
            return {**upstream.inputs(model, ids), **more(model, ids)}

        program = Program(capture(model, inputs(tokens(2, 11))))
        for batch, length in ((2, 11), (1, 20)):
            with torch.no_grad():
                exact = pytree.tree_leaves(dict_or_tuple(model(**inputs(tokens(batch, length)))))
            found = pytree.tree_leaves(dict_or_tuple(program(**inputs(tokens(batch, length)))))
            pairs = [(f, e) for f, e in zip(found, exact, strict=True) if isinstance(e, Tensor)]
            worst = max(_relative(found, exact) for found, exact in pairs)
            yield f"called with {form}, {batch} x {length}", worst, 1e-5


def _cache(upstream: Upstream, model: nn.Module) -> tuple[str, float, float]:
    """Decoding in several steps against the code on all tokens.

    Raises:
        AssertionError: it differs by more than stated, or a row padded on the left does.
    """
    of_tokens = OfTokens(model, upstream.inputs).eval()
    cached = Program(capture(of_tokens, decoding.ids())).with_cache()
    signature, ids = get_state(cached.graph_module).signature, decoding.ids()
    decoding.check_decoding(of_tokens, cached, signature, tolerance=1e-5)
    found = decoding.decode(cached, signature, ids, torch.ones_like(ids), [5, 1, 1, 3])
    with torch.no_grad():
        return "decoding with a cache", _relative(found, of_tokens(ids)), 1e-5


def dict_or_tuple(output: Any) -> Any:
    """A model's output as a container that PyTorch knows."""
    return dict(output) if isinstance(output, Mapping) else output


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkout", type=Path, help="clone of one of the repositories")
    checkout = parser.parse_args().checkout.resolve()
    found = [name for name, upstream in UPSTREAMS.items() if (checkout / upstream.marker).is_file()]
    if not found:
        parser.error(f"{checkout} is no checkout of {', '.join(UPSTREAMS)}")
    print(f"{found[0]}, torch {torch.__version__}: {UPSTREAMS[found[0]].structure}")
    failed = False
    for name, difference, tolerance in check(UPSTREAMS[found[0]], checkout):
        print(f"{name}: {difference:.2g} (at most {tolerance:.2g})", flush=True)
        failed |= not difference <= tolerance
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
