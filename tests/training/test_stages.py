"""Stages: what is under way, how long it took, and where a test may step in."""

import pytest

import runs
from trpo_lm.training.stages import Stages


def test_the_innermost_stage_is_named_and_the_outer_one_again_after_it():
    stage, seen = Stages(), []
    assert stage.name == "start"
    with stage("updates"):
        with stage("rollout"):
            seen.append(stage.name)
        seen.append(stage.name)
    assert seen == ["rollout", "updates"] and stage.name == "start"
    assert 0 <= stage.seconds["rollout"] <= stage.seconds["updates"]


def test_a_fault_at_the_beginning_or_inside_ends_the_stage():
    def refuse(name):
        if name == "update":
            raise ZeroDivisionError

    stage = Stages(refuse)
    with pytest.raises(ZeroDivisionError), stage("update"):
        pytest.fail("entered")
    with pytest.raises(KeyError), stage("rollout"):
        raise KeyError
    assert stage.name == "start" and set(stage.seconds) == {"update", "rollout"}


def test_the_stages_of_a_run(tmp_path):
    made, stages = runs.trainer(tmp_path, updates=1, evals=runs.HELD_OUT, eval_steps=1), []
    made.stage.on_enter = stages.append
    (row,) = made.train()
    assert stages == [
        "start", "updates", "evaluate",
        "rollout", "score", "measure", "values", "update", "critic", "evaluate",
        "record", "best/policy", "best/facts", "best/replace", "best/rename",
        "checkpoint", "checkpoint/files", "checkpoint/tensors", "checkpoint/state",
        "checkpoint/adapter", "checkpoint/manifest", "checkpoint/replace", "checkpoint/rename",
        "checkpoint/prune", "end",
    ]  # fmt: skip
    parts = [row[f"time/{name}"] for name in ("rollout", "score", "update", "value")]
    assert all(seconds > 0 for seconds in parts)
    assert row["time/total"] == pytest.approx(sum(parts))
    inside = ("rollout", "score", "measure", "values", "update", "critic")
    assert row["time/total"] == pytest.approx(sum(made.stage.seconds[name] for name in inside))
