"""Train the looped language model that ships with loopq_compile, from text that every machine has.

    python examples/train_bundled.py prepare --work WORK
    python examples/train_bundled.py train --work WORK --minutes 90
    python examples/package_bundled.py --work WORK --out loopq_compile/bundled

`prepare` reads the docstrings of the installed libraries, trains a byte-level BPE tokenizer and writes token arrays.
`train` runs on one core by default and can be stopped and started again (`--steps` instead of `--minutes` makes a
run that depends only on the seed). `package_bundled.py` measures every loop on the held-out text and writes the
files that `loopq_compile.bundled` loads.

The objective follows stage 1 of Ouro (arXiv 2510.25741): the expected loss under the exit gate's distribution with an
entropy bonus, here mixed with a mean over the loops so that every loop keeps learning. The
number of loops is drawn for each batch.
"""

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from loopq_compile.bundled import corpus
from loopq_compile.models import Ouro, OuroConfig, exit_distribution

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_TOKENS = 90_000
EVALUATE_EVERY = 150  # seconds of training
SAVE_EVERY = 240


@dataclass
class Settings:
    """Everything a run depends on besides the text; stored in each checkpoint."""

    seed: int = 0
    batch: int = 8
    length: int = 256
    muon_lr: float = 8e-3
    adam_lr: float = 4e-3
    weight_decay: float = 0.1
    warmup: float = 0.01
    cooldown: float = 0.4
    early: float = 0.25
    deepen: float = 0.45
    finish: float = 0.7


def model_config(vocab_size: int) -> OuroConfig:
    """The bundled model's sizes."""
    return OuroConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        total_ut_steps=4,
        embedding_scale=16.0,
    )


# ---------------------------------------------------------------- text to tokens


def train_tokenizer(passages: list[corpus.Passage], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with one special token (id 0) that ends a passage."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((passage.text for passage in passages), trainer)
    return tokenizer


def prepare(work: Path, vocab_size: int, seed: int) -> None:
    """Write the tokenizer, the token arrays, the held-out manifest and the sizes of the sources into `work`."""
    work.mkdir(parents=True, exist_ok=True)
    passages = corpus.read_corpus()
    training = corpus.shuffled([p for p in passages if not p.held_out], seed)
    candidates = [p for p in passages if p.held_out and p.package in corpus.HELD_OUT_PACKAGES]
    tokenizer = train_tokenizer(training[:12_000], vocab_size)
    tokenizer.save(str(work / "tokenizer.json"))

    rows = [np.array([*e.ids, 0], dtype=np.uint16) for e in tokenizer.encode_batch([p.text for p in training])]
    np.save(work / "train.npy", np.concatenate(rows))
    np.save(work / "offsets.npy", np.cumsum([0, *map(len, rows)]))

    held_out, budget = [], HELD_OUT_TOKENS
    for passage in sorted(corpus.drop_near_duplicates(candidates, training), key=lambda p: p.digest):
        budget -= len(tokenizer.encode(passage.text).ids) + 1
        if budget < 0:
            break
        held_out.append(passage)
    manifest = corpus.make_manifest(held_out)
    write_manifest(work / "manifest.json", manifest)
    np.save(work / "held_out.npy", encode(tokenizer, corpus.read_manifest(manifest)))
    characters = Counter[str]()
    for passage in training:
        characters[passage.package] += len(passage.text)
    facts = {"characters": dict(characters.most_common()), "passages": len(training), "tokens": sum(map(len, rows))}
    (work / "sources.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


def encode(tokenizer: Tokenizer, passages: list[corpus.Passage]) -> np.ndarray:
    """Token ids of the passages (uint16), each ended by id 0."""
    return np.concatenate(
        [np.array([*e.ids, 0], dtype=np.uint16) for e in tokenizer.encode_batch([p.text for p in passages])]
    )


def write_manifest(path: Path, manifest: dict[str, list[list[str | int]]]) -> None:
    """Write one source per line."""
    rows = [f"{json.dumps(source)}: {json.dumps(found)}" for source, found in manifest.items()]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def batches(tokens: np.ndarray, offsets: np.ndarray, settings: Settings, start: int) -> Iterator[Tensor]:
    """Endless int64 batches `[batch, length + 1]` from step `start` on; each epoch shuffles the passages again."""
    rows_per_epoch = (len(tokens) - 1) // settings.length
    steps_per_epoch = rows_per_epoch // settings.batch
    step = start
    while True:
        epoch = step // steps_per_epoch
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(offsets) - 1)
        stream = np.concatenate([tokens[offsets[i] : offsets[i + 1]] for i in order]).astype(np.int64)
        while step // steps_per_epoch == epoch:
            first = step % steps_per_epoch * settings.batch
            starts = (first + np.arange(settings.batch)) * settings.length
            yield torch.from_numpy(stream[starts[:, None] + np.arange(settings.length + 1)])
            step += 1


# ---------------------------------------------------------------- objective and optimisers


@dataclass(frozen=True)
class Mix:
    """How the losses of the loops become one number.

    expected: share of the expected loss under the exit gate; the rest is a weighted mean over the loops.
    power: that mean weighs loop `t` in proportion to `t ** power` (0: all loops the same).
    entropy: weight of the bonus for an undecided gate.
    """

    expected: float
    power: int
    entropy: float

    def loop_weights(self, loops: int) -> Tensor:
        """Weights `[loops]` that sum to one."""
        weights = torch.arange(1.0, loops + 1) ** self.power
        return weights / weights.sum()


def stage(progress: float, settings: Settings) -> tuple[Mix, dict[int, float]]:
    """Objective and loop counts (with their probabilities) of a moment of the run.

    First few loops, all alike, to learn the language cheaply; then more loops, and the later ones count more and
    more, so that looping pays.
    """
    if progress < settings.early:
        return Mix(0.5, 0, 0.1), {2: 0.6, 3: 0.4}
    if progress < settings.deepen:
        return Mix(0.5, 0, 0.1), {2: 0.15, 3: 0.2, 4: 0.5, 5: 0.15}
    if progress < settings.finish:
        return Mix(0.3, 1, 0.1), {2: 0.15, 3: 0.2, 4: 0.5, 5: 0.15}
    return Mix(0.15, 3, 0.03), {2: 0.05, 3: 0.1, 4: 0.65, 5: 0.2}


def head_loss(state: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats per token, `[tokens]`, of one loop's state `[tokens, hidden]`."""
    return F.cross_entropy(F.linear(state, weight).float(), targets, reduction="none")


def looped_loss(model: Ouro, head: Callable[..., Tensor], batch: Tensor, loops: int, mix: Mix) -> tuple[Tensor, Tensor]:
    """The training objective (a scalar) and the loss of each loop `[loops]` (detached)."""
    targets = batch[:, 1:].flatten()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, exits = model.loop_states(batch[:, :-1], loops=loops)
        losses = torch.stack([head(state.flatten(0, 1), model.lm_head.weight, targets) for state in states], dim=-1)
    mean = (losses.mean(0) * mix.loop_weights(loops)).sum()
    exit_probability = exit_distribution(exits.float().flatten(0, 1))
    expected = (exit_probability * losses).sum(-1).mean()
    entropy = -(exit_probability * (exit_probability + 1e-9).log()).sum(-1).mean()
    loss = (1 - mix.expected) * mean + mix.expected * expected - mix.entropy * entropy
    return loss, losses.detach().mean(0)


def make_optimizers(model: Ouro, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and gate."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def learning_rate(progress: float, settings: Settings) -> float:
    """Share of the peak rate: linear warm-up, a plateau, then a linear decay to 2 %."""
    rising = progress / settings.warmup
    falling = 0.02 + 0.98 * (1 - progress) / settings.cooldown
    return max(0.0, min(1.0, rising, falling))


def draw_loops(step: int, chances: dict[int, float], settings: Settings) -> int:
    """How many loops this step runs."""
    return random.Random(settings.seed * 1_000_003 + step).choices(list(chances), list(chances.values()))[0]


@torch.no_grad()
def loss_per_loop(
    model: Ouro, head: Callable[..., Tensor], held_out: Tensor, settings: Settings, loops: int, limit: int
) -> list[float]:
    """Held-out loss after each loop, nats per token, over at most `limit` batches."""
    rows = (len(held_out) - 1) // settings.length
    starts = torch.arange(rows)[:, None] * settings.length + torch.arange(settings.length + 1)[None, :]
    groups = [g for g in held_out[starts].split(settings.batch) if len(g) == settings.batch][:limit]
    mix, _ = stage(0, settings)
    return torch.stack([looped_loss(model, head, group, loops, mix)[1] for group in groups]).mean(0).tolist()


# ---------------------------------------------------------------- the run


@dataclass
class Run:
    """A training run that can be saved and resumed."""

    model: Ouro
    optimizers: list[torch.optim.Optimizer]
    settings: Settings
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        values = {"model": self.model.state_dict(), "optimizers": states, "settings": asdict(self.settings)}
        temporary = path.with_suffix(".tmp")
        torch.save(values | {"step": self.step, "seconds": self.seconds, "tokens": self.tokens}, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seconds, self.tokens = saved["step"], saved["seconds"], saved["tokens"]

    def advance(self, head: Callable[..., Tensor], batch: Tensor, progress: float) -> list[float]:
        """One optimiser step; returns the loss of each loop that ran."""
        began = time.monotonic()
        mix, chances = stage(progress, self.settings)
        loops = draw_loops(self.step, chances, self.settings)
        loss, losses = looped_loss(self.model, head, batch, loops, mix)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate(progress, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step, self.tokens = self.step + 1, self.tokens + batch[:, 1:].numel()
        self.seconds += time.monotonic() - began
        return losses.tolist()


def train(work: Path, settings: Settings, minutes: float | None, steps: int | None) -> None:
    """Train for `minutes` of training time or `steps`; continues from `work/checkpoint.pt` if it exists."""
    torch.manual_seed(settings.seed)
    held_out = torch.from_numpy(np.load(work / "held_out.npy").astype(np.int64))
    model = Ouro(model_config(Tokenizer.from_file(str(work / "tokenizer.json")).get_vocab_size()))
    run = Run(model, make_optimizers(model, settings), settings)
    path = work / "checkpoint.pt"
    if path.exists():
        run.load(path)
    for layer in model.model.layers:
        layer.compile()
    head = torch.compile(head_loss)
    stream = batches(np.load(work / "train.npy"), np.load(work / "offsets.npy"), settings, run.step)
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()]
    saved_at = evaluated_at = run.seconds
    with Progress(*columns, refresh_per_second=1) as bar, (work / "log.jsonl").open("a", buffering=1) as log:
        task = bar.add_task("training", total=1.0)
        while (progress := run.step / steps if steps else run.seconds / 60 / (minutes or 1)) < 1:
            losses = run.advance(head, next(stream), progress)
            row = {"step": run.step, "minutes": round(run.seconds / 60, 2), "tokens": run.tokens}
            if run.step % 20 == 0:
                log.write(json.dumps(row | {"losses": losses}) + "\n")
                text = f"step {run.step} loss {losses[-1]:.3f} ({len(losses)} loops)"
                bar.update(task, completed=progress, description=text)
            if run.seconds - evaluated_at > EVALUATE_EVERY:
                evaluated_at = run.seconds
                log.write(json.dumps(row | {"held_out": loss_per_loop(model, head, held_out, settings, 4, 4)}) + "\n")
            if run.seconds - saved_at > SAVE_EVERY:
                saved_at = run.seconds
                run.save(path)
    run.save(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prepare", "train"])
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, log and checkpoints")
    parser.add_argument("--minutes", type=float, help="training time; sets the learning-rate schedule too")
    parser.add_argument("--steps", type=int, help="train this many steps instead: a run that depends only on the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--muon-lr", type=float, default=Settings.muon_lr)
    parser.add_argument("--adam-lr", type=float, default=Settings.adam_lr)
    parser.add_argument("--batch", type=int, default=Settings.batch)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(seed=options.seed, muon_lr=options.muon_lr, adam_lr=options.adam_lr, batch=options.batch)
    if options.action == "prepare":
        prepare(options.work, options.vocab_size, options.seed)
    elif options.action == "train":
        if (options.minutes is None) == (options.steps is None):
            parser.error("train needs one of --minutes and --steps")
        train(options.work, settings, options.minutes, options.steps)


if __name__ == "__main__":
    main()
