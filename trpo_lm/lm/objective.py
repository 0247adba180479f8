"""The quantities of a batch that an update needs: L, D and R, their gradients, and the Fisher.

    L(theta) = E[ ratio A ]                    D(theta) = E[ KL(pi_old ‖ pi_theta) ]
    R(theta) = E_{y ~ pi_theta}[ sum_t KL(pi_theta ‖ pi_ref) ]

E is the mean over completions of a sum over their tokens. KLs are exact over the vocabulary, chunk
by chunk. Everything is summed over a rank's completions first and over ranks after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trpo_lm.core.divergences import categorical_kl, kl_gradient, logprob_gradient, token_logprobs
from trpo_lm.core.fisher import FiniteDifference, FisherOperator, softmax_curvature
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.mdp import Batch
from trpo_lm.lm.policy import Policy

CACHED_CHUNKS = 16  # of probabilities, kept between Fisher products; more are computed anew

Product = Callable[[Tensor], Tensor]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measurement:
    """Exact on the batch at some theta: gain of L, D, R, and the largest KL of a state."""

    gain: float
    kl: float
    ref_kl: float = math.nan
    kl_max: float = math.nan


def gradients(
    policy: Policy, batch: Batch, reduce: Reduce, N: float, *, reference: bool
) -> tuple[Tensor, Tensor | None]:
    """Return N grad L and N grad R as the sums over two halves of the batch, (2, M) each.

    grad R = E[ sum_t ( grad KL_t + grad log pi(a_t|s_t) sum_{t'>t} KL_t' ) ]: the second part is
    the drift through the prefixes that the policy visits. Each KL_t' is taken less its mean over
    the batch at that position: a baseline, without which the noise of this part grows with R.

    Source: Amini, Vieira and Cotterell (2025), arXiv:2504.10637 (Rao-Blackwellised KL gradient).
    """
    r, theta = batch.rollout, policy.parameters
    kl = r.padded(batch.ref_kl).double()
    kl = kl - reduce(kl.sum(0)) / N  # the gradient of R's normalised weights
    after = (kl.flip(-1).cumsum(-1).flip(-1) - kl)[r.action_mask].to(batch.ref_kl)  # t' > t
    g = torch.zeros(2, len(theta), device=policy.device, dtype=theta.tensors[0].dtype)
    b = torch.zeros_like(g)
    share = 0.5 if reference else 1.0  # a graph that is kept for a second backward pass
    for half in range(2):  # by prompt: completions of one prompt are not independent
        chosen = (r.groups % 2 == half).nonzero()[:, 0]
        for rows, tokens in batch.micro_batches(chosen, share=share):
            features = policy.features(*r.model_inputs(rows))
            actions, advantages = batch.actions[tokens], batch.advantages[tokens]
            drift, ref_features = after[tokens], batch.ref_features[tokens]

            def slopes(logprobs: Tensor, s: slice, a=actions, A=advantages, d=drift,
                       ref=ref_features) -> list[Tensor]:  # fmt: skip
                of_L = logprob_gradient(logprobs.exp(), a[s], A[s])  # ratio = 1 at theta_old
                if not reference:
                    return [of_L]
                return [of_L, kl_gradient(logprobs, policy.logprobs(ref[s]), a[s], d[s])]

            for_g, *for_b = policy.cotangents(features, slopes)
            g[half] += theta.gradient(features, cotangent=for_g, retain=bool(for_b))
            if for_b:
                b[half] += theta.gradient(features, cotangent=for_b[0])
    return reduce(g), reduce(b) if reference else None


def reference_kl(batch: Batch, reduce: Reduce, N: float) -> tuple[float, float]:
    """Return R(theta_old) on the batch, exact per state, and its standard error by sampling."""
    each = batch.rollout.padded(batch.ref_kl).double().sum(-1)
    k = float(reduce(each.sum())) / N
    return k, math.sqrt(float(reduce((each - k).square().sum())) / max(N - 1, 1) / N)


@dataclass(frozen=True)
class Noise:
    """Signal and noise of a sampled gradient: |mean|^2, and the variance of one completion's."""

    signal: float
    variance: float
    cosine: float

    @property
    def scale(self) -> float:
        """Completions at which signal equals noise; inf where the halves disagree altogether."""
        return self.variance / self.signal if self.signal > 0 else math.inf


def noise(sums: Tensor, N: float) -> Noise:
    """Compare the gradients of two halves of a batch.

    The product of two independent halves estimates the squared signal without bias.

    Args:
        sums: Sums of gradients over the completions of each half, (2, M).
        N: Completions of both.

    Source: McCandlish et al. (2018), arXiv:1812.06162, App. A.
    """
    first, second = sums.double() / (N / 2)
    lengths = float(first.norm() * second.norm())
    signal = float(first @ second)
    return Noise(
        signal=signal,
        variance=float((first - second).square().sum()) * N / 4,
        cosine=signal / lengths if lengths > 0 else math.nan,
    )


def fisher(
    policy: Policy, batch: Batch, reduce: Reduce, completions: int
) -> FisherOperator | FiniteDifference:
    """Return F over the tokens of whole completions, an even share of the batch.

    Raises:
        TrpoLMError: If the model has no second derivative and computes in half precision, where
            finite differences are noise.
    """
    r, theta = batch.rollout, policy.parameters
    everyone = float(reduce(torch.tensor(float(len(r)), dtype=torch.float64)))
    share = max(1, min(len(r), math.ceil(completions * len(r) / everyone)))
    rows = torch.linspace(0, len(r) - 1, share).round().long().unique()
    count = float(reduce(torch.tensor(float(len(rows)), dtype=torch.float64)))
    parts = [r.model_inputs(part) for part, _ in batch.micro_batches(rows)]
    if policy.lacks_second_derivative is not None:
        return _finite_difference(policy, parts, count, reduce)
    outputs = [policy.linearised(*inputs) for inputs in parts]
    pieces = [(features, head_curvature(policy, features.detach())) for features in outputs]
    return FisherOperator(theta, pieces, count=count, reduce=reduce)


def _finite_difference(
    policy: Policy, parts: list[tuple[Tensor, Tensor, Tensor]], count: float, reduce: Reduce
) -> FiniteDifference:
    """Return F from grad D on some micro-batches, policy at theta_old."""
    theta = policy.parameters
    old = [policy.features(*inputs).detach() for inputs in parts]  # as `slope` runs them
    if any(h.dtype in (torch.bfloat16, torch.float16) for h in old):
        raise TrpoLMError(
            f"Fisher products need second derivatives ({policy.lacks_second_derivative}); finite "
            "differences of half-precision gradients are noise",
            where=f"model {policy.name}", hint="load the model in float32 (bf16=False)",
        )  # fmt: skip

    def slope() -> Tensor:
        total = theta.zeros()
        for inputs, before in zip(parts, old, strict=True):
            features = policy.features(*inputs)

            def of_D(new: Tensor, s: slice, before: Tensor = before) -> list[Tensor]:
                return [new.exp() - policy.logprobs(before[s]).exp()]

            (cotangent,) = policy.cotangents(features, of_D)
            total += theta.gradient(features, cotangent=cotangent)
        return total

    return FiniteDifference(theta, slope, count=count, reduce=reduce)


def head_curvature(policy: Policy, features: Tensor) -> Product:
    """Return u -> W^T (diag p - p p^T) W u on features (n, D), W the tempered output layer."""
    slices = list(policy.chunks(len(features)))

    def curvature(s: slice) -> Product:
        with torch.no_grad():
            return softmax_curvature(policy.logprobs(features[s]))

    few = len(slices) <= CACHED_CHUNKS
    cached = [curvature(s) for s in slices] if few else None

    def product(u: Tensor) -> Tensor:
        each = cached if cached is not None else (curvature(s) for s in slices)
        parts = zip(slices, each, strict=True)
        return torch.cat([policy.head_vjp(H(policy.head_jvp(u[s]))) for s, H in parts])

    return product


@torch.no_grad()
def measure_at(policy: Policy, batch: Batch, reduce: Reduce, N: float) -> Measurement:
    """Measure L - L_old, D, R and the largest KL of a state at the present theta, exactly.

    R re-weights each state by the ratio of its prefix, prod_{t'<t} ratio_t': without it R would
    count only the prefixes of the old policy, and the budget would leak through the drift. The
    weights are normalised at each position (a completion that has ended keeps its last weight).
    """
    r = batch.rollout
    logprobs = torch.zeros_like(batch.old_logprobs)
    kl, ref_kl = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    for rows, tokens in batch.micro_batches():
        features = policy.features(*r.model_inputs(rows))
        for s in policy.chunks(len(features)):
            at = tokens[s]
            new = policy.logprobs(features[s])
            logprobs[at] = token_logprobs(new, batch.actions[at])
            kl[at] = categorical_kl(old=policy.logprobs(batch.old_features[at]), new=new)
            ref_kl[at] = categorical_kl(old=new, new=policy.logprobs(batch.ref_features[at]))
    log_ratio = (logprobs - batch.old_logprobs).double()
    steps = r.padded(log_ratio)
    weights = (steps.cumsum(-1) - steps).exp()
    prefix = (weights / (reduce(weights.sum(0)) / N))[r.action_mask]
    gain = (torch.expm1(log_ratio) * batch.advantages).sum()
    sums = reduce(torch.stack([gain, kl.double().sum(), (prefix * ref_kl).sum()])) / N
    return Measurement(float(sums[0]), float(sums[1]), float(sums[2]), float(kl.max()))
