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

from dataclasses import dataclass

import torch
from torch import Tensor

from trpo_lm.algorithms.algorithm import Metrics
from trpo_lm.config import Limits, PPOSettings
from trpo_lm.core.advantages import gae, group_normalised, leave_one_out, whiten
from trpo_lm.core.parameters import ParameterVector, Reduce
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.rollout import Batch, Rollout
from trpo_lm.seeds import generator


@dataclass(frozen=True)
class PPOState:
    """Adam's moments, (M,) each, its step count, and the present price of the KL."""

    step: float
    beta: float
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class PPO(PPOSettings):
    """Proximal policy optimisation of a language model, the baseline to compare with."""

    @property
    def limits(self) -> Limits:
        """None: it prices the reference KL."""
        return Limits()

    @property
    def needs_critic(self) -> bool:
        """Whether advantages depend on values."""
        return self.advantage == "gae"

    def init_state(self, theta: ParameterVector) -> PPOState:
        """Return the state before the first update."""
        zeros = theta.zeros()
        return PPOState(step=0.0, beta=self.beta, exp_avg=zeros, exp_avg_sq=zeros)

    def rewards(self, batch: Batch, state: PPOState) -> Tensor:
        """Return the MDP's rewards minus the price of the reference KL, (N, T)."""
        rewards = batch.rollout.rewards
        if state.beta == 0.0:
            return rewards
        log_ratio = (batch.old_logprobs - batch.ref_logprobs).double().cpu()
        return rewards - state.beta * batch.rollout.padded(log_ratio)

    def advantages(
        self, rollout: Rollout, rewards: Tensor, values: Tensor, reduce: Reduce
    ) -> Tensor:
        """Return A_t, (N, T), by the chosen estimator; GAE is whitened."""
        mask, valid = rollout.action_mask, rollout.scores.valid
        if self.advantage == "gae":
            A = gae(rewards, values, mask, gamma=self.gamma, lam=self.lam or 0.0)
            return whiten(A, mask & valid[:, None], reduce)
        scores = rewards.sum(-1).masked_fill(~valid, torch.nan)
        estimate = leave_one_out if self.advantage == "leave_one_out" else group_normalised
        return estimate(scores, rollout.groups)[:, None] * mask

    def update(self, objective: BatchObjective, state: PPOState) -> tuple[PPOState, Metrics]:
        """Make `epochs` x `minibatches` Adam steps; return the successor of the state, and metrics.

        Args:
            objective: Of a batch, policy at theta_old; it is moved.
            state: From `init_state` or the update before.
        """
        theta = objective.theta
        flat = torch.nn.Parameter(theta.vector())
        adam = torch.optim.Adam([flat], lr=self.learning_rate)
        adam.state[flat] = {
            "step": torch.tensor(state.step),
            "exp_avg": state.exp_avg.clone(),  # Adam changes its moments in place
            "exp_avg_sq": state.exp_avg_sq.clone(),
        }
        for epoch in range(self.epochs):
            order = torch.randperm(
                len(objective.batch.rollout),
                generator=generator(*objective.seed, "epoch", epoch),  # type: ignore[misc]
            )
            for rows in order.tensor_split(self.minibatches):
                flat.grad = -objective.clipped_gradient(rows, self.clip)
                if self.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_([flat], self.max_grad_norm)
                adam.step()
                theta.restore(theta.unflatten(flat.detach()))
        after, beta = objective.measure(), state.beta
        if self.target_ref_kl is not None:
            error = after.ref_kl / self.target_ref_kl - 1
            beta *= 1 + 0.1 * max(-0.2, min(0.2, error))
        moments = adam.state[flat]
        state = PPOState(float(moments["step"]), beta, moments["exp_avg"], moments["exp_avg_sq"])
        return state, {
            "trust_region/kl": after.kl,
            "trust_region/kl_max": after.kl_max,
            "trust_region/actual_gain": after.gain,
            "trust_region/ref_kl_after": after.ref_kl,
            "ppo/beta": beta,
        }
