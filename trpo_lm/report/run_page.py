"""The page of a run: one HTML file that follows it while it trains, and needs no server.

Pictures are SVG and are there without scripts; the page's own script pages through completions and
steps and, while the run goes on, loads the page again and finds the reader's place. All texts of
models and data are in one block of JSON, which is no script and holds no markup, and get onto the
page as text; a content security policy lets nothing run but the page's own script.

The page has every row of metrics up to `MOST_ROWS` and completions up to a number of bytes: all of
the newest updates, and an even sample of the earlier ones. It says what it leaves out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trpo_lm.errors import TrpoLMError
from trpo_lm.report.glossary import METRICS, outcome, step_in_words
from trpo_lm.report.html import escape
from trpo_lm.report.log_tail import HUGE, CompletionsTail, MetricsTail, compact, spread
from trpo_lm.report.page_sections import (
    Course,
    State,
    all_charts,
    completions_section,
    header,
    metrics_section,
    next_commands,
    pace,
    progress,
    setting_facts,
    settings_section,
    steps_section,
    tiles,
)
from trpo_lm.storage import Row, read_yaml, write_through

PAGE = "run.html"
ROOM = 4 << 20  # bytes of completions.jsonl that a page shows
MOST_ROWS = 10_000
LONGEST_TEXT = 20_000  # characters
REFRESH = 5.0  # seconds, at least, between two looks at a run
_PAIRS = 500  # completions beside the reference's
_HERE = Path(__file__).parent


class RunPage:
    """Writes the page of a run again and again; only what is new of its logs is read.

    Args:
        folder: The run's; commands on the page name it so.
        room: Bytes of completions to show, as `completions.jsonl` counts them.
    """

    def __init__(self, folder: str | Path, *, room: int = ROOM):
        self.folder, self.room = Path(folder), room
        self.metrics = MetricsTail(self.folder / "metrics.jsonl")
        self.completions = CompletionsTail(self.folder / "completions.jsonl")
        self.pairs = MetricsTail(self.folder / "samples.jsonl")
        self._settings_of: int | None = None  # when config.yaml was written
        self._known: tuple[Row, list[str]] = {}, []
        self._entries: dict[int, tuple[str, str]] = {}  # prompt and rest as JSON, by offset

    def write(self, state: State) -> Path:
        """Write the page as a whole: a reader finds the old one or the new one.

        Raises:
            OSError: If it could not be written.
        """
        path = self.folder / PAGE
        temporary = path.with_name(f".tmp-{PAGE}-{os.getpid()}")  # a watcher may write beside a run
        try:
            write_through(temporary, self.html(state).encode())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        return path

    def html(self, state: State) -> str:
        """Return the page."""
        self.metrics.read()
        if self.completions.read():
            self._entries.clear()
        self.pairs.read()
        settings, notes = self._settings()
        every = self.metrics.rows
        kept = [*range(len(every))]
        if len(every) > MOST_ROWS:
            kept = sorted({*spread(len(every), MOST_ROWS - 1), len(every) - 1})
            notes.append(f"{len(every):,} updates: {len(kept):,} of them, evenly, are on this page")
        rows = [every[i] for i in kept]
        columns = {name: np.array(c)[kept] for name, c in self.metrics.columns.items()}
        course = Course(rows, columns)
        damaged = self.metrics.damaged + self.completions.damaged
        if damaged:
            lines = "line" if damaged == 1 else "lines"
            notes.append(f"{damaged:,} {lines} of the logs could not be read and are left out")
        texts, left_out = self._completions()
        steps = [step_in_words(row) for row in rows]
        told = {text: i for i, text in enumerate(dict.fromkeys(steps))}
        head = {
            "run": self.folder.resolve().name,
            "state": state.kind,
            "refresh": REFRESH if state.kind == "running" else 0,
            "pace": pace(course),
            "written": round(time.time() * 1000),
            "updated": _changed(self.folder / "metrics.jsonl"),
            "outcomes": [outcome(row) for row in rows],
            "steps": [told[step] for step in steps],
            "told": list(told),
            "meanings": METRICS,
            "columns": list(columns),
        }
        encoded = ",\n".join(self.metrics.encoded[i] for i in kept)
        data = f'{compact(head)[:-1]},\n"rows":[{encoded}],\n{texts}}}'
        return _document(self.folder, course, steps, settings, state, notes, left_out, data)

    def _settings(self) -> tuple[Row, list[str]]:
        path = self.folder / "config.yaml"
        changed = _changed(path)
        if changed is None:
            return {}, []
        if changed != self._settings_of:
            try:
                self._known = read_yaml(path), []
            except TrpoLMError as error:
                self._known = {}, [f"config.yaml: {error.what}"]
            self._settings_of = changed
        return self._known[0], [*self._known[1]]

    def _completions(self) -> tuple[str, str]:
        """Return prompts and completions as members of a JSON object, and what is left out."""
        log = self.completions
        places, first = log.chosen(self.room)
        missing = [place for place in places if place[0] not in self._entries]
        for (offset, _), row in zip(missing, log.texts(missing), strict=True):
            self._entries[offset] = _entry(offset, row)
        self._entries = {offset: self._entries[offset] for offset, _ in places}
        entries = [entry for entry in self._entries.values() if entry[1]]
        pairs = self.pairs.rows[-_PAIRS:]
        entries += [_entry(-1 - i, row) for i, row in enumerate(pairs)]
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(p for p, _ in entries))}
        lines = ",\n".join(f"[{prompts[prompt]},{rest}]" for prompt, rest in entries)
        left_out = ""
        if len(places) < log.total:
            whole = "" if first is None else f"all from update {first} on, and of earlier updates "
            left_out = (
                f"{len(places):,} of {log.total:,} completions are on this page: {whole}an even "
                f"sample. All of them are in completions.jsonl ({log.size / 1e6:,.0f} MB)."
            )
        return f'"prompts":[{",".join(prompts)}],\n"completions":[{lines}]', left_out


def _entry(offset: int, row: Row | None) -> tuple[str, str]:
    """Return the prompt of a completion, and the rest of its entry, as JSON; empty if damaged."""
    if row is None or type(row.get("update")) is not int:
        return "null", ""
    pair = offset < 0
    names = [name for name in row if name.startswith("rewards/")]
    rest = [
        offset,
        row["update"],
        _spoken(row.get("policy" if pair else "completion")),
        _number(row.get("score_after" if pair else "score")),
        {name.removeprefix("rewards/"): _number(row[name]) for name in names},
    ]
    if pair:
        rest += [_spoken(row.get("reference")), _number(row.get("score_before"))]
        rest.append(row.get("of") if isinstance(row.get("of"), str) else "")
    return compact(_spoken(row.get("prompt"))), compact(rest)[1:-1]


def _spoken(value: Any) -> Any:
    """Return a text, or of messages a list of [role, text]; long texts are cut."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return [
            [_cut(str(message.get("role", ""))), _cut(_flat(message.get("content")))]
            + [
                _cut(f"{name}: {_flat(message[name])}")
                for name in message
                if name not in ("role", "content")
            ]
            for message in value
        ]
    return _cut(_flat(value))


def _flat(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _cut(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … [{len(text) - LONGEST_TEXT:,} more characters in the log]"


def _number(value: Any) -> float | None:
    if type(value) not in (int, float) or not -HUGE < value < HUGE:
        return None
    return float(f"{value:.6g}")


def _changed(path: Path) -> int | None:
    """Return when a file was last written to, in milliseconds; None if it is not there."""
    with suppress(OSError):
        return round(path.stat().st_mtime * 1000)
    return None


# ---------------------------------------------------------------- the document


def _document(
    folder: Path,
    run: Course,
    steps: Sequence[str],
    settings: Row,
    state: State,
    notes: Sequence[str],
    left_out: str,
    data: str,
) -> str:
    rows = run.rows
    css, script = (
        (_HERE / name).read_text(encoding="utf-8") for name in ("run_page.css", "run_page.js")
    )
    name = escape(folder.resolve().name)
    reload = f"<noscript><meta http-equiv='refresh' content='{REFRESH * 2:g}'></noscript>"
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        f"style-src '{_digest(css)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        "form-action 'none'\">",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        "<meta name='color-scheme' content='light dark'>",
        f"<title>{name}: {progress(rows, settings)}</title>",
        reload if state.kind == "running" else "",
        f"<style>{css}</style></head>\n<body>",
        header(name, run, settings, state),
        "".join(f"<p class='warning'>{escape(note)}.</p>" for note in notes),
        tiles(run, settings),
        setting_facts(settings, rows),
        next_commands(folder, state),
        "<nav aria-label='Sections'><a href='#charts'>Charts</a> <a href='#completions'>"
        "Completions</a> <a href='#steps'>Steps</a> <a href='#metrics'>All metrics</a> "
        "<a href='#settings'>Settings and files</a></nav>",
        "<main><section id='charts'><h2>Charts</h2><div class='charts'>",
        all_charts(run, settings),
        "</div></section>",
        completions_section(left_out),
        steps_section(rows, steps),
        metrics_section(run),
        settings_section(folder, settings),
        "</main>",
        f"<script type='application/json' id='data'>{data}</script>",
        f"<script>{script}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _digest(text: str) -> str:
    """Return the source of a content security policy that allows this text alone."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
