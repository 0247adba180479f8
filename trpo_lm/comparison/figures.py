"""The figures of a comparison; each function draws one and returns the numbers it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from trpo_lm.comparison.results import RUNAWAY_KL, WINDOW, ArmResults, Comparison, Run, running_mean
from trpo_lm.report.figures import agreement
from trpo_lm.report.format import number
from trpo_lm.report.run_log import column
from trpo_lm.report.statistics import bootstrap_interval, mean
from trpo_lm.report.style import GREY, KL_UNIT, Table, panel
from trpo_lm.storage import read_json_lines


def _legend(figure: Figure, arms: Sequence[ArmResults], extra: Sequence[Any] = ()) -> None:
    handles = [
        Line2D([], [], color=a.colour, linestyle=a.style, label=f"{a.number}  {a.name}")
        for a in arms
    ]
    figure.legend(handles=[*handles, *extra], loc="outside lower left", ncols=2, borderaxespad=0.3)


def _stacked(arm: ArmResults, name: str, smooth: bool = False) -> np.ndarray:
    """Return a metric of an arm's runs, (runs, updates); nan after the end of a shorter run."""
    columns = [column(run.rows, name) for run in arm.runs]
    columns = [running_mean(c) for c in columns] if smooth else columns
    longest = max(map(len, columns))
    return np.array([np.pad(c, (0, longest - len(c)), constant_values=np.nan) for c in columns])


def _band(axes: Axes, arm: ArmResults, x: np.ndarray, values: np.ndarray) -> None:
    """Draw the mean over runs and, if there are several, its 95% interval."""
    axes.plot(x, [mean(v) for v in values.T], color=arm.colour, linestyle=arm.style)
    if len(values) > 1 and len(x):
        low, high = np.array([bootstrap_interval(c, draws=1000) for c in values.T]).T
        axes.fill_between(x, low, high, color=arm.colour, alpha=0.15, linewidth=0)


def _draw_frontier(figure: Figure, c: Comparison) -> Table:
    figure.set_size_inches(8.4, 5.6)
    axes = figure.subplots()
    panel(axes, "What the score costs", f"KL to the reference ({KL_UNIT})", "mean score")
    limit = [[row[k] for k in ("ref_kl", "score", "beta")] for row in c.reference["limit"]]
    axes.plot([r[0] for r in limit], [r[1] for r in limit], color="black", linestyle="--")
    rows: list[list[Any]] = [["limit", "", "", kl, score, beta] for kl, score, beta in limit]
    for arm in c.arms:
        for run in arm.runs:
            x, y = (column(run.rows, f"objective/{n}") for n in ("ref_kl", "score_mean"))
            rows += [
                [arm.name, run.seed, i + 1, *p, ""] for i, p in enumerate(zip(x, y, strict=True))
            ]
            rows.append(
                [arm.name, run.seed, "end", run.held_out("ref_kl"), run.held_out("score"), ""]
            )
            if arm in c.featured:
                axes.plot(x, y, ".", color=arm.colour, markersize=2, alpha=0.3)
                axes.plot(*run.trajectory(), color=arm.colour, linewidth=0.6, alpha=0.4)
        if arm in c.featured:
            paths = [_stacked(arm, f"objective/{n}", smooth=True) for n in ("ref_kl", "score_mean")]
            axes.plot(*([mean(v) for v in p.T] for p in paths), color=arm.colour,
                      linestyle=arm.style)  # fmt: skip
    ends, widest = [], limit[-1][0]
    for arm in c.arms:
        kl, score = arm.values("ref_kl"), arm.values("score")
        axes.plot(kl, score, "o", color=arm.colour, markersize=4, alpha=0.6)
        if not np.isfinite(kl).any():
            continue
        ends.append(mean(kl))
        if arm in c.featured:
            widest = max(widest, mean(kl) if mean(kl) <= RUNAWAY_KL else 0.0)
            axes.annotate(
                str(arm.number), (mean(kl), mean(score)), ha="center", va="center", fontsize=8,
                color="white", zorder=5, annotation_clip=True,
                bbox={"boxstyle": "circle,pad=0.25", "fc": arm.colour, "ec": "white"},
            )  # fmt: skip
    axes.set_xlim(-0.02 * widest, 1.08 * widest)
    beyond = sum(kl > 1.08 * widest for kl in ends)
    if beyond:
        arms = f"{beyond} arm{'s' * (beyond > 1)}"
        axes.set_xlabel(f"KL to the reference ({KL_UNIT}); {arms} ended beyond {1.08 * widest:.1f}")
    marks = [
        Line2D([], [], color="black", linestyle="--", label="limit: tilted reference"),
        Line2D([], [], color=GREY, marker="o", linestyle="", label="end of each run, held out"),
    ]
    _legend(figure, c.featured, marks)
    return ["arm", "seed", "update", "ref_kl", "score", "beta"], rows


def _draw_trust_region(figure: Figure, c: Comparison) -> Table:
    figure.set_size_inches(8.4, 7.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    panel(upper, "KL of each update, largest over seeds (log scale)", "", KL_UNIT)
    panel(lower, "KL to the reference; dashed: budget", "update", KL_UNIT)
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    upper.yaxis.set_minor_formatter(NullFormatter())
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    names = ["trust_region/kl", "line_search/trials", "line_search/accepted", "objective/ref_kl"]
    rows = []
    for arm in c.arms:
        for run in arm.runs:
            rows += [[arm.name, run.seed, row["update"], *map(row.get, names)] for row in run.rows]
        if arm not in c.featured or not any(run.rows for run in arm.runs):
            continue
        look = {"color": arm.colour, "linestyle": arm.style}
        kls = _stacked(arm, names[0])
        kls[~(kls > 0)] = np.nan
        updates = np.arange(1, kls.shape[1] + 1)
        upper.plot(updates, np.fmax.reduce(kls), linewidth=1, **look)
        for run in arm.runs:
            update, ref_kl = column(run.rows, "update"), column(run.rows, names[3])
            lower.plot(update, ref_kl, linewidth=0.9, **look)
            rejected = update[column(run.rows, names[2]) == 0]
            if len(rejected):
                (crosses,) = upper.plot(
                    rejected, np.full(len(rejected), 0.02), "x", color=arm.colour, markersize=7,
                    clip_on=False, transform=upper.get_xaxis_transform(),
                )  # fmt: skip
                crosses.set_in_layout(False)
        if arm.target_kl:
            lower.axhline(arm.target_kl, color=arm.colour, linestyle=(0, (6, 3)), linewidth=1)
    limits = sorted({arm.spec["max_kl"] for arm in c.featured if arm.spec.get("max_kl")})
    for limit in limits:
        upper.axhline(limit, color="black", linestyle="--", linewidth=1)
    top = [v for a in c.featured for r in a.runs for v in column(r.rows, names[3]) if v == v]
    top += [arm.target_kl for arm in c.featured if arm.target_kl]
    lower.set_ylim(0, 1.05 * min(max(top, default=0.0), RUNAWAY_KL) or 1.0)
    marks = [Line2D([], [], color=GREY, marker="x", linestyle="", label="rejected: nothing moved")]
    if limits:
        label = f"max_kl = {', '.join(map(number, limits))}"
        marks.insert(0, Line2D([], [], color="black", linestyle="--", linewidth=1, label=label))
    _legend(figure, c.featured, marks)
    return ["arm", "seed", "update", *names], rows


def _draw_score(figure: Figure, c: Comparison) -> Table:
    figure.set_size_inches(8.4, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    panel(left, f"Score, mean of {WINDOW} updates", "completions sampled", "mean score")
    panel(right, "The same against time", "minutes of training", "")
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    rows = []
    for arm in c.arms:
        for run in arm.runs:
            minutes = np.nancumsum(column(run.rows, "time/total")) / 60
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
        if any(row.get("trust_region/predicted_kl") is not None for r in arm.runs for row in r.rows)
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
        agreement(axes, everything, f"trust_region/{x}", f"trust_region/{y}", title, unit)
        axes.xaxis.set_major_locator(MaxNLocator(5))
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
        panel(axes, title, "update", unit)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for arm in c.featured:
            values = _stacked(arm, f"objective/{name}")
            _band(axes, arm, np.arange(1, values.shape[1] + 1), values)
        for arm in c.arms:
            rows += [
                [arm.name, run.seed, row["update"], name, row[f"objective/{name}"]]
                for run in arm.runs for row in run.rows
            ]  # fmt: skip
    scores = {arm.number: _scores(arm.runs[0]) for arm in c.featured}
    pool = [s for stages in scores.values() for s in stages.values()] or [np.zeros(1)]
    low, high = np.min(np.concatenate(pool)), np.max(np.concatenate(pool))
    bins = np.linspace(low, max(high, low + 1e-9), 21)
    for axes, stage in zip(grid[1], ("first", "middle", "last"), strict=True):
        panel(axes, f"Scores, {stage} update", "score", "share" if stage == "first" else "")
        for arm in c.featured:
            if stage not in scores[arm.number]:
                continue
            counts, _ = np.histogram(scores[arm.number][stage], bins)
            share = counts / max(1, counts.sum())
            axes.stairs(share, bins, color=arm.colour, linestyle=arm.style)
            rows += [
                [arm.name, arm.runs[0].seed, stage, f"share of scores from {low:.3g}", value]
                for low, value in zip(bins, share, strict=False)
            ]
    _legend(figure, c.featured)
    return ["arm", "seed", "update", "what", "value"], rows


def _scores(run: Run) -> dict[str, np.ndarray]:
    """Return the scores of a run's first, middle and last update; none without completions."""
    file = run.folder / "completions.jsonl"
    if not file.is_file() or not run.rows:
        return {}
    last = run.rows[-1]["update"]
    stages = {1: "first", (last + 1) // 2: "middle", last: "last"}
    scores: dict[str, list[float]] = {}
    for row in read_json_lines(file):
        if row["update"] in stages and row["score"] is not None:
            scores.setdefault(stages[row["update"]], []).append(row["score"])
    return {stage: np.array(values) for stage, values in scores.items()}


# By file name: the drawing, and its caption.
FIGURES: dict[str, tuple[Callable[[Figure, Comparison], Table | None], str]] = {
    "frontier": (
        _draw_frontier,
        "Small dots are updates (training prompts, before the step), thin lines their running mean "
        "in each run, thick lines the mean over seeds; circles are the trained policies on "
        "held-out prompts, numbers the mean of an arm. No policy can lie above the dashed line: "
        "it is the reference reweighted by its own scores. Of many arms only some are drawn in "
        "full: those with a target KL, and the arm of each other algorithm that scores best at "
        "these KLs.",
    ),
    "trust_region": (
        _draw_trust_region,
        "How far each update moved the policy, measured exactly for every algorithm, although only "
        "those with a max_kl bound it.",
    ),
    "score": (
        _draw_score,
        "Mean over seeds with its 95% interval. Minutes depend on the machine and its other load.",
    ),
    "prediction": (
        _draw_prediction,
        "Predictions of the step's linear and quadratic models against measured values.",
    ),
    "radar": (
        _draw_radar,
        "Signs of reward hacking: a policy that exploits a flaw of the reward often shows here. "
        "Histograms are of the first seed.",
    ),
}
