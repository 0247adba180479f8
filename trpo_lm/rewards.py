"""Where scores come from: reward functions, reward models, and both of them on unfinished text.

A reward function takes the keywords it names out of `KEYWORDS` and the dataset's columns and
returns one entry for each completion: a number (paid at the last action), a list of numbers (one
for each token, paid where they stand) or None to abstain. A reward model is a sequence classifier
with a tokenizer of its own.

For the prefix critic both can score the states of a completion, V(s_t) ~ score(prompt + y_<t). A
state is handed over as *text*, so policy and reward model need not share a tokenizer. A causal
classifier scores all states of a completion in one forward pass, an encoder needs a pass for each.

Nothing is clipped, normalised or replaced here: a reward that cannot be used is an error that names
the function and the sample.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import multiprocessing
import numbers
import os
import signal
import time
import traceback
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trpo_lm.errors import RunFault, TrpoLMError

KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric")
_SIGNATURE_HINT = f"a reward takes some of {', '.join(KEYWORDS)} and the dataset's columns, by name"
_PROBE_TOKENS = 8  # length of the text on which a classifier shows whether it is causal
_START_SECONDS = 120  # a worker process first imports torch and the function's module


class RewardModel:
    """A sequence classifier used as a reward.

    Scores prompt + completion as one text; conversations go through the tokenizer's own chat
    template. One output: its raw value. Several: the probability of `label` (softmax; sigmoid where
    the config says "multi_label_classification"). Texts longer than the model's context lose their
    beginning, for what a completion adds stands at the end.

    Args:
        model: Name or folder for `AutoModelForSequenceClassification`, or a loaded model.
        processing_class: Its tokenizer; default: the one stored with the model.
        label: Output to reward, by name or index. Default with two outputs: the one named
            "positive", else index 1. Required with more.
        batch_size: Texts in one forward pass.
        prefix_stride: Without causal attention, score every k-th prefix and interpolate between.
        allow_untrained_head: Accept weights that are missing from the model's files.
        device: Where to move the model; default: it stays where it is.

    Attributes:
        causal: Whether all prefixes of a text come out of one forward pass.
        max_length: Context length, tokens.

    Raises:
        TrpoLMError: If the model cannot be loaded, has no trained head, tokenizer or padding token,
            or `label` is not one of its outputs.
    """

    scores_prefixes = True

    def __init__(
        self,
        model: Any,
        processing_class: Any = None,
        *,
        label: str | int | None = None,
        batch_size: int = 64,
        prefix_stride: int = 1,
        allow_untrained_head: bool = False,
        device: Any = None,
    ):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        self.__name__ = name.rstrip("/").split("/")[-1] or type(model).__name__
        if isinstance(model, str):
            options = {"output_loading_info": True, "use_safetensors": True}
            model, info = _load(AutoModelForSequenceClassification, name, **options)
            if info["missing_keys"] and not allow_untrained_head:
                raise TrpoLMError(
                    f"reward model {name!r} has no trained head: its files lack "
                    f"{', '.join(sorted(info['missing_keys']))}",
                    hint="name a model trained for sequence classification, or pass "
                    "allow_untrained_head=True (--allow_untrained_reward_head)",
                )
        self.model = (model if device is None else model.to(device)).eval()
        self.tokenizer = tokenizer = processing_class or _load(AutoTokenizer, name)
        self.batch_size, self.prefix_stride = batch_size, prefix_stride
        config = self.model.config
        self.label = _label_index(label, config, name)

        pads = (
            tokenizer.pad_token_id,
            getattr(config, "pad_token_id", None),
            tokenizer.eos_token_id,
        )
        pads = [i for i in pads if i is not None and i >= 0]
        if not pads:
            raise TrpoLMError(
                f"the tokenizer of reward model {name!r} has neither a padding nor an end token",
                hint="set tokenizer.pad_token and pass the tokenizer as processing_class",
            )
        # A causal classifier pools at the last token that is not config.pad_token_id.
        self.pad_id = config.pad_token_id = config.get_text_config().pad_token_id = pads[0]
        limits = [getattr(config, n, None) for n in ("max_position_embeddings", "n_positions")]
        limits = [n for n in (*limits, tokenizer.model_max_length) if isinstance(n, int) and n > 0]
        self.max_length = min(limits, default=2**31)
        head = getattr(self.model, "score", None)
        self._head = head if isinstance(head, torch.nn.Module) else None
        self.causal = self._head is not None and tokenizer.is_fast and self._is_causal()

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """Score whole completions.

        Args:
            prompts: (N,) strings, or conversations of {"role", "content"}.
            completions: (N,) strings, or lists of messages.
            columns: Ignored; accepted so that a model is called like a function.

        Returns:
            (N,) scores.
        """
        texts = [self._text(p, c) for p, c in zip(prompts, completions, strict=True)]
        return self._score_texts(texts, prompts)

    def score_prefixes(
        self, prompts: list, completions: list, prefixes: list[list[str]]
    ) -> list[list[float]]:
        """Score the states of N completions.

        With a causal model a state takes the score at the last token that ends within its text, all
        from one pass over the whole text; a state whose text is the whole completion takes the
        score of `__call__`. Otherwise each distinct text is scored by itself.

        Args:
            prompts: (N,), as in `__call__`.
            completions: (N,), as in `__call__`.
            prefixes: prefixes[i][t] is the decoded text of the first t tokens of completion i.

        Returns:
            Scores in the shape of `prefixes`.
        """
        texts = [[self._text(p, x) for x in row] for p, row in zip(prompts, prefixes, strict=True)]
        known: list[dict[int, float]] = [{} for _ in texts]
        if self.causal and texts:
            whole = [self._text(p, c) for p, c in zip(prompts, completions, strict=True)]
            known = self._score_in_one_pass(whole, texts, prompts)
        # What is left: everything for an encoder; for a causal model texts beyond its context.
        places: dict[str, list[tuple[int, int]]] = {}
        for i, row in enumerate(texts):
            left = [t for t in range(len(row)) if t not in known[i]]
            for t in {*left[:: self.prefix_stride], *left[-1:]}:
                places.setdefault(row[t], []).append((i, t))
        for text, score in zip(places, self._score_texts(list(places), prompts), strict=True):
            for i, t in places[text]:
                known[i][t] = score
        return [
            np.interp(range(len(row)), sorted(at), [at[t] for t in sorted(at)]).tolist()
            if row
            else []
            for row, at in zip(texts, known, strict=True)
        ]

    def _score_in_one_pass(
        self, whole: list[str], texts: list[list[str]], prompts: list
    ) -> list[dict[int, float]]:
        """Return {t: score} for each row: the states that one pass over `whole` can score."""
        known: list[dict[int, float]] = [{} for _ in texts]
        rows, ends = self._encode(whole, prompts)
        fits = [i for i, row in enumerate(rows) if len(row) <= self.max_length]
        for i, (_, logits) in zip(fits, self._logits([rows[i] for i in fits]), strict=True):
            scores = self._score(logits).tolist()
            pooled = max((j for j, token in enumerate(rows[i]) if token != self.pad_id), default=0)
            for t, text in enumerate(texts[i]):
                # The text that both begin with: half a character decodes differently, and a
                # template closes the message.
                seen = bisect_left(
                    range(len(text)), True, key=lambda n: not whole[i].startswith(text[: n + 1])
                )
                last = bisect_right(ends[i], seen) - 1
                if last >= 0:
                    known[i][t] = scores[min(last, pooled)]
        return known

    def _score_texts(self, texts: list[str], prompts: list) -> list[float]:
        """Score each text by itself: (len(texts),)."""
        if not texts:
            return []
        rows, _ = self._encode(texts, prompts)
        return self._score(torch.stack([pooled for pooled, _ in self._logits(rows)])).tolist()

    def _text(self, prompt: Any, completion: Any) -> str:
        """Join a prompt and a completion, through the chat template for conversations."""
        if isinstance(prompt, str):
            whole = isinstance(completion, str)
            return prompt + (completion if whole else "".join(m["content"] for m in completion))
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if not self.tokenizer.chat_template:
            raise TrpoLMError(
                f"the tokenizer of reward model {self.__name__!r} has no chat template, and the "
                "prompts are conversations",
                hint="set tokenizer.chat_template and pass the tokenizer as processing_class",
            )
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)

    def _encode(self, texts: list[str], prompts: list) -> tuple[list[list[int]], list[list[int]]]:
        """Tokenise, with exactly one BOS where there is one.

        Returns:
            Token ids of each text, at least one; and the character at which each token ends, as a
            running maximum: closing special tokens end with the text. No ends without a fast
            tokenizer.
        """
        tokenizer, fast = self.tokenizer, self.tokenizer.is_fast
        out = tokenizer(
            texts,
            add_special_tokens=isinstance(prompts[0], str),  # a template writes its own
            return_offsets_mapping=fast,
            verbose=False,
        )
        rows, bos = out["input_ids"], tokenizer.bos_token_id
        offsets = out["offset_mapping"] if fast else [[] for _ in rows]
        ends = [[end for _, end in row] for row in offsets]
        blank = next(i for i in (bos, tokenizer.eos_token_id, self.pad_id) if i is not None)
        for ids, end in zip(rows, ends, strict=True):
            if len(ids) > 1 and ids[0] == ids[1] == bos:
                del ids[0], end[:1]
            if not ids:
                ids.append(blank)
        return rows, [list(accumulate(end, max)) for end in ends]

    @torch.no_grad()
    def _logits(self, rows: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
        """Run the classifier on token ids, in right-padded batches of similar length.

        Returns:
            For each row its logits (labels,) and the head's output at each position (T, labels),
            float32, on the CPU; the latter is empty where the head does not see single positions.
        """
        special = set(self.tokenizer.all_special_ids)
        fitted = []
        for row in rows:
            kept = row[:1] if len(row) > self.max_length and row[0] in special else []
            fitted.append(kept + row[len(kept) :][-self.max_length + len(kept) :])
        order = sorted(range(len(rows)), key=lambda i: len(fitted[i]))
        found: dict[int, tuple[Tensor, Tensor]] = {}
        outputs: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
            outputs.append(output)

        hook = self._head and self._head.register_forward_hook(keep)
        try:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                tokens = [torch.tensor(fitted[i]) for i in batch]
                ids = pad_sequence(tokens, batch_first=True, padding_value=self.pad_id)
                mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
                device = self.model.device
                logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
                pooled = logits.float().cpu()
                inside = outputs.pop().float().cpu() if outputs else pooled
                if inside.shape[:-1] != ids.shape:
                    inside = pooled.new_empty(len(batch), 0, pooled.shape[-1])
                for i, own, positions in zip(batch, pooled, inside, strict=True):
                    found[i] = own, positions[: len(fitted[i])]
        finally:
            if hook:
                hook.remove()
        return [found[i] for i in range(len(rows))]

    def _is_causal(self) -> bool:
        """Whether the head at each position of a text says what the text cut there would get."""
        special = {*self.tokenizer.all_special_ids, self.pad_id}
        vocabulary = range(self.model.get_input_embeddings().num_embeddings)
        probe = [i for i in vocabulary if i not in special][: min(_PROBE_TOKENS, self.max_length)]
        cuts = self._logits([probe[: n + 1] for n in range(len(probe))])
        alone, inside = torch.stack([pooled for pooled, _ in cuts]), cuts[-1][1]
        tolerance = 1e-4 if self.model.dtype in (torch.float32, torch.float64) else 5e-2
        return inside.shape == alone.shape and bool((inside - alone).abs().max() <= tolerance)

    def _score(self, logits: Tensor) -> Tensor:
        """Turn logits (..., labels) into scores (...)."""
        if logits.shape[-1] == 1:
            return logits[..., 0]
        if self.model.config.problem_type == "multi_label_classification":
            return logits[..., self.label].sigmoid()
        return logits.log_softmax(-1)[..., self.label].exp()


def _load(loader: Any, name: str, **options: Any) -> Any:
    """Load from a folder or the hub; never runs code that comes with the model."""
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
        absent = offline and not os.path.isdir(name)
        why = "not found locally and HF_HUB_OFFLINE=1" if absent else "could not be loaded"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrpoLMError(
            f"reward model {name!r} {why}: {reason}",
            hint="give a folder with config.json, model.safetensors, tokenizer.json, or a hub id",
        ) from error


def _label_index(label: str | int | None, config: Any, name: str) -> int:
    """Return the index of the output to reward."""
    names = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
    if label is None and len(names) <= 2:
        positive = [i for i, text in enumerate(names) if text.upper() in ("POSITIVE", "POS")]
        return (positive or [len(names) - 1])[0]
    for i, text in enumerate(names):
        if label == i or (isinstance(label, str) and label.upper() == text.upper()):
            return i
    wish = "say which one to reward" if label is None else f"{label!r} is none of them"
    raise TrpoLMError(
        f"reward model {name!r} has the labels {', '.join(names)}: {wish}", where="label"
    )


@dataclass(frozen=True)
class RewardBatch:
    """What N completions earned.

    Attributes:
        score: (N,) float64, weighted sum over the functions that did not abstain; nan where none
            spoke or the row was skipped. Equals `terminal` plus the sum of `token_rewards`.
        valid: (N,) bool, rows with a score.
        terminal: (N,) float64, the part of `score` paid at the last action; 0 where not valid.
        token_rewards: One weighted reward for each token of each completion, zeros where not valid;
            None if no function returned lists.
        columns: Unweighted values of each function (the sum of a list); None where it abstained or
            the value was skipped.
        logged: Mean of what the functions passed to `log_metric`, by name.
    """

    score: Tensor
    valid: Tensor
    terminal: Tensor
    token_rewards: list[list[float]] | None
    columns: dict[str, list[float | None]]
    logged: dict[str, float]


def scores_prefixes(function: Callable) -> Callable:
    """Declare that a reward function can score unfinished text, for the prefix critic.

    It is then also called with prefixes as `completions`, without `completion_ids` and
    `trainer_state`, and returns one number for each: the better that tells how the whole will
    score, the better the critic.
    """
    function.scores_prefixes = True  # type: ignore[attr-defined]
    return function


class Rewards:
    """Several reward functions as one.

    Args:
        reward_funcs: One or a list of: callables (async ones too), reward models, or models and
            their names, which become a `RewardModel`.
        reward_weights: One finite weight for each function, not all zero; default 1.
        on_bad_reward: What a nan or infinite reward does: "error", or "skip" to drop the row.
        timeout: Seconds a function (not a reward model) may take. Each function then runs in a
            process of its own, which is killed when the time is over.
        reward_model_options: Keywords for the reward models made here.

    Attributes:
        names: A distinct name for each function.
        weights: Weight of each function.
        can_score_prefixes: Whether every function with a weight can score unfinished text.

    Raises:
        TrpoLMError: If a function or the weights cannot be used.
    """

    def __init__(
        self,
        reward_funcs: Any,
        reward_weights: list[float] | None = None,
        *,
        on_bad_reward: str = "error",
        timeout: float | None = None,
        reward_model_options: dict[str, Any] | None = None,
    ):
        given = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not given:
            raise TrpoLMError("reward_funcs is empty", hint=_SIGNATURE_HINT)
        if on_bad_reward not in ("error", "skip"):
            raise TrpoLMError(f"on_bad_reward = {on_bad_reward!r} must be 'error' or 'skip'")
        self.weights = [1.0] * len(given) if reward_weights is None else list(reward_weights)
        finite = all(isinstance(w, numbers.Real) and math.isfinite(w) for w in self.weights)
        if len(self.weights) != len(given) or not finite or not any(self.weights):
            raise TrpoLMError(
                f"reward_weights = {reward_weights!r} must be {len(given)} finite numbers, one for "
                "each reward function, not all zero"
            )
        self.on_bad_reward, self.timeout = on_bad_reward, timeout
        self.functions: list[Any] = []
        self.names: list[str] = []
        for i, function in enumerate(given):
            is_model = isinstance(function, torch.nn.Module) and hasattr(function, "config")
            if is_model or isinstance(function, str):
                function = RewardModel(function, **(reward_model_options or {}))
            self.functions.append(function)
            self.names.append(_name(function, i, self.names))
        self._signatures = [
            _signature(f, n) for f, n in zip(self.functions, self.names, strict=True)
        ]
        self.can_score_prefixes = all(
            getattr(getattr(f, "func", f), "scores_prefixes", False)  # func: functools.partial
            for f, weight in zip(self.functions, self.weights, strict=True)
            if weight
        )
        self._workers: dict[int, _Worker] = {}
        self._start_workers()

    def check_columns(self, column_names: Iterable[str]) -> None:
        """Raise `TrpoLMError` if a function requires what is neither a keyword nor a column."""
        columns = sorted(column_names)
        for name, (required, _) in zip(self.names, self._signatures, strict=True):
            if absent := sorted(required - {*KEYWORDS, *columns}):
                raise TrpoLMError(
                    f"reward {name!r} requires {', '.join(absent)}, which is no column of the "
                    f"dataset ({', '.join(columns) or 'it has none'})",
                    hint=_SIGNATURE_HINT,
                )

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: dict[str, list],
        trainer_state: Any = None,
    ) -> RewardBatch:
        """Score N completions.

        Args:
            prompts: (N,) strings or conversations.
            completions: (N,) strings or lists of messages.
            completion_ids: (N,) token ids, without padding.
            columns: Further columns of the dataset, (N,) each.
            trainer_state: Handed to the functions that ask for it.

        Raises:
            RunFault: If a function raises, takes too long, or returns what cannot be used.
        """
        self.check_columns(columns)
        known = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        known["trainer_state"] = trainer_state
        results, metrics = self._run(range(len(self.functions)), {**columns, **known})
        lengths = [len(ids) for ids in completion_ids]
        values = [self._checked(k, result, prompts, lengths) for k, result in enumerate(results)]

        weights = np.array(self.weights, dtype=float)
        said = np.array([[v is not None for v in row] for row in values], dtype=bool)  # (F, N)
        listed = np.array([[isinstance(v, list) for v in row] for row in values], dtype=bool)
        sums = np.array([[_total(v) for v in row] for row in values], dtype=float)
        skipped = np.isnan(sums).any(axis=0)
        valid = said[weights != 0].any(axis=0) & ~skipped
        token_rewards = [np.zeros(length) for length in lengths]
        for k, i in np.argwhere(listed & valid):
            token_rewards[i] += weights[k] * np.array(values[k][i])
        logged = {name: sum(found) / len(found) for name, found in metrics.items()}
        if self.on_bad_reward == "skip":
            logged["rewards/skipped"] = float(skipped.sum())
        return RewardBatch(
            score=torch.from_numpy(np.where(valid, weights @ sums, math.nan)),
            valid=torch.from_numpy(valid),
            terminal=torch.from_numpy(np.where(valid, weights @ np.where(listed, 0.0, sums), 0.0)),
            token_rewards=[row.tolist() for row in token_rewards] if listed.any() else None,
            columns={
                name: [x if a and math.isfinite(x) else None for a, x in zip(*row, strict=True)]
                for name, *row in zip(self.names, said.tolist(), sums.tolist(), strict=True)
            },
            logged=logged,
        )

    def score_prefixes(
        self,
        prompts: list,
        completions: list,
        prefixes: list[list[str]],
        columns: dict[str, list] | None = None,
    ) -> list[list[float]]:
        """Score the states of N completions: the weighted sum over the functions.

        Args:
            prompts: (N,) strings or conversations.
            completions: (N,) strings or lists of messages.
            prefixes: prefixes[i][t] is the text of the first t tokens of completion i.
            columns: Further columns of the dataset, (N,) each.

        Returns:
            Scores in the shape of `prefixes`; what abstains on a prefix, or is skipped, adds 0.

        Raises:
            RunFault: As for whole completions.
        """
        states = [(i, text) for i, row in enumerate(prefixes) for text in row]
        known = {name: [column[i] for i, _ in states] for name, column in (columns or {}).items()}
        known["prompts"] = [prompts[i] for i, _ in states]
        known["completions"] = [
            text if isinstance(completions[i], str) else [{"role": "assistant", "content": text}]
            for i, text in states
        ]
        weighted = [k for k, weight in enumerate(self.weights) if weight]
        plain = [k for k in weighted if not isinstance(self.functions[k], RewardModel)]
        results = dict(zip(plain, self._run(plain, known)[0], strict=True))
        total = np.zeros(len(states))
        for k in weighted:
            if k not in results:
                keywords = {"prompts": prompts, "completions": completions, "prefixes": prefixes}
                (rows,) = _call([(self.functions[k].score_prefixes, keywords)])
                self._raise_failure(k, rows, prompts)
                results[k] = [score for row in rows for score in row]
            values = self._checked(k, results[k], known["prompts"], None)
            total += self.weights[k] * np.nan_to_num([_total(v) for v in values])
        scores = iter(total.tolist())
        return [[next(scores) for _ in row] for row in prefixes]

    def close(self) -> None:
        """End the worker processes; a later call starts new ones."""
        while self._workers:
            self._workers.popitem()[1].close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_workers(self) -> None:
        """With a time limit, give each function a process; reward models stay in this one."""
        try:
            for k, function in enumerate(self.functions if self.timeout else ()):
                if k not in self._workers and not isinstance(function, RewardModel):
                    self._workers[k] = _Worker(function, self.names[k])
        except TrpoLMError:
            self.close()
            raise

    def _run(
        self, which: Iterable[int], known: dict[str, Any]
    ) -> tuple[list[Any], dict[str, list[float]]]:
        """Call the functions `which` with what each takes of `known`.

        Returns:
            What each returned, and the values passed to `log_metric`, by name.
        """
        metrics: dict[str, list[float]] = {}
        if not known["prompts"]:
            return [[] for _ in which], metrics
        known = {**known, "log_metric": functools.partial(_log_metric, metrics)}
        keywords = {}
        for k in which:
            _, accepted = self._signatures[k]
            keywords[k] = {n: v for n, v in known.items() if accepted is None or n in accepted}
        try:
            self._start_workers()
            elsewhere = [k for k in keywords if k in self._workers]
            for k in elsewhere:
                self._workers[k].ask(keywords[k], self.timeout or math.inf)
            here = [k for k in keywords if k not in self._workers]
            found = _call([(self.functions[k], keywords[k]) for k in here])
            results = dict(zip(here, found, strict=True))
            for k in elsewhere:
                results[k], remote = self._workers[k].answer()
                for name, values in remote.items():
                    metrics.setdefault(name, []).extend(values)
            for k, result in results.items():
                self._raise_failure(k, result, known["prompts"])
        except BaseException:
            self.close()  # no process stays behind, busy with a call that nobody waits for
            raise
        return [results[k] for k in keywords], metrics

    def _raise_failure(self, k: int, result: Any, prompts: list) -> None:
        """Raise if the call of function `k` ended in an exception."""
        if isinstance(result, BaseException):
            ours = isinstance(result, (TrpoLMError, torch.OutOfMemoryError))
            if ours or not isinstance(result, Exception):  # a signal, met by an async function
                raise result
            kind = "" if isinstance(result, _RemoteFailure) else f"{type(result).__name__}: "
            where = f"{len(prompts)} samples, the first with prompt {_excerpt(prompts[0])}"
            raise RunFault(
                f"reward {self.names[k]!r} raised {kind}{result}", where=where
            ) from result

    def _checked(
        self, k: int, result: Any, prompts: list, lengths: list[int] | None
    ) -> list[float | list[float] | None]:
        """Return what function `k` said about each sample, or raise `RunFault`.

        Args:
            k: Index of the function.
            result: What it returned.
            prompts: (N,), to say which sample it is about.
            lengths: (N,) tokens of each completion; None where lists are not allowed.

        Returns:
            (N,) None, a number, or a number for each token; nan where a row is to be skipped.
        """
        reward, count = f"reward {self.names[k]!r}", f"for {len(prompts)} completions"
        if isinstance(result, np.ndarray):
            if result.ndim != 1:
                raise RunFault(f"{reward} returned an array of shape {result.shape} {count}")
            result = result.tolist()
        if not isinstance(result, list):
            hint = "return a list: for each completion a number, None, or a number for each token"
            raise RunFault(f"{reward} returned {type(result).__name__} {count}", hint=hint)
        if len(result) != len(prompts):
            raise RunFault(f"{reward} returned {len(result)} rewards {count}")
        values: list[float | list[float] | None] = []
        for i, value in enumerate(result):
            sample = f"for sample {i} (prompt {_excerpt(prompts[i])})"
            value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
            entries = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(x, numbers.Real) for x in entries):
                raise RunFault(f"{reward} returned {value!r:.60}, which is not a number, {sample}")
            if isinstance(value, list) and (lengths is None or len(value) != lengths[i]):
                tokens = "an unfinished text" if lengths is None else f"{lengths[i]} tokens"
                raise RunFault(f"{reward} returned {len(value)} rewards for {tokens} {sample}")
            bad = [x for x in entries if not math.isfinite(x)]
            if bad and self.on_bad_reward == "error":
                hint = "return None to abstain, or drop such rows with on_bad_reward='skip'"
                raise RunFault(f"{reward} returned {bad[0]} {sample}", hint=hint)
            values.append(math.nan if bad else value)
        return values


class _RemoteFailure(Exception):
    """Type and text of an exception in a worker process; its cause holds the traceback."""


class _Worker:
    """A process of its own for one function, so that a call that hangs can be killed.

    Started afresh (spawn) rather than forked: the fork of a process with torch's threads may hang.
    """

    def __init__(self, function: Callable, name: str):
        context = multiprocessing.get_context("spawn")
        self.name, self.seconds, self.deadline, self.ready = name, 0.0, 0.0, False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        try:
            self.process.start()
        except Exception as error:
            raise TrpoLMError(
                f"reward {name!r} cannot be sent to the worker process of a time limit: {error}",
                hint="define it at the top level of a module, or leave reward_timeout unset",
            ) from error
        finally:
            theirs.close()

    def ask(self, keywords: dict[str, Any], seconds: float) -> None:
        """Start a call that may take `seconds`, not counting the start of the process."""
        if not self.ready:
            self._receive(_START_SECONDS, "did not start")
            self.ready = True
        if "log_metric" in keywords:
            keywords = {**keywords, "log_metric": None}
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.pipe.send(keywords)

    def answer(self) -> tuple[Any, dict[str, list[float]]]:
        """Return what the function returned, or its exception, and its metrics."""
        late = f"took more than {self.seconds:g} s and was stopped"
        result, failure, metrics = self._receive(self.deadline - time.monotonic(), late)
        if failure:
            result = _RemoteFailure(failure[0])
            result.__cause__ = RuntimeError(failure[1])
        return result, metrics

    def _receive(self, seconds: float, late: str) -> Any:
        hint = "in a script, start training under `if __name__ == '__main__':`"
        try:
            if self.pipe.poll(max(0.0, seconds)):
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1)
            late = f"lost its worker process (exit code {self.process.exitcode})"
        raise RunFault(f"reward {self.name!r} {late}", hint=None if self.ready else hint)

    def close(self) -> None:
        """Kill the process and what it started."""
        if self.process.pid and hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Any, function: Callable) -> None:
    """Answer calls until the other end closes; runs in the worker process."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own: killed as a whole, and out of reach of Ctrl-C
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            keywords, metrics, failure = pipe.recv(), {}, None
            if "log_metric" in keywords:
                keywords["log_metric"] = functools.partial(_log_metric, metrics)
            (result,) = _call([(function, keywords)])
            if isinstance(result, BaseException):
                text = "".join(traceback.format_exception(result))
                result, failure = None, (f"{type(result).__name__}: {result}", text)
            pipe.send((result, failure, metrics))


def _call(calls: list[tuple[Callable, dict[str, Any]]]) -> list[Any]:
    """Call functions in turn, the asynchronous ones together; exceptions are returned."""
    results: list[Any] = []
    for function, keywords in calls:
        try:
            results.append(function(**keywords))
        except Exception as error:
            results.append(error)
    waiting = [k for k, result in enumerate(results) if inspect.isawaitable(result)]
    for k, result in zip(waiting, _await_all([results[k] for k in waiting]), strict=True):
        results[k] = result
    return [_on_host(result) for result in results]


def _await_all(awaitables: list[Any]) -> list[Any]:
    """Wait for all of them at once; exceptions are returned."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(gather()) if awaitables else []
    with ThreadPoolExecutor(1) as pool:  # a notebook's thread already runs a loop
        return pool.submit(lambda: asyncio.run(gather())).result()


def _on_host(value: Any) -> Any:
    """Replace tensors by arrays and tuples by lists."""
    if isinstance(value, Tensor):
        return value.detach().double().cpu().numpy()
    return [_on_host(v) for v in value] if isinstance(value, (list, tuple)) else value


def _log_metric(metrics: dict[str, list[float]], name: str, value: float) -> None:
    """Keep a value that a function wants logged; handed to it without the first argument."""
    metrics.setdefault(name, []).append(float(value))


def _total(value: float | list[float] | None) -> float:
    """Return what a function paid for one completion."""
    return float(sum(value) if isinstance(value, list) else value or 0.0)


def _excerpt(prompt: Any) -> str:
    """Return the beginning of a prompt, quoted."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"] if prompt else "")
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _name(function: Any, index: int, taken: list[str]) -> str:
    """Return a name for a function that no other one has."""
    inner = getattr(function, "func", function)  # functools.partial
    name = getattr(inner, "__name__", type(inner).__name__)
    name = f"reward_{index}" if name == "<lambda>" else name
    others = (f"{name}_{k}" for k in range(1, len(taken) + 1))
    return next(n for n in (name, *others) if n not in taken)


def _signature(function: Any, name: str) -> tuple[set[str], set[str] | None]:
    """Return the arguments a function requires, and those it takes (None: any)."""
    if not callable(function):
        raise TrpoLMError(f"reward {function!r} is not callable", hint=_SIGNATURE_HINT)
    parameters = []
    with suppress(TypeError, ValueError):  # some built-in functions have no signature
        parameters = list(inspect.signature(function).parameters.values())
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    named = {p.name: p.default for p in by_name}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unnamed = any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters)
    if unnamed or not (anything or {"completions", "completion_ids"} & set(named)):
        arguments = ", ".join(p.name for p in parameters)
        raise TrpoLMError(
            f"reward {name!r} takes ({arguments}): it cannot be given `completions` by name",
            hint=_SIGNATURE_HINT,
        )
    required = {n for n, default in named.items() if default is inspect.Parameter.empty}
    return required, None if anything else set(named)
