"""The page of a comparison: one HTML file without scripts or network access.

Pictures are embedded and all text is escaped. A comparison that is still running, or an old one,
can be redrawn: `python -m trpo_lm.comparison_page FOLDER`, and with `--frontier FILE.png` its first
figure alone.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trpo_lm.cli import redraw
from trpo_lm.comparison.figures import FIGURES
from trpo_lm.comparison.results import (
    MANY,
    RUNAWAY_KL,
    ArmResults,
    Comparison,
    at_equal_kl,
    load_comparison,
    outcomes,
)
from trpo_lm.report.format import conversation, number
from trpo_lm.report.html import CSS, escape
from trpo_lm.report.run_log import column
from trpo_lm.report.statistics import bootstrap_interval, mean
from trpo_lm.report.style import Table, save_figure, save_png, write_csv
from trpo_lm.storage import Row, replace_file, writable_file, writable_folder

_NAMES = ("model", "reward_model", "judge")
NONE = "-"  # a cell without a number

_CSS = """
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; }
table { font-size: .88rem; margin: .5rem 0; } th, td { padding: .3rem .6rem; }
td { vertical-align: top; } th { font-weight: 600; } td.t:first-child { white-space: nowrap; }
small { display: block; color: #777; font-size: .8rem; white-space: nowrap; }
.key { display: inline-block; min-width: 1.4em; border-radius: 1em; color: #fff; text-align: center;
       font-size: .78rem; padding: 0 .25em; }
"""


class _Html(str):
    """Markup, which `_cell` does not escape."""


def _cell(value: Any, digits: int = 3) -> str:
    if isinstance(value, _Html):
        return value
    if isinstance(value, float):
        return f"{value:.{digits}f}" if np.isfinite(value) else NONE
    return NONE if value is None else escape(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 3) -> str:
    """Return an HTML table with its cells escaped and numbers aligned right."""
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
        parts = (
            f"<{tag}{' class=t' if text else ''}>{_cell(cell, digits)}</{tag}>"
            for cell, text in zip(cells, texts, strict=True)
        )
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<div class=wide><table>\n{line('th', header)}\n{body}\n</table></div>"


def _badge(arm: ArmResults) -> _Html:
    colour = "#" + "".join(f"{round(255 * x):02x}" for x in arm.colour)
    return _Html(f'<span class=key style="background:{colour}">{arm.number}</span>')


def _key(arm: ArmResults) -> _Html:
    return _Html(f"{_badge(arm)} {escape(arm.name)}")


def _spread(values: np.ndarray, digits: int = 3) -> _Html:
    """Return the mean with its interval below."""
    middle = mean(values)
    if not np.isfinite(middle):
        return _Html(NONE)
    return _Html(f"{middle:.{digits}f}{_interval(*bootstrap_interval(values), f'.{digits}f')}")


def _interval(low: float, high: float, form: str) -> str:
    return f"<small>[{low:{form}}, {high:{form}}]</small>" if low == low else ""


def _headline(rows: list[Row]) -> str:
    """Compare the first algorithm's arms with the best of all others, then of each."""
    if not rows:
        return ""
    arms = list(dict.fromkeys(row["arm"].number for row in rows))
    of_arm = {n: [row for row in rows if row["arm"].number == n] for n in arms}
    best = [max(rivals, key=lambda row: row["rival_score"]) for rivals in of_arm.values()]
    algorithm = rows[0]["arm"].algorithm
    header = ["arm", "KL, nats", "score", "best competing arm", "its KL", "its score",
              "difference"]  # fmt: skip

    def table(rows: list[Row]) -> str:
        return _table(header, [
            [
                _key(row["arm"]), f"{row['ref_kl']:.2f}", row["score"], _key(row["rival"]),
                f"{row['rival_ref_kl']:.2f}", row["rival_score"],
                _Html(f"{row['difference']:+.3f}{_interval(row['low'], row['high'], '+.3f')}"),
            ]
            for row in rows
        ])  # fmt: skip

    return (
        f"<h2>At equal KL to the reference: {_cell(algorithm)} minus the best competing arm</h2>"
        + table(best)
        + _note(
            "Mean scores on training prompts. Seed by seed, the competing arm is read where its KL "
            "last equalled the first arm's final KL; a smaller KL means that it never got that "
            "far. It is chosen after the fact, which favours algorithms with more arms."
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
        share = (mean(score) - base["score"]) / gain if gain > 0 else float("nan")
        target = arm.target_kl
        rows.append(
            [
                _key(arm), len(arm.runs), _spread(score), _spread(kl, 2),
                NONE if target is None else number(target),
                NONE if share != share else f"{share:.0%}",
            ]
        )  # fmt: skip
    header = ["arm", "seeds", "held-out score", "KL to the reference, nats", "asked for",
              "share of the possible gain"]  # fmt: skip
    return _table(header, rows) + _note(
        "Below each mean: its 95% interval over seeds. Possible gain: that of the limit over the "
        f"reference at the same KL; the limit is known up to {c.limit_kl:.1f} nats."
    )


def _side_effects(c: Comparison) -> str:
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


def _run_table(c: Comparison) -> Table:
    header = ["arm", "seed", "score", "ref_kl", "judge", "nll", "distinct_2", "duplicates",
              "worst_update_kl", "rejected", "fault"]  # fmt: skip
    rows = []
    for arm in c.arms:
        for run in arm.runs:
            kl = column(run.rows, "trust_region/kl")
            rejected = int((column(run.rows, "line_search/accepted") == 0).sum())
            held = [run.held_out(n) for n in ("score", "ref_kl", "judge", "nll", "distinct_2",
                                              "duplicates")]  # fmt: skip
            worst = float(np.nanmax(kl)) if np.isfinite(kl).any() else float("nan")
            rows.append([arm.name, run.seed, *held, worst, rejected, run.result.get("fault") or ""])
    return header, rows


def _costs(c: Comparison) -> str:
    phases = ["rollout", "score", "update", "value", "total"]
    rows = []
    for arm in c.arms:
        seconds = [mean(np.array([np.nansum(column(run.rows, f"time/{p}")) for run in arm.runs]))
                   for p in phases]  # fmt: skip
        passes = mean(np.array([float(run.result.get("passes") or np.nan) for run in arm.runs]))
        sampled = arm.runs[0].rows[-1]["completions"] if arm.runs[0].rows else None
        rows.append([_key(arm), sampled, *seconds, passes])
    header = ["arm", "completions", *(f"{p}, s" for p in phases), "forward passes per completion"]
    return _table(header, rows, digits=1)


def _settings(c: Comparison) -> str:
    specs = {arm.number: arm.spec for arm in c.arms}
    names = list(dict.fromkeys(name for spec in specs.values() for name in spec))
    common = [
        n for n in names
        if all(n in spec and spec[n] == c.arms[0].spec.get(n) for spec in specs.values())
    ]  # fmt: skip
    different = [
        [n, *(str(spec[n]) if n in spec else NONE for spec in specs.values())]
        for n in names if n not in common
    ]  # fmt: skip
    shared = [[n, str(c.arms[0].spec[n])] for n in common]
    return (
        _table(["setting", *map(_key if len(c.arms) <= MANY else _badge, c.arms)], different)
        + "<details><summary>Settings that all arms share</summary>"
        + _table(["setting", "value"], shared) + "</details>"
    )  # fmt: skip


def _samples(c: Comparison) -> str:
    parts = []
    for i, before in enumerate(c.reference["samples"][:6]):
        rows: list[list[Any]] = [["reference", before["completion"], before["score"]]]
        for arm in c.featured:
            after = (arm.runs[0].result.get("samples") or [])[i : i + 1]
            rows += [[_key(arm), s["completion"], s["score"]] for s in after]
        text = conversation(before["prompt"])
        parts.append(
            f"<h3>{escape(text)} …</h3>" + _table(["", "completion", "score"], rows, digits=2)
        )
    return "\n".join(parts)


def write_page(folder: str | Path) -> Path:
    """Write the page, its figures (PNG and CSV in `figures/`), and `results.csv`.

    Returns:
        The page, `comparison.html`.

    Raises:
        TrpoLMError: If no run is finished, or nothing can be written there.
    """
    folder = Path(folder)
    c = load_comparison(folder)
    page, drawn = folder / "comparison.html", folder / "figures"
    writable_file(page, where="folder")
    writable_folder(drawn, where="folder")
    frontier, *figures = _figures(c, drawn)
    write_csv(folder / "results.csv", _run_table(c))
    parts = [
        _introduction(c), frontier, _headline(at_equal_kl(c)),
        "<h2>Results on held-out prompts</h2>", _results(c),
        "<h3>Did runs end at the KL asked for?</h3>", _outcomes(c),
        "<h2>What the KL is for</h2>",
        _note(
            "A good policy also scores well with a judge that it was not trained on, forgets "
            "nothing (its loss on the reference's text stays at the reference's own), and does not "
            "repeat itself."
        ),
        _side_effects(c),
        "<h2>During training</h2>", *figures,
        "<h2>Samples</h2>", _note("Held-out prompts, first seed, not selected."), _samples(c),
        "<h2>Every run</h2>", _every_run(c),
        "<h2>Cost</h2>",
        _note(
            "Means over seeds. Forward passes are counted outside sampling, in passes over one "
            "completion; Fisher products are not forward passes."
        ),
        _costs(c),
        "<h2>Settings</h2>", _settings(c),
    ]  # fmt: skip
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Comparison</title><style>{CSS}{_CSS}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    replace_file(page, text.encode())
    return page


def _figures(c: Comparison, folder: Path) -> list[str]:
    """Draw the figures that have numbers; return them as HTML."""
    parts = []
    for stem, (draw, caption) in FIGURES.items():
        if files := save_figure(folder / stem, draw, c):
            image = base64.b64encode(files[0].read_bytes()).decode()
            parts.append(
                f'<figure><img alt="{stem}" src="data:image/png;base64,{image}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
    return parts


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


def _outcomes(c: Comparison) -> str:
    header = ["algorithm", "runs", "within 10% of the KL asked for", "collapsed"]
    return (
        _table(header, outcomes(c))
        + _note(
            "* with a price instead of a target: a run counts if it ends within 10% of any KL that "
            "other arms were asked for."
        )
        + _note("A run that stopped short of its target does not count as near it.")
        + _note(
            f"Collapsed: a score below the reference's, a KL above {RUNAWAY_KL:g} nats, or a "
            "policy that could not be sampled."
        )
    )


def _every_run(c: Comparison) -> str:
    arms = [arm for arm in c.arms for _ in arm.runs]
    rows = [[_key(arm), *row[1:]] for arm, row in zip(arms, _run_table(c)[1], strict=True)]
    header = ["arm", "seed", "score", "KL, nats", "judge", "loss", "distinct pairs", "repeated",
              "largest KL of an update", "rejected steps", "fault"]  # fmt: skip
    columns = slice(None if any(row[-1] for row in rows) else -1)  # faults, if there are any
    return _table(header[columns], [row[columns] for row in rows])


def _note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"


def main(arguments: Sequence[str] | None = None) -> int:
    """Redraw the page of a comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m trpo_lm.comparison_page", description=main.__doc__
    )
    parser.add_argument("folder", help="output_dir of a comparison")
    parser.add_argument(
        "--frontier", metavar="FILE.png", type=Path,
        help="draw only the frontier of the featured arms, into this file",
    )  # fmt: skip
    args = parser.parse_args(arguments)

    def draw() -> None:
        if args.frontier is None:
            print(write_page(args.folder))
        else:
            out = writable_file(args.frontier, where="frontier")
            c = load_comparison(args.folder)
            save_png(out, FIGURES["frontier"][0], replace(c, arms=c.featured))
            print(out)

    return redraw(draw)
