"""The screen of a run: a live bar on a terminal, plain lines anywhere else.

Text that a model wrote is never trusted: neither its control characters nor its markup reach the
terminal.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
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

from trpo_lm.report.format import clean, number


def update_line(
    row: Mapping[str, Any],
    limits: Mapping[str, float | None],
    *,
    total: int,
    first_score: float | None = None,
) -> str:
    """Return the one line that tells of an update; what is null in `row` is left out.

    Args:
        row: Metrics by name.
        limits: `max_kl` and `max_ref_kl`, nats per completion; either may be None or absent.
        total: Updates of the whole run.
        first_score: Mean score of the first update, with which this one is compared.
    """
    head = f"update {row['update']:0{len(str(total))}d}/{total}"
    if row.get("skipped"):
        return f"{head}  skipped: {clean(row['skipped'])}"
    parts = [head]

    def add(label: str, name: str, show: Any) -> None:
        if row.get(name) is not None:
            parts.append(f"{label}{show(row[name])}")

    def score(value: float) -> str:
        if first_score is None:
            return number(value)
        scale = max(abs(value), abs(first_score))
        change = value - first_score
        return f"{number(value, scale)} ({'+' if change >= 0 else ''}{number(change, scale)})"

    def against(limit: float | None) -> Any:
        if limit is None:
            return number
        return lambda value: f"{number(value, limit)}/{number(limit)}"

    def trials(count: int) -> str:
        if row.get("line_search/accepted", True) in (True, None):
            return str(count)
        return f"{count}, rejected: {clean(row.get('line_search/reason') or 'no step was good')}"

    def iterations(count: int) -> str:
        residual = row.get("cg/residual")
        if residual is None:
            return str(count)
        mantissa, exponent = f"{residual:.0e}".split("e") if residual else ("0", "0")
        return f"{count} ({mantissa}e{int(exponent)})"

    add("score ", "objective/score_mean", score)
    add("eval ", "objective/eval_score_mean", number)
    add("kl ", "trust_region/kl", against(limits.get("max_kl")))
    add("ref_kl ", "objective/ref_kl", against(limits.get("max_ref_kl")))
    add("trials ", "line_search/trials", trials)
    add("cg ", "cg/iterations", iterations)
    add("len ", "objective/completion_length", "{:.1f}".format)
    add("", "time/total", "{:.1f} s".format)
    return "  ".join(parts)


class Console:
    """The screen of a run: a live bar on a terminal, plain lines anywhere else.

    Args:
        enabled: Whether to show anything; False on every process but the main one.
        total: Updates of the whole run.
        stream: Where to write; standard output by default.

    Attributes:
        first_score: Score that later ones are compared with: the first that `update` was given. A
            run that is resumed may set it.
    """

    def __init__(self, enabled: bool, total: int, stream: TextIO | None = None):
        out: TextIO = sys.stdout if stream is None else stream
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")  # an emoji must not end a run in a latin-1 terminal
        self.first_score: float | None = None
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

    def banner(self, facts: Mapping[str, Any]) -> None:
        """Show what is about to run, a line for each label and its value, and start the bar."""
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

    def update(self, row: Mapping[str, Any], limits: Mapping[str, float | None]) -> None:
        """Show one update: on the bar, or as a line of its own where there is no terminal."""
        line = update_line(row, limits, total=self._total, first_score=self.first_score)
        if self.first_score is None:
            self.first_score = row.get("objective/score_mean")
        if not self._terminal:
            self._out.print(line, soft_wrap=True)
            return
        self._start()
        self._latest.plain = line
        self._bar.update(self._task, completed=row["update"])
        self._live.refresh()

    def note(self, text: str) -> None:
        """Show a remark; its line ends are kept, and a bar stays below it."""
        for line in text.splitlines():
            self._out.print(clean(line), soft_wrap=not self._terminal)

    def samples_due(self, update: int) -> bool:
        """Say whether to show samples at this update: every 5 on a terminal, else every 20."""
        return not self._out.quiet and update % (5 if self._terminal else 20) == 0

    def samples(self, rows: Sequence[Mapping[str, Any]], title: str) -> None:
        """Show completions of the reference and the policy: side by side, or below each other.

        Args:
            rows: Each with `prompt`, `reference` and `policy` (texts), `score_before` (the
                reference's) and `score_after` (the policy's); what is absent stays empty.
            title: What stands above them.
        """
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
        """Show a sample as three plain lines, each score before its text."""
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
        """Leave the bar as it stands; must be called however the run ends."""
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
