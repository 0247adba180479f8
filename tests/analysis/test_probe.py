"""Forgetting and collapse, against their definitions."""

from itertools import pairwise

import pytest
import tiny

from trpo_lm.analysis.probe import probe


def test_the_reference_itself_forgot_nothing():
    policy = tiny.policy(spread=0.0)
    text = tiny.mdp().rollout(policy, tiny.PROMPTS, completions_per_prompt=4, seed=(1,))
    scores = probe(policy, text, text, judge=lambda p, c: [0.25] * len(p))
    assert scores["ref_kl"] == pytest.approx(0, abs=1e-6)
    assert scores["nll"] == pytest.approx(scores["nll_reference"], rel=1e-5)
    assert scores["judge"] == 0.25
    first = [text.completions[i] for i in (0, 4, 8, 12)]
    assert scores["duplicates"] == 1 - len(set(first)) / 4
    ids = [text.completion_ids[i] for i in (0, 4, 8, 12)]
    pairs = [(a, b) for row in ids for a, b in pairwise(row)]
    assert scores["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))


def test_a_moved_policy_is_seen_to_have_forgotten():
    policy = tiny.policy(spread=0.6)
    mdp = tiny.mdp()
    with policy.reference():
        text = mdp.rollout(policy, tiny.PROMPTS, completions_per_prompt=64, seed=(1,))
    rollout = mdp.rollout(policy, tiny.PROMPTS, completions_per_prompt=64, seed=(1,))
    scores = probe(policy, rollout, text)
    assert scores["ref_kl"] > 0.1 and scores["nll"] > scores["nll_reference"]
    assert scores["judge"] is None
