"""What an update rule owes the trainer: state that survives files, metrics with one meaning."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load, save

from trpo_lm.algorithms.algorithm import packed, unpacked, with_default_lam
from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.core.adaptation import ReferenceFilter, RunningNoise
from trpo_lm.training.metrics import METRICS

RULES = {
    "trpo": TRPO(max_kl=0.02, max_ref_kl=0.3, fisher_completions=8, cg_iterations=4),
    "trpo without a budget": TRPO(max_kl=0.02, max_ref_kl=None),
    "ppo": PPO(learning_rate=0.02, target_ref_kl=0.1),
    "rloo": PPO(advantage="leave_one_out", epochs=1, minibatches=1, clip=None),
}


def make_updates(rule, count, through_files=False):
    """Return parameters, state and rows after some updates on fresh batches."""
    policy = tiny.policy(spread=0.3)
    state, rows = rule.init_state(policy.parameters), []
    for seed in range(count):
        batch = tiny.batch(policy, each=4, seed=seed)
        state, row = rule.update(tiny.objective(policy, batch, seed=(seed,)), state)
        rows.append(row)
        if through_files:
            numbers, tensors = unpacked(state)
            fresh = rule.init_state(policy.parameters)
            state = packed(fresh, json.loads(json.dumps(numbers)), load(save(tensors)))
    return policy.parameters.checksum(), state, rows


@pytest.mark.parametrize("name", RULES)
def test_state_survives_json_and_safetensors_bit_for_bit(name):
    plain, through_files = (make_updates(RULES[name], 3, through) for through in (False, True))
    assert plain[0] == through_files[0] and plain[2] == through_files[2]


@pytest.mark.parametrize("name", RULES)
def test_an_update_changes_no_state_that_it_was_given(name):
    rule, policy = RULES[name], tiny.policy(spread=0.3)
    state = rule.init_state(policy.parameters)
    for seed in range(2):
        numbers, tensors = unpacked(state)
        copies = {k: v.clone() for k, v in tensors.items()}
        new, _ = rule.update(tiny.objective(policy, tiny.batch(policy, seed=seed)), state)
        assert unpacked(state)[0] == numbers
        assert all(torch.equal(v, copies[k]) for k, v in unpacked(state)[1].items())
        state = new


def test_a_state_without_its_younger_fields_is_a_fresh_one_there():
    """A checkpoint of a run that had seen nothing yet holds empty mappings."""
    policy = tiny.policy()
    fresh = TRPO().init_state(policy.parameters)
    square = torch.rand(len(policy.parameters))
    empty = {"noise": {}, "reference": {}, "radius": {}}
    state = packed(fresh, empty, {"square": square})
    assert torch.equal(state.square, square)
    assert (state.noise, state.reference) == (RunningNoise(), ReferenceFilter())
    assert state.radius == fresh.radius


def test_a_field_that_is_none_comes_back_as_none():
    """Not as the fresh state's value, and not as a state with a field too few."""
    policy = tiny.policy()
    fresh = TRPO().init_state(policy.parameters)
    state = replace(fresh, reference=replace(fresh.reference, drift=0.5, expected=None))
    numbers, tensors = unpacked(state)
    other = replace(fresh, reference=replace(fresh.reference, expected=3.0))
    assert packed(other, json.loads(json.dumps(numbers)), tensors).reference == state.reference


@pytest.mark.parametrize("name", RULES)
def test_metrics_are_names_of_the_vocabulary(name):
    _, _, rows = make_updates(RULES[name], 2)
    for row in rows:
        assert row.keys() <= METRICS.keys()
        json.dumps(row)


def test_metrics_mean_what_their_texts_say():
    """Both solves are counted; the residual is the first one's; a reason belongs to a rejection."""
    policy = tiny.policy(spread=0.3)
    rule = TRPO(max_kl=3.0, max_ref_kl=9.0, cg_iterations=3, cg_tolerance=0.0, accept_ratio=1.0)
    batch = tiny.batch(policy, each=4)
    _, row = rule.update(tiny.objective(policy, batch), rule.init_state(policy.parameters))
    assert row["cg/iterations"] == 6 and 0 < row["cg/residual"] < 1
    assert row["cg/status"] == row["cg/ref_status"] == "max_iterations"
    assert (row["line_search/reason"] is None) == (row["line_search/trials"] == 1)
    assert row["line_search/trials"] > 1
    rule = replace(rule, max_ref_kl=None)
    _, row = rule.update(tiny.objective(policy, batch), rule.init_state(policy.parameters))
    assert row["cg/iterations"] == 3 and row["cg/ref_status"] is None


@pytest.mark.parametrize("rule", [TRPO, PPO])
def test_a_given_lambda_is_kept(rule):
    assert with_default_lam(rule(), 0.5).lam == 0.5
    assert with_default_lam(rule(lam=0.0), 0.5).lam == 0.0
