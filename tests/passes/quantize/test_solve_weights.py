"""The pass `solve-weights`: what it writes, for which uses it solves, and that a second run changes nothing."""

import copy
import functools

import pytest
import torch
from torch import nn

import loopq_compile as lq
from loopq_compile.capture.to_graph import capture
from loopq_compile.errors import LoopQError
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.state import copy_graph, get_state, get_tensor
from loopq_compile.passes.loops.tag_loops import TagLoops
from loopq_compile.passes.quantize import solve_weights
from loopq_compile.passes.quantize.annotate_linears import AnnotateLinears
from loopq_compile.passes.quantize.canonicalize_linears import CanonicalizeLinears
from loopq_compile.passes.quantize.collect_ranges import CollectRanges
from loopq_compile.passes.quantize.insert_activation_qdq import InsertActivationQdq
from loopq_compile.passes.quantize.pack_weights import PackWeights
from loopq_compile.passes.quantize.quantize_weights import QuantizeWeights
from loopq_compile.passes.quantize.set_ranges import SetRanges
from loopq_compile.passes.quantize.solve_weights import SolveWeights
from loopq_compile.passes.transforms.insert_las import InsertLas
from loopq_compile.passes.transforms.insert_transforms import InsertTransforms
from loopq_compile.pipeline import Pipeline
from loopq_compile.solvers import Moments, Walk, solve
from loopq_compile.solvers.chains import find_chains
from loopq_compile.solvers.residual import find_write, has_norm, norm_gain
from tests.tiny import tiny_model, tokens
from tests.zoo import example, model_of

BATCHES = [tokens(seed, batch=4) for seed in range(4)]


@functools.cache
def captured():
    return capture(tiny_model(), tokens())


def prepared(
    *passes, scheme="w4a4", model=None, example=None, batches=BATCHES, learnable=False, transforms=(), **fields
):
    if model is None and example is None:
        graph_module = copy_graph(captured())
    else:
        graph_module = capture(model, tokens() if example is None else example)
    state = get_state(graph_module)
    state.scheme, state.run.calibration = lq.Scheme.parse(scheme, **fields), batches
    state.run.teacher = copy_graph(graph_module)
    front = [TagLoops(), CanonicalizeLinears(), AnnotateLinears(), *transforms]
    front += [CollectRanges(), QuantizeWeights(learnable)]
    return Pipeline([*front, InsertActivationQdq(), InsertLas(), SetRanges(), *passes]).run(graph_module)


def modified(graph_module):
    return get_state(graph_module).log[-1].modified


def codes_of(graph_module):
    """What every chain quantizes to, by site."""
    walk = Walk(graph_module, [])
    return {chain.site.name: walk.constant(chain.quantize) for chain in find_chains(graph_module)}


@pytest.mark.parametrize("solver", ["gptq", "loaq"])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_solved_weights_are_those_that_are_packed(solver, scheme):
    graph_module = prepared(SolveWeights(solver), scheme=scheme)
    assert modified(graph_module)
    expected, output = codes_of(graph_module), graph_module(tokens(9))
    rounded = codes_of(prepared(scheme=scheme))
    assert all(not torch.equal(codes, rounded[name]) for name, codes in expected.items())
    packed = Pipeline([PackWeights()]).run(graph_module)
    for node in packed.graph.nodes:
        if node.op == "get_attr" and str(node.target).endswith("_codes"):
            assert torch.equal(get_tensor(packed, node.target), expected[node.meta["loopq_site"]])
    assert not [node for node in packed.graph.nodes if "_rounding" in str(node.target)]
    torch.testing.assert_close(packed(tokens(9)), output)


@pytest.mark.parametrize("solver", ["gptq", "loaq"])
def test_a_second_run_changes_nothing(solver):
    graph_module = prepared(SolveWeights(solver))
    before = codes_of(graph_module)
    Pipeline([SolveWeights(solver)]).run(graph_module)
    assert not modified(graph_module)
    assert all(torch.equal(codes, before[name]) for name, codes in codes_of(graph_module).items())
    packed = Pipeline([PackWeights(), SolveWeights(solver)]).run(graph_module)
    assert not modified(packed)


def test_rounding_to_nearest_is_what_the_graph_does_already():
    graph_module = prepared(SolveWeights("rtn"))
    assert not modified(graph_module)


def test_scales_stay_unless_they_are_refitted():
    kept, fitted = (prepared(SolveWeights("gptq", refit_scales=fit), scheme="w4a16") for fit in (False, True))
    plain = prepared(scheme="w4a16")
    for one, two, three in zip(*map(find_chains, (plain, kept, fitted)), strict=True):
        before, same, other = (
            Walk(graph, []).constant(chain.quantize.args[1])
            for graph, chain in ((plain, one), (kept, two), (fitted, three))
        )
        assert torch.equal(before, same) and not torch.equal(before, other)


@pytest.mark.parametrize("options", [{}, {"form": 1}, {"form": 3}, {"alpha": None, "beta": None}, {"sweeps": 2}])
def test_output_errors_fall_and_are_reported(options):
    graph_module = prepared(SolveWeights("loaq", **options))
    notes = get_state(graph_module).log[-1].notes
    assert len(notes) == 7
    for note in notes:
        before, after = (float(part) for part in note.split("error ")[1].split(" (")[0].split(" -> "))
        assert after <= before


def test_solving_brings_outputs_nearer_to_full_precision():
    exact = tiny_model()(tokens(9))["logits"]

    def distance(*passes):
        graph_module = prepared(*passes, scheme="w3a16")
        return (get_state(graph_module).signature.restore(graph_module(tokens(9)))["logits"] - exact).square().mean()

    assert distance(SolveWeights("gptq")) < 0.9 * distance()


class OneWeight(nn.Module):
    """`x <- tanh(x Wᵀ + x)`, three times."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(3):
            x = torch.tanh(self.inner(x) + x)
        return self.head(x)


def test_a_weight_is_solved_for_the_sum_of_all_loops(monkeypatch):
    torch.manual_seed(0)
    seen = []

    def spy(weight, original, grid, split, *rest):
        seen.append(split.whole())
        return solve(weight, original, grid, split, *rest)

    monkeypatch.setattr(solve_weights, "solve", spy)
    model = OneWeight().eval()
    plain = prepared(model=model, scheme="w4a16")
    (chain,) = [chain for chain in find_chains(plain) if chain.site.name == "inner"]
    inputs = []
    for ids in BATCHES:
        walk = Walk(plain, [[ids]])
        for linear in chain.calls:
            walk.run(0, linear)
            inputs.append(walk.value(0, linear.args[0]).flatten(0, 1))
            walk.finish(linear)
    prepared(SolveWeights("gptq"), model=model, scheme="w4a16")
    x = torch.cat(inputs)
    expected = Moments.of((x, None, None))
    assert len(seen) == 1 and seen[0].tokens == expected.tokens == 3 * 4 * 64
    torch.testing.assert_close(seen[0].hessian, expected.hessian, rtol=1e-4, atol=1e-4)


def test_loops_can_be_weighted():
    graph_module = prepared(SolveWeights("gptq", loop_weights=[1, 0, 0]), scheme="w4a16")
    other = prepared(SolveWeights("gptq", loop_weights="relative"), scheme="w4a16")
    one, two = codes_of(graph_module), codes_of(other)
    assert any(not torch.equal(codes, two[name]) for name, codes in one.items())
    with pytest.raises(LoopQError, match="loop 2"):
        prepared(SolveWeights("gptq", loop_weights=[1, 1]), scheme="w4a16")


@pytest.mark.parametrize("name", ["nested-middle", "nested-twice", "looped-qk", "siamese", "gpt2"])
def test_other_shapes_of_loops(name):
    """Nested loops, one weight that serves several linears of a loop, products written as `addmm`."""
    model = model_of(name)
    batches = [tuple(ids.clamp(max=60) + number for ids in example(model, batch=8)) for number in range(2)]
    graph_module = prepared(
        SolveWeights("loaq"), model=model, example=batches[0], batches=batches, scheme="w4a8", group_size=-1
    )
    assert all(chain.solved for chain in find_chains(graph_module))
    output = graph_module(*batches[0])
    packed = Pipeline([PackWeights()]).run(graph_module)
    torch.testing.assert_close(packed(*batches[0]), output)


@pytest.mark.parametrize("solver", ["gptq", "loaq"])
def test_transforms_and_a_weight_for_every_loop(solver, monkeypatch):
    """Each chain of a group that has its own weights per loop sees only the tokens of its loop."""
    tokens_seen = {}

    def spy(weight, original, grid, split, options, where):
        tokens_seen.setdefault(where.split("'")[1], []).append(split.whole().tokens)
        return solve(weight, original, grid, split, options, where)

    monkeypatch.setattr(solve_weights, "solve", spy)
    transforms = InsertTransforms(init="orthogonal", diagonal=True, per_loop="*.down")
    graph_module = prepared(SolveWeights(solver), transforms=(transforms,), scheme="w4a16")
    once, sweeps = 4 * 64, 2 if solver == "loaq" else 1
    assert tokens_seen["layers.0.down"] == [once] * 3 * sweeps and tokens_seen["layers.0.up"] == [3 * once] * sweeps
    chains = find_chains(graph_module)
    assert sum(chain.site.name == "layers.0.down" for chain in chains) == 3 and all(chain.solved for chain in chains)
    output = graph_module(tokens(9))
    packed = Pipeline([PackWeights()]).run(graph_module)
    torch.testing.assert_close(packed(tokens(9)), output)


def test_with_transforms_outputs_are_still_compared_with_those_of_the_model(monkeypatch):
    """Corrections vanish if the quantized graph computes the same as the model: 8-bit weights, rotated inputs."""
    found = []

    def spy(*arguments):
        found.append(solve(*arguments))
        return found[-1]

    monkeypatch.setattr(solve_weights, "solve", spy)
    rotated = (InsertTransforms(init="orthogonal"),)
    prepared(SolveWeights("loaq", alpha=1.0, beta=1.0, refit_scales=False), transforms=rotated, scheme="w8a16")
    assert all(solution.before < 1e-3 for solution in found)


def test_learned_clip_ratios_are_refitted_and_stay_learnable():
    graph_module = prepared(SolveWeights("gptq"), learnable=True, scheme="w4a16")
    clips = [n for n in graph_module.graph.nodes if n.meta.get("loopq_learn") == "weight_clip"]
    assert len(clips) == 7 and all(chain.quantize.args[1].args[1] in clips for chain in find_chains(graph_module))
    assert any(get_tensor(graph_module, clip.target).unique().numel() > 30 for clip in clips)
    output = graph_module(tokens(9))
    torch.testing.assert_close(Pipeline([PackWeights()]).run(graph_module)(tokens(9)), output)


def test_half_precision():
    model = copy.deepcopy(tiny_model()).bfloat16()
    graph_module = prepared(SolveWeights("gptq"), model=model, scheme="w8a16")
    expected = codes_of(graph_module)
    packed = Pipeline([PackWeights()]).run(graph_module)
    codes = [n for n in packed.graph.nodes if n.op == "get_attr" and str(n.target).endswith("_codes")]
    assert all(torch.equal(get_tensor(packed, n.target), expected[n.meta["loopq_site"]]) for n in codes) and codes


def test_static_scales_and_weights_of_three_bits():
    graph_module = prepared(SolveWeights("loaq"), scheme="w3a8", activation="static")
    assert all(chain.solved for chain in find_chains(graph_module))


def test_errors_name_what_is_missing_and_where():
    with pytest.raises(LoopQError, match="needs calibration data"):
        prepared(SolveWeights("gptq"), scheme="w4a16", batches=None)
    with pytest.raises(LoopQError, match="sweeps"):
        SolveWeights(sweeps=0)
    with pytest.raises(LoopQError, match="loop_weights"):
        SolveWeights(loop_weights="influence")


def test_inputs_that_are_not_finite_are_an_error_that_names_site_and_loop():
    model = copy.deepcopy(tiny_model())
    with torch.no_grad():
        model.layers[0].norm2.weight[0] = 3e38  # finite, its products are not
    with pytest.raises(LoopQError, match=r"layers\.0\..*loop=\d.*NaN"):
        prepared(SolveWeights("gptq"), model=model, scheme="w4a16")


def test_writes_to_the_residual_stream_are_found_in_the_graph():
    graph = prepared(scheme="w4a16")
    teacher = {node.name: node for node in get_state(graph).run.teacher.graph.nodes}
    found = {chain.site.name: find_write(teacher[chain.calls[0].name]) for chain in find_chains(graph)}
    assert {name for name, write in found.items() if write} == {"layers.0.attn.o_proj", "layers.0.down"}
    assert not any(has_norm(write) for write in found.values() if write)


class Sandwich(nn.Module):
    """`x <- x + norm(linear(x))`, the norm written out."""

    def __init__(self, width=32):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(64, width), nn.Linear(width, width), nn.Linear(width, 64)
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(2):
            y = self.inner(torch.tanh(x))
            x = x + y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        return self.head(x)


def test_a_norm_between_a_linear_and_the_residual_stream_is_recognized_by_its_numbers():
    torch.manual_seed(0)
    model = Sandwich().eval()
    graph = prepared(scheme="w4a16", model=model)
    teacher = get_state(graph).run.teacher
    (chain,) = [chain for chain in find_chains(graph) if chain.site.name == "inner"]
    linear = next(node for node in teacher.graph.nodes if node.name == chain.calls[0].name)
    write = find_write(linear)
    assert write is not None and has_norm(write)
    output = torch.randn(50, 32)
    walk = Walk(teacher, [[BATCHES[0]]])
    walk.run(0, linear)
    gain = norm_gain(output, walk.apply(0, write.branch, {linear: output.view(1, 50, 32)}).view(50, 32))
    torch.testing.assert_close(gain, model.gain.detach(), rtol=1e-3, atol=1e-3)
    assert norm_gain(output, torch.nn.functional.silu(output)) is None
    prepared(SolveWeights("loaq"), model=model, scheme="w4a8")


@pytest.mark.parametrize(("option", "own", "changes"), [("gptq", "rtn", True), ("rtn", "gptq", False)])
def test_the_solver_of_the_options_goes_before_the_methods_own(option, own, changes):
    graph_module = prepared(scheme="w4a16")
    get_state(graph_module).options = CalibrationOptions(weight_solver=option)
    Pipeline([SolveWeights(own)]).run(graph_module)
    assert modified(graph_module) is changes
