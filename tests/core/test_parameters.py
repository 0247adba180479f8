"""Exact snapshots: a rejected step must leave no trace."""

import pytest
import torch

from trpo_lm.core.parameters import ParameterVector


def vector(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (2, 1, 2), ()]
    return ParameterVector([torch.randn(s).to(dtype).requires_grad_() for s in shapes])


def test_flatten_and_unflatten_are_inverse_and_keep_the_order():
    theta = vector()
    assert len(theta) == 12 + 5 + 4 + 1
    flat = torch.arange(22.0)
    parts = theta.unflatten(flat)
    assert [p.shape for p in parts] == [p.shape for p in theta.tensors]
    assert parts[1].tolist() == [12, 13, 14, 15, 16]
    assert torch.equal(theta.flatten(parts), flat)


def test_a_missing_gradient_counts_as_zero():
    theta = vector()
    flat = theta.flatten([None, torch.ones(5), None, None])
    assert flat.tolist() == [0] * 12 + [1] * 5 + [0] * 5
    output = (theta.tensors[1] ** 2).sum()
    expected = theta.flatten([None, 2 * theta.tensors[1], None, None])
    torch.testing.assert_close(theta.gradient(output), expected)
    assert all(p.grad is None for p in theta.tensors)


def test_zeros_and_a_copy_of_the_parameters_as_vectors():
    theta = vector()
    flat = theta.vector()
    assert torch.equal(flat, torch.cat([p.detach().reshape(-1) for p in theta.tensors]))
    assert not flat.requires_grad and torch.equal(theta.zeros(), torch.zeros(22))
    theta.assign(theta.snapshot(), torch.ones(22))
    assert not torch.equal(theta.vector(), flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_restore_is_exact_where_subtracting_the_step_is_not(dtype):
    theta = vector(dtype)
    before, checksum = theta.snapshot(), theta.checksum()
    step = (100 / 3 * torch.randn(22)).to(dtype)
    theta.assign(before, step, 0.7)
    assert theta.checksum() != checksum
    for p, q, s in zip(theta.tensors, before, theta.unflatten(step), strict=True):
        assert torch.equal(p, q + 0.7 * s)
    parts = theta.unflatten(step)
    there_and_back = [p - 0.7 * s for p, s in zip(theta.tensors, parts, strict=True)]
    assert not all(torch.equal(a, b) for a, b in zip(there_and_back, before, strict=True))
    theta.restore(before)
    assert theta.checksum() == checksum
    assert all(torch.equal(p, q) for p, q in zip(theta.tensors, before, strict=True))


def test_a_snapshot_does_not_follow_the_parameters():
    theta = vector()
    before = theta.snapshot()
    first = before[0].clone()
    theta.assign(before, torch.ones(22))
    assert torch.equal(before[0], first) and not before[0].requires_grad
    theta.assign(before, torch.ones(22))  # from the snapshot, not from where theta is
    torch.testing.assert_close(theta.tensors[0].detach(), first + 1)


def test_the_checksum_changes_with_one_bit():
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        theta = vector(dtype)
        sums = {theta.checksum()}
        for i in range(len(theta.tensors)):
            with torch.no_grad():
                theta.tensors[i].reshape(-1)[-1:].view(bits).bitwise_xor_(1)
            sums.add(theta.checksum())
        assert len(sums) == 1 + len(theta.tensors)
        assert all(len(s) == 16 for s in sums)


def test_the_checksum_tells_zero_from_minus_zero():
    a, b = ParameterVector([torch.zeros(2)]), ParameterVector([-torch.zeros(2)])
    assert a.checksum() != b.checksum()
