"""The step on any torch model: closed forms, a bandit with a known optimum, and what may not be."""

import math

import pytest
import torch

from trpo_lm.config import TRPOSettings
from trpo_lm.core.divergences import categorical_kl
from trpo_lm.core.natural_step import (
    Measurement,
    StepLimits,
    constrained_update,
    trust_region_step,
)
from trpo_lm.core.parameters import ParameterVector

EXACT = {"cg_iterations": 400, "cg_tolerance": 1e-12, "damping": 0.0}


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
        theta, g, b, lambda v: 3.0 * v, measure, StepLimits(0.01, 0.1, 1.0), settings
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
        StepLimits(0.01), TRPOSettings(max_ref_kl=None),
    )  # fmt: skip
    assert update.v.status == "nonfinite" and update.step.case == "none"
    assert not update.search.accepted and torch.equal(z.detach(), torch.zeros(4).double())


@pytest.mark.parametrize(("price", "accepted"), [(0.0, True), (0.4, True), (0.6, False)])
def test_a_step_must_gain_what_its_reference_kl_costs(price, accepted):
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    g = torch.full((4,), 1e-3, dtype=torch.float64)
    limits = StepLimits(0.01, ref_kl=0.1, budget=1.0, price=price)
    update = constrained_update(
        ParameterVector([z]), g, None, lambda v: v, lambda: Measurement(0.1, 0.001, 0.3),
        limits, TRPOSettings(max_kl=0.01, max_ref_kl=1.0),
    )  # fmt: skip
    assert update.search.accepted == accepted
    assert update.search.trial.gain == pytest.approx(0.1 - price * 0.2)


def flawed(flaw, at):
    """A diagonal Fisher whose product number `at` (from 1) is not what it should be."""
    calls = []

    def product(v):
        calls.append(v)
        Fv = torch.linspace(1.0, 50.0, len(v), dtype=v.dtype) * v
        if len(calls) < at:
            return Fv
        return {"nan": Fv * math.nan, "negative": -Fv}[flaw]

    return product


@pytest.mark.parametrize("at", [1, 3, 9])
@pytest.mark.parametrize(
    ("flaw", "status", "cause"),
    [("nan", "nonfinite", "not finite"), ("negative", "indefinite", "no positive curvature")],
)
def test_B21_B61_a_missing_or_rejected_step_names_the_solve_that_broke(flaw, status, cause, at):
    """From the first product on, or in the middle of the first or of the second solve."""
    z = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    g, b = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = constrained_update(
        ParameterVector([z]), g, b, flawed(flaw, at), lambda: Measurement(-1.0, 0.0, 0.0),
        StepLimits(0.01, 0.5, 1.0), TRPOSettings(cg_iterations=6, cg_tolerance=1e-12),
    )  # fmt: skip
    assert (update.v.status, update.w.status)[at > 6] == status
    assert not update.search.accepted and cause in update.reason
    assert update.step.case == "none" or at > 1


def test_B21_a_gradient_that_is_not_finite_is_named():
    z = torch.zeros(3, requires_grad=True)
    update = constrained_update(
        ParameterVector([z]), torch.full((3,), math.nan), None, lambda v: v,
        lambda: Measurement(0.0, 0.0), StepLimits(0.01), TRPOSettings(max_ref_kl=None),
    )  # fmt: skip
    assert update.step.case == "none" and "gradient was not finite" in update.reason


def test_an_accepted_step_gives_no_cause():
    """A truncated solve may have led to it; its status says so, the reason does not."""
    z = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    update = constrained_update(
        ParameterVector([z]), torch.ones(20).double(), None, flawed("nan", 3),
        lambda: Measurement(1e30, 0.0), StepLimits(0.01), TRPOSettings(max_ref_kl=None),
    )  # fmt: skip
    assert update.search.accepted and update.reason is None and update.v.status == "nonfinite"


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
        lambda: Measurement(1e30, 0.0, 0.0),
        StepLimits(0.01, 1.0 + excess, 1.0, damping=0.1), settings,
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
            lambda: Measurement(1e30, 0.0, 0.0),
            StepLimits(0.01, 0.99, 1.0, damping=0.1), TRPOSettings(max_kl=0.01),
        )  # fmt: skip
        gains.append(update.step.gain)
    assert gains[1] > 0.7 * gains[0]
