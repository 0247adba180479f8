"""What a folder of weights holds: the update that made them, and size and SHA-256 of every file.

`MANIFEST.json` is written last, in checkpoints, in `best/` and in the folder of a finished run, and
every reader checks the files against it. So weights carry the number of their own update, and a
folder is finished if its files are those of its manifest; neither is judged by names or times.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trpo_lm.errors import TrpoLMError
from trpo_lm.storage import Row, read_json, regular, replace_file, strict_json, sync, write_through
from trpo_lm.training.folder import temporary

FORMAT = 1
MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"(?=.{1,200}$)[\w-][\w.-]*(/[\w-][\w.-]*){0,3}", re.ASCII)

Files = dict[str, tuple[int, str]]  # path within the folder -> bytes, SHA-256


@dataclass(frozen=True)
class Manifest:
    """Content of a manifest.

    Attributes:
        update: Number of policy updates behind the files.
        files: All of them.
        facts: Whatever else its writer noted.
    """

    update: int
    files: Files
    facts: Row


def write_manifest(folder: Path, update: int, **facts: object) -> Files:
    """Force every file of a folder to the disk and complete it with its manifest."""
    files = _sizes_and_digests(folder)
    write_through(folder / MANIFEST, _record(update, files, facts))
    for inner in [*(d for d in folder.rglob("*") if d.is_dir()), folder]:
        sync(inner)
    return files


def publish(folder: Path, update: int, write: Callable[[Path], None], **facts: object) -> None:
    """Write files into a folder that may hold others, each whole or not at all, the manifest last.

    Args:
        folder: Made if need be.
        update: Number of updates behind the files.
        write: Writes them into the empty folder that it is given.
        facts: For the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = temporary(folder / "outcome")
    new.mkdir()
    try:
        write(new)
        files = _sizes_and_digests(new)
        for name in files:
            for inner in reversed(Path(name).parents[:-1]):
                _make_folder(folder / inner)
            os.replace(new / name, folder / name)
        replace_file(folder / MANIFEST, _record(update, files, facts))
        sync(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _make_folder(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    path.mkdir(exist_ok=True)


def _record(update: int, files: Files, facts: Row) -> bytes:
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    return strict_json({"format": FORMAT, "update": update, **facts, "files": listed})


def _sizes_and_digests(folder: Path) -> Files:
    files: Files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            sync(file)
            files[file.relative_to(folder).as_posix()] = file.stat().st_size, _sha256(file)
    return files


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest without looking at the files it lists.

    Raises:
        TrpoLMError: If there is none, or it is not one of this version.
    """
    if not os.path.lexists(folder / MANIFEST):
        raise damaged(folder, MANIFEST, "is missing")
    try:
        record = read_json(folder / MANIFEST)
    except TrpoLMError as error:
        raise damaged(folder, MANIFEST, error.what) from None
    try:
        version, update, listed = (record.pop(key) for key in ("format", "update", "files"))
        if type(version) is int and version != FORMAT:
            raise TrpoLMError(
                f"{folder.name} has format {version}; this version of trpo_lm reads format "
                f"{FORMAT}",
                where=str(folder / MANIFEST),
            )
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (KeyError, TypeError, AttributeError):
        raise damaged(folder, MANIFEST, "cannot be read") from None
    for name in files:
        if name.startswith("/") or ".." in Path(name).parts:
            raise damaged(folder, MANIFEST, f"lists {name!r:.80}, which is outside the folder")
        if not _NAME.fullmatch(name):
            raise damaged(folder, MANIFEST, f"lists {name!r:.80}, which no run writes")
    sound = all(type(size) is int and type(digest) is str for size, digest in files.values())
    if type(update) is not int or update < 0 or not sound or version != FORMAT:
        raise damaged(folder, MANIFEST, "is not complete")
    return Manifest(update, files, record)


def verify(folder: Path, manifest: Manifest, *, spare: frozenset[str] = frozenset()) -> None:
    """Check every file of a folder against its manifest, but for the names in `spare`.

    Raises:
        TrpoLMError: Names a file that is missing, a link, or damaged.
    """
    for name, (size, digest) in manifest.files.items():
        if name not in spare:
            _verify_file(folder, name, size, digest)


def _verify_file(folder: Path, name: str, size: int, digest: str) -> None:
    file = folder / name
    links = [p for p in (file, *list(file.parents)[: name.count("/")]) if p.is_symlink()]
    if links:
        raise damaged(folder, name, f"is not a file of its own: {links[0].name} is a link")
    if not file.is_file():
        raise damaged(folder, name, "is missing")
    try:
        if file.stat().st_size != size:
            raise damaged(folder, name, f"has {file.stat().st_size} bytes instead of {size}")
        if _sha256(file) != digest:
            raise damaged(folder, name, "has other content than was saved (SHA-256)")
    except OSError as error:
        raise damaged(folder, name, f"cannot be read: {error.strerror}") from None


def damaged(folder: Path, name: str, reason: str) -> TrpoLMError:
    """Return the error of a folder that is not what its manifest says."""
    return TrpoLMError(
        f"{folder.name} is damaged: {name} {reason}",
        where=str(folder / name),
        hint="--resume_from_checkpoint auto goes on from the newest undamaged checkpoint",
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", opener=regular) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
