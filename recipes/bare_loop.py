"""TRPO under a reference-KL budget in one loop, without `Trainer`: read it beside the paper.

    python recipes/bare_loop.py

What `Trainer` adds: checkpoints, several processes, evaluation, files, a screen. What it does not
add: anything to the mathematics.
"""

print("loading torch and transformers ...", flush=True)

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from trpo_lm.core.adaptation import running_rms
from trpo_lm.core.advantages import gae, returns, whiten
from trpo_lm.core.conjugate_gradient import conjugate_gradient
from trpo_lm.core.line_search import backtrack
from trpo_lm.core.trust_region import plane_step
from trpo_lm.lm.critic import PrefixCritic
from trpo_lm.lm.mdp import TokenMDP, end_token_ids
from trpo_lm.lm.objective import fisher, gradients, measure_at
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.rewards import Rewards
from trpo_lm.lm.rollout import Batch
from trpo_lm.seeds import generator

DATA = Path(__file__).resolve().parent.parent / "data"
MAX_KL, MAX_REF_KL = 0.1, 2.0  # delta and K, nats per completion
UPDATES, N, LENGTH, LAMBDA, SEED = 12, 256, 24, 0.5, 0


def main():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "lm")
    policy = Policy(str(DATA / "lm"), seed=SEED)  # LoRA on; the reference is LoRA off
    rewards = Rewards(RewardModel(str(DATA / "reward_model")))
    ends = end_token_ids(policy.base, tokenizer)
    mdp = TokenMDP(tokenizer, rewards, eos_token_ids=ends, max_completion_length=LENGTH)
    critic = PrefixCritic(LENGTH)
    lines = (DATA / "prompts_train.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    theta, alone = policy.parameters, (lambda tensor: tensor)  # alone: sums over one process
    kept = {"square": torch.zeros(len(theta))}

    for update in range(1, UPDATES + 1):
        # sample completions from pi_old and score them
        chosen = torch.randperm(len(prompts), generator=generator(SEED, update))[:N]
        rollout = mdp.rollout(policy, [prompts[i] for i in chosen.tolist()], seed=(SEED, update))
        mask, valid = rollout.action_mask, rollout.scores.valid
        batch = Batch.from_rollout(policy, rollout, micro_batch_size=64)
        k = float(batch.ref_kl.sum()) / N  # R(theta_old), exact per state

        # credit: V(s_t) is the calibrated score of the prefix, A_t is GAE
        scores = mdp.prefix_scores(rollout)
        values = critic.values(None, scores, mask, untrained=0.0)
        advantages = gae(rollout.rewards, values, mask, gamma=1.0, lam=LAMBDA)
        batch.advantages = whiten(advantages, mask, alone)[mask].float()
        critic.fit(None, scores, mask, returns(rollout.rewards, mask, gamma=1.0), valid, alone)

        # g = grad L, b = grad R, F = Hessian of D; v = (F + lambda D)^-1 g and w likewise of b, by
        # conjugate gradient in the coordinates in which the damping is isotropic
        g, b = (halves.sum(0) / N for halves in gradients(policy, batch, alone, N, reference=True))
        F = fisher(policy, batch, alone, 32)
        d = running_rms(kept, g).rsqrt()
        solves = [
            conjugate_gradient(
                lambda y, F=F, d=d: d * F(d * y), d * rhs,
                max_iterations=8, rtol=0.01, damping=3.0,
            )
            for rhs in (g, b)
        ]  # fmt: skip

        # the point of both balls farthest along g, in the plane of v and w
        plane = torch.stack([d * y.x for y in solves])
        curved = torch.stack([y.Ax / d for y in solves])
        gram, excess = plane @ curved.T, k - MAX_REF_KL
        step = plane_step(gram, plane @ g, plane @ b, delta=MAX_KL, excess=excess)
        x = torch.tensor(step.multipliers, dtype=g.dtype) @ plane
        theta_old = theta.snapshot()

        # backtrack until the exact quantities keep the promises of the quadratic models
        def at(scale, theta_old=theta_old, x=x, batch=batch):
            theta.assign(theta_old, x, scale)
            return measure_at(policy, batch, alone, N)

        def objection(trial, scale, k=k):
            if trial.kl > MAX_KL:
                return "kl above max_kl"
            return "reference kl above its limit" if trial.ref_kl > max(MAX_REF_KL, k) else None

        search = backtrack(at, objection, ratio=0.8, trials=8)
        if not search.accepted:
            theta.restore(theta_old)
        print(
            f"update {update:2d}  score {rollout.scores.score.mean():.3f}  ref_kl {k:.3f}  "
            f"kl {search.trial.kl:.4f}  case {step.case}  trials {search.trials}"
        )


if __name__ == "__main__":
    main()
