"""Decoding with fixed shapes, `torch.compile`, and that nothing in a lowered program waits for the host."""

import dataclasses
import functools

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver

import loopq_compile as lq
from loopq_compile.backends.triton import static_decoder
from loopq_compile.backends.triton.copies import put_on
from loopq_compile.backends.triton.executable import TritonExecutable, fuse, use_kernels
from loopq_compile.backends.triton.launches import recording, run_fake
from loopq_compile.backends.triton.static_decoder import StaticDecoder
from loopq_compile.generation.sampling import generate
from loopq_compile.graph.conditions import SizeCondition
from loopq_compile.graph.rolled import rolled_loops
from loopq_compile.graph.state import get_state
from tests.backends.triton.test_saved import Driver
from tests.decoding import captured
from tests.tiny import tiny_program, tokens

_aten = torch.ops.aten
HOST = (_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.unique_dim, _aten._unique2, _aten.equal)


@functools.cache
def lowered():
    return tiny_program().with_cache(last_token=True).lower("triton", fallback=True)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("capacity", [16, 40])
def test_the_same_text_as_with_a_cache_that_grows(stacked, capacity):
    """Rows of different lengths; 16 is exactly what prompt and continuation need."""
    ids, mask = tokens(3, 3, 6), torch.ones(3, 6, dtype=torch.int64)
    mask[1, :4] = 0
    program = tiny_program().with_cache(last_token=True, stacked=stacked)
    run = program.lower("triton", fallback=True)
    decoder = StaticDecoder(run, capacity, None)
    for seed in (3, 8):  # the second text reuses the buffers of the first
        ids = tokens(seed, 3, 6)
        expected = generate(program, ids, 10, attention_mask=mask)
        assert torch.equal(generate(decoder, ids, 10, attention_mask=mask), expected)


def test_logits_are_those_of_the_growing_cache():
    static, growing = StaticDecoder(lowered(), 12, None).decoder(), tiny_program().with_cache(last_token=True).decoder()
    ids = tokens(4, 2, 9)
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        mask = torch.ones(2, end, dtype=torch.int64)
        found, expected = static(ids[:, begin:end], mask), growing(ids[:, begin:end], mask)
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "options", "rolled"),
    [
        ("ouro-mask", {}, False),
        ("ouro-mask", {"kv_bits": 8, "stacked": True}, True),
        ("loopformer", {"kv_bits": 4, "stacked": True}, False),
    ],
)
def test_positions_are_those_of_the_tokens(name, options, rolled):
    """Rotary and learned positions, masks of the model, integer caches, rolled loops: rows shifted by padding."""
    program = captured(name)[1].with_cache(last_token=True, **options)
    run = program.lower("triton", fallback=True, rolled=rolled)
    static, growing = StaticDecoder(run, 14, None).decoder(), program.decoder()
    ids, mask = tokens(4, 2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        found, expected = (run(ids[:, begin:end], mask[:, :end]) for run in (static, growing))
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rolled", [False, True])
def test_attention_stops_at_the_position(rolled):
    """In every loop, or in the body: unused columns of a static cache are not read before they are written."""
    program = captured("ouro-mask")[1].with_cache(last_token=True, kv_bits=8, stacked=True)
    step = static_decoder.step_of(program.lower("triton", fallback=True, rolled=rolled).graph_module)
    graphs = [step.graph, *(loop.body.graph for loop in rolled_loops(step))]
    name = torch.ops.loopq.cached_attention.default
    found = [node for graph in graphs for node in graph.find_nodes(op="call_function", target=name)]
    assert len(found) == (2 if rolled else 6)
    assert all(node.args[8].op == "placeholder" and node.args[8].target == "position" for node in found)


@pytest.mark.parametrize("bits", [None, 4])
def test_everything_lies_on_the_gpu(bits):
    """On tensors that claim to be on a GPU, where operators refuse to mix devices; programs are captured on the CPU."""
    device = torch.device("cuda", 0)
    program = captured("ouro-mask")[1].with_cache(last_token=True, kv_bits=bits)
    lowered = put_on(use_kernels(fuse(program, may_fail=True)), device)
    inputs = get_state(lowered).signature.inputs
    with FakeTensorMode(), torch.no_grad(), recording(lambda case: None):
        for module in lowered.modules():
            for table in (module._buffers, module._parameters):
                table.update({k: torch.empty(v.shape, dtype=v.dtype, device=device) for k, v in table.items()})
        sizes = {"batch": 2, "sequence": 1, "past": 12, "past + sequence": 12}
        sizes |= {spec.shape[1]: 12 for spec in inputs if spec.name == "attention_mask"}
        step = static_decoder.step_of(lowered)
        given = [torch.empty([sizes.get(d, d) for d in spec.shape], dtype=spec.dtype, device=device) for spec in inputs]
        result = step(*given, torch.empty(1, dtype=torch.int64, device=device))
    assert {value.device for value in result} == {device}


def test_no_step_copies_a_cache():
    """The graph of a step joins nothing along the sequence, and the cache that it returns is the buffer itself."""
    decoder = StaticDecoder(lowered(), 12, None)
    generate(decoder, tokens(5, 2, 4), 2)
    (step,) = decoder._steps.values()
    caches = list(step.past.values())
    returned = step.graph_module(step.ids, step.mask, *caches, step.position)
    assert sum(any(value is cache for cache in caches) for value in returned) == len(caches) == 6


def test_warming_up_and_replaying_leave_the_text_as_it_is():
    """What capturing does around the graph: steps in advance, whose effects are then removed."""
    replayed = []

    def capture(step, state):
        static_decoder.warm_up(step, state)
        return lambda: (replayed.append(1), step())

    decoder = StaticDecoder(lowered(), 20, capture)
    expected = generate(StaticDecoder(lowered(), 20, None), tokens(5, 2, 4), 8)
    assert torch.equal(generate(decoder, tokens(5, 2, 4), 8), expected)
    assert len(replayed) == 7, "one for each token after the first"


@pytest.mark.parametrize("capacity", [4, 5])
def test_warming_up_in_a_cache_that_is_full_or_nearly(capacity):
    """A prompt that leaves no room, or room for one token; then the same logits as without a graph."""

    def capture(step, state):
        static_decoder.warm_up(step, state)
        return step

    ids = tokens(5, 2, capacity)
    for end in range(4, capacity + 1):
        found, expected = [], []
        for results, way in ((found, capture), (expected, None)):
            decoder = StaticDecoder(lowered(), capacity, way).decoder()
            results.append(decoder(ids[:, :4], torch.ones(2, 4, dtype=torch.int64)))
            if end > 4:
                results.append(decoder(ids[:, 4:end], torch.ones(2, end, dtype=torch.int64)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_step_may_run_again():
    """A benchmark may repeat a step any number of times: the mask says where it writes."""
    decoder = StaticDecoder(lowered(), 8, None).decoder()
    ids = tokens(5, 2, 5)
    decoder(ids[:, :4], torch.ones(2, 4, dtype=torch.int64))
    found = [decoder(ids[:, 4:], torch.ones(2, 5, dtype=torch.int64)) for _ in range(9)]
    assert all(torch.equal(result, found[0]) for result in found)


def test_a_step_writes_into_the_same_memory():
    decoder = StaticDecoder(lowered(), 20, None)
    generate(decoder, tokens(5, 2, 4), 2)
    (step,) = decoder._steps.values()
    before = [buffer.data_ptr() for buffer in (*step.state(), step.ids, step.logits)]
    generate(decoder, tokens(6, 2, 7), 5)
    assert [buffer.data_ptr() for buffer in (*step.state(), step.ids, step.logits)] == before


class Listing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen, self.devices = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket if hasattr(function, "overloadpacket") else function)
        if (kwargs or {}).get("device") is not None and function is _aten._to_copy.default:
            self.devices.add(str(kwargs["device"]))
        return function(*args, **(kwargs or {}))


def test_a_step_asks_the_gpu_for_nothing():
    """Fake tensors have no values: a step that read one would fail, as the capture of a CUDA graph would."""
    decoder = StaticDecoder(lowered(), 20, None)
    generate(decoder, tokens(5, 2, 4), 2)
    (step,) = decoder._steps.values()
    with Listing() as listing, torch.no_grad():
        step.advance()
    assert torch.ops.loopq.packed_linear in listing.seen and not listing.seen & set(HOST)
    assert not listing.devices
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        step.graph_module(
            torch.empty(2, 1, dtype=torch.int64),
            torch.empty(2, 20, dtype=torch.int64),
            *[torch.empty(buffer.shape) for buffer in step.past.values()],
            torch.empty(1, dtype=torch.int64),
        )


def test_a_program_that_reads_values_is_found_out():
    class Reading(torch.nn.Module):
        def forward(self, x):
            return x[: int(x.sum().item())]

    signature = tiny_program().lower("triton", fallback=True).signature
    with pytest.raises(lq.LoopQError, match="waits for the GPU"):
        run_fake(Reading(), signature, 3)


def test_torch_compile_takes_the_whole_module():
    run = tiny_program().lower("triton", fallback=True)
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for seed, batch, length in ((4, 3, 7), (5, 2, 16)):
        ids = tokens(seed, batch, length)
        found, expected = compiled(ids), run(ids)
        for name, value in expected.items():
            assert (found[name] - value).abs().max() < 0.03 * value.abs().max()


def test_torch_compile_sees_the_kernels(monkeypatch):
    """On tensors without values and for an absent GPU: every launch is a node of the graph to be compiled."""
    run = TritonExecutable(use_kernels(fuse(tiny_program())), torch.device("cpu"), kernels=True)
    targets = []

    class Seen(Exception):
        pass

    def compiler(graph_module, inputs):
        targets.extend(str(node.target) for node in graph_module.graph.nodes)
        raise Seen

    monkeypatch.setattr(driver, "_active", Driver(90))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Seen"):
        torch.compile(run, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=compiler))(tokens(4, 3, 7))
    assert targets.count("triton_kernel_wrapper_functional") == 3 * 4 * 2, "three loops, four groups, two kernels"


def test_a_step_cannot_stop_early():
    program = captured("ouro-mask")[1].with_early_exit(cache=True, last_token=True)
    with pytest.raises(lq.LoopQError, match=r"runs all loops, and this program stops early"):
        program.lower("triton", fallback=True).static_decoder(8, cuda_graph=False)


def test_refusals():
    with pytest.raises(lq.LoopQError, match=r"key-value cache: lower program\.with_cache"):
        tiny_program().lower("triton", fallback=True).static_decoder(cuda_graph=False)
    with pytest.raises(lq.LoopQError, match="at least 2"):
        lowered().static_decoder(1, cuda_graph=False)
    with pytest.raises(lq.LoopQError, match="9 tokens; this decoder has room for 8"):
        generate(lowered().static_decoder(8, cuda_graph=False), tokens(1, 1, 6), 4)
    decoder = lowered().static_decoder(8, cuda_graph=False).decoder()
    decoder(tokens(1, 1, 3), torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(lq.LoopQError, match="one token at a time; got 2"):
        decoder(tokens(1, 1, 2), torch.ones(1, 5, dtype=torch.int64))


def test_every_step_checks_the_conditions_of_the_model_on_the_whole_length(monkeypatch):
    run = lowered()
    limited = dataclasses.replace(
        run.signature, conditions=(SizeCondition("sequence <= 6", "model.py:3"),), captured={"batch": 2, "sequence": 5}
    )
    monkeypatch.setattr(run, "signature", limited)
    static, ids = StaticDecoder(run, 12, None).decoder(), tokens(4, 2, 7)
    for begin, end in ((0, 5), (5, 6)):
        static(ids[:, begin:end], torch.ones(2, end, dtype=torch.int64))
    with pytest.raises(lq.LoopQError, match=r"sequence <= 6.*sequence 7"):
        static(ids[:, 6:], torch.ones(2, 7, dtype=torch.int64))


def test_a_cuda_graph_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(lq.LoopQError, match=r"needs an NVIDIA GPU.*cuda_graph=False"):
        lowered().static_decoder()
