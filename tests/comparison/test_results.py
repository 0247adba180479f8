"""Statistics over runs: scores at equal KL, runs near their target."""

import json
from pathlib import Path

import numpy as np
import pytest
from folders import write_comparison

from trpo_lm import TrpoLMError
from trpo_lm.comparison.results import Run, at_equal_kl, load_comparison, outcomes


def a_run(kl, score, seed=0, **result):
    rows = [
        {"update": i + 1, "objective/ref_kl": k, "objective/score_mean": s}
        for i, (k, s) in enumerate(zip(kl, score, strict=True))
    ]
    return Run(seed, Path("."), result, rows)


def test_a_score_at_some_kl_is_the_last_one_there():
    steady = a_run(np.linspace(0, 2, 101), np.linspace(0, 1, 101))
    assert steady.at(1.0) == pytest.approx((1.0, 0.5))
    assert steady.at(9.0) == tuple(v[-1] for v in steady.trajectory())
    assert steady.at(0.0) == (0.0, 0.0)
    plateau = a_run([0, *[1.0] * 40], np.linspace(0, 1, 41))  # improves at a constant KL
    assert plateau.at(1.0) == (1.0, plateau.trajectory()[1][-1])


@pytest.mark.parametrize(
    ("kl", "near", "collapsed"),
    [(0.89, "0%", "0%"), (0.91, "100%", "0%"), (1.09, "100%", "0%"), (1.11, "0%", "0%"),
     (21.0, "0%", "100%")],
)  # fmt: skip
def test_a_run_is_near_what_it_was_asked_for_within_ten_per_cent(tmp_path, kl, near, collapsed):
    folder = write_comparison(tmp_path / "c", arms=["trpo max_ref_kl=1"], seeds=1)
    file = folder / "runs/trpo_max_ref_kl=1/seed-0/result.json"
    result = json.loads(file.read_text())
    result["held_out"]["ref_kl"] = kl
    file.write_text(json.dumps(result))
    assert outcomes(load_comparison(folder)) == [["trpo", 1, near, collapsed]]


def test_equal_kl_pairs_runs_of_one_seed_and_picks_the_best_rival(tmp_path):
    comparison = load_comparison(write_comparison(tmp_path / "c"))
    rivals = comparison.arms[1:]
    for run in rivals[1].runs:
        for row in run.rows:
            row["objective/score_mean"] += 0.2
    (row,) = at_equal_kl(comparison)
    assert row["rival"] is rivals[1] and row["difference"] == pytest.approx(-0.2, abs=0.05)
    assert row["low"] <= row["difference"] <= row["high"] < 0
    assert row["rival_ref_kl"] == pytest.approx(row["ref_kl"])


def test_a_rival_that_never_came_that_far_shows_its_own_kl(tmp_path):
    comparison = load_comparison(
        write_comparison(tmp_path / "c", ("trpo max_ref_kl=1", "ppo beta=0.1"))
    )
    for run in comparison.arms[1].runs:
        for row in run.rows:
            row["objective/ref_kl"] /= 10
    (row,) = at_equal_kl(comparison)
    assert row["rival_ref_kl"] == pytest.approx(row["ref_kl"] / 10)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(TrpoLMError, match="no run of a comparison is finished"):
        load_comparison(tmp_path)
