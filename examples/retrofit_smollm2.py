"""Train a model with repeated layers until its predictions are those of the original again.

    pip install 'loopq-compile[smollm2]'
    python examples/retrofit_smollm2.py --model smollm2 --layers 12-15 --times 3 --minutes 90 --out retrofitted
    loopq-compile bench table1 retrofitted --repeat 12-15x3

Repeating layers damages a model, so that its perplexity says little about quantization. Here the repeated layers learn,
by distillation from the original model, to do something useful in every loop. Without --model the example trains a tiny
random Llama for a few steps. It can be stopped and started again: the last state is in OUT/checkpoints. The folder OUT
holds the original architecture with the learned layers; repeat them when you load it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from looped_smollm2 import load
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from loopq_compile.models import Repeat, repeat_layers
from loopq_compile.sources.loading import load_model
from loopq_compile.sources.self_generated import calibration_data


class Student(nn.Module):
    """A model of which only some layers are learned: they alone are parameters, so they alone are in checkpoints.

    Args:
        model: the model with repeated layers.
        layers: those that learn.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        model.requires_grad_(False)
        self.layers.requires_grad_(True)
        self._model = [model]  # in a list, so that it is no module of this one

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._model[0](input_ids=input_ids, use_cache=False).logits


class Distillation(Trainer):
    """Minimizes the divergence of the student's predictions from the teacher's, mean over tokens."""

    def __init__(self, teacher: Any, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = teacher.eval()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            expected = self.teacher(**inputs, use_cache=False).logits.float().log_softmax(-1)
        found = model(**inputs).float().log_softmax(-1)
        return F.kl_div(found, expected, reduction="none", log_target=True).sum(-1).mean()


class Until(TrainerCallback):
    """Saves and stops after a number of minutes."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() >= self._end:
            control.should_save = control.should_training_stop = True


def training_arguments(options: argparse.Namespace, checkpoints: Path, **more: Any) -> TrainingArguments:
    """A cosine schedule with checkpoints to go on from, on a GPU if there is one."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_rows,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 20),
        save_steps=100,
        save_total_limit=1,
        logging_steps=max(1, options.steps // 50),
        report_to=[],
        label_names=["input_ids"],
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        **more,
    )


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Returns the losses that were logged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help='"smollm2", a Hugging Face folder or id; without it a tiny random Llama')
    parser.add_argument("--layers", default="1-2", help="first and last layer of the loop, counted from 0")
    parser.add_argument("--times", type=int, default=2, help="how often they run")
    parser.add_argument("--text", default="self", help="as --calibration of compile: self, docs, mixed, a file")
    parser.add_argument("--samples", type=int, default=64, help="rows of text")
    parser.add_argument("--length", type=int, default=32, help="tokens in a row")
    parser.add_argument("--batch-rows", type=int, default=4, help="rows in a step")
    parser.add_argument("--steps", type=int, default=8, help="length of the schedule")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop before the last step; start again to go on")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--out", type=Path, required=True, help="folder for the learned model")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    teacher, tokenizer, _ = load_model(options.model) if options.model else (load(None), None, {})
    repeat = Repeat.parse(f"{options.layers}x{options.times}")
    learned = copy.deepcopy(teacher)
    shared = {id(weight): weight for weight in learned.parameters()}
    looped = repeat_layers(copy.deepcopy(learned, shared), *repeat)
    student = Student(looped, learned.model.layers[repeat.first : repeat.last + 1])
    batches = calibration_data(options.text, teacher, tokenizer, options.samples, options.length, cache=options.out)
    rows = [{"input_ids": row} for row in torch.cat(batches)]
    checkpoints = options.out / "checkpoints"
    trainer = Distillation(
        teacher,
        model=student,
        train_dataset=rows,
        callbacks=[Until(options.minutes)],
        args=training_arguments(options, checkpoints, bf16=options.model is not None),
    )
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    learned.save_pretrained(options.out)
    if tokenizer is not None:
        tokenizer.save(str(options.out / "tokenizer.json"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"divergence from the original: {losses[0]:.4f} -> {losses[-1]:.4f} after {trainer.state.global_step} steps")
    return losses


if __name__ == "__main__":
    main()
