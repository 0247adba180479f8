"""The page of a comparison: one HTML file that opens without a network.

Pictures are inside, there is no script, and all text is escaped. What it shows is `comparison`'s. A
comparison that is still running, or of last year, can be drawn again:
`python -m trpo_lm.comparison_page FOLDER`, and with `--frontier FILE.png` its first figure alone.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from trpo_lm.cli import redraw
from trpo_lm.comparison.results import (
    FIGURES,
    MANY,
    RUNAWAY_KL,
    Arm,
    Comparison,
    Table,
    at_equal_kl,
    kept_promises,
    load_comparison,
)
from trpo_lm.report.figures import STYLE, _column
from trpo_lm.report.format import clean, number
from trpo_lm.report.statistics import bootstrap_interval, mean

_NAMES = ("model", "reward_model", "judge")
NONE = "-"  # in a cell: there is no such number

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption, .note { color: #555;
       font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .5rem 0; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e5e5e5; text-align: right;
       vertical-align: top; font-variant-numeric: tabular-nums; }
th { color: #555; font-weight: 600; vertical-align: bottom; }
td.t, th.t { text-align: left; } td.t:first-child { white-space: nowrap; }
small { display: block; color: #777; font-size: .8rem; white-space: nowrap; }
.key { display: inline-block; min-width: 1.4em; border-radius: 1em; color: #fff; text-align: center;
       font-size: .78rem; padding: 0 .25em; }
"""


class _Html(str):
    """Text that is HTML already."""


def _cell(value: Any, digits: int = 3) -> str:
    if isinstance(value, _Html):
        return value
    if isinstance(value, float):
        return f"{value:.{digits}f}" if np.isfinite(value) else NONE
    return NONE if value is None else html.escape(clean(value))


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 3) -> str:
    """Return an HTML table; everything is escaped, numbers stand to the right."""
    texts = [
        any(
            isinstance(row[i], str)
            and row[i] not in ("", NONE)
            and not row[i].lstrip("+-")[:1].isdigit()
            for row in rows
        )
        for i in range(len(header))
    ]

    def line(tag: str, cells: Sequence[Any]) -> str:
        made = (
            f"<{tag}{' class=t' if text else ''}>{_cell(cell, digits)}</{tag}>"
            for cell, text in zip(cells, texts, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<div class=wide><table>\n{line('th', header)}\n{body}\n</table></div>"


def _badge(arm: Arm) -> _Html:
    colour = "#" + "".join(f"{round(255 * x):02x}" for x in arm.colour)
    return _Html(f'<span class=key style="background:{colour}">{arm.number}</span>')


def _key(arm: Arm) -> _Html:
    return _Html(f"{_badge(arm)} {html.escape(clean(arm.name))}")


def _spread(values: np.ndarray, digits: int = 3) -> _Html:
    """Return the mean, and its interval below it."""
    middle = mean(values)
    if not np.isfinite(middle):
        return _Html(NONE)
    return _Html(f"{middle:.{digits}f}{_interval(*bootstrap_interval(values), f'.{digits}f')}")


def _interval(low: float, high: float, form: str) -> str:
    return f"<small>[{low:{form}}, {high:{form}}]</small>" if low == low else ""


def _headline(rows: list[dict[str, Any]]) -> str:
    """Compare each of the first algorithm's arms with all others' best, and with each one's."""
    if not rows:
        return ""
    arms = list(dict.fromkeys(row["arm"].number for row in rows))
    of_arm = {n: [row for row in rows if row["arm"].number == n] for n in arms}
    best = [max(found, key=lambda row: row["rival_score"]) for found in of_arm.values()]
    algorithm = rows[0]["arm"].algorithm
    header = ["arm", "KL, nats", "score", "best other arm there", "its KL", "its score",
              "difference"]  # fmt: skip

    def table(rows: list[dict[str, Any]]) -> str:
        return _table(header, [
            [
                _key(row["arm"]), f"{row['ref_kl']:.2f}", row["score"], _key(row["rival"]),
                f"{row['rival_ref_kl']:.2f}", row["rival_score"],
                _Html(f"{row['difference']:+.3f}{_interval(row['low'], row['high'], '+.3f')}"),
            ]
            for row in rows
        ])  # fmt: skip

    return (
        f"<h2>At equal KL to the reference: {_cell(algorithm)} less the best other arm</h2>"
        + table(best)
        + _note(
            "Mean scores on training prompts. The other arm is taken where it last had the KL at "
            "which the first one ended, seed by seed; where its KL is less, it never came that "
            "far. It is chosen after the fact, which favours whoever has more arms."
        )
        + "<details><summary>Against the best arm of each algorithm</summary>"
        + table(rows)
        + "</details>"
    )


def _results(c: Comparison) -> str:
    base = c.reference["held_out"]
    rows: list[list[Any]] = [[_Html("reference"), "", f"{base['score']:.3f}", "0", "", ""]]
    for arm in c.arms:
        score, kl = arm.values("score"), arm.values("ref_kl")
        limit = c.limit_at(mean(kl))
        gain = limit - base["score"]
        gained = (mean(score) - base["score"]) / gain if gain > 0 else float("nan")
        asked = arm.asked_kl
        rows.append(
            [
                _key(arm), len(arm.runs), _spread(score), _spread(kl, 2),
                NONE if asked is None else number(asked),
                NONE if gained != gained else f"{gained:.0%}",
            ]
        )  # fmt: skip
    header = ["arm", "seeds", "held-out score", "KL to the reference, nats", "asked for",
              "of what is possible at that KL"]  # fmt: skip
    return _table(header, rows) + _note(
        "Below each mean its 95% interval over seeds. What is possible: the score that the limit "
        f"gains over the reference at that KL; it is known up to {c.limit_kl:.1f} nats."
    )


def _aftermath(c: Comparison) -> str:
    base = c.reference["held_out"]
    columns = {
        "judge": ("judge's score", 3), "nll": ("loss on the reference's text, nats per token", 3),
        "entropy": ("entropy, nats per token", 2),
        "distinct_2": ("distinct pairs of tokens, share", 3),
        "duplicates": ("repeated completions, share", 3), "length": ("length, tokens", 1),
    }  # fmt: skip
    rows: list[list[Any]] = [
        [_Html("reference"), *(_cell(base[k], d) for k, (_, d) in columns.items())]
    ]
    rows += [
        [_key(arm), *(_spread(arm.values(k), d) for k, (_, d) in columns.items())] for arm in c.arms
    ]
    return _table(["arm", *(title for title, _ in columns.values())], rows)


def _seeds(c: Comparison) -> Table:
    header = ["arm", "seed", "score", "ref_kl", "judge", "nll", "distinct_2", "duplicates",
              "worst_update_kl", "rejected", "fault"]  # fmt: skip
    rows = []
    for arm in c.arms:
        for run in arm.runs:
            kl = _column(run.rows, "trust_region/kl")
            rejected = int((_column(run.rows, "line_search/accepted") == 0).sum())
            held = [run.held_out(n) for n in ("score", "ref_kl", "judge", "nll", "distinct_2",
                                              "duplicates")]  # fmt: skip
            worst = float(np.nanmax(kl)) if np.isfinite(kl).any() else float("nan")
            rows.append([arm.name, run.seed, *held, worst, rejected, run.result.get("fault") or ""])
    return header, rows


def _costs(c: Comparison) -> str:
    phases = ["rollout", "score", "update", "value", "total"]
    rows = []
    for arm in c.arms:
        seconds = [mean(np.array([np.nansum(_column(run.rows, f"time/{p}")) for run in arm.runs]))
                   for p in phases]  # fmt: skip
        passes = mean(np.array([float(run.result.get("passes") or np.nan) for run in arm.runs]))
        sampled = arm.runs[0].rows[-1]["completions"] if arm.runs[0].rows else None
        rows.append([_key(arm), sampled, *seconds, passes])
    header = ["arm", "completions", *(f"{p}, s" for p in phases), "forward passes a completion"]
    return _table(header, rows, digits=1)


def _settings(c: Comparison) -> str:
    specs = {arm.number: arm.spec for arm in c.arms}
    names = list(dict.fromkeys(name for spec in specs.values() for name in spec))
    common = [
        n for n in names
        if all(n in spec and spec[n] == c.arms[0].spec.get(n) for spec in specs.values())
    ]  # fmt: skip
    own = [n for n in names if n not in common]
    shown = [[n, *(str(spec[n]) if n in spec else NONE for spec in specs.values())] for n in own]
    both = [[n, str(c.arms[0].spec[n])] for n in common]
    return (
        _table(["setting", *map(_key if len(c.arms) <= MANY else _badge, c.arms)], shown)
        + "<details><summary>Settings that all arms share</summary>"
        + _table(["setting", "value"], both) + "</details>"
    )  # fmt: skip


def _samples(c: Comparison) -> str:
    parts = []
    for i, before in enumerate(c.reference["samples"][:6]):
        rows: list[list[Any]] = [["reference", before["completion"], f"{before['score']:.2f}"]]
        for arm in c.featured:
            after = (arm.runs[0].result.get("samples") or [])[i : i + 1]
            rows += [[_key(arm), s["completion"], f"{s['score']:.2f}"] for s in after]
        prompt = before["prompt"]
        shown = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
        parts.append(f"<h3>{_cell(shown)} …</h3>" + _table(["", "completion", "score"], rows))
    return "\n".join(parts)


def write_page(folder: str | Path) -> Path:
    """Draw every figure (PNG and CSV in `figures/`), and write `results.csv` and the page.

    Returns:
        The page, `comparison.html`.

    Raises:
        TrpoLMError: If no run is finished yet.
    """
    folder = Path(folder)
    c = load_comparison(folder)
    frontier, *figures = _figures(c, folder / "figures")
    _write_csv(folder / "results.csv", _seeds(c))
    parts = [
        _introduction(c), frontier, _headline(at_equal_kl(c)),
        "<h2>Results on held-out prompts</h2>", _results(c),
        "<h3>Did it end where it was asked to?</h3>", _promises(c),
        "<h2>What the KL is for</h2>",
        _note(
            "A good policy pleases a judge that it was not trained on, has forgotten nothing (the "
            "loss on text of the reference stays at the reference's), and does not repeat itself."
        ),
        _aftermath(c),
        "<h2>On the way</h2>", *figures,
        "<h2>Samples</h2>", _note("Held-out prompts, first seed, nothing chosen."), _samples(c),
        "<h2>Every run</h2>", _every_run(c),
        "<h2>Cost</h2>",
        _note(
            "Means over seeds. Forward passes are counted outside sampling, in passes over one "
            "completion; Fisher products are not forward passes."
        ),
        _costs(c),
        "<h2>Settings</h2>", _settings(c),
    ]  # fmt: skip
    page = folder / "comparison.html"
    page.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Comparison</title><style>{_CSS}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n",
        encoding="utf-8",
    )
    return page


def _figures(c: Comparison, folder: Path) -> list[str]:
    """Draw the figures that there are numbers for; return them as HTML."""
    folder.mkdir(exist_ok=True)
    made = []
    for stem, (_, caption) in FIGURES.items():
        table = _draw(stem, c, folder / f"{stem}.png")
        if table is None:
            continue
        _write_csv(folder / f"{stem}.csv", table)
        image = base64.b64encode((folder / f"{stem}.png").read_bytes()).decode()
        made.append(
            f'<figure><img alt="{stem}" src="data:image/png;base64,{image}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return made


def _draw(stem: str, c: Comparison, file: Path) -> Table | None:
    """Draw one figure; None, and no file, where there is nothing to draw."""
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        table = FIGURES[stem][0](figure, c)
        if table is not None:
            figure.savefig(file, format="png")
    return table


def _introduction(c: Comparison) -> str:
    spec, runs = c.arms[0].spec, sum(len(arm.runs) for arm in c.arms)
    completions = spec["updates"] * spec["prompts_per_update"] * spec["completions_per_prompt"]
    names = {k: _cell(str(spec[k] or "none").rstrip("/").split("/")[-1]) for k in _NAMES}
    return (
        "<h1>The same prompts, the same reward, the same number of completions</h1>"
        f"<p>{len(c.arms)} arms, {runs} runs of {completions:,} completions. Model "
        f"{names['model']}, reward {names['reward_model']}, judge {names['judge']}. The reference "
        f"scores {c.reference['held_out']['score']:.3f} on held-out prompts. Intervals are 95% "
        "bootstrap intervals over seeds; with three seeds they are hardly more than the range.</p>"
    )


def _promises(c: Comparison) -> str:
    header = ["algorithm", "runs", "within 10% of the KL asked for", "collapsed"]
    return (
        _table(header, kept_promises(c))
        + _note(
            "* told a price, not a distance: counted is whether a run ends within "
            "10% of any of the distances that others were asked for."
        )
        + _note("A run that stopped before it had come to its distance is not counted as near it.")
        + _note(
            f"Collapsed: score below the reference's, more than {RUNAWAY_KL:g} nats, or a policy "
            "that could not be sampled."
        )
    )


def _every_run(c: Comparison) -> str:
    arms = [arm for arm in c.arms for _ in arm.runs]
    rows = [[_key(arm), *row[1:]] for arm, row in zip(arms, _seeds(c)[1], strict=True)]
    header = ["arm", "seed", "score", "KL, nats", "judge", "loss", "distinct pairs", "repeated",
              "largest KL of an update", "rejected steps", "fault"]  # fmt: skip
    shown = slice(None if any(row[-1] for row in rows) else -1)
    return _table(header[shown], [row[shown] for row in rows])


def _note(text: str) -> str:
    return f"<p class=note>{html.escape(text)}</p>"


def _write_csv(path: Path, table: Table) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table[0])
        writer.writerows(table[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the page of a comparison again; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trpo_lm.comparison_page", description=main.__doc__
    )
    parser.add_argument("folder", help="output_dir of recipes/compare.py")
    parser.add_argument(
        "--frontier", metavar="FILE.png", type=Path,
        help="draw only the frontier, with few arms, into this file",
    )  # fmt: skip
    args = parser.parse_args(arguments)

    def draw() -> None:
        if args.frontier is None:
            print(write_page(args.folder))
        else:
            c = load_comparison(args.folder)
            _draw("frontier", replace(c, arms=c.featured), args.frontier)
            print(args.frontier)

    return redraw(draw)
