"""One completion token by token: what the policy did, where it left the reference, and its credit.

    KL       KL(pi(.|s_t) ‖ pi_ref(.|s_t)), exact; its sum is the completion's share of the budget
    shift    log pi(y_t|s_t) - log pi_ref(y_t|s_t): the token that was chosen, likelier or not
    value    V(s_t), what the critic expects before the token
    A_t      GAE, in units of the score (an update whitens it over its batch)

As one HTML page that opens without a network and runs nothing, as a picture, and as CSV. Tokens are
text of a model: escaped, and without control characters.
"""

from __future__ import annotations

import csv
import html
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trpo_lm.analysis.saved_run import FinishedRun
from trpo_lm.core.advantages import gae
from trpo_lm.lm.prompts import Prompt
from trpo_lm.lm.rollout import Batch, Rollout
from trpo_lm.report.figures import BLUE, GREEN, GREY, STYLE, VERMILION
from trpo_lm.report.format import clean, number

# Column, its name, its unit, and the colour of what is above zero.
TRACKS: tuple[tuple[str, str, str, str], ...] = (
    ("kl", "KL to the reference at each token", "nats", VERMILION),
    ("shift", "Log-probability of the token: policy less reference", "nats", BLUE),
    ("value", "Value: the score expected before the token", "units of the score", GREEN),
    ("advantage", "Advantage of the token", "units of the score", BLUE),
)
COLUMNS: list[str] = [
    "position", "token_id", "token", "kl", "logprob", "ref_logprob", "shift", "entropy", "reward",
    "value", "advantage",
]  # fmt: skip
_TABLE_ROWS = 2000  # longer completions are in the CSV
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
.note { color: #555; font-size: .9rem; }
.text { font: 1rem/2 ui-monospace, monospace; }
.text span { white-space: pre-wrap; border-right: 1px solid #ccc; padding: .2em 0; }
.prompt { color: #777; }
.scale { font-size: .8rem; color: #555; }
.scale i { display: inline-block; width: 12rem; height: .7rem; border: 1px solid #ccc;
           vertical-align: middle; margin: 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #e5e5e5; text-align: right;
         font-variant-numeric: tabular-nums; }
th { color: #555; vertical-align: bottom; }
td.t, th.t { text-align: left; font-family: ui-monospace, monospace; white-space: pre; }
"""


def token_rows(run: FinishedRun, rollout: Rollout, row: int = 0) -> list[dict[str, Any]]:
    """Return what is known of every token of a completion.

    Args:
        run: Its policy made the rollout.
        rollout: N completions.
        row: Which of them.

    Returns:
        `COLUMNS` for each action, EOS included: logarithms and entropy in nats, reward, value and
        advantage in units of the score. Values are None without a critic, and so are rewards
        without a score.
    """
    batch = Batch.from_rollout(
        run.policy, rollout, micro_batch_size=run.settings["micro_batch_size"]
    )
    mask = rollout.action_mask
    credit: dict[str, list[float]] = {}
    if bool(rollout.scores.valid[row]):
        credit["reward"] = rollout.rewards[row][mask[row]].tolist()
        if run.critic is not None:
            scores = run.mdp.prefix_scores(rollout) if "prefix" in run.critic.name else None
            values = run.critic.values(batch.hidden.cpu(), scores, mask, untrained=0.0)
            gamma, lam = run.settings["gamma"], run.settings["lam"]
            advantages = gae(rollout.rewards, values, mask, gamma=gamma, lam=lam)
            credit["value"] = values[row][mask[row]].tolist()
            credit["advantage"] = advantages[row][mask[row]].tolist()
    flat = {
        "kl": batch.ref_kl,
        "logprob": batch.old_logprobs,
        "ref_logprob": batch.ref_logprobs,
        "shift": batch.old_logprobs - batch.ref_logprobs,
        "entropy": batch.entropy,
    }
    where = rollout.token_index(rollout.groups.new_tensor([row]))
    columns = {name: values.cpu()[where].tolist() for name, values in flat.items()} | credit
    return [
        {
            "position": t + 1,
            "token_id": token,
            "token": run.mdp.tokenizer.decode([token]),
            **{name: columns[name][t] if name in columns else None for name in COLUMNS[3:]},
        }
        for t, token in enumerate(rollout.completion_ids[row])
    ]


def draw_tokens(
    rows: Sequence[dict[str, Any]], stem: str | Path, *, title: str, prompt: Prompt, note: str = ""
) -> list[Path]:
    """Write `stem`.html, `stem`.png and `stem`.csv.

    Args:
        rows: From `token_rows`.
        stem: Path without its ending; the folder is made if need be.
        title: What the completion is, in a line.
        prompt: What it goes on from.
        note: A line below the title.

    Returns:
        The files written.
    """
    paths = [Path(f"{stem}.{ending}") for ending in ("html", "png", "csv")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(_page(rows, title, prompt, note), encoding="utf-8")
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box is drawn instead
        figure = Figure(figsize=(min(40.0, max(6.4, 1.2 + 0.27 * len(rows))), 7))
        said = clean(_said(prompt))
        shown = said if len(said) < 80 else f"…{said[-79:]}"
        _draw(figure, rows, f"{clean(title)}\nafter: {shown}")
        figure.savefig(paths[1])
    with open(paths[2], "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return paths


def _said(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def _visible(token: str) -> str:
    """Return a token such that its line ends and tabs can be seen."""
    return clean(token.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥")) or "∅"


# ---------------------------------------------------------------- the picture


def _draw(figure: Figure, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draw KL, log-probabilities and, where there is a critic, credit below each other."""
    credit = rows[0]["value"] is not None
    axes = figure.subplots(2 + credit, 1, sharex=True)
    x = [row["position"] for row in rows]

    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    def panel(on: Axes, name: str, unit: str) -> None:
        on.set_title(name)
        on.set_ylabel(unit)
        on.grid(axis="x", visible=False)

    def legend(on: Axes) -> None:  # beside the title, where nothing is drawn
        on.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderaxespad=0)

    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    total = number(sum(column("kl")))
    panel(axes[0], f"KL to the reference, exact; {total} nats in all", "nats")
    axes[0].bar(x, column("kl"), color=VERMILION)
    panel(axes[1], "Log-probability of the token", "nats")
    axes[1].plot(x, column("ref_logprob"), "o--", color=GREY, label="reference")
    axes[1].plot(x, column("logprob"), "o-", color=BLUE, label="policy")
    legend(axes[1])
    if credit:
        panel(axes[2], "Credit", "units of the score")
        axes[2].bar(x, column("advantage"), color=BLUE, alpha=0.6, label="advantage of the token")
        axes[2].plot(x, column("value"), "o-", color=GREEN, label="value before the token")
        axes[2].axhline(0, color=GREY, linewidth=0.8)
        legend(axes[2])
    every = max(1, len(rows) // 140)
    labels = [_visible(row["token"])[:16] for row in rows[::every]]
    axes[-1].set_xticks(x[::every], labels, rotation=60, ha="right", parse_math=False)
    axes[-1].set_xlim(0.3, len(rows) + 0.7)


# ---------------------------------------------------------------- the page


def _page(rows: Sequence[dict[str, Any]], title: str, prompt: Prompt, note: str) -> str:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        "style-src 'unsafe-inline'\">",
        f"<title>{_text(title)}</title><style>{_CSS}</style>",
        f"<h1>{_text(title)}</h1><p class='note'>{_text(note)}</p>",
        "<p class='note'>Prompt in grey, then the completion; a thin line ends each token. Point "
        "at a token for its numbers. Texts were written by a model.</p>",
    ]
    for name, heading, unit, colour in TRACKS:
        if rows[0][name] is not None:
            parts.append(_track(rows, name, heading, unit, colour, _said(prompt)))
    parts.append("<h2>All numbers</h2><div class='wide'><table><tr>")
    parts += [f"<th{_left(name)}>{name.replace('_', ' ')}</th>" for name in COLUMNS]
    parts.append("</tr>")
    for row in rows[:_TABLE_ROWS]:
        cells = (f"<td{_left(name)}>{_cell(row[name])}</td>" for name in COLUMNS)
        parts.append(f"<tr>{''.join(cells)}</tr>")
    parts.append(
        "</table></div><p class='note'>KL, log-probabilities (log pi(y_t|s_t) of policy and "
        "reference), their shift and entropy in nats; reward, value and advantage in units of the "
        "score. Positions count from 1.</p></html>"
    )
    return "\n".join(parts)


def _track(
    rows: Sequence[dict[str, Any]], name: str, heading: str, unit: str, colour: str, prompt: str
) -> str:
    """Return the completion with every token on the colour of one number, and the scale of it."""
    values = [float(row[name]) for row in rows]
    most = max((abs(v) for v in values), default=0.0) or 1.0
    signed = min(values) < 0
    spans = []
    for row, value in zip(rows, values, strict=True):
        shade = _shade(value / most, colour)
        told = "; ".join(
            f"{column.replace('_', ' ')} {_cell(row[column])}"
            for column in COLUMNS[3:]
            if row[column] is not None
        )
        text = _text(_visible(row["token"]))
        spans.append(f'<span style="background:{shade}" title="{html.escape(told)}">{text}</span>')
    ends = [-most, 0.0, most] if signed else [0.0, most]
    stops = ", ".join(_shade(end / most, colour) for end in ends)
    low, high = number(ends[0], most), number(most)
    middle = " (white: 0)" if signed else ""
    return (
        f"<h2>{heading}, {unit}</h2>"
        f"<div class='scale'>{low}<i style=\"background:linear-gradient(90deg, {stops})\"></i>"
        f"{high} {unit}{middle}</div>"
        f"<div class='text'><span class='prompt'>{_text(_visible(prompt))}</span>"
        f"{''.join(spans)}</div>"
    )


def _shade(share: float, colour: str) -> str:
    """Mix white with a colour; below zero with vermilion. At most 70%: dark text stays readable."""
    colour = colour if share >= 0 else VERMILION
    part = 0.7 * min(1.0, abs(share))
    mixed = (round(255 + part * (int(colour[i : i + 2], 16) - 255)) for i in (1, 3, 5))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _left(name: str) -> str:
    return " class='t'" if name == "token" else ""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return _text(number(value, 0.01) if isinstance(value, float) else _visible(str(value)))


def _text(text: str) -> str:
    return html.escape(clean(text))
