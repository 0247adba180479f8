"""The page of a comparison: figures with their numbers, tables, and samples in one HTML file.

Everything is drawn from what `recipes/compare.py` left in a folder: `reference.json` with the
limit, and for each run `metrics.jsonl`, `completions.jsonl` and `result.json`. A comparison that is
still running, or of last year, can be drawn again: `python -m trpo_lm.comparison FOLDER`. The page
opens without a network: pictures are inside, there is no script, and all text is escaped.

What the statistics are: an interval is the 95% percentile bootstrap of the mean over seeds (with
three seeds that is hardly more than their range). At equal KL a run is compared with another
algorithm's run of the same seed, stopped when its smoothed KL last was what the first one ended
with. The other algorithm's arm is the one that does best there, chosen after the fact: that
favours whichever algorithm has more arms.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from trpo_lm.errors import TrpoLMError
from trpo_lm.metrics import clean, number, read_json_lines
from trpo_lm.report import KL_UNIT, STYLE, _agreement, _column, _panel

COLOURS = {
    "trpo": "#0072B2", "npg": "#56B4E9", "ppo": "#D55E00", "grpo": "#009E73", "rloo": "#CC79A7",
    "reinforce": "#E69F00",
}  # fmt: skip
OTHER = "#6e6e6e"
STYLES = ("-", "--", ":", "-.")
WINDOW = 5  # updates over which score and KL are averaged before they are compared
MANY = 6  # arms; with more than these only the best of each algorithm are drawn in full
NONE = "-"  # in a cell: there is no such number
RUNAWAY_KL = 20.0  # nats per completion: a run that ends beyond has collapsed


@dataclass(frozen=True)
class Run:
    """One arm with one seed: `result` is its result.json, `rows` are its metrics."""

    seed: int
    folder: Path
    result: dict[str, Any]
    rows: list[dict[str, Any]]

    def held_out(self, name: str) -> float:
        """Return a measurement on held-out prompts; nan where there is none."""
        value = (self.result.get("held_out") or {}).get(name)
        return float("nan") if value is None else float(value)

    def trajectory(self) -> tuple[np.ndarray, np.ndarray]:
        """Return KL and score of the updates, each the mean of up to `WINDOW` updates."""
        return _smooth(_column(self.rows, "objective/ref_kl")), _smooth(
            _column(self.rows, "objective/score_mean")
        )

    def score_at(self, kl: float) -> float:
        """Return the smoothed score when the smoothed KL last was `kl` (the last one, if less)."""
        x, y = self.trajectory()
        below = np.flatnonzero(x <= kl)
        i = int(below[-1]) if len(below) else 0
        if i + 1 == len(x) or x[i + 1] <= x[i] or x[i] > kl:
            return float(y[i])
        return float(y[i] + (kl - x[i]) / (x[i + 1] - x[i]) * (y[i + 1] - y[i]))


@dataclass(frozen=True)
class Arm:
    """An algorithm with its settings, and its runs, one for each seed."""

    number: int
    name: str
    algorithm: str
    colour: Any
    style: str
    runs: list[Run]

    def values(self, name: str) -> np.ndarray:
        """Return a held-out measurement of every run."""
        return np.array([run.held_out(name) for run in self.runs])

    @property
    def spec(self) -> dict[str, Any]:
        """The settings that all its runs had."""
        return self.runs[0].result["spec"]

    @property
    def asked_kl(self) -> float | None:
        """The reference KL that its user asked for: a budget, or the target of an adaptive beta."""
        return self.spec.get("max_ref_kl") or self.spec.get("target_ref_kl")


@dataclass(frozen=True)
class Comparison:
    """What a folder holds: the reference with its limit, and the arms."""

    reference: dict[str, Any]
    arms: list[Arm]

    @property
    def featured(self) -> list[Arm]:
        """The arms drawn in full: all, or of each algorithm the best two and those with a budget."""
        if len(self.arms) <= MANY:
            return self.arms
        chosen = []
        for arms in self.families().values():
            best = sorted(arms, key=lambda arm: -_mean(arm.values("score")))
            chosen += [arm for arm in arms if arm in best[:2] or arm.spec.get("max_ref_kl")]
        return chosen

    def families(self) -> dict[str, list[Arm]]:
        """Return the arms by algorithm."""
        found: dict[str, list[Arm]] = {}
        for arm in self.arms:
            found.setdefault(arm.algorithm, []).append(arm)
        return found

    def limit_at(self, kl: float) -> float:
        """Return the best score that any policy at that KL can have; nan beyond the curve."""
        x, y = (_column(self.reference["limit"], name) for name in ("ref_kl", "score"))
        return float(np.interp(kl, x, y, right=np.nan))


def load_comparison(folder: str | Path) -> Comparison:
    """Read what is finished in the folder of a comparison.

    Raises:
        TrpoLMError: If the reference was not measured or no run is finished yet.
    """
    folder = Path(folder)
    files = sorted((folder / "runs").glob("*/seed-*/result.json"))
    if not (folder / "reference.json").is_file() or not files:
        raise TrpoLMError(
            "no run of a comparison is finished here", where=str(folder),
            hint="run recipes/compare.py with --output_dir set to this folder",
        )  # fmt: skip
    found: dict[str, list[Run]] = {}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = read_json_lines(file.parent / "metrics.jsonl")
        for row in rows:
            row["max_kl"] = result["spec"].get("max_kl")
        found.setdefault(result["arm"], []).append(Run(result["seed"], file.parent, result, rows))
    order = list(COLOURS)
    names = sorted(
        found,
        key=lambda name: (
            order.index(a) if (a := found[name][0].result["algorithm"]) in order else len(order),
            [(k, _as_number(v)) for k, v in found[name][0].result["given"].items()],
        ),
    )
    arms, counted = [], dict[str, int]()
    for number_, name in enumerate(names, 1):
        runs = sorted(found[name], key=lambda run: run.seed)
        algorithm = runs[0].result["algorithm"]
        place = counted[algorithm] = counted.get(algorithm, -1) + 1
        base = np.array(to_rgb(COLOURS.get(algorithm, OTHER)))
        colour = tuple(base + (1 - base) * 0.55 * (1 - 0.5**place))
        arms.append(Arm(number_, name, algorithm, colour, STYLES[place % len(STYLES)], runs))
    reference = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    return Comparison(reference, arms)


def _as_number(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


# --- statistics -----------------------------------------------------------------------------------


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average each value with the ones before it, up to `WINDOW` of them; the start stays as is."""
    return np.array([_mean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))])


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, draws: int = 10_000
) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the mean; nan for fewer than two values.

    Args:
        values: One for each seed; what is not finite is left out.
        draws: Resamples; their seed is fixed, so that a page is the same whenever it is drawn.
    """
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if len(known) < 2:
        return float("nan"), float("nan")
    rows = np.random.default_rng(0).integers(len(known), size=(draws, len(known)))
    low, high = np.percentile(known[rows].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def at_equal_kl(comparison: Comparison) -> list[dict[str, Any]]:
    """Compare the first algorithm's arms with the best arm of every other, at the KL they ended.

    Returns:
        Rows of `arm`, `ref_kl`, `score`, `rival` (the arm), `rival_score`, `difference`, `low` and
        `high` (its 95% interval over seeds).
    """
    families = comparison.families()
    rows = []
    for arm in next(iter(families.values())):
        ends = {run.seed: [float(v[-1]) for v in run.trajectory()] for run in arm.runs if run.rows}
        for rivals in list(families.values())[1:]:
            pairs = {
                i: {r.seed: r.score_at(ends[r.seed][0]) for r in rival.runs if r.seed in ends}
                for i, rival in enumerate(rivals)
            }
            pairs = {i: scores for i, scores in pairs.items() if scores}
            if not pairs:
                continue
            best = max(pairs, key=lambda i: _mean(np.array(list(pairs[i].values()))))
            gains = [ends[seed][1] - score for seed, score in pairs[best].items()]
            low, high = bootstrap_interval(gains)
            rows.append(
                {
                    "arm": arm,
                    "ref_kl": _mean(np.array([end[0] for end in ends.values()])),
                    "score": _mean(np.array([end[1] for end in ends.values()])),
                    "rival": rivals[best],
                    "rival_score": _mean(np.array(list(pairs[best].values()))),
                    "difference": _mean(np.array(gains)),
                    "low": low,
                    "high": high,
                }
            )
    return rows


def kept_promises(comparison: Comparison) -> list[list[Any]]:
    """Count, for each algorithm, runs that end near the KL asked for, and runs that collapse."""
    asked = sorted({arm.asked_kl for arm in comparison.arms if arm.asked_kl})
    base = comparison.reference["held_out"]["score"]
    rows = []
    for algorithm, arms in comparison.families().items():
        near = collapsed = total = 0
        for arm in arms:
            wanted = [arm.asked_kl] if arm.asked_kl else asked
            for run in arm.runs:
                kl, score = run.held_out("ref_kl"), run.held_out("score")
                total += 1
                near += any(abs(kl - k) <= 0.1 * k for k in wanted)
                collapsed += not (score >= base and kl <= RUNAWAY_KL)
        own = all(arm.asked_kl for arm in arms)
        rows.append(
            [
                algorithm, total,
                f"{near / total:.0%}{'' if own else ' *'}" if asked else NONE,
                f"{collapsed / total:.0%}",
            ]
        )  # fmt: skip
    return rows


# --- figures --------------------------------------------------------------------------------------

Table = tuple[list[str], list[list[Any]]]


def _legend(figure: Figure, arms: Sequence[Arm], extra: Sequence[Any] = ()) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=a.colour, linestyle=a.style, label=f"{a.number}  {a.name}")
        for a in arms
    ]
    figure.legend(handles=[*handles, *extra], loc="outside lower left", ncols=2, borderaxespad=0.3)


def _stacked(arm: Arm, name: str, smooth: bool = False) -> np.ndarray:
    """Return a metric of all runs of an arm, (runs, updates), nan where a run is shorter."""
    columns = [_column(run.rows, name) for run in arm.runs]
    columns = [_smooth(c) for c in columns] if smooth else columns
    longest = max(map(len, columns))
    return np.array([np.pad(c, (0, longest - len(c)), constant_values=np.nan) for c in columns])


def _band(axes: Axes, arm: Arm, x: np.ndarray, values: np.ndarray) -> None:
    """Draw the mean over runs and, with several, its 95% interval."""
    mean = np.array([_mean(column) for column in values.T])
    axes.plot(x, mean, color=arm.colour, linestyle=arm.style)
    if len(values) > 1:
        low, high = np.array([bootstrap_interval(c, draws=1000) for c in values.T]).T
        axes.fill_between(x, low, high, color=arm.colour, alpha=0.15, linewidth=0)


def _draw_frontier(figure: Figure, c: Comparison) -> Table:
    from matplotlib.lines import Line2D

    figure.set_size_inches(8.4, 5.6)
    axes = figure.subplots()
    _panel(axes, "What the score costs", f"KL to the reference ({KL_UNIT})", "mean score")
    limit = [[row[k] for k in ("ref_kl", "score", "beta")] for row in c.reference["limit"]]
    axes.plot([r[0] for r in limit], [r[1] for r in limit], color="black", linestyle="--")
    rows: list[list[Any]] = [["limit", "", "", kl, score, beta] for kl, score, beta in limit]
    for arm in c.arms:
        for run in arm.runs:
            x, y = (_column(run.rows, f"objective/{n}") for n in ("ref_kl", "score_mean"))
            rows += [
                [arm.name, run.seed, i + 1, *p, ""] for i, p in enumerate(zip(x, y, strict=True))
            ]
            rows.append(
                [arm.name, run.seed, "end", run.held_out("ref_kl"), run.held_out("score"), ""]
            )
            if arm in c.featured:
                axes.plot(x, y, ".", color=arm.colour, markersize=3, alpha=0.35)
                axes.plot(*run.trajectory(), color=arm.colour, linestyle=arm.style, linewidth=0.9)
    ends = []
    for arm in c.arms:
        kl, score = arm.values("ref_kl"), arm.values("score")
        axes.plot(kl, score, "o", color=arm.colour, markersize=4, alpha=0.6)
        if np.isfinite(kl).any():
            ends.append(_mean(kl))
            axes.annotate(
                str(arm.number), (_mean(kl), _mean(score)), ha="center", va="center", fontsize=8,
                color="white", zorder=5, annotation_clip=True,
                bbox={"boxstyle": "circle,pad=0.25", "fc": arm.colour, "ec": "white"},
            )  # fmt: skip
    shown = [kl for kl in ends if kl <= RUNAWAY_KL]
    widest = max([limit[-1][0], *shown])
    axes.set_xlim(-0.02 * widest, 1.08 * widest)
    beyond = len(ends) - len(shown)
    if beyond:
        axes.set_xlabel(f"KL to the reference ({KL_UNIT}); {beyond} arms ended beyond {widest:.0f}")
    marks = [
        Line2D([], [], color="black", linestyle="--", label="limit: tilted reference"),
        Line2D([], [], color=OTHER, marker="o", linestyle="", label="end of each run, held out"),
    ]
    _legend(figure, c.arms, marks)
    return ["arm", "seed", "update", "ref_kl", "score", "beta"], rows


def _draw_trust_region(figure: Figure, c: Comparison) -> Table:
    figure.set_size_inches(8.4, 7.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _panel(upper, "KL of each update (log scale)", "", KL_UNIT)
    _panel(lower, "KL to the reference; dashed: budget", "update", KL_UNIT)
    upper.set_yscale("log")
    names = ["trust_region/kl", "line_search/trials", "line_search/accepted", "objective/ref_kl"]
    rows = []
    for arm in c.arms:
        for run in arm.runs:
            update, kl = _column(run.rows, "update"), _column(run.rows, names[0])
            rows += [[arm.name, run.seed, row["update"], *map(row.get, names)] for row in run.rows]
            if arm not in c.featured:
                continue
            kl[kl <= 0] = np.nan
            upper.plot(update, kl, color=arm.colour, linestyle=arm.style, linewidth=0.9, alpha=0.8)
            rejected = _column(run.rows, names[2]) == 0
            backtracked = (_column(run.rows, names[1]) > 1) & ~rejected
            upper.plot(update[backtracked], kl[backtracked], "v", color="white", markersize=5,
                       markeredgecolor=arm.colour)  # fmt: skip
            floor = np.full(rejected.sum(), 0.02)
            upper.plot(update[rejected], floor, "x", color=arm.colour, markersize=7, clip_on=False,
                       transform=upper.get_xaxis_transform())  # fmt: skip
            lower.plot(
                update, _column(run.rows, names[3]), color=arm.colour, linestyle=arm.style,
                linewidth=0.9,
            )  # fmt: skip
        if arm in c.featured and arm.asked_kl:
            lower.axhline(arm.asked_kl, color=arm.colour, linestyle=(0, (6, 3)), linewidth=1)
    for limit in sorted({arm.spec["max_kl"] for arm in c.featured if arm.spec.get("max_kl")}):
        upper.axhline(limit, color="black", linestyle="--", linewidth=1)
        upper.annotate(
            f"max_kl = {number(limit)}", (0, limit), xycoords=("axes fraction", "data"),
            xytext=(5, 3), textcoords="offset points", fontsize=9,
        )  # fmt: skip
    top = [v for a in c.featured for r in a.runs for v in _column(r.rows, names[3]) if v == v]
    lower.set_ylim(0, 1.05 * min(max(top, default=1.0), RUNAWAY_KL))
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color="white", markeredgecolor=OTHER, marker="v", linestyle="",
               label="backtracked"),
        Line2D([], [], color=OTHER, marker="x", linestyle="", label="rejected: nothing moved"),
    ]  # fmt: skip
    _legend(figure, c.featured, marks)
    return ["arm", "seed", "update", *names], rows


def _draw_score(figure: Figure, c: Comparison) -> Table:
    figure.set_size_inches(8.4, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, f"Score, mean of {WINDOW} updates", "completions sampled", "mean score")
    _panel(right, "The same against time", "minutes of training", "")
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    rows = []
    for arm in c.arms:
        for run in arm.runs:
            minutes = np.nancumsum(_column(run.rows, "time/total")) / 60
            rows += [
                [arm.name, run.seed, row["completions"], round(t, 3), row["objective/score_mean"]]
                for row, t in zip(run.rows, minutes, strict=True)
            ]
        if arm in c.featured:
            score = _stacked(arm, "objective/score_mean", smooth=True)
            completions = np.nanmean(_stacked(arm, "completions"), axis=0)
            seconds = np.nanmean(_stacked(arm, "time/total"), axis=0)
            _band(left, arm, completions, score)
            _band(right, arm, np.cumsum(seconds) / 60, score)
    _legend(figure, c.featured)
    return ["arm", "seed", "completions", "minutes", "score"], rows


def _draw_prediction(figure: Figure, c: Comparison) -> Table | None:
    names = ["predicted_gain", "actual_gain", "predicted_kl", "kl"]
    arms = [
        arm for arm in c.arms
        if any(np.isfinite(_column(run.rows, "trust_region/predicted_kl")).any() for run in arm.runs)
    ]  # fmt: skip
    if not arms:
        return None
    figure.set_size_inches(8.4, 4.4)
    gain, kl = figure.subplots(1, 2)
    everything = [row for arm in arms for run in arm.runs for row in run.rows]
    for axes, x, y, title, unit in (
        (gain, names[0], names[1], "Surrogate gain of a step", "per completion"),
        (kl, names[2], names[3], "KL of a step", KL_UNIT),
    ):
        _agreement(axes, everything, f"trust_region/{x}", f"trust_region/{y}", title, unit)
    rows = [
        [arm.name, run.seed, row["update"], *(row.get(f"trust_region/{n}") for n in names)]
        for arm in arms for run in arm.runs for row in run.rows
    ]  # fmt: skip
    return ["arm", "seed", "update", *names], rows


def _draw_radar(figure: Figure, c: Comparison) -> Table:
    figure.set_size_inches(8.4, 6.4)
    grid = figure.subplots(2, 3)
    panels = {
        "completion_length": ("Completion length", "tokens"),
        "entropy": ("Entropy", "nats per token"),
        "eos_rate": ("End by themselves", "share"),
    }
    rows = []
    for axes, (name, (title, unit)) in zip(grid[0], panels.items(), strict=True):
        _panel(axes, title, "update", unit)
        for arm in c.featured:
            values = _stacked(arm, f"objective/{name}")
            _band(axes, arm, np.arange(1, values.shape[1] + 1), values)
        for arm in c.arms:
            rows += [
                [arm.name, run.seed, row["update"], name, row[f"objective/{name}"]]
                for run in arm.runs for row in run.rows
            ]  # fmt: skip
    scores = {arm.number: _scores(arm.runs[0]) for arm in c.featured}
    known = [s for per_update in scores.values() for s in per_update.values()]
    whole = np.concatenate(known) if known else np.zeros(1)
    bins = np.linspace(whole.min(), max(whole.max(), whole.min() + 1e-9), 21)
    for axes, which in zip(grid[1], ("first", "middle", "last"), strict=True):
        _panel(axes, f"Scores, {which} update", "score", "share" if which == "first" else "")
        for arm in c.featured:
            if which not in scores[arm.number]:
                continue
            counts, _ = np.histogram(scores[arm.number][which], bins)
            share = counts / max(1, counts.sum())
            axes.stairs(share, bins, color=arm.colour, linestyle=arm.style)
            rows += [
                [arm.name, arm.runs[0].seed, which, f"share of scores from {low:.3g}", value]
                for low, value in zip(bins, share, strict=False)
            ]
    _legend(figure, c.featured)
    return ["arm", "seed", "update", "what", "value"], rows


def _scores(run: Run) -> dict[str, np.ndarray]:
    """Return the scores of a run's first, middle and last update; nothing without completions."""
    file = run.folder / "completions.jsonl"
    if not file.is_file() or not run.rows:
        return {}
    last = run.rows[-1]["update"]
    wanted = {1: "first", (last + 1) // 2: "middle", last: "last"}
    found: dict[str, list[float]] = {}
    for row in read_json_lines(file):
        if row["update"] in wanted and row["score"] is not None:
            found.setdefault(wanted[row["update"]], []).append(row["score"])
    return {name: np.array(values) for name, values in found.items()}


FIGURES: dict[str, tuple[Callable[[Figure, Comparison], Table | None], str]] = {
    "frontier": (
        _draw_frontier,
        "Small dots are updates (training prompts, before the step), lines their running mean, "
        "circles the trained policies on held-out prompts, numbers the mean of an arm. No policy "
        "can lie above the dashed line: it is the reference reweighted by its own scores.",
    ),
    "trust_region": (
        _draw_trust_region,
        "How far each update moved the policy, measured exactly for every algorithm, though only "
        "those with a max_kl promise anything.",
    ),
    "score": (
        _draw_score,
        "Mean over seeds with its 95% interval. Minutes are this machine's, and other work on it "
        "shows.",
    ),
    "prediction": (
        _draw_prediction,
        "What the step's linear and quadratic models said, against what was measured.",
    ),
    "radar": (
        _draw_radar,
        "The reward-hacking radar: a policy that found a hole in the reward often gives itself "
        "away here. Histograms are of the first seed.",
    ),
}


# --- the page -------------------------------------------------------------------------------------

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
td.t, th.t { text-align: left; overflow-wrap: anywhere; }
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
        any(isinstance(row[i], str) and not row[i][:1].isdigit() and row[i] != NONE for row in rows)
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


def _key(arm: Arm) -> _Html:
    colour = "#" + "".join(f"{round(255 * x):02x}" for x in arm.colour)
    badge = f'<span class=key style="background:{colour}">{arm.number}</span>'
    return _Html(f"{badge} {html.escape(clean(arm.name))}")


def _spread(values: np.ndarray, digits: int = 3) -> str:
    """Return 'mean [low, high]'."""
    low, high = bootstrap_interval(values)
    mean = _mean(values)
    if not np.isfinite(mean):
        return NONE
    shown = f"{mean:.{digits}f}"
    return shown if low != low else f"{shown} [{low:.{digits}f}, {high:.{digits}f}]"


def _headline(c: Comparison, rows: list[dict[str, Any]]) -> str:
    items = []
    for row in rows:
        sure = row["low"] > 0 or row["high"] < 0
        interval = f", interval [{row['low']:+.3f}, {row['high']:+.3f}]" * (
            row["low"] == row["low"]
        )
        verdict = (
            ("is ahead by" if row["difference"] > 0 else "is behind by") if sure else "differs by"
        )
        items.append(
            f"<li>At {row['ref_kl']:.2f} nats {_key(row['arm'])} has {row['score']:.3f} and "
            f"{verdict} {row['difference']:+.3f}{interval} from {_key(row['rival'])} "
            f"({row['rival_score']:.3f}).</li>"
        )
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _results(c: Comparison) -> str:
    base = c.reference["held_out"]
    rows: list[list[Any]] = [[_Html("reference"), "", f"{base['score']:.3f}", "0", "", ""]]
    for arm in c.arms:
        score, kl = arm.values("score"), arm.values("ref_kl")
        limit = c.limit_at(_mean(kl))
        gained = (_mean(score) - base["score"]) / (limit - base["score"])
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
    return _table(header, rows)


def _aftermath(c: Comparison) -> str:
    base = c.reference["held_out"]
    columns = {
        "judge": ("judge's score", 3), "nll": ("nats per token on the reference's text", 3),
        "entropy": ("entropy, nats per token", 2), "distinct_2": ("distinct pairs of tokens", 3),
        "duplicates": ("repeated completions", 3), "length": ("tokens", 1),
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
        seconds = [_mean(np.array([np.nansum(_column(run.rows, f"time/{p}")) for run in arm.runs]))
                   for p in phases]  # fmt: skip
        passes = _mean(np.array([float(run.result.get("passes") or np.nan) for run in arm.runs]))
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
        _table(["setting", *(_key(arm) for arm in c.arms)], shown)
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
    (folder / "figures").mkdir(exist_ok=True)
    pictures = []
    for stem, (draw, caption) in FIGURES.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure()
            table = draw(figure, c)
            if table is None:
                continue
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
        (folder / "figures" / f"{stem}.png").write_bytes(buffer.getvalue())
        _write_csv(folder / "figures" / f"{stem}.csv", table)
        image = base64.b64encode(buffer.getvalue()).decode()
        pictures.append(
            f'<figure><img alt="{stem}" src="data:image/png;base64,{image}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    equal = at_equal_kl(c)
    seeds = _seeds(c)
    _write_csv(folder / "results.csv", seeds)
    seed_rows = [[_key(a), *row[1:]] for a, row in zip(
        (arm for arm in c.arms for _ in arm.runs), seeds[1], strict=True)]  # fmt: skip
    spec, held_out = c.arms[0].spec, c.reference["held_out"]
    completions = spec["updates"] * spec["prompts_per_update"] * spec["completions_per_prompt"]
    note = (
        "<p class=note>* this algorithm is told a price, not a distance: counted is whether a run "
        "ends within 10% of any of the distances that others were asked for.</p>"
    )
    parts = [
        "<h1>The same prompts, the same reward, the same number of completions</h1>",
        f"<p>{len(c.arms)} arms, {sum(len(a.runs) for a in c.arms)} runs of {completions:,} "
        f"completions. Model {_cell(_last(spec['model']))}, reward "
        f"{_cell(_last(spec['reward_model']))}, judge {_cell(_last(spec['judge'] or 'none'))}. The "
        f"reference scores {held_out['score']:.3f} on held-out prompts. Intervals are 95% bootstrap "
        "intervals over seeds.</p>",
        _headline(c, equal),
        pictures[0],
        "<h2>Results on held-out prompts</h2>", _results(c),
        "<h3>Did it end where it was asked to?</h3>",
        _table(["algorithm", "runs", "within 10% of the KL asked for", "collapsed"], kept_promises(c)),
        note,
        "<p class=note>Collapsed: score below the reference's, more than 20 nats, or a policy that "
        "could not be sampled.</p>",
        "<h2>What the KL is for</h2>",
        "<p class=note>A good policy pleases a judge that it was not trained on, still predicts the "
        f"reference's own text (the reference: {held_out['nll']:.3f} nats per token), and does not "
        "repeat itself.</p>", _aftermath(c),
        "<h2>On the way</h2>", *pictures[1:],
        "<h2>Samples</h2>", "<p class=note>Held-out prompts, first seed, nothing chosen.</p>",
        _samples(c),
        "<h2>Every run</h2>",
        _table(["arm", "seed", "score", "KL, nats", "judge", "nll", "distinct pairs", "repeated",
                "largest KL of an update", "rejected steps", "fault"], seed_rows),
        "<h2>Cost</h2>",
        "<p class=note>Means over seeds. Forward passes are counted outside sampling, in passes over "
        "one completion; Fisher products are not forward passes.</p>", _costs(c),
        "<h2>Settings</h2>", _settings(c),
    ]  # fmt: skip
    body = "\n".join(parts)
    page = folder / "comparison.html"
    page.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Comparison</title><style>{_CSS}</style></head>\n<body>{body}</body></html>\n",
        encoding="utf-8",
    )
    return page


def _last(path: str) -> str:
    return path.rstrip("/").split("/")[-1]


def _write_csv(path: Path, table: Table) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table[0])
        writer.writerows(table[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the page of a comparison again; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trpo_lm.comparison", description=main.__doc__)
    parser.add_argument("folder", help="output_dir of recipes/compare.py")
    try:
        print(write_page(parser.parse_args(arguments).folder))
    except TrpoLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
