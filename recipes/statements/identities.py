"""Statements 1 to 5, 10 and 11: what eta, A, L, R, KLs and sampled gradients are to each other."""

import math

import torch
from statements.enumerable import (
    Line,
    Tree,
    alone,
    at_steps,
    build,
    largest,
    many_policies,
    orders,
    relative,
    whole_number_objective,
)
from torch import Tensor

from trpo_lm.core.advantages import gae
from trpo_lm.core.divergences import categorical_kl
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.rollout import Batch


def statement_1(tree: Tree) -> list[Line]:
    """Q, V and A are means of rewards-to-go; with the exact V, GAE is unbiased for every lambda.

    Source: Schulman et al. (2016), arXiv:1506.02438.
    """
    tree.draw(1)
    with torch.no_grad():
        pi = tree.table()
    y, lines = tree.completion_logprobs(pi).exp(), []
    for gamma in (1.0, 0.9):
        Q, V = tree.values(pi, gamma)
        rewards = torch.zeros(tree.mask.shape, dtype=torch.float64)
        rewards[torch.arange(len(y)), tree.lengths - 1] = tree.scores

        def gae_bias(values: Tensor, lam: float, gamma=gamma, Q=Q, rewards=rewards) -> float:
            """Error of E[GAE | s, a], after V_exact - V: a baseline's part, which is no bias."""
            at = values[tree.steps // tree.V]
            A = gae(rewards, at, tree.mask, gamma=gamma, lam=lam)
            total = torch.zeros(Q.numel(), dtype=torch.float64).index_add(
                0, tree.steps[tree.mask], (y[:, None] * A)[tree.mask]
            )
            mean = (total / (y @ tree.choices)).view(Q.shape)
            return largest(mean - (Q - values[:, None]))

        # Bellman's equation, from the same completions: Q(s, a) = r + gamma V(s'), V(end) = 0.
        bellman = torch.zeros_like(Q).flatten()
        for t in range(tree.mask.shape[1]):
            here, live = tree.steps[:, t], tree.mask[:, t]
            last = live & (tree.lengths == t + 1)
            bellman[here[last]] = tree.scores[last]
            if t + 1 < tree.mask.shape[1]:
                on = tree.mask[:, t + 1]
                bellman[here[on]] = gamma * V[tree.steps[on, t + 1] // tree.V]
        rough = V + torch.linspace(-1, 1, len(V), dtype=V.dtype)
        lines += [
            Line(f"gamma {gamma}: Q(s,a) by counting - Bellman's equation",
                 largest(Q.flatten() - bellman), most=1e-12),
            Line(f"gamma {gamma}: sum_a pi A, largest over states",
                 largest((pi.exp() * (Q - V[:, None])).sum(-1)), most=1e-12),
            Line(f"gamma {gamma}: GAE(1), exact V: mean - A", gae_bias(V, 1.0), most=1e-12),
            Line(f"gamma {gamma}: GAE(0.5), exact V: mean - A", gae_bias(V, 0.5), most=1e-12),
            Line(f"gamma {gamma}: GAE(0), exact V: mean - A", gae_bias(V, 0.0), most=1e-12),
            Line(f"gamma {gamma}: GAE(1), wrong V: mean - (Q - V)", gae_bias(rough, 1.0),
                 most=1e-12),
            Line(f"gamma {gamma}: GAE(0.5), wrong V: mean - (Q - V)", gae_bias(rough, 0.5),
                 least=1e-2),
        ]  # fmt: skip
    return lines


def statement_2(tree: Tree) -> list[Line]:
    """eta(pi') = eta(pi) + E_pi'[ sum_t gamma^t A_pi(s_t, a_t) ].

    Source: the performance difference lemma, Kakade and Langford (2002).
    """
    pi, lines = many_policies(tree), []
    for gamma in (1.0, 0.9):
        eta, A = tree.eta(pi, gamma), tree.advantages(pi, gamma)
        gain = torch.einsum("js,jsa,isa->ij", tree.visits(pi) * tree.discount(gamma), pi.exp(), A)
        error = eta[:, None] + gain - eta[None, :]
        what = f"gamma {gamma}: both sides, largest difference over {error.numel()} pairs"
        lines.append(Line(what, largest(error), most=1e-10))
    lines.append(Line("the same with the states of pi (that is L)", _gap(tree, pi), least=1e-2))
    return lines


def _gap(tree: Tree, pi: Tensor) -> float:
    L = torch.einsum("is,jsa,isa->ij", tree.visits(pi), pi.exp(), tree.advantages(pi))
    return largest(tree.eta(pi)[:, None] + L - tree.eta(pi)[None, :])


def statement_3(tree: Tree) -> list[Line]:
    """L_pi takes its states from pi: same value and gradient as eta at pi, error O(step^2).

    Source: Schulman et al. (2015), arXiv:1502.05477, section 2; Kakade and Langford (2002).
    """
    tree.draw(3)
    theta, pi = tree.policy.parameters, tree.table()
    old = pi.detach()
    d, A, eta = tree.visits(old), tree.advantages(old), float(tree.eta(old))
    g_L = theta.gradient(tree.gain(d, pi, A), retain=True)
    g_eta = theta.gradient(tree.eta(pi))
    x = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tables = at_steps(tree, x / x.norm(), [0.02 / 2**k for k in range(5)])
    gaps = [float(tree.eta(new)) - eta - float(tree.gain(d, new, A)) for new in tables]
    fall = orders(gaps)
    return [
        Line("L(pi) - eta(pi)", float(tree.gain(d, old, A)), -1e-12, 1e-12),
        Line("|grad L - grad eta| / |grad eta|", relative(g_L, g_eta), most=1e-10),
        Line("order of eta - L in the step, from halvings: smallest", min(fall), 1.9),
        Line("order of eta - L in the step, from halvings: largest", max(fall), most=2.1),
    ]


def penalty(A: Tensor, *, gamma: float, horizon: float) -> Tensor:
    """Return C of  eta(pi') >= L_pi(pi') - C max_s KL(pi ‖ pi'),  for A = A_pi (..., S, V).

    With a = max_s TV(pi, pi') and e = max |A_pi|: the two policies can be coupled so that up to
    step t they have chosen alike with probability >= (1 - a)^t; the mean advantage of pi' in a
    state, sum_a (pi' - pi) A, is at most 2 a e in size; so at step t the mean over the states of
    pi' and that over the states of pi differ by at most 2 (1 - (1 - a)^t) 2 a e <= 4 t a^2 e.
    Summed with gamma^t over t < T, and a^2 <= KL / 2 (Pinsker):

        C = 2 e sum_{t<T} t gamma^t       = T (T - 1) e          for gamma = 1
                                          -> 2 e gamma / (1 - gamma)^2   for T -> infinity

    The last is half of the C of the paper's Theorem 1, which uses a^2 <= KL.

    Source: the coupling argument of Schulman et al. (2015), arXiv:1502.05477, Appendix A, with
    the geometric series cut at the horizon.
    """
    e = A.abs().amax((-1, -2))
    if math.isinf(horizon):
        return 4 * e * gamma / (1 - gamma) ** 2  # Theorem 1 as it stands in the paper
    return 2 * e * sum(t * gamma**t for t in range(int(horizon)))


def statement_4(tree: Tree) -> list[Line]:
    """eta(pi') >= L_pi(pi') - C max_s KL(pi ‖ pi').

    Source: Schulman et al. (2015), arXiv:1502.05477, Theorem 1; `penalty` for the finite horizon.
    """
    pi, T, lines = many_policies(tree), tree.mask.shape[1], []
    other = ~torch.eye(len(pi), dtype=torch.bool)
    worst_kl = torch.stack([categorical_kl(old=p, new=pi).amax(-1) for p in pi])
    a = torch.stack([0.5 * (p.exp() - pi.exp()).abs().sum(-1).amax(-1) for p in pi])
    for gamma in (1.0, 0.9):
        eta, A = tree.eta(pi, gamma), tree.advantages(pi, gamma)
        states = tree.visits(pi) * tree.discount(gamma)
        L = eta[:, None] + torch.einsum("is,jsa,isa->ij", states, pi.exp(), A)
        short = (L - eta[None, :])[other]  # how far eta(pi') falls short of L
        series = sum(gamma**t * (1 - (1 - a) ** t) for t in range(T))
        coupling = (4 * A.abs().amax((-1, -2))[:, None] * a * series)[other]
        C = penalty(A, gamma=gamma, horizon=T)[:, None]
        bound = (C * worst_kl)[other]
        lines += [
            Line(f"gamma {gamma}: pairs of {len(short)} with eta(pi') < L - C max KL",
                 float((short > bound + 1e-12).sum()), most=0),
            Line(f"gamma {gamma}: pairs that break the coupling bound before Pinsker",
                 float((short > coupling + 1e-12).sum()), most=0),
            Line(f"gamma {gamma}: pairs with eta(pi') < L (so the penalty is needed)",
                 float((short > 0).sum()), least=100),
            Line(f"gamma {gamma}: looseness: largest (L - eta) / (C max KL)",
                 float((short / bound).max()), most=1),
            Line(f"gamma {gamma}: looseness: median of (C max KL) / |L - eta|",
                 float((bound / short.abs()).median())),
        ]  # fmt: skip
    C = penalty(tree.advantages(pi, 0.9), gamma=0.9, horizon=math.inf)[:, None]
    return [
        *lines,
        Line("gamma 0.9: pairs that break Theorem 1 with the paper's own C",
             float((short > (C * worst_kl)[other]).sum()), most=0),
        Line("gamma 1: largest (L - eta) / (C max KL) that 100 steps of ascent can find",
             tightest_pair(tree), 0.0, 1.0),
    ]  # fmt: skip


def tightest_pair(tree: Tree) -> float:
    """Look for a pair that needs the penalty: ascend (L - eta) / (C max KL) in theta'."""
    tree.draw(4)
    old, best = tree.table().detach(), 0.0
    d, A, eta = tree.visits(old), tree.advantages(old), float(tree.eta(old))
    C = float(penalty(A, gamma=1.0, horizon=tree.mask.shape[1]))
    adam = torch.optim.Adam(tree.policy.parameters.tensors, lr=0.02, maximize=True)
    tree.draw(5)
    for _ in range(100):
        new = tree.table()
        share = eta + tree.gain(d, new, A) - tree.eta(new)
        share = share / (C * categorical_kl(old=old, new=new).max())
        best = max(best, float(share.detach()))
        adam.zero_grad()
        share.backward()
        adam.step()
    for p in tree.policy.parameters.tensors:
        p.grad = None
    return best


def statement_5(tree: Tree) -> list[Line]:
    """L_pi(pi') = eta(pi) + E_pi[ sum_t pi'/pi A ]: samples of pi, error sigma / sqrt(N); Q for A.

    Source: Schulman et al. (2015), arXiv:1502.05477, section 5.
    """
    tree.draw(6)
    theta, old = tree.policy.parameters, tree.table().detach()
    snapshot = theta.snapshot()
    rollout = tree.mdp.rollout(tree.policy, tree.prompts, completions_per_prompt=2048, seed=(5,))
    batch = Batch.from_rollout(tree.policy, rollout)
    index = {c: y for y, c in enumerate(tree.completions)}
    rows = zip(rollout.groups.tolist(), map(tuple, rollout.completion_ids), strict=True)
    drawn = torch.tensor([index[row] for row in rows])
    y, A, d = tree.completion_logprobs(old).exp(), tree.advantages(old), tree.visits(old)
    counts = torch.bincount(drawn, minlength=len(y))
    chi = float(((counts - len(drawn) * y) ** 2 / (len(drawn) * y)).sum())
    freedom = len(y) - len(tree.prompts)
    sampled_A = A.flatten()[tree.steps[drawn]] * tree.mask[drawn]
    objective = BatchObjective(tree.policy, batch, sampled_A, alone)

    x = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (new,) = at_steps(tree, x, [0.2])
    ratio_A = ((new - old).exp() * A).flatten()[tree.steps] * tree.mask
    each = ratio_A.sum(-1)  # sum_t pi'/pi A of one completion
    exact = float(tree.gain(d, new, A))
    sigma = float((y @ (each - exact) ** 2).sqrt())
    theta.assign(snapshot, x, 0.2)
    estimate = objective.measure().gain
    theta.restore(snapshot)
    # `measure` reports L(pi') - L(pi) on the batch: the same samples estimate both.
    difference = ((new - old).expm1() * A).flatten()[tree.steps] * tree.mask
    spread = float((y @ (difference.sum(-1) - exact) ** 2).sqrt()) / math.sqrt(len(drawn))
    g = torch.Generator().manual_seed(0)
    scaled = []
    for n in (64, 256, 1024):
        picks = torch.multinomial(y, 1000 * n, replacement=True, generator=g).view(1000, n)
        error = each[picks].mean(-1) - exact
        scaled.append(float(error.square().mean().sqrt()) * math.sqrt(n) / sigma)
    pi = tree.table()
    gradient_A = theta.gradient(tree.gain(d, pi, A), retain=True)
    gradient_Q = theta.gradient(tree.gain(d, pi, tree.values(old)[0]))
    return [
        Line("E_pi[ratio A] - sum_s d(s) sum_a pi' A, enumerated", float(y @ each) - exact,
             -1e-12, 1e-12),
        *(Line(f"root mean square error x sqrt(N) / sigma, N = {n}", value, 0.93, 1.07)
          for n, value in zip((64, 256, 1024), scaled, strict=True)),
        Line(f"TokenMDP.rollout, {len(drawn)} completions: (chi^2 - {freedom}) / sqrt(2 {freedom})",
             (chi - freedom) / math.sqrt(2 * freedom), -4, 4),
        Line("objective.measure on it: (gain - enumerated) / standard error",
             (estimate - exact) / spread, -4, 4),
        Line("|grad with Q - grad with A| / |grad|", relative(gradient_Q, gradient_A), most=1e-10),
    ]  # fmt: skip


def statement_10(tree: Tree) -> list[Line]:
    """sum_t E[KL(s_t)] is the KL of whole completions; grad R has two parts and needs both.

    Source: the chain rule of relative entropy; Amini, Vieira and Cotterell (2025),
    arXiv:2504.10637, for the gradient.
    """
    pi = many_policies(tree, 16)
    y = tree.completion_logprobs(pi)
    whole = torch.einsum("iy,ijy->ij", y.exp(), y[:, None] - y[None, :])
    per_state = categorical_kl(old=pi[:, None], new=pi[None, :])
    chained = torch.einsum("is,ijs->ij", tree.visits(pi), per_state)
    stranger = torch.einsum("js,ijs->ij", tree.visits(pi), per_state)

    tree.draw(10)
    theta, table = tree.policy.parameters, tree.table()
    d = tree.visits(table.detach())
    whole_gradient = theta.gradient(tree.reference_kl(table), retain=True)
    first = theta.gradient(d @ categorical_kl(old=table, new=tree.reference), retain=True)
    # E[ sum_t grad log pi(a_t|s_t) sum_{t'>t} KL_t' ], enumerated over completions
    kl = categorical_kl(old=table, new=tree.reference).detach()[tree.steps // tree.V] * tree.mask
    after = kl.flip(-1).cumsum(-1).flip(-1) - kl
    log_pi = table.flatten()[tree.steps] * tree.mask
    weight = tree.completion_logprobs(table.detach()).exp()
    second = theta.gradient((weight[:, None] * log_pi * after).sum())

    exact = build(uniform=True)
    objective, u = whole_number_objective(exact), exact.policy.parameters
    N = int(objective.N)
    g, b = (half.sum(0) / N for half in objective.gradients(reference=True))
    pi_u = exact.table()
    g_exact = u.gradient(exact.eta(pi_u), retain=True)
    b_exact = u.gradient(exact.reference_kl(pi_u))
    with torch.no_grad():
        old = exact.table()
        d_u, A_u = exact.visits(old), exact.advantages(old)
        exact.draw(10)
        new = exact.table()
        seen = objective.measure()
    D_u = float(d_u @ categorical_kl(old=old, new=new))
    return [
        Line(f"per-state sum - KL of completions, largest of {whole.numel()} pairs",
             largest(chained - whole), most=1e-12),
        Line("the same sum over the states of the other policy: differs by",
             largest(stranger - whole), least=1e-2),
        Line("grad R: |both parts - enumerated| / |enumerated|",
             relative(first + second, whole_gradient), most=1e-10),
        Line("grad R: |first part - enumerated| / |enumerated|",
             relative(first, whole_gradient), least=0.05),
        Line(f"objective.gradients on a batch that is pi ({N} rows): relative error of g",
             relative(g, g_exact), most=1e-10),
        Line("objective.gradients on it: relative error of b = grad R", relative(b, b_exact),
             most=1e-10),
        Line("objective.measure on it: R(theta) - enumerated, far from theta_old",
             seen.ref_kl - float(exact.reference_kl(new)), -1e-12, 1e-12),
        Line("objective.measure on it: D - enumerated", seen.kl - D_u, -1e-12, 1e-12),
        Line("objective.measure on it: gain - enumerated",
             seen.gain - float(exact.gain(d_u, new, A_u)), -1e-12, 1e-12),
    ]  # fmt: skip


def statement_11(tree: Tree) -> list[Line]:
    """The critic sets the variance; with lambda = 1 it cannot touch the mean.

    A completion's gradient less its mean is a sum of martingale differences, one for each action:
    X(s, a) = A(s, a) (z(s, a) + lambda e(s)) + H(s') - H(s) with the exact V, where z is grad log
    pi(a|s), e(s) the trace of z before s, decayed by lambda, and H(s) the gradient still to come.
    Hence its variance, state by state. An error eps(s) of the critic takes eps z from each.

    Source: generalised advantages, Schulman et al. (2016), arXiv:1506.02438; baselines and
    variance, Greensmith, Bartlett and Baxter (2004), JMLR 5.
    """
    tree.draw(11)
    theta, table = tree.policy.parameters, tree.table()
    z = torch.stack([theta.gradient(x, retain=True) for x in table.flatten()])  # (S V, M)
    pi = table.detach()
    p, V, mask = pi.exp(), tree.V, tree.mask
    y, d = tree.completion_logprobs(pi).exp(), tree.visits(pi)
    g = theta.gradient(tree.eta(table))
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    rewards[torch.arange(len(y)), tree.lengths - 1] = tree.scores
    _, exact = tree.values(pi)
    A = tree.advantages(pi).flatten()
    # s' of every (s, a) that does not end, and what lies behind and before each state
    on = mask[:, 1:]
    child = torch.full((len(z),), -1)
    child[tree.steps[:, :-1][on]] = tree.steps[:, 1:][on] // V
    H = torch.zeros(len(exact), len(theta), dtype=torch.float64)
    ahead = torch.zeros_like(z)
    for s in reversed(range(len(exact))):  # breadth first: children stand behind their parents
        a = slice(s * V, s * V + V)
        ahead[a] = torch.where((child[a] >= 0)[:, None], H[child[a]], 0.0)
        H[s] = p[s] @ (A[a, None] * z[a] + ahead[a])

    def trace(lam: float) -> Tensor:
        e = torch.zeros_like(H)
        for i in (child >= 0).nonzero()[:, 0].tolist():
            e[child[i]] = z[i] + lam * e[i // V]
        return e.repeat_interleave(V, 0)

    def sampled(values: Tensor, lam: float) -> Tensor:
        """Gradients of single completions from the package's GAE, (Y, M)."""
        advantages = gae(rewards, values[tree.steps // V], mask, gamma=1.0, lam=lam)
        return torch.einsum("yt,ytm->ym", advantages * mask, z[tree.steps])

    def variance(G: Tensor) -> float:
        return float(y @ (G - y @ G).square().sum(-1))

    first = tree.time == 0
    apart = float(d[first] @ (H[first] - g).square().sum(-1))  # from prompt to prompt

    def predicted(lam: float, eps: Tensor) -> float:
        X = A[:, None] * (z + lam * trace(lam)) + ahead - H.repeat_interleave(V, 0)
        X = X - eps.repeat_interleave(V)[:, None] * z
        return apart + float((d[:, None] * p).flatten() @ X.square().sum(-1))

    none, eps = torch.zeros_like(exact), torch.linspace(-1, 1, len(exact), dtype=exact.dtype)
    lines = []
    for lam in (0.0, 0.5, 1.0):
        G = sampled(exact, lam)
        lines += [
            Line(f"exact V, lambda {lam}: |mean - grad eta| / |grad eta|", relative(y @ G, g),
                 most=1e-10),
            Line(f"exact V, lambda {lam}: variance / theory - 1",
                 variance(G) / predicted(lam, none) - 1, -1e-10, 1e-10),
        ]  # fmt: skip
    wrong, blind = sampled(exact + eps, 1.0), sampled(none, 1.0)
    ahead_eps = torch.where(child >= 0, eps[child], 0.0)[tree.steps] * mask  # eps(s_t+1)
    later, decayed = torch.zeros_like(ahead_eps), torch.zeros(len(y), dtype=torch.float64)
    for t in reversed(range(later.shape[1])):  # sum_k>=1 lambda^(k-1) eps(s_t+k)
        decayed = ahead_eps[:, t] + 0.5 * decayed
        later[:, t] = decayed
    bias = y @ torch.einsum("yt,ytm->ym", 0.5 * later * mask, z[tree.steps])
    return [
        *lines,
        Line("wrong V, lambda 1: |mean - grad eta| / |grad eta|", relative(y @ wrong, g),
             most=1e-10),
        Line("wrong V, lambda 1: variance / theory - 1",
             variance(wrong) / predicted(1.0, eps) - 1, -1e-10, 1e-10),
        Line("no critic, lambda 1: variance / theory - 1",
             variance(blind) / predicted(1.0, -exact) - 1, -1e-10, 1e-10),
        Line("wrong V, lambda 1: its variance as a multiple of the exact V's",
             variance(wrong) / variance(sampled(exact, 1.0)), least=1.05),
        Line("wrong V, lambda 0.5: |bias - theory| / |theory|",
             relative(y @ sampled(exact + eps, 0.5) - g, bias), most=1e-10),
        Line("wrong V, lambda 0.5: |bias| / |grad eta|", float(bias.norm() / g.norm()),
             least=1e-2),
    ]  # fmt: skip
