"""Distributions by hand, and the precision that the two KL constraints rest on."""

import math

import pytest
import torch

from trpo_lm.core.divergences import (
    categorical_kl,
    entropy,
    kl_gradient,
    log_softmax,
    logprob_gradient,
    token_logprobs,
)

P = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
Q = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)


def test_values_by_hand():
    assert float(categorical_kl(old=P.log(), new=Q.log())) == pytest.approx(0.25 * math.log(2))
    assert float(entropy(P.log())) == pytest.approx(1.5 * math.log(2))
    assert float(categorical_kl(old=P.log(), new=P.log())) == 0.0
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([1 - math.log(math.e + math.e**2 + math.e**3), -math.log(3)])
    torch.testing.assert_close(token_logprobs(log_softmax(logits), torch.tensor([0, 2])), expected)


def test_the_arguments_are_not_symmetric():
    R = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    forward = float(categorical_kl(old=P.log(), new=R.log()))
    assert forward == pytest.approx(float((P * (P / R).log()).sum()))
    assert forward != pytest.approx(float(categorical_kl(old=R.log(), new=P.log())), rel=1e-2)


def test_agrees_with_torch_in_float64():
    torch.manual_seed(0)
    p, q = torch.randn(2, 50, 1000, dtype=torch.float64).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(categorical_kl(old=p, new=q), expected)
    torch.testing.assert_close(entropy(p), torch.distributions.Categorical(logits=p).entropy())


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("V", [100, 50_000])
def test_two_near_float32_policies_have_the_kl_of_the_truth(apart, V):
    """KL ~ apart^2 / 2; the plain sum of p (log p - log q) is rounding noise at 1e-4."""
    torch.manual_seed(0)
    z = 2 * torch.randn(20, V)
    moved = z + apart * torch.randn(20, V)
    truth = categorical_kl(old=log_softmax(z.double()), new=log_softmax(moved.double()))
    kl = categorical_kl(old=log_softmax(z), new=log_softmax(moved))
    assert (kl >= 0).all() and truth.mean() > 0.1 * apart**2
    # What stays is the rounding of z + noise itself, already in the inputs of both.
    torch.testing.assert_close(kl.double(), truth, rtol=2e-2, atol=2e-13)


def test_never_negative():
    torch.manual_seed(0)
    for apart in (0.0, 1e-7, 1e-4, 1e-1, 3.0):
        z = 5 * torch.randn(200, 300)
        kl = categorical_kl(old=log_softmax(z), new=log_softmax(z + apart * torch.randn(200, 300)))
        assert (kl >= 0).all()


def test_K06_bfloat16_logits_are_measured_in_float32():
    torch.manual_seed(0)
    z = (3 * torch.randn(64, 5000)).bfloat16()
    moved = (z.float() + 0.02 * torch.randn(64, 5000)).bfloat16()
    kl = categorical_kl(old=log_softmax(z), new=log_softmax(moved))
    assert kl.dtype == torch.float32 and (kl >= 0).all()
    truth = categorical_kl(old=log_softmax(z.double()), new=log_softmax(moved.double()))
    torch.testing.assert_close(kl.double(), truth, rtol=1e-3, atol=1e-9)
    naive_old, naive_new = z.log_softmax(-1), moved.log_softmax(-1)  # in bfloat16
    naive = (naive_old.exp() * (naive_old - naive_new)).sum(-1).double()
    assert float((naive - truth).abs().max()) > 10 * float((kl - truth).abs().max())
    assert log_softmax(z.double()).dtype == torch.float64


def test_an_impossible_token_shared_by_both_gives_no_nan_and_the_right_gradient():
    logits = torch.tensor([[0.3, -torch.inf, 0.5, 1.0]], dtype=torch.float64)
    moved = torch.tensor([[0.1, -torch.inf, 0.9, 1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[0.3, -torch.inf, 0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    kl = categorical_kl(old=log_softmax(old), new=log_softmax(moved))
    keep = [0, 2, 3]
    short_old = logits[:, keep].clone().requires_grad_()
    short_new = moved[:, keep].detach().clone().requires_grad_()
    expected = categorical_kl(old=log_softmax(short_old), new=log_softmax(short_new))
    torch.testing.assert_close(kl, expected)
    grads = torch.autograd.grad(kl.sum(), (old, moved))
    short_grads = torch.autograd.grad(expected.sum(), (short_old, short_new))
    for grad, short in zip(grads, short_grads, strict=True):
        torch.testing.assert_close(grad[:, keep], short)
        assert float(grad[0, 1]) == 0.0
    assert float(entropy(log_softmax(logits))) == pytest.approx(
        float(entropy(log_softmax(logits[:, keep])))
    )


def test_a_token_impossible_for_old_only_costs_nothing_special():
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64).log().requires_grad_()
    kl = categorical_kl(old=p, new=q)
    assert kl.item() == pytest.approx(math.log(0.5 / 0.4))
    assert torch.isfinite(torch.autograd.grad(kl, q)[0]).all()


def test_a_token_impossible_for_new_only_is_infinitely_far():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).log()
    assert float(categorical_kl(old=p, new=q)) == math.inf
    mixed_old = torch.stack([p, q])  # another row with an impossible token of its own
    mixed_new = torch.stack([q, q])
    assert categorical_kl(old=mixed_old, new=mixed_new).tolist() == [math.inf, 0.0]


def test_gradient_of_the_kl_in_new_is_q_less_p():
    z = torch.tensor([0.2, -0.4, 1.0], dtype=torch.float64, requires_grad=True)
    kl = categorical_kl(old=P.log(), new=log_softmax(z))
    (grad,) = torch.autograd.grad(kl, z)
    torch.testing.assert_close(grad, z.detach().softmax(-1) - P)


def test_gradient_of_the_kl_in_old():
    """d/dz of KL(softmax z || q) = p (log p/q - KL)."""
    z = torch.tensor([0.2, -0.4, 1.0], dtype=torch.float64, requires_grad=True)
    kl = categorical_kl(old=log_softmax(z), new=Q.log())
    (grad,) = torch.autograd.grad(kl, z)
    p = z.detach().softmax(-1)
    torch.testing.assert_close(grad, p * ((p / Q).log() - kl.detach()))


@pytest.mark.parametrize("impossible", [None, 3])
def test_gradients_by_the_logits_are_those_of_autograd(impossible):
    z, moved = torch.randn(2, 5, 7, dtype=torch.float64)
    if impossible is not None:
        z[:, impossible] = moved[:, impossible] = -torch.inf
    z.requires_grad_()
    actions, weights = torch.tensor([0, 1, 2, 6, 6]), torch.randn(5, dtype=torch.float64)
    logprobs, new = log_softmax(z), log_softmax(moved)
    surrogate = (token_logprobs(logprobs, actions) * weights).sum()
    (expected,) = torch.autograd.grad(surrogate, z, retain_graph=True)
    torch.testing.assert_close(
        logprob_gradient(logprobs.detach().exp(), actions, weights), expected
    )
    possible = [a for a in range(7) if a != impossible]
    p, q = logprobs[:, possible], new[:, possible]
    cost = (p.exp() * (p - q)).sum() + (token_logprobs(logprobs, actions) * weights).sum()
    (expected,) = torch.autograd.grad(cost, z)
    torch.testing.assert_close(kl_gradient(logprobs.detach(), new, actions, weights), expected)
