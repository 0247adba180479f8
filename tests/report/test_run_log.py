"""Rows of a run and their limits."""

import pytest
from folders import write_run

from trpo_lm.report.run_log import load_run


def test_a_share_of_one_is_the_whole_trust_region(tmp_path):
    rows = load_run(write_run(tmp_path / "run"))
    assert rows[0]["kl_share"] == pytest.approx(0.8) and rows[3]["kl_share"] is None
    assert {row["max_ref_kl"] for row in rows} == {1.5}


def test_without_a_config_the_recorded_radius_is_the_limit(tmp_path):
    rows = load_run(write_run(tmp_path / "run", config=None))
    assert rows[0]["max_kl"] == 0.05 and rows[0]["max_ref_kl"] is None
