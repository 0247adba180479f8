"""Checkpoints that are complete or absent, whatever happens while they are written.

`checkpoint-000012/` holds tensors as safetensors, state as JSON, settings as YAML, and, written
last, `MANIFEST.json` with the size and SHA-256 of every file. It is written under the name
`.tmp-checkpoint-...` and renamed when all of it is on the disk, so a folder of the final name is
complete unless something damaged it later, which the manifest shows. Older checkpoints are deleted
only after that.

Nothing here reads a format that can run code, and files the manifest does not list are never
opened. A run resumes from checkpoints only; `best/` beside them is a policy to use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from safetensors.torch import load_file, save
from torch import Tensor

from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.storage import Row, strict_json, sync, write_through
from trpo_lm.training.folder import (
    SETTINGS,
    RunFolder,
    Settings,
    checkpoint_order,
    disk_fault,
    load_settings,
    lock_holder,
    save_settings,
    temporary,
)
from trpo_lm.training.ranks import Ranks
from trpo_lm.training.stages import Stages

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "trainer_state.json"

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
        files = _sizes_and_digests(folder)
        manifest = {"format": FORMAT, "update": update, "world_size": world_size, "files": files}
        write_through(folder / MANIFEST, strict_json(manifest))
        for inner in [*(d for d in folder.rglob("*") if d.is_dir()), folder]:
            sync(inner)
    with stage("checkpoint/replace"):
        if final.exists() or final.is_symlink():
            try:
                if _verify(final)["files"] == files:
                    shutil.rmtree(folder)
                    return
                # Both are complete: at every instant one of the two names holds a whole checkpoint.
                replaced = final.with_name(f"{final.name}-replaced")
                _discard(replaced)
                os.rename(final, replaced)
            except TrpoLMError:  # damaged: nothing to preserve
                _discard(final)
    with stage("checkpoint/rename"):
        os.rename(folder, final)
        sync(final.parent)


def _sizes_and_digests(folder: Path) -> dict[str, dict[str, int | str]]:
    """Force every file to the disk; return the manifest's entry for each."""
    files: dict[str, dict[str, int | str]] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            sync(file)
            name = file.relative_to(folder).as_posix()
            files[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return files


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
            _discard(path)
        except OSError as error:  # the new checkpoint is safe; an old one too many does no harm
            logger.warning("could not remove %s: %s", path, error.strerror)


def discard_checkpoints(run: RunFolder) -> None:
    """Delete every checkpoint of a run, as `overwrite_output_dir` asks, and nothing else."""
    for path in run.checkpoints():
        _discard(path)


def _discard(path: Path) -> None:
    """Rename a checkpoint, then delete it, so that no half-deleted one is ever visible."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        doomed = temporary(path)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as one safetensors file."""
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    write_through(path, save(copies, metadata={"format": "pt"}))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- loading


def newest_checkpoint(run: RunFolder) -> Path | None:
    """Return the newest complete checkpoint, or None where none was ever saved.

    A damaged one is passed over with one warning. Unfinished folders of a killed process are
    deleted, unless another living process holds the run's lock. Call it on rank 0 only.

    Raises:
        TrpoLMError: If there are checkpoints and every one is damaged: a run that was trained is
            not silently started afresh.
    """
    if lock_holder(run.path) in (None, os.getpid()):
        for stale in run.path.glob(".tmp-checkpoint-*"):
            shutil.rmtree(stale, ignore_errors=True)
    reasons = []
    for path in run.checkpoints():
        try:
            _verify(path)
        except TrpoLMError as error:
            reasons.append(error.what)
        else:
            for reason in reasons:
                logger.warning("%s; going back to %s", reason, path.name)
            return path
    if reasons:
        raise TrpoLMError(
            "no checkpoint can be resumed from:\n  " + "\n  ".join(reasons),
            where=str(run.path),
            hint="name another folder, or start over with --overwrite_output_dir",
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every file of it against the manifest.

    Raises:
        TrpoLMError: If there is no such checkpoint, or one of its files is missing or damaged.
    """
    manifest = _verify(path)
    return Checkpoint(
        update=manifest["update"],
        tensors={
            name.removesuffix(".safetensors"): load_file(path / name)
            for name in manifest["files"]
            if name.endswith(".safetensors")
        },
        state=json.loads((path / STATE).read_bytes()),
        settings=load_settings(path),
    )


def _verify(path: Path) -> Row:
    """Return the manifest of a complete checkpoint.

    Raises:
        TrpoLMError: Names a file that is missing or damaged.
    """
    if not path.is_dir():
        raise TrpoLMError(f"there is no checkpoint folder {path}", where="resume_from_checkpoint")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, update, files = manifest["format"], manifest["update"], manifest["files"]
        expected = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except FileNotFoundError:
        raise _damaged(path, MANIFEST, "is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path, MANIFEST, "cannot be read") from None
    if version != FORMAT:
        raise TrpoLMError(
            f"{path.name} has format {version!r}; this version of trpo_lm reads format {FORMAT}",
            where=str(path / MANIFEST),
        )
    if type(update) is not int or not {STATE, SETTINGS} <= expected.keys():
        raise _damaged(path, MANIFEST, "is not complete")
    for name, (size, digest) in expected.items():
        _verify_file(path, name, size, digest)
    return manifest


def _verify_file(path: Path, name: str, size: int, digest: str) -> None:
    """Check one file of a checkpoint against its entry in the manifest."""
    file = path / name
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise _damaged(path, MANIFEST, f"lists {name!r}, which is outside the checkpoint")
    if not file.is_file():
        raise _damaged(path, name, "is missing")
    try:
        if file.stat().st_size != size:
            raise _damaged(path, name, f"has {file.stat().st_size} bytes instead of {size}")
        if _sha256(file) != digest:
            raise _damaged(path, name, "has other content than was saved (SHA-256)")
    except OSError as error:
        raise _damaged(path, name, f"cannot be read: {error.strerror}") from None


def _damaged(path: Path, name: str, reason: str) -> TrpoLMError:
    return TrpoLMError(
        f"{path.name} is damaged: {name} {reason}",
        where=str(path / name),
        hint="--resume_from_checkpoint auto takes the newest undamaged one",
    )
