"""The runs of a comparison, and their statistics.

They are read from the folder of a `sweep`: `reference.json` with the limit, and for each run
`metrics.jsonl` and `result.json`.

An interval is the 95% percentile bootstrap of the mean over seeds (with three seeds hardly more
than their range). At equal KL a run is compared with a rival: another algorithm's run of the same
seed, read at the last update at which its smoothed KL equalled the first run's final KL. The
rival's arm is the one that scores best there, chosen after the fact, which favours algorithms with
more arms.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb

from trpo_lm.errors import TrpoLMError
from trpo_lm.report.run_log import column
from trpo_lm.report.statistics import bootstrap_interval, mean
from trpo_lm.report.style import BLUE, GREEN, GREY, VERMILION
from trpo_lm.storage import Row, read_json_lines

COLOURS = {
    "trpo": BLUE, "npg": "#56B4E9", "ppo": VERMILION, "grpo": GREEN, "rloo": "#CC79A7",
    "reinforce": "#E69F00", "trl-grpo": "#00533c", "trl-rloo": "#7d3c63",
}  # fmt: skip
LINE_STYLES = ("-", "--", ":", "-.")
WINDOW = 5  # updates over which score and KL are averaged before they are compared
MANY = 6  # arms; of more than these only the featured ones are drawn in full
RUNAWAY_KL = 20.0  # nats per completion; a run that ends above it has collapsed


@dataclass(frozen=True)
class Run:
    """One arm with one seed: its result.json and the rows of its metrics."""

    seed: int
    folder: Path
    result: Row
    rows: list[Row]

    def held_out(self, name: str) -> float:
        """Return a measurement on held-out prompts; nan if there is none."""
        value = (self.result.get("held_out") or {}).get(name)
        return float("nan") if value is None else float(value)

    def trajectory(self) -> tuple[np.ndarray, np.ndarray]:
        """Return KL and score of the updates, each averaged over up to `WINDOW` updates."""
        names = ("objective/ref_kl", "objective/score_mean")
        kl, score = (running_mean(column(self.rows, name)) for name in names)
        return kl, score

    def at(self, kl: float) -> tuple[float, float]:
        """Return smoothed KL and score where the KL last was `kl`; at the end if it never was."""
        x, y = self.trajectory()
        if not len(x):
            return float("nan"), float("nan")
        below = np.flatnonzero(x <= kl)
        i = int(below[-1]) if len(below) else 0
        if i + 1 == len(x) or x[i + 1] <= x[i] or x[i] > kl:
            return float(x[i]), float(y[i])
        return kl, float(y[i] + (kl - x[i]) / (x[i + 1] - x[i]) * (y[i + 1] - y[i]))


@dataclass(frozen=True)
class ArmResults:
    """An algorithm with its settings, and its runs, one per seed."""

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
    def spec(self) -> Row:
        """The settings shared by its runs."""
        return self.runs[0].result["spec"]

    @property
    def target_kl(self) -> float | None:
        """The reference KL that was asked for: a budget, or the target of an adaptive beta."""
        return self.spec.get("max_ref_kl") or self.spec.get("target_ref_kl")


@dataclass(frozen=True)
class Comparison:
    """The reference with its limit, and the arms."""

    reference: Row
    arms: list[ArmResults]

    @property
    def featured(self) -> list[ArmResults]:
        """The arms drawn in full: all of a few; of many, the first algorithm's and its rivals.

        The first algorithm's are those with a target KL, or else its best two; a rival is the arm
        of another algorithm that scores best, on average, at the final KLs of these.
        """
        if len(self.arms) <= MANY:
            return self.arms
        first, *others = self.families().values()
        best = sorted(first, key=lambda arm: -mean(arm.values("score")))[:2]
        leading = [arm for arm in first if arm.target_kl] or [arm for arm in first if arm in best]
        ends = [mean(np.array([run.trajectory()[0][-1] for run in arm.runs if run.rows]))
                for arm in leading]  # fmt: skip

        def score(arm: ArmResults) -> float:
            return mean(np.array([run.at(kl)[1] for run in arm.runs for kl in ends]))

        return leading + [max(arms, key=lambda arm: np.nan_to_num(score(arm), nan=-np.inf))
                          for arms in others]  # fmt: skip

    def families(self) -> dict[str, list[ArmResults]]:
        """Return the arms by algorithm."""
        families: dict[str, list[ArmResults]] = {}
        for arm in self.arms:
            families.setdefault(arm.algorithm, []).append(arm)
        return families

    @property
    def limit_kl(self) -> float:
        """Where the curve of the limit ends, nats per completion."""
        return self.reference["limit"][-1]["ref_kl"]

    def limit_at(self, kl: float) -> float:
        """Return the best score attainable at a KL; nan beyond the curve."""
        x, y = (column(self.reference["limit"], name) for name in ("ref_kl", "score"))
        return float(np.interp(kl, x, y, right=np.nan))


def load_comparison(folder: str | Path) -> Comparison:
    """Read the finished runs in the folder of a comparison.

    Raises:
        TrpoLMError: If the reference was not measured or no run is finished yet.
    """
    folder = Path(folder)
    files = sorted((folder / "runs").glob("*/seed-*/result.json"))
    if not (folder / "reference.json").is_file() or not files:
        raise TrpoLMError(
            "no run of a comparison is finished here", where=str(folder),
            hint="run `trpo-lm compare` with --output_dir set to this folder",
        )  # fmt: skip
    runs: dict[str, list[Run]] = {}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        metrics = file.parent / "metrics.jsonl"  # absent where the first update failed
        rows = read_json_lines(metrics) if metrics.is_file() else []
        runs.setdefault(result["arm"], []).append(Run(result["seed"], file.parent, result, rows))
    arms = []
    for number, name in enumerate(sorted(runs, key=lambda name: _place(runs[name][0].result)), 1):
        seeds = sorted(runs[name], key=lambda run: run.seed)
        arms.append(ArmResults(number, name, seeds[0].result["algorithm"], GREY, "-", seeds))
    reference = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    return _coloured(Comparison(reference, arms))


def _place(result: Row) -> tuple[int, list[tuple[str, Any]]]:
    """Return the sort key of an arm: its algorithm in the order of `COLOURS`, then its settings."""
    algorithm, order = result["algorithm"], list(COLOURS)
    place = order.index(algorithm) if algorithm in order else len(order)
    return place, [(name, _as_number(text)) for name, text in result["given"].items()]


def _as_number(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


def _coloured(c: Comparison) -> Comparison:
    """Give each algorithm a colour and its arms shades of it, the darkest to featured ones."""
    looks: dict[int, Row] = {}
    for algorithm, arms in c.families().items():
        base = np.array(to_rgb(COLOURS.get(algorithm, GREY)))
        for place, arm in enumerate(sorted(arms, key=lambda arm: arm not in c.featured)):
            shade = tuple(base + (1 - base) * 0.55 * (1 - 0.5**place))
            looks[arm.number] = {"colour": shade, "style": LINE_STYLES[place % len(LINE_STYLES)]}
    return replace(c, arms=[replace(arm, **looks[arm.number]) for arm in c.arms])


# --- statistics -----------------------------------------------------------------------------------


def running_mean(values: np.ndarray) -> np.ndarray:
    """Average each value with those before it, over up to `WINDOW` values."""
    return np.array([mean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))])


def at_equal_kl(comparison: Comparison) -> list[Row]:
    """Compare the first algorithm's arms with the best arm of every other at their final KL.

    Returns:
        Rows of `arm`, `ref_kl`, `score`, `rival` (an arm), `rival_ref_kl` (below `ref_kl` if the
        rival never got that far), `rival_score`, `difference`, `low` and `high` (its 95% interval
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
            pairs = {i: pair for i, pair in pairs.items() if pair}
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


def outcomes(comparison: Comparison) -> list[list[Any]]:
    """Return for each algorithm its number of runs, and the shares on target and collapsed.

    A run is on target if it ends within 10% of the KL asked for; without one, of any other arm's,
    which is marked by an asterisk.
    """
    targets = sorted({arm.target_kl for arm in comparison.arms if arm.target_kl})
    base = comparison.reference["held_out"]["score"]
    rows = []
    for algorithm, arms in comparison.families().items():
        near = collapsed = total = 0
        for arm in arms:
            goals = [arm.target_kl] if arm.target_kl else targets
            for run in arm.runs:
                kl, score = run.held_out("ref_kl"), run.held_out("score")
                total += 1
                near += any(abs(kl - k) <= 0.1 * k for k in goals)
                collapsed += not (score >= base and kl <= RUNAWAY_KL)
        mark = "" if all(arm.target_kl for arm in arms) else " *"
        rows.append(
            [
                algorithm, total,
                f"{near / total:.0%}{mark}" if targets else "-",
                f"{collapsed / total:.0%}",
            ]
        )  # fmt: skip
    return rows
