"""The eleven statements, asserted line by line, and the package's batches against the sums."""

import math

import pytest
import torch
from statements import identities, updates
from statements.enumerable import (
    build,
    exact_update,
    largest,
    relative,
    whole_number_objective,
)

from trpo_lm.config import TRPOSettings
from trpo_lm.core.advantages import gae
from trpo_lm.core.natural_step import StepLimits, constrained_update
from trpo_lm.core.trust_region import plane_step


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower on more
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tree():
    return build()


def check(lines):
    assert [str(line) for line in lines if not line.holds] == []


def test_0_the_tree_is_the_mdp(tree):
    """Every completion once, probabilities sum to one, and eta is the recursion over step()."""
    assert len(set(tree.completions)) == len(tree.completions) == 242
    tree.draw(0)
    pi = tree.table().detach()
    assert float(tree.completion_logprobs(pi).exp().sum()) == pytest.approx(1.0, abs=1e-13)
    assert float(tree.visits(pi)[tree.time == 0].sum()) == pytest.approx(1.0, abs=1e-13)
    row = {(s.prompt, s.completion_ids): i for i, s in enumerate(tree.states)}

    def worth(state):
        total = 0.0
        for a in range(tree.V):
            after, reward, terminated, truncated = tree.mdp.step(state, a)
            later = 0.0 if terminated or truncated else worth(after)
            p = math.exp(pi[row[state.prompt, state.completion_ids], a])
            total += p * (reward + later)
        return total

    eta = sum(worth(tree.mdp.reset(prompt)) for prompt in tree.prompts) / len(tree.prompts)
    assert float(tree.eta(pi)) == pytest.approx(eta, abs=1e-12)


def test_1_advantage_and_value(tree):
    check(identities.statement_1(tree))


def test_1_td_errors_of_the_exact_value_do_not_depend_on_what_came_before(tree):
    """Transitions are certain: with the exact V and lambda = 0 every A_t is A(s_t, a_t) itself."""
    tree.draw(1)
    pi = tree.table().detach()
    _, V = tree.values(pi)
    rewards = torch.zeros(tree.mask.shape, dtype=torch.float64)
    rewards[torch.arange(len(rewards)), tree.lengths - 1] = tree.scores
    A = gae(rewards, V[tree.steps // tree.V], tree.mask, gamma=1.0, lam=0.0)
    exact = tree.advantages(pi).flatten()[tree.steps] * tree.mask
    assert largest(A - exact) < 1e-12


def test_2_performance_difference(tree):
    check(identities.statement_2(tree))


def test_3_state_distribution_substitution(tree):
    check(identities.statement_3(tree))


def test_4_lower_bound(tree):
    check(identities.statement_4(tree))


def test_4_penalty_of_the_finite_horizon():
    """C = T (T - 1) e for gamma = 1, below the paper's C, half of it as T grows."""
    A = torch.tensor([[-3.0, 1.0]])
    assert float(identities.penalty(A, gamma=1.0, horizon=4)) == pytest.approx(36.0)
    paper = float(identities.penalty(A, gamma=0.9, horizon=math.inf))
    assert paper == pytest.approx(4 * 3 * 0.9 / 0.01)
    assert float(identities.penalty(A, gamma=0.9, horizon=400)) == pytest.approx(paper / 2)


def test_5_importance_sampling(tree):
    check(identities.statement_5(tree))


def test_6_taylor(tree):
    check(updates.statement_6(tree))


def test_7_closed_form(tree):
    check(updates.statement_7(tree))


def test_7_two_balls_of_any_shape():
    """The step against brute force on random problems, ten and more of every case."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high):
        return low + (high - low) * float(torch.rand((), generator=generator))

    count = dict.fromkeys(("old", "both", "ref", "recover"), 0)
    for _ in range(120):
        v, w = torch.randn(2, 2, dtype=torch.float64, generator=generator)
        plane = torch.stack([v, w])
        gram = plane @ plane.T
        s, delta = float(w @ w), 10 ** uniform(-2, 0.3)
        excess = uniform(-1.5, 1) * s
        case = plane_step(gram, gram[0], gram[1], delta=delta, excess=excess).case
        count[case] += 1
        if count[case] > 10:
            continue
        result = updates.two_balls(gram, gram[0], gram[1], delta, excess)
        assert result.feasible, result
        assert abs(result.gap) < 2e-3, result
        if result.case != "recover":
            assert result.bound == pytest.approx(1.0, abs=5e-3), result
    assert min(count.values()) >= 10, count


@pytest.mark.slow
def test_8_trpo_improves():
    check(updates.statement_8(build(steps=3), starts=20))


def test_9_reference_budget():
    check(updates.statement_9())


def test_10_sequence_kl(tree):
    check(identities.statement_10(tree))


def test_10_gradients_of_any_policy_are_means_over_single_completions():
    """sum_y pi(y) gradients({y}) is the enumerated gradient: no policy need be uniform for it."""
    tree = build(steps=3, prompts=("a",))
    tree.draw(2)
    theta, pi = tree.policy.parameters, tree.table()
    g = theta.gradient(tree.eta(pi), retain=True)
    b = theta.gradient(tree.reference_kl(pi))
    y = tree.completion_logprobs(pi.detach()).exp()
    total_g, total_b = torch.zeros_like(g), torch.zeros_like(b)
    for i, probability in enumerate(y):
        objective = tree.objective(torch.eye(len(y), dtype=torch.int64)[i])
        objective.N = math.inf  # no baseline: the mean of one row would be that row
        g_y, b_y = objective.gradients(reference=True)
        total_g += probability * g_y.sum(0)
        total_b += probability * b_y.sum(0)
    assert relative(total_g, g) < 1e-10
    assert relative(total_b, b) < 1e-10


@pytest.mark.parametrize("budget", [None, 1.0, 0.68, 0.6, 0.05])
def test_10_the_package_on_an_exact_batch_makes_the_exact_update(budget):
    """BatchObjective and constrained_update: the same theta as the enumerated sums."""
    settings = TRPOSettings(
        max_kl=0.02, max_ref_kl=budget, cg_iterations=6, damping=0.1, line_search_trials=20
    )
    tree = build(uniform=True)
    theta = tree.policy.parameters
    start = theta.snapshot()
    objective = whole_number_objective(tree)
    N = objective.N
    g, b = objective.gradients(reference=budget is not None)
    limits = StepLimits(
        settings.max_kl, objective.reference_kl()[0], math.inf if budget is None else budget, 0.1
    )
    sampled = constrained_update(
        theta, g.sum(0) / N, None if b is None else b.sum(0) / N,
        objective.fisher(int(N)), objective.measure, limits, settings,
    )  # fmt: skip
    reached = tree.table().detach()
    theta.restore(start)
    _, exact = exact_update(tree, settings)
    assert sampled.step.case == exact.step.case
    assert sampled.search.reasons == exact.search.reasons
    assert sampled.search.accepted
    assert largest(reached - tree.table().detach()) < 1e-10
    if budget is not None:
        assert sampled.search.trial.ref_kl == pytest.approx(exact.search.trial.ref_kl)


def test_11_credit():
    check(identities.statement_11(build(steps=3)))
