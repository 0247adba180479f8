"""First-order policy gradients with Adam: PPO, and by other values of its fields its relatives.

    maximise  E_token[ min(ratio A, clip(ratio, 1 - c, 1 + c) A) ],  K epochs of minibatches

    row         advantage estimator                      update rule                        critic
    PPO         "gae"                                    clip, epochs x minibatches         yes
    REINFORCE   "gae", lam=1: return less baseline       epochs=1, minibatches=1, clip=None yes
    RLOO        "leave_one_out"                          epochs=1, minibatches=1, clip=None no
    GRPO        "group_normalised"                       clip; one epoch as in TRL, or more no

E_token is the mean over a minibatch's tokens. With beta > 0 each action pays
beta (log pi_old(a|s) - log pi_ref(a|s)), whose expectation is the exact KL; with a target, beta is
raised or lowered after each update. Metrics carry TRPO's names: the KL that the update made is
measured exactly, though nothing here bounds it.

Differs from TRL's GRPO: the price of the KL is part of the reward, so it is standardised within the
group with the score; TRL adds beta times an estimate of the KL (k3) to the loss after that.

Source: Schulman et al. (2017), arXiv:1707.06347, eq. 7; adaptive beta: Ziegler et al. (2019),
arXiv:1909.08593, section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trpo_lm.config import Limits, PPOSettings
from trpo_lm.core.advantages import gae, group_normalised, leave_one_out, whiten
from trpo_lm.core.divergences import logprob_gradient, token_logprobs
from trpo_lm.lm.mdp import Batch
from trpo_lm.lm.objective import Reduce, measure_at
from trpo_lm.lm.policy import Policy
from trpo_lm.seeds import generator


@dataclass(frozen=True)
class PPO(PPOSettings):
    """Proximal policy optimisation of a language model, the baseline to compare with."""

    @property
    def limits(self) -> Limits:
        """No distance is limited."""
        return Limits()

    @property
    def needs_critic(self) -> bool:
        """Whether advantages look at values."""
        return self.advantage == "gae"

    def with_lam(self, lam: float) -> PPO:
        """Return these settings with the critic's lambda where none was chosen."""
        return self if self.lam is not None else replace(self, lam=lam)

    def init_state(self, policy: Policy) -> dict[str, Any]:
        """Return Adam's moments, (M,) each, its step count, and the present price of the KL."""
        theta = policy.parameters
        zeros = theta.flatten([None] * len(theta.tensors))
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": 0.0, "beta": self.beta}

    def rewards(self, batch: Batch, state: dict[str, Any]) -> Tensor:
        """Return the MDP's rewards less the price of the reference KL, (N, T)."""
        rewards = batch.rollout.rewards
        if state["beta"] == 0.0:
            return rewards
        log_ratio = (batch.old_logprobs - batch.ref_logprobs).double().cpu()
        return rewards - state["beta"] * batch.rollout.padded(log_ratio)

    def advantages(self, batch: Batch, reduce: Reduce) -> Tensor:
        """Return A_t, (N, T), by the chosen estimator; GAE is whitened."""
        r = batch.rollout
        mask = r.action_mask
        if self.advantage == "gae":
            A = gae(batch.rewards, batch.values, mask, gamma=self.gamma, lam=self.lam or 0.0)
            return whiten(A, mask & r.scores.valid[:, None], reduce)
        scores = batch.rewards.sum(-1).masked_fill(~r.scores.valid, torch.nan)
        estimate = leave_one_out if self.advantage == "leave_one_out" else group_normalised
        return estimate(scores, r.groups)[:, None] * mask

    def update(
        self,
        policy: Policy,
        batch: Batch,
        reduce: Reduce,
        state: dict[str, Any],
        seed: tuple[int | str, ...] = (0,),
    ) -> dict[str, Any]:
        """Make `epochs` x `minibatches` Adam steps and return the metrics.

        Args:
            policy: At theta_old; moved.
            batch: Completions sampled from it, with advantages.
            reduce: Sums a tensor over ranks.
            state: From `init_state`; changed in place.
            seed: What the order of the minibatches derives from.
        """
        theta = policy.parameters
        flat = torch.nn.Parameter(theta.flatten(theta.tensors).detach())
        adam = torch.optim.Adam([flat], lr=self.learning_rate)
        adam.state[flat] = {
            "step": torch.tensor(state["step"]),
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
        }
        for epoch in range(self.epochs):
            order = torch.randperm(len(batch.rollout), generator=generator(*seed, "epoch", epoch))  # type: ignore[misc]
            for rows in order.tensor_split(self.minibatches):
                flat.grad = -self._gradient(policy, batch, reduce, rows)
                if self.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_([flat], self.max_grad_norm)
                adam.step()
                theta.restore(theta.unflatten(flat.detach()))
        moments = adam.state[flat]
        state |= {"exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
        state["step"] = float(moments["step"])
        N = float(reduce(torch.tensor(float(len(batch.rollout)), dtype=torch.float64)))
        after = measure_at(policy, batch, reduce, N)
        if self.target_ref_kl is not None:
            error = after.ref_kl / self.target_ref_kl - 1
            state["beta"] *= 1 + 0.1 * max(-0.2, min(0.2, error))
        return {
            "trust_region/kl": after.kl,
            "trust_region/kl_max": after.kl_max,
            "trust_region/actual_gain": after.gain,
            "trust_region/ref_kl_after": after.ref_kl,
            "ppo/beta": state["beta"],
        }

    def _gradient(self, policy: Policy, batch: Batch, reduce: Reduce, rows: Tensor) -> Tensor:
        """Return the gradient of the clipped surrogate on some rows, (M,), a mean over tokens."""
        r, theta = batch.rollout, policy.parameters
        total = theta.flatten([None] * len(theta.tensors))
        for part, tokens in batch.micro_batches(rows):
            features = policy.features(*r.model_inputs(part))

            def slope(logprobs: Tensor, s: slice, tokens: Tensor = tokens) -> list[Tensor]:
                actions, A = batch.actions[tokens[s]], batch.advantages[tokens[s]]
                ratio = (token_logprobs(logprobs, actions) - batch.old_logprobs[tokens[s]]).exp()
                gain = ratio * A  # and so is its derivative by log pi
                if self.clip is not None:  # beyond the clip there is nothing to gain
                    gain = gain * (gain <= ratio.clamp(1 - self.clip, 1 + self.clip) * A)
                return [logprob_gradient(logprobs.exp(), actions, gain)]

            (cotangent,) = policy.cotangents(features, slope)
            total += theta.gradient(features, cotangent=cotangent)
        count = float(reduce(r.lengths[rows].double().sum()))
        return reduce(total) / max(count, 1.0)
