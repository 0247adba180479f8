"""Files that survive a crash: writes that reach the disk; JSON lines appended, read, truncated."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trpo_lm.errors import RunFault, TrpoLMError

Row = dict[str, Any]  # one JSON object: a line of a log, or a file


def replace_file(path: str | Path, content: bytes) -> None:
    """Write a whole file: after a crash `path` holds either its old content or all of `content`."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    write_through(temporary, content)
    os.replace(temporary, path)


def write_through(path: Path, content: bytes) -> None:
    """Write a file through to the disk; an OSError names the file."""
    try:
        with open(path, "wb") as file:
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
        with open(path, "ab") as file:
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
    if path.exists():
        lines = [line for line, row in _parsed_lines(path) if row.get("update", update) <= update]
        replace_file(path, b"".join(line + b"\n" for line in lines))


def _parsed_lines(path: Path) -> list[tuple[bytes, Row]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TrpoLMError(f"cannot be read: {error.strerror}", where=str(path)) from error
    parsed = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no line end follows: its writer was interrupted
                break
            raise TrpoLMError("not JSON", where=f"{path}, line {number}") from error
        if not isinstance(row, dict):
            raise TrpoLMError("not a JSON object", where=f"{path}, line {number}")
        parsed.append((line, row))
    return parsed
