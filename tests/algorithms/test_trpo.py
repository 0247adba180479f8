"""The update: gradients by plain autograd, the step by closed forms, and what it may not do."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch

import trpo_lm.algorithms.trpo
import trpo_lm.lm.policy
from trpo_lm.algorithms.trpo import TRPO, learned
from trpo_lm.config import TRPOSettings
from trpo_lm.core.adaptation import (
    KL_MARGIN,
    RadiusRatio,
    ReferenceFilter,
    budget_on_batch,
    in_reach,
    learn_radius,
    radius_inside,
    running_rms,
)
from trpo_lm.core.advantages import whiten
from trpo_lm.core.conjugate_gradient import CGSolution, conjugate_gradient
from trpo_lm.core.divergences import categorical_kl, token_logprobs
from trpo_lm.core.fisher import twice_differentiable
from trpo_lm.core.line_search import Search
from trpo_lm.core.natural_step import (
    Measurement,
    StepLimits,
    Update,
    constrained_update,
    solve,
    trust_region_step,
)
from trpo_lm.core.parameters import ParameterVector
from trpo_lm.core.trust_region import Step, plane_step

EXACT = {"cg_iterations": 400, "cg_tolerance": 1e-12, "damping": 0.0}
WIDE = 10**6


def relative(a, b):
    return float((a - b).norm() / b.norm())


def count(batch):
    return float(len(batch.rollout))


# ---- the step ----


def well_posed():
    """A policy with fewer parameters than the batch has observations, and such a batch."""
    policy = tiny.policy(
        model=tiny.build(dtype=torch.float64, n_layer=1),
        peft=tiny.lora(target_modules=["c_fc"]),
        spread=0.4,
    )
    return policy, tiny.batch(policy, each=24, micro_batch_tokens=10**6)


def exact_step(policy, batch, delta=1e-3):
    """The step of radius delta along F^-1 g of an undamped, converged solve; also F and g."""
    g, _ = tiny.mean_gradients(policy, batch, reference=False)
    F = tiny.dense(tiny.objective(policy, batch).fisher(WIDE), policy.parameters.size)
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
        kl = tiny.objective(policy, batch).measure().kl
        errors.append(abs(kl / delta - 1))
    theta.restore(before)
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):  # D = delta + O(delta^1.5)
        assert fine < 0.4 * coarse


# ---- the update of a language model ----


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_N06_N11_accepted_steps_keep_both_distances(kind):
    policy = tiny.policy(kind, peft=tiny.lora(r=2))
    algorithm = TRPO(max_kl=0.02, max_ref_kl=0.05)
    state = algorithm.init_state(policy.parameters)
    accepted = 0
    for seed in range(8):
        batch = tiny.batch(policy, each=8, seed=seed, micro_batch_tokens=10**6)
        k = float(batch.ref_kl.sum()) / count(batch)
        error = tiny.objective(policy, batch).reference_kl()[1]
        _, budget = budget_on_batch(state.reference, k=k, error=error, budget=0.05)
        before = policy.parameters.snapshot()
        state, row = algorithm.update(tiny.objective(policy, batch), state)
        now = tiny.objective(policy, batch).measure()
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
    fresh = tiny.batch(policy, each=200, seed=99, micro_batch_tokens=10**6)
    assert 0.3 * 0.05 < float(fresh.ref_kl.sum()) / count(fresh) <= 0.05 * 1.25


def test_N03_the_first_step_from_a_fresh_adapter_is_finite_and_uses_the_radius():
    policy = tiny.policy("llama", peft=tiny.lora(r=2))
    batch = tiny.batch(policy, each=8, micro_batch_tokens=10**6)
    algorithm = TRPO(max_kl=0.02, max_ref_kl=None)
    row = algorithm.update(tiny.objective(policy, batch), algorithm.init_state(policy.parameters))[
        1
    ]
    assert row["line_search/accepted"] and 0.005 < row["trust_region/kl"] <= 0.02
    assert row["trust_region/case"] == "old" and math.isnan(row["trust_region/alignment"])
    for (name, p), q in zip(
        ((n, p) for n, p in policy.model.named_parameters() if p.requires_grad),
        policy._reference, strict=True,
    ):  # fmt: skip
        assert torch.isfinite(p).all()
        assert torch.equal(p, q) == ("lora_A" in name), name


def test_R13_scale_and_shift_of_rewards_leave_the_step_alone(monkeypatch):
    monkeypatch.setattr(trpo_lm.algorithms.trpo, "in_reach", lambda *_: True)
    found = []
    for scale, shift in ((1.0, 0.0), (1e12, 0.0), (1.0, 1e9), (1e-6, 0.0)):
        policy = tiny.policy("llama", dtype=torch.float64, spread=0.3)
        batch = tiny.batch(policy, each=8, micro_batch_tokens=10**6)
        noise = torch.Generator().manual_seed(1)
        n, T = len(batch.rollout), batch.rollout.action_mask.shape[1]
        score = torch.rand(n, generator=noise, dtype=torch.float64)
        value = score.mean() + 0.1 * torch.randn(n, T, generator=noise, dtype=torch.float64)
        last = batch.rollout.lengths - 1
        rewards = torch.zeros(n, T, dtype=torch.float64)
        rewards[torch.arange(n), last] = scale * score + shift
        values = (scale * value + shift) * batch.rollout.action_mask
        algorithm = TRPO(max_kl=0.01, lam=0.5, fisher_completions=32)
        A = algorithm.advantages(batch.rollout, rewards, values, tiny.identity)
        before = policy.parameters.flatten(policy.parameters.snapshot())
        row = algorithm.update(
            tiny.objective(policy, batch, A), algorithm.init_state(policy.parameters)
        )[1]
        assert row["line_search/accepted"]
        found.append(policy.parameters.vector() - before)
    for step in found[1:]:
        assert relative(step, found[0]) <= 1e-4


def test_the_step_inside_the_plane_of_both_gradients_with_truncated_solves():
    """The promises of the step hold, though 3 damped iterations solve little."""
    policy = tiny.policy(dtype=torch.float64, spread=0.4,
                         peft=tiny.lora(target_modules=["c_attn"]))  # fmt: skip
    batch = tiny.batch(policy, each=4, micro_batch_tokens=10**6)
    N, theta = count(batch), policy.parameters
    g, b = tiny.mean_gradients(policy, batch)
    F = tiny.dense(tiny.objective(policy, batch).fisher(WIDE), theta.size)
    k = float(batch.ref_kl.sum()) / N
    before = theta.snapshot()
    settings = TRPOSettings(max_kl=1e-4, cg_iterations=3, line_search_trials=1)
    for budget in (k + 1.0, k + 1e-5, k):
        update = constrained_update(
            theta, g, b, lambda v: F @ v, lambda: Measurement(1e30, 0.0, 0.0),
            StepLimits(1e-4, k, budget, damping=0.3), settings,
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


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_price_of_R_comes_from_the_ray_and_enters_step_and_search(kind, monkeypatch):
    """Slopes of L and R along theta - theta_ref by plain autograd; the step is that of L - mu R."""
    policy = tiny.policy(kind, dtype=torch.float64, spread=0.05)
    batch = tiny.batch(policy, each=8)
    rule = TRPO(max_kl=0.01, max_ref_kl=2.0, fisher_completions=WIDE, damping=0.1)
    state, start = rule.init_state(policy.parameters), policy.parameters.vector()
    d = policy.from_reference()
    L, _, R = tiny.plain_quantities(policy, batch)
    g, b = (policy.parameters.gradient(x, retain=True) for x in (L, R))
    expected = max(float(g @ d) / float(b @ d) * math.sqrt(float(R.detach()) / 2.0), 0.0)
    if not expected:  # the made-up advantages of this batch fall along the ray
        g = -g
        monkeypatch.setattr(tiny, "advantages", lambda batch, old=tiny.advantages: -old(batch))
        expected = float(g @ d) / float(b @ d) * math.sqrt(float(R.detach()) / 2.0)
    state, row = rule.update(tiny.objective(policy, batch), state)
    assert row["trust_region/price"] == pytest.approx(expected, rel=1e-6) and expected > 0
    assert state.slope.weight == 1.0 and row["trust_region/case"] == "old"
    moved = policy.parameters.vector() - start
    policy.parameters.restore(policy.parameters.unflatten(start))
    F = tiny.objective(policy, batch).fisher(WIDE)
    metric = running_rms(torch.zeros_like(g), g - expected * b)[1]
    limits = StepLimits(row["trust_region/radius"], damping=0.1, metric=metric)
    v = solve(F, g - expected * b, limits, rule).x
    assert relative(moved / moved.norm(), v / v.norm()) < 1e-4  # truncated: magnifies rounding


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_far_below_the_budget_the_step_is_the_same_without_grad_R(monkeypatch, kind):
    """And it is found with one solve and one backward pass fewer."""
    steps, rows = [], []
    for asked in (in_reach, lambda *_: True):
        monkeypatch.setattr(trpo_lm.algorithms.trpo, "in_reach", asked)
        policy = tiny.policy(kind, dtype=torch.float64, spread=0.01)
        batch = tiny.batch(policy, each=8)
        start = policy.parameters.vector()
        rule = TRPO(max_kl=0.01, max_ref_kl=50.0, fisher_completions=WIDE, damping=0.1)
        state = rule.init_state(policy.parameters)
        rows.append(rule.update(tiny.objective(policy, batch), state)[1])
        steps.append(policy.parameters.vector() - start)
    assert [row["trust_region/case"] for row in rows] == ["old", "old"]
    assert rows[0]["cg/ref_status"] is None and rows[1]["cg/ref_status"] is not None
    assert rows[0]["cg/iterations"] < rows[1]["cg/iterations"]
    a, b = steps  # w, in the plane of the second, makes up for damping a little
    assert float(a @ b / a.norm() / b.norm()) > 0.98


def test_hessian_products_and_fisher_products_take_the_same_step(monkeypatch):
    """`trust_region_step` on the language model's own quantities agrees with `TRPO.update`."""

    def no_metric(square, g):
        return square, torch.ones_like(g)

    monkeypatch.setattr(trpo_lm.algorithms.trpo, "running_rms", no_metric)
    monkeypatch.setattr(trpo_lm.algorithms.trpo, "in_reach", lambda *_: True)
    settings = {"max_kl": 1e-3, "max_ref_kl": 5.0, **EXACT, "cg_iterations": 8, "damping": 0.1}
    one = tiny.policy(dtype=torch.float64, spread=0.4)
    batch = tiny.batch(one, length=3)
    start = one.parameters.vector()
    algorithm = TRPO(**settings, fisher_completions=WIDE)
    algorithm.update(tiny.objective(one, batch), algorithm.init_state(one.parameters))[1]
    two = tiny.policy(dtype=torch.float64, spread=0.4)
    old = tiny.own_logits(two, batch.rollout).detach().log_softmax(-1)

    def quantities():
        with twice_differentiable():
            new = tiny.own_logits(two, batch.rollout).log_softmax(-1)
        ratio = (token_logprobs(new, batch.actions) - token_logprobs(old, batch.actions)).exp()
        return new, ratio

    update = trust_region_step(
        two.parameters.tensors,
        lambda: (quantities()[1] * tiny.advantages(batch)).sum() / count(batch),
        lambda: categorical_kl(old=old, new=quantities()[0]).sum() / count(batch),
        lambda: tiny.plain_quantities(two, batch)[2],
        TRPOSettings(**settings),
    )
    assert update.search.accepted
    a, b = (p.parameters.vector() - start for p in (one, two))
    assert relative(a / a.norm(), b / b.norm()) < 1e-6


def test_the_radius_follows_the_measured_share_of_the_predicted_kl():
    policy = tiny.policy(peft=tiny.lora(r=2))
    algorithm = TRPO(max_kl=0.02, max_ref_kl=None)
    state = replace(algorithm.init_state(policy.parameters), radius=RadiusRatio(2.0))
    objective = tiny.objective(policy, tiny.batch(policy, each=8))
    state, row = algorithm.update(objective, state)
    assert row["trust_region/radius"] == pytest.approx(0.01) and row["line_search/accepted"]
    ratio = row["trust_region/kl"] / row["trust_region/predicted_kl"]
    assert state.radius.kl_ratio == pytest.approx(2.0 + 0.5 * (KL_MARGIN * ratio - 2.0))
    state = replace(state, radius=RadiusRatio(0.1))  # never beyond max_kl
    objective = tiny.objective(policy, tiny.batch(policy, each=8))
    _, row = algorithm.update(objective, state)
    assert row["trust_region/radius"] == 0.02


def test_advantages_leave_abstaining_rows_at_zero():
    policy = tiny.policy()
    batch = tiny.batch(policy)
    valid = torch.ones(len(batch.rollout), dtype=torch.bool)
    valid[::3] = False
    rollout = replace(batch.rollout, scores=replace(batch.rollout.scores, valid=valid))
    rewards = torch.randn(rollout.action_mask.shape, dtype=torch.float64)
    A = TRPO(lam=0.9).advantages(rollout, rewards, torch.zeros_like(rewards), tiny.identity)
    assert bool((A[~valid] == 0).all())
    assert bool((A[~batch.rollout.action_mask] == 0).all())
    used = batch.rollout.action_mask & valid[:, None]
    assert float(A[used].mean()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(A, whiten(A, used, tiny.identity))


def made_up_update(case, scale, *, budgeted=True):
    """An update of a step with kl 0.04 and a change of R by 0.06 at full length."""
    solution = CGSolution(torch.ones(2), torch.ones(2), 0.0, 1, "converged")
    step = Step((1.0, 1.0), case, gain=0.1, kl=0.04, ref_change=0.06, alignment=0.5)
    search = Search(scale, Measurement(0.1, 0.05, 0.55), () if scale else ("kl above max_kl",))
    return Update(solution, solution if budgeted else None, step, search)


def test_the_next_rollout_is_expected_where_the_accepted_step_was_predicted_to_lead():
    before = TRPO().init_state(ParameterVector([torch.zeros(2)]))
    before = replace(before, reference=ReferenceFilter(0.5, 0.02, expected=0.5, fitted=1.0))
    after = learned(before, made_up_update("both", 0.5), R=0.5, max_kl=0.04)
    expected = 0.5 + 0.5 * (0.06 - 0.04) + 0.25 * 0.04
    assert after.reference == ReferenceFilter(0.5, 0.02, pytest.approx(expected), fitted=1.0)
    assert after.radius == learn_radius(before.radius, kl=0.05, predicted=0.01)
    assert learned(before, made_up_update("old", 1.0), R=0.5, max_kl=0.04).reference.fitted == 0.0
    without = learned(before, made_up_update("old", 1.0, budgeted=False), R=0.5, max_kl=0.04)
    assert without.reference.expected == pytest.approx(0.5 + 0.55 - 0.5)
    rejected = learned(before, made_up_update("both", 0.0), R=0.5, max_kl=0.04)
    assert rejected.reference == replace(before.reference, fitted=0.0)


@pytest.mark.parametrize("shortest", [1.0, 0.8, 0.2])
def test_B20_after_a_search_without_an_accepted_step_the_radius_lies_below_the_last_trial(shortest):
    before = TRPO().init_state(ParameterVector([torch.zeros(2)]))
    update = made_up_update("old", 0.0)
    update = replace(update, search=replace(update.search, shortest=shortest))
    after = learned(before, update, R=0.5, max_kl=0.05)
    assert radius_inside(after.radius, 0.05) < 0.04 * shortest**2
    grown = after
    for _ in range(8):  # steps whose KL is as predicted
        grown = replace(grown, radius=learn_radius(grown.radius, kl=0.03, predicted=0.04))
    assert radius_inside(grown.radius, 0.05) > radius_inside(after.radius, 0.05)
