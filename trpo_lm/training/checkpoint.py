"""Checkpoints that are complete or absent, whatever happens while they are written.

`checkpoint-000012/` holds tensors as safetensors, state as JSON, settings as YAML, and, written
last, `MANIFEST.json` with the size and SHA-256 of every file. It is written under the name
`.tmp-checkpoint-...` and renamed when all of it is on the disk, so a folder of the final name is
complete unless something damaged it later, which the manifest tells. Older checkpoints go only
after that.

Nothing here reads a format that can run code, and files the manifest does not list are never
opened. A run goes on from checkpoints only; `best/` beside them is a policy to use, and holds
nothing else. The limit on checkpoints does not touch it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from trpo_lm.errors import RunFault, TrpoLMError

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "trainer_state.json"
CONFIG = "config.yaml"
BEST, BEST_FACTS = "best", "best.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds; `tensors` maps file stem to named tensors, on the CPU."""

    update: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    config: dict[str, Any]
    path: Path


# ---------------------------------------------------------------- saving


def save_checkpoint(
    output_dir: Path,
    update: int,
    *,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    config: dict[str, Any],
    extra: Callable[[Path], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    share: Callable[[str], str] = lambda text: text,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of an update, then remove those it replaces.

    Called by every rank, at an update's boundary. Either all ranks return or all raise. A
    checkpoint of the same update that already holds the same bytes is left alone; one that is
    damaged or differs is replaced. Those of a higher update belong to a course that the run has
    left, and go too.

    Args:
        output_dir: Existing folder of the run, on a file system that all ranks share.
        update: Number of policy updates done.
        tensors: Named tensors by file stem; each rank writes its own stems, which must differ
            between ranks (`rng_rank1`). Any device, any shape.
        state: JSON values with text keys; rank 0's are written.
        config: The resolved settings, plain YAML values; rank 0's are written.
        extra: Writes further files into the folder it is given; called on rank 0.
        rank: This process.
        world_size: Processes that call this together.
        barrier: Returns once every rank has called it.
        share: Returns on every rank the text that rank 0 passed.
        keep: Checkpoints left in the folder afterwards, the new one among them; at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        RunFault: If a file cannot be written, or a number of the state is not finite. The
            unfinished folder is gone then, and what was there before is untouched.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{update:06d}"
    folder = output_dir / share(_temporary(final.name))
    fault: Exception | None = None
    try:
        folder.mkdir(exist_ok=True)
        _fault_point("folder made")
        for stem, named in tensors.items():
            save_tensors(folder / f"{stem}.safetensors", named)
        _fault_point("tensors written")
        if rank == 0:
            _write(folder / STATE, _json(state))
            save_settings(folder / CONFIG, config)
            _fault_point("state written")
            if extra is not None:
                extra(folder)
            _fault_point("extra files written")
        else:
            _write(folder / f"rank{rank}.done", b"")
    except Exception as error:
        fault = _as_fault(error, folder)
    barrier()
    if rank == 0 and fault is None:
        try:
            _publish(folder, final, update, world_size)
        except Exception as error:
            fault = _as_fault(error, folder)
    if rank == 0 and fault is not None:
        shutil.rmtree(folder, ignore_errors=True)
    verdict = share("" if fault is None else str(fault))
    if fault is not None:
        raise fault
    if verdict:
        raise RunFault(f"rank 0 could not save {final.name}: {verdict}")
    if rank == 0:
        _prune(output_dir, final, keep)
    return final


def _publish(folder: Path, final: Path, update: int, world_size: int) -> None:
    """Complete the folder with its manifest and give it its name."""
    for rank in range(1, world_size):
        done = folder / f"rank{rank}.done"
        if not done.is_file():
            raise RunFault(f"rank {rank} could not write its part of {final.name}")
        done.unlink()
    _fault_point("before the manifest")
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sync(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = {"format": FORMAT, "update": update, "world_size": world_size, "files": files}
    _write(folder / MANIFEST, _json(manifest))
    for inner in [*(d for d in folder.rglob("*") if d.is_dir()), folder]:
        _sync_folder(inner)
    _fault_point("manifest written")

    replaced = final.with_name(f"{final.name}-replaced")
    if final.exists() or final.is_symlink():
        try:
            if _verify(final)["files"] == files:
                shutil.rmtree(folder)
                return
            # Both are complete: at every instant one of the two names holds a whole checkpoint.
            _discard(replaced)
            os.rename(final, replaced)
        except TrpoLMError:  # damaged: nothing to preserve
            _discard(final)
    _fault_point("before the rename")
    os.rename(folder, final)
    _sync_folder(final.parent)
    _fault_point("renamed")


def _prune(output_dir: Path, newest: Path, keep: int) -> None:
    """Remove all checkpoints but the newest one and the `keep` - 1 before it."""
    others = [path for path in _checkpoints(output_dir) if path != newest]
    past = [p for p in others if _order(p) < _order(newest) and not p.name.endswith("-replaced")]
    _fault_point("before pruning")
    for path in others:
        if path in past[: max(keep, 1) - 1]:
            continue
        if _order(path) > _order(newest):
            logger.warning("%s is of a course this run has left: removed", path.name)
        try:
            _discard(path)
        except OSError as error:  # the new checkpoint is safe; an old one too many does no harm
            logger.warning("could not remove %s: %s", path, error.strerror)
    _fault_point("pruned")


def discard_checkpoints(output_dir: Path) -> None:
    """Remove every checkpoint of a folder, as `overwrite_output_dir` asks, and nothing else."""
    for path in _checkpoints(output_dir):
        _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint at once: it loses its name before it loses its first file."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        doomed = path.with_name(_temporary(path.name))
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as one safetensors file."""
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    _write(path, save(copies, metadata={"format": "pt"}))


def save_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write plain settings as YAML, in their order."""
    _write(path, yaml.safe_dump(settings, sort_keys=False).encode())


def _temporary(name: str) -> str:
    return f".tmp-{name}-{secrets.token_hex(4)}"


def _write(path: Path, content: bytes) -> None:
    """Write a file through to the disk; an OSError names the file."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def _sync(path: Path) -> str:
    """Force a file to the disk and return its SHA-256."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return _sha256(file)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _json(value: dict[str, Any]) -> bytes:
    """Return JSON text; RunFault names the key of a number that JSON does not have."""
    for key, number in _numbers(value):
        if not math.isfinite(number):
            raise RunFault(f"the state to save has {key} = {number}: JSON has no such number")
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _numbers(v, f"{key}.{k}" if key else str(k))
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from _numbers(v, f"{key}[{i}]")


def _as_fault(error: Exception, folder: Path) -> Exception:
    """Turn what a disk says into a RunFault; other errors stay what they are."""
    if not isinstance(error, (OSError, SafetensorError)):
        return error
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    place = getattr(error, "filename", None) or folder
    reason = getattr(error, "strerror", None) or error
    fault = RunFault(
        f"could not write {Path(os.fsdecode(place)).name}: {reason}",
        where=str(place),
        hint=("free some space; " if full else "")
        + "the checkpoints before this one are intact: --resume_from_checkpoint auto",
    )
    fault.__cause__ = error
    return fault


_points = itertools.count(1)


def _fault_point(name: str) -> None:
    """For tests: TRPO_LM_FAULT=save:K kills this process at the K-th point that it passes."""
    if os.environ.get("TRPO_LM_FAULT") == f"save:{next(_points)}":
        print(f"TRPO_LM_FAULT: killed while saving, at '{name}'", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- the best policy


def save_best(output_dir: Path, facts: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Put a policy into `best/` in place of the one there. Call it on rank 0 only.

    Args:
        output_dir: Folder of the run.
        facts: `update`, `score` (units of the reward) and whatever else `best.json` shall say.
        write: Writes the policy's files into the folder it is given.

    Raises:
        RunFault: If a file cannot be written; the policy that was there before still is.
    """
    final = Path(output_dir) / BEST
    folder, old = (final.with_name(_temporary(BEST)) for _ in range(2))
    try:
        folder.mkdir()
        write(folder)
        _fault_point("best policy written")
        for file in folder.rglob("*"):
            if file.is_file():
                _sync(file)
        _write(folder / BEST_FACTS, _json(facts))  # last: with it the folder is complete
        _sync_folder(folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _as_fault(error, folder) from error
    _fault_point("best facts written")
    if final.exists():
        os.rename(final, old)
        _fault_point("best moved")
    os.rename(folder, final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_best(output_dir: Path, update: int) -> dict[str, Any] | None:
    """Return what `best.json` says where a run stands at an update; None where there is no best.

    A best policy of a later update belongs to a course that the run has left and is removed. Where
    a killed process left several complete copies, the best of them becomes `best/`.
    """
    output_dir, found = Path(output_dir), []
    folders = [output_dir / BEST, *output_dir.glob(f".tmp-{BEST}-*")]
    for folder in folders:
        try:
            facts = json.loads((folder / BEST_FACTS).read_bytes())
            if facts["update"] <= update:
                found.append((float(facts["score"]), folder, facts))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    kept = max(found, key=lambda entry: entry[0], default=None)
    for folder in folders:
        if folder.exists() and (kept is None or folder != kept[1]):
            shutil.rmtree(folder)
    if kept is None:
        return None
    if kept[1].name != BEST:
        os.rename(kept[1], output_dir / BEST)
    return kept[2]


# ---------------------------------------------------------------- loading


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest complete checkpoint, or None where none was ever saved.

    A damaged one is passed over with one warning. What a killed process left half-written is
    removed, unless another living process holds the folder's lock. Call it on rank 0 only.

    Raises:
        TrpoLMError: If there are checkpoints and every one is damaged; a run that has a past is
            not silently started afresh.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return None
    if _holder(output_dir / ".lock") in (None, os.getpid()):
        for stale in output_dir.glob(".tmp-checkpoint-*"):
            shutil.rmtree(stale, ignore_errors=True)
    reasons = []
    for path in _checkpoints(output_dir):
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
            where=str(output_dir),
            hint="name another folder, or start over with --overwrite_output_dir",
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every file of it against the manifest.

    Raises:
        TrpoLMError: If there is no such checkpoint, or one of its files is missing or damaged.
    """
    path = Path(path)
    manifest = _verify(path)
    return Checkpoint(
        update=manifest["update"],
        tensors={
            name.removesuffix(".safetensors"): load_file(path / name)
            for name in manifest["files"]
            if name.endswith(".safetensors")
        },
        state=json.loads((path / STATE).read_bytes()),
        config=yaml.safe_load((path / CONFIG).read_bytes()),
        path=path,
    )


def _verify(path: Path) -> dict[str, Any]:
    """Return the manifest of a complete checkpoint; TrpoLMError names a file that is not right."""

    def damaged(name: str, reason: str) -> TrpoLMError:
        return TrpoLMError(
            f"{path.name} is damaged: {name} {reason}",
            where=str(path / name),
            hint="--resume_from_checkpoint auto takes the newest one that is whole",
        )

    if not path.is_dir():
        raise TrpoLMError(f"there is no checkpoint folder {path}", where="resume_from_checkpoint")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, update, files = manifest["format"], manifest["update"], manifest["files"]
        expected = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except FileNotFoundError:
        raise damaged(MANIFEST, "is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise damaged(MANIFEST, "cannot be read") from None
    if version != FORMAT:
        raise TrpoLMError(
            f"{path.name} has format {version!r}; this version of trpo_lm reads format {FORMAT}",
            where=str(path / MANIFEST),
        )
    if type(update) is not int or not {STATE, CONFIG} <= expected.keys():
        raise damaged(MANIFEST, "is not complete")
    for name, (size, digest) in expected.items():
        file, parts = path / name, PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts:
            raise damaged(MANIFEST, f"lists {name!r}, which is outside the checkpoint")
        if not file.is_file():
            raise damaged(name, "is missing")
        try:
            if file.stat().st_size != size:
                raise damaged(name, f"has {file.stat().st_size} bytes instead of {size}")
            with open(file, "rb") as opened:
                if _sha256(opened) != digest:
                    raise damaged(name, "has other content than was saved (SHA-256)")
        except OSError as error:
            raise damaged(name, f"cannot be read: {error.strerror}") from None
    return manifest


_NAME = re.compile(r"checkpoint-(\d+)(-replaced)?")


def _order(path: Path) -> tuple[int, bool]:
    """Sort key of a checkpoint's name; one that is being replaced comes before its successor."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2] is None


def _checkpoints(output_dir: Path) -> list[Path]:
    """Return what is named like a checkpoint, newest first."""
    named = [path for path in Path(output_dir).iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=_order, reverse=True)


# ---------------------------------------------------------------- resuming and locking


def compare_config(saved: dict[str, Any], current: dict[str, Any], allowed: set[str]) -> None:
    """Refuse to resume with other settings than the checkpoint's, except those allowed to differ.

    Args:
        saved: The checkpoint's settings; may be nested.
        current: This run's settings. Leave out of both what does no harm (output folder, logging).
        allowed: Names that may differ: `max_kl`, or `trpo.max_kl` where settings are nested.

    Raises:
        TrpoLMError: With a table of every other difference.
    """
    then = _flat(saved)
    now = _flat(yaml.safe_load(yaml.safe_dump(current)))
    rows = [
        (key, *(repr(side[key]) if key in side else "(absent)" for side in (then, now)))
        for key in {**then, **now}
        if (key in then, then.get(key)) != (key in now, now.get(key))
        and not {key, key.rpartition(".")[2]} & allowed
    ]
    if not rows:
        return
    table = [("setting", "checkpoint", "now"), *rows]
    wide = [max(len(row[i]) for row in table) for i in (0, 1)]
    lines = "".join(f"\n  {a:<{wide[0]}}  {b:<{wide[1]}}  {c}" for a, b, c in table)
    raise TrpoLMError(
        f"the settings differ from the checkpoint's:{lines}",
        where="resume_from_checkpoint",
        hint=f"set them back, or accept them: --allow_config_change {','.join(r[0] for r in rows)}",
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {'a.b': value} of nested settings."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


class OutputLock:
    """Keeps a second process out of a run's folder: `with OutputLock(output_dir): ...`.

    `.lock` holds the pid of the process that writes there. The lock of a dead process is taken
    over. The process that holds it may take it again; the outermost `with` removes it. Only the
    processes of one machine are told apart. Take it on rank 0 only.

    Raises:
        TrpoLMError: On entering, if another living process holds the lock.
    """

    def __init__(self, output_dir: Path):
        self.path = Path(output_dir) / ".lock"
        self._removes = False

    def __enter__(self) -> OutputLock:
        with _locked(self.path) as file:
            holder = _holder(self.path)
            if holder not in (None, os.getpid()):
                raise TrpoLMError(
                    f"{self.path.parent} is locked by pid {holder}",
                    where="output_dir",
                    hint=f"stop that run, or name another folder; if pid {holder} is something "
                    f"else, delete {self.path}",
                )
            self._removes = holder is None
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._removes:
            with _locked(self.path):
                if _holder(self.path) == os.getpid():
                    self.path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """Open a file for one process at a time."""
    while True:  # until it is not one that another process removed while this one waited
        with open(path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


def _holder(path: Path) -> int | None:
    """Return the pid of the living process that a lock file names, if there is one."""
    try:
        pid = int(path.read_text())
    except (OSError, ValueError):
        return None
    try:
        os.kill(pid, 0)
    except PermissionError:  # it lives, and belongs to someone else
        return pid
    except (OSError, OverflowError):
        return None
    return pid if pid > 0 else None
