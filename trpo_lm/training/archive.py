"""Reading and writing a run's files: lock, resume, log, save, results.

Called by every rank. Rank 0 writes, but for the part of a checkpoint that each rank writes; a
failure on one rank is raised on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from trpo_lm.config import TrainerConfig
from trpo_lm.errors import RunFault
from trpo_lm.lm.prompts import Prompts
from trpo_lm.lm.rollout import Rollout
from trpo_lm.training import artifacts
from trpo_lm.training.assembly import Parts
from trpo_lm.training.best import BestPolicy, recover_best, save_best
from trpo_lm.training.checkpoint import (
    discard_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from trpo_lm.training.folder import (
    OutputLock,
    Row,
    RunFolder,
    Settings,
    require_usable,
    save_settings,
)
from trpo_lm.training.ranks import Ranks
from trpo_lm.training.stages import Stages
from trpo_lm.training.state import (
    TrainState,
    from_checkpoint,
    require_same_settings,
    to_checkpoint,
)


class Archive:
    """The files of a run, written and read.

    Args:
        args: The folder, whether to resume or to overwrite, and how many checkpoints to keep.
        settings: Content of config.yaml and of checkpoints.
        parts: What is trained.
        ranks: The processes of the run.
        stage: Names the steps.
        plots: Whether figures are drawn.
    """

    def __init__(
        self,
        args: TrainerConfig,
        settings: Settings,
        parts: Parts,
        ranks: Ranks,
        stage: Stages,
        *,
        plots: bool,
    ):
        self.folder, self.args, self.settings = RunFolder(args.output_dir), args, settings
        self.parts, self.ranks, self.stage, self.plots = parts, ranks, stage, plots

    def claim(self, stack: ExitStack) -> None:
        """Lock the folder until the stack closes."""
        self.ranks.on_main(lambda: self._claim(stack))

    def _claim(self, stack: ExitStack) -> None:
        self.folder.require_usable(overwrite=True)  # it is writable, for the lock
        stack.enter_context(OutputLock(self.folder.path))
        require_usable(self.args)

    # ---- resuming

    def resume(self, algorithm: Any) -> tuple[TrainState | None, str]:
        """Load the checkpoint to resume from; 'auto' is the newest complete one, if there is one.

        Args:
            algorithm: Initial state of the run's algorithm.

        Returns:
            The state, which policy and critic are in now, or None to start afresh; and a note.

        Raises:
            TrpoLMError: If the checkpoint cannot be used, or was made with other settings.
        """
        path: Path | None = Path(self.args.resume_from_checkpoint or "")
        if self.args.resume_from_checkpoint == "auto":
            path = self.ranks.on_main(lambda: newest_checkpoint(self.folder))
        if path is None:
            return None, f"no checkpoint in {self.folder.path}: starting from the beginning"
        saved = self.ranks.agree(lambda: load_checkpoint(path))
        allowed = {k.strip() for k in (self.args.allow_config_change or "").split(",") if k.strip()}
        require_same_settings(saved.settings, self.settings, allowed)
        policy, critic = self.parts.policy, self.parts.critic
        state = from_checkpoint(saved, policy, critic, algorithm, where=path)
        note = f"resuming from {path.name}"
        if allowed:
            note += ", settings allowed to differ: not bit-exact with the run that was stopped"
        return state, note

    def rows(self, update: int) -> list[Row]:
        """Return the metrics of the updates up to one."""
        return self.ranks.on_main(lambda: self.folder.rows(update))

    def is_finished(self) -> bool:
        """Whether the run wrote its results after its last update."""
        return self.ranks.on_main(self.folder.is_finished)

    def prepare(self, update: int, held_out: Prompts | None) -> BestPolicy | None:
        """Truncate the logs to an update, write settings and prompts; return the best policy."""
        return self.ranks.on_main(lambda: self._prepare(update, held_out))

    def _prepare(self, update: int, held_out: Prompts | None) -> BestPolicy | None:
        if self.args.overwrite_output_dir and not self.args.resume_from_checkpoint:
            discard_checkpoints(self.folder)
        self.folder.truncate(update)
        if held_out is not None:
            artifacts.save_prompts(self.folder.held_out, held_out)
        save_settings(self.folder.path, self.settings)
        return recover_best(self.folder, update)

    # ---- training

    def log(self, row: Row, rollout: Rollout) -> None:
        """Append an update and every rank's completions to the logs."""
        lines = self.ranks.gather(artifacts.completion_lines(rollout, row["update"]))
        self.ranks.on_main(lambda: self.folder.append(row, lines))

    def save_best(self, policy: BestPolicy) -> None:
        """Put the current policy into best/."""
        parts = self.parts

        def write(folder: Path) -> None:
            artifacts.save_policy(folder, parts.policy, parts.critic)

        self.ranks.on_main(lambda: save_best(self.folder, policy, write, self.stage))

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of the state that policy and critic are in."""
        policy, ranks = self.parts.policy, self.ranks
        content = to_checkpoint(state, policy, self.parts.critic, self.settings)
        return save_checkpoint(
            self.folder,
            content if ranks.main else replace(content, tensors={}),
            ranks,
            self.stage,
            extra=policy.save,
            keep=self.args.save_total_limit,
        )

    # ---- the end

    def finish(self, samples: Sequence[Row]) -> None:
        """Draw the figures and write the results, with samples in the model card."""
        self.ranks.on_main(lambda: self._finish(samples))

    def _finish(self, samples: Sequence[Row]) -> None:
        try:
            if self.plots:
                artifacts.draw(self.folder)
            self.save_model(self.folder.path, samples)
        except OSError as error:
            raise RunFault(
                f"could not write the results: {error.strerror or error}",
                where=str(error.filename or self.folder.path),
                hint="the run is complete: --resume_from_checkpoint auto writes them again",
            ) from error

    def save_model(self, folder: Path, samples: Sequence[Row]) -> None:
        """Write the files that vanilla peft loads, with critic, settings and card; rank 0 only."""
        if self.ranks.main:
            artifacts.save_outcome(folder, self.folder, self.parts, self.settings, samples)
