"""The parts of a run's page: HTML from rows of metrics and settings, without scripts."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from trpo_lm.cli import recipe_command
from trpo_lm.errors import TrpoLMError
from trpo_lm.report.charts import Level, Marks, Series, chart, reading, sparkline
from trpo_lm.report.format import number
from trpo_lm.report.glossary import CASES, METRICS, OUTCOMES, REASONS, STATUSES, outcome
from trpo_lm.report.html import escape
from trpo_lm.report.log_tail import HUGE
from trpo_lm.report.run_log import Rows
from trpo_lm.storage import Row, read_json

_STATIC_STEPS = 10  # steps that are there without scripts


@dataclass(frozen=True)
class State:
    """Whether a run goes on.

    Attributes:
        kind: 'running', 'finished' or 'stopped'.
        note: What more there is to say, e.g. the error that ended it.
    """

    kind: str
    note: str = ""


@dataclass(frozen=True)
class Course:
    """The rows of a run, and their numbers.

    Attributes:
        rows: Of metrics.jsonl.
        columns: One number for each row, nan where it has none, by the metric's name.
    """

    rows: Rows
    columns: Mapping[str, np.ndarray]

    def column(self, name: str) -> np.ndarray:
        """Return a metric of every row."""
        found = self.columns.get(name)
        return np.full(len(self.rows), np.nan) if found is None else found

    def last(self, name: str) -> float:
        """Return the last number of a metric, nan if there is none."""
        found = self.column(name)
        found = found[np.isfinite(found)]
        return float(found[-1]) if len(found) else math.nan


def progress(rows: Rows, settings: Row) -> str:
    """Return how far a run is, in words."""
    if not rows:
        return "no update yet"
    of = f" of {settings['updates']:,}" if isinstance(settings.get("updates"), int) else ""
    return f"update {rows[-1]['update']:,}{of}"


def header(name: str, run: Course, settings: Row, state: State) -> str:
    """Return the head of the page: name, state, progress, and whether it follows the run."""
    rows = run.rows
    updates, done = settings.get("updates"), rows[-1]["update"] if rows else 0
    parts = [progress(rows, settings)]
    if rows and isinstance(rows[-1].get("completions"), int):
        parts.append(f"{rows[-1]['completions']:,} completions sampled")
    if each := pace(run):
        parts.append(f"{_duration(each)} an update")
        if state.kind == "running" and isinstance(updates, int) and updates > done:
            parts.append(f"about {_duration(each * (updates - done))} left")
    bar = ""
    if isinstance(updates, int) and updates > 0:
        done = min(done, updates)
        bar = f"<progress max='{updates}' value='{done}'>{done} of {updates}</progress>"
    note = f"<p class='fault'>{escape(state.note)}</p>" if state.note else ""
    following = ""
    if state.kind == "running":
        following = (
            "<p class='follow' id='follow' hidden><label><input type='checkbox' id='live' checked> "
            "follow the run</label> <span id='age'></span></p>"
        )
    return (
        f"<header><h1>{name} <span class='state {state.kind}'>{state.kind}</span></h1>"
        f"<p class='progress'>{' · '.join(parts)}</p>{bar}{note}{following}</header>"
    )


def pace(run: Course) -> float:
    """Return the seconds that an update takes of late; 0 if it is not known."""
    seconds = run.column("time/total")[-50:]
    return float(np.median(seconds[np.isfinite(seconds)])) if np.isfinite(seconds).any() else 0.0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{hours} h" if hours < 48 else f"{round(hours / 24)} days"


def _limit(settings: Row, name: str) -> float:
    value = settings.get(name)
    return float(value) if isinstance(value, int | float) and 0 < value < HUGE else math.nan


def _max_kl(run: Course, settings: Row) -> float:
    """Return the trust region: that of the settings, else the largest radius."""
    limit, radii = _limit(settings, "max_kl"), run.column("trust_region/radius")
    if limit == limit or not np.isfinite(radii).any():
        return limit
    return float(np.nanmax(radii))


def _batch(settings: Row) -> float:
    sizes = [_limit(settings, f"{n}_per_{m}") for n, m in _SIZES]
    return sizes[0] * sizes[1]


_SIZES = (("prompts", "update"), ("completions", "prompt"))


def _reference(run: Course) -> float:
    """Return the score of update 1, which samples the model before any step; nan if unknown."""
    first = run.rows[0]["update"] if run.rows else 0
    return float(run.column("objective/score_mean")[0]) if first == 1 else math.nan


def tiles(run: Course, settings: Row) -> str:
    """Return the newest numbers, each with what it is to be compared with."""
    score, reference = run.last("objective/score_mean"), _reference(run)
    kl, max_kl = run.last("trust_region/kl"), _max_kl(run, settings)
    ref_kl, budget = run.last("objective/ref_kl"), _limit(settings, "max_ref_kl")
    held_out = run.last("objective/eval_score_mean")
    noise, batch = run.last("signal/noise_scale"), _batch(settings)
    length, ended = run.last("objective/completion_length"), run.last("objective/eos_rate")
    tiles = [
        ("Score", score, f"{score - reference:+.3g} against update 1, before any step"),
        ("Score, held out", held_out, "of the last evaluation"),
        ("KL of the update", kl, _share(kl, max_kl, "max_kl")),
        ("KL to the reference", ref_kl, _share(ref_kl, budget, "max_ref_kl")),
        ("Noise scale", noise, f"completions; an update has {batch:,.0f}"),
        ("Length", length, f"tokens; {1 - ended:.0%} cut at the limit"),
    ]
    shown = "".join(
        f"<div class='tile'><dt>{name}</dt><dd>{reading(value)}</dd>"
        f"<dd class='note'>{'' if 'nan' in text else escape(text)}</dd></div>"
        for name, value, text in tiles
        if value == value
    )
    return f"<dl class='tiles'>{shown}</dl>" if shown else ""


def _share(value: float, limit: float, name: str) -> str:
    if limit != limit:
        return "nats per completion; no limit"
    return f"{value / limit:.0%} of {name} = {number(limit)} nats per completion"


def _named(value: Any) -> str:
    """Return a model's name; of a folder its last part."""
    text = str(value).rstrip("/\\")
    return text.replace("\\", "/").split("/")[-1] if text.startswith(("/", "~")) else text


def setting_facts(settings: Row, rows: Rows) -> str:
    """Return what is trained, with which reward and within which limits."""
    names, models = settings.get("reward_funcs"), settings.get("reward_models")
    rewards = [str(name) for name in names] if isinstance(names, list) else []
    for i, source in enumerate(models[: len(rewards)] if isinstance(models, list) else []):
        if isinstance(source, dict) and source.get("model"):
            rewards[i] = f"{rewards[i]} ({_named(source['model'])})"
    columns = rows[-1] if rows else {}
    seen = [name.removeprefix("rewards/") for name in columns if name.startswith("rewards/")]
    facts = {
        "Model": _named(settings["model"]) if settings.get("model") else None,
        "Reward": ", ".join(rewards or seen) or None,
        "Algorithm": settings.get("algorithm"),
        "Trust region": _with_unit(settings.get("max_kl")),
        "Budget": _with_unit(settings.get("max_ref_kl")),
        "Learning rate": settings.get("learning_rate"),
        "An update": f"{_batch(settings):,.0f} completions of at most "
        f"{settings.get('max_completion_length')} tokens"
        if _batch(settings) > 0
        else None,
        "Processes": settings.get("world_size"),
        "Seed": settings.get("seed"),
    }
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<dl class='facts'>{shown}</dl>" if shown else ""


def _with_unit(limit: Any) -> str | None:
    return None if limit is None else f"{limit} nats per completion"


def next_commands(folder: Path, state: State) -> str:
    """Return the commands that are useful now."""
    run = shlex.quote(str(folder))
    if state.kind == "running":
        lines = [(f"{recipe_command('view')} {run} --watch", "keeps this page up to date")]
    elif state.kind == "finished":
        lines = [
            (f"{recipe_command('evaluate')} {run}", "scores policy and reference"),
            (f"{recipe_command('token_view')} {run}", "shows a completion token by token"),
            (f"{recipe_command('merge')} {run} {run}-merged", "writes one plain model"),
        ]
    else:
        lines = [
            ("--resume_from_checkpoint auto", "added to the run's own command, goes on from its "
             "newest checkpoint"),
            (f"{recipe_command('view')} {run} --watch", "then follows it here"),
        ]  # fmt: skip
    shown = "".join(f"<li><code>{escape(a)}</code> <span>{escape(b)}</span></li>" for a, b in lines)
    return f"<div class='next'><h2>Next</h2><ul>{shown}</ul></div>"


# ---------------------------------------------------------------- sections


def all_charts(run: Course, settings: Row) -> str:
    """Return every chart that the run has numbers for."""
    rows = run.rows
    if not rows:
        return "<p class='note'>Charts appear with the first update.</p>"
    x = run.column("update")

    def series(name: str, label: str, look: str = "a") -> Series:
        return Series(name, label, run.column(name), look)

    reference, limit = _reference(run), _max_kl(run, settings)
    outcomes = np.array([outcome(row) for row in rows])
    marks = [
        Marks("shortened by the line search", outcomes == "shortened", "shortened"),
        Marks("not taken", outcomes == "rejected", "rejected"),
    ]
    kl = series("trust_region/kl", "KL of the update")
    share = limit == limit
    kl = Series(kl.name, kl.label, kl.values / limit, kl.look) if share else kl
    radius = Series(
        "trust_region/radius", "radius allowed", run.column("trust_region/radius") / limit, "d"
    )
    narrowed = share and bool((radius.values < 0.999).any())
    truncated = Series("objective/eos_rate", "share cut at the length limit",
                       1 - run.column("objective/eos_rate"), "b")  # fmt: skip
    rewards = [name for name in run.columns if name.startswith("rewards/")]
    several = [series(n, n.removeprefix("rewards/"), "abcd"[i % 4]) for i, n in enumerate(rewards)]
    figures = [
        chart(
            "Score", "mean of an update's completions, units of the reward", x,
            [series("objective/score_mean", "training prompts"),
             series("objective/eval_score_mean", "held-out prompts", "points")],
            levels=[Level(reference, "update 1, before any step", "level")],
        ),
        chart(
            f"KL of each update{', share of max_kl' if share else ', nats per completion'}",
            METRICS["trust_region/kl"], x, [kl, *[radius] * narrowed], marks=marks, zero=True,
            levels=[Level(1.0, f"max_kl = {number(limit)} nats")] if share else [],
        ),
        chart(
            "KL to the reference, nats per completion",
            "how far the run has moved the policy, against its budget", x,
            [series("objective/ref_kl", "of an update's completions"),
             series("objective/eval_ref_kl", "held-out prompts", "points")], zero=True,
            levels=[Level(_limit(settings, "max_ref_kl"),
                          f"max_ref_kl = {number(_limit(settings, 'max_ref_kl'))} nats")],
        ),
        chart(
            "Gradient noise scale, completions", METRICS["signal/noise_scale"], x,
            [series("signal/noise_scale", "noise scale")], log=True,
            levels=[Level(_batch(settings), "completions of an update", "level")],
        ),
        chart(
            "Completion length, tokens", METRICS["objective/completion_length"], x,
            [series("objective/completion_length", "mean length", "c")], zero=True,
            levels=[Level(_limit(settings, "max_completion_length"), "max_completion_length")],
        ),
        chart("Truncation", "share of completions that reach the length limit", x, [truncated],
              zero=True),
        chart("Entropy, nats per token", METRICS["objective/entropy"], x,
              [series("objective/entropy", "entropy", "c")], zero=True),
        chart("Rewards", "mean of each reward, in its own units", x, several)
        if len(several) > 1 else "",
        chart("Critic", METRICS["critic/explained_variance"], x,
              [series("critic/explained_variance", "explained variance", "c")],
              levels=[Level(0.0, "no better than the mean", "level")]),
        chart("Time of an update, seconds", "sampling, rewards, policy and critic", x,
              [series("time/total", "whole update"), series("time/rollout", "sampling", "c"),
               series("time/update", "policy's update", "b")], zero=True),
    ]  # fmt: skip
    return "".join(figures)


def completions_section(left_out: str) -> str:
    """Return the frame that the script fills with completions."""
    return (
        "<section id='completions'><h2>Completions</h2>"
        "<noscript><p class='note'>Paging and search need JavaScript; every completion is in "
        "completions.jsonl.</p></noscript>"
        f"<p class='note'>{escape(left_out)} Texts were written by models or data: they are shown "
        "letter for letter, control characters by their code.</p>"
        "<form class='controls' id='filters' hidden>"
        "<label>Search <input type='search' id='query' autocomplete='off' spellcheck='false' "
        "placeholder='in prompts and completions'></label>"
        "<label>Update <input type='number' id='update' min='1' step='1' placeholder='all'></label>"
        "<label>Order <select id='order'><option value='newest'>newest first"
        "<option value='oldest'>oldest first<option value='highest'>highest score first"
        "<option value='lowest'>lowest score first<option value='longest'>longest first"
        "</select></label>"
        "<label>Show <select id='kind'><option value='all'>all<option value='pairs'>beside the "
        "reference's</select></label></form>"
        "<p class='count' id='count' role='status' aria-live='polite'></p>"
        "<div id='list'></div><div class='pager' id='pager'></div></section>"
    )


def steps_section(rows: Rows, steps: Sequence[str]) -> str:
    """Return what became of the newest updates' steps; the script pages through all of them."""
    newest = [*zip(rows, steps, strict=True)][: -_STATIC_STEPS - 1 : -1]
    lines = "".join(
        f"<tr><td>{row['update']}</td><td class='t'><span class='outcome {outcome(row)}'>"
        f"{outcome(row)}</span> {escape(step)}</td>"
        + "".join(
            f"<td>{_shown(row.get(name))}</td>"
            for name in ("objective/score_mean", "trust_region/kl", "objective/ref_kl",
                         "line_search/trials")
        )
        + "</tr>"
        for row, step in newest
    )  # fmt: skip
    groups = (
        ("Outcome of an update", OUTCOMES),
        ("Case: what bound the step", CASES),
        ("Reason: why a trial of the line search was rejected", REASONS),
        ("How a solve by conjugate gradient ended", STATUSES),
    )
    glossary = "".join(
        f"<h3>{title}</h3><dl>"
        + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in words.items())
        + "</dl>"
        for title, words in groups
    )
    return (
        "<section id='steps'><h2>Steps</h2><p class='note'>What became of each update's step and "
        "why, the newest first. A step is worked out from quadratic models; the line search then "
        "shortens it until the exact KLs and the measured gain allow it.</p>"
        "<form class='controls' id='step-filters' hidden><label>Show <select id='outcome'>"
        "<option value='all'>all</select></label></form>"
        "<div class='wide'><table><thead><tr><th>update<th class='t'>step<th>score<th>its KL"
        f"<th>reference KL<th>trials</tr></thead><tbody id='step-list'>{lines}</tbody></table>"
        "</div><div class='pager' id='step-pager'></div>"
        f"<details id='words'><summary>What the words mean</summary>{glossary}</details></section>"
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else reading(value)
    return escape(str(value)[:200])


def metrics_section(run: Course) -> str:
    """Return every metric with its meaning, its newest value and its course."""
    last = run.rows[-1] if run.rows else {}
    names = dict.fromkeys([*METRICS, *run.columns])
    x = run.column("update")
    lines = []
    for name in names:
        values = run.column(name)
        if last.get(name) is None and not np.isfinite(values).any():
            continue
        meaning = METRICS.get(name) or (
            f"mean of the reward {name.removeprefix('rewards/')}"
            if name.startswith("rewards/")
            else ""
        )
        lines.append(
            f"<tr><td class='t'><code>{escape(name)}</code></td><td class='t'>{escape(meaning)}"
            f"</td><td>{_shown(last.get(name))}</td><td>{sparkline(x, values)}</td></tr>"
        )
    return (
        "<section id='metrics'><h2>All metrics</h2><details id='every-metric'><summary>"
        f"{len(lines)} metrics of update {last.get('update', 0)}, with their meaning and course"
        "</summary><div class='wide'><table><thead><tr><th class='t'>metric<th class='t'>meaning"
        f"<th>newest<th>course</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
        "</section>"
    )


def settings_section(folder: Path, settings: Row) -> str:
    """Return every setting, and links to the files of the run."""
    lines = "".join(
        f"<tr><td class='t'><code>{escape(name)}</code></td>"
        f"<td class='t'>{escape(json.dumps(value, default=str)[:2000])}</td></tr>"
        for name, value in settings.items()
    )
    links = [
        (path.relative_to(folder), "token by token")
        for path in sorted(folder.glob("token_view/*.html"))[:50]
    ]
    links += [(path.relative_to(folder), "picture") for path in sorted(folder.glob("plots/*.png"))]
    links += [
        (Path(name), text)
        for name, text in (
            ("README.md", "model card"),
            ("metrics.jsonl", "every number"),
            ("completions.jsonl", "every completion"),
            ("samples.jsonl", "completions beside the reference's"),
            ("evaluation.json", "evaluation"),
            ("config.yaml", "settings"),
        )
        if (folder / name).is_file()
    ]
    files = "".join(
        f"<li><a href='{escape(quote(path.as_posix()))}'>{escape(path.as_posix())}</a> "
        f"<span class='note'>{text}</span></li>"
        for path, text in links
    )
    return (
        "<section id='settings'><h2>Settings and files</h2><details id='every-setting'><summary>"
        f"{len(settings)} settings</summary><div class='wide'><table><tbody>{lines}</tbody></table>"
        f"</div></details>{_evaluation(folder)}<ul class='files'>{files}</ul></section>"
    )


def _evaluation(folder: Path) -> str:
    """Return the scores of `recipes/evaluate.py`, if it was run."""
    found: Mapping[str, Any] = {}
    with suppress(TrpoLMError):
        found = read_json(folder / "evaluation.json")
    try:
        policy, reference = (found[side] for side in ("policy", "reference"))
        text = (
            f"Evaluated at update {found['update']} on {found['prompts']} held-out prompts: score "
            f"{number(_mean(policy['score']))} (reference: {number(_mean(reference['score']))})"
        )
    except (KeyError, TypeError, ValueError):
        return ""
    return f"<p>{escape(text)}, in evaluation.json.</p>"


def _mean(value: Any) -> float:
    return float(value["mean"] if isinstance(value, dict) else value)
