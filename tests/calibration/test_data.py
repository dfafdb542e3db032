"""Batches for calibration, and the teacher's targets for them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loopq_compile as lq
from loopq_compile.calibration import target_store
from loopq_compile.calibration.batches import token_mask
from loopq_compile.calibration.data import pick, regroup, split
from loopq_compile.calibration.target_store import TargetStore
from loopq_compile.calibration.teacher import Teacher
from loopq_compile.errors import InternalError
from loopq_compile.graph.options import CalibrationOptions
from loopq_compile.graph.state import get_state
from loopq_compile.passes import Pass
from loopq_compile.passes.learn.calibrate import Calibrate
from tests.calibration.tools import assert_same, captured, learned_tensors, prepared
from tests.tiny import VOCABULARY, tiny_model, tokens


def test_batches_of_one_shape_are_regrouped():
    batches = [[tokens(seed, rows)] for seed, rows in enumerate((3, 5, 2))]
    regrouped = regroup(batches, 4)
    assert [batch[0].shape[0] for batch in regrouped] == [4, 4, 2]
    assert torch.cat([batch[0] for batch in regrouped]).equal(torch.cat([batch[0] for batch in batches]))


def test_batches_of_other_lengths_stay_as_they_are():
    batches = [[tokens(0, 2, 8)], [tokens(1, 2, 5)]]
    assert regroup(batches, 4) == batches


@pytest.mark.parametrize(("count", "share", "held"), [(8, 0.25, 2), (4, 0.01, 1), (3, 0.5, 0), (10, 0.0, 0)])
def test_validation_batches_are_not_learned_from(count, share, held):
    learn, validate = split([[]] * count, share, 0)
    assert len(validate) == held and not set(learn) & set(validate)
    assert sorted([*learn, *validate]) == list(range(count))


def test_every_epoch_sees_every_batch_in_an_order_of_its_own():
    order = [pick([2, 3, 5, 7, 11], step, 0) for step in range(15)]
    assert all(sorted(order[i : i + 5]) == [2, 3, 5, 7, 11] for i in (0, 5, 10))
    assert order[:5] != order[5:10] and order == [pick([2, 3, 5, 7, 11], step, 0) for step in range(15)]
    assert order != [pick([2, 3, 5, 7, 11], step, 1) for step in range(15)]


def test_generators_and_lists_calibrate_alike():
    """A generator can be read once; several passes read the batches."""
    model = nn.Sequential(nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)).eval()
    data = [tokens(seed, 4) for seed in range(4)]
    options = {"scheme": "w4a4", "method": "loopq", "steps": 2, "group_size": 16}
    first = lq.compile(model, tokens(), calibration=data, **options)
    second = lq.compile(model, tokens(), calibration=(batch for batch in data), **options)
    assert first(tokens(9)).equal(second(tokens(9)))


def test_batches_of_different_lengths_calibrate():
    data = [tokens(seed, 4, 8 + seed) for seed in range(5)]
    graph_module = prepared(Calibrate(), data=data, steps=3)
    (report,) = get_state(graph_module).results["calibration"]
    assert report["steps"] == 3 and report["skipped"] == 0


class Masked(nn.Module):
    """A looped model with padding."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        mask = attention_mask[:, None, None, :].bool()
        for _ in range(2):
            y = self.mix(x).unsqueeze(1)
            x = x + F.scaled_dot_product_attention(y, y, y, attn_mask=mask).squeeze(1)
            x = x + self.down(F.silu(self.up(x)))
        return x @ self.embed.weight.t()


def padded(seed, filler):
    ids, mask = tokens(seed, 4, 8), torch.ones(4, 8, dtype=torch.long)
    mask[1, 5:] = mask[3, 2:] = 0
    ids[mask == 0] = filler
    return {"input_ids": ids, "attention_mask": mask}


def test_what_stands_in_masked_places_does_not_matter():
    """Padding counts neither in the loss nor in what is learned."""
    torch.manual_seed(0)
    model = Masked().eval()
    results = []
    for filler in (0, 7):
        data = [padded(seed, filler) for seed in range(5)]
        graph_module = prepared(
            Calibrate(),
            model=model,
            example=padded(0, 0),
            data=data,
            steps=3,
            adapters=False,
        )
        results.append(get_state(graph_module).results["calibration"][0]["curve"])
    for first, second in zip(*results, strict=True):
        assert first["prediction"] == pytest.approx(second["prediction"], rel=1e-3)
        assert first["validation"] == pytest.approx(second["validation"], rel=1e-3)


@pytest.mark.parametrize("solver", ["gptq", "loaq"])
def test_statistics_leave_masked_places_out(solver):
    """Smoothing factors, ranges and solved weights are those of only the real tokens."""
    torch.manual_seed(0)
    model = Masked().eval()
    options = {"scheme": "w4a4", "activation": "static", "method": "smoothquant", "group_size": 16}
    programs = [
        lq.compile(
            model,
            padded(0, 0),
            calibration=[padded(seed, filler) for seed in range(5)],
            weight_solver=solver,
            **options,
        )
        for filler in (0, 7)
    ]
    first, second = (program.graph_module.state_dict() for program in programs)
    assert any("diagonal" in name for name in first) and any(name.endswith("_codes") for name in first)
    assert_same(first, second)


def test_the_mask_is_found_among_the_inputs():
    graph = captured()
    assert token_mask(get_state(graph).signature, [tokens()]) is None


class Regression(nn.Module):
    """A looped model without a vocabulary."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        for _ in range(2):
            x = x + self.down(F.silu(self.up(x)))
        return self.out(x), x.mean(-1)


def test_models_without_a_vocabulary_learn_their_outputs():
    torch.manual_seed(0)
    model, x = Regression().eval(), torch.randn(2, 5, 16)
    data = [(torch.randn(4, 5, 16),) for _ in range(6)]
    graph_module = prepared(
        Calibrate(), model=model, example=(x,), data=data, scheme="w3a8", steps=40, evaluate_every=10, learning_rate=3.0
    )
    (report,) = get_state(graph_module).results["calibration"]
    assert report["best"] < report["start"]
    with torch.no_grad():
        outputs = graph_module(data[0][0])
    assert outputs[0].shape == (4, 5, 3)


def teacher_of(graph_module, **options):
    state = get_state(graph_module)
    return Teacher(graph_module, state.signature, [], VOCABULARY, CalibrationOptions(**options))


def test_the_teacher_is_asked_once_for_a_batch(monkeypatch):
    teacher = teacher_of(captured())
    first = teacher.targets(0, [tokens()])
    monkeypatch.setattr(teacher, "ask", None)
    assert teacher.targets(0, [tokens()]) is first


def test_a_teacher_that_predicts_nan_is_refused():
    torch.manual_seed(0)
    model = Regression().eval()
    data = [(torch.randn(4, 5, 16),)] * 3 + [(torch.full((4, 5, 16), 1e38),)]
    with pytest.raises(lq.LoopQError, match="NaN or infinite"):
        prepared(Calibrate(), model=model, example=(torch.randn(2, 5, 16),), data=data, transforms=False)


def test_two_calibrations_with_one_seed_are_the_same():
    first, second = (learned_tensors(prepared(Calibrate(), steps=3, seed=5)) for _ in range(2))
    assert_same(first, second)
    other = learned_tensors(prepared(Calibrate(), steps=3, seed=6))
    assert any(not tensor.equal(other[name]) for name, tensor in first.items())


def test_answers_beyond_the_memory_go_to_files_that_are_deleted(monkeypatch, tmp_path):
    monkeypatch.setattr(target_store, "MEMORY_BYTES", 0)
    store = TargetStore(str(tmp_path), ["loop_end"])
    state = get_state(captured())
    ends = [node.name for node in captured().graph.nodes if node.target is torch.ops.aten.linear.default][:1]
    teacher = Teacher(captured(), state.signature, ends, VOCABULARY, CalibrationOptions(top_k=5), store)
    first = teacher.targets(0, [tokens()])
    assert len(list(tmp_path.glob("targets-0-*/0.safetensors"))) == 1
    monkeypatch.setattr(teacher, "ask", None)
    again = teacher.targets(0, [tokens()])
    assert again is not first and again.mask is None and again.outputs == []
    for x, y in zip(
        (first.logits, first.indices, first.total, *first.states),
        (again.logits, again.indices, again.total, *again.states),
        strict=True,
    ):
        assert x.dtype == y.dtype and x.equal(y)
    store.close()
    assert not list(tmp_path.iterdir())


def test_a_failed_compile_leaves_no_answers(monkeypatch, tmp_path):
    """What is learned is the same with files, and they are deleted after an error, too."""
    monkeypatch.setattr(target_store, "MEMORY_BYTES", 0)
    seen = []
    write = TargetStore._write
    monkeypatch.setattr(TargetStore, "_write", lambda self, *args: (write(self, *args), seen.append(self._folder))[0])
    options = {"calibration": [tokens(seed, 4) for seed in range(2)], "group_size": 16, "steps": 2}
    method = lq.pipelines.loopq().insert_after("calibrate", Failing())
    with pytest.raises(InternalError, match="on purpose"):
        lq.compile(tiny_model(), tokens(), method=method, checkpoint=str(tmp_path), **options)
    assert seen and all(folder.parent == tmp_path for folder in seen)
    assert not list(tmp_path.glob("targets-*"))


class Failing(Pass):
    """Before and after: nothing."""

    def call(self, graph_module):
        raise RuntimeError("on purpose")


def test_a_full_disk_is_said_once(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target_store, "MEMORY_BYTES", 0)
    monkeypatch.setattr(target_store, "save_file", full)
    teacher = teacher_of(captured())
    with pytest.warns(UserWarning, match="No space left on device.*asks the teacher again") as told:
        answers = [teacher.targets(number, [tokens()]) for number in (0, 1, 0)]
    assert len(told) == 1 and answers[0].logits.equal(answers[2].logits)
