"""A sweep trains what is missing, and nothing twice."""

import json

import pytest
from sweeps import a_sweep

from trpo_lm import TRPO, TrpoLMError
from trpo_lm.comparison.page import write_page


def test_a_sweep_keeps_what_is_finished_and_leaks_nothing_between_arms(tmp_path, monkeypatch):
    a_sweep(tmp_path / "both", ["trpo", "ppo"]).run()
    result = tmp_path / "both/runs/ppo/seed-0/result.json"
    found = json.loads(result.read_text())
    assert found["held_out"]["ref_kl"] > 0 and found["passes"] > 3
    assert write_page(tmp_path / "both").is_file()

    # alone, after another one, or in another process: the same bits
    a_sweep(tmp_path / "alone", ["ppo"]).run()
    rows = [
        [json.loads(line)["policy/checksum"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("both/runs/ppo/seed-0/metrics.jsonl", "alone/runs/ppo/seed-0/metrics.jsonl")
    ]
    assert rows[0] == rows[1]

    # the same command again trains nothing; another arm is added; other settings are refused
    before = result.stat().st_mtime_ns
    a_sweep(tmp_path / "alone", ["trpo", "ppo"]).run()
    assert (tmp_path / "alone/runs/trpo/seed-0/result.json").is_file()
    monkeypatch.setattr(
        "trpo_lm.training.trainer.Trainer.train", lambda self: pytest.fail("trained again")
    )
    a_sweep(tmp_path / "both", ["trpo", "ppo"]).run()
    assert result.stat().st_mtime_ns == before
    with pytest.raises(TrpoLMError, match=r"other settings; temperature: 1.0 -> 0.9"):
        a_sweep(tmp_path / "both", ["ppo"], temperature=0.9).run()


def test_two_arms_of_one_name_are_refused(tmp_path):
    with pytest.raises(TrpoLMError, match="duplicate arm 'ppo'"):
        a_sweep(tmp_path, ["ppo", "ppo"])


def test_a_setting_that_is_younger_than_a_result_had_its_default(tmp_path):
    sweep, file = a_sweep(tmp_path, []), tmp_path / "result.json"
    file.write_text(json.dumps({"spec": {"temperature": 1.0}}))
    spec = {"temperature": 1.0, "prefix_stride": 1, "accept_ratio": 0.1}
    assert sweep.is_finished(file, spec, TRPO())
    with pytest.raises(TrpoLMError, match=r"other settings; accept_ratio: 0.1 -> 0.3"):
        sweep.is_finished(file, spec | {"accept_ratio": 0.3}, TRPO())
