"""The methods without learning to which LoopQ is compared: what each changes, end to end."""

import pytest
import torch

import loopq_compile as lq
from loopq_compile.operators import ops
from tests.passes.transforms.test_insert_transforms import outlier_model
from tests.tiny import tokens


def compiled(method, activation="dynamic", **options):
    data = None if method == "quarot" and activation == "dynamic" else [tokens(seed) for seed in range(3)]
    return lq.compile(
        outlier_model(), tokens(), scheme="w4a4", method=method, activation=activation, calibration=data, **options
    )


def operators(program, operator):
    return sum(node.target is operator for node in program.graph_module.graph.nodes)


def test_quarot_rotates_every_group_in_every_loop_and_needs_no_data():
    program = compiled("quarot")
    assert operators(program, ops.kronecker.default) == 4 * 2
    assert operators(program, torch.ops.aten.linalg_inv.default) == 0, "weights are packed"
    assert "condition numbers up to 1 " in program.summary()


def test_signs_come_from_the_seed():
    x = tokens(5)
    one, same, other = (compiled("quarot", seed=seed)(x)["logits"] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_smoothquant_multiplies_only_where_no_norm_can():
    program = compiled("smoothquant")
    diagonals = {
        node.target for node in program.graph_module.graph.nodes if node.op == "get_attr" and "diagonal" in node.target
    }
    assert diagonals == {"transform.layers_0_attn_o_proj.diagonal", "transform.layers_0_down.diagonal"}


@pytest.mark.parametrize("method", ["symmetric", "smoothquant", "quarot"])
def test_saved_and_loaded(method, tmp_path):
    program = compiled(method, "static")
    program.save(tmp_path)
    assert torch.equal(lq.load(tmp_path)(tokens(6))["logits"], program(tokens(6))["logits"])


def test_rotations_help_static_ranges_where_channels_stand_out():
    reference = outlier_model()(tokens(7))["logits"]
    with torch.no_grad():
        error = {m: (compiled(m, "static")(tokens(7))["logits"] - reference).norm() for m in ("symmetric", "quarot")}
    assert error["quarot"] < 0.8 * error["symmetric"]
