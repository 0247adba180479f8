"""What must not matter: padding, its filling, the order of a batch, micro-batches, reward units.

In float64, where all that may differ is the order of sums.
"""

from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.lm.rollout import Batch

KINDS = ["gpt2", "llama"]
N = 8  # completions: 4 prompts of unequal length, two completions each
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@cache
def sampled(kind):
    """A policy away from its reference, completions of unequal length, a number for each token."""
    policy = tiny.policy(kind, spread=0.3, dtype=torch.float64)
    rollout = tiny.mdp().rollout(policy, tiny.PROMPTS, completions_per_prompt=2)
    assert len(rollout.lengths.unique()) > 1 and rollout.attention_mask.sum(-1).unique().numel() > 2
    noise = torch.Generator().manual_seed(7)
    return policy, rollout, torch.randn(rollout.action_mask.shape, generator=noise).double()


def laid_out(rollout, order, left, right, filling):
    """Return the same rollout in another order, with more padding, filled with another token."""
    order, T = torch.tensor(order), rollout.action_mask.shape[1]
    P = rollout.input_ids.shape[1] - T
    mask = pad(rollout.attention_mask[order], (left, right))
    ids = pad(rollout.input_ids[order], (left, right)).masked_fill(mask == 0, filling)
    assert P + left == ids.shape[1] - T - right

    def pick(values):
        return [values[i] for i in order.tolist()]

    return replace(
        rollout, prompts=pick(rollout.prompts), completions=pick(rollout.completions), columns={},
        groups=rollout.groups[order], input_ids=ids, attention_mask=mask,
        action_mask=pad(rollout.action_mask[order], (0, right)),
        truncated=rollout.truncated[order], rewards=pad(rollout.rewards[order], (0, right)),
    )  # fmt: skip


def consequences(kind, rollout, advantages, micro_batch_tokens):
    """Return all that an update makes of a batch; the policy is put back after it."""
    policy = sampled(kind)[0]
    theta = policy.parameters
    before = theta.snapshot()
    policy.room.most = micro_batch_tokens
    # Llama's norms are float32 in a float64 model, and stages round them otherwise.
    policy.shares_prefixes = kind != "llama"
    batch = Batch.from_rollout(policy, rollout)
    objective = tiny.objective(policy, batch, advantages)
    g, b = objective.gradients(reference=True)
    algorithm = TRPO(max_kl=0.05, max_ref_kl=0.4, fisher_completions=N, cg_iterations=5)
    _, row = algorithm.update(objective, algorithm.init_state(theta))
    moved = objective.measure()
    step = theta.flatten([p.detach() - q for p, q in zip(theta.tensors, before, strict=True)])
    theta.restore(before)
    assert row["line_search/accepted"]
    numbers = [moved.gain, moved.kl, moved.ref_kl, moved.kl_max, row["line_search/trials"]]
    return {"g": g, "b": b, "step": step, "measured": torch.tensor(numbers).double()}


@cache
def plain(kind):
    _, rollout, advantages = sampled(kind)
    return consequences(kind, rollout, advantages, 999)


def assert_same(found, expected):
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-8 * float(value.norm()), name


@pytest.mark.parametrize("kind", KINDS)
@few
@given(
    order=st.permutations(range(N)),
    left=st.integers(0, 4),
    right=st.integers(0, 3),
    filling=st.integers(0, tiny.V - 1),
    micro_batch_tokens=st.integers(1, 14 * N),
)
def test_layout_leaves_gradients_distances_and_step_alone(
    kind, order, left, right, filling, micro_batch_tokens
):
    _, rollout, advantages = sampled(kind)
    other = laid_out(rollout, order, left, right, filling)
    moved = pad(advantages[order], (0, right))
    assert_same(consequences(kind, other, moved, micro_batch_tokens), plain(kind))


@few
@given(
    scale=st.floats(-6, 6).map(lambda x: 10.0**x),
    shift=st.floats(-1e3, 1e3),
    lam=st.floats(0.0, 1.0),
    rows=st.sets(st.integers(0, N - 1), min_size=4),
)
def test_units_and_origin_of_the_reward_leave_the_advantages_alone(scale, shift, lam, rows):
    """Values are in the same units: they are fitted to the rewards."""
    _, rollout, values = sampled("gpt2")
    valid = torch.tensor([i in rows for i in range(N)])
    rollout = replace(rollout, scores=replace(rollout.scores, valid=valid))
    score = values[:, 0] * 0.7 + torch.arange(N).double()
    last = torch.arange(rollout.action_mask.shape[1]) == rollout.lengths[:, None] - 1
    found = []
    for a, c in [(1.0, 0.0), (scale, scale * shift)]:
        rewards = last * (a * score + c)[:, None]
        scaled = (a * values + c) * rollout.action_mask
        found.append(TRPO(lam=lam).advantages(rollout, rewards, scaled, tiny.identity))
    assert float(found[0].abs().max()) > 0.1
    assert float((found[0] - found[1]).abs().max()) <= 1e-9
    assert float(found[0][~valid].abs().max() if not valid.all() else 0.0) == 0.0
