"""L, D and R of one batch: gradients, exact values, and Fisher products.

    L(theta) = E[ ratio A ]                    D(theta) = E[ KL(pi_old ‖ pi_theta) ]
    R(theta) = E_{y ~ pi_theta}[ sum_t KL(pi_theta ‖ pi_ref) ]

E is the mean over completions of a sum over their tokens. KLs are exact over the vocabulary, chunk
by chunk. Everything is summed over a rank's completions first and over ranks after.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trpo_lm.core.divergences import (
    categorical_kl,
    kl_gradient,
    logprob_gradient,
    token_logprobs,
)
from trpo_lm.core.fisher import (
    FisherOperator,
    ForwardFisher,
    Linear,
    ScoreFisher,
    softmax_curvature,
)
from trpo_lm.core.natural_step import Measurement
from trpo_lm.core.parameters import Reduce
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.rollout import Batch, micro_batches
from trpo_lm.seeds import generator

CACHED_CHUNKS = 16  # of probabilities, kept between Fisher products; more are computed anew
FISHER_SHARE = 1 / 16  # of the batch's completions in the Fisher
FEWEST, FEWEST_TOKENS = 2, 96  # completions in it and tokens of these, at least
SCORES = 64  # sampled, where products are made of them

Fisher = FisherOperator | ForwardFisher | ScoreFisher


class BatchObjective:
    """What an update rule may ask of one batch; every answer is the same on every rank.

    Args:
        policy: At theta_old.
        batch: Completions sampled from it.
        advantages: A_t, (N, T), in units of their standard deviation; None: zeros, for D and R.
        reduce: Sums a tensor over ranks.
        seed: What random choices made on this batch derive from.

    Attributes:
        theta: The policy's parameters, M numbers.
        N: Completions of all ranks.
    """

    def __init__(
        self,
        policy: Policy,
        batch: Batch,
        advantages: Tensor | None,
        reduce: Reduce,
        seed: tuple[int | str, ...] = (0,),
    ):
        self.policy, self.batch, self.reduce, self.seed = policy, batch, reduce, seed
        self.theta = policy.parameters
        self.advantages = torch.zeros_like(batch.old_logprobs)  # (S,)
        if advantages is not None:
            self.advantages = advantages[batch.rollout.action_mask].to(batch.old_logprobs)
        self.N = float(reduce(torch.tensor(float(len(batch.rollout)), dtype=torch.float64)))

    def gradients(self, *, reference: bool) -> tuple[Tensor, Tensor | None]:
        """Return N grad L and N grad R as the sums over two halves of the batch, (2, M) each.

        grad R = E[ sum_t ( grad KL_t + grad log pi(a_t|s_t) sum_{t'>t} KL_t' ) ]: the second part
        is the drift through the prefixes that the policy visits. Each KL_t' is taken relative to
        its mean over the batch at that position: a baseline, without which the noise of this part
        grows with R.

        Args:
            reference: Whether grad R is wanted; None in its place otherwise.

        Source: Amini, Vieira and Cotterell (2025), arXiv:2504.10637.
        """
        policy, batch, theta, r = self.policy, self.batch, self.theta, self.batch.rollout
        kl = r.padded(batch.ref_kl).double()
        kl = kl - self.reduce(kl.sum(0)) / self.N  # the gradient of R's normalised weights
        after = (kl.flip(-1).cumsum(-1).flip(-1) - kl)[r.action_mask].to(batch.ref_kl)  # t' > t
        g = torch.zeros(2, len(theta), device=policy.device, dtype=theta.tensors[0].dtype)
        b = torch.zeros_like(g)
        for half in range(2):  # by prompt: completions of one prompt are not independent
            chosen = (r.groups % 2 == half).nonzero()[:, 0]
            for rows, tokens in micro_batches(policy, r, "gradient", chosen):
                features = policy.features(*r.model_inputs(rows))
                actions, advantages = batch.actions[tokens], self.advantages[tokens]
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
        return self.reduce(g), self.reduce(b) if reference else None

    def clipped_gradient(self, rows: Tensor, clip: float | None) -> Tensor:
        """Return the gradient of the clipped surrogate on some rows, (M,), a mean over tokens.

        Args:
            rows: Of this rank's completions.
            clip: The ratio counts within 1 +- clip; None: everywhere.

        Source: PPO, arXiv:1707.06347, eq. 7.
        """
        policy, batch, r = self.policy, self.batch, self.batch.rollout
        total = self.theta.zeros()
        for part, tokens in micro_batches(policy, r, "gradient", rows):
            features = policy.features(*r.model_inputs(part))

            def slope(logprobs: Tensor, s: slice, tokens: Tensor = tokens) -> list[Tensor]:
                actions, A = batch.actions[tokens[s]], self.advantages[tokens[s]]
                ratio = (token_logprobs(logprobs, actions) - batch.old_logprobs[tokens[s]]).exp()
                gain = ratio * A  # and so is its derivative by log pi
                if clip is not None:  # beyond the clip there is nothing to gain
                    gain = gain * (gain <= ratio.clamp(1 - clip, 1 + clip) * A)
                return [logprob_gradient(logprobs.exp(), actions, gain)]

            (cotangent,) = policy.cotangents(features, slope)
            total += self.theta.gradient(features, cotangent=cotangent)
        count = float(self.reduce(r.lengths[rows].double().sum()))
        return self.reduce(total) / max(count, 1.0)

    def reference_kl(self) -> tuple[float, float]:
        """Return R(theta_old) on the batch, exact per state, and its standard error by sampling."""
        each = self.batch.rollout.padded(self.batch.ref_kl).double().sum(-1)
        k = float(self.reduce(each.sum())) / self.N
        squares = float(self.reduce((each - k).square().sum()))
        return k, math.sqrt(squares / max(self.N - 1, 1) / self.N)

    def fisher(self, completions: int | None = None) -> Fisher:
        """Return v -> F v over the tokens of whole completions, an even share of the batch.

        Products are exact where the model and memory allow: by a retained graph, or else by
        forward-mode differentiation. Otherwise they are made of sampled scores.

        Args:
            completions: Over all ranks; None: `FISHER_SHARE` of the batch.
        """
        policy, r, theta = self.policy, self.batch.rollout, self.theta
        length = float(self.reduce(r.lengths.double().sum().cpu())) / self.N
        share = math.ceil(completions_in_fisher(completions, self.N, length) * len(r) / self.N)
        rows = torch.linspace(0, len(r) - 1, min(len(r), share)).round().long().unique()
        kind, rows = self._product(rows, fixed=completions is not None)
        count = float(self.reduce(torch.tensor(float(len(rows)), dtype=torch.float64)))
        if kind == "scores":
            return ScoreFisher(self.scores(), count=self.N, reduce=self.reduce)
        parts = list(micro_batches(policy, r, "fisher", rows))
        if kind == "retained":
            outputs = [policy.linearised(*r.model_inputs(part)) for part, _ in parts]
            pieces = [(h, head_curvature(policy, h.detach())) for h in outputs]
            return FisherOperator(theta, pieces, count=count, reduce=self.reduce)
        old = self.batch.old_features
        pieces = [forward_piece(policy, r.model_inputs(part), old[at]) for part, at in parts]
        return ForwardFisher(theta, pieces, count=count, reduce=self.reduce)

    def _product(self, rows: Tensor, *, fixed: bool) -> tuple[str, Tensor]:
        """Return how products on some rows are made, and the rows: fewer where memory is short.

        Args:
            rows: Of this rank's completions.
            fixed: Whether they may not become fewer.
        """
        policy, length = self.policy, self.batch.rollout.attention_mask.sum(-1)
        fewest = FEWEST * len(length) / self.N
        kind = choose_product(policy, length[rows])[0]
        able = "retained" in policy.exact_products
        while kind != "retained" and able and not fixed and len(rows) > fewest:
            rows = rows[: math.ceil(len(rows) / 2)]
            kind = choose_product(policy, length[rows])[0]
        others = float(kind != "retained")  # on any rank: then on all
        if self.reduce(torch.tensor(others, dtype=torch.float64)) and kind == "retained":
            kind = "forward" if "forward" in policy.exact_products else "scores"
        return kind, rows

    def scores(self, draws: int = SCORES) -> Tensor:
        """Return the scores of actions drawn from the policy at the states of the batch, (K, M).

        Args:
            draws: K over all ranks, at most the completions; each covers an even share of them.
        """
        policy, r, theta = self.policy, self.batch.rollout, self.theta
        noise = generator(*self.seed, "scores")  # type: ignore[misc]
        count = math.ceil(min(1.0, draws / self.N) * len(r))
        groups = policy.in_step(torch.arange(len(r)).tensor_split(count))
        S = torch.zeros(len(groups), len(theta), device=policy.device, dtype=theta.tensors[0].dtype)

        def slope(logprobs: Tensor, s: slice) -> list[Tensor]:
            p = logprobs.exp()
            below = p.cumsum(-1, dtype=torch.float64)
            at = torch.rand(len(p), 1, generator=noise, dtype=torch.float64).to(p.device)
            drawn = torch.searchsorted(below, at * below[:, -1:]).clamp(max=p.shape[1] - 1)
            return [torch.zeros_like(p).scatter_(1, drawn, 1.0) - p]

        for row, group in zip(S, groups, strict=True):
            for part, _ in micro_batches(policy, r, "gradient", group):
                features = policy.features(*r.model_inputs(part))
                (cotangent,) = policy.cotangents(features, slope)
                row += theta.gradient(features, cotangent=cotangent)
        return S

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Measure L - L_old, D, R and the largest KL of a state at the present theta, exactly.

        R re-weights each state by the ratio of its prefix, prod_{t'<t} ratio_t': without it R would
        count only the prefixes of the old policy, and the budget would leak through the drift. The
        weights are normalised at each position (a completion that has ended keeps its last weight).
        """
        policy, batch, r = self.policy, self.batch, self.batch.rollout
        logprobs = torch.zeros_like(batch.old_logprobs)
        kl, ref_kl = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        for rows, tokens in micro_batches(policy, r, "forward"):
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
        prefix = (weights / (self.reduce(weights.sum(0)) / self.N))[r.action_mask]
        gain = (torch.expm1(log_ratio) * self.advantages).sum()
        sums = torch.stack([gain, kl.double().sum(), (prefix * ref_kl).sum()])
        means = self.reduce(sums) / self.N
        return Measurement(float(means[0]), float(means[1]), float(means[2]), float(kl.max()))


def choose_product(policy: Policy, lengths: Tensor) -> tuple[str, str]:
    """Return how Fisher products over rows of these lengths are made, and why.

    Returns:
        'retained', 'forward' or 'scores', the cheapest way that works and fits; and the reason.
    """
    tokens, longest = int(lengths.sum()), int(lengths.max())
    size = policy.room.costs["fisher"].per_token(longest) * tokens / 2**30
    graph = f"the graph of {tokens} tokens takes {size:.2g} GiB"
    fits = policy.room.holds("fisher", tokens, longest)
    if fits and "retained" in policy.exact_products:
        return "retained", f"exact; {graph}"
    if "forward" in policy.exact_products:
        fault = policy.product_faults.get("retained", f"{graph}, too much here")
        return "forward", f"exact, nothing is kept; {fault}"
    fault = "; ".join(f"{name}: {why}" for name, why in policy.product_faults.items())
    return "scores", f"sampled, by first derivatives only; {fault}"


def completions_in_fisher(asked: int | None, N: float, length: float) -> float:
    """Return how many completions of N make up the Fisher products, unless memory is short.

    Args:
        asked: As set; None: `FISHER_SHARE` of them, at least `FEWEST` and `FEWEST_TOKENS`.
        N: Completions of the batch, of all processes.
        length: Of a completion, tokens.
    """
    fewest = max(FEWEST, FEWEST_TOKENS / length)
    return min(N, max(fewest, N * FISHER_SHARE)) if asked is None else asked


def forward_piece(
    policy: Policy, inputs: tuple[Tensor, Tensor, Tensor], old: Tensor
) -> tuple[Linear, Linear, Linear]:
    """Return v -> J v, the curvature and c -> J^T c on some rows, policy at theta_old.

    Args:
        policy: At theta_old.
        inputs: Of a pass over the rows.
        old: Its features at their states, (S, D).
    """

    def jvp(v: Tensor) -> Tensor:
        return policy.jvp(v, *inputs)

    def vjp(c: Tensor) -> Tensor:
        return policy.parameters.gradient(policy.features(*inputs), cotangent=c)

    return jvp, head_curvature(policy, old), vjp


def head_curvature(policy: Policy, features: Tensor) -> Linear:
    """Return u -> W^T (diag p - p p^T) W u on features (n, D), W the tempered output layer."""
    slices = list(policy.chunks(len(features)))

    def curvature(s: slice) -> Linear:
        with torch.no_grad():
            return softmax_curvature(policy.logprobs(features[s]))

    few = len(slices) <= CACHED_CHUNKS
    cached = [curvature(s) for s in slices] if few else None

    def product(u: Tensor) -> Tensor:
        each = cached if cached is not None else (curvature(s) for s in slices)
        parts = zip(slices, each, strict=True)
        return torch.cat([policy.head_vjp(H(policy.head_jvp(u[s]))) for s, H in parts])

    return product
