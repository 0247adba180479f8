"""The seam between the MDP and what samples."""

import pytest
import tiny
import torch
from transformers import GenerationConfig

from trpo_lm.lm.sampling import NEUTRAL_SAMPLING, InProcess, left_pad
from trpo_lm.seeds import derive_seed

ROWS = [[tiny.BOS, 5, 6], [tiny.BOS, 8]]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_in_process_is_generate_under_the_seed_of_the_chunk(kind):
    policy = tiny.policy(kind, spread=0.3, temperature=0.8)
    policy.shares_prefixes = False  # the plainest path
    drawn = InProcess(policy, tiny.PAD).complete(
        ROWS, 3, max_tokens=5, stop_ids=tiny.STOPS, temperature=0.8, seed=(4, "x")
    )
    ids, mask = left_pad([row for row in ROWS for _ in range(3)], tiny.PAD)
    config = GenerationConfig(
        **NEUTRAL_SAMPLING, temperature=0.8, max_new_tokens=5, eos_token_id=list(tiny.STOPS),
        pad_token_id=tiny.PAD,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(4, "x", "generate", 0))
        out = policy.base.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    new = out[:, ids.shape[1] :]
    assert torch.equal(drawn.tokens[:, : new.shape[1]], new) and drawn.tokens.shape == (6, 5)
    assert drawn.logprobs.shape == (6, 5)


def test_a_rollout_takes_whatever_a_sampler_draws():
    policy = tiny.policy()
    own = InProcess(policy, tiny.PAD)

    class Recorded:
        def complete(self, *arguments, **options):
            self.asked = arguments, options
            return own.complete(*arguments, **options)

    sampler, mdp = Recorded(), tiny.mdp()
    one, other = (
        mdp.rollout(policy, tiny.PROMPTS, completions_per_prompt=2, seed=(3,), sampler=s)
        for s in (sampler, None)
    )
    assert one.completion_ids == other.completion_ids
    (prompts, n), options = sampler.asked
    assert prompts == mdp.encode(tiny.PROMPTS) and n == 2
    assert options == {
        "max_tokens": 5, "stop_ids": sorted(tiny.STOPS), "temperature": 1.0, "seed": (3,)
    }  # fmt: skip
