"""Train a depth-recurrent model, of whose kind public records report large losses from quantization.

    python examples/train_bundled.py prepare --work WORK
    python examples/train_recurrent.py --work WORK --minutes 90 --out recurrent
    loopq-compile bench table1 recurrent --trust-remote-code --methods symmetric,loopq --schemes w8a16,w6a16,w4a16

`prepare` makes tokens of the docstrings that every machine has. The model (`recurrent_model.py`: 11 layers, three of
them run three times) learns from random parts of them, and can be stopped and started again.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from recurrent_model import RecurrentConfig, RecurrentForCausalLM
from retrofit_smollm2 import Until, training_arguments
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint


class Pieces(Dataset):
    """Pieces of `length` tokens of a long row of tokens, one behind the other."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.rows = torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


class NextToken(Trainer):
    """Minimizes cross entropy, in nats per token."""

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *_, **__) -> Tensor:
        ids = inputs["input_ids"]
        logits = model(ids[:, :-1]).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Returns the losses that were logged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that `train_bundled.py prepare` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=6000, help="length of the schedule")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop before the last step; start again to go on")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    tokenizer = options.work / "tokenizer.json"
    config = RecurrentConfig(Tokenizer.from_file(str(tokenizer)).get_vocab_size(), options.width)
    checkpoints = options.out / "checkpoints"
    trainer = NextToken(
        model=RecurrentForCausalLM(config),
        train_dataset=Pieces(np.load(options.work / "train.npy"), options.length),
        callbacks=[Until(options.minutes)],
        args=training_arguments(options, checkpoints, bf16=True, weight_decay=0.1, adam_beta2=0.98),
    )
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.model.save_pretrained(options.out)
    shutil.copyfile(tokenizer, options.out / "tokenizer.json")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"nats per token: {losses[0]:.3f} -> {losses[-1]:.3f} after {trainer.state.global_step} steps")
    return losses


if __name__ == "__main__":
    main()
