"""Checkpoints that are complete or absent, whatever happens while they are written.

`checkpoint-000012/` holds tensors as safetensors, state as JSON, settings as YAML, and, written
last, its `manifest`. It is written under the name
`.tmp-checkpoint-...` and renamed when all of it is on the disk, so a folder of the final name is
complete unless something damaged it later, which the manifest shows. Older checkpoints are deleted
only after that.

Nothing here reads a format that can run code, and files the manifest does not list are never
opened. A run resumes from checkpoints only; `best/` beside them is a policy to use.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trpo_lm.errors import RunFault, TrpoLMError, first_line
from trpo_lm.report.format import clean
from trpo_lm.storage import Row, read_file, read_json, strict_json, sync, write_through
from trpo_lm.training.folder import (
    SETTINGS,
    RunFolder,
    Settings,
    checkpoint_order,
    discard,
    disk_fault,
    is_checkpoint_name,
    is_locked,
    load_settings,
    save_settings,
    temporary,
)
from trpo_lm.training.manifest import (
    MANIFEST,
    Manifest,
    damaged,
    read_manifest,
    verify,
    write_manifest,
)
from trpo_lm.training.ranks import Ranks
from trpo_lm.training.stages import Stages

STATE = "trainer_state.json"
LARGEST_TENSORS = 1 << 36  # bytes of a safetensors file
LARGEST_HEADER = 1 << 24  # bytes: names, shapes and offsets of a file's tensors
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint.

    Attributes:
        update: Number of policy updates done.
        tensors: Named tensors by file stem; loaded ones are on the CPU.
        state: JSON values with text keys.
        settings: The resolved settings.
    """

    update: int
    tensors: dict[str, dict[str, Tensor]]
    state: Row
    settings: Settings


# ---------------------------------------------------------------- saving


def save_checkpoint(
    run: RunFolder,
    content: Checkpoint,
    ranks: Ranks,
    stage: Stages,
    *,
    extra: Callable[[Path], None] = lambda folder: None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of an update, delete those it replaces, and return its folder.

    Called by every rank, between updates; either all ranks return or all raise. A checkpoint of the
    same update with the same bytes is left alone; one that is damaged or differs is replaced. Those
    of a higher update belong to an abandoned continuation and are deleted.

    Args:
        run: Existing folder, on a file system that all ranks share.
        content: Each rank writes its own stems of tensors, which must differ between ranks; the
            state and the settings are rank 0's.
        ranks: The processes that call this together.
        stage: Names the steps.
        extra: Writes further files into the folder it is given; called on rank 0.
        keep: Checkpoints left in the folder afterwards, the new one included; at least 1.

    Raises:
        RunFault: If a file cannot be written, or a number of the state is not finite. The
            unfinished folder is gone then, and older checkpoints are untouched.
    """
    final = run.checkpoint(content.update)
    folder = run.path / ranks.share(temporary(final).name)
    with stage("checkpoint/files"):
        fault = _attempt(partial(_write, folder, content, ranks, stage, extra), folder)
        ranks.wait()
    if ranks.main and fault is None:
        fault = _attempt(
            lambda: _publish(folder, final, content.update, ranks.count, stage), folder
        )
    if ranks.main and fault is not None:
        shutil.rmtree(folder, ignore_errors=True)
    verdict = ranks.share("" if fault is None else str(fault))
    if fault is not None:
        raise fault
    if verdict:
        raise RunFault(f"rank 0 could not save {final.name}: {verdict}")
    if ranks.main:
        with stage("checkpoint/prune"):
            _prune(run, final, keep)
    return final


def _attempt(work: Callable[[], None], folder: Path) -> Exception | None:
    """Do something; return its exception, an error of the disk as a RunFault."""
    try:
        work()
    except Exception as error:
        return disk_fault(error, folder)
    return None


def _write(
    folder: Path, content: Checkpoint, ranks: Ranks, stage: Stages, extra: Callable[[Path], None]
) -> None:
    """Write this rank's files."""
    folder.mkdir(exist_ok=True)
    with stage("checkpoint/tensors"):
        for stem, named in content.tensors.items():
            save_tensors(folder / f"{stem}.safetensors", named)
    if not ranks.main:
        write_through(folder / f"rank{ranks.rank}.done", b"")
        return
    with stage("checkpoint/state"):
        write_through(folder / STATE, strict_json(content.state))
        save_settings(folder, content.settings)
    with stage("checkpoint/adapter"):
        extra(folder)


def _publish(folder: Path, final: Path, update: int, world_size: int, stage: Stages) -> None:
    """Complete the folder with its manifest and give it its name."""
    for rank in range(1, world_size):
        done = folder / f"rank{rank}.done"
        if not done.is_file():
            raise RunFault(f"rank {rank} could not write its part of {final.name}")
        done.unlink()
    with stage("checkpoint/manifest"):
        files = write_manifest(folder, update, world_size=world_size)
    with stage("checkpoint/replace"):
        if final.exists() or final.is_symlink():
            try:
                if _verify(final).files == files:
                    shutil.rmtree(folder)
                    return
                # Both are complete: at every instant one of the two names holds a whole checkpoint.
                replaced = final.with_name(f"{final.name}-replaced")
                discard(replaced)
                os.rename(final, replaced)
            except TrpoLMError:  # damaged: nothing to preserve
                discard(final)
    with stage("checkpoint/rename"):
        os.rename(folder, final)
        sync(final.parent)


def _prune(run: RunFolder, newest: Path, keep: int) -> None:
    """Delete all checkpoints but the newest one and the `keep` - 1 before it."""
    others = [path for path in run.checkpoints() if path != newest]
    newer = [p for p in others if checkpoint_order(p) > checkpoint_order(newest)]
    older = [p for p in others if p not in newer and not p.name.endswith("-replaced")]
    for path in others:
        if path in older[: max(keep, 1) - 1]:
            continue
        if path in newer:
            logger.warning(
                "removed %s: it is newer than the update this run resumed from", path.name
            )
        try:
            discard(path)
        except OSError as error:  # the new checkpoint is safe; an old one too many does no harm
            logger.warning("could not remove %s: %s", path, error.strerror)


def discard_checkpoints(run: RunFolder) -> None:
    """Delete every checkpoint of a run, as `overwrite_output_dir` asks, and nothing else."""
    for path in run.checkpoints():
        discard(path)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as one safetensors file."""
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    write_through(path, save(copies, metadata={"format": "pt"}))


# ---------------------------------------------------------------- loading


def remove_unfinished(run: RunFolder) -> None:
    """Delete unfinished checkpoints of a killed process, unless another one holds the lock."""
    if not is_locked(run.path):
        for stale in run.path.glob(".tmp-checkpoint-*"):
            discard(stale)


def newest_usable(paths: Sequence[Path], use: Callable[[Path], T]) -> T | None:
    """Return what `use` makes of the first checkpoint that it can use; None without any.

    The damaged ones before it are passed over with a warning each.

    Args:
        paths: Checkpoints, newest first.
        use: Loads one, or raises TrpoLMError if it is damaged.

    Raises:
        TrpoLMError: If there are checkpoints and every one is damaged: a run that was trained is
            not silently started afresh.
    """
    reasons = []
    for path in paths:
        try:
            used = use(path)
        except RunFault:
            raise
        except TrpoLMError as error:
            named = path.name in error.what
            reasons.append(error.what if named else f"{path.name}: {error.what}")
        else:
            for reason in reasons:
                logger.warning("%s; going back to %s", clean(reason), clean(path.name))
            return used
    if reasons:
        raise TrpoLMError(
            "no checkpoint can be resumed from:\n  " + "\n  ".join(reasons),
            where=str(paths[0].parent),
            hint="name another folder, or start over with --overwrite_output_dir",
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every file of it against the manifest.

    Raises:
        TrpoLMError: If there is no such checkpoint, or one of its files is missing or damaged.
    """
    manifest = _verify(path)
    try:
        return Checkpoint(
            update=manifest.update,
            tensors={
                name.removesuffix(".safetensors"): load_tensors(path / name)
                for name in manifest.files
                if name.endswith(".safetensors")
            },
            state=read_json(path / STATE),
            settings=load_settings(path),
        )
    except TrpoLMError as error:
        raise damaged(path, Path(error.where or STATE).name, error.what) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        TrpoLMError: If it cannot be read, or is not one.
    """
    content = read_file(path, largest=LARGEST_TENSORS)
    header = int.from_bytes(content[:8], "little")
    try:
        if header > LARGEST_HEADER:
            raise ValueError(f"a header of {header} bytes")
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        what = f"cannot be read: no safetensors, {first_line(error)}"
        raise TrpoLMError(what, where=str(path)) from error


def _verify(path: Path) -> Manifest:
    """Return the manifest of a complete checkpoint.

    Raises:
        TrpoLMError: Names a file that is missing or damaged.
    """
    if path.is_symlink() or not path.is_dir():
        raise TrpoLMError(f"there is no checkpoint folder {path}", where="resume_from_checkpoint")
    manifest = read_manifest(path)
    if not manifest.files.keys() >= {STATE, SETTINGS}:
        raise damaged(path, MANIFEST, "is not complete")
    if is_checkpoint_name(path.name) and checkpoint_order(path)[0] != manifest.update:
        raise damaged(path, MANIFEST, f"is of update {manifest.update}")
    verify(path, manifest)
    return manifest
