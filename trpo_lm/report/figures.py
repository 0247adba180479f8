"""The figures of a run, drawn from its files: `python -m trpo_lm.report RUN` redraws them.

Numbers are those of `metrics.jsonl`, limits those of `config.yaml`, and the histogram of scores is
that of `completions.jsonl`. The CSV beside each PNG holds just the columns that it shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from trpo_lm.cli import redraw
from trpo_lm.report.format import number
from trpo_lm.report.run_log import Rows, column, load_run
from trpo_lm.report.statistics import largest
from trpo_lm.report.style import BLUE, GREEN, GREY, KL_UNIT, VERMILION, Table, panel, save_figure
from trpo_lm.storage import read_json_lines, writable_folder

# --- panels: each draws one thing on one pair of axes ---------------------------------------------


def _updates(axes: Axes, rows: Rows) -> np.ndarray:
    """Set up the x-axis for updates; return them."""
    update = column(rows, "update")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, update[-1] + max(0.5, 0.03 * update[-1]))
    return update


def _limit(axes: Axes, value: float, text: str) -> None:
    """Draw a limit as a dashed line with its name above its left end."""
    axes.axhline(value, color=VERMILION, linestyle="--")
    axes.annotate(
        text, (0, value), xycoords=("axes fraction", "data"), xytext=(5, 3),
        textcoords="offset points", color=VERMILION, fontsize=9,
    )  # fmt: skip


def _score(axes: Axes, rows: Rows) -> None:
    completions, score = column(rows, "completions"), column(rows, "objective/score_mean")
    panel(axes, "Score", "completions sampled", "mean score")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(0, 1.04 * largest(completions) or 1)
    finite = score[np.isfinite(score)]
    if len(finite):
        axes.axhline(finite[0], color=GREY, linestyle=":", label="first update")
    axes.plot(completions, score, "o-", color=BLUE, label="training prompts")
    held_out = column(rows, "objective/eval_score_mean")
    if np.isfinite(held_out).any():
        axes.plot(completions, held_out, "D", color=GREEN, markersize=6, label="held-out prompts")
    axes.legend()


def _update_kl(axes: Axes, rows: Rows) -> None:
    limit = rows[0]["max_kl"]
    update, trials = _updates(axes, rows), column(rows, "line_search/trials")
    kl = column(rows, "kl_share" if limit else "trust_region/kl")
    rejected = column(rows, "line_search/accepted") == 0
    backtracked = (trials > 1) & ~rejected
    at_once = ~backtracked & ~rejected
    panel(axes, "KL of each update", "update", "share of max_kl" if limit else KL_UNIT)
    axes.vlines(update, 0, kl, color=BLUE, linewidth=1, alpha=0.35)
    axes.plot(update[at_once], kl[at_once], "o", color=BLUE, label="step taken")
    if backtracked.any():
        axes.plot(
            update[backtracked], kl[backtracked], "v", color="white", markeredgecolor=BLUE,
            markersize=6, label="backtracked",
        )  # fmt: skip
    if rejected.any():
        axes.plot(
            update[rejected], np.zeros(rejected.sum()), "x", color=VERMILION, markersize=8,
            markeredgewidth=2, clip_on=False, zorder=3, label="rejected",
        )  # fmt: skip
    if limit:
        _limit(axes, 1, f"max_kl = {number(limit)} nats")
        radius = column(rows, "trust_region/radius") / limit
        if (radius < 0.999).any():
            axes.step(update, radius, where="mid", color=GREY, linewidth=1, label="radius")
    axes.set_ylim(0, 1.3 * max(1.0 if limit else 0.0, largest(kl)) or None)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(
            loc="upper center", ncols=3, columnspacing=1, handletextpad=0.2, handlelength=1.2
        )


def _ref_kl(axes: Axes, rows: Rows) -> None:
    budget = rows[0]["max_ref_kl"]
    update, kl = _updates(axes, rows), column(rows, "objective/ref_kl")
    panel(axes, "KL to the reference", "update", KL_UNIT)
    axes.plot(update, kl, "o-", color=BLUE, clip_on=False, label="fresh completions")
    held_out = column(rows, "objective/eval_ref_kl")
    if np.isfinite(held_out).any():
        axes.plot(update, held_out, "D", color=GREEN, markersize=6, label="held-out prompts")
    if budget:
        _limit(axes, budget, f"max_ref_kl = {number(budget)} nats")
    axes.set_ylim(0, 1.15 * max(budget or 0.0, largest(kl), largest(held_out)) or None)
    axes.legend(loc="best")


def agreement(axes: Axes, rows: Rows, predicted: str, actual: str, title: str, unit: str) -> None:
    """Plot a quantity that the step predicted against its measured value, one point an update."""
    x, y = column(rows, predicted), column(rows, actual)
    rejected = column(rows, "line_search/accepted") == 0
    panel(axes, title, f"predicted ({unit})", f"actual ({unit})")
    both = np.concatenate([x, y])
    both = both[np.isfinite(both)]
    if len(both):
        low, high = min(0, both.min()), max(0, both.max())
        margin = 0.06 * (high - low) or 1.0
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
    axes.axline((0, 0), slope=1, color=GREY, linestyle="--", label="actual = predicted")
    axes.plot(x[~rejected], y[~rejected], "o", color=BLUE, alpha=0.7, label="step taken")
    if rejected.any():
        axes.plot(x[rejected], y[rejected], "x", color=VERMILION, label="rejected")
    axes.set_aspect("equal")
    axes.legend()


# --- figures: panels side by side -----------------------------------------------------------------


def _draw_score(figure: Figure, rows: Rows) -> None:
    figure.set_size_inches(6.4, 3.8)
    _score(figure.subplots(), rows)


def _draw_trust_region(figure: Figure, rows: Rows) -> None:
    figure.set_size_inches(6.4, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _update_kl(upper, rows)
    _ref_kl(lower, rows)
    upper.set_xlabel("")


def _draw_frontier(figure: Figure, rows: Rows) -> None:
    figure.set_size_inches(6.4, 4.2)
    axes = figure.subplots()
    kl, score = column(rows, "objective/ref_kl"), column(rows, "objective/score_mean")
    budget = rows[0]["max_ref_kl"]
    title = "What the score costs: each point is one update"
    panel(axes, title, f"KL to the reference ({KL_UNIT})", "mean score")
    axes.plot(kl, score, color="#bbbbbb", linewidth=1)
    points = axes.scatter(
        kl, score, c=column(rows, "update"), cmap="viridis", s=30, edgecolors="#333333",
        linewidths=0.4, zorder=3,
    )  # fmt: skip
    if budget:
        label = f"max_ref_kl = {number(budget)} nats"
        axes.axvline(budget, color=VERMILION, linestyle="--", label=label)
        axes.legend(loc="upper left")
    widest = max(budget or 0.0, largest(kl)) or 1.0
    axes.set_xlim(-0.02 * widest, 1.05 * widest)
    if len(rows) > 1:
        ticks = MaxNLocator(6, integer=True)
        figure.colorbar(points, label="update", ticks=ticks, pad=0.02).outline.set_visible(False)


def _draw_prediction(figure: Figure, rows: Rows) -> None:
    figure.set_size_inches(8.4, 4.2)
    gain, kl = figure.subplots(1, 2)
    agreement(
        gain, rows, "trust_region/predicted_gain", "trust_region/actual_gain",
        "Surrogate gain of a step", "per completion",
    )  # fmt: skip
    agreement(
        kl, rows, "trust_region/predicted_kl", "trust_region/kl",
        "KL of a step", KL_UNIT,
    )  # fmt: skip


def _draw_radar(figure: Figure, rows: Rows) -> None:
    figure.set_size_inches(8.4, 5)
    panels = {
        "Completion length": ("objective/completion_length", "tokens"),
        "Entropy": ("objective/entropy", "nats per token"),
        "Completions that end by themselves": ("objective/eos_rate", "share"),
        "Score, with one standard deviation": ("objective/score_mean", "score"),
    }
    grid = figure.subplots(2, 2, sharex=True)
    for axes, (title, (name, unit)) in zip(grid.flat, panels.items(), strict=True):
        panel(axes, title, "update" if axes in grid[1] else "", unit)
        update = _updates(axes, rows)
        axes.plot(update, column(rows, name), "o-", color=BLUE)
    mean, std = column(rows, "objective/score_mean"), column(rows, "objective/score_std")
    update = column(rows, "update")
    grid[1, 1].fill_between(update, mean - std, mean + std, color=BLUE, alpha=0.15, linewidth=0)
    grid[1, 0].set_ylim(-0.03, 1.03)


def _draw_overview(figure: Figure, rows: Rows) -> None:
    figure.set_size_inches(11, 3.4)
    score, update_kl, ref_kl = figure.subplots(1, 3)
    _score(score, rows)
    _update_kl(update_kl, rows)
    _ref_kl(ref_kl, rows)


_SCORE = ["objective/score_mean", "completions", "objective/eval_score_mean"]
_UPDATE_KL = [
    "trust_region/kl", "max_kl", "kl_share", "trust_region/radius",
    "line_search/trials", "line_search/accepted",
]  # fmt: skip
_REF_KL = ["objective/ref_kl", "objective/eval_ref_kl", "max_ref_kl"]

# By file name: the drawing, and the columns it shows; skipped if the first is all null.
FIGURES: dict[str, tuple[Callable[[Figure, Rows], None], list[str]]] = {
    "score": (_draw_score, _SCORE),
    "trust_region": (_draw_trust_region, [*_UPDATE_KL, *_REF_KL]),
    "frontier": (_draw_frontier, ["objective/ref_kl", "objective/score_mean", "max_ref_kl"]),
    "prediction": (
        _draw_prediction,
        [
            "trust_region/predicted_gain", "trust_region/actual_gain",
            "trust_region/predicted_kl", "trust_region/kl", "line_search/accepted",
        ],
    ),
    "radar": (
        _draw_radar,
        [
            "objective/completion_length", "objective/entropy", "objective/eos_rate",
            "objective/score_mean", "objective/score_std",
        ],
    ),
    "overview": (_draw_overview, [*_SCORE, *_UPDATE_KL, *_REF_KL]),
}  # fmt: skip


def plot_run(run_dir: str | Path, out: str | Path | None = None) -> list[Path]:
    """Draw every figure that the run has numbers for, as PNG and CSV of the same stem.

    Args:
        run_dir: Folder with `metrics.jsonl`, and `config.yaml` for the limits.
        out: Folder for the figures; `run_dir/plots` by default.

    Returns:
        The files written.

    Raises:
        TrpoLMError: If the run cannot be read or has no row.
    """
    rows = load_run(run_dir)
    out = writable_folder(Path(run_dir) / "plots" if out is None else Path(out).resolve())
    files = []
    for stem, (draw, columns) in FIGURES.items():
        files += save_figure(out / stem, _draw, rows, draw, columns)
    completions = Path(run_dir) / "completions.jsonl"
    if completions.exists():
        files += save_figure(out / "scores", _draw_scores, completions)
    return files


def _draw(
    figure: Figure, rows: Rows, draw: Callable[[Figure, Rows], None], columns: Sequence[str]
) -> Table | None:
    """Draw one of `FIGURES` and return its columns; None if the first of them is all null."""
    if np.isnan(column(rows, columns[0])).all():
        return None
    draw(figure, rows)
    names = list(dict.fromkeys(["update", *columns]))
    return names, [[row.get(name) for name in names] for row in rows]


def _draw_scores(figure: Figure, completions: Path) -> Table | None:
    """Draw the scores of the first, the middle and the last update as histograms of shares."""
    scores: dict[int, list[float]] = {}
    for row in read_json_lines(completions):
        if row.get("score") is not None:
            scores.setdefault(row["update"], []).append(row["score"])
    updates = sorted(scores)
    if not updates:
        return None
    updates = sorted({updates[0], updates[len(updates) // 2], updates[-1]})
    edges = np.histogram_bin_edges(np.concatenate([scores[u] for u in updates]), bins=20)
    shares = [np.histogram(scores[u], edges)[0] / len(scores[u]) for u in updates]
    names = [f"update {u}" for u in updates]
    figure.set_size_inches(6.4, 3.8)
    axes = figure.subplots()
    panel(axes, "Scores of an update's completions", "score", "share of completions")
    looks = zip(names, shares, (GREY, GREEN, BLUE), (":", "--", "-"), strict=False)
    for name, share, colour, line in looks:
        axes.stairs(share, edges, color=colour, linestyle=line, linewidth=2, label=name)
    axes.set_ylim(0)
    axes.legend()
    bins = zip(edges[:-1].tolist(), edges[1:].tolist(), *shares, strict=True)
    return ["from", "to", *names], list(bins)


def main(arguments: Sequence[str] | None = None) -> int:
    """Redraw the figures of a run."""
    parser = argparse.ArgumentParser(prog="python -m trpo_lm.report", description=main.__doc__)
    parser.add_argument("run", help="folder that holds metrics.jsonl")
    parser.add_argument("--out", help="folder for the figures; default: RUN/plots")
    options = parser.parse_args(arguments)
    return redraw(lambda: print(*plot_run(options.run, options.out), sep="\n"))
