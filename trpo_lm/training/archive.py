"""Reading and writing a run's files: lock, resume, log, save, results.

Called by every rank. Rank 0 writes, but for the part of a checkpoint that each rank writes; a
failure on one rank is raised on all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from trpo_lm.config import TrainerConfig
from trpo_lm.errors import RunFault, TrpoLMError, first_line
from trpo_lm.lm.prompts import Prompts
from trpo_lm.lm.rollout import Rollout
from trpo_lm.report.page_sections import State
from trpo_lm.report.run_page import PAGE, RunPage
from trpo_lm.storage import append_json_line
from trpo_lm.training import artifacts
from trpo_lm.training.assembly import Parts
from trpo_lm.training.best import BestPolicy, recover_best, save_best
from trpo_lm.training.checkpoint import (
    Checkpoint,
    discard_checkpoints,
    load_checkpoint,
    newest_usable,
    remove_unfinished,
    save_checkpoint,
)
from trpo_lm.training.folder import (
    OutputLock,
    Row,
    RunFolder,
    Settings,
    discard,
    disk_fault,
    save_settings,
)
from trpo_lm.training.manifest import MANIFEST, read_manifest, verify
from trpo_lm.training.ranks import Ranks
from trpo_lm.training.stages import Stages
from trpo_lm.training.state import (
    TrainState,
    from_checkpoint,
    require_same_settings,
    to_checkpoint,
)

T = TypeVar("T")
PAGE_SHARE = 0.005  # of a run's time that its page may take


class Archive:
    """The files of a run, written and read.

    Args:
        args: The folder, whether to resume or to overwrite, and how many checkpoints to keep.
        settings: Content of config.yaml and of checkpoints.
        parts: What is trained.
        ranks: The processes of the run.
        stage: Names the steps.
        plots: Whether figures are drawn, and the page is written.
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
        self._page, self._page_due = RunPage(self.folder.path), 0.0
        self._page_fault = False
        self._resume_from = args.resume_from_checkpoint
        if self._resume_from not in (None, "auto"):
            self._resume_from = os.path.abspath(os.path.expanduser(self._resume_from))

    def _on_main(self, work: Callable[[], T]) -> T:
        """Do something on rank 0, for all; a fault of the disk is a `RunFault`."""

        def guarded() -> T:
            try:
                return work()
            except Exception as error:
                raise disk_fault(error, self.folder.path) from error

        return self.ranks.on_main(guarded)

    def claim(self, stack: ExitStack) -> None:
        """Lock the folder until the stack closes."""
        self._on_main(lambda: self._claim(stack))

    def _claim(self, stack: ExitStack) -> None:
        folder, args = self.folder, self.args
        folder.require_usable(overwrite=True)  # it is writable, for the lock
        stack.enter_context(OutputLock(folder.path))
        folder.require_usable(
            resume=args.resume_from_checkpoint, overwrite=args.overwrite_output_dir
        )
        for stale in folder.path.glob(".tmp-*"):
            if not stale.name.startswith(f".tmp-{folder.best.name}-"):  # see `recover_best`
                discard(stale)

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
        chosen = self._resume_from
        auto = chosen == "auto"
        paths = self._on_main(self._checkpoints) if auto else [Path(chosen or "")]

        def use(path: Path) -> tuple[Path, TrainState | TrpoLMError]:
            saved = self.ranks.agree(lambda: load_checkpoint(path))
            try:
                require_same_settings(saved.settings, self.settings, allowed)
            except TrpoLMError as differ:
                return path, differ  # no damage: no older checkpoint is taken for it
            return path, self.ranks.agree(lambda: self._adopt(saved, algorithm, path))

        allowed = {k.strip() for k in (self.args.allow_config_change or "").split(",") if k.strip()}
        used = newest_usable(paths, use) if auto else use(paths[0])
        if used is None:
            return None, f"no checkpoint in {self.folder.path}: starting from the beginning"
        path, state = used
        if isinstance(state, TrpoLMError):
            raise state
        note = f"resuming from {path.name}"
        if allowed:
            note += ", settings allowed to differ: not bit-exact with the run that was stopped"
        return state, note

    def _checkpoints(self) -> list[Path]:
        remove_unfinished(self.folder)
        return self.folder.checkpoints()

    def _adopt(self, saved: Checkpoint, algorithm: Any, path: Path) -> TrainState:
        same = saved.settings.get("algorithm") == self.settings["algorithm"]
        policy, critic = self.parts.policy, self.parts.critic
        return from_checkpoint(saved, policy, critic, algorithm, where=path, same_algorithm=same)

    def rows(self, update: int) -> list[Row]:
        """Return the metrics of the updates up to one."""
        return self._on_main(lambda: self.folder.rows(update))

    def is_finished(self, update: int) -> bool:
        """Whether the folder holds the results of the parameters as they are, whole."""
        return self._on_main(lambda: self._is_finished(update))

    def _is_finished(self, update: int) -> bool:
        try:
            manifest = read_manifest(self.folder.path)
            verify(self.folder.path, manifest)
        except TrpoLMError:
            return False
        checksum = self.parts.policy.parameters.checksum()
        return (manifest.update, manifest.facts.get("checksum")) == (update, checksum)

    def prepare(self, update: int, held_out: Prompts | None) -> BestPolicy | None:
        """Truncate the logs to an update, write settings and prompts; return the best policy."""
        return self._on_main(lambda: self._prepare(update, held_out))

    def _prepare(self, update: int, held_out: Prompts | None) -> BestPolicy | None:
        if self.args.overwrite_output_dir and not self.args.resume_from_checkpoint:
            (self.folder.path / MANIFEST).unlink(missing_ok=True)
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
        self._on_main(lambda: self.folder.append(row, lines))

    def log_samples(self, rows: Sequence[Row], update: int, of: str) -> None:
        """Append completions beside the reference's, those of rank 0, to their log."""

        def append() -> None:
            for row in rows:
                append_json_line(self.folder.samples, {"update": update, "of": of, **row})

        self._on_main(append)

    def write_page(self, state: State) -> str | None:
        """Write the page of the run, if rank 0 has the time for it.

        While the run goes on, its page takes at most `PAGE_SHARE` of the time. A failure is the
        page's alone.

        Returns:
            A note, the first time that the page could not be written.
        """
        begun = time.monotonic()
        due = begun >= self._page_due or state.kind != "running"
        if not (self.plots and self.ranks.main and due):
            return None
        note = None
        try:
            self._page.write(state)
        except Exception as error:
            if not self._page_fault:
                note = f"the page {PAGE} could not be written: {first_line(error)}"
            self._page_fault = True
        now = time.monotonic()
        self._page_due = now + (now - begun) / PAGE_SHARE
        return note

    def save_best(self, policy: BestPolicy) -> None:
        """Put the current policy into best/."""
        parts = self.parts

        def write(folder: Path) -> None:
            artifacts.save_policy(folder, parts.policy, parts.critic)
            save_settings(folder, self.settings)

        self._on_main(lambda: save_best(self.folder, policy, write, self.stage))

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of the state that policy and critic are in."""
        policy, ranks = self.parts.policy, self.ranks
        content = to_checkpoint(state, policy, self.parts.critic, self.settings)
        self._on_main(self.folder.sync_logs)
        return save_checkpoint(
            self.folder,
            content if ranks.main else replace(content, tensors={}),
            ranks,
            self.stage,
            extra=policy.save,
            keep=self.args.save_total_limit,
        )

    # ---- the end

    def finish(self, update: int, samples: Sequence[Row]) -> None:
        """Draw the figures and write the results, with samples in the model card."""
        self.ranks.on_main(lambda: self._finish(update, samples))

    def _finish(self, update: int, samples: Sequence[Row]) -> None:
        try:
            if self.plots:
                artifacts.draw(self.folder)
            self.save_model(self.folder.path, update, samples)
        except Exception as error:
            fault = disk_fault(error, self.folder.path)
            if fault is error:
                raise
            raise RunFault(
                f"could not write the results: {error}",
                where=str(getattr(error, "filename", None) or self.folder.path),
                hint="the run is complete: --resume_from_checkpoint auto writes them again",
            ) from error

    def save_model(self, folder: Path, update: int, samples: Sequence[Row]) -> None:
        """Write the files that vanilla peft loads, with critic, settings and card; rank 0 only."""
        if self.ranks.main:
            artifacts.save_outcome(folder, update, self.folder, self.parts, self.settings, samples)
