"""The best score attainable at each KL, against closed forms."""

import math

import numpy as np
import pytest
import tiny
import torch

from trpo_lm.comparison.limit import limit_curve, reference_scores, tilted


@pytest.mark.parametrize("beta", [0.2, 0.7, 3.0])
def test_the_tilted_reference_of_a_coin(beta):
    """Scores 1 with probability p: the tilt is another coin, and its KL has a closed form."""
    p, n = 0.3, 1000
    scores = (torch.arange(n) < p * n).double()[None].repeat(2, 1)
    kl, score = tilted(scores, beta)
    q = p * math.exp(1 / beta) / (p * math.exp(1 / beta) + 1 - p)
    assert score == pytest.approx(q, rel=1e-9)
    want = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert kl == pytest.approx(want, rel=1e-9)


def test_the_limit_starts_at_the_reference_rises_and_stops_where_it_is_not_trusted():
    scores = torch.randn(40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[0, :10] = torch.nan  # abstained
    curve = limit_curve(scores)
    kl, score = (np.array([row[k] for row in curve]) for k in ("ref_kl", "score"))
    assert kl[0] == 0 and score[0] == pytest.approx(float(scores.nanmean(-1).mean()))
    assert (np.diff(kl) > 0).all() and (np.diff(score) > 0).all()
    assert 0.8 * math.log(64) / 2 < kl[-1] <= math.log(64) / 2
    # normal scores: tilting by 1/beta shifts the mean by s and costs s^2/2 nats
    i = int(np.searchsorted(kl, 0.5))
    assert score[i] - score[0] == pytest.approx(math.sqrt(2 * kl[i]), rel=0.1)


def test_equal_scores_have_no_frontier():
    assert limit_curve(torch.full((3, 8), 0.5)) == [{"beta": None, "ref_kl": 0.0, "score": 0.5}]


def test_samples_for_the_limit_are_the_references():
    policy = tiny.policy(spread=0.6)
    prompts = tiny.PROMPTS * 5  # more than are sampled at once
    theta = policy.parameters.checksum()
    scores = reference_scores(policy, tiny.mdp(), prompts, {}, samples=3, seed=(0,))
    with policy.reference():
        again = reference_scores(policy, tiny.mdp(), prompts, {}, samples=3, seed=(0,))
    assert scores.shape == (20, 3) and torch.equal(scores, again)
    assert policy.parameters.checksum() == theta
