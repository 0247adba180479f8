"""The update: gradients by plain autograd, the step by closed forms, and what it may not do."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch

import trpo_lm.algorithms.trpo
import trpo_lm.lm.policy
from trpo_lm.algorithms.trpo import TRPO, constrained_update, trust_region_step
from trpo_lm.config import TRPOSettings
from trpo_lm.core.adaptation import KL_MARGIN, budget_on_batch
from trpo_lm.core.advantages import whiten
from trpo_lm.core.conjugate_gradient import conjugate_gradient
from trpo_lm.core.divergences import categorical_kl, token_logprobs
from trpo_lm.core.fisher import twice_differentiable
from trpo_lm.core.parameters import ParameterVector
from trpo_lm.core.trust_region import plane_step
from trpo_lm.lm.objective import Measurement, fisher, gradients, measure_at, noise, reference_kl

EXACT = {"cg_iterations": 400, "cg_tolerance": 1e-12, "damping": 0.0}
WIDE = 10**6


def relative(a, b):
    return float((a - b).norm() / b.norm())


def count(batch):
    return float(len(batch.rollout))


def mean_gradients(policy, batch, *, reference=True):
    """grad L and grad R per completion."""
    g, b = gradients(policy, batch, tiny.identity, count(batch), reference=reference)
    return g.sum(0) / count(batch), None if b is None else b.sum(0) / count(batch)


def plain_ref_kl(log_ratio, kl, rollout):
    """R = sum_t E[w_t KL_t] / E[w_t], w_t = prod_{t'<t} ratio_t', in loops.

    A completion that has ended has KL 0 and keeps its weight.
    """
    rows = [rollout.token_index(torch.tensor([i])) for i in range(len(rollout))]
    R = 0.0
    for t in range(int(rollout.lengths.max())):
        weights = [log_ratio[at[:t]].sum().exp() for at in rows]
        paid = [w * kl[at[t]] for w, at in zip(weights, rows, strict=True) if t < len(at)]
        R = R + sum(paid) / sum(weights)
    return R


def plain_quantities(policy, batch):
    """L, D and R with graphs, from the model's own logits, row by row, in the plainest way.

    The gradient of R has both parts, the change of each KL and the change of what is visited.
    """
    r = batch.rollout
    with torch.no_grad(), policy.reference():
        ref = tiny.own_logits(policy, r).log_softmax(-1)
    new = tiny.own_logits(policy, r).log_softmax(-1)
    logprob = token_logprobs(new, batch.actions)
    log_ratio = logprob - logprob.detach()
    L = (log_ratio.exp() * batch.advantages).sum() / len(r)
    D = categorical_kl(old=new.detach(), new=new).sum() / len(r)
    return L, D, plain_ref_kl(log_ratio, categorical_kl(old=new, new=ref), r)


# ---- gradients ----


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradients_equal_plain_autograd_on_the_models_logits(kind):
    policy = tiny.policy(kind, dtype=torch.float64, spread=0.4, temperature=0.8)
    batch = tiny.batch(policy, each=2, length=4)
    L, _, R = plain_quantities(policy, batch)
    g, b = mean_gradients(policy, batch)
    assert relative(g, policy.parameters.gradient(L, retain=True)) < 1e-6
    assert relative(b, policy.parameters.gradient(R)) < 1e-6
    assert R.item() == pytest.approx(float(batch.ref_kl.sum()) / len(batch.rollout), rel=1e-6)


def test_both_parts_of_the_reference_gradient_matter():
    """Without the drift through prefixes b is another vector; the oracle above must see that."""
    policy = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(policy, each=2, length=4)
    _, b = mean_gradients(policy, batch)
    with torch.no_grad(), policy.reference():
        ref = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
    new = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
    frozen = policy.parameters.gradient(categorical_kl(old=new, new=ref).sum()) / count(batch)
    assert relative(frozen, b) > 0.1


def test_at_theta_old_the_surrogate_gradient_is_the_policy_gradient():
    policy = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(policy)
    g, b = mean_gradients(policy, batch, reference=False)
    logprob = token_logprobs(tiny.own_logits(policy, batch.rollout).log_softmax(-1), batch.actions)
    score = policy.parameters.gradient((logprob * batch.advantages).sum() / count(batch))
    assert b is None and relative(g, score) < 1e-9


def test_gradients_do_not_depend_on_micro_batches_or_chunks(monkeypatch):
    policy = tiny.policy("llama", spread=0.4)
    batch = tiny.batch(policy, each=4)
    found = []
    for size, chunk in ((1, 1 << 21), (3, 1 << 21), (64, 1 << 21), (64, 3 * tiny.V), (64, 1)):
        monkeypatch.setattr(trpo_lm.lm.policy, "CHUNK_STATES", 1)
        monkeypatch.setattr(trpo_lm.lm.policy, "CHUNK_ELEMENTS", chunk)
        batch.micro_batch_size = size
        found.append(mean_gradients(policy, batch))
    for g, b in found[1:]:
        assert relative(g, found[0][0]) <= 3e-6 and relative(b, found[0][1]) <= 3e-6


def test_one_completion_is_a_batch():
    policy = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(policy, prompts=["w1 w2"], each=1)
    sums, _ = gradients(policy, batch, tiny.identity, count(batch), reference=True)
    signal = noise(sums, 1.0)
    assert torch.isfinite(sums).all() and math.isnan(signal.cosine) and signal.scale == math.inf


def test_halves_are_halves_of_the_prompts_and_add_up():
    """Two completions of one prompt in different halves would pass for a signal."""
    policy = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(policy, each=4)
    sums, _ = gradients(policy, batch, tiny.identity, count(batch), reference=False)
    even = (batch.rollout.groups % 2 == 0).nonzero()[:, 0]
    logprob = token_logprobs(tiny.own_logits(policy, batch.rollout).log_softmax(-1), batch.actions)
    at = batch.rollout.token_index(even)
    expected = policy.parameters.gradient((logprob * batch.advantages)[at].sum())
    assert relative(sums[0], expected) < 1e-9


def test_noise_scale_of_a_known_mixture():
    """Gradients mu + sigma z: variance of one is sigma^2 M, and the halves' product shows mu."""
    N, M, sigma = 4096, 400, 2.0
    generator = torch.Generator().manual_seed(0)
    each = 0.5 + sigma * torch.randn(N, M, generator=generator, dtype=torch.float64)
    found = noise(torch.stack([each[::2].sum(0), each[1::2].sum(0)]), N)
    assert found.signal == pytest.approx(0.25 * M, rel=0.05)
    assert found.variance == pytest.approx(sigma**2 * M, rel=0.2)
    assert found.scale == pytest.approx(sigma**2 / 0.25, rel=0.2)
    assert found.cosine == pytest.approx(0.25 / (0.25 + 2 * sigma**2 / N), rel=0.05)


# ---- theta_old ----


def test_K04_at_theta_old_the_ratio_is_one_and_nothing_has_moved():
    """With LoRA dropout and gradient checkpointing on, and the model handed over in train mode."""
    model = tiny.build("gpt2", resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1).train()
    policy = tiny.policy(
        model=model, peft=tiny.lora(lora_dropout=0.1), spread=0.4, gradient_checkpointing=True
    )
    batch = tiny.batch(policy)
    at = measure_at(policy, batch, tiny.identity, count(batch))
    assert abs(at.gain) <= 1e-5 and 0 <= at.kl <= 1e-7 and 0 <= at.kl_max <= 1e-7
    assert at.ref_kl == pytest.approx(float(batch.ref_kl.sum()) / count(batch), rel=1e-5)
    g, b = mean_gradients(policy, batch)
    again, _ = mean_gradients(policy, batch)
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
    R = float(plain_ref_kl(log_ratio, categorical_kl(old=new, new=ref), r))
    found = measure_at(policy, batch, tiny.identity, count(batch))
    N = count(batch)
    assert found.gain == pytest.approx(float(((ratio - 1) * batch.advantages).sum()) / N, rel=1e-9)
    assert found.kl == pytest.approx(float(kl.sum()) / N, rel=1e-9)
    assert found.ref_kl == pytest.approx(R, rel=1e-9)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-9)


# ---- the step ----


def well_posed():
    """A policy with fewer parameters than the batch has observations, and such a batch."""
    policy = tiny.policy(
        model=tiny.build(dtype=torch.float64, n_layer=1),
        peft=tiny.lora(target_modules=["c_fc"]),
        spread=0.4,
    )
    return policy, tiny.batch(policy, each=24, micro_batch_size=512)


def exact_step(policy, batch, delta=1e-3):
    """The step of radius delta along F^-1 g of an undamped, converged solve; also F and g."""
    g, _ = mean_gradients(policy, batch, reference=False)
    F = tiny.dense(fisher(policy, batch, tiny.identity, WIDE), policy.parameters.size)
    v = conjugate_gradient(lambda x: F @ x, g, max_iterations=400, rtol=1e-9)
    assert v.status == "converged"
    step = plane_step((v.x @ F @ v.x)[None, None], (g @ v.x)[None], None, delta=delta)
    return v.x * step.multipliers[0], F, g


def moved_logprobs(policy, batch, x):
    """First-order change of all log-probabilities along x."""
    theta, before, h = policy.parameters, policy.parameters.snapshot(), 1e-5
    found = []
    for sign in (1, -1):
        theta.assign(before, x, sign * h)
        with torch.no_grad():
            found.append(tiny.own_logits(policy, batch.rollout).log_softmax(-1))
    theta.restore(before)
    return (found[0] - found[1]) / (2 * h)


def test_an_exact_step_does_not_know_how_lora_is_scaled():
    """A/c and cB are the same policy: the natural gradient must move it the same way."""
    policy, batch = well_posed()
    one = moved_logprobs(policy, batch, exact_step(policy, batch)[0])
    plain = moved_logprobs(policy, batch, exact_step(policy, batch)[2])
    c = 5.0
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if p.requires_grad:
                p.mul_(1 / c if "lora_A" in name else c)
    two = moved_logprobs(policy, batch, exact_step(policy, batch)[0])
    assert relative(two, one) < 1e-3
    assert relative(moved_logprobs(policy, batch, exact_step(policy, batch)[2]), plain) > 0.5


def test_true_kl_approaches_the_radius_with_an_error_of_the_right_order():
    policy, batch = well_posed()
    theta, before = policy.parameters, policy.parameters.snapshot()
    x, F, _ = exact_step(policy, batch, 1.0)
    assert 0.5 * float(x @ F @ x) == pytest.approx(1.0, rel=1e-9)
    errors = []
    for delta in (1e-3, 1e-4, 1e-5, 1e-6):
        theta.assign(before, x, math.sqrt(delta))
        kl = measure_at(policy, batch, tiny.identity, count(batch)).kl
        errors.append(abs(kl / delta - 1))
    theta.restore(before)
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):  # D = delta + O(delta^1.5)
        assert fine < 0.4 * coarse


def test_natural_gradient_of_a_bare_softmax_in_closed_form():
    """On logits, F^-1 g is the advantage less its mean, up to the constant that softmax ignores."""
    z = torch.tensor([0.3, -1.0, 0.5, 1.2], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    p = z.detach().softmax(-1)
    delta = 1e-4
    settings = TRPOSettings(max_kl=delta, max_ref_kl=None, accept_ratio=0.0, **EXACT)
    before = z.detach().clone()
    update = trust_region_step(
        [z],
        lambda: (z.softmax(-1) * reward).sum(),
        lambda: categorical_kl(old=p.log(), new=z.log_softmax(-1)),
        settings=settings,
    )
    A = reward - (p * reward).sum()
    length = math.sqrt(2 * delta / float((p * A**2).sum()))
    moved = z.detach() - before
    torch.testing.assert_close(
        moved - moved.mean(), length * update.search.scale * (A - A.mean()), rtol=1e-6, atol=1e-9
    )
    assert update.search.accepted and update.step.gain == pytest.approx(
        math.sqrt(2 * delta * float((p * A**2).sum())), rel=1e-6
    )
    assert update.search.trial.kl <= delta


def bandit(budget=None, start=None, delta=0.01, reward=(1.0, 0.0, -2.0, 0.5)):
    """A four-armed bandit whose reference is uniform; returns (z, take_step)."""
    z = torch.zeros(4, dtype=torch.float64) if start is None else start.double().clone()
    z.requires_grad_()
    reward = torch.tensor(reward, dtype=torch.float64)
    uniform = torch.full((4,), -math.log(4), dtype=torch.float64)

    def ref_kl():
        return categorical_kl(old=z.log_softmax(-1), new=uniform)

    def step(**changes):
        old = z.detach().log_softmax(-1)
        return trust_region_step(
            [z],
            lambda: (z.softmax(-1) * reward).sum(),
            lambda: categorical_kl(old=old, new=z.log_softmax(-1)),
            ref_kl,
            TRPOSettings(max_kl=delta, max_ref_kl=budget, **{**EXACT, **changes}),
        )

    return z, step, lambda: float(ref_kl())


def test_N11_a_budget_is_used_up_and_never_exceeded():
    """The optimum under KL(pi || uniform) <= K is the tilted softmax exp(reward / eta)."""
    budget = 0.3
    z, step, ref_kl = bandit(budget)
    cases = set()
    for _ in range(60):
        update = step()
        cases.add(update.step.case)
        assert ref_kl() <= budget * (1 + 1e-12)
        if update.search.accepted:
            assert update.search.trial.kl <= 0.01
    assert ref_kl() > 0.99 * budget and "old" in cases and len(cases) > 1
    reward = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    low, high = 1e-3, 1e3  # bisect for the temperature whose tilted policy uses the budget
    for _ in range(200):
        eta = math.sqrt(low * high)
        p = (reward / eta).softmax(-1)
        used = float((p * (p.log() + math.log(4))).sum())
        low, high = (eta, high) if used > budget else (low, eta)
    value = float((z.softmax(-1) * reward).sum())
    assert value == pytest.approx(float((p * reward).sum()), rel=5e-3)
    assert update.step.alignment == pytest.approx(1.0, abs=0.05) or not update.search.accepted


def test_far_over_the_budget_the_step_lowers_the_reference_kl_every_time():
    z, step, ref_kl = bandit(budget=0.1, start=torch.tensor([3.0, 0.0, -1.0, 0.0]))
    before, first = ref_kl(), True
    assert before > 0.5
    for _ in range(40):
        update = step()
        if first:
            assert update.step.case == "recover" and update.search.accepted
            first = False
        assert ref_kl() <= max(before, 0.1)
        before = ref_kl()
    assert before <= 0.1 * (1 + 1e-9)


def test_without_a_gradient_there_is_no_step():
    z, step, _ = bandit(reward=(1.0, 1.0, 1.0, 1.0))
    before = z.detach().clone()
    update = step()
    assert update.step.case == "none" and not update.search.accepted
    assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("how", ["always worse", "nan", "inf kl", "kl above", "ref kl above"])
def test_N05_a_rejected_step_restores_the_very_bits(how):
    noise = torch.Generator().manual_seed(0)
    z, g, b = torch.randn(3, 500, generator=noise, dtype=torch.float64)
    z = (z * 10 ** torch.linspace(-6, 2, 500)).requires_grad_()  # no size of step is exact for all
    theta = ParameterVector([z])
    before, checksum = z.detach().clone(), theta.checksum()
    tried = []

    def measure():
        tried.append(z.detach().clone())
        return {
            "always worse": Measurement(-1.0, 0.001, 0.1),
            "nan": Measurement(math.nan, 0.001, 0.1),
            "inf kl": Measurement(1.0, math.inf, 0.1),
            "kl above": Measurement(1.0, 0.0101, 0.1),
            "ref kl above": Measurement(1.0, 0.001, 1.0001),
        }[how]

    settings = TRPOSettings(max_kl=0.01, max_ref_kl=1.0, line_search_trials=5)
    update = constrained_update(
        theta, g, b, lambda v: 3.0 * v, measure, settings, radius=0.01, ref_kl=0.1, budget=1.0
    )
    assert not update.search.accepted and update.search.scale == 0.0
    assert update.search.trials == len(tried) == 5 == len(update.search.reasons)
    assert all(not torch.equal(t, before) for t in tried)
    lengths = [float((t - before).norm()) for t in tried]
    assert lengths[1] / lengths[0] == pytest.approx(0.8)
    assert torch.equal(z.detach(), before) and theta.checksum() == checksum


def test_a_product_that_is_not_finite_leaves_the_parameters_alone():
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    g = torch.ones(4, dtype=torch.float64)
    update = constrained_update(
        ParameterVector([z]), g, None, lambda v: v * math.nan, lambda: Measurement(1.0, 0.0),
        TRPOSettings(max_ref_kl=None), radius=0.01,
    )  # fmt: skip
    assert update.v.status == "nonfinite" and update.step.case == "none"
    assert not update.search.accepted and torch.equal(z.detach(), torch.zeros(4).double())


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 0.0])
@pytest.mark.parametrize("excess", [-1e-2, 0.0, 1e-2])
def test_nearly_parallel_gradients_in_float32_give_a_step_as_promised(angle, excess):
    """At the constrained optimum g is a multiple of b: the plane degenerates, the step must not."""
    torch.manual_seed(3)
    M = 300
    Q, _ = torch.linalg.qr(torch.randn(M, M, dtype=torch.float64))
    F = Q @ torch.diag(torch.logspace(-4, 0, M, dtype=torch.float64)) @ Q.T
    g = torch.randn(M)
    b = 0.3 * (g + angle * torch.randn(M))
    single = F.float()  # its products are wrong in the seventh digit, as a model's are
    moved = torch.zeros(M, requires_grad=True)
    settings = TRPOSettings(max_kl=0.01, max_ref_kl=1.0, line_search_trials=1, cg_iterations=8)
    update = constrained_update(
        ParameterVector([moved]), g, b, lambda v: single @ v,
        lambda: Measurement(1e30, 0.0, 0.0), settings,
        radius=0.01, damping=0.1, ref_kl=1.0 + excess, budget=1.0,
    )  # fmt: skip
    assert update.search.accepted
    x = moved.detach().double()
    kl = 0.5 * float(x @ F @ x)
    assert kl <= 0.01 * (1 + 1e-3)
    assert kl == pytest.approx(update.step.kl, rel=1e-3, abs=1e-6)
    change = float(b.double() @ x) + kl
    assert change == pytest.approx(update.step.ref_change, abs=1e-4)
    if update.step.case != "recover":
        assert change <= -excess + 1e-4


def test_nearly_parallel_gradients_gain_what_there_is_though_products_are_bfloat16():
    """The part of w across v is a per cent of w, as large as the rounding of w's product."""
    torch.manual_seed(3)
    M = 300
    Q, _ = torch.linalg.qr(torch.randn(M, M, dtype=torch.float64))
    F = (Q @ torch.diag(torch.logspace(-4, 0, M, dtype=torch.float64)) @ Q.T).float()
    g = torch.randn(M)
    b = 0.3 * (g + 0.01 * torch.randn(M))
    gains = []
    for product in (lambda v: F @ v, lambda v: (F @ v).bfloat16().float()):
        update = constrained_update(
            ParameterVector([torch.zeros(M, requires_grad=True)]), g, b, product,
            lambda: Measurement(1e30, 0.0, 0.0), TRPOSettings(max_kl=0.01),
            radius=0.01, damping=0.1, ref_kl=0.99, budget=1.0,
        )  # fmt: skip
        gains.append(update.step.gain)
    assert gains[1] > 0.7 * gains[0]


# ---- the update of a language model ----


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_N06_N11_accepted_steps_keep_both_distances(kind):
    policy = tiny.policy(kind, peft=tiny.lora(r=2))
    algorithm = TRPO(max_kl=0.02, max_ref_kl=0.05)
    state = algorithm.init_state(policy)
    accepted = 0
    for seed in range(8):
        batch = tiny.batch(policy, each=8, seed=seed, micro_batch_size=64)
        k = float(batch.ref_kl.sum()) / count(batch)
        error = reference_kl(batch, tiny.identity, count(batch))[1]
        budget = budget_on_batch(dict(state["reference"]), k=k, error=error, budget=0.05)
        before = policy.parameters.snapshot()
        row = algorithm.update(policy, batch, tiny.identity, state)
        now = measure_at(policy, batch, tiny.identity, count(batch))
        if not row["line_search/accepted"]:
            pairs = zip(policy.parameters.tensors, before, strict=True)
            assert all(torch.equal(p, q) for p, q in pairs)
            continue
        accepted += 1
        assert now.kl <= 0.02 * (1 + 1e-3) and now.ref_kl <= max(k, budget) + 1e-6
        assert row["trust_region/kl"] == pytest.approx(now.kl, rel=1e-3)
        if budget >= k:
            assert now.gain > 0
    assert accepted >= 4
    fresh = tiny.batch(policy, each=200, seed=99, micro_batch_size=512)
    assert 0.3 * 0.05 < float(fresh.ref_kl.sum()) / count(fresh) <= 0.05 * 1.25


def test_N03_the_first_step_from_a_fresh_adapter_is_finite_and_uses_the_radius():
    policy = tiny.policy("llama", peft=tiny.lora(r=2))
    batch = tiny.batch(policy, each=8, micro_batch_size=64)
    algorithm = TRPO(max_kl=0.02, max_ref_kl=None)
    row = algorithm.update(policy, batch, tiny.identity, algorithm.init_state(policy))
    assert row["line_search/accepted"] and 0.005 < row["trust_region/kl"] <= 0.02
    assert row["trust_region/case"] == "old" and math.isnan(row["trust_region/alignment"])
    for (name, p), q in zip(
        ((n, p) for n, p in policy.model.named_parameters() if p.requires_grad),
        policy._reference, strict=True,
    ):  # fmt: skip
        assert torch.isfinite(p).all()
        assert torch.equal(p, q) == ("lora_A" in name), name


def test_R13_scale_and_shift_of_rewards_leave_the_step_alone():
    found = []
    for scale, shift in ((1.0, 0.0), (1e12, 0.0), (1.0, 1e9), (1e-6, 0.0)):
        policy = tiny.policy("llama", spread=0.3)
        batch = tiny.batch(policy, each=8, micro_batch_size=64)
        noise = torch.Generator().manual_seed(1)
        n, T = len(batch.rollout), batch.rollout.action_mask.shape[1]
        score = torch.rand(n, generator=noise, dtype=torch.float64)
        value = score.mean() + 0.1 * torch.randn(n, T, generator=noise, dtype=torch.float64)
        last = batch.rollout.lengths - 1
        batch.rewards = torch.zeros(n, T, dtype=torch.float64)
        batch.rewards[torch.arange(n), last] = scale * score + shift
        batch.values = (scale * value + shift) * batch.rollout.action_mask
        algorithm = TRPO(max_kl=0.01, lam=0.5)
        A = algorithm.advantages(batch, tiny.identity)
        batch.advantages = A[batch.rollout.action_mask].to(batch.old_logprobs)
        before = policy.parameters.vector()
        row = algorithm.update(policy, batch, tiny.identity, algorithm.init_state(policy))
        assert row["line_search/accepted"]
        found.append(policy.parameters.vector() - before)
    for step in found[1:]:
        assert relative(step, found[0]) <= 1e-4


def test_the_step_inside_the_plane_of_both_gradients_with_truncated_solves():
    """The promises of the step hold, though 3 damped iterations solve little."""
    policy = tiny.policy(dtype=torch.float64, spread=0.4,
                         peft=tiny.lora(target_modules=["c_attn"]))  # fmt: skip
    batch = tiny.batch(policy, each=4, micro_batch_size=64)
    N, theta = count(batch), policy.parameters
    g, b = mean_gradients(policy, batch)
    F = tiny.dense(fisher(policy, batch, tiny.identity, WIDE), theta.size)
    k = float(batch.ref_kl.sum()) / N
    before = theta.snapshot()
    settings = TRPOSettings(max_kl=1e-4, cg_iterations=3, line_search_trials=1)
    for budget in (k + 1.0, k + 1e-5, k):
        update = constrained_update(
            theta, g, b, lambda v: F @ v, lambda: Measurement(1e30, 0.0, 0.0), settings,
            radius=1e-4, damping=0.3, ref_kl=k, budget=budget,
        )  # fmt: skip
        after = theta.vector()
        theta.restore(before)
        x = after - theta.flatten(before)
        step = update.step
        assert 0.5 * float(x @ F @ x) == pytest.approx(step.kl, rel=1e-6)
        assert float(g @ x) == pytest.approx(step.gain, rel=1e-6)
        change = float(b @ x + 0.5 * x @ F @ x)
        assert change == pytest.approx(step.ref_change, rel=1e-5, abs=1e-12)
        assert change <= budget - k + 1e-9
        if step.case in ("old", "both"):
            assert step.kl == pytest.approx(1e-4, rel=1e-9)


def test_hessian_products_and_fisher_products_take_the_same_step(monkeypatch):
    """`trust_region_step` on the language model's own quantities agrees with `TRPO.update`."""
    monkeypatch.setattr(trpo_lm.algorithms.trpo, "running_rms", lambda kept, g: torch.ones_like(g))
    settings = {"max_kl": 1e-3, "max_ref_kl": 5.0, **EXACT, "cg_iterations": 8, "damping": 0.1}
    one = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(one, length=3)
    start = one.parameters.vector()
    algorithm = TRPO(**settings, fisher_completions=WIDE)
    algorithm.update(one, batch, tiny.identity, algorithm.init_state(one))
    two = tiny.policy(dtype=torch.float64, spread=0.4)
    old = tiny.own_logits(two, batch.rollout).detach().log_softmax(-1)

    def quantities():
        with twice_differentiable():
            new = tiny.own_logits(two, batch.rollout).log_softmax(-1)
        ratio = (token_logprobs(new, batch.actions) - token_logprobs(old, batch.actions)).exp()
        return new, ratio

    update = trust_region_step(
        two.parameters.tensors,
        lambda: (quantities()[1] * batch.advantages).sum() / count(batch),
        lambda: categorical_kl(old=old, new=quantities()[0]).sum() / count(batch),
        lambda: plain_quantities(two, batch)[2],
        TRPOSettings(**settings),
    )
    assert update.search.accepted
    a, b = (p.parameters.vector() - start for p in (one, two))
    assert relative(a / a.norm(), b / b.norm()) < 1e-6


def test_the_radius_follows_the_measured_share_of_the_predicted_kl():
    policy = tiny.policy(peft=tiny.lora(r=2))
    algorithm = TRPO(max_kl=0.02, max_ref_kl=None)
    state = algorithm.init_state(policy)
    state["radius"] = {"kl_ratio": 2.0}
    row = algorithm.update(policy, tiny.batch(policy, each=8), tiny.identity, state)
    assert row["trust_region/radius"] == pytest.approx(0.01) and row["line_search/accepted"]
    ratio = row["trust_region/kl"] / row["trust_region/predicted_kl"]
    assert state["radius"]["kl_ratio"] == pytest.approx(2.0 + 0.5 * (KL_MARGIN * ratio - 2.0))
    state["radius"]["kl_ratio"] = 0.1  # never beyond max_kl
    row = algorithm.update(policy, tiny.batch(policy, each=8), tiny.identity, state)
    assert row["trust_region/radius"] == 0.02


def test_advantages_leave_abstaining_rows_at_zero():
    policy = tiny.policy()
    batch = tiny.batch(policy)
    valid = torch.ones(len(batch.rollout), dtype=torch.bool)
    valid[::3] = False
    batch.rollout.scores = replace(batch.rollout.scores, valid=valid)
    batch.rewards = torch.randn(batch.rollout.action_mask.shape, dtype=torch.float64)
    A = TRPO(lam=0.9).advantages(batch, tiny.identity)
    assert bool((A[~valid] == 0).all())
    assert bool((A[~batch.rollout.action_mask] == 0).all())
    used = batch.rollout.action_mask & valid[:, None]
    assert float(A[used].mean()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(A, whiten(A, used, tiny.identity))


def test_settings_keep_the_given_lambda():
    assert TRPO().with_lam(0.5).lam == 0.5 and TRPO(lam=0.0).with_lam(0.5).lam == 0.0
