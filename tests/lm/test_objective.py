"""L, D and R of a batch against plain autograd on the model's own logits."""

import math

import pytest
import tiny
import torch

import trpo_lm.lm.policy
from trpo_lm.core.adaptation import noise
from trpo_lm.core.divergences import categorical_kl, token_logprobs


def relative(a, b):
    return float((a - b).norm() / b.norm())


def count(batch):
    return float(len(batch.rollout))


# ---- gradients ----


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradients_equal_plain_autograd_on_the_models_logits(kind):
    policy = tiny.policy(kind, dtype=torch.float64, spread=0.4, temperature=0.8)
    batch = tiny.batch(policy, each=2, length=4)
    L, _, R = tiny.plain_quantities(policy, batch)
    g, b = tiny.mean_gradients(policy, batch)
    assert relative(g, policy.parameters.gradient(L, retain=True)) < 1e-6
    assert relative(b, policy.parameters.gradient(R)) < 1e-6
    assert R.item() == pytest.approx(float(batch.ref_kl.sum()) / len(batch.rollout), rel=1e-6)


def test_both_parts_of_the_reference_gradient_matter():
    """Without the drift through prefixes b is another vector; the oracle above must see that."""
    policy = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(policy, each=2, length=4)
    _, b = tiny.mean_gradients(policy, batch)
    with torch.no_grad(), policy.reference():
        ref = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
    new = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
    frozen = policy.parameters.gradient(categorical_kl(old=new, new=ref).sum()) / count(batch)
    assert relative(frozen, b) > 0.1


def test_at_theta_old_the_surrogate_gradient_is_the_policy_gradient():
    policy = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(policy)
    g, b = tiny.mean_gradients(policy, batch, reference=False)
    logprob = token_logprobs(tiny.own_logits(policy, batch.rollout).log_softmax(-1), batch.actions)
    score = policy.parameters.gradient((logprob * tiny.advantages(batch)).sum() / count(batch))
    assert b is None and relative(g, score) < 1e-9


def test_gradients_do_not_depend_on_micro_batches_or_chunks(monkeypatch):
    policy = tiny.policy("llama", spread=0.4)
    batch = tiny.batch(policy, each=4)
    found = []
    for size, chunk in ((1, 1 << 21), (30, 1 << 21), (999, 1 << 21), (999, 3 * tiny.V), (999, 1)):
        monkeypatch.setattr(trpo_lm.lm.policy, "CHUNK_STATES", 1)
        monkeypatch.setattr(trpo_lm.lm.policy, "CHUNK_ELEMENTS", chunk)
        policy.room.most = size
        found.append(tiny.mean_gradients(policy, batch))
    for g, b in found[1:]:
        assert relative(g, found[0][0]) <= 3e-6 and relative(b, found[0][1]) <= 3e-6


def test_one_completion_is_a_batch():
    policy = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(policy, prompts=["w1 w2"], each=1)
    sums, _ = tiny.objective(policy, batch).gradients(reference=True)
    signal = noise(sums, 1.0)
    assert torch.isfinite(sums).all() and math.isnan(signal.cosine) and signal.scale == math.inf


def test_halves_are_halves_of_the_prompts_and_add_up():
    """Two completions of one prompt in different halves would pass for a signal."""
    policy = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(policy, each=4)
    sums, _ = tiny.objective(policy, batch).gradients(reference=False)
    even = (batch.rollout.groups % 2 == 0).nonzero()[:, 0]
    logprob = token_logprobs(tiny.own_logits(policy, batch.rollout).log_softmax(-1), batch.actions)
    at = batch.rollout.token_index(even)
    expected = policy.parameters.gradient((logprob * tiny.advantages(batch))[at].sum())
    assert relative(sums[0], expected) < 1e-9


# ---- theta_old ----


def test_K04_at_theta_old_the_ratio_is_one_and_nothing_has_moved():
    """With LoRA dropout and gradient checkpointing on, and the model handed over in train mode."""
    model = tiny.build("gpt2", resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1).train()
    policy = tiny.policy(
        model=model, peft=tiny.lora(lora_dropout=0.1), spread=0.4, gradient_checkpointing=True
    )
    batch = tiny.batch(policy)
    at = tiny.objective(policy, batch).measure()
    assert abs(at.gain) <= 1e-5 and 0 <= at.kl <= 1e-7 and 0 <= at.kl_max <= 1e-7
    assert at.ref_kl == pytest.approx(float(batch.ref_kl.sum()) / count(batch), rel=1e-5)
    g, b = tiny.mean_gradients(policy, batch)
    again, _ = tiny.mean_gradients(policy, batch)
    assert torch.equal(g, again)
    assert not policy.model.training
    assert not any(m.training for m in policy.model.modules())


def test_measurements_equal_the_plain_quantities_away_from_theta_old():
    policy = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(policy, length=4)
    r = batch.rollout
    with torch.no_grad():
        old = tiny.own_logits(policy, r).log_softmax(-1)
        with policy.reference():
            ref = tiny.own_logits(policy, r).log_softmax(-1)
        tiny.perturb(policy, 0.2, seed=5)
        new = tiny.own_logits(policy, r).log_softmax(-1)
    log_ratio = token_logprobs(new, batch.actions) - token_logprobs(old, batch.actions)
    kl, ratio = categorical_kl(old=old, new=new), log_ratio.exp()
    R = float(tiny.plain_ref_kl(log_ratio, categorical_kl(old=new, new=ref), r))
    found = tiny.objective(policy, batch).measure()
    N = count(batch)
    assert found.gain == pytest.approx(
        float(((ratio - 1) * tiny.advantages(batch)).sum()) / N, rel=1e-9
    )
    assert found.kl == pytest.approx(float(kl.sum()) / N, rel=1e-9)
    assert found.ref_kl == pytest.approx(R, rel=1e-9)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-9)


def test_the_standard_error_of_the_reference_kl_is_that_of_a_mean_over_completions():
    policy = tiny.policy(spread=0.3)
    batch = tiny.batch(policy, each=6, micro_batch_tokens=10**6)
    lengths = batch.rollout.lengths.tolist()
    each = torch.stack([part.sum() for part in batch.ref_kl.double().split(lengths)])
    k, error = tiny.objective(policy, batch).reference_kl()
    assert len(set(lengths)) > 1
    assert k == pytest.approx(float(each.mean()))
    assert error == pytest.approx(float(each.std()) / math.sqrt(len(each)))
