"""The logs of a run, read while they are written.

Only what is new is read. A last line without its end is not there yet, a line that cannot be read
is counted and left out, and a log that was truncated or replaced, as a resume does, is read anew.
"""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trpo_lm.storage import Row, parse_json, regular

HUGE = 1e100  # what no metric is: not shown
_CHUNK = 1 << 24  # bytes read at a time
_UPDATE = re.compile(rb'\{"update": (\d{1,15})[,}]')  # how a line of completions begins


class LogTail:
    """The lines of a growing file, as they come.

    Attributes:
        path: The file; it may not exist yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self._offset, self._inode = 0, -1

    def restarted(self) -> bool:
        """Whether the file is another or a shorter one than before; it is then read anew."""
        try:
            found = os.lstat(self.path)
            inode, size = found.st_ino, found.st_size
        except OSError:
            inode, size = -1, 0
        if inode == self._inode and size >= self._offset:
            return False
        self._offset, self._inode = 0, inode
        return True

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the new complete lines, each with its offset in the file, in bytes."""
        try:
            file = open(self.path, "rb", opener=regular)  # noqa: SIM115
        except OSError:  # not there yet, or no regular file
            return
        with file:
            file.seek(self._offset)
            rest = b""
            while chunk := file.read(_CHUNK):
                *complete, rest = (rest + chunk).split(b"\n")
                for line in complete:
                    offset, self._offset = self._offset, self._offset + len(line) + 1
                    if line.strip():
                        yield offset, line


class MetricsTail:
    """The rows of a growing `metrics.jsonl`, and their numbers as JSON.

    Attributes:
        rows: What each line holds, as it stands there.
        columns: The numbers of each metric, nan where a row has none, by its name; the names are in
            the order in which they came.
        encoded: A JSON list for each row: its value of each of the first names.
        damaged: Lines that could not be read.
    """

    def __init__(self, path: Path):
        self._tail = LogTail(path)
        self._clear()

    def _clear(self) -> None:
        self.rows: list[Row] = []
        self.columns: dict[str, array[float]] = {}
        self.encoded: list[str] = []
        self.damaged = 0

    def read(self) -> None:
        """Take in what is new."""
        if self._tail.restarted():
            self._clear()
        for _, line in self._tail.lines():
            row, encoded = None, ""
            try:
                row = parse_json(line)
                names = [*self.columns, *(name for name in row if name not in self.columns)]
                encoded = compact([_short(row.get(name)) for name in names])
            except (ValueError, TypeError, AttributeError, RecursionError):
                row = None
            if row is None or type(row.get("update")) is not int:
                self.damaged += 1
                continue
            for name in names[len(self.columns) :]:
                self.columns[name] = array("d", [math.nan]) * len(self.rows)
            for name, column in self.columns.items():
                value = row.get(name)
                known = isinstance(value, int | float) and -HUGE < value < HUGE
                column.append(value if known else math.nan)
            self.rows.append(row)
            self.encoded.append(encoded)


class CompletionsTail:
    """Where each completion of a growing `completions.jsonl` lies; the texts are read on demand.

    Attributes:
        path: The file.
        total: Completions seen.
        size: Bytes of their lines.
        damaged: Lines that could not be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tail = LogTail(path)
        self._clear()

    def _clear(self) -> None:
        # By update: offsets, lengths.
        self._places: dict[int, tuple[array[int], array[int]]] = {}
        self.total = self.size = self.damaged = 0

    def read(self) -> bool:
        """Take in what is new; return whether everything was read anew."""
        anew = self._tail.restarted()
        if anew:
            self._clear()
        for offset, line in self._tail.lines():
            if (match := _UPDATE.match(line)) is None:
                self.damaged += 1
                continue
            places = self._places.setdefault(int(match[1]), (array("q"), array("q")))
            places[0].append(offset)
            places[1].append(len(line))
            self.total += 1
            self.size += len(line)
        return anew

    def chosen(self, room: int) -> tuple[list[tuple[int, int]], int | None]:
        """Choose completions whose lines fit in `room` bytes.

        All of the newest updates as far as half the room goes, and of the earlier ones an even
        sample: equally many of each, or, where that is less than one, one of every so-manieth.

        Returns:
            Offset and length of each, in the order of their updates; and the first update that is
            there as a whole with all that follow; None if not even the last one is.
        """
        updates = sorted(self._places)
        if self.size <= room:
            return [p for u in updates for p in self._of(u)], next(iter(updates), None)
        recent: list[list[tuple[int, int]]] = []
        used, first = 0, None
        while updates and used + sum(self._places[updates[-1]][1]) <= room // 2:
            first = updates.pop()
            used += sum(self._places[first][1])
            recent.append(self._of(first))
        count = int((room - used) / max(1.0, self.size / self.total))
        each, among = max(1, count // max(1, len(updates))), updates
        if count < len(updates):
            among = [updates[i] for i in spread(len(updates), count)]
        sample = []
        for update in reversed(among):  # what does not fit is the oldest
            places = self._of(update)
            for place in reversed([places[i] for i in spread(len(places), each)]):
                if used + place[1] <= room:
                    used += place[1]
                    sample.append(place)
        return [*reversed(sample), *(p for places in reversed(recent) for p in places)], first

    def _of(self, update: int) -> list[tuple[int, int]]:
        return list(zip(*self._places[update], strict=True))

    def texts(self, places: Sequence[tuple[int, int]]) -> Iterator[Row | None]:
        """Yield the row at each of these places, None where it cannot be read."""
        try:
            file = open(self.path, "rb", opener=regular)  # noqa: SIM115
        except OSError:
            yield from [None] * len(places)
            return
        with file:
            for offset, length in places:
                row = None
                with suppress(ValueError, OSError):
                    file.seek(offset)
                    row = parse_json(file.read(length))
                yield row if isinstance(row, dict) else None


def spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` of the indices below `count`, evenly spread."""
    wanted = max(0, min(count, wanted))
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def compact(value: Any) -> str:
    """Return JSON on one line, ASCII only, that holds no markup whatever its texts are."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _short(value: Any) -> Any:
    """Return a number with six digits, null in place of one that is out of JSON's range."""
    if type(value) is not float:
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
