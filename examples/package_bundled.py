"""Measure a trained model and write the files that `loopq_compile.bundled` loads.

    python examples/package_bundled.py --work WORK --out loopq_compile/bundled

Reads the latest checkpoint of `train_bundled.py`, so it can also take a snapshot of a run in progress. Weights are
stored in fp16; all figures are those of the stored weights, computed in fp32.
"""

import argparse
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from train_bundled import END_OF_TEXT, Settings, head_loss, model_config

from loopq_compile.bundled import corpus
from loopq_compile.models import Ouro, exit_distribution

PROMPTS = ("Returns the", "Applies a", "The with statement", "Args:\n    input (Tensor):", "Compute the")


@torch.no_grad()
def measure(model: Ouro, tokens: np.ndarray, length: int, loops: int) -> tuple[list[float], list[float]]:
    """Loss after each of `loops` loops and the mean exit distribution at T.

    Losses are in nats per token, computed in fp32 over windows of `length` tokens side by side.
    """
    rows = (len(tokens) - 1) // length
    starts = np.arange(rows)[:, None] * length + np.arange(length + 1)
    windows = torch.from_numpy(tokens[starts].astype(np.int64))
    losses, exits = torch.zeros(loops), torch.zeros(model.config.total_ut_steps)
    for group in windows.split(16):
        states, exit_logits = model.loop_states(group[:, :-1], loops=loops)
        targets = group[:, 1:].flatten()
        losses += torch.stack(
            [head_loss(state.flatten(0, 1), model.lm_head.weight, targets).mean() for state in states]
        ) * len(group)
        exits += exit_distribution(exit_logits[..., : len(exits)]).mean((0, 1)) * len(group)
    return (losses / rows).tolist(), (exits / rows).tolist()


@torch.no_grad()
def sample(
    model: Ouro, tokenizer: Tokenizer, prompt: str, count: int = 90, temperature: float = 0.6, top_k: int = 40
) -> str:
    """A continuation of `prompt`, recomputed token by token; ends early at the end of a passage."""
    generator = torch.Generator().manual_seed(0)
    ids = [0, *tokenizer.encode(prompt).ids]
    for _ in range(count):
        scores, choices = (model(torch.tensor([ids])).logits[0, -1] / temperature).topk(top_k)
        ids.append(int(choices[torch.multinomial(scores.softmax(-1), 1, generator=generator)]))
        if ids[-1] == 0:
            break
    return tokenizer.decode(ids)


def package(work: Path, out: Path) -> None:
    """Write the files `loopq_compile.bundled` reads, from the latest checkpoint in `work`, into `out`."""
    saved = torch.load(work / "checkpoint.pt", weights_only=True)
    settings = Settings(**saved["settings"])
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    model = Ouro(model_config(tokenizer.get_vocab_size())).eval()
    halves = {name: tensor.half() for name, tensor in saved["model"].items() if name != "lm_head.weight"}
    model.load_state_dict(
        {name: t.float() for name, t in halves.items()}
        | {"lm_head.weight": halves["model.embed_tokens.weight"].float()}
    )
    held_out, training = np.load(work / "held_out.npy"), np.load(work / "train.npy")
    losses, exits = measure(model, held_out, settings.length, loops=6)
    counts = np.bincount(training, minlength=model.config.vocab_size) + 1.0
    unigram = -float(np.log(counts / counts.sum())[held_out].mean())
    held_out_bytes = len(tokenizer.decode(held_out.tolist()).encode())
    figures = {
        "loss_per_loop": [round(x, 4) for x in losses],
        "perplexity_per_loop": [round(math.exp(x), 3) for x in losses],
        "bits_per_byte": round(losses[3] / math.log(2) * len(held_out) / held_out_bytes, 4),
        "unigram_loss": round(unigram, 4),
        "exit_distribution": [round(x, 4) for x in exits],
        "held_out_tokens": len(held_out),
        "held_out_passages": int((held_out == 0).sum()),
        "training_tokens_seen": saved["tokens"],
        "training_minutes": round(saved["seconds"] / 60, 1),
        "steps": saved["step"],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.safetensors").write_bytes(save(halves))
    (out / "config.json").write_text(json.dumps({**model.config.to_dict(), "figures": figures}, indent=1) + "\n")
    (out / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False) + "\n")
    shutil.copyfile(work / "manifest.json", out / "manifest.json")
    samples = [sample(model, tokenizer, prompt) for prompt in PROMPTS]
    facts = json.loads((work / "sources.json").read_text())
    (out / "MODEL_CARD.md").write_text(card(figures, facts, settings, samples, model))
    print(json.dumps(figures, indent=1), *samples, sep="\n---\n")


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose documentation was read."""
    found = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for package in corpus.CORPUS_PACKAGES:
        name = {"google": "protobuf"}.get(package, package)
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def wrapped(items: Iterable[str]) -> str:
    """A comma-separated list in lines of at most 118 characters."""
    return textwrap.fill(", ".join(items), 118, break_long_words=False, break_on_hyphens=False)


def card(figures: dict[str, Any], facts: dict[str, Any], settings: Settings, samples: list[str], model: Ouro) -> str:
    """The model card (Markdown)."""
    config = model.config
    rows = zip(figures["loss_per_loop"], figures["perplexity_per_loop"], strict=True)
    table = "\n".join(f"| {loop} | {loss:.3f} | {perplexity:.2f} |" for loop, (loss, perplexity) in enumerate(rows, 1))
    return CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        table=table,
        exits=", ".join(f"{share:.0%}" for share in figures["exit_distribution"]),
        data=wrapped(f"{name} {count / 1e6:.2f}" for name, count in facts["characters"].items() if count > 20_000),
        versions=wrapped(f"{name} {number}" for name, number in library_versions().items()),
        samples="\n\n".join(f"```text\n{text.removeprefix(END_OF_TEXT)}\n```" for text in samples),
        **{name: figures[name] for name in ("bits_per_byte", "unigram_loss", "training_minutes", "steps")},
        unigram_perplexity=math.exp(figures["unigram_loss"]),
        seen=figures["training_tokens_seen"] / 1e6,
        corpus_tokens=facts["tokens"] / 1e6,
        held_out_tokens=figures["held_out_tokens"],
        held_out_passages=figures["held_out_passages"],
        training_passages=facts["passages"],
        **asdict(settings),
    )


CARD = """# The bundled looped language model

A small Ouro-style looped language model that writes library documentation. It exists so that every part of this
project can be tried on a *trained* looped model, on any machine, without a download. It is of no use as a language
model otherwise.

| | |
| --- | --- |
| layers | {layers}, sandwich-normed (RoPE, SwiGLU), run T = 4 times |
| loop | final norm inside; exit gate; tied head |
| sizes | {parameters:.2f} M parameters; hidden {hidden}, {heads} heads, MLP {ffn}, vocabulary {vocab} (BPE) |
| positions | trained on {length} |
| stored | fp16 safetensors; loaded as fp32 |

## Quality on held-out text

{held_out_tokens} tokens in {held_out_passages} passages; windows of {length} tokens side by side; each passage ends
with id 0; fp32.

| loops | loss (nats per token) | perplexity |
| ---: | ---: | ---: |
{table}

At T = 4: {bits_per_byte:.3f} bits per byte. For comparison, a unigram model fitted to the training tokens: loss
{unigram_loss:.3f}, perplexity {unigram_perplexity:.0f}. Mean exit distribution of the gate over loops 1 to 4: {exits}.
`loopq-compile eval` slides its window and joins the passages by empty lines, so its figure differs a little.
Held-out loss was watched during the run (learning rates and the last two stages were chosen by it), which makes these
figures slightly optimistic.

## Data

Documentation inside installed libraries: `pydoc_data.topics` and docstrings, read with `ast`, cleaned, cut into
passages of at most 3000 characters and deduplicated by a hash of the text without white space. {training_passages}
training passages, {corpus_tokens:.1f} M tokens. Millions of characters:

{data}.

A passage is held out when its own hash says so (one in fifty). The set measured here is listed in `manifest.json` by
hash and source file; it comes from packages that are always installed, and passages of which more than half stands
word for word (by lines) in training text are left out. No text is stored in this package. Other library versions word
some passages differently: `held_out_text()` reports how much of the set is there.

Versions:

{versions}.

## Training

{training_minutes} minutes on one CPU core (bf16 autocast), {steps} steps, {seen:.1f} M tokens ({batch} x {length} a
step), seed {seed}. Muon (rate {muon_lr}, weight decay {weight_decay}) for the matrices of the layers, AdamW (rate
{adam_lr}) for the rest; warm-up, plateau, linear decay over the last 40 %.

The loss mixes a mean over the loops with Ouro's expected loss under the exit gate and an entropy bonus, and the number
of loops is drawn for each batch. Stages: 2 or 3 loops for the first quarter; then 2 to 5 (half of the time 4), all
alike; from 45 % on the mean weighs loop t in proportion to t; from 70 % on to its cube, mostly with 4 or 5 loops. The
last two stages were added while the run was going, since the second loop had stayed the best one on held-out text until
then; `stage()` in the script has the numbers.

    python examples/train_bundled.py prepare --work WORK
    python examples/train_bundled.py train --work WORK --steps {steps}
    python examples/package_bundled.py --work WORK --out loopq_compile/bundled

The schedule of the original run followed the clock (`--minutes`) and it was stopped and resumed twice, so `--steps`
repeats the recipe and not the bits.

## Samples

Top-k 40, temperature 0.6, seed 0.

{samples}

## Limits

- It knows no facts. What it writes looks like documentation and means little.
- Documentation repeats itself. Exact duplicates and passages that mostly repeat training lines are excluded from the
  held-out set, but paraphrases and shared phrasing (parameter lists, boilerplate) remain and make the perplexity lower
  than on other prose.
- English and Python documentation only; text longer than {length} tokens is beyond what it was trained on.
- The text belongs to the libraries' authors, under their licences. The model can repeat phrases of it.
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the package data to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    package(options.work, options.out)


if __name__ == "__main__":
    main()
