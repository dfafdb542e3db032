"""Programs, ONNX files and models in EleutherAI's lm-eval: HellaSwag, WinoGrande, ARC, LAMBADA, MMLU, WikiText, ...

Needs the extra `eval`. Importing this module registers the model type `loopq`, so lm-eval's own functions take it by
name: `lm_eval.simple_evaluate("loopq", "path=my-program", tasks=["hellaswag"])`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from loopq_compile.errors import LoopQError, did_you_mean
from loopq_compile.evaluation.perplexity import logits_caller
from loopq_compile.generation.decoders import Decoder, RecomputingDecoder
from loopq_compile.generation.sampling import stream
from loopq_compile.generation.tokenizer import without_limits
from loopq_compile.progress import progress
from loopq_compile.sources.hugging_face import SETTINGS, SOURCE_CONFIG

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
"""Most numbers in the logits of one batch."""
LAST_TOKEN_REFUSAL = (
    "Log-likelihoods need logits for every token; {} tokens gave {}. Programs and files made with last_token "
    "(`--last-token`) give those of the last: export without it."
)
Request = tuple[Any, list[int], list[int]]
"""lm-eval's key of the request, tokens of the context, tokens of the continuation."""


@register_model("loopq")
class LanguageModel(TemplateLM):
    """The model interface of lm-eval, for anything that maps token ids to logits.

    Args:
        model: a module, a `Program` or an ONNX executable; needs its `tokenizer`.
        tokenizer: a `tokenizers.Tokenizer`.
        path: instead of the two, anything that `loopq_compile.sources.loading.load_model` takes.
        settings: text files by name, as in `Loaded.settings`: `tokenizer_config.json` names the first and the last
            token and the chat template, `generation_config.json` the tokens that end an answer.
        max_length: most tokens of context; older ones are cut off. The default is that of the model's configuration
            (`n_positions`, `max_position_embeddings`, `n_ctx`), else the tokenizer's `model_max_length`, else 2048.
        batch_size: sequences that run together.

    Tokens, prefixes, windows and stops are handled as in lm-eval's own `HFLM`.

    Raises:
        LoopQError: there is nothing to run, or no tokenizer.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        path: str = "",
        settings: Mapping[str, str] | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = 8,
        **_: Any,
    ) -> None:
        super().__init__()
        self.cache_hook: Any = CacheHook(None)
        if path:
            from loopq_compile.sources.loading import load_model

            loaded = load_model(path)
            model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
            settings = loaded.settings if settings is None else settings
        if model is None or tokenizer is None:
            raise LoopQError("lm-eval needs a model and its tokenizer; name a tokenizer.json with --tokenizer.")
        self.model, self._call = model, logits_caller(model)
        self._settings = {name: json.loads(text) for name, text in (settings or {}).items() if name.endswith(".json")}
        self.tokenizer: Any = _tokenizer(without_limits(tokenizer), settings or {})
        self.max_length = int(max_length or self._known_length())
        self.batch_size = int(batch_size or 8) if batch_size != "auto" else 8

    def _known_length(self) -> int:
        config: Any = getattr(self.model, "config", None)
        values = config.to_dict() if hasattr(config, "to_dict") else self._settings.get(SOURCE_CONFIG, {})
        values = values.get("text_config") or values
        known = (values.get(name) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
        longest = next((value for value in known if value is not None), self.tokenizer.model_max_length)
        return int(longest) if longest < VERY_LARGE_INTEGER else MAX_LENGTH

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends texts; 0 if none is known."""
        own = self.tokenizer.eos_token_id
        return next((token for token in (own, *self._ends()) if token is not None), 0)

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before texts without context: the token that begins every text if there is one, else the one
        that ends it."""
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else own

    def _ends(self) -> list[int]:
        """Ids that the generation settings name as ends of a text."""
        generation: Any = getattr(self.model, "generation_config", None)
        own = self._settings.get("generation_config.json", {}).get("eos_token_id")
        found = own if own is not None else getattr(generation, "eos_token_id", None)
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    @property
    def tokenizer_name(self) -> str:
        """For the names of lm-eval's caches."""
        return f"loopq-{len(self.tokenizer)}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; None adds special tokens as the tokenizer does, unless the text already begins with the
        first."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]) or "\0")
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, by the tokenizer's template; roles that it refuses are left out, as in `HFLM`.

        Raises:
            LoopQError: the tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise LoopQError("The tokenizer has no chat template; run the task without one.")
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        options["continue_final_message"] = not add_generation_prompt
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(others, **options)

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
        """Log-probability of whole texts, in windows of `max_length` tokens; every token counts once."""
        windows: list[Request] = []
        owner: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            for pair in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owner, self._without_cache(windows, disable_tqdm), strict=True):
            totals[number] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues the contexts up to the first of their stop strings, or a token that ends texts."""
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

    def _batches(self, order: Sequence[int], requests: Sequence[Request]) -> Iterator[list[int]]:
        """Batches requests of similar length; the longest come first."""
        batch: list[int] = []
        longest = limit = 1
        for i in order:
            if not batch:
                longest = min(self.max_length, len(requests[i][1]) + len(requests[i][2]))
                limit = max(1, min(self.batch_size, _LARGEST_OUTPUT // (longest * len(self.tokenizer))))
            batch.append(i)
            if len(batch) == limit:
                yield batch
                batch = []
        if batch:
            yield batch

    def _score(self, pairs: Sequence[Sequence[list[int]]]) -> Iterable[tuple[float, bool]]:
        """Scores pairs; rows are padded after their end, where a causal model does not look."""
        for _, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                raise LoopQError(
                    f"A continuation has {len(continuation)} tokens: it needs 1 to {self.max_length} (max_length)."
                )
        rows = [(context + continuation)[-self.max_length - 1 :][:-1] for context, continuation in pairs]
        longest = max(map(len, rows))
        logits = self._call(torch.tensor([row + [0] * (longest - len(row)) for row in rows]))
        if logits.shape[1] != longest:
            raise LoopQError(LAST_TOKEN_REFUSAL.format(longest, list(logits.shape)))
        for row, (_, continuation), values in zip(rows, pairs, logits, strict=True):
            wanted = torch.tensor(continuation[-len(row) :], dtype=torch.int64)
            logp = values[len(row) - len(wanted) : len(row)].log_softmax(-1)
            best = bool((logp.argmax(-1) == wanted).all())
            yield float(logp.gather(-1, wanted.unsqueeze(-1)).double().sum()), best

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        stops.append(self.tokenizer.decode([self.eot_token_id]))
        stops = [(stop, len(self.tokenizer.encode(stop, add_special_tokens=False)) + 2) for stop in stops if stop]
        lengths = (options.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
        new = int(next((length for length in lengths if length is not None), NEW_TOKENS))
        if new >= self.max_length:
            raise LoopQError(
                f"The task asks for {new} tokens, the model takes texts of {self.max_length}, question included: set "
                "max_gen_toks in its generation_kwargs."
            )
        ids = self.tok_encode(context)[new - self.max_length :] or [self.prefix_token_id]
        made: list[int] = []
        sized: Any = _Sized(self.model, self._call)
        for token in stream(sized, torch.tensor([ids]), new, **self._sampling(options)):
            made.append(int(token))
            if any(stop in self.tokenizer.decode(made[-tokens:]) for stop, tokens in stops):
                break
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        for stop, _ in stops:
            text = text.split(stop)[0]
        return text

    def _sampling(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Greedy unless a temperature is given, as in lm-eval."""
        temperature = float(options.get("temperature") or 0)
        drawn = options.get("do_sample") is not False and (temperature > 0 or bool(options.get("do_sample")))
        names = ("top_k", "top_p") if drawn else ()
        chosen = {name: options[name] for name in names if options.get(name)} | {"temperature": temperature or 1.0}
        return {"do_sample": drawn, "eos_token_id": self._ends(), **chosen}


class _Sized:
    """The model for `stream`: its decoder if it has one, else its logits on the CPU."""

    def __init__(self, model: Any, call: Any) -> None:
        self.model, self.call = model, call

    def decoder(self) -> Decoder:
        return self.model.decoder() if hasattr(self.model, "decoder") else RecomputingDecoder(self.call)


def _tokenizer(tokenizer: Any, settings: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A transformers tokenizer: with its settings, or with the first and last token that can be found without
    settings."""
    from loopq_compile.generation.tokenizer import end_token

    files = {name: text for name, text in settings.items() if name in SETTINGS and name != SOURCE_CONFIG}
    if "tokenizer_config.json" in files:
        config = json.loads(files["tokenizer_config.json"])
        config.setdefault("chat_template", files.get("chat_template.jinja"))
        special = json.loads(files.get("special_tokens_map.json", "{}"))
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "model_max_length")
        known = {name: (special | config).get(name) for name in names}
        known["clean_up_tokenization_spaces"] = bool(config.get("clean_up_tokenization_spaces"))
    else:
        first, last = tokenizer.encode("").ids[:1], end_token(tokenizer)
        known = {"bos_token": tokenizer.id_to_token(first[0]) if first else None}
        known["eos_token"] = tokenizer.id_to_token(last) if last is not None else None
    given = {name: _text_of(value) for name, value in known.items() if value is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


def _text_of(value: Any) -> Any:
    """A special token, which settings may describe by a mapping."""
    return value["content"] if isinstance(value, Mapping) and "content" in value else value


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
        folder: a folder with YAML files of further tasks.
        fewshot: how many examples come before every question; None for the task's own number.
        limit: most questions of every task; None for all.

    Returns:
        The metrics of each task or group, and their standard errors.

    Raises:
        LoopQError: a task is unknown, or its data set is not available.
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
    """Finds tasks; skips reading lm-eval's own thousands, which takes seconds, if a folder has all requested ones."""
    if folder is not None:
        own = _Tasks(include_path=folder, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    return _Tasks(include_path=folder)


class _Tasks(TaskManager):
    """Loads tasks; reports load errors with their cause."""

    def load(self, task_list: Any) -> Any:
        known = self.all_tasks
        for name in task_list:
            if name not in known and not str(name).endswith((".yaml", ".yml")):
                raise LoopQError(f"lm-eval has no task {name!r}.{_suggestion(name, known)}")
        try:
            return super().load(task_list)
        except Exception as error:  # data sets have many sources, each with its own kinds of errors
            reason = " ".join(str(error).split())[:300]
            raise LoopQError(
                f"The data of {', '.join(map(str, task_list))} cannot be had: {type(error).__name__}: {reason}. "
                "lm-eval takes data sets from the Hugging Face hub or its local cache; your own tasks may read local "
                "files (dataset_path: json, with data_files in dataset_kwargs)."
            ) from error


def _suggestion(name: str, known: Sequence[str]) -> str:
    """The task with a similar name; lm-eval has thousands, too many to list."""
    hint = did_you_mean(name, known).partition(" Known:")[0]
    return hint or " `lm-eval ls tasks` lists them."
