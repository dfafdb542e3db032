"""Programs, ONNX files and models in EleutherAI's lm-eval: HellaSwag, WinoGrande, ARC, LAMBADA, MMLU, WikiText, ...

Needs the extra `eval`. Importing this module registers the model type `loopq`, so lm-eval's own functions take it by
name: `lm_eval.simple_evaluate("loopq", "path=my-program", tasks=["hellaswag"])`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.generation import logits_of, stream
from loopq_compile.progress import progress

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import CacheHook, TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise LoopQError(f"Tasks need lm-eval: pip install 'loopq-compile[eval]' ({error}).") from error

MAX_LENGTH, NEW_TOKENS = 2048, 256
_LARGEST_OUTPUT = 1 << 25
"""Logits of one batch hold at most this many numbers."""
Request = tuple[Any, list[int], list[int]]
"""Whatever lm-eval calls it by, tokens of the context, tokens of the continuation."""


@register_model("loopq")
class LanguageModel(TemplateLM):
    """What lm-eval asks of a model, answered by anything that maps token ids to logits.

    Args:
        model: a module, a `Program`, an ONNX executable; with its `tokenizer`.
        tokenizer: a `tokenizers.Tokenizer`.
        path: in place of the two, whatever `loopq_compile.loading.load_model` takes.
        max_length: tokens of context at most; older ones are cut off.
        batch_size: sequences that run together.

    Raises:
        LoopQError: nothing to run, or no tokenizer.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        path: str = "",
        max_length: int = MAX_LENGTH,
        batch_size: int | str | None = 8,
        **_: Any,
    ) -> None:
        super().__init__()
        self.cache_hook: Any = CacheHook(None)
        if path:
            from loopq_compile.loading import load_model

            loaded = load_model(path)
            model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
        if model is None or tokenizer is None:
            raise LoopQError("lm-eval needs a model and its tokenizer; name a tokenizer.json with --tokenizer.")
        self.model, self.tokens, self.max_length = model, tokenizer, int(max_length)
        self.batch_size = int(batch_size or 8)
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self._place = torch.device("cpu") if parameter is None else parameter.device

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends texts, and that stands in front of those without context; 0 if none is known."""
        from loopq_compile.loading import end_token

        return end_token(self.tokens) or 0

    @property
    def tokenizer_name(self) -> str:
        """For the names of lm-eval's caches."""
        return f"loopq-{self.tokens.get_vocab_size()}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; special tokens are added only if asked for."""
        return self.tokens.encode(string, add_special_tokens=bool(add_special_tokens)).ids

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-probability of every continuation, and whether each of its tokens is the most likely one."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        disabled = bool(kwargs.get("disable_tqdm"))
        batches = list(self._batches(order, requests))
        for batch in batches if disabled else progress(batches, "scoring continuations", len(batches)):
            for i, answer in zip(batch, self._score([requests[i][1:] for i in batch]), strict=True):
                answers[i] = answer
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of `max_length` tokens, every token once."""
        windows: list[Request] = []
        owner: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            for pair in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owner, self._without_cache(windows, disable_tqdm), strict=True):
            totals[number] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue the contexts up to the first of their stop strings. The sequence is read again for every
        token."""
        answers = []
        arguments = [request.args for request in requests]
        for context, options in arguments if disable_tqdm else progress(arguments, "writing answers", len(arguments)):
            answers.append(self._generate(context, dict(options)))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        return answers

    def _without_cache(self, windows: list[Request], quiet: bool) -> list[tuple[float, bool]]:
        hook, self.cache_hook = self.cache_hook, CacheHook(None)
        try:
            return self._loglikelihood_tokens(windows, disable_tqdm=quiet)
        finally:
            self.cache_hook = hook

    def _logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return logits_of(self.model(ids.to(self._place))).float().cpu()

    def _batches(self, order: Sequence[int], requests: Sequence[Request]) -> Iterator[list[int]]:
        """Requests of like length together; the longest come first."""
        batch: list[int] = []
        longest = limit = 1
        for i in order:
            if not batch:
                longest = min(self.max_length, len(requests[i][1]) + len(requests[i][2]))
                limit = max(1, min(self.batch_size, _LARGEST_OUTPUT // (longest * self.tokens.get_vocab_size())))
            batch.append(i)
            if len(batch) == limit:
                yield batch
                batch = []
        if batch:
            yield batch

    def _score(self, pairs: Sequence[Sequence[list[int]]]) -> Iterable[tuple[float, bool]]:
        """Rows are filled up behind their end, which a causal model does not look at."""
        rows = [(context + continuation)[-self.max_length - 1 :][:-1] for context, continuation in pairs]
        longest = max(map(len, rows))
        logits = self._logits(torch.tensor([row + [0] * (longest - len(row)) for row in rows]))
        for row, (_, continuation), values in zip(rows, pairs, logits, strict=True):
            wanted = torch.tensor(continuation[-len(row) :], dtype=torch.int64)
            logp = values[len(row) - len(wanted) : len(row)].log_softmax(-1)
            best = bool((logp.argmax(-1) == wanted).all())
            yield float(logp.gather(-1, wanted.unsqueeze(-1)).double().sum()), best

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        new = int(options.get("max_gen_toks") or options.get("max_new_tokens") or NEW_TOKENS)
        sampling = {name: options[name] for name in ("temperature", "top_k", "top_p") if options.get(name)}
        ids = self.tok_encode(context)[-max(1, self.max_length - new) :] or [self.prefix_token_id]
        made: list[int] = []
        text = ""
        drawn = bool(options.get("do_sample")) and bool(sampling.get("temperature", 1))
        options = {"do_sample": drawn, "eos_token_id": self.eot_token_id, **(sampling if drawn else {})}
        for token in stream(self._logits, torch.tensor([ids]), new, **options):
            if int(token) == self.eot_token_id:
                break
            made.append(int(token))
            text = self.tokens.decode(made)
            if any(stop and stop in text for stop in stops):
                break
        ends = [text.index(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text


def run_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs lm-eval's tasks.

    Args:
        model: what to measure.
        tasks: names of tasks or groups, or YAML files of tasks.
        folder: with YAML files of further tasks.
        fewshot: examples in front of every question; None for the task's own number.
        limit: questions of every task; None for all.

    Returns:
        By task or group, its metrics and their standard errors.

    Raises:
        LoopQError: a task is unknown, or its data set cannot be had.
    """
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=_find_tasks(tasks, folder),
        num_fewshot=fewshot,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
    )
    found = (results or {}).get("results", {})
    return {name: {key: value for key, value in found[name].items() if key != "alias"} for name in found}


def _find_tasks(tasks: Sequence[str], folder: str | None) -> TaskManager:
    """Reading lm-eval's own thousands of tasks takes seconds; a folder may have all that are asked for."""
    if folder is not None:
        own = _Tasks(include_path=folder, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    return _Tasks(include_path=folder)


class _Tasks(TaskManager):
    """Tasks whose failures to load are told as what they are."""

    def load(self, task_list: Any) -> Any:
        known = self.all_tasks
        for name in task_list:
            if name not in known and not str(name).endswith((".yaml", ".yml")):
                raise LoopQError(f"lm-eval has no task {name!r}.{_suggestion(name, known)}")
        try:
            return super().load(task_list)
        except Exception as error:  # of the data sets' many sources, each with its own kinds
            reason = " ".join(str(error).split())[:300]
            raise LoopQError(
                f"The data of {', '.join(map(str, task_list))} cannot be had: {type(error).__name__}: {reason}. "
                "lm-eval takes data sets from the Hugging Face hub or its local cache; your own tasks may read local "
                "files (dataset_path: json, with data_files in dataset_kwargs)."
            ) from error


def _suggestion(name: str, known: Sequence[str]) -> str:
    """The like-named task; lm-eval has thousands, too many to list."""
    hint = did_you_mean(name, known).partition(" Known:")[0]
    return hint or " `lm-eval ls tasks` lists them."
