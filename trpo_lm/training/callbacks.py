"""transformers' callbacks and trackers, without its Trainer.

An update is a step: on_step_begin, on_step_end, on_log, on_evaluate, on_save, on_train_begin and
on_train_end are called as transformers' Trainer calls them, and a callback may set the flags of
`TrainerControl` (should_training_stop, should_save, should_evaluate, should_log). on_epoch_*,
on_substep_end and on_optimizer_step are never called: there are no epochs and no optimiser.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerCallback

from trpo_lm.config import TrainerConfig
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.guest import Guest
from trpo_lm.storage import Row
from trpo_lm.training.metrics import dashboard
from trpo_lm.training.ranks import Ranks


class _Handler(CallbackHandler):
    """Calls the callbacks one by one; those that are not transformers' own trackers as guests."""

    trackers: Sequence[TrainerCallback] = ()
    guest = Guest()

    def call_event(self, event: str, *args: Any, **keywords: Any) -> Any:
        callbacks, (arguments, state, control, *rest) = self.callbacks, args
        try:
            for callback in callbacks:
                self.callbacks = [callback]
                ours = callback in self.trackers
                name = f"callback {type(callback).__name__}"
                with nullcontext() if ours else self.guest(name):
                    control = super().call_event(
                        event, arguments, state, control, *rest, **keywords
                    )
        finally:
            self.callbacks = callbacks
        return control


_FLAGS = ("should_training_stop", "should_save", "should_evaluate", "should_log")


class Callbacks:
    """The callbacks and trackers of a run, and the flags they set.

    Args:
        callbacks: Instances or classes.
        args: Names the trackers (`report_to`) and how often to log, evaluate and save.
        ranks: Callbacks run on every rank; a flag set on one is set on all.
        model, tokenizer: Passed to the callbacks.

    Attributes:
        state: As transformers keeps it; `global_step` is the number of updates done.
        control: The flags.

    Raises:
        TrpoLMError: If a tracker is unknown or not installed.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
        args: TrainerConfig,
        ranks: Ranks,
        *,
        model: Any,
        tokenizer: Any,
    ):
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
            raise TrpoLMError(str(error).splitlines()[0], where="report_to") from error
        folder = os.path.abspath(os.path.expanduser(args.output_dir))
        self._arguments = TrainingArguments(
            output_dir=folder, run_name=args.run_name, report_to=trackers or "none",
            seed=args.seed, logging_steps=args.logging_steps, max_steps=args.updates,
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
