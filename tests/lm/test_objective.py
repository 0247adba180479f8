"""What is said of the noise in a batch's quantities; their values are held in test_trpo."""

import math

import pytest
import tiny
import torch

from trpo_lm.lm.objective import noise, reference_kl


def test_the_standard_error_of_the_reference_kl_is_that_of_a_mean_over_completions():
    policy = tiny.policy(spread=0.3)
    batch = tiny.batch(policy, each=6, micro_batch_size=64)
    lengths = batch.rollout.lengths.tolist()
    each = torch.stack([part.sum() for part in batch.ref_kl.double().split(lengths)])
    k, error = reference_kl(batch, tiny.identity, float(len(each)))
    assert len(set(lengths)) > 1
    assert k == pytest.approx(float(each.mean()))
    assert error == pytest.approx(float(each.std()) / math.sqrt(len(each)))


def test_the_signal_of_halves_that_share_nothing_is_none():
    """The square of the mean gradient would count its noise as signal."""
    seen = noise(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), N=2.0)
    assert (seen.signal, seen.cosine, seen.scale) == (0.0, 0.0, math.inf)
    assert seen.variance == pytest.approx((9 + 16) * 2 / 4)
    against = noise(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), N=2.0)
    assert against.signal == -1.0 and against.cosine == -1.0 and against.scale == math.inf
