"""The screen of a run: a live bar on a terminal, plain lines anywhere else.

Text that a model wrote is untrusted: neither its control characters nor its markup reach the
terminal.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import rich.console
from rich import box
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from trpo_lm.config import Limits
from trpo_lm.report.format import clean, number


def update_line(
    row: Mapping[str, Any], limits: Limits, *, total: int, first_score: float | None = None
) -> str:
    """Return the one-line summary of an update; null values are omitted.

    Args:
        row: Metrics by name.
        limits: Shown beside what they limit.
        total: Updates of the whole run.
        first_score: Mean score of the first update, with which this one is compared.
    """
    head = f"update {row['update']:0{len(str(total))}d}/{total}"
    if row.get("skipped"):
        return f"{head}  skipped: {clean(row['skipped'])}"

    def score(value: float) -> str:
        if first_score is None:
            return number(value)
        change, scale = value - first_score, max(abs(value), abs(first_score))
        return f"{number(value, scale)} ({'+' if change >= 0 else ''}{number(change, scale)})"

    def against(value: float, limit: float | None) -> str:
        return number(value) if limit is None else f"{number(value, limit)}/{number(limit)}"

    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("score ", "objective/score_mean", score),
        ("eval ", "objective/eval_score_mean", number),
        ("kl ", "trust_region/kl", lambda value: against(value, limits.max_kl)),
        ("ref_kl ", "objective/ref_kl", lambda value: against(value, limits.max_ref_kl)),
        ("trials ", "line_search/trials", lambda count: _trials(count, row)),
        ("cg ", "cg/iterations", lambda count: _iterations(count, row)),
        ("len ", "objective/completion_length", "{:.1f}".format),
        ("", "time/total", "{:.1f} s".format),
    ]
    values = ((label, row.get(name), show) for label, name, show in columns)
    parts = [f"{label}{show(value)}" for label, value, show in values if value is not None]
    return "  ".join([head, *parts])


def _trials(count: int, row: Mapping[str, Any]) -> str:
    if row.get("line_search/accepted", True) in (True, None):
        return str(count)
    return f"{count}, rejected: {clean(row.get('line_search/reason') or 'no step was good')}"


def _iterations(count: int, row: Mapping[str, Any]) -> str:
    residual = row.get("cg/residual")
    if residual is None:
        return str(count)
    mantissa, exponent = f"{residual:.0e}".split("e") if residual else ("0", "0")
    return f"{count} ({mantissa}e{int(exponent)})"


class Console:
    """The `Display` of one run.

    Args:
        enabled: Whether to show anything; False on every process but the main one.
        total: Updates of the whole run.
        stream: Where to write; standard output by default.
    """

    def __init__(self, enabled: bool, total: int, stream: TextIO | None = None):
        out: TextIO = sys.stdout if stream is None else stream
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")  # an emoji must not end a run in a latin-1 terminal
        self._first_score: float | None = None  # later ones are compared with it
        self._total = total
        self._terminal = (
            enabled and out.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        )
        self._out = rich.console.Console(
            file=out,
            quiet=not enabled,
            force_terminal=self._terminal,
            force_jupyter=False,
            width=None if self._terminal else 100,
            markup=False,
            emoji=False,
            highlight=False,
        )
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("updates "),
            TimeElapsedColumn(),
            TextColumn("elapsed "),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._out,
            speed_estimate_period=3600,  # an update of a large model takes minutes
        )
        self._task = self._bar.add_task("", total=total)
        self._latest = Text()
        self._live = Live(get_renderable=self._render, console=self._out, refresh_per_second=2)

    def _render(self) -> rich.console.Group:
        return rich.console.Group(self._latest, self._bar)

    def banner(self, facts: Mapping[str, Any], first_score: float | None = None) -> None:
        """Show the banner, a line for each label and its value, and start the bar."""
        self._first_score = first_score
        width = max(map(len, facts), default=0)
        for label, value in facts.items():
            line = Text.assemble((clean(label).ljust(width), "bold"), "  ", clean(value))
            if self._terminal:
                self._out.print(line, no_wrap=True, overflow="ellipsis")
            else:
                self._out.print(line, soft_wrap=True)
        self._out.print()
        self._latest.plain = "sampling the first completions"
        self._start()

    def update(self, row: Mapping[str, Any], limits: Limits) -> None:
        """Show one update: on the bar, or as a line of its own where there is no terminal."""
        line = update_line(row, limits, total=self._total, first_score=self._first_score)
        if self._first_score is None:
            self._first_score = row.get("objective/score_mean")
        if not self._terminal:
            self._out.print(line, soft_wrap=True)
            return
        self._start()
        self._latest.plain = line
        self._bar.update(self._task, completed=row["update"])
        self._live.refresh()

    def note(self, text: str) -> None:
        """Show a remark above the bar; its line breaks are kept."""
        for line in text.splitlines():
            self._out.print(clean(line), soft_wrap=not self._terminal)

    def samples_due(self, update: int) -> bool:
        """Whether to show samples at this update: every 5 on a terminal, else every 20."""
        return not self._out.quiet and update % (5 if self._terminal else 20) == 0

    def samples(self, rows: Sequence[Mapping[str, Any]], title: str) -> None:
        """Show completions side by side on a terminal, else below each other."""
        if not self._terminal:
            self.note(f"\n{title}")
            for row in rows:
                self._sample_lines(row)
            return
        room = 3 * max(12, (self._out.width - 28) // 3)  # three lines a cell, in characters
        scores = {"score_before": "before", "score_after": "after"}
        if not any("score_before" in row for row in rows):
            scores = {"score_after": "score"}
        self.table(
            title,
            ["prompt", "reference", "policy", *scores.values()],
            [
                [
                    _cut(clean(row.get("prompt", "")), room, keep_end=True),
                    _cut(clean(row.get("reference", "")), room),
                    _cut(clean(row.get("policy", "")), room),
                    *(row.get(name) for name in scores),
                ]
                for row in rows
            ],
        )

    def _sample_lines(self, row: Mapping[str, Any]) -> None:
        """Show a sample as three plain lines, each with its score before its text."""
        texts = {
            "prompt": (None, _cut(clean(row.get("prompt", "")), 200, keep_end=True)),
            "reference": (row.get("score_before"), _cut(clean(row.get("reference", "")), 200)),
            "policy": (row.get("score_after"), _cut(clean(row.get("policy", "")), 200)),
        }
        for name, (score, text) in texts.items():
            self.note(f"  {name:9}  {_cell(score):>7}  {text}")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table; numbers are rounded and aligned to the right, None is an empty cell."""
        table = Table(
            title=Text(clean(title), style="bold"),
            title_justify="left",
            box=box.HORIZONTALS,
            show_lines=any(len(str(value)) > 30 for row in rows for value in row),
        )
        for index, name in enumerate(header):
            numeric = all(isinstance(row[index], int | float | None) for row in rows)
            table.add_column(
                Text(clean(name)), justify="right" if numeric else "left", no_wrap=numeric
            )
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        self._out.print("", table)

    def close(self) -> None:
        """Stop the bar and leave it on the screen; must be called however the run ends."""
        self._live.stop()

    def _start(self) -> None:
        if self._terminal and not self._live.is_started:
            self._live.start()


def _cut(text: str, room: int, *, keep_end: bool = False) -> str:
    if len(text) <= room:
        return text
    return "…" + text[1 - room :] if keep_end else text[: room - 1] + "…"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return number(value) if isinstance(value, float) else clean(value)
