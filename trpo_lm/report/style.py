"""How every figure looks, and how it is written: a PNG, and a CSV of the numbers it shows.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; meaning never rests on
colour alone. Figures are made without pyplot: no backend, no global state.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # header and rows


def panel(axes: Axes, title: str, x: str, y: str) -> None:
    """Name a panel and its axes."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def save_figure(stem: Path, draw: Callable[..., Table | None], *args: Any) -> list[Path]:
    """Write a figure as `stem`.png and its numbers as `stem`.csv; return the files written.

    Args:
        stem: Path without its ending, in a folder that exists.
        draw: Called as draw(figure, *args) with an empty figure; returns the numbers drawn, or
            None if there is nothing to draw, and then no file is written.
        args: Passed to `draw`.
    """
    files = [Path(f"{stem}.png"), Path(f"{stem}.csv")]
    table = save_png(files[0], draw, *args)
    if table is None:
        return []
    write_csv(files[1], table)
    return files


def save_png(path: Path, draw: Callable[..., Table | None], *args: Any) -> Table | None:
    """Write a figure as PNG, as `save_figure` does; return its numbers."""
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        table = draw(figure, *args)
        if table is not None:
            _not_through_a_link(path)
            figure.savefig(path, format="png")
    return table


def write_csv(path: Path, table: Table) -> None:
    """Write a header and rows; None is an empty field."""
    _not_through_a_link(path)
    header, rows = table
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _not_through_a_link(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
