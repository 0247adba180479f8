"""What a comparison shows: its runs, what can be said of them, and the figures.

Everything is read from what a `sweep` left in a folder: `reference.json` with the limit, and for
each run `metrics.jsonl`, `completions.jsonl` and `result.json`. Each figure returns its numbers
with the picture. `comparison_page` puts them on a page.

What the statistics are: an interval is the 95% percentile bootstrap of the mean over seeds (with
three seeds that is hardly more than their range). At equal KL a run is compared with another
algorithm's run of the same seed, stopped when its smoothed KL last was what the first one ended
with. The other algorithm's arm is the one that does best there, chosen after the fact: that
favours whichever algorithm has more arms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from trpo_lm.errors import TrpoLMError
from trpo_lm.report.figures import KL_UNIT, _agreement, _column, _panel
from trpo_lm.report.format import number
from trpo_lm.report.statistics import bootstrap_interval, mean
from trpo_lm.storage import read_json_lines

COLOURS = {
    "trpo": "#0072B2", "npg": "#56B4E9", "ppo": "#D55E00", "grpo": "#009E73", "rloo": "#CC79A7",
    "reinforce": "#E69F00", "trl-grpo": "#00533c", "trl-rloo": "#7d3c63",
}  # fmt: skip
OTHER = "#6e6e6e"
STYLES = ("-", "--", ":", "-.")
WINDOW = 5  # updates over which score and KL are averaged before they are compared
MANY = 6  # arms; of more than these only some are drawn in full
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

    def at(self, kl: float) -> tuple[float, float]:
        """Return smoothed KL and score when the KL last was `kl`; at the end, if it never was."""
        x, y = self.trajectory()
        if not len(x):
            return float("nan"), float("nan")
        below = np.flatnonzero(x <= kl)
        i = int(below[-1]) if len(below) else 0
        if i + 1 == len(x) or x[i + 1] <= x[i] or x[i] > kl:
            return float(x[i]), float(y[i])
        return kl, float(y[i] + (kl - x[i]) / (x[i + 1] - x[i]) * (y[i + 1] - y[i]))


@dataclass(frozen=True)
class Arm:
    """An algorithm with its settings, and its runs, one for each seed."""

    number: int
    name: str
    algorithm: str
    colour: Any
    style: Any
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
        """The arms drawn in full: all of a few; of many the first algorithm's and its rivals.

        The first algorithm's are those that were asked for a KL, or its best two; a rival is the
        arm of another algorithm that scores best, on average, at the KLs where these ended.
        """
        if len(self.arms) <= MANY:
            return self.arms
        first, *others = self.families().values()
        best = sorted(first, key=lambda arm: -mean(arm.values("score")))[:2]
        chosen = [arm for arm in first if arm.asked_kl] or [arm for arm in first if arm in best]
        ends = [mean(np.array([run.trajectory()[0][-1] for run in arm.runs if run.rows]))
                for arm in chosen]  # fmt: skip

        def score(arm: Arm) -> float:
            return mean(np.array([run.at(kl)[1] for run in arm.runs for kl in ends]))

        return chosen + [max(arms, key=lambda arm: np.nan_to_num(score(arm), nan=-np.inf))
                         for arms in others]  # fmt: skip

    def families(self) -> dict[str, list[Arm]]:
        """Return the arms by algorithm."""
        found: dict[str, list[Arm]] = {}
        for arm in self.arms:
            found.setdefault(arm.algorithm, []).append(arm)
        return found

    @property
    def limit_kl(self) -> float:
        """Where the limit ends, nats per completion."""
        return self.reference["limit"][-1]["ref_kl"]

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
        metrics = file.parent / "metrics.jsonl"  # absent where the first update failed
        rows = read_json_lines(metrics) if metrics.is_file() else []
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
    arms = []
    for number_, name in enumerate(names, 1):
        runs = sorted(found[name], key=lambda run: run.seed)
        arms.append(Arm(number_, name, runs[0].result["algorithm"], OTHER, "-", runs))
    reference = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    return _coloured(Comparison(reference, arms))


def _coloured(c: Comparison) -> Comparison:
    """Give each algorithm a colour, and shades of it to its arms: the featured ones come first."""
    looks: dict[int, dict[str, Any]] = {}
    for algorithm, arms in c.families().items():
        base = np.array(to_rgb(COLOURS.get(algorithm, OTHER)))
        for place, arm in enumerate(sorted(arms, key=lambda arm: arm not in c.featured)):
            shade = tuple(base + (1 - base) * 0.55 * (1 - 0.5**place))
            looks[arm.number] = {"colour": shade, "style": STYLES[place % len(STYLES)]}
    return replace(c, arms=[replace(arm, **looks[arm.number]) for arm in c.arms])


def _as_number(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


# --- statistics -----------------------------------------------------------------------------------


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average each value with the ones before it, up to `WINDOW` of them; the start stays as is."""
    return np.array([mean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))])


def at_equal_kl(comparison: Comparison) -> list[dict[str, Any]]:
    """Compare the first algorithm's arms with the best arm of every other, at the KL they ended.

    Returns:
        Rows of `arm`, `ref_kl`, `score`, `rival` (the arm), `rival_ref_kl` (less than `ref_kl` if
        it never came that far), `rival_score`, `difference`, `low` and `high` (its 95% interval
        over seeds).
    """
    families = comparison.families()
    rows = []
    for arm in next(iter(families.values())):
        ends = {run.seed: [float(v[-1]) for v in run.trajectory()] for run in arm.runs if run.rows}
        for rivals in list(families.values())[1:]:
            pairs = {
                i: {r.seed: r.at(ends[r.seed][0]) for r in rival.runs if r.seed in ends and r.rows}
                for i, rival in enumerate(rivals)
            }
            pairs = {i: found for i, found in pairs.items() if found}
            if not pairs:
                continue
            best = max(pairs, key=lambda i: mean(np.array(list(pairs[i].values()))[:, 1]))
            rival_kl, rival_score = np.array(list(pairs[best].values())).T
            gains = [ends[seed][1] - score for seed, (_, score) in pairs[best].items()]
            low, high = bootstrap_interval(gains)
            rows.append(
                {
                    "arm": arm,
                    "ref_kl": mean(np.array([end[0] for end in ends.values()])),
                    "score": mean(np.array([end[1] for end in ends.values()])),
                    "rival": rivals[best],
                    "rival_ref_kl": mean(rival_kl),
                    "rival_score": mean(rival_score),
                    "difference": mean(np.array(gains)),
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
                f"{near / total:.0%}{'' if own else ' *'}" if asked else "-",
                f"{collapsed / total:.0%}",
            ]
        )  # fmt: skip
    return rows


# --- figures --------------------------------------------------------------------------------------

Table = tuple[list[str], list[list[Any]]]


def _legend(figure: Figure, arms: Sequence[Arm], extra: Sequence[Any] = ()) -> None:
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
    axes.plot(x, [mean(v) for v in values.T], color=arm.colour, linestyle=arm.style)
    if len(values) > 1 and len(x):
        low, high = np.array([bootstrap_interval(c, draws=1000) for c in values.T]).T
        axes.fill_between(x, low, high, color=arm.colour, alpha=0.15, linewidth=0)


def _draw_frontier(figure: Figure, c: Comparison) -> Table:
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
        Line2D([], [], color=OTHER, marker="o", linestyle="", label="end of each run, held out"),
    ]
    _legend(figure, c.featured, marks)
    return ["arm", "seed", "update", "ref_kl", "score", "beta"], rows


def _draw_trust_region(figure: Figure, c: Comparison) -> Table:
    figure.set_size_inches(8.4, 7.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _panel(upper, "KL of each update, largest over seeds (log scale)", "", KL_UNIT)
    _panel(lower, "KL to the reference; dashed: budget", "update", KL_UNIT)
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
            update, ref_kl = _column(run.rows, "update"), _column(run.rows, names[3])
            lower.plot(update, ref_kl, linewidth=0.9, **look)
            rejected = update[_column(run.rows, names[2]) == 0]
            if len(rejected):
                (marks,) = upper.plot(
                    rejected, np.full(len(rejected), 0.02), "x", color=arm.colour, markersize=7,
                    clip_on=False, transform=upper.get_xaxis_transform(),
                )  # fmt: skip
                marks.set_in_layout(False)
        if arm.asked_kl:
            lower.axhline(arm.asked_kl, color=arm.colour, linestyle=(0, (6, 3)), linewidth=1)
    limits = sorted({arm.spec["max_kl"] for arm in c.featured if arm.spec.get("max_kl")})
    for limit in limits:
        upper.axhline(limit, color="black", linestyle="--", linewidth=1)
    top = [v for a in c.featured for r in a.runs for v in _column(r.rows, names[3]) if v == v]
    top += [arm.asked_kl for arm in c.featured if arm.asked_kl]
    lower.set_ylim(0, 1.05 * min(max(top, default=0.0), RUNAWAY_KL) or 1.0)
    told = ", ".join(number(limit) for limit in limits)
    signs = [
        Line2D([], [], color="black", linestyle="--", linewidth=1, label=f"max_kl = {told}")
    ] * bool(limits) + [
        Line2D([], [], color=OTHER, marker="x", linestyle="", label="rejected: nothing moved")
    ]
    _legend(figure, c.featured, signs)
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
        _agreement(axes, everything, f"trust_region/{x}", f"trust_region/{y}", title, unit)
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
        _panel(axes, title, "update", unit)
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
        "Small dots are updates (training prompts, before the step), thin lines their running mean "
        "in each run, thick lines the mean over seeds; circles are the trained policies on "
        "held-out prompts, numbers the mean of an arm. No policy can lie above the dashed line: "
        "it is the reference reweighted by its own scores. Of many arms only some are drawn in "
        "full: those told a KL, and of each other algorithm the arm that scores best at these KLs.",
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
