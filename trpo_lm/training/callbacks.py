"""transformers' callbacks and trackers, without its Trainer.

An update is a step: on_step_begin, on_step_end, on_log, on_evaluate, on_save, on_train_begin and
on_train_end are called as transformers' Trainer calls them, and a callback may set the flags of
`TrainerControl` (should_training_stop, should_save, should_evaluate, should_log). on_epoch_*,
on_substep_end and on_optimizer_step are never called: there are no epochs and no optimiser. The
metric of `EarlyStoppingCallback` is the held-out score, and a resumed run shows it those before.
What other callbacks remember is not in a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    TrainerCallback,
)

from trpo_lm.config import TrainerConfig
from trpo_lm.errors import RunFault, TrpoLMError, first_line
from trpo_lm.lm.guest import Guest
from trpo_lm.lm.memory import is_full
from trpo_lm.storage import Row
from trpo_lm.training.metrics import dashboard
from trpo_lm.training.ranks import Ranks


class _Handler(CallbackHandler):
    """Calls the callbacks one by one; those that are not transformers' own trackers as guests."""

    trackers: Sequence[TrainerCallback]
    guest: Guest

    def call_event(self, event: str, *args: Any, **keywords: Any) -> Any:
        callbacks, (arguments, state, control, *rest) = self.callbacks, args
        name = "callback"
        try:
            for callback in callbacks:
                self.callbacks = [callback]
                ours = callback in self.trackers
                name = f"callback {type(callback).__name__}"
                with nullcontext() if ours else self.guest(name):
                    control = super().call_event(
                        event, arguments, state, control, *rest, **keywords
                    )
                if not isinstance(control, TrainerControl):
                    raise TypeError(f"it returned {control!r:.80} instead of its control or None")
        except Exception as error:
            if isinstance(error, TrpoLMError) or is_full(error):
                raise
            kind = TrpoLMError if event == "on_train_begin" else RunFault
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise kind(f"{name} failed: {reason}", where=event) from error
        finally:
            self.callbacks = callbacks
        return control


_METRIC = "eval_score_mean"
_FLAGS = ("should_training_stop", "should_save", "should_evaluate", "should_log")


class Callbacks:
    """The callbacks and trackers of a run, and the flags they set.

    Args:
        callbacks: Instances or classes; one of them needs no list.
        args: Names the trackers (`report_to`) and how often to log, evaluate and save.
        ranks: Callbacks run on every rank; a flag set on one is set on all.
        evaluates: Whether there are held-out prompts.
        model, tokenizer: Passed to the callbacks.

    Attributes:
        state: As transformers keeps it; `global_step` is the number of updates done.
        control: The flags.

    Raises:
        TrpoLMError: If a tracker is unknown or not installed, something is no callback, or early
            stopping has no evaluations to look at.
    """

    def __init__(
        self,
        callbacks: Any,
        args: TrainerConfig,
        ranks: Ranks,
        *,
        evaluates: bool,
        model: Any,
        tokenizer: Any,
    ):
        callbacks = [_made(callback) for callback in _listed(callbacks)]
        evaluates = evaluates and args.eval_steps > 0
        self._stopping = [c for c in callbacks if isinstance(c, EarlyStoppingCallback)]
        if self._stopping and not evaluates:
            raise TrpoLMError(
                "EarlyStoppingCallback looks at evaluations, and there are none",
                where="callbacks", hint="give an eval_dataset, and eval_steps above 0",
            )  # fmt: skip
        self.args, self.ranks = args, ranks
        self.state = TrainerState(max_steps=args.updates, num_train_epochs=1)
        self.state.is_local_process_zero = self.state.is_world_process_zero = ranks.main
        self.control = TrainerControl()
        self._handler = None
        trackers = [t.strip() for t in args.report_to.split(",") if t.strip() not in ("", "none")]
        if not trackers and not callbacks:
            return
        try:
            reporting = [cls() for cls in get_reporting_integration_callbacks(trackers)]
        except (ValueError, RuntimeError, ImportError) as error:
            raise TrpoLMError(first_line(error), where="report_to") from error
        folder = os.path.abspath(os.path.expanduser(args.output_dir))
        self._arguments = TrainingArguments(
            output_dir=folder, run_name=args.run_name, report_to=trackers or "none",
            seed=args.seed, logging_steps=args.logging_steps, max_steps=args.updates,
            eval_strategy="steps" if evaluates else "no", eval_steps=args.eval_steps or None,
            metric_for_best_model=_METRIC, greater_is_better=True,
        )  # fmt: skip
        # The handler warns if it is made without DefaultFlowCallback, whose work `step_end` does.
        flow = [DefaultFlowCallback, *reporting, *callbacks]
        self._handler = _Handler(flow, model, tokenizer, None, None)
        self._handler.pop_callback(DefaultFlowCallback)
        self._handler.trackers, self._handler.guest = reporting, Guest()

    def event(self, name: str, **keywords: Any) -> None:
        """Call `on_...` of every callback."""
        if self._handler is not None:
            call = getattr(self._handler, name)
            self.control = call(self._arguments, self.state, self.control, **keywords)

    def step_end(self) -> None:
        """Set the flags that are due after an update, then let callbacks add to them."""
        args, update = self.args, self.state.global_step
        for flag, every in (
            ("should_log", args.logging_steps),
            ("should_evaluate", args.eval_steps),
            ("should_save", args.save_steps),
        ):
            setattr(self.control, flag, every > 0 and update % every == 0)
        self.event("on_step_end")
        self.agree()

    def evaluated(self, metrics: Row) -> None:
        """Tell the callbacks of an evaluation; the best score is theirs to compare with the next.

        Args:
            metrics: Of the held-out prompts, under the names that transformers would give them.
        """
        self.event("on_evaluate", metrics=metrics)
        self._keep_best(metrics[_METRIC], self.state.global_step)
        self.agree()

    def resumed(self, rows: Sequence[Row]) -> None:
        """Remember the evaluations of the updates already made: the best, and how long ago."""
        for callback in self._stopping:
            callback.early_stopping_patience_counter = 0
        for row in rows:
            score = row.get(f"objective/{_METRIC}")
            if score is None:
                continue
            for callback in self._stopping:
                callback.on_evaluate(self._arguments, self.state, self.control, {_METRIC: score})
            self._keep_best(score, row["update"])

    def _keep_best(self, score: float | None, step: int) -> None:
        best = self.state.best_metric
        if score is not None and (best is None or score > best):
            self.state.best_metric, self.state.best_global_step = score, step

    def agree(self) -> None:
        """Set each flag on every rank if it is set on any."""
        if self._handler is not None:
            for values in self.ranks.gather([{f: getattr(self.control, f) for f in _FLAGS}]):
                for flag in (f for f in _FLAGS if values[f]):
                    setattr(self.control, flag, True)

    def log(self, row: Row) -> None:
        """Send the numbers of an update to the trackers and callbacks, also under TRL's names."""
        numbers = {
            k: float(v) if isinstance(v, bool) else v
            for k, v in row.items()
            if isinstance(v, int | float) and k != "update"
        }
        numbers |= dashboard(numbers)
        self.state.log_history.append({**numbers, "step": self.state.global_step})
        self.event("on_log", logs=numbers)


def _listed(callbacks: Any) -> list[Any]:
    """Return what was given for `callbacks` as a list."""
    if callbacks is None:
        return []
    many = isinstance(callbacks, Iterable) and not isinstance(callbacks, str | type)
    return list(callbacks) if many else [callbacks]


def _made(callback: Any) -> TrainerCallback:
    """Return a callback, made of its class where that was given."""
    try:
        made = callback() if isinstance(callback, type) else callback
    except Exception as error:
        raise TrpoLMError(
            f"callback {callback.__name__} cannot be made: {type(error).__name__}: {error}",
            where="callbacks", hint="pass an object instead of its class",
        ) from error  # fmt: skip
    if not isinstance(made, TrainerCallback):
        raise TrpoLMError(
            f"{made!r:.80} is no callback", where="callbacks",
            hint="pass objects or classes that derive from transformers.TrainerCallback",
        )  # fmt: skip
    return made
