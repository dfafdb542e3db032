"""The ways of calling Hugging Face's models: masks, positions, embeddings, labels, forms of output.

Every form is captured from one example and tried at other batches and lengths: at full precision the program returns
what the model returns, and the w4a4 program runs and returns the same structure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import loopq_compile as lq
from loopq_compile import LoopQError
from loopq_compile.backends.onnx import OnnxExecutable
from loopq_compile.capture.to_graph import capture
from loopq_compile.compiler import quantize
from loopq_compile.graph.scheme import Scheme
from loopq_compile.methods import get_pipeline
from loopq_compile.models import Huginn, LoopFormer, Nanbeige, Parcae, repeat_layers
from loopq_compile.program import Program
from tests.cli_models import tiny_llama, tiny_ouro
from tests.golf import GolfLM
from tests.looped_models import (
    HUGINN,
    LOOPFORMER,
    NANBEIGE,
    PARCAE,
    UniversalTransformer,
    dory,
    hrm_text,
    with_random_weights,
    zamba2,
)

SIZES = ((2, 11), (1, 1), (1, 7), (3, 40))


def ids(batch: int, length: int) -> Tensor:
    """Token ids `[batch, length]`."""
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def llama() -> nn.Module:
    """Layer 0 runs twice, layer 1 once."""
    return repeat_layers(tiny_llama(), 0, 0, 2)


def albert() -> nn.Module:
    """One layer runs twice."""
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=64, embedding_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.AlbertForMaskedLM(config).eval()


def huginn() -> nn.Module:
    """Two loops with PyTorch's initial weights: others are too far off in four bits."""
    torch.manual_seed(0)
    return Huginn(HUGINN, 2).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "albert": albert,
    "zamba2": lambda: zamba2(8),
    "ouro": tiny_ouro,
    "loopformer": lambda: LoopFormer(LOOPFORMER, (0.6, 0.4)).eval(),
    "parcae": lambda: with_random_weights(Parcae(PARCAE, 2)),
    "huginn": huginn,
    "nanbeige": lambda: with_random_weights(Nanbeige(NANBEIGE)),
    "dory": lambda: dory(n_recurrent_loops=2),
    "hrm-text": hrm_text,
    "golf": GolfLM,
    "encoder-layer": lambda: UniversalTransformer(2).eval(),
}


@functools.cache
def model_of(name: str) -> Any:
    """The model of that name, made once."""
    return MODELS[name]()


def mask(tokens: Tensor, *sides: str) -> Tensor:
    """Padding in the first row on the left, in the last on the right; a third of the row each."""
    made, third = torch.ones_like(tokens), tokens.shape[1] // 3
    if "left" in sides:
        made[0, :third] = 0
    if "right" in sides and third:
        made[-1, -third:] = 0
    return made


def embedded(model: Any, tokens: Tensor) -> Tensor:
    """The embedding layer's result for `tokens`."""
    return model.get_input_embeddings()(tokens).detach()


def positions(tokens: Tensor) -> Tensor:
    """Counted from the first real token, as `generate` does with padding on the left."""
    return (mask(tokens, "left").cumsum(-1) - 1).clamp(min=0)


Form = Callable[[Any, Tensor], dict[str, Any]]
FORMS: dict[str, Form] = {
    "mask": lambda model, x: {"input_ids": x, "attention_mask": mask(x, "left", "right")},
    "positions": lambda model, x: {
        "input_ids": x, "attention_mask": mask(x, "left"), "position_ids": positions(x),
    },
    "embeddings": lambda model, x: {"inputs_embeds": embedded(model, x), "attention_mask": mask(x, "right")},
    "labels": lambda model, x: {
        "input_ids": x, "attention_mask": mask(x, "right"), "labels": x.where(mask(x, "right") == 1, -100),
    },
    "tuple": lambda model, x: {"input_ids": x, "return_dict": False},
    "hidden-states": lambda model, x: {"input_ids": x, "output_hidden_states": True},
    "right-mask": lambda model, x: {"input_ids": x, "attention_mask": mask(x, "right")},
    "all": lambda model, x: {
        "inputs_embeds": embedded(model, x), "attention_mask": mask(x, "left", "right"), "position_ids": positions(x),
        "labels": x, "output_hidden_states": True, "return_dict": False,
    },
}  # fmt: skip
CASES = [
    *((name, form) for name in ("llama", "albert") for form in FORMS if form not in ("right-mask", "all")),
    *((name, "mask") for name in ("ouro", "parcae", "huginn", "nanbeige")),
    *((name, "all") for name in ("zamba2", "dory", "hrm-text")),
    ("encoder-layer", "right-mask"),
]
_NOT_OURS = ("position_ids", "inputs_embeds", "labels", "return_dict", "output_hidden_states")
NOT_THERE = {
    **dict.fromkeys(("ouro", "parcae", "huginn", "nanbeige", "encoder-layer"), _NOT_OURS),
    **dict.fromkeys(("loopformer", "golf"), ("attention_mask", *_NOT_OURS)),
}
"""Arguments that a model does not have."""


def without_cache(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The model's own result."""
    with torch.no_grad():
        return model(**inputs, **({"use_cache": False} if isinstance(model, transformers.GenerationMixin) else {}))


@pytest.mark.parametrize(("name", "form"), CASES, ids=["-".join(case) for case in CASES])
def test_a_form_of_call_is_captured_and_quantized(name: str, form: str) -> None:
    model, inputs = model_of(name), FORMS[form]
    graph_module = capture(model, inputs(model, ids(2, 11)))
    results = []
    for size in SIZES:
        expected = without_cache(model, inputs(model, ids(*size)))
        found = Program(graph_module)(**inputs(model, ids(*size)))
        assert type(found) is type(expected)
        torch.testing.assert_close(
            pytree.tree_leaves(found), pytree.tree_leaves(expected), rtol=1e-5, atol=1e-5, equal_nan=True, msg=str(size)
        )
        results.append(expected)
    program = quantize(graph_module, Scheme.parse("w8a8"), get_pipeline("symmetric"))
    assert program.loops.count == 2
    for size, expected in zip(SIZES, results, strict=True):
        found = program(**inputs(model, ids(*size)))
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
        for mine, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            real = theirs.isfinite()
            assert mine.shape == theirs.shape
            assert (mine - theirs)[real].norm() <= 0.25 * theirs[real].norm()


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in NOT_THERE for argument in NOT_THERE[name]])
def test_an_argument_that_a_model_does_not_have_is_refused(name: str, argument: str) -> None:
    model = model_of("encoder-layer").layer if name == "encoder-layer" else model_of(name)
    with pytest.raises(LoopQError, match=rf"forward has no argument '{argument}'; it takes \['(input_ids|src)'"):
        capture(model, {argument: ids(2, 11)})


def test_the_loss_of_an_onnx_file_is_the_programs(tmp_path: Any) -> None:
    model = model_of("llama")
    inputs = FORMS["labels"](model, ids(2, 11))
    program = lq.compile(model, inputs, scheme="w4a16", method="symmetric")
    for form in ("unrolled", "rolled"):
        run = OnnxExecutable(program.export_onnx(tmp_path / form, form=form).path, threads=1)
        for size in ((2, 11), (3, 20)):
            inputs = FORMS["labels"](model, ids(*size))
            assert float(run(**inputs).loss) == pytest.approx(float(program(**inputs).loss), rel=1e-4)


@pytest.fixture(scope="module")
def positioned() -> Program:
    """Ids, mask and positions, of one row each."""
    example = FORMS["positions"](model_of("llama"), ids(1, 11))
    return Program(capture(model_of("llama"), example))


def test_one_row_of_positions_or_mask_is_for_all_rows(positioned: Program) -> None:
    x = ids(3, 9)
    inputs = {"attention_mask": torch.ones(1, 9, dtype=torch.int64), "position_ids": torch.arange(9)[None]}
    expected = without_cache(model_of("llama"), {"input_ids": x, **inputs})
    torch.testing.assert_close(positioned(x, **inputs).logits, expected.logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(LoopQError, match="Inputs disagree on 'batch': input_ids has 3, position_ids has 2"):
        positioned(x, inputs["attention_mask"], torch.arange(9).expand(2, 9))
    with pytest.raises(LoopQError, match="Inputs disagree on 'sequence': input_ids has 9, attention_mask has 8"):
        positioned(x, inputs["attention_mask"][:, 1:], inputs["position_ids"])


def test_programs_with_mask_and_positions_generate(positioned: Program) -> None:
    expected = model_of("llama").generate(ids(2, 5), max_new_tokens=4, do_sample=False, eos_token_id=None)  # type: ignore
    assert torch.equal(positioned.generate(ids(2, 5), max_new_tokens=4), expected)


def test_programs_of_embeddings_refuse_to_generate() -> None:
    program = Program(capture(model_of("llama"), FORMS["embeddings"](model_of("llama"), ids(2, 11))))
    with pytest.raises(LoopQError, match=r"generate feeds token ids.*takes \['inputs_embeds', 'attention_mask'\]"):
        program.generate(ids(2, 5))


def test_a_key_value_cache_is_refused_with_the_reason(positioned: Program) -> None:
    cache = transformers.DynamicCache()
    with pytest.raises(LoopQError, match=r"no key-value cache.*use_cache=False"):
        capture(model_of("llama"), {"input_ids": ids(2, 11), "past_key_values": cache})
    inputs = FORMS["positions"](model_of("llama"), ids(2, 11))
    with pytest.raises(LoopQError, match=r"no key-value cache.*use_cache=False"):
        positioned(**inputs, past_key_values=cache)
