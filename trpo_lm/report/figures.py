"""What a run leaves to look at: figures with their numbers, and a model card.

Everything is drawn from `metrics.jsonl` and the limits in `config.yaml` (the histogram of scores
from `completions.jsonl`), so a run of last year can be drawn again: `python -m trpo_lm.report RUN`.
Beside each PNG lies a CSV with just the columns that it shows. Colours are Okabe and Ito's, which
colour-blind readers can tell apart, and meaning never rests on colour alone. Figures are made
without pyplot: no backend, no global state.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from trpo_lm.cli import redraw
from trpo_lm.errors import TrpoLMError
from trpo_lm.report.format import clean, number
from trpo_lm.storage import read_json_lines

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6e6e6e"
KL_UNIT = "nats per completion"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.06,
    "savefig.dpi": 150,
}
Rows = Sequence[Mapping[str, Any]]


def load_run(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `metrics.jsonl`, each with the limits it ran under.

    Added to every row: `max_kl` and `max_ref_kl` (nats per completion, None where there was no
    limit) and `kl_share`, the update's KL as a share of `max_kl`. The limits are those of
    `config.yaml`; where it has no `max_kl`, the largest radius of a row stands for it.

    Raises:
        TrpoLMError: If there is no row, or a file cannot be understood.
    """
    run_dir = Path(run_dir)
    rows = read_json_lines(run_dir / "metrics.jsonl")
    if not rows:
        raise TrpoLMError("no update was recorded yet", where=str(run_dir / "metrics.jsonl"))
    radii = [row["trust_region/radius"] for row in rows if row.get("trust_region/radius")]
    limits: dict[str, Any] = {"max_kl": max(radii, default=None)}
    config = run_dir / "config.yaml"
    if config.exists():
        try:
            settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise TrpoLMError("not YAML", where=str(config)) from error
        if not isinstance(settings, dict):
            raise TrpoLMError("not a mapping of settings", where=str(config))
        limits |= settings
    max_kl, max_ref_kl = limits.get("max_kl"), limits.get("max_ref_kl")
    for row in rows:
        kl = row.get("trust_region/kl")
        share = kl / max_kl if max_kl and kl is not None else None
        row.update(max_kl=max_kl, max_ref_kl=max_ref_kl, kl_share=share)
    return rows


def _column(rows: Rows, name: str) -> np.ndarray:
    """Return a metric of every update as floats; nan where it is null."""
    values = (row.get(name) for row in rows)
    return np.array([float(v) if isinstance(v, int | float) else np.nan for v in values])


# --- panels: each draws one thing on one pair of axes ---------------------------------------------


def _panel(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _updates(axes: Axes, rows: Rows) -> np.ndarray:
    """Make the x-axis one of updates; return them."""
    update = _column(rows, "update")
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
    completions, score = _column(rows, "completions"), _column(rows, "objective/score_mean")
    _panel(axes, "Score", "completions sampled", "mean score")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(0, 1.04 * _largest(completions) or 1)
    measured = score[np.isfinite(score)]
    if len(measured):
        axes.axhline(measured[0], color=GREY, linestyle=":", label="first update")
    axes.plot(completions, score, "o-", color=BLUE, label="training prompts")
    held_out = _column(rows, "objective/eval_score_mean")
    if np.isfinite(held_out).any():
        axes.plot(completions, held_out, "D", color=GREEN, markersize=6, label="held-out prompts")
    axes.legend()


def _update_kl(axes: Axes, rows: Rows) -> None:
    limit = rows[0]["max_kl"]
    update, trials = _updates(axes, rows), _column(rows, "line_search/trials")
    kl = _column(rows, "kl_share" if limit else "trust_region/kl")
    rejected = _column(rows, "line_search/accepted") == 0
    backtracked = (trials > 1) & ~rejected
    at_once = ~backtracked & ~rejected
    _panel(axes, "KL of each update", "update", "share of max_kl" if limit else KL_UNIT)
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
        radius = _column(rows, "trust_region/radius") / limit
        if (radius < 0.999).any():
            axes.step(update, radius, where="mid", color=GREY, linewidth=1, label="radius")
    axes.set_ylim(0, 1.3 * max(1.0 if limit else 0.0, _largest(kl)) or None)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(
            loc="upper center", ncols=3, columnspacing=1, handletextpad=0.2, handlelength=1.2
        )


def _ref_kl(axes: Axes, rows: Rows) -> None:
    budget = rows[0]["max_ref_kl"]
    update, kl = _updates(axes, rows), _column(rows, "objective/ref_kl")
    _panel(axes, "KL to the reference", "update", KL_UNIT)
    axes.plot(update, kl, "o-", color=BLUE, clip_on=False, label="fresh completions")
    held_out = _column(rows, "objective/eval_ref_kl")
    if np.isfinite(held_out).any():
        axes.plot(update, held_out, "D", color=GREEN, markersize=6, label="held-out prompts")
    if budget:
        _limit(axes, budget, f"max_ref_kl = {number(budget)} nats")
    axes.set_ylim(0, 1.15 * max(budget or 0.0, _largest(kl), _largest(held_out)) or None)
    axes.legend(loc="lower right")


def _largest(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)].max(initial=0))


def _agreement(axes: Axes, rows: Rows, predicted: str, actual: str, title: str, unit: str) -> None:
    x, y = _column(rows, predicted), _column(rows, actual)
    rejected = _column(rows, "line_search/accepted") == 0
    _panel(axes, title, f"predicted ({unit})", f"actual ({unit})")
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
    kl, score = _column(rows, "objective/ref_kl"), _column(rows, "objective/score_mean")
    budget = rows[0]["max_ref_kl"]
    title = "What the score costs: each point is one update"
    _panel(axes, title, f"KL to the reference ({KL_UNIT})", "mean score")
    axes.plot(kl, score, color="#bbbbbb", linewidth=1)
    points = axes.scatter(
        kl, score, c=_column(rows, "update"), cmap="viridis", s=30, edgecolors="#333333",
        linewidths=0.4, zorder=3,
    )  # fmt: skip
    if budget:
        label = f"max_ref_kl = {number(budget)} nats"
        axes.axvline(budget, color=VERMILION, linestyle="--", label=label)
        axes.legend(loc="upper left")
    widest = max(budget or 0.0, _largest(kl)) or 1.0
    axes.set_xlim(-0.02 * widest, 1.05 * widest)
    if len(rows) > 1:
        ticks = MaxNLocator(6, integer=True)
        figure.colorbar(points, label="update", ticks=ticks, pad=0.02).outline.set_visible(False)


def _draw_prediction(figure: Figure, rows: Rows) -> None:
    figure.set_size_inches(8.4, 4.2)
    gain, kl = figure.subplots(1, 2)
    _agreement(
        gain, rows, "trust_region/predicted_gain", "trust_region/actual_gain",
        "Surrogate gain of a step", "per completion",
    )  # fmt: skip
    _agreement(
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
        _panel(axes, title, "update" if axes in grid[1] else "", unit)
        update = _updates(axes, rows)
        axes.plot(update, _column(rows, name), "o-", color=BLUE)
    mean, std = _column(rows, "objective/score_mean"), _column(rows, "objective/score_std")
    update = _column(rows, "update")
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

# Name of the file, what is drawn, and the columns it shows; drawn if the first is not all null.
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
    """Draw every figure that the run has numbers for, each as PNG and as CSV of the same stem.

    Args:
        run_dir: Folder with `metrics.jsonl`, and `config.yaml` for the limits.
        out: Where the figures go; `run_dir/plots` by default.

    Returns:
        The files written.

    Raises:
        TrpoLMError: If the run cannot be read or holds no row.
    """
    rows = load_run(run_dir)
    out = Path(run_dir) / "plots" if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for stem, (draw, columns) in FIGURES.items():
        if np.isnan(_column(rows, columns[0])).all():
            continue
        with matplotlib.rc_context(STYLE):
            figure = Figure()
            draw(figure, rows)
            figure.savefig(out / f"{stem}.png")
        names = list(dict.fromkeys(["update", *columns]))
        with open(out / f"{stem}.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        written += [out / f"{stem}.png", out / f"{stem}.csv"]
    completions = Path(run_dir) / "completions.jsonl"
    return written + (_plot_scores(completions, out) if completions.exists() else [])


def _plot_scores(completions: Path, out: Path) -> list[Path]:
    """Draw the scores of the first, the middle and the last update as histograms of shares."""
    scores: dict[int, list[float]] = {}
    for row in read_json_lines(completions):
        if row.get("score") is not None:
            scores.setdefault(row["update"], []).append(row["score"])
    updates = sorted(scores)
    if not updates:
        return []
    chosen = sorted({updates[0], updates[len(updates) // 2], updates[-1]})
    edges = np.histogram_bin_edges(np.concatenate([scores[u] for u in chosen]), bins=20)
    shares = [np.histogram(scores[u], edges)[0] / len(scores[u]) for u in chosen]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8))
        axes = figure.subplots()
        _panel(axes, "Scores of an update's completions", "score", "share of completions")
        looks = zip(chosen, shares, (GREY, GREEN, BLUE), (":", "--", "-"), strict=False)
        for update, share, colour, line in looks:
            axes.stairs(
                share, edges, color=colour, linestyle=line, linewidth=2, label=f"update {update}"
            )
        axes.set_ylim(0)
        axes.legend()
        figure.savefig(out / "scores.png")
    with open(out / "scores.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["from", "to", *(f"update {u}" for u in chosen)])
        table.writerows(zip(edges[:-1].tolist(), edges[1:].tolist(), *shares, strict=True))
    return [out / "scores.png", out / "scores.csv"]


def summary(rows: Rows) -> list[tuple[str, float, float]]:
    """Return what changed over a run: a metric in words, its first and its last value."""
    words = {
        "objective/score_mean": "mean score, training prompts",
        "objective/eval_score_mean": "mean score, held-out prompts",
        "objective/ref_kl": "KL to the reference, nats per completion",
        "objective/entropy": "entropy, nats per token",
        "objective/completion_length": "completion length, tokens",
        "objective/eos_rate": "completions that end by themselves, share",
    }
    lines = []
    for name, text in words.items():
        values = _column(rows, name)
        values = values[np.isfinite(values)]
        if len(values) > 1 or len(values) == len(rows) == 1:  # measured once is no change
            lines.append((text, float(values[0]), float(values[-1])))
    return lines


# --- model card -----------------------------------------------------------------------------------


_LIMITS = """## Limits

- The KL is exact for each visited state, averaged over sampled completions of the training prompts
  at the training temperature; on other prompts it may be larger.
- A higher score is what the reward measures, which may not be what its author meant: read samples
  before trusting it.
- The adapter keeps the base model's licence, biases and errors. It was not tested for safety."""


def model_card(run_dir: str | Path, facts: Mapping[str, Any]) -> str:
    """Return the README of a saved adapter, from the run's metrics and what only its caller knows.

    Texts are escaped for Markdown and HTML. Folders of the machine appear in the command only.

    Args:
        run_dir: Folder of the run.
        facts: `base_model` and `command` (a string, or a list of arguments); and, where known,
            `algorithm` ("TRPO"), `rewards` (list of names), `data` (in words), `seed`, `versions`
            (package to version), `settings` (name to value), and `samples` (rows as
            `Console.samples` takes them).
    """
    base = str(facts["base_model"])
    on_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base) and not Path(base).exists()
    front = {
        "library_name": "peft",
        **({"base_model": base} if on_hub else {}),
        "pipeline_tag": "text-generation",
        "tags": ["lora", "reinforcement-learning", "trpo_lm"],
    }
    algorithm = _escape(facts.get("algorithm", "TRPO"))
    rewards = ", ".join(_escape(_public(name)) for name in facts.get("rewards", [])) or "a reward"
    command = facts["command"]
    command = command if isinstance(command, str) else shlex.join(command)
    origin = {"data": facts.get("data"), "seed": facts.get("seed"), **facts.get("versions", {})}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# LoRA adapter trained with {algorithm}",
        f"An adapter for **{_escape(_public(base))}**, fine-tuned with trpo_lm ({algorithm}) to "
        f"raise **{rewards}**.",
        "![Score, KL of each update and KL to the reference](plots/overview.png)",
        _result(load_run(run_dir)),
        "## Use\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(_public(base))})\n"
        'model = PeftModel.from_pretrained(model, "path/to/this/folder")\n'
        "```",
        f"## How it was made\n\n```bash\n{clean(command)}\n```",
        _table(["", ""], [(k, _public(str(v))) for k, v in origin.items() if v is not None]),
    ]
    if facts.get("settings"):
        settings = [(name, _public(str(value))) for name, value in facts["settings"].items()]
        parts += ["### Settings", _table(["setting", "value"], settings)]
    if facts.get("samples"):
        columns = ["prompt", "reference", "policy", "score_before", "score_after"]
        header = ["prompt", "reference", "policy", "before", "after"]
        samples = [[row.get(name, "") for name in columns] for row in facts["samples"]]
        parts += ["## Samples", "Written by the models, not by a person.", _table(header, samples)]
    return "\n\n".join([*parts, _LIMITS]) + "\n"


def _result(rows: Rows) -> str:
    """Return the section on what the run reached, and how far it went for it."""
    last = rows[-1]
    skipped = sum(bool(row.get("skipped")) for row in rows)
    rejected = int((_column(rows, "line_search/accepted") == 0).sum())
    kl, ref_kl = _column(rows, "trust_region/kl"), _column(rows, "objective/ref_kl")
    return "\n\n".join(
        [
            "## Result",
            _table(["", "first", "last"], summary(rows)),
            f"- {last['update']} updates, of which {skipped} skipped and {rejected} rejected; "
            f"{last.get('completions') or 0:,} completions sampled.\n"
            f"- Largest KL of one update: {_of(_largest(kl), last['max_kl'])}.\n"
            f"- Largest KL to the reference: {_of(_largest(ref_kl), last['max_ref_kl'])}.",
            "Training prompts are measured before an update's step, held-out prompts after it.",
        ]
    )


def _of(value: float, limit: float | None) -> str:
    if limit is None:
        return f"{value:.4g} {KL_UNIT} (no limit)"
    return f"{value:.4g} of {limit:g} {KL_UNIT} allowed"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; cells are escaped, floats rounded."""
    lines = [header, ["---"] * len(header)]
    lines += [[_escape(_text(value)) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _escape(text: Any) -> str:
    """Return `text` such that Markdown and HTML show it as it is, wherever it stands in a line."""
    special = r"[^\w .,;'?%+=()/-]|\b_|_\b|(?<=www)\."  # an underscore inside a word is harmless
    return re.sub(special, lambda match: f"&#{ord(match[0])};", clean(text))


def _public(text: str) -> str:
    """Return `text` with every absolute path cut down to its last part."""
    text = text.replace("file://", "")
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        text = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return re.sub(r"(?<![\w./\\])(~|[A-Za-z]:)?[/\\]([^\s/\\]+[/\\])*(?=[^\s/\\])", "", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figures of a run again; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trpo_lm.report", description=main.__doc__)
    parser.add_argument("run", help="folder that holds metrics.jsonl")
    parser.add_argument("--out", help="folder for the figures; default: RUN/plots")
    options = parser.parse_args(arguments)
    return redraw(lambda: print(*plot_run(options.run, options.out), sep="\n"))
