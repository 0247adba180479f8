"""Files that survive a crash, and are read without trust.

Writes reach the disk. JSON lines are appended, read and truncated. Nothing is opened through a link
and only regular files are: a FIFO would wait for ever. What is read has a largest size, and ends in
a value or a `TrpoLMError`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from trpo_lm.errors import RunFault, TrpoLMError

Row = dict[str, Any]  # one JSON object: a line of a log, or a file

LARGEST_RECORD = 1 << 24  # bytes of a JSON file
LARGEST_SETTINGS = 1 << 18  # bytes of a YAML file: PyYAML reads 100 kB/s
LARGEST_LOG = 1 << 32


def replace_file(path: str | Path, content: bytes) -> None:
    """Write a whole file: after a crash `path` holds either its old content or all of `content`."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    write_through(temporary, content)
    os.replace(temporary, path)


def regular(path: str | Path, flags: int) -> int:
    """Open a regular file; an opener for `open`.

    Raises:
        OSError: If the path is a link, or anything else than a regular file. Nothing waits.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a link"
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def write_through(path: Path, content: bytes) -> None:
    """Write a new file through to the disk, in place of any other; an OSError names the file."""
    try:
        path.unlink(missing_ok=True)  # a link too: what it leads to stays as it is
        with open(path, "xb", opener=regular) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writable_folder(path: str | Path, *, new: bool = False, where: str = "output") -> Path:
    """Return a folder for results once a file can be written there; make it if need be.

    Args:
        path: The folder; a link to one is refused.
        new: Whether it must be empty.
        where: Names the setting, for the error.

    Raises:
        TrpoLMError: If nothing can be written there: to be told before the work, not after it.
    """
    path = Path(os.path.abspath(os.path.expanduser(path)))
    try:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link")
        path.mkdir(parents=True, exist_ok=True)
        if new and any(path.iterdir()):
            raise OSError(errno.ENOTEMPTY, "it exists and is not empty")
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        what = f"cannot write to {str(path)!r}: {reason}"
        raise TrpoLMError(what, where=where, hint="name another folder") from error
    return path


def writable_file(path: str | Path, *, where: str = "output") -> Path:
    """Return the path of a file for results once it can be written; as `writable_folder`."""
    path = Path(os.path.abspath(os.path.expanduser(path)))
    with suppress(ValueError):  # a NUL in the path: the folder's error says so
        path = path.parent.resolve() / path.name
    writable_folder(path.parent, where=where)
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        what = f"cannot write to {str(path)!r}: it is not a regular file"
        raise TrpoLMError(what, where=where, hint="name another file")
    return path


def read_file(path: str | Path, *, largest: int = LARGEST_RECORD) -> bytes:
    """Return the content of a regular file.

    Raises:
        TrpoLMError: If it is missing, a link or no regular file, or has more than `largest` bytes.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size > largest:
                what = f"cannot be read: it has {size} bytes, more than {largest}"
                raise TrpoLMError(what, where=str(path))
            return file.read(size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, TrpoLMError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise TrpoLMError(f"cannot be read: {reason}", where=str(path)) from error


def parse_json(text: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If it is not JSON, holds NaN or an infinity, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_not_a_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _not_a_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_json(path: str | Path) -> Row:
    """Return the JSON object that a file holds.

    Raises:
        TrpoLMError: If it cannot be read, or is not a JSON object.
    """
    try:
        value = parse_json(read_file(path))
    except TrpoLMError:
        raise
    except ValueError as error:
        raise TrpoLMError(f"cannot be read: not JSON, {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise TrpoLMError("cannot be read: not a JSON object", where=str(path))
    return value


class _PlainYAML(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can stand for more values than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def read_yaml(path: str | Path) -> Row:
    """Return the mapping that a YAML file holds.

    Raises:
        TrpoLMError: If it cannot be read, or is not a mapping with text as keys.
    """
    content = read_file(path, largest=LARGEST_SETTINGS)
    try:
        value = _PlainYAML(content).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise TrpoLMError(f"not YAML: {str(reason).splitlines()[0]}", where=str(path)) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TrpoLMError("not a mapping of settings", where=str(path))
    return value


def strict_json(value: Mapping[str, Any]) -> bytes:
    """Return JSON text.

    Raises:
        RunFault: If a number is not finite; names its key.
    """
    for key, number in _numbers(value):
        if not math.isfinite(number):
            raise RunFault(f"the state to save has {key} = {number}: JSON has no such number")
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield from _numbers(v, f"{key}.{k}" if key else str(k))
    elif isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from _numbers(v, f"{key}[{i}]")


def append_json_line(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append `row` to `path` as one line of JSON, ASCII only, so that any terminal can show it.

    Args:
        path: File to append to; created if it does not exist.
        row: Names to JSON values, tensors or numpy values. Values that are nan or infinite become
            null, and their names are listed as "nonfinite".

    Raises:
        RunFault: If the line could not be written.
    """
    plain: Row = {}
    nonfinite = []
    for name, value in row.items():
        bad: list[float] = []
        plain[name] = _plain(value, bad)
        if bad:
            nonfinite.append(name)
    if nonfinite:
        plain["nonfinite"] = nonfinite
    line = json.dumps(plain, allow_nan=False) + "\n"
    try:
        with open(path, "ab", opener=regular) as file:
            file.write(line.encode())
    except OSError as error:
        raise RunFault(f"a line could not be written: {error.strerror}", where=str(path)) from error


def _plain(value: Any, bad: list[float]) -> Any:
    """Return `value` in JSON's types; nan and infinity become None and are appended to `bad`."""
    if hasattr(value, "tolist"):  # tensors and numpy values alike
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item, bad) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, bad) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return bad.append(value)
    return value


def read_json_lines(path: str | Path) -> list[Row]:
    """Return the rows of `path`; an incomplete last line, left by an interruption, is dropped.

    Raises:
        TrpoLMError: If the file is missing, or any other line is not a JSON object.
    """
    return [row for _, row in _parsed_lines(Path(path))]


def truncate_json_lines(path: str | Path, update: int) -> None:
    """Drop the rows after `update`, before a run resumes from that update's checkpoint.

    Other lines stay as they are, byte for byte, and so do rows without an "update". A file that
    does not exist is not created.
    """
    path = Path(path)
    if os.path.lexists(path):
        lines = [line for line, row in _parsed_lines(path) if _update(row, update) <= update]
        replace_file(path, b"".join(line + b"\n" for line in lines))


def _update(row: Row, otherwise: int) -> float:
    """Return the number of a row's update; a row without one has no place among them."""
    number = row.get("update", otherwise)
    return number if type(number) is int else math.inf


def _parsed_lines(path: Path) -> list[tuple[bytes, Row]]:
    lines = read_file(path, largest=LARGEST_LOG).split(b"\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            if number == len(lines):  # no line end follows: its writer was interrupted
                break
            raise TrpoLMError("not JSON", where=f"{path}, line {number}") from error
        if not isinstance(row, dict):
            raise TrpoLMError("not a JSON object", where=f"{path}, line {number}")
        parsed.append((line, row))
    return parsed
