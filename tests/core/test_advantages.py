"""Advantages against their definitions, in float64."""

import math

import pytest
import torch

from trpo_lm.core.advantages import gae, group_normalised, leave_one_out, returns, whiten

LENGTHS = [1, 4, 6, 3]


def case(seed=0, T=6):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]
    rewards, values = torch.randn(2, len(LENGTHS), T, generator=g, dtype=torch.float64)
    return rewards * mask, values, mask


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_equals_its_definition(gamma, lam):
    """A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), V(terminal) = 0."""
    rewards, values, mask = case()
    A = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i, n in enumerate(LENGTHS):
        V = [*values[i, :n].tolist(), 0.0]
        for t in range(n):
            expected = sum(
                (gamma * lam) ** (k - t) * (float(rewards[i, k]) + gamma * V[k + 1] - V[k])
                for k in range(t, n)
            )
            assert float(A[i, t]) == pytest.approx(expected, rel=1e-12)
    assert bool((A[~mask] == 0).all())


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.6, 0.8]])
    A = gae(rewards, values, torch.ones(1, 3).bool(), gamma=1.0, lam=1.0)
    torch.testing.assert_close(A, torch.tensor([[0.5, 0.4, 0.2]]))


def test_with_gamma_and_lambda_one_it_is_the_return_less_the_value():
    rewards, values, mask = case()
    total = returns(rewards, mask, gamma=1.0)
    for i, n in enumerate(LENGTHS):
        assert total[i, :n].tolist() == pytest.approx(
            [float(rewards[i, t:n].sum()) for t in range(n)]
        )
    A = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(A, (total - values) * mask)


def test_T16_an_episode_of_one_action():
    mask = torch.tensor([[True, False]])
    A = gae(torch.tensor([[2.0, 9.0]]), torch.tensor([[0.5, 7.0]]), mask, gamma=1.0, lam=0.3)
    assert A.tolist() == [[1.5, 0.0]]


def test_what_stands_in_the_padding_does_not_matter():
    rewards, values, mask = case()
    rubbish = torch.where(mask, 0.0, 1e6)
    one = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    two = gae(rewards + rubbish, values - rubbish, mask, gamma=0.9, lam=0.7)
    assert torch.equal(one, two)
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in (rewards, values, mask)]
    assert torch.equal(gae(*wide, gamma=0.9, lam=0.7)[:, :6], one)


def test_rows_do_not_see_each_other():
    rewards, values, mask = case()
    order = torch.tensor([2, 0, 3, 1])
    one = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    two = gae(rewards[order], values[order], mask[order], gamma=0.9, lam=0.7)
    assert torch.equal(one[order], two)


SCORES = torch.tensor([1.0, 2.0, 6.0, 5.0, math.nan, 3.0, math.nan, math.nan], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])


def test_leave_one_out_by_hand():
    A = leave_one_out(SCORES, GROUPS)
    assert A.tolist() == [1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0, 0, 0]


def test_leave_one_out_is_centred_and_ignores_order():
    g = torch.Generator().manual_seed(0)
    scores, groups = torch.randn(12, generator=g), torch.arange(12) % 3
    A = leave_one_out(scores, groups)
    for k in range(3):
        group = scores[groups == k]
        torch.testing.assert_close(A[groups == k], (group - group.mean()) * 4 / 3)
    order = torch.randperm(12, generator=g)
    torch.testing.assert_close(leave_one_out(scores[order], groups[order]), A[order])


def test_group_normalised_by_hand():
    A = group_normalised(SCORES, GROUPS, epsilon=0.0001)
    std = math.sqrt((4 + 1 + 9) / 2)
    expected = [(x - 3) / (std + 1e-4) for x in (1, 2, 6)] + [0.0] * 5
    assert A.tolist() == pytest.approx(expected)


def test_group_normalised_hardly_sees_the_scale_of_a_group():
    scores = torch.tensor([1.0, 2.0, 1e6, 2e6], dtype=torch.float64)
    A = group_normalised(scores, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(A[:2], A[2:], rtol=1e-3, atol=0)


def whole(t):
    return t


def test_whiten_gives_mean_zero_and_deviation_one_on_the_mask():
    rewards, values, mask = case()
    out = whiten(values, mask, whole)
    assert float(out[mask].mean()) == pytest.approx(0, abs=1e-14)
    assert float(out[mask].std(correction=0)) == pytest.approx(1)
    assert bool((out[~mask] == 0).all()) and out.dtype == torch.float64
    x = values[mask]
    torch.testing.assert_close(out[mask], (x - x.mean()) / x.std(correction=0))


@pytest.mark.parametrize("scale, shift", [(1e12, 0.0), (1.0, 1e9), (1e-9, 0.0), (-1.0, 0.0)])
def test_R13_whitening_removes_scale_and_shift(scale, shift):
    _, values, mask = case()
    one, two = whiten(values, mask, whole), whiten(scale * values + shift, mask, whole)
    torch.testing.assert_close(two, math.copysign(1, scale) * one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e9 + 0.1, -7e-9])
@pytest.mark.parametrize("n", [1, 3, 7, 1000])
def test_R12_equal_values_whiten_to_zero_whatever_their_mean_rounds_to(value, n):
    """The mean of three 0.1 is not 0.1: the difference must not be blown up to a signal."""
    A = whiten(torch.full((1, n), value, dtype=torch.float64), torch.ones(1, n).bool(), whole)
    assert bool((A == 0).all())


def test_whitening_over_ranks_is_whitening_of_the_whole():
    """Two ranks with unequal counts; the sum over ranks is played by replaying the first pass."""
    values = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 5).bool()
    expected = whiten(values, mask, whole)
    parts = (slice(0, 1), slice(1, 3))
    sums: list[list[torch.Tensor]] = [[], []]
    for _ in range(3):  # after each round one more reduction is known
        for rank, part in enumerate(parts):
            seen: list[torch.Tensor] = []

            def reduce(t, seen=seen, rank=rank):
                seen.append(t)
                k = len(seen) - 1
                other = sums[1 - rank]
                return t + other[k] if k < len(other) else t

            out = whiten(values[part], mask[part], reduce)
            sums[rank] = seen
            if _ == 2:
                torch.testing.assert_close(out, expected[part])
