"""Write the pages that the code itself states: docs/metrics.md and docs/settings.md.

python docs/reference.py
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from inspect import get_annotations
from pathlib import Path

from trpo_lm.config import (
    DatasetSettings,
    ModelSettings,
    PPOSettings,
    TrainerConfig,
    TRPOSettings,
)
from trpo_lm.report.glossary import METRICS
from trpo_lm.training.metrics import DASHBOARD

HERE = Path(__file__).resolve().parent
SETTINGS = {
    "The run": TrainerConfig,
    "The model and its adapter": ModelSettings,
    "TRPO": TRPOSettings,
    "PPO, and its relatives": PPOSettings,
    "The dataset, in recipes": DatasetSettings,
}


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(c.replace('|', chr(92) + '|') for c in line)} |" for line in lines
    )


def metrics_page() -> str:
    """Return docs/metrics.md."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name, meaning in METRICS.items():
        group = name.partition("/")[0] if "/" in name else "of the update"
        groups.setdefault(group, []).append((f"`{name}`", meaning))
    theirs = [(f"`{name}`", f"`{ours}`") for name, ours in DASHBOARD.items()]
    return "\n\n".join(
        [
            "# Metrics",
            "One line of `metrics.jsonl` for each update, and what trackers get. null: not measured"
            " in this update. A reward adds `rewards/NAME`. Made by `python docs/reference.py`.",
            *(
                part
                for group, rows in groups.items()
                for part in (f"## {group}", table(("name", "what it is"), rows))
            ),
            "## Under TRL's names",
            "Trackers and callbacks get these too, and `completions/clipped_ratio`, which is "
            "1 - `objective/eos_rate`.",
            table(("name", "is"), theirs),
        ]
    ) + "\n"  # fmt: skip


def settings_page() -> str:
    """Return docs/settings.md."""
    parts = [
        "# Settings",
        "Fields in Python, flags with `--` on the command line, keys of a `--config` file. Made by "
        "`python docs/reference.py`.",
    ]
    for title, settings in SETTINGS.items():
        own = get_annotations(settings)  # not those of its base
        rows = [
            (f"`{f.name}`", f"`{default(f)}`", f.metadata["help"])
            for f in fields(settings)
            if f.name in own
        ]
        parts += [f"## {title}", table(("name", "default", "what it is"), rows)]
    return "\n\n".join(parts) + "\n"


def default(field) -> str:
    """Return the default of a setting as it is typed."""
    value = field.default if field.default is not MISSING else field.default_factory()
    return repr(value)


PAGES = {"metrics.md": metrics_page, "settings.md": settings_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}")
