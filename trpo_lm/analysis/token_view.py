"""One completion token by token: its distance from the reference, and its credit.

    KL       KL(pi(.|s_t) ‖ pi_ref(.|s_t)), exact; its sum is the completion's share of the budget
    shift    log pi(y_t|s_t) - log pi_ref(y_t|s_t): whether training made the token likelier
    value    V(s_t), the score that the critic expects before the token
    A_t      GAE, in units of the score (an update whitens it over its batch)

Written as an HTML page without scripts or network access, as a picture, and as CSV. Tokens are
untrusted text: escaped, and without control characters.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trpo_lm.analysis.saved_run import FinishedRun
from trpo_lm.core.advantages import gae
from trpo_lm.lm.prompts import Prompt
from trpo_lm.lm.rollout import Batch, Rollout
from trpo_lm.report.format import clean, conversation, number
from trpo_lm.report.html import CSS, escape
from trpo_lm.report.style import BLUE, GREEN, GREY, VERMILION, Table, save_figure
from trpo_lm.storage import Row, replace_file

# Column, heading, unit, and the colour of positive values.
TRACKS: tuple[tuple[str, str, str, str], ...] = (
    ("kl", "KL to the reference at each token", "nats", VERMILION),
    ("shift", "Log-probability of the token: policy minus reference", "nats", BLUE),
    ("value", "Value: the score expected before the token", "units of the score", GREEN),
    ("advantage", "Advantage of the token", "units of the score", BLUE),
)
COLUMNS: list[str] = [
    "position", "token_id", "token", "kl", "logprob", "ref_logprob", "shift", "entropy", "reward",
    "value", "advantage",
]  # fmt: skip
_TABLE_ROWS = 2000  # longer completions are in the CSV
_CSS = """
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
.text { font: 1rem/2 ui-monospace, monospace; }
.text span { white-space: pre-wrap; border-right: 1px solid #ccc; padding: .2em 0; }
.prompt { color: #777; }
.scale { font-size: .8rem; color: #555; }
.scale i { display: inline-block; width: 12rem; height: .7rem; border: 1px solid #ccc;
           vertical-align: middle; margin: 0 .4rem; }
table { font-size: .85rem; } th, td { padding: .2rem .6rem; }
td.t, th.t { font-family: ui-monospace, monospace; white-space: pre; }
"""


def token_rows(run: FinishedRun, rollout: Rollout, row: int = 0) -> list[Row]:
    """Return the numbers of every token of a completion.

    Args:
        run: Its policy sampled the rollout.
        rollout: N completions.
        row: Index of one of them.

    Returns:
        `COLUMNS` for each action, EOS included: logarithms and entropy in nats, reward, value and
        advantage in units of the score. Values and advantages are None without a critic, all three
        without a score.
    """
    batch = Batch.from_rollout(run.policy, rollout)
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
    index = rollout.token_index(rollout.groups.new_tensor([row]))
    columns = {name: values.cpu()[index].tolist() for name, values in flat.items()} | credit
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
    rows: Sequence[Row], stem: str | Path, *, title: str, prompt: Prompt, note: str = ""
) -> list[Path]:
    """Write `stem`.html, `stem`.png and `stem`.csv.

    Args:
        rows: From `token_rows`.
        stem: Path without its ending; its folder is created if necessary.
        title: Names the completion, in a line.
        prompt: The completion's.
        note: A line below the title.

    Returns:
        The files written.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    page = Path(f"{stem}.html")
    replace_file(page, _page(rows, title, prompt, note).encode())
    context = clean(conversation(prompt))
    context = context if len(context) < 80 else f"…{context[-79:]}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box
        heading = f"{clean(title)}\nafter: {context}"
        return [page, *save_figure(stem, _draw, rows, heading)]


def _visible(token: str) -> str:
    """Return a token with its line ends and tabs made visible."""
    return clean(token.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥")) or "∅"


# ---------------------------------------------------------------- the picture


def _draw(figure: Figure, rows: Sequence[Row], title: str) -> Table:
    """Draw KL, log-probabilities and, with a critic, credit below each other."""
    figure.set_size_inches(min(40.0, max(6.4, 1.2 + 0.27 * len(rows))), 7)
    credit = rows[0]["value"] is not None
    axes = figure.subplots(2 + credit, 1, sharex=True)
    x = [row["position"] for row in rows]

    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    def panel(on: Axes, name: str, unit: str) -> None:
        on.set_title(name)
        on.set_ylabel(unit)
        on.grid(axis="x", visible=False)

    def legend(on: Axes) -> None:  # beside the title, outside the plot
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
    return COLUMNS, [[row[name] for name in COLUMNS] for row in rows]


# ---------------------------------------------------------------- the page


def _page(rows: Sequence[Row], title: str, prompt: Prompt, note: str) -> str:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        "style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{CSS}{_CSS}</style>",
        f"<h1>{escape(title)}</h1><p class='note'>{escape(note)}</p>",
        "<p class='note'>Prompt in grey, then the completion; a thin line ends each token. Hover "
        "over a token for its numbers. Texts were written by a model.</p>",
    ]
    for name, heading, unit, colour in TRACKS:
        if rows[0][name] is not None:
            parts.append(_track(rows, name, heading, unit, colour, conversation(prompt)))
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
    rows: Sequence[Row], name: str, heading: str, unit: str, colour: str, prompt: str
) -> str:
    """Return the completion, each token coloured by one number, and the colour scale."""
    values = [float(row[name]) for row in rows]
    largest = max((abs(v) for v in values), default=0.0) or 1.0
    signed = min(values) < 0
    spans = []
    for row, value in zip(rows, values, strict=True):
        shade = _shade(value / largest, colour)
        numbers = "; ".join(
            f"{column.replace('_', ' ')} {_cell(row[column])}"
            for column in COLUMNS[3:]
            if row[column] is not None
        )
        text = escape(_visible(row["token"]))
        spans.append(f'<span style="background:{shade}" title="{escape(numbers)}">{text}</span>')
    ends = [-largest, 0.0, largest] if signed else [0.0, largest]
    stops = ", ".join(_shade(end / largest, colour) for end in ends)
    low, high = number(ends[0], largest), number(largest)
    middle = " (white: 0)" if signed else ""
    return (
        f"<h2>{heading}, {unit}</h2>"
        f"<div class='scale'>{low}<i style=\"background:linear-gradient(90deg, {stops})\"></i>"
        f"{high} {unit}{middle}</div>"
        f"<div class='text'><span class='prompt'>{escape(_visible(prompt))}</span>"
        f"{''.join(spans)}</div>"
    )


def _shade(share: float, colour: str) -> str:
    """Mix white with a colour (negative: vermilion), up to 70%: dark text stays readable."""
    colour = colour if share >= 0 else VERMILION
    part = 0.7 * min(1.0, abs(share))
    mixed = (round(255 + part * (int(colour[i : i + 2], 16) - 255)) for i in (1, 3, 5))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _left(name: str) -> str:
    return " class='t'" if name == "token" else ""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return escape(number(value, 0.01) if isinstance(value, float) else _visible(str(value)))
