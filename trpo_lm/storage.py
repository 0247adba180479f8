"""JSON lines that survive a crash: append, read, truncate."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trpo_lm.errors import RunFault, TrpoLMError


def append_json_line(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append `row` to `path` as one line of JSON, ASCII only, so that any terminal may show it.

    Args:
        path: File to append to; made when it does not exist.
        row: Names to JSON values, tensors or numpy values. What is nan or infinite becomes null,
            and the names it was found under are listed as "nonfinite".

    Raises:
        RunFault: If the line could not be written.
    """
    plain: dict[str, Any] = {}
    nonfinite = []
    for name, value in row.items():
        lost: list[float] = []
        plain[name] = _plain(value, lost)
        if lost:
            nonfinite.append(name)
    if nonfinite:
        plain["nonfinite"] = nonfinite
    line = json.dumps(plain, allow_nan=False) + "\n"
    try:
        with open(path, "ab") as file:
            file.write(line.encode())
    except OSError as error:
        raise RunFault(f"a line could not be written: {error.strerror}", where=str(path)) from error


def _plain(value: Any, lost: list[float]) -> Any:
    """Return `value` in JSON's types; numbers JSON does not have become None and go to `lost`."""
    if hasattr(value, "tolist"):  # tensors and numpy values alike
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item, lost) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, lost) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return lost.append(value)
    return value


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of `path`; a last line torn by an interruption is dropped.

    Raises:
        TrpoLMError: If the file is missing, or any other line is not a JSON object.
    """
    return [row for _, row in _parsed_lines(Path(path))]


def truncate_json_lines(path: str | Path, update: int) -> None:
    """Drop the rows after `update`, as a run does that goes on from that update's checkpoint.

    Kept lines stay as they are, byte for byte; a crash leaves either the old file or the new one.
    Rows without an "update" are kept, and a file that does not exist is left so.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = [line for line, row in _parsed_lines(path) if row.get("update", update) <= update]
    new = path.with_name(f".tmp-{path.name}")
    with open(new, "wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _parsed_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
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
            if number == len(lines):  # nothing ended this line: its writer was interrupted
                break
            raise TrpoLMError("not JSON", where=f"{path}, line {number}") from error
        if not isinstance(row, dict):
            raise TrpoLMError("not a JSON object", where=f"{path}, line {number}")
        parsed.append((line, row))
    return parsed
