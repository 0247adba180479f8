"""TRPO under a reference-KL budget in one loop, without `Trainer`: read it beside the paper.

    python recipes/bare_loop.py

Rollout, credit and update are the package's own; `TRPO.update` in trpo_lm/algorithms/trpo.py
is the step. `Trainer` adds checkpoints, several processes, evaluation, files and a screen.
"""

print("loading torch and transformers ...", flush=True)

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from trpo_lm import TRPO, Policy, RewardModel, TokenMDP
from trpo_lm.core.advantages import returns
from trpo_lm.lm.critic import PrefixCritic
from trpo_lm.lm.mdp import end_token_ids
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.rewards import Rewards
from trpo_lm.lm.rollout import Batch
from trpo_lm.seeds import generator

DATA = Path(__file__).resolve().parent.parent / "data"
UPDATES, N, LENGTH, SEED = 12, 256, 24, 0


def main():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "lm")
    policy = Policy(str(DATA / "lm"), seed=SEED)  # LoRA on; the reference is LoRA off
    rewards = Rewards(RewardModel(str(DATA / "reward_model")))
    ends = end_token_ids(policy.base, tokenizer)
    mdp = TokenMDP(tokenizer, rewards, eos_token_ids=ends, max_completion_length=LENGTH)
    lines = (DATA / "prompts_train.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]

    critic = PrefixCritic(LENGTH)  # V(s_t): the reward model's score of the prefix, calibrated
    trpo = TRPO(max_kl=0.1, max_ref_kl=2.0, lam=0.5)  # delta and K, nats per completion
    state = trpo.init_state(policy.parameters)

    def alone(tensor):  # the sum over one process
        return tensor

    for update in range(1, UPDATES + 1):
        # sample completions from pi_old and score them
        chosen = torch.randperm(len(prompts), generator=generator(SEED, update))[:N]
        rollout = mdp.rollout(policy, [prompts[i] for i in chosen.tolist()], seed=(SEED, update))
        batch = Batch.from_rollout(policy, rollout)

        # credit: A_t by GAE; the critic learns from a batch only after it was applied to it
        mask, valid, scores = rollout.action_mask, rollout.scores.valid, mdp.prefix_scores(rollout)
        values = critic.values(None, scores, mask, untrained=0.0)
        advantages = trpo.advantages(rollout, rollout.rewards, values, alone)
        critic.fit(None, scores, mask, returns(rollout.rewards, mask, gamma=1.0), valid, alone)

        # the step between the two balls
        objective = BatchObjective(policy, batch, advantages, alone)
        state, row = trpo.update(objective, state)
        print(
            f"update {update:2d}  score {rollout.scores.score.mean():.3f}  "
            f"ref_kl {batch.ref_kl.sum() / N:.3f}  kl {row['trust_region/kl']:.4f}  "
            f"case {row['trust_region/case']}  trials {row['line_search/trials']}"
        )


if __name__ == "__main__":
    main()
