"""The README's table of architectures and features: every cell names the test behind it.

`python -m tests.architectures` prints the table; `tests/test_architecture_table.py` compares it with the README and
looks the tests up.
"""

from __future__ import annotations

ARCHITECTURES = (
    "Ouro",
    "LoopFormer",
    "Parcae",
    "Huginn",
    "Llama-like, repeated",
    "ALBERT",
    "Zamba2",
    "nn.TransformerEncoderLayer",
)
_OURS = ("Ouro", "LoopFormer", "Parcae", "Huginn")
_HF = {"Llama-like, repeated": "llama", "ALBERT": "albert"}
_PUBLIC = {
    "ALBERT": "test_albert",
    "Zamba2": "test_zamba2",
    "nn.TransformerEncoderLayer": "test_a_universal_transformer_of_pytorchs_own_layer",
}
_OWN = "tests/models/test_architectures.py"
_OTHERS = "tests/test_public_models.py"
_FORMS = "tests/test_call_forms.py::test_a_form_of_call_is_captured_and_quantized"

Cells = dict[str, tuple[str, str]]


def _ours(test: str) -> Cells:
    return {name: ("yes", f"{_OWN}::{test}[{name.lower()}]") for name in _OURS}


def _public(yes: tuple[str, ...] = tuple(_PUBLIC)) -> Cells:
    return {name: ("yes", f"{_OTHERS}::{_PUBLIC[name]}") for name in yes}


def _form(form: str) -> Cells:
    return {name: ("yes", f"{_FORMS}[{key}-{form}]") for name, key in _HF.items()}


_LLAMA = "Llama-like, repeated"
FEATURES: dict[str, Cells] = {
    "equals an independent formula": {
        "Ouro": ("yes", "tests/models/test_ouro.py::test_forward_is_the_stack_run_by_hand[4]"),
        "LoopFormer": ("yes", "tests/models/test_formulas.py::test_loopformer_is_its_formula_for_any_schedule[uneven]"),
        "Parcae": ("yes", "tests/models/test_formulas.py::test_parcae_is_its_formula[diagonal]"),
        "Huginn": ("yes", "tests/models/test_formulas.py::test_huginn_is_its_formula[None]"),
    },
    "captured, any batch and length": {
        **_ours("test_the_captured_graph_equals_the_model_at_every_size"),
        _LLAMA: ("yes", f"{_FORMS}[llama-mask]"),
        **_public(),
    },
    "loop found, w4a4 program": {
        **_ours("test_the_w4a4_program_has_the_loop_and_its_onnx_files_agree"),
        _LLAMA: ("yes", f"{_FORMS}[llama-mask]"),
        **_public(),
    },
    "unrolled ONNX file": {
        **_ours("test_the_w4a4_program_has_the_loop_and_its_onnx_files_agree"),
        _LLAMA: ("yes", "tests/backends/onnx/test_transformers.py::test_llama_with_a_padding_mask"),
        **_public(),
    },
    "rolled ONNX file": {
        **_ours("test_the_w4a4_program_has_the_loop_and_its_onnx_files_agree"),
        "LoopFormer": (
            "refused: its first loop differs",
            f"{_OWN}::test_the_w4a4_program_has_the_loop_and_its_onnx_files_agree[loopformer]",
        ),
        **_public(("ALBERT", "nn.TransformerEncoderLayer")),
        "Zamba2": ("refused: layers of its own between", f"{_OTHERS}::test_zamba2"),
    },
    "padding on both sides": {"Ouro": ("yes", f"{_FORMS}[ouro-mask]"), **_form("mask")},
    "position ids": _form("positions"),
    "`inputs_embeds`": _form("embeddings"),
    "`labels`, with the loss": _form("labels"),
    "tuples": _form("tuple"),
    "hidden states": _form("hidden-states"),
    "key-value cache": {
        "Ouro": ("yes", "tests/passes/test_add_cache.py::test_decoding_equals_recomputation[ouro-False]"),
        "LoopFormer": ("yes", "tests/passes/test_add_cache.py::test_decoding_equals_recomputation[loopformer-False]"),
        _LLAMA: ("yes", "tests/passes/test_add_cache.py::test_decoding_equals_recomputation[llama-False]"),
    },
    "published sizes": {
        "Ouro": ("1.4B, 2.6B", f"{_OWN}::test_published_sizes[ouro-1.4b]"),
        "LoopFormer": ("the default", f"{_OWN}::test_published_sizes[loopformer]"),
        "Parcae": ("140M to 1.3B", f"{_OWN}::test_published_sizes[parcae-140m]"),
        "Huginn": ("the default", f"{_OWN}::test_published_sizes[huginn]"),
    },
}
"""By feature and architecture: what the cell says, and the test that shows it."""


def table() -> str:
    """The table as Markdown."""
    lines = ["| | " + " | ".join(ARCHITECTURES) + " |", "| --- " * (len(ARCHITECTURES) + 1) + "|"]
    for feature, cells in FEATURES.items():
        shown = [cells[name][0] if name in cells else "" for name in ARCHITECTURES]
        lines.append(f"| {feature} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
