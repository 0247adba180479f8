"""PPO and its relatives: each against an independent computation on a tiny case."""

import threading
from dataclasses import replace

import pytest
import tiny
import torch

from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.core.advantages import gae, group_normalised, leave_one_out
from trpo_lm.core.divergences import token_logprobs
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.rewards import RewardBatch
from trpo_lm.lm.rollout import Batch, Rollout
from trpo_lm.seeds import generator

DOUBLE = torch.float64
REINFORCE = {"epochs": 1, "minibatches": 1, "clip": None}


def start(*, spread=0.4, each=2, seed=0):
    policy = tiny.policy("gpt2", dtype=DOUBLE, spread=spread)
    return policy, tiny.batch(policy, each=each, length=4, seed=seed)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def flat(policy):
    return policy.parameters.vector()


def plain_loss(policy, batch, rows, clip):
    """- mean over the rows' tokens of the clipped surrogate, from the model's own logits."""
    r = batch.rollout
    at = r.token_index(rows)
    logits = tiny.own_logits(policy, r, rows.tolist())
    logprob = logits.log_softmax(-1).gather(-1, batch.actions[at, None])[:, 0]
    ratio, A = (logprob - batch.old_logprobs[at]).exp(), tiny.advantages(batch)[at]
    if clip is None:
        return -(ratio * A).mean()
    return -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A).mean()


# ---- the gradient and the optimiser ----


@pytest.mark.parametrize("clip", [0.2, 0.01, None])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_an_update_is_torchs_adam_on_the_parameters_themselves(clip, max_grad_norm):
    """Epochs, minibatches, clipping of ratios and of gradients: nothing but torch's own parts."""
    policy, batch = start()
    twin, _ = start()
    algorithm = PPO(
        learning_rate=0.02, epochs=3, minibatches=2, clip=clip, max_grad_norm=max_grad_norm
    )
    objective = tiny.objective(policy, batch, seed=(5, "update", 1))
    algorithm.update(objective, algorithm.init_state(policy.parameters))

    tensors = twin.parameters.tensors
    adam = torch.optim.Adam(tensors, lr=0.02)
    for epoch in range(3):
        order = torch.randperm(
            len(batch.rollout), generator=generator(5, "update", 1, "epoch", epoch)
        )
        for rows in order.tensor_split(2):
            adam.zero_grad()
            plain_loss(twin, batch, rows, clip).backward()
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(tensors, max_grad_norm)
            adam.step()
    before = flat(start()[0])
    assert relative(flat(policy) - before, flat(twin) - before) < 1e-6


def test_unclipped_ppo_has_reinforces_gradient():
    """One epoch, one minibatch, no clip: E[A grad log pi]; clipping is idle at ratio 1."""
    policy, batch = start()
    rows = torch.arange(len(batch.rollout))
    logits = tiny.own_logits(policy, batch.rollout)
    logprob = token_logprobs(logits.log_softmax(-1), batch.actions)
    want = policy.parameters.gradient((logprob * tiny.advantages(batch)).mean())
    for clip in (None, 0.2):
        got = tiny.objective(policy, batch).clipped_gradient(rows, clip)
        assert relative(got, want) < 1e-6


def test_its_gradient_is_trpos_up_to_the_mean_length():
    """Per token here, per completion there: the same direction, so a comparison is fair."""
    policy, batch = start()
    N = float(len(batch.rollout))
    g = tiny.objective(policy, batch).gradients(reference=False)[0].sum(0) / N
    rows = torch.arange(len(batch.rollout))
    got = tiny.objective(policy, batch).clipped_gradient(rows, clip=None)
    assert relative(got * len(batch.actions) / N, g) < 1e-6


def test_metrics_tell_the_exact_kl_of_the_update():
    policy, batch = start()
    with torch.no_grad():
        old = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
    algorithm = PPO(learning_rate=0.02)
    state = algorithm.init_state(policy.parameters)
    _, row = algorithm.update(tiny.objective(policy, batch), state)
    with torch.no_grad():
        new = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
    kl = (old.exp() * (old - new)).sum() / len(batch.rollout)
    assert row["trust_region/kl"] == pytest.approx(float(kl), rel=1e-6)
    assert kl > 0


# ---- advantages ----


def test_rloo_by_hand():
    scores, groups = torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 0, 0, 1])
    assert leave_one_out(scores, groups).tolist() == [-3.0, -1.5, 4.5, 0.0]


def test_grpo_has_trls_definition():
    """(score - mean) / (std + 1e-4), std with Bessel's correction, as TRL writes it."""
    scores = torch.rand(6, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    scores[5] = 0.3  # a group without spread: zero, not nan
    want = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    got = group_normalised(scores.reshape(-1), torch.arange(6).repeat_interleave(4))
    torch.testing.assert_close(got.reshape(6, 4), want, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("name", ["leave_one_out", "group_normalised"])
def test_group_advantages_are_the_same_for_all_tokens_and_need_no_critic(name):
    _, batch = start(each=3)
    algorithm = PPO(advantage=name)
    rewards = batch.rollout.rewards
    A = algorithm.advantages(batch.rollout, rewards, rewards * torch.nan, tiny.identity)
    estimate = {"leave_one_out": leave_one_out, "group_normalised": group_normalised}[name]
    want = estimate(batch.rollout.scores.score, batch.rollout.groups)
    mask = batch.rollout.action_mask
    assert not algorithm.needs_critic
    torch.testing.assert_close(A[mask], (want[:, None] * mask)[mask])
    assert (A[~mask] == 0).all()


def test_gae_advantages_are_those_of_trpo():
    """The comparison varies the update rule: with the same lambda both see the same credit."""
    _, batch = start()
    noise = torch.Generator().manual_seed(1)
    rewards = batch.rollout.rewards
    values = torch.rand(rewards.shape, generator=noise, dtype=DOUBLE)
    ppo = PPO(lam=0.7).advantages(batch.rollout, rewards, values, tiny.identity)
    trpo = TRPO(lam=0.7).advantages(batch.rollout, rewards, values, tiny.identity)
    torch.testing.assert_close(ppo, trpo)
    A = gae(rewards, values, batch.rollout.action_mask, gamma=1.0, lam=0.7)
    x = A[batch.rollout.action_mask]
    torch.testing.assert_close(
        ppo[batch.rollout.action_mask], (x - x.mean()) / x.std(correction=0), rtol=1e-9, atol=1e-9
    )


def test_rows_that_abstained_get_no_credit_from_their_kl():
    policy, batch = start(each=3)
    scores = batch.rollout.scores
    scores.valid[0], scores.score[0] = False, torch.nan
    for name in ("gae", "leave_one_out", "group_normalised"):
        algorithm = PPO(advantage=name, beta=0.5, lam=1.0)
        rewards = algorithm.rewards(batch, algorithm.init_state(policy.parameters))
        values = torch.zeros_like(rewards)
        A = algorithm.advantages(batch.rollout, rewards, values, tiny.identity)
        assert A.isfinite().all() and (A[0] == 0).all() and (A[1] != 0).any()


# ---- the price of the KL ----


def every_completion(policy):
    """A rollout that holds each completion of at most two tokens once, and its probability."""
    rows = [[a] for a in tiny.STOPS]
    rows += [[a, b] for a in range(tiny.V) if a not in tiny.STOPS for b in range(tiny.V)]
    prompt = tiny.tokenizer()("w1 w2")["input_ids"]
    mask = torch.tensor([[True, len(row) > 1] for row in rows])
    ids = torch.tensor([prompt + row + [tiny.PAD] * (2 - len(row)) for row in rows])
    N, zeros = len(rows), torch.zeros(len(rows), dtype=DOUBLE)
    rollout = Rollout(
        prompts=["w1 w2"] * N,
        completions=[""] * N,
        columns={},
        groups=torch.zeros(N, dtype=torch.int64),
        input_ids=ids,
        attention_mask=torch.cat([torch.ones(N, len(prompt)).long(), mask.long()], dim=1),
        action_mask=mask,
        truncated=torch.zeros(N, dtype=torch.bool),
        rewards=torch.zeros(N, 2, dtype=DOUBLE),
        scores=RewardBatch(zeros, torch.ones(N, dtype=torch.bool), zeros, None, {}, {}),
        score_seconds=0.0,
    )
    batch = Batch.from_rollout(policy, rollout)
    return batch, rollout.padded(batch.old_logprobs).sum(-1).exp()


def test_the_price_of_the_kl_has_the_exact_kl_as_its_expectation():
    policy = tiny.policy("gpt2", dtype=DOUBLE, spread=0.6)
    batch, probability = every_completion(policy)
    assert float(probability.sum()) == pytest.approx(1, abs=1e-9)
    exact = probability @ batch.rollout.padded(batch.ref_kl).sum(-1)  # chain rule, per state
    state = PPO(beta=0.3).init_state(policy.parameters)
    price = -PPO().rewards(batch, state).sum(-1)
    assert float(probability @ price) == pytest.approx(0.3 * float(exact), rel=1e-9)
    assert exact > 0.1
    assert PPO().rewards(batch, replace(state, beta=0.0)) is batch.rollout.rewards


@pytest.mark.parametrize(("target", "direction"), [(1e-4, 1.02), (1e3, 0.98), (None, 1.0)])
def test_beta_moves_towards_its_target(target, direction):
    policy, batch = start()
    algorithm = PPO(beta=0.2, target_ref_kl=target)
    state = algorithm.init_state(policy.parameters)
    state, row = algorithm.update(tiny.objective(policy, batch), state)
    assert state.beta == row["ppo/beta"] == pytest.approx(0.2 * direction)


# ---- state and ranks ----


def part_of(policy, batch, rows):
    """The same rows as a rank of their own would hold them."""
    r = batch.rollout
    chosen = replace(
        r,
        prompts=[r.prompts[i] for i in rows],
        completions=[r.completions[i] for i in rows],
        groups=r.groups[rows],
        input_ids=r.input_ids[rows],
        attention_mask=r.attention_mask[rows],
        action_mask=r.action_mask[rows],
        truncated=r.truncated[rows],
        rewards=r.rewards[rows],
    )
    A = r.padded(tiny.advantages(batch))[rows]
    return Batch.from_rollout(policy, chosen), A


def test_two_ranks_are_one_process():
    """Unequal shares of rows and tokens; sums cross, and one division follows."""
    policy, batch = start(each=3)
    settings = {"learning_rate": 0.02, "epochs": 3, "minibatches": 1, "beta": 0.2}
    algorithm = PPO(**settings, target_ref_kl=0.5)
    rows = torch.arange(len(batch.rollout))
    ranks = [start(each=3)[0] for _ in range(2)]
    parts = [part_of(ranks[0], batch, rows[:5]), part_of(ranks[1], batch, rows[5:])]
    barrier, slots, rows_of = threading.Barrier(2, timeout=60), [None, None], [{}, {}]

    def work(rank):
        def reduce(tensor):
            slots[rank] = tensor
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        objective = BatchObjective(ranks[rank], *parts[rank], reduce, (0, rank))
        state = algorithm.init_state(ranks[rank].parameters)
        _, rows_of[rank] = algorithm.update(objective, state)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    objective = tiny.objective(policy, batch, seed=(0, 0))
    _, alone = algorithm.update(objective, algorithm.init_state(policy.parameters))
    before = flat(start(each=3)[0])
    assert ranks[0].parameters.checksum() == ranks[1].parameters.checksum()
    assert relative(flat(ranks[0]) - before, flat(policy) - before) < 1e-6
    for name in alone.keys() - {"trust_region/kl_max"}:  # the largest state of a rank's own
        assert rows_of[0][name] == rows_of[1][name] == pytest.approx(alone[name], rel=1e-6)
