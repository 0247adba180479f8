"""Several reward functions and reward models as one, with every result checked.

A reward function takes the keywords it names out of `KEYWORDS` and the dataset's columns, copies of
its own, and returns one entry for each completion: a number (paid at the last action), a list with
one number per token (each paid at its token) or None to abstain. As in TRL, the completion of a
text is text, and that of a conversation a list with one message, {"role": "assistant", "content":
...}, which begins with what the prompt prefilled. A reward model is a classifier with a
tokenizer of its own (`reward_models`). Both may score unfinished text, for the prefix critic.

Nothing is clipped, normalised or replaced here: an unusable reward is an error that names the
function and the sample.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.guest import Guest
from trpo_lm.lm.memory import is_full
from trpo_lm.lm.prompts import TEMPLATE_COLUMNS, as_turn
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.reward_workers import Pool, RemoteFailure, call, collect_metric

KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric")
_LARGEST = 1e15  # of a reward: gradients weighted with it, and their squares, are finite in float32
_SIGNATURE_HINT = f"a reward takes some of {', '.join(KEYWORDS)} and the dataset's columns, by name"


@dataclass(frozen=True)
class RewardBatch:
    """The rewards of N completions.

    Attributes:
        score: (N,) float64, weighted sum over the functions that did not abstain; nan if every
            function abstained or the row was skipped. Equals `terminal` plus the sum of
            `token_rewards`.
        valid: (N,) bool, rows with a score.
        terminal: (N,) float64, the part of `score` paid at the last action; 0 where not valid.
        token_rewards: One weighted reward for each token of each completion, zeros where not valid;
            None if no function returned lists.
        columns: Unweighted values of each function (the sum of a list); None if it abstained or
            the value was skipped.
        logged: Mean of the values that functions passed to `log_metric`, by name.
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
    `trainer_state`, and returns one number for each: the better it predicts the score of the whole,
    the better the critic.
    """
    function.scores_prefixes = True  # type: ignore[attr-defined]
    return function


def abstain(completions: list[str]) -> list[None]:
    """Score nothing; for rollouts that need no reward."""
    return [None] * len(completions)


def load_reward(target: str) -> Callable:
    """Import the reward function that `module:callable` names, for command lines.

    This runs the code of the module; elsewhere a string only ever names a reward model.

    Args:
        target: A module that Python can import, and a name in it.

    Raises:
        TrpoLMError: If it has another form, cannot be imported, or is not a reward function.
    """
    module, colon, name = target.partition(":")
    if not (colon and name.isidentifier() and all(p.isidentifier() for p in module.split("."))):
        raise TrpoLMError(
            f"reward function {target!r} is not of the form module:callable",
            hint="e.g. my_rewards:short_and_happy, with my_rewards.py in a folder of PYTHONPATH",
        )
    try:
        function = getattr(import_module(module), name)
    except Exception as error:
        raise TrpoLMError(
            f"reward function {target!r} cannot be imported: {type(error).__name__}: {error}",
            hint="check that its folder is in PYTHONPATH",
        ) from error
    _signature(function, target)
    return function


class Rewards:
    """Several reward functions as one.

    Args:
        reward_funcs: One or a list of: callables (also async), reward models, or models and names
            of models, which become a `RewardModel`.
        reward_weights: One finite weight for each function, not all zero; default 1.
        on_bad_reward: "error" if a reward is nan or infinite, or "skip" to drop its row.
        timeout: Seconds a call of a function (not of a reward model) may take. Each function then
            runs in processes of its own. When its time is up it is killed, and called again with
            each completion alone; one that takes too long even so goes without its score.
        workers: Processes for each function with a timeout; they share the completions.
        retries: Further attempts, with a timeout, when a call raises or its process dies.
        mask_truncated: Leave completions that the length limit cut without a score.
        truncated_penalty: Subtracted from the score of such a completion, at its last action.
        reward_model_options: Keywords for the reward models created here.

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
        workers: int = 1,
        retries: int = 0,
        mask_truncated: bool = False,
        truncated_penalty: float = 0.0,
        reward_model_options: dict[str, Any] | None = None,
    ):
        many = isinstance(reward_funcs, (list, tuple))
        functions = list(reward_funcs) if many else [reward_funcs]
        if not functions:
            raise TrpoLMError("reward_funcs is empty", hint=_SIGNATURE_HINT)
        if on_bad_reward not in ("error", "skip"):
            raise TrpoLMError(f"on_bad_reward = {on_bad_reward!r} must be 'error' or 'skip'")
        self.weights = [1.0] * len(functions) if reward_weights is None else list(reward_weights)
        finite = all(isinstance(w, numbers.Real) and math.isfinite(w) for w in self.weights)
        if len(self.weights) != len(functions) or not finite or not any(self.weights):
            raise TrpoLMError(
                f"reward_weights = {reward_weights!r} must be {len(functions)} finite numbers, one "
                "for each reward function, not all zero"
            )
        self.on_bad_reward, self.timeout = on_bad_reward, timeout
        self.workers, self.retries = workers, retries
        self.mask_truncated, self.truncated_penalty = mask_truncated, truncated_penalty
        self.functions: list[Any] = []
        self.names: list[str] = []
        for i, function in enumerate(functions):
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
        self._guest = Guest()
        self._workers: dict[int, Pool] = {}
        self._start_workers()

    def check_columns(self, column_names: Iterable[str]) -> None:
        """Raise `TrpoLMError` if a function requires an argument that is no keyword or column."""
        columns = sorted(column_names)
        for name, (required, _) in zip(self.names, self._signatures, strict=True):
            if absent := sorted(required - {*KEYWORDS, *columns}):
                raise TrpoLMError(
                    f"reward {name!r} requires {', '.join(absent)}, which is not a column of the "
                    f"dataset ({', '.join(columns) or 'it has none'})",
                    hint=_SIGNATURE_HINT,
                )

    @property
    def models(self) -> list[RewardModel]:
        """The functions that are reward models."""
        return [function for function in self.functions if isinstance(function, RewardModel)]

    def check_prefixes(self) -> None:
        """Raise `TrpoLMError` if a function with a weight cannot be called with unfinished text."""
        triples = zip(self.names, self.weights, self._signatures, strict=True)
        for name, weight, (required, _) in triples:
            if weight and (absent := sorted(required & {"completion_ids", "trainer_state"})):
                raise TrpoLMError(
                    f"reward {name!r} requires {', '.join(absent)}, which unfinished text has not, "
                    "and the critic scores unfinished text",
                    where="critic",
                    hint="set critic to 'value_head', or give these arguments a default",
                )

    def reads(self, column: str) -> bool:
        """Whether a column of the dataset reaches a function that names it or takes anything."""
        pairs = zip(self.functions, self._signatures, strict=True)
        return column not in KEYWORDS and any(
            column
            in (TEMPLATE_COLUMNS if isinstance(function, RewardModel) else accepted or [column])
            for function, (_, accepted) in pairs
        )

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: dict[str, list],
        trainer_state: Any = None,
        truncated: Sequence[bool] | None = None,
    ) -> RewardBatch:
        """Score N completions.

        Args:
            prompts: (N,) strings or conversations.
            completions: (N,) strings; what functions get of a conversation's is a message.
            completion_ids: (N,) token ids, without padding.
            columns: Further columns of the dataset, (N,) each.
            trainer_state: Passed to the functions that name it.
            truncated: (N,) whether the length limit cut a completion; None: it cut none.

        Raises:
            RunFault: If a function raises, always takes too long, or returns something unusable.
        """
        self.check_columns(columns)
        prompts, completions = _turns(prompts, completions)
        keywords = {
            "prompts": prompts, "completions": completions, "completion_ids": completion_ids,
            "trainer_state": trainer_state,
        }  # fmt: skip
        results, metrics, timed_out = self._run(range(len(self.functions)), {**columns, **keywords})
        lengths = [len(ids) for ids in completion_ids]
        values = [self._validate(k, result, prompts, lengths) for k, result in enumerate(results)]

        weights = np.array(self.weights, dtype=float)
        present = np.array([[v is not None for v in row] for row in values], dtype=bool)  # (F, N)
        listed = np.array([[isinstance(v, list) for v in row] for row in values], dtype=bool)
        sums = np.array([[_total(v) for v in row] for row in values], dtype=float)
        skipped = np.isnan(sums).any(axis=0)
        valid = present[weights != 0].any(axis=0) & ~skipped
        cut = np.zeros(len(prompts), bool) if truncated is None else np.array(truncated, bool)
        valid &= ~(cut & self.mask_truncated)
        penalty = np.where(cut, self.truncated_penalty, 0.0)
        token_rewards = [np.zeros(length) for length in lengths]
        for k, i in np.argwhere(listed & valid):
            token_rewards[i] += weights[k] * np.array(values[k][i])
        logged = {name: sum(series) / len(series) for name, series in metrics.items()}
        if self.on_bad_reward == "skip":
            logged["rewards/skipped"] = float(skipped.sum())
        if self.timeout:
            logged["rewards/timed_out"] = float(timed_out)
        if self.mask_truncated or self.truncated_penalty:
            logged["rewards/truncated"] = float(cut.sum())
        return RewardBatch(
            score=torch.from_numpy(np.where(valid, weights @ sums - penalty, math.nan)),
            valid=torch.from_numpy(valid),
            terminal=torch.from_numpy(
                np.where(valid, weights @ np.where(listed, 0.0, sums) - penalty, 0.0)
            ),
            token_rewards=[row.tolist() for row in token_rewards] if listed.any() else None,
            columns={
                name: [x if a and math.isfinite(x) else None for a, x in zip(*row, strict=True)]
                for name, *row in zip(self.names, present.tolist(), sums.tolist(), strict=True)
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
            completions: (N,) strings.
            prefixes: prefixes[i][t] is the text of the first t tokens of completion i.
            columns: Further columns of the dataset, (N,) each.

        Returns:
            Scores in the shape of `prefixes`; a function that abstains, or is skipped, adds 0.

        Raises:
            RunFault: As for whole completions.
        """
        columns = columns or {}
        states = [(i, text) for i, row in enumerate(prefixes) for text in row]
        inputs = {name: [column[i] for i, _ in states] for name, column in columns.items()}
        inputs["prompts"], inputs["completions"] = _turns(
            [prompts[i] for i, _ in states], [text for _, text in states]
        )
        weighted = [k for k, weight in enumerate(self.weights) if weight]
        plain = [k for k in weighted if not isinstance(self.functions[k], RewardModel)]
        results = dict(zip(plain, self._run(plain, inputs)[0], strict=True))
        total = np.zeros(len(states))
        for k in weighted:
            if k not in results:
                keywords = {
                    "prompts": prompts, "completions": completions, "prefixes": prefixes,
                    "columns": columns,
                }  # fmt: skip
                with self._guest(f"reward {self.names[k]!r}"):
                    (rows,) = call([(self.functions[k].score_prefixes, keywords)])
                self._raise_failure(k, rows, prompts)
                results[k] = [score for row in rows for score in row]
            values = self._validate(k, results[k], inputs["prompts"], None)
            total += self.weights[k] * np.nan_to_num([_total(v) for v in values])
        scores = iter(total.tolist())
        return [[next(scores) for _ in row] for row in prefixes]

    def close(self) -> None:
        """Kill the worker processes; a later call starts new ones."""
        while self._workers:
            self._workers.popitem()[1].close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_workers(self) -> None:
        """With a time limit, start processes for each function; reward models stay in this one."""
        try:
            for k, function in enumerate(self.functions if self.timeout else ()):
                if k not in self._workers and not isinstance(function, RewardModel):
                    self._workers[k] = Pool(
                        function, self.names[k], count=self.workers, seconds=self.timeout or 0.0,
                        retries=self.retries,
                    )  # fmt: skip
        except TrpoLMError:
            self.close()
            raise

    def _run(
        self, which: Iterable[int], inputs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, list[float]], int]:
        """Call the functions `which`, each with the inputs it names.

        Returns:
            The result of each, the values passed to `log_metric`, by name, and how many
            completions a function could not score in time.
        """
        metrics: dict[str, list[float]] = {}
        timed_out = 0
        if not inputs["prompts"]:
            return [[] for _ in which], metrics, timed_out
        inputs = {**inputs, "log_metric": functools.partial(collect_metric, metrics)}
        keywords = {}
        for k in which:
            _, accepted = self._signatures[k]
            taken = {n: v for n, v in inputs.items() if accepted is None or n in accepted}
            shared = isinstance(self.functions[k], RewardModel)
            keywords[k] = taken if shared else {n: _copied(v) for n, v in taken.items()}
        try:
            self._start_workers()
            local = [k for k in keywords if k not in self._workers]
            with self._guest(f"reward {', '.join(repr(self.names[k]) for k in local)}"):
                answers = call([(self.functions[k], keywords[k]) for k in local])
            results = dict(zip(local, answers, strict=True))
            for k in (k for k in keywords if k in self._workers):
                answer = self._workers[k].run(keywords[k], len(inputs["prompts"]))
                results[k], timed_out = answer.result, timed_out + answer.timed_out
                for name, values in answer.metrics.items():
                    metrics.setdefault(name, []).extend(values)
            for k, result in results.items():
                self._raise_failure(k, result, inputs["prompts"])
        except BaseException:
            self.close()  # leave no worker busy with an abandoned call
            raise
        return [results[k] for k in keywords], metrics, timed_out

    def _raise_failure(self, k: int, result: Any, prompts: list) -> None:
        """Raise if the call of function `k` ended in an exception."""
        if isinstance(result, BaseException):
            ours = isinstance(result, TrpoLMError) or is_full(result)
            if ours or not isinstance(result, Exception):  # a signal, raised in an async function
                raise result
            kind = "" if isinstance(result, RemoteFailure) else f"{type(result).__name__}: "
            where = f"{len(prompts)} samples, the first with prompt {_excerpt(prompts[0])}"
            raise RunFault(
                f"reward {self.names[k]!r} raised {kind}{result}", where=where
            ) from result

    def _validate(
        self, k: int, result: Any, prompts: list, lengths: list[int] | None
    ) -> list[float | list[float] | None]:
        """Return the rewards of function `k`, or raise `RunFault`.

        Args:
            k: Index of the function.
            result: Its result.
            prompts: (N,), to name the sample in an error.
            lengths: (N,) tokens of each completion; None if lists are not allowed.

        Returns:
            (N,) None, a number, or a number for each token; nan for a row to skip.
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
            entries = [x.item() if getattr(x, "shape", None) == () else x for x in entries]
            if not all(isinstance(x, numbers.Real | Decimal) for x in entries):
                raise RunFault(f"{reward} returned {value!r:.60}, which is not a number, {sample}")
            if isinstance(value, list) and (lengths is None or len(value) != lengths[i]):
                tokens = "an unfinished text" if lengths is None else f"{lengths[i]} tokens"
                raise RunFault(f"{reward} returned {len(value)} rewards for {tokens} {sample}")
            most = _LARGEST / max(1.0, abs(self.weights[k])) / max(1, len(entries))
            bad = [x for x in entries if not abs(x) <= most]  # nan is not either
            if bad and self.on_bad_reward == "error":
                hint = "return None to abstain, or drop such rows with on_bad_reward='skip'"
                large = f", beyond {most:.0e}," * (abs(bad[0]) < math.inf)
                raise RunFault(f"{reward} returned {bad[0]!s:.40}{large} {sample}", hint=hint)
            entries = [float(x) for x in entries] if not bad else []
            one = entries[0] if entries else None
            values.append(math.nan if bad else entries if isinstance(value, list) else one)
        return values


def _turns(prompts: list, completions: list) -> tuple[list, list]:
    """Return prompts and completions as functions get them; see `prompts.as_turn`."""
    turns = [as_turn(p, c) for p, c in zip(prompts, completions, strict=True)]
    return [p for p, _ in turns], [c for _, c in turns]


def _copied(value: Any) -> Any:
    """Copy an argument, so that a function that changes it changes nothing else."""
    if isinstance(value, list):
        return [_copied(v) for v in value]
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return copy.copy(value) if isinstance(value, np.ndarray | Tensor) else value


def _total(value: float | list[float] | None) -> float:
    """Return the sum of a function's rewards for one completion."""
    return float(sum(value) if isinstance(value, list) else value or 0.0)


def _excerpt(prompt: Any) -> str:
    """Return the beginning of a prompt, quoted."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"] if prompt else "")
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _name(function: Any, index: int, taken: list[str]) -> str:
    """Return a name for a function, distinct from the ones taken."""
    inner = getattr(function, "func", function)  # functools.partial
    name = getattr(inner, "__name__", type(inner).__name__)
    name = f"reward_{index}" if name == "<lambda>" else name
    others = (f"{name}_{k}" for k in range(1, len(taken) + 1))
    return next(n for n in (name, *others) if n not in taken)


def _signature(function: Any, name: str) -> tuple[set[str], set[str] | None]:
    """Return the arguments that a function requires, and those it accepts (None: any)."""
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
            f"reward {name!r} takes ({arguments}); it needs `completions` or `completion_ids`, and "
            "no positional-only argument",
            hint=_SIGNATURE_HINT,
        )
    required = {n for n, default in named.items() if default is inspect.Parameter.empty}
    return required, None if anything else set(named)
