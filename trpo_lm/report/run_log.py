"""A run's metrics, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trpo_lm.errors import TrpoLMError
from trpo_lm.storage import Row, read_json_lines, read_yaml

Rows = Sequence[Mapping[str, Any]]


def load_run(run_dir: str | Path) -> list[Row]:
    """Return the rows of a run's `metrics.jsonl`, each with the run's limits.

    Added to every row: `max_kl` and `max_ref_kl` (nats per completion, None without a limit) and
    `kl_share`, the update's KL as a share of `max_kl`. The limits are those of `config.yaml`; if it
    has no `max_kl`, it is the largest radius of any row.

    Raises:
        TrpoLMError: If there is no row, or a file cannot be parsed.
    """
    run_dir = Path(run_dir)
    rows = read_json_lines(run_dir / "metrics.jsonl")
    if not rows:
        raise TrpoLMError("no update was recorded yet", where=str(run_dir / "metrics.jsonl"))
    radii = [row["trust_region/radius"] for row in rows if row.get("trust_region/radius")]
    limits: Row = {"max_kl": max(radii, default=None)}
    config = run_dir / "config.yaml"
    if config.exists():
        limits |= read_yaml(config)
    max_kl, max_ref_kl = limits.get("max_kl"), limits.get("max_ref_kl")
    for row in rows:
        kl = row.get("trust_region/kl")
        share = kl / max_kl if max_kl and kl is not None else None
        row.update(max_kl=max_kl, max_ref_kl=max_ref_kl, kl_share=share)
    return rows


def column(rows: Rows, name: str) -> np.ndarray:
    """Return a metric of every update as floats; null becomes nan."""
    values = (row.get(name) for row in rows)
    return np.array([float(v) if isinstance(v, int | float) else np.nan for v in values])
