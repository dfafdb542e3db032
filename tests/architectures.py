"""The table of architectures and features in examples/README.md: every cell names the test behind it.

`python -m tests.architectures` prints the table; `tests/test_architecture_table.py` compares it with that file and
checks that the tests exist.
"""

from __future__ import annotations

ARCHITECTURES = (
    "Ouro",
    "LoopFormer",
    "Parcae",
    "Huginn",
    "Nanbeige4.2",
    "Llama-like, repeated",
    "ALBERT",
    "Zamba2",
    "nn.TransformerEncoderLayer",
    "Dory",
    "HRM-Text",
    "parameter-golf records",
)
_OURS = ("Ouro", "LoopFormer", "Parcae", "Huginn", "Nanbeige4.2")
_LLAMA, _LAYER = "Llama-like, repeated", "nn.TransformerEncoderLayer"
_GOLF = "parameter-golf records"
_KEYS = {name: name.lower() for name in _OURS} | {
    "Nanbeige4.2": "nanbeige",
    "Dory": "dory",
    "HRM-Text": "hrm-text",
    _GOLF: "golf",
    _LLAMA: "llama",
    "ALBERT": "albert",
    "Zamba2": "zamba2",
    _LAYER: "encoder-layer",
}
_PUBLIC = {
    "ALBERT": "test_albert",
    "Zamba2": "test_zamba2",
    _LAYER: "test_a_universal_transformer_of_pytorchs_own_layer",
}
_OWN = "tests/models/test_architectures.py"
_OTHERS = "tests/test_public_models.py"
_CALLS = "tests/test_call_forms.py"
_FORMS = f"{_CALLS}::test_a_form_of_call_is_captured_and_quantized"
_ABSENT = f"{_CALLS}::test_an_argument_that_a_model_does_not_have_is_refused"
_DECODING = "tests/passes/cache/test_add_cache.py::test_decoding_equals_recomputation"
_FAMILIES = ("Dory", "HRM-Text", _GOLF)
_FAMILY_TESTS = "tests/test_looped_families.py"
NOTHING = ("-", "")
"""Not applicable: there is no formula and no sizes for the code of others."""

Cells = dict[str, tuple[str, str]]


def _ours(test: str) -> Cells:
    return {name: ("yes", f"{_OWN}::{test}[{_KEYS[name]}]") for name in _OURS}


def _public(yes: tuple[str, ...] = tuple(_PUBLIC)) -> Cells:
    return {name: ("yes", f"{_OTHERS}::{_PUBLIC[name]}") for name in yes}


def _family(test: str, names: tuple[str, ...] = _FAMILIES) -> Cells:
    return {name: ("yes", f"{_FAMILY_TESTS}::{test}[{_KEYS[name]}]") for name in names}


def _form(form: str) -> Cells:
    """A way of calling that is tested separately for Llama and ALBERT, and together for the others."""
    forms = dict.fromkeys((_LLAMA, "ALBERT"), form) | dict.fromkeys(("Zamba2", "Dory", "HRM-Text"), "all")
    return {name: ("yes", f"{_FORMS}[{_KEYS[name]}-{shown}]") for name, shown in forms.items()}


def _absent(argument: str, names: tuple[str, ...] = (*_OURS, _LAYER, _GOLF)) -> Cells:
    """A dash, and the test which shows that the model has no such argument."""
    return {name: ("-", f"{_ABSENT}[{_KEYS[name]}-{argument}]") for name in names}


def _nothing(names: tuple[str, ...] = (_LLAMA, *_PUBLIC, *_FAMILIES)) -> Cells:
    return dict.fromkeys(names, NOTHING)


FEATURES: dict[str, Cells] = {
    "equals an independent formula": {
        "Ouro": ("yes", "tests/models/test_ouro.py::test_forward_is_the_stack_run_by_hand[4]"),
        "LoopFormer": ("yes", "tests/models/test_formulas.py::test_loopformer_is_its_formula_for_any_schedule[uneven]"),
        "Nanbeige4.2": (
            "yes",
            "tests/models/test_nanbeige.py::test_it_is_a_llama_whose_layers_run_again_behind_the_norm[True-3]",
        ),
        "Parcae": ("yes", "tests/models/test_formulas.py::test_parcae_is_its_formula[diagonal]"),
        "Huginn": ("yes", "tests/models/test_formulas.py::test_huginn_is_its_formula[None]"),
        **_nothing(),
    },
    "captured, any batch and length": {
        **_ours("test_the_captured_graph_equals_the_model_at_every_size"),
        _LLAMA: ("yes", f"{_FORMS}[llama-mask]"),
        **_public(),
        **_family("test_the_captured_graph_equals_the_model"),
    },
    "loop found, w4a4 program": {
        **_ours("test_the_w4a4_program_has_the_loop_and_its_onnx_files_agree"),
        _LLAMA: ("yes", f"{_FORMS}[llama-mask]"),
        **_public(),
        **_family("test_the_loop_is_found_and_the_w4a4_program_is_near"),
    },
    "unrolled ONNX file": {
        **_ours("test_the_w4a4_program_has_the_loop_and_its_onnx_files_agree"),
        _LLAMA: ("yes", "tests/backends/onnx/test_transformers.py::test_llama_with_a_padding_mask"),
        **_public(),
        **_family("test_unrolled_onnx"),
    },
    "rolled ONNX file": {
        **_ours("test_the_w4a4_program_has_the_loop_and_its_onnx_files_agree"),
        _LLAMA: ("yes", f"{_CALLS}::test_the_loss_of_an_onnx_file_is_the_programs"),
        **_public(("ALBERT", _LAYER)),
        "Zamba2": ("refused: layers of its own between", f"{_OTHERS}::test_zamba2"),
        **_family("test_rolled_onnx", ("Dory", "HRM-Text")),
        _GOLF: ("refused: skips from loop to loop", f"{_FAMILY_TESTS}::test_rolled_onnx[golf]"),
    },
    "padding on both sides": {
        **{name: ("yes", f"{_FORMS}[{_KEYS[name]}-mask]") for name in ("Ouro", "Parcae", "Huginn", "Nanbeige4.2")},
        **_absent("attention_mask", ("LoopFormer", _GOLF)),
        **_form("mask"),
        _LAYER: ("on the right", f"{_FORMS}[encoder-layer-right-mask]"),
    },
    "position ids": {**_form("positions"), **_absent("position_ids")},
    "`inputs_embeds`": {**_form("embeddings"), **_absent("inputs_embeds")},
    "`labels`, with the loss": {**_form("labels"), **_absent("labels")},
    "tuples": {**_form("tuple"), **_absent("return_dict")},
    "hidden states": {**_form("hidden-states"), **_absent("output_hidden_states")},
    "key-value cache": {
        **{name: ("yes", f"{_DECODING}[{_KEYS[name]}-False]") for name in (*_OURS, _LLAMA, _LAYER)},
        "ALBERT": ("refused: not causal", f"{_OTHERS}::test_albert"),
        "Zamba2": ("refused: a convolution mixes tokens", f"{_OTHERS}::test_zamba2"),
        **_family("test_decoding_with_a_cache"),
    },
    "`generate` of Hugging Face": {
        **{
            name: ("yes", f"tests/passes/cache/test_add_cache.py::test_hugging_faces_generate[{_KEYS[name]}]")
            for name in (*_OURS, _LAYER)
        },
        _LLAMA: (
            "yes",
            "tests/generation/test_transformers_model.py::test_generates_what_the_model_generates[True-beams]",
        ),
        "Zamba2": ("yes, without a cache", f"{_OTHERS}::test_zamba2"),
        **_family("test_generate"),
        "ALBERT": NOTHING,
    },
    "published sizes": {
        "Ouro": ("1.4B, 2.6B", f"{_OWN}::test_published_sizes[ouro-1.4b]"),
        "LoopFormer": ("the default", f"{_OWN}::test_published_sizes[loopformer]"),
        "Parcae": ("140M to 1.3B", f"{_OWN}::test_published_sizes[parcae-140m]"),
        "Huginn": ("the default", f"{_OWN}::test_published_sizes[huginn]"),
        "Nanbeige4.2": ("the default", f"{_OWN}::test_published_sizes[nanbeige]"),
        **_nothing(),
    },
}
"""By feature and architecture: what the cell says, and the test that shows it."""


def table() -> str:
    """The table as Markdown."""
    lines = ["| | " + " | ".join(ARCHITECTURES) + " |", "| --- " * (len(ARCHITECTURES) + 1) + "|"]
    for feature, cells in FEATURES.items():
        shown = [cells[name][0] for name in ARCHITECTURES]
        lines.append(f"| {feature} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
