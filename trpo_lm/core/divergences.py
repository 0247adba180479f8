"""Distributions over the vocabulary: log-probability of a token, entropy, exact KL.

    log pi(a|s) = z_a - logsumexp(z)
    H(pi)       = - sum_a pi(a) log pi(a)
    KL(p ‖ q)   = sum_a p(a) (log p(a) - log q(a))

and their gradients by the logits z of pi, or of p:

    d log pi(a|s) / dz = e_a - pi               d KL(p ‖ q) / dz = p (log p - log q - KL)

Everything is computed in float32 (float64 stays float64): with a bfloat16 log-softmax the error of
the KL of two nearby policies is a thousand times its size. Nothing here samples, and no estimator
of a KL is offered.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities in at least float32; `logits` is (..., V)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits, dim=-1, dtype=dtype)


def token_logprobs(logprobs: Tensor, actions: Tensor) -> Tensor:
    """Pick log pi(a_t|s_t): `logprobs` (..., V), `actions` (...) of int64; returns (...), nats."""
    return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def entropy(logprobs: Tensor) -> Tensor:
    """Return H(pi) per state in nats; `logprobs` (..., V), impossible tokens (-inf) add 0."""
    finite = logprobs
    if _some_impossible(logprobs):
        finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return -(logprobs.exp() * finite).sum(-1)


def _some_impossible(logprobs: Tensor) -> bool:
    """Return whether some probability is zero."""
    return logprobs.numel() > 0 and bool(logprobs.amin() == -torch.inf)


def categorical_kl(*, old: Tensor, new: Tensor) -> Tensor:
    """Return KL(old ‖ new) per state, summed over the whole vocabulary.

    Written as  sum_a [ p (log p - log q) + q - p ]. The last two sum to zero, because both are
    distributions, but with them every term is >= 0 and the rounding of the two normalisers enters
    squared. Where p and q are close, q - p is p expm1(log q - log p): two float32 policies a hair
    apart get a KL that is right, not noise around zero.

    Args:
        old: Log-probabilities of p, shape (..., V); -inf where p is zero.
        new: Log-probabilities of q, shape (..., V).

    Returns:
        KL in nats, shape (...); +inf where q is zero and p is not. Differentiable in both.
    """
    gap = new - old
    if not gap.numel():  # of no states
        return gap.sum(-1)
    low, high = gap.detach().aminmax()
    if low > -80.0 and high < 80.0:  # q - p = p expm1(log q - log p) does not overflow
        return torch.linalg.vecdot(old.exp(), torch.expm1(gap) - gap)
    p, gap = old.exp(), -gap
    if _some_impossible(old):  # 0 log 0 = 0, also where q is zero as well
        gap = torch.where(old == -torch.inf, 2.0, old.masked_fill(old == -torch.inf, 0.0) - new)
    small = gap.clamp(-1.0, 1.0)  # beyond, nothing cancels, and expm1 may overflow
    near, far = p * (small + torch.expm1(-small)), p * gap + (new.exp() - p)
    return torch.where(gap.abs() < 1.0, near, far).sum(-1)


def logprob_gradient(probabilities: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of sum_t w_t log pi(a_t|s_t) by the logits, (S, V).

    Args:
        probabilities: pi, (S, V).
        actions: a_t, (S,) int64.
        weights: w_t, (S,).
    """
    weights = weights.to(probabilities).unsqueeze(-1)
    return (probabilities * -weights).scatter_add_(-1, actions.unsqueeze(-1), weights)


def kl_gradient(logprobs: Tensor, ref_logprobs: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of sum_t [KL(pi ‖ pi_ref) + w_t log pi(a_t|s_t)] by pi's logits, (S, V).

    Args:
        logprobs: Log-probabilities of pi, (S, V); -inf where pi is zero.
        ref_logprobs: Those of pi_ref, (S, V).
        actions: a_t, (S,) int64.
        weights: w_t, (S,).
    """
    p, gap = logprobs.exp(), logprobs - ref_logprobs
    if _some_impossible(logprobs):
        gap = gap.masked_fill(logprobs == -torch.inf, 0.0)
    weights = weights.to(p).unsqueeze(-1)
    cost = torch.linalg.vecdot(p, gap).unsqueeze(-1) + weights
    return p.mul_(gap.sub_(cost)).scatter_add_(-1, actions.unsqueeze(-1), weights)
