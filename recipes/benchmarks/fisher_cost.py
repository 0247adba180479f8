"""What a Fisher product costs: its time over one forward+backward of the same completions.

    python recipes/benchmarks/fisher_cost.py

Alternating and repeated in one process; medians of ratios. Two sizes: the embedded LM, and a GPT-2
of 6 layers, width 384 and vocabulary 8,192 with random weights.
"""

import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from trpo_lm.mdp import TokenMDP, end_token_ids, measure
from trpo_lm.objective import fisher, gradients
from trpo_lm.policy import Policy
from trpo_lm.rewards import Rewards
from trpo_lm.seeds import generator

DATA = Path(__file__).resolve().parent.parent.parent / "data"
COMPLETIONS, LENGTH, REPEATS = 64, 24, 15


def main():
    wide = GPT2Config(
        n_layer=6, n_embd=384, n_head=6, vocab_size=8192, n_positions=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(DATA / "lm")
    for name, model in (("embedded LM", str(DATA / "lm")), ("6 x 384", GPT2LMHeadModel(wide))):
        policy = Policy(model)
        mdp = TokenMDP(
            tokenizer,
            Rewards(lambda completions: [0.0] * len(completions)),
            eos_token_ids=end_token_ids(policy.base, tokenizer),
            max_completion_length=LENGTH,
        )
        rollout = mdp.rollout(policy, ["the film", "the cast of this"] * (COMPLETIONS // 2))
        batch = measure(policy, rollout, micro_batch_size=COMPLETIONS // 2)
        batch.advantages = torch.randn(len(batch.actions), generator=generator(0))
        N = float(len(rollout))
        F = fisher(policy, batch, lambda t: t, COMPLETIONS)
        v = torch.randn(len(policy.parameters), generator=generator(1))
        ratios = []
        for _ in range(REPEATS):
            ordinary = _seconds(
                lambda: gradients(policy, batch, lambda t: t, N, reference=False)  # noqa: B023
            )
            ratios.append(_seconds(lambda: F(v)) / ordinary)  # noqa: B023
        q1, median, q3 = statistics.quantiles(ratios, n=4)
        print(f"{name:12} product / forward+backward: {median:.2f} (quartiles {q1:.2f}, {q3:.2f})")


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
