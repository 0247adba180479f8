"""The state between two updates: exact copies, checkpoints, and the settings that go with them."""

import pytest
import torch

import runs
from trpo_lm.errors import TrpoLMError
from trpo_lm.training.state import (
    from_checkpoint,
    require_same_settings,
    restore,
    snapshot,
    to_checkpoint,
)


def state_of(made):
    counts = made.updates_done, made.completions, made.tokens
    return snapshot(made.policy, made.critic, made.algorithm_state, *counts)


def content(state, made):
    """Return a state as a checkpoint holds it, with theta."""
    saved = to_checkpoint(state, made.policy, made.critic, {})
    tensors = {f"{s}/{n}": t for s, named in saved.tensors.items() for n, t in named.items()}
    theta = {f"theta/{i}": t for i, t in enumerate(state.theta)}
    return {**saved.state, "update": saved.update}, tensors | theta


def assert_same(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("algorithm", list(runs.ALGORITHMS))
def test_a_snapshot_is_a_copy_and_is_restored_exactly(tmp_path, algorithm):
    made = runs.trainer(tmp_path, algorithm=algorithm)
    made.train_step()
    state = state_of(made)
    before = content(state, made)
    made.train_step()
    assert state_of(made).tokens > state.tokens
    after = content(state_of(made), made)
    assert not torch.equal(before[1]["theta/0"], after[1]["theta/0"])
    restored = restore(state, made.policy, made.critic)
    again = snapshot(
        made.policy, made.critic, restored, state.update, state.completions, state.tokens
    )
    assert_same(content(again, made), before)


@pytest.mark.parametrize("algorithm", list(runs.ALGORITHMS))
def test_a_checkpoint_gives_the_state_back(tmp_path, algorithm):
    made = runs.trainer(tmp_path / "a", algorithm=algorithm)
    made.train_step()
    state = state_of(made)
    saved = to_checkpoint(state, made.policy, made.critic, {})
    assert set(saved.tensors) == {"value_head", "algorithm"}
    assert set(saved.state) == {"completions", "tokens", "checksum", "critic", "algorithm"}
    made.policy.save(tmp_path)  # the adapter's file, which a checkpoint holds as well
    saved.tensors["adapter_model"] = {
        name: tensor for (_, name), tensor in runs.tensors(tmp_path).items()
    }

    fresh = runs.trainer(tmp_path / "b", algorithm=algorithm)
    parts = fresh.policy, fresh.critic, fresh.algorithm_state
    loaded = from_checkpoint(saved, *parts, where=tmp_path)
    assert_same(content(loaded, fresh), content(state, made))

    saved.state["checksum"] = "0" * 16
    with pytest.raises(TrpoLMError, match="did not load as it was saved"):
        from_checkpoint(saved, *parts, where=tmp_path)


def test_another_algorithms_state_is_not_taken_over(tmp_path):
    trpo, ppo = (runs.trainer(tmp_path / name, algorithm=name) for name in ("trpo", "ppo"))
    trpo.train_step()
    saved = to_checkpoint(state_of(trpo), trpo.policy, trpo.critic, {})
    trpo.policy.save(tmp_path)
    saved.tensors["adapter_model"] = {
        name: tensor for (_, name), tensor in runs.tensors(tmp_path).items()
    }
    initial = content(state_of(ppo), ppo)[0]["algorithm"]
    parts = ppo.policy, ppo.critic, ppo.algorithm_state
    with pytest.raises(TrpoLMError, match="state of its algorithm"):
        from_checkpoint(saved, *parts, where=tmp_path)
    loaded = from_checkpoint(saved, *parts, where=tmp_path, same_algorithm=False)
    assert content(loaded, ppo)[0]["algorithm"] == initial
    assert (loaded.update, loaded.completions) == (1, trpo.completions)


# ---------------------------------------------------------------- settings


def test_X06_other_settings_are_refused_with_a_table():
    saved = {"trpo": {"max_kl": 0.05, "lam": None}, "seed": 0, "old": 1, "model": "a"}
    now = {"trpo": {"max_kl": 0.1, "lam": None}, "seed": 1, "model": "a", "weights": (1.0, 2.0)}
    with pytest.raises(TrpoLMError) as error:
        require_same_settings(saved, now, {"seed"})
    lines = error.value.what.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["setting", "checkpoint", "now"],
        ["trpo.max_kl", "0.05", "0.1"],
        ["old", "1", "(absent)"],
        ["weights", "(absent)", "[1.0,", "2.0]"],
    ]
    assert "--allow_config_change trpo.max_kl,old,weights" in str(error.value.hint)
    require_same_settings(saved, now, {"seed", "max_kl", "old", "weights"})
    require_same_settings({"w": [1.0, 2.0]}, {"w": (1.0, 2.0)}, set())
    require_same_settings({}, {}, set())
    with pytest.raises(TrpoLMError):
        require_same_settings({"a": None}, {}, set())


def test_what_changes_no_arithmetic_may_differ():
    saved = {"updates": 3, "output_dir": "a", "reward_models": [None], "seed": 0}
    require_same_settings(saved, {"updates": 5, "output_dir": "b", "seed": 0}, set())
