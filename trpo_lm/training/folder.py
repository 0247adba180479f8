"""A run's folder: the name of every file in it, its logs, its settings and its lock.

config.yaml                  resolved settings
metrics.jsonl                one row an update
completions.jsonl            one row a completion
samples.jsonl                completions beside the reference's
held_out.jsonl               prompts of the evaluations
checkpoint-000012/           what a run resumes from; see `checkpoint`
best/, best/best.json        best evaluated policy within the budget; see `best`
run.html, plots/, README.md  page that follows the run; figures; model card
adapter_model.safetensors    trained adapter, by the name peft gives it
value_head.safetensors       critic, in best/ and checkpoints too
MANIFEST.json                update and digests of these files, written last; see `manifest`
.lock, .tmp-*                held by the process that writes here; whatever is unfinished
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from trpo_lm.config import LORA, TrainerConfig, describe
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.report.run_page import PAGE
from trpo_lm.storage import (
    Row,
    append_json_line,
    read_file,
    read_json_lines,
    read_yaml,
    regular,
    replace_file,
    sync,
    truncate_json_lines,
)

Settings = dict[str, Any]  # content of config.yaml

SETTINGS = "config.yaml"
ADAPTER = "adapter_model.safetensors"
CRITIC = "value_head.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,15})(-replaced)?", re.ASCII)


class RunFolder:
    """Paths and logs of a run.

    Attributes:
        path: The folder, absolute: a reward may change the current directory.
        settings, metrics, completions, samples, held_out, card, plots, page, adapter, best:
            Paths in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.abspath(os.path.expanduser(path)))
        self.settings = self.path / SETTINGS
        self.metrics = self.path / "metrics.jsonl"
        self.completions = self.path / "completions.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.held_out = self.path / "held_out.jsonl"
        self.card = self.path / "README.md"
        self.plots = self.path / "plots"
        self.page = self.path / PAGE
        self.adapter = self.path / ADAPTER
        self.best = self.path / "best"

    def require_usable(self, *, resume: str | None = None, overwrite: bool = False) -> None:
        """Make the folder if need be, and check that a run may write into it; delete nothing.

        Leftovers of a killed process (`.lock`, `.tmp-*`) do not count as a run.

        Args:
            resume: Checkpoint that the run resumes from (`resume_from_checkpoint`).
            overwrite: Whether it may write into a folder that holds a run (`overwrite_output_dir`).

        Raises:
            TrpoLMError: If it is a file, is not writable, or holds files it may not touch.
        """
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            names = [entry.name for entry in path.iterdir()]
        except (FileExistsError, NotADirectoryError):
            raise TrpoLMError(f"{path} is a file, not a folder", where="output_dir") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            what = f"cannot write to {str(path)!r}: {reason}"
            raise TrpoLMError(what, where="output_dir") from None
        held = [n for n in names if n != ".lock" and not n.startswith(".tmp-")]
        if held and not resume and not overwrite:
            raise TrpoLMError(
                f"{path} is not empty: it holds {min(held)}"
                + (f" and {len(held) - 1} more" if len(held) > 1 else ""),
                where="output_dir",
                hint="--resume_from_checkpoint auto resumes from its newest checkpoint, "
                "--overwrite_output_dir starts over in it, --output_dir names another folder",
            )

    # ---- logs

    def append(self, row: Row, completions: Sequence[Row]) -> None:
        """Log an update, its metrics last: a row of metrics has all its completions."""
        for line in completions:
            append_json_line(self.completions, line)
        append_json_line(self.metrics, row)

    def truncate(self, update: int) -> None:
        """Drop what was logged after an update."""
        for log in (self.metrics, self.completions, self.samples):
            truncate_json_lines(log, update)

    def sync_logs(self) -> None:
        """Force the logs to the disk: a checkpoint is never ahead of them."""
        for log in (self.metrics, self.completions, self.samples):
            if log.exists():
                sync(log)

    def rows(self, update: int) -> list[Row]:
        """Return the metrics of the updates up to one."""
        rows = read_json_lines(self.metrics) if os.path.lexists(self.metrics) else []
        return [r for r in rows if type(r.get("update")) is int and r["update"] <= update]

    # ---- checkpoints

    def checkpoint(self, update: int) -> Path:
        """Return the folder of an update's checkpoint."""
        return self.path / f"checkpoint-{update:06d}"

    def checkpoints(self) -> list[Path]:
        """Return everything named like a checkpoint, newest first."""
        named = [path for path in self.path.glob("*") if is_checkpoint_name(path.name)]
        return sorted(named, key=checkpoint_order, reverse=True)


def require_usable(args: TrainerConfig) -> None:
    """Check that a run may have the name and write into the folder that its settings say.

    Raises:
        TrpoLMError: If it may not.
    """
    if args.run_name is not None:
        check_run_name(args.run_name)
    RunFolder(args.output_dir).require_usable(
        resume=args.resume_from_checkpoint, overwrite=args.overwrite_output_dir
    )


def gaps(rows: Sequence[Row], update: int) -> str | None:
    """Say which updates up to one have no row of metrics, or several; None if all is well."""
    counts = Counter(row["update"] for row in rows)
    numbers = range(1, update + 1)
    wrong = {
        "lacks": [u for u in numbers if not counts[u]],
        "repeats": [u for u in numbers if counts[u] > 1],
    }
    parts = [f"{verb} {_listed(updates)}" for verb, updates in wrong.items() if updates]
    return f"metrics.jsonl {' and '.join(parts)}" if parts else None


def _listed(updates: list[int]) -> str:
    shown = ", ".join(map(str, updates[:10])) + (", ..." if len(updates) > 10 else "")
    return f"update{'s' if len(updates) > 1 else ''} {shown}"


def discard(path: Path) -> None:
    """Rename a folder, then delete it, so that no half-deleted one is ever visible."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        doomed = path if path.name.startswith(".tmp-") else temporary(path)
        if doomed != path:
            os.rename(path, doomed)
        shutil.rmtree(doomed)


def is_checkpoint_name(name: str) -> bool:
    """Whether this is the name of a checkpoint, or of one that is being replaced."""
    return _CHECKPOINT.fullmatch(name) is not None


def checkpoint_order(path: Path) -> tuple[int, bool]:
    """Sort key of a checkpoint: its update; one that is being replaced precedes its successor."""
    match = _CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2] is None


def temporary(path: Path) -> Path:
    """Return a new name beside a path, for a folder that is incomplete."""
    return path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")


def save_settings(folder: Path, settings: Settings) -> None:
    """Write resolved settings as YAML, in their order."""
    replace_file(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False).encode())


def load_settings(folder: Path) -> Settings:
    """Read what `save_settings` wrote; what an earlier version called otherwise has today's names.

    Settings that came since have the values that do what was done then: their defaults.
    """
    settings = read_yaml(folder / SETTINGS)
    gone = {name: settings.pop(name) for name in ("bf16", "micro_batch_size") if name in settings}
    if not gone:
        return settings
    added = {k: v for k, v in describe(TrainerConfig()).items() if k not in LORA}
    return {**added, "dtype": "bfloat16" if gone.get("bf16") else "float32", **settings}


def check_run_name(name: str, *, root: str | Path | None = None) -> str:
    """Return a run's name if it is safe as the name of a file: letters, digits, '.', '_', '-'.

    Args:
        name: 1 to 100 characters, the first one no '.' or '-'.
        root: Folder in which the name will be used, if any; a link of that name that leads out of
            it is refused.

    Raises:
        TrpoLMError: If the name is anything else.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        shown = repr(name if len(name) <= 100 else name[:97] + "...")
        raise TrpoLMError(
            f"run_name = {shown} is not allowed",
            where="run_name",
            hint="use 1 to 100 letters, digits, '.', '_' or '-', not starting with '.' or '-'",
        )
    if root is not None and not (Path(root) / name).resolve().is_relative_to(Path(root).resolve()):
        raise TrpoLMError(
            f"run_name = {name!r} is a link that leads out of {root}", where="run_name"
        )
    return name


def disk_fault(error: Exception, folder: Path) -> Exception:
    """Return the RunFault for an error of the disk; any other error as it is."""
    code = getattr(error, "errno", None)
    if told := re.search(r"\(os error (\d+)\)", str(error)):  # libraries in Rust
        code = int(told[1])
    if code is None and not isinstance(error, OSError | SafetensorError):
        return error
    full = code in (errno.ENOSPC, errno.EDQUOT)
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


class OutputLock:
    """Keeps other processes out of a run's folder: `with OutputLock(folder): ...`.

    The operating system holds the lock, on `.lock`, until the `with` or the process ends; where a
    file system has no locks, filelock marks the file instead. The first line of `.lock` is the pid
    of its holder. The process that holds it may take it again; the outermost `with` removes the
    file. Take it on rank 0 only.

    Raises:
        TrpoLMError: On entering, if another process holds the lock, or it is no regular file.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / ".lock"
        self._lock = FileLock(
            self.path.absolute(), timeout=0, thread_local=False, is_singleton=True
        )

    @property
    def held(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock.is_locked

    def __enter__(self) -> OutputLock:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            kind = "a link" if self.path.is_symlink() else "not a regular file"
            what = f"the lock cannot be used: it is {kind}"
            raise TrpoLMError(what, where=str(self.path), hint=f"delete {self.path}")
        try:
            self._lock.acquire()
        except Timeout:
            pid = _pid(self.path)
            raise TrpoLMError(
                f"{self.path.parent} is locked by {f'pid {pid}' if pid else 'another process'}",
                where="output_dir",
                hint=f"stop that run, or name another folder; if there is none, delete {self.path}",
            ) from None
        if _pid(self.path) != os.getpid():  # filelock's own mark begins with it
            with suppress(OSError), open(self.path, "wb", opener=regular) as file:
                file.write(b"%d\n" % os.getpid())  # on Windows a locked file cannot be written
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock.lock_counter == 1:
            with suppress(OSError):  # before it is released, so that only its holder removes it
                self.path.unlink()
        self._lock.release()


def _pid(path: Path) -> int | None:
    """Return the pid in the first line of a lock's file, if there is one."""
    try:
        return int(read_file(path, largest=1000).splitlines()[0])
    except (ValueError, IndexError):  # TrpoLMError is a ValueError
        return None


def is_locked(folder: Path) -> bool:
    """Whether another process writes into a folder."""
    try:
        with OutputLock(folder):
            return False
    except FileNotFoundError:  # there is no folder
        return False
    except TrpoLMError:
        return True


def is_running(folder: Path) -> bool:
    """Whether a process of this machine, perhaps this one, writes into a folder.

    A lock that is not there is not taken: a run that starts now must find its folder free.
    """
    lock = OutputLock(folder)
    with suppress(PermissionError):
        return lock.path.exists() and (lock.held or is_locked(folder))
    return False
