"""`python -m tests.calibration.divided FOLDER`: what each of several processes keeps of the weights while it learns.

Each process prints a line of JSON: the largest share that it keeps of any latent weight and gradient, and whether a
calibration that was killed (`FOLDER` gets its checkpoint) ends with the same tensors as one that was not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from loopq_compile.calibration import sharding
from loopq_compile.calibration.held_weights import HeldWeight
from loopq_compile.calibration.learnable import Latent
from loopq_compile.calibration.training import Training
from loopq_compile.passes.learn.calibrate import Calibrate
from loopq_compile.processes import apart, world
from tests.calibration.tools import assert_same, learned_tensors, prepared

OPTIONS = {
    "steps": 4,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "scheme": "w4a16",
    "rounding": True,
    "learning_rate": 3.0,
    "batch_rows": 6,
}


class KilledError(BaseException):
    """Simulates a kill."""


def gradients(shares: dict[str, float] | None = None) -> dict[str, Tensor]:
    """The mean gradient of everything that is learned, from the first step; notes what this process keeps."""
    found: dict[str, Tensor] = {}
    with Calibrate().prepared(prepared(**OPTIONS)) as training:
        assert training is not None
        loss = training.backward(0).total.detach().clone()
        items = [item for item in training.learnables if item.gradient is not None]
        found["norm"] = sharding.average_gradients([item.gradient for item in items], loss)
        found |= {item.name: sharding.whole(item.gradient).float() for item in items}
        if shares is not None:
            latents = [item.coordinates for item in items if isinstance(item.coordinates, Latent)]
            held = [value[0] for value in training.student.prepare(training.values()).values() if _is_held(value)]
            shares["numbers"] = max(_share(x.numbers) for x in latents)
            shares["gradient"] = max(_share(x.gradient) for x in latents)
            for weight in held:
                rows, columns = weight._codes.shape
                weight.add(torch.ones(3, rows), torch.ones(3, columns))
            shares["sum"] = max(_share(weight._sum) for weight in held)
    return found


def _is_held(value: object) -> bool:
    return isinstance(value, tuple) and isinstance(value[0], HeldWeight)


def _share(x: Tensor) -> float:
    kept = sharding.rows(x)
    return kept.untyped_storage().nbytes() / (x.numel() * kept.element_size())


def killed(folder: Path) -> None:
    """Ends a calibration at its last step."""
    original, calls = Training.backward, []

    def backward(self: Training, number: int) -> object:
        calls.append(number)
        if len(calls) == OPTIONS["steps"]:
            raise KilledError
        return original(self, number)

    Training.backward = backward
    try:
        prepared(Calibrate(), **OPTIONS, checkpoint=folder)
    except KilledError:
        pass
    finally:
        Training.backward = original
    assert len(calls) == OPTIONS["steps"] and (folder / "phase-0.safetensors").exists()


def check_rows(count: int) -> None:
    """Rows that cannot be divided evenly; with fewer rows than processes, some keep none."""
    rank, size = world()
    kept, x = sharding.Rows.among(torch.device("cpu")), torch.arange(3.0 * count).view(count, 3)
    own, mean = kept.own(x), kept.mean(x * (rank + 1))
    assert len(sharding.rows(own)) <= -(-count // size)
    assert sharding.whole(own).equal(x)
    torch.testing.assert_close(sharding.whole(mean), x * (size + 1) / 2)
    assert sharding.whole(sharding.with_rows(own, sharding.rows(mean) + 1)).equal(sharding.whole(mean) + 1)
    assert sharding.rows(sharding.divided_as(x, own)).equal(sharding.rows(own))
    norm = sharding.average_gradients([own, x * rank], torch.zeros(()))
    torch.testing.assert_close(norm, (x.norm() ** 2 + (x * (size - 1) / 2).norm() ** 2).sqrt())
    assert (sharding.whole_in_first({"own": own}).keys() == {"own"}) == (rank == 0)


def main() -> None:
    folder = Path(sys.argv[1])
    for count in (1, 3, 5, 8):
        check_rows(count)
    shares: dict[str, float] = {}
    ours = gradients(shares)
    with apart():
        alone = gradients()
    assert ours.keys() == alone.keys()
    errors = {name: float((x - alone[name]).norm() / alone[name].norm()) for name, x in ours.items()}
    whole = learned_tensors(prepared(Calibrate(), **OPTIONS))
    assert any(name.endswith("latent") and tensor.any() for name, tensor in whole.items())
    killed(folder)
    assert_same(learned_tensors(prepared(Calibrate(), **OPTIONS, checkpoint=folder)), whole)
    facts = {"shares": shares, "error": max(errors.values())}
    (folder / f"facts-{world()[0]}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
