"""TRL's trainers as arms: refused where they cannot run, measured like the others."""

import json
import threading

import pytest
import tiny
import torch
from sweeps import a_sweep

from trpo_lm import TrpoLMError
from trpo_lm.comparison.page import write_page
from trpo_lm.comparison.trl_arms import _positions
from trpo_lm.lm.policy import Policy
from trpo_lm.training.metrics import METRICS


def test_without_trl_its_arms_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrpoLMError, match="TRL is not installed") as caught:
        a_sweep(tmp_path / "c", ["ppo", "trl-grpo"])
    assert "[trl]" in caught.value.hint and not (tmp_path / "c").exists()


def test_trl_in_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrpoLMError, match="in one process"):
        a_sweep(tmp_path, ["trl-rloo"])


def test_padding_does_not_move_the_positions_of_the_model_that_trl_gets():
    model = tiny.build("gpt2").eval()
    ids, mask = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        alone = model(input_ids=ids[:, 2:]).logits
        padded = model(input_ids=ids, attention_mask=mask).logits[:, 2:]
        assert not torch.allclose(padded, alone, atol=1e-2)
        model.base_model.register_forward_pre_hook(_positions, with_kwargs=True)
        padded = model(input_ids=ids, attention_mask=mask).logits[:, 2:]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_trl_trains_offline_and_is_measured_like_the_others(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    asked = []
    monkeypatch.delenv("CI", raising=False)  # where it is set, TRL is silent anyway
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **_: asked.append(args) or [])
    a_sweep(tmp_path, ["trl-grpo", "trl-rloo"]).run()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(10)
    assert not asked
    for name in ("trl-grpo", "trl-rloo"):
        folder = tmp_path / "runs" / name / "seed-0"
        (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert set(METRICS) <= set(row) and row["completions"] == 8
        assert row["objective/ref_kl"] == pytest.approx(0, abs=1e-6)  # sampled by the reference
        assert row["trust_region/kl"] > 1e-6 and row["trust_region/case"] is None
        assert len((folder / "completions.jsonl").read_text().splitlines()) == 8
        found = json.loads((folder / "result.json").read_text())
        assert found["held_out"]["ref_kl"] > 1e-6 and found["passes"] >= 1
        # what is measured is what TRL left: its adapter, loaded by peft alone
        saved = Policy(str(folder))
        assert saved.parameters.checksum() == row["policy/checksum"]
    assert write_page(tmp_path).is_file()
    monkeypatch.setattr(
        "trpo_lm.comparison.sweep.train_with_trl", lambda *args: pytest.fail("trained again")
    )
    a_sweep(tmp_path, ["trl-grpo", "trl-rloo"]).run()
