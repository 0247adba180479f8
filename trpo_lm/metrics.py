"""What a run writes and shows while it goes on: rows of numbers, and a screen.

One JSON object a line, without the NaN and Infinity that JSON does not have. The names are the
project's vocabulary (`METRICS`): every update rule writes all of them, null where one means
nothing, so that two runs compare line by line and every figure can be drawn from the file alone.
On a terminal the screen is a live bar; elsewhere it is one plain line an update. Text that a model
wrote is never trusted: neither its control characters nor its markup reach the terminal.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
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

from trpo_lm.errors import RunFault, TrpoLMError

# "per completion" = summed over a completion's tokens, averaged over completions.
METRICS: dict[str, str] = {
    "update": "number of this update, from 1",
    "completions": "completions sampled so far in the run, all processes",
    "tokens": "completion tokens sampled so far in the run, all processes",
    "skipped": "why the policy was left alone in this update; null when it was not",
    "objective/score_mean": "mean score of this update's completions, units of the reward",
    "objective/score_std": "standard deviation of those scores, units of the reward",
    "objective/ref_kl": "KL(old || ref) of this update's rollouts, nats per completion",
    "objective/ref_kl_per_token": "the same, nats per token",
    "objective/entropy": "entropy of the policy that sampled, nats per token",
    "objective/completion_length": "mean length of a completion, tokens",
    "objective/eos_rate": "share of completions that end before the length limit",
    "objective/eval_score_mean": "mean score on held-out prompts after the update, reward's units",
    "objective/eval_ref_kl": "KL(policy || ref) on held-out prompts, nats per completion",
    "trust_region/kl": "exact KL(old || new) after the step, nats per completion",
    "trust_region/kl_per_token": "the same, nats per token",
    "trust_region/kl_max": "largest KL(old || new) of a single state, nats",
    "trust_region/predicted_kl": "KL of the step by the quadratic model, nats per completion",
    "trust_region/predicted_gain": "surrogate gain of the step by the linear model, per completion",
    "trust_region/actual_gain": "surrogate gain measured after the step, per completion",
    "trust_region/ref_kl_after": "KL(new || ref) estimated on the batch, nats per completion",
    "trust_region/case": "which constraint bound the step: old, ref, both or recover",
    "trust_region/alignment": "cosine of v and w in the Fisher metric, -1 to 1",
    "trust_region/radius": "KL the step was allowed, at most max_kl, nats per completion",
    "cg/iterations": "conjugate-gradient iterations of the gradient's solve",
    "cg/residual": "relative residual they left, dimensionless",
    "line_search/trials": "step lengths tried",
    "line_search/accepted": "whether a step was taken",
    "line_search/reason": "why the last trial was accepted or rejected",
    "critic/explained_variance": "share of the returns' variance the critic explains, at most 1",
    "critic/loss": "mean squared error of the critic, squared units of the reward",
    "signal/half_batch_cosine": "cosine of the gradients of two halves of the batch, -1 to 1",
    "signal/noise_scale": "completions at which the gradient's signal equals its noise",
    "policy/checksum": "checksum of the trainable parameters after the update",
    "time/rollout": "seconds spent on sampling",
    "time/score": "seconds spent on rewards",
    "time/update": "seconds spent on the policy's update",
    "time/value": "seconds spent on the critic",
    "time/total": "seconds of the whole update",
}


def metrics_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with every name of METRICS present, null where it has no value."""
    return dict.fromkeys(METRICS) | dict(values)


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


_ESCAPE_SEQUENCE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"  # titles, links and other strings
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_DIRECTION_OVERRIDES = set(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))


def clean(text: Any) -> str:
    """Return `text` on one line without escape sequences, control and direction characters."""
    return "".join(
        " " if character.isspace() else character
        for character in _ESCAPE_SEQUENCE.sub("", str(text))
        if character.isspace()
        or not (
            unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTION_OVERRIDES
        )
    )


def number(value: float, scale: float | None = None) -> str:
    """Format `value` with two decimals; with more where `scale` needs them for two digits."""
    size = abs(value if scale is None else scale)
    if size and not 1e-6 < size < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(2, 1 - math.floor(math.log10(size or 1)))}f}"


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
