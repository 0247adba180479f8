"""Statements 6 to 9: the quadratic models, the step in closed form, and where updates lead."""

import math
from dataclasses import dataclass

import torch
from statements.enumerable import (
    Line,
    Tree,
    at_steps,
    build,
    exact_fisher,
    exact_update,
    largest,
    orders,
    relative,
    whole_number_objective,
)
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from trpo_lm.config import TRPOSettings
from trpo_lm.core.conjugate_gradient import conjugate_gradient
from trpo_lm.core.divergences import categorical_kl
from trpo_lm.core.fisher import hessian_operator, twice_differentiable
from trpo_lm.core.natural_step import trust_region_step
from trpo_lm.core.trust_region import plane_step


def statement_6(tree: Tree) -> list[Line]:
    """L = g.x + O(x^2) and D = 1/2 x.Fx + O(x^3), F from the package's products.

    Source: Schulman et al. (2015), arXiv:1502.05477, section 6 and Appendix C.
    """
    tree.draw(6)
    theta, pi = tree.policy.parameters, tree.table()
    old = pi.detach()
    d, A, F = tree.visits(old), tree.advantages(old), exact_fisher(tree)
    g = theta.gradient(tree.gain(d, pi, A))
    x = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    x /= x.norm()
    sizes = [0.08 / 2**k for k in range(5)]
    first, second, mixed = [], [], []
    with twice_differentiable():
        D = d @ categorical_kl(old=old, new=tree.table())
    slope, Fx, Hx = theta.gradient(D, retain=True), F(x), hessian_operator(theta, D)(x)
    for h, new in zip(sizes, at_steps(tree, x, sizes), strict=True):
        kl = float(d @ categorical_kl(old=old, new=new))
        first.append(float(tree.gain(d, new, A)) - h * float(g @ x))
        second.append(kl - h * h / 2 * float(x @ Fx))
        mixed.append(kl)
    return [
        Line("L - g.x: order in the step, from the last halving", orders(first)[-1], 1.9, 2.1),
        Line("D itself: order", orders(mixed)[-1], 1.9, 2.1),
        Line("D - 1/2 x.Fx: order", orders(second)[-1], 2.8, 3.2),
        Line("|grad D| at theta_old", float(slope.norm()), most=1e-12),
        Line("|F x - (Hessian of D) x| / |F x|", relative(Fx, Hx), most=1e-10),
        Line("objective.fisher on a batch that is pi: relative error of F x", _multiset_fisher(),
             most=1e-10),
    ]  # fmt: skip


def _multiset_fisher() -> float:
    tree = build(uniform=True)
    objective = whole_number_objective(tree)
    x = torch.randn(len(tree.policy.parameters), dtype=torch.float64)
    F = objective.fisher(int(objective.N))
    return relative(F(x), exact_fisher(tree)(x))


def statement_7(tree: Tree) -> list[Line]:
    """x = sqrt(2 delta / g.F^-1 g) F^-1 g; two balls: the point of both farthest along v = F^-1 g.

    Source: Schulman et al. (2015), arXiv:1502.05477, Appendix C; the second ball is this project's.
    """
    tree.draw(7)
    theta, pi, delta = tree.policy.parameters, tree.table(), 0.01
    old = pi.detach()
    g = theta.gradient(tree.gain(tree.visits(old), pi, tree.advantages(old)), retain=True)
    b = theta.gradient(tree.reference_kl(pi))
    F = exact_fisher(tree)
    dense = torch.stack([F(e) for e in torch.eye(len(theta), dtype=torch.float64)])
    v, w = (torch.linalg.lstsq(dense, c, driver="gelsd", rcond=1e-12).solution for c in (g, b))
    x = math.sqrt(2 * delta / float(g @ v)) * v
    step = plane_step((v @ dense @ v).view(1, 1), (g @ v).view(1), None, delta=delta)
    damped = conjugate_gradient(F, g, max_iterations=400, rtol=1e-12, damping=1e-2)
    shift = 1e-2 * float(g @ dense @ g / (g @ g))
    shifted = torch.linalg.solve(dense + shift * torch.eye(len(theta)), g)
    lines = [
        Line(f"F is symmetric: |F - F^T| / |F|, {len(theta)} parameters",
             relative(dense.T, dense), most=1e-10),
        Line("F is positive: least eigenvalue / largest",
             float(torch.linalg.eigvalsh(dense)[0] / torch.linalg.matrix_norm(dense, 2)), -1e-12),
        Line(f"CG, {damped.iterations} products, against a dense solve of F + shift",
             relative(damped.x, shifted), most=1e-6),
        Line("the step against the closed form by dense F^-1",
             relative(step.multipliers[0] * v, x), most=1e-10),
        Line("1/2 x.Fx / delta", float(x @ F(x)) / 2 / delta, 1 - 1e-8, 1 + 1e-8),
    ]  # fmt: skip
    plane = torch.stack([v, w])
    gram, s = plane @ dense @ plane.T, float(w @ dense @ w)
    cases = {
        "old": (0.01, -0.5),
        "both": (0.01, -0.002),
        "ref": (s, 0.45 * s),
        "recover": (0.01, s),
    }
    for name, (radius, excess) in cases.items():
        found = two_balls(gram, plane @ g, plane @ b, radius, excess)
        right = found.case == name and found.feasible
        lines += [
            Line(f"two balls on the LM, '{name}': brute force in the plane - step, share",
                 found.gap if right else math.inf, -1e-3, 1e-3),
            *([Line(f"two balls on the LM, '{name}': most that any x can gain / step's gain",
                    found.bound, 1 - 1e-6, 1 + 2e-3)] if name != "recover" else []),
        ]  # fmt: skip
    return lines


@dataclass(frozen=True)
class BruteForce:
    """How `plane_step` compares: its case, whether it keeps the limits, and what it leaves."""

    case: str
    feasible: bool
    gap: float  # (best point found - step) / scale of the problem
    bound: float  # dual bound / gain of the step


def two_balls(gram: Tensor, g: Tensor, b: Tensor, delta: float, excess: float) -> BruteForce:
    """Compare `plane_step` with a search that knows only the problem.

    Maximise g.c over c with 1/2 c.Gc <= delta and excess + b.c + 1/2 c.Gc <= 0; where there is no
    such c, minimise b.c + 1/2 c.Gc in the first ball. Points are thrown at the plane ever nearer to
    the best one so far. The bound holds outside the plane too: for any prices l, m >= 0 no x in R^M
    gains more than |v - m w|^2 / (2 (l + m)) + l delta - m excess (Lagrange); least of a grid.
    """
    step = plane_step(gram, g, b, delta=delta, excess=excess)
    root = torch.linalg.cholesky(gram)
    generator = torch.Generator().manual_seed(0)

    def models(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = 0.5 * ((points @ gram) * points).sum(-1)
        return points @ g, half, excess + points @ b + half

    centre, size, mend = torch.zeros(2, dtype=torch.float64), math.sqrt(2 * delta), False
    for attempt in range(45):
        z = torch.randn(1000, 2, dtype=torch.float64, generator=generator)
        points = torch.cat([centre[None], centre + size * torch.linalg.solve(root.T, z.T).T])
        gain, old, ref = models(points)
        inside = old <= delta
        if attempt == 0:
            mend = not bool((inside & (ref <= 0)).any())
        good = inside if mend else inside & (ref <= 0)
        centre = points[(-ref if mend else gain).masked_fill(~good, -math.inf).argmax()]
        size *= 0.7
    gain, old, ref = (
        float(m) for m in models(torch.tensor([step.multipliers], dtype=torch.float64))
    )
    best_gain, _, best_ref = (float(m) for m in models(centre[None]))
    q, r, s = (float(m) for m in (gram[0, 0], gram[0, 1], gram[1, 1]))
    low, high = math.log10(math.sqrt(q / delta)) - 4, math.log10(math.sqrt(q / delta)) + 3
    grid = torch.cat([torch.zeros(1), torch.logspace(low, high, 400)]).double()
    old_price, ref_price = grid[1:, None], grid[None, :]
    bound = (q - 2 * ref_price * r + ref_price**2 * s) / (2 * (old_price + ref_price))
    bound = float((bound + old_price * delta - ref_price * excess).min())
    return BruteForce(
        case=step.case,
        feasible=old <= delta * (1 + 1e-9) and (mend or ref <= 1e-9 * max(1.0, abs(excess))),
        gap=(ref - best_ref) / abs(best_ref) if mend else (best_gain - gain) / math.sqrt(delta * q),
        bound=bound / gain if gain else math.inf,
    )


def ascend(tree: Tree, runs: list[tuple[list[Tensor], float]], updates: int) -> Tensor:
    """Return eta along vanilla policy gradient, theta += rate * grad eta, (runs, 1 + updates).

    Each run is a start and a fixed rate; the transformer is vectorised over all of them.
    """

    class Eta(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tree.policy.model

        def forward(self) -> Tensor:
            return tree.eta(tree.table())

    names = [f"model.{n}" for n, p in tree.policy.model.named_parameters() if p.requires_grad]
    module = Eta()

    def eta(parameters: list[Tensor]) -> Tensor:
        return functional_call(module, dict(zip(names, parameters, strict=True)), ())

    step = vmap(grad_and_value(eta))
    theta = [torch.stack(tensors) for tensors in zip(*(start for start, _ in runs), strict=True)]
    rate = torch.tensor([rate for _, rate in runs], dtype=torch.float64).view(-1, 1, 1)
    curve = []
    for _ in range(updates + 1):
        with twice_differentiable():  # the attention kernel that vmap can batch
            slopes, value = step(theta)
        curve.append(value)
        theta = [p + rate * g for p, g in zip(theta, slopes, strict=True)]
    return torch.stack(curve, dim=-1)


@dataclass(frozen=True)
class Run:
    """A run of exact TRPO: eta before every update, and the largest KL of an accepted one."""

    eta: list[float]
    largest_kl: float

    def filled(self, updates: int) -> list[float]:
        """Return eta after 0, 1, ..., `updates` updates; a run that is over stays where it is."""
        return [*self.eta, *[self.eta[-1]] * (updates + 1)][: updates + 1]


def improve(tree: Tree, start: list[Tensor], settings: TRPOSettings, updates: int) -> Run:
    """Follow TRPO with exact quantities from a start.

    Where the line search refuses every trial theta is put back bit for bit, and with nothing
    sampled the next update would be the same again: the run is over.
    """
    tree.policy.parameters.restore(start)
    curve, largest_kl = [], 0.0
    for _ in range(updates + 1):
        eta, update = exact_update(tree, settings)
        curve.append(eta)
        if not update.search.accepted:
            break
        largest_kl = max(largest_kl, update.search.trial.kl)
    return Run(curve, largest_kl)


def random_starts(tree: Tree, count: int) -> list[list[Tensor]]:
    starts = []
    for seed in range(count):
        tree.draw(seed)
        starts.append(tree.policy.parameters.snapshot())
    return starts


def falls(curve: list[float] | Tensor) -> Tensor:
    """Return by how much eta fell in each update, 0 where it rose."""
    return (-torch.as_tensor(curve, dtype=torch.float64).diff(dim=-1)).clamp(min=0)


def rescaled(start: list[Tensor], c: float) -> list[Tensor]:
    """Return LoRA factors A / c and c B: the same policy, worse coordinates (rank 1)."""
    return [c * p if p.shape[1] == 1 else p / c for p in start]


def natural_direction(tree: Tree, start: list[Tensor]) -> Tensor:
    """Return the change of the logits along the undamped step, per unit of its length."""
    theta = tree.policy.parameters
    theta.restore(start)
    pi = tree.table()
    old = pi.detach()
    g = theta.gradient(tree.gain(tree.visits(old), pi, tree.advantages(old)))
    F = exact_fisher(tree)
    dense = torch.stack([F(e) for e in torch.eye(len(theta), dtype=torch.float64)])
    v = torch.linalg.lstsq(dense, g, driver="gelsd", rcond=1e-13).solution
    h = 1e-7 / math.sqrt(float(g @ v))
    ahead, behind = at_steps(tree, v, [h, -h])
    return ahead - behind


def statement_8(tree: Tree, starts: int = 20) -> list[Line]:
    """TRPO improves; vanilla policy gradient falls, or crawls; a clipped ratio bounds no KL.

    That eta never falls is no theorem at a radius of 0.05: the theorem asks for the penalty of
    statement 4. The line search sees L, not eta, and the second MDP below shows the difference.

    Source: Schulman et al. (2015), arXiv:1502.05477; Kakade (2001), A natural policy gradient;
    Schulman et al. (2017), arXiv:1707.06347, for the clipped objective.
    """
    points = random_starts(tree, starts)
    settings = TRPOSettings(max_kl=0.05, max_ref_kl=None, cg_iterations=4, damping=0.1)
    trpo = [improve(tree, start, settings, 200) for start in points]
    worst = max(float(falls(run.eta).max()) for run in trpo)
    rates = [2.0**k for k in range(-6, 0)]
    few, hard = points[:3], [rescaled(start, 10.0) for start in points[:2]]
    hard_rates = [2.0**k for k in range(-9, -1)]
    runs = [(p, r) for r in rates for p in few] + [(p, r) for r in hard_rates for p in hard]
    tuned = ascend(tree, runs, 200)
    slow = tuned[len(rates) * len(few) :].view(len(hard_rates), len(hard), -1).mean(1)
    tuned = tuned[: len(rates) * len(few)].view(len(rates), len(few), -1)
    best, best_hard = int(tuned[:, :, -1].mean(-1).argmax()), int(slow[:, -1].argmax())
    rest = points[len(few) : 10]
    vanilla = [tuned[best], ascend(tree, [(p, rates[best]) for p in rest], 200)] if rest else tuned
    vanilla = torch.cat(vanilla) if rest else tuned[best]
    reached = torch.tensor([run.filled(200) for run in trpo]).mean(0)
    updates = sum(len(run.eta) - 1 for run in trpo)
    lines = [
        Line(f"TRPO: largest fall of eta in an update, {updates} from {starts} starts", worst,
             most=1e-12),
        Line("TRPO: largest KL of an update / 0.05", max(run.largest_kl for run in trpo) / 0.05,
             0.5, 1.0),
        Line("TRPO: mean eta at the start", float(reached[0])),
        Line("TRPO: mean eta after 10 updates", float(reached[10])),
        Line("TRPO: mean eta after 200 updates", float(reached[-1]), least=float(reached[0]) + 0.5),
        Line(f"vanilla, best of {len(rates)} fixed rates: the rate", rates[best],
             2 * rates[0], rates[-1] / 2),
        Line("vanilla: mean eta after 10 updates", float(vanilla[:, 10].mean())),
        Line("vanilla: mean eta after 200 updates", float(vanilla[:, -1].mean())),
        Line(f"vanilla: starts of {len(vanilla)} with a fall of more than 0.01",
             float((falls(vanilla) > 0.01).any(-1).sum()), least=0.2 * len(vanilla)),
        Line("vanilla: largest fall of eta in an update", float(falls(vanilla).max()), least=0.1),
    ]  # fmt: skip
    level = float(slow[best_hard, -1])
    settings = TRPOSettings(max_kl=0.05, max_ref_kl=None, cg_iterations=25, damping=1e-3)
    natural = [improve(tree, start, settings, 10) for start in hard]
    natural = torch.tensor([run.filled(10) for run in natural]).mean(0)
    turn = natural_direction(tree, rescaled(points[0], 3.0))
    straight = natural_direction(tree, points[0])
    over = [c for c in range(11) if float(natural[c]) >= level]
    lines += [
        Line(f"ill-conditioned (A / 10, 10 B): vanilla, best of {len(hard_rates)} rates: the rate",
             hard_rates[best_hard], 2 * hard_rates[0], hard_rates[-1] / 2),
        Line("ill-conditioned: vanilla, mean eta after 200 updates", level),
        Line("ill-conditioned: updates in which TRPO gets there",
             float(over[0]) if over else math.inf, most=50),
        Line("undamped step on (A / 3, 3 B) against (A, B): change of log pi",
             relative(turn, straight), most=1e-4),
    ]  # fmt: skip
    return lines + clipping(tree) + rises_are_no_theorem()


def clipping(tree: Tree, *, epsilon: float = 0.2, max_kl: float = 0.05) -> list[Line]:
    """Take 16 Adam steps on PPO's clipped objective, exact gradients, and see how far they go."""
    tree.draw(3)
    theta, old = tree.policy.parameters, tree.table().detach()
    d, A = tree.visits(old), tree.advantages(old)
    here = d[:, None] * old.exp()
    A = A / ((here * A**2).sum() / d.sum()).sqrt()

    def clipped(new: Tensor) -> Tensor:
        ratio = (new - old).exp()
        return (here * torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)).sum()

    adam = torch.optim.Adam(theta.tensors, lr=0.1, maximize=True)
    for _ in range(16):
        adam.zero_grad()
        clipped(tree.table()).backward()
        adam.step()
    new = tree.table().detach()
    for p in theta.tensors:
        p.grad = None
    kl = categorical_kl(old=old, new=new)
    return [
        Line("PPO, clip 0.2, 16 Adam steps: KL(old ‖ new) / 0.05", float(d @ kl) / max_kl, 5),
        Line("PPO: largest KL of a state / 0.05", float(kl.max()) / max_kl, 20),
    ]  # fmt: skip


def rises_are_no_theorem() -> list[Line]:
    """Show an MDP in which the line search on L lets eta fall, and that a small radius mends it."""
    tree = build(steps=3, score=lambda text: text.count("ab") + 0.1 * text.count("c"))
    tree.draw(2)
    start, worst = tree.policy.parameters.snapshot(), []
    for radius in (1.0, 0.01):
        settings = TRPOSettings(max_kl=radius, max_ref_kl=None, cg_iterations=4, damping=0.1)
        worst.append(float(falls(improve(tree, start, settings, 40).eta).max()))
    return [
        Line("score 'ab', max_kl 1: largest fall of eta (L rose)", worst[0], least=1e-3),
        Line("score 'ab', max_kl 0.01: largest fall of eta", worst[1], most=1e-12),
    ]


def tilted(tree: Tree, budget: float) -> tuple[float, Tensor]:
    """Return beta and log of pi_ref exp(score / beta) / Z, (Y,), whose KL to pi_ref is `budget`."""
    reference = tree.completion_logprobs(tree.reference)
    prompt = torch.tensor([i for i, _ in tree.completions])

    def at(beta: float) -> tuple[float, Tensor]:
        new = reference + tree.scores / beta
        for i in range(len(tree.prompts)):
            new[prompt == i] -= new[prompt == i].logsumexp(0) + math.log(len(tree.prompts))
        return float(new.exp() @ (new - reference)), new

    low, high = 1e-3, 1e3
    for _ in range(100):  # the KL falls as beta rises
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle)[0] > budget else (low, middle)
    return high, at(high)[1]


def statement_9(updates: int = 25, budget: float = 0.3) -> list[Line]:
    """Under a budget K, TRPO ends at pi_ref exp(score / beta) / Z with KL(. ‖ pi_ref) = K.

    For every pi:  score(pi*) - score(pi) = beta (KL(pi ‖ pi*) + K - KL(pi ‖ pi_ref)), so the
    distance to pi* and the score that is missing are one number.

    Source: Korbak, Perez and Buckley (2022), arXiv:2205.11275, for the tilted optimum.
    """
    tree = build(steps=3, rank=4, width=16)
    beta, optimum = tilted(tree, budget)
    settings = TRPOSettings(
        max_kl=0.2, max_ref_kl=budget, cg_iterations=30, cg_tolerance=1e-8, damping=1e-3,
        line_search_trials=20,
    )  # fmt: skip
    pi = tree.table().detach()
    reached = [tree.completion_logprobs(pi)]
    over = 0.0
    for _ in range(updates):
        _, update = exact_update(tree, settings)
        pi = tree.table().detach()
        over = max(over, float(tree.reference_kl(pi)) - budget)
        if not update.search.accepted:
            break
    reached.append(tree.completion_logprobs(pi))
    far, near = (float(y.exp() @ (y - optimum)) for y in reached)
    R, score = float(tree.reference_kl(pi)), float(tree.eta(pi))
    missing = float(optimum.exp() @ tree.scores) - score
    kl, exact_gap = _tabular_budget(tree, optimum, budget)
    return [
        Line("R - K, largest over the run", over, most=1e-12),
        Line("KL(pi_ref ‖ optimum), where it starts", far),
        Line(f"LM with LoRA, {updates} updates: KL(pi ‖ optimum)", near, most=1e-3),
        Line("LM: largest difference of a completion's probability",
             largest(reached[1].exp() - optimum.exp()), most=2e-3),
        Line("LM: score missing, as a share of what the budget can buy",
             missing / (float(optimum.exp() @ tree.scores) - float(tree.eta(tree.reference))),
             0.0, 1e-3),
        Line("LM: score missing - beta (KL(pi ‖ optimum) + K - R)",
             missing - beta * (near + budget - R), -1e-8, 1e-8),
        Line("LM: cosine of v and w in the last update", update.step.alignment, 0.999),
        Line("one logit for each state and word, trust_region_step: KL(pi ‖ optimum)", kl,
             most=1e-7),
        Line("one logit for each: |R - K|", exact_gap, most=1e-7),
    ]  # fmt: skip


def _tabular_budget(tree: Tree, optimum: Tensor, budget: float) -> tuple[float, float]:
    """Run `trust_region_step` on a table of logits; return KL(pi ‖ optimum) and |R - K|."""
    logits = tree.reference.clone().requires_grad_()
    settings = TRPOSettings(
        max_kl=0.2, max_ref_kl=budget, cg_iterations=100, cg_tolerance=1e-10, damping=0.0,
        line_search_trials=20,
    )  # fmt: skip
    for _ in range(25):
        old = logits.detach().log_softmax(-1)
        d, A = tree.visits(old), tree.advantages(old)
        trust_region_step(
            [logits],
            lambda d=d, A=A: tree.gain(d, logits.log_softmax(-1), A),
            lambda d=d, old=old: d @ categorical_kl(old=old, new=logits.log_softmax(-1)),
            lambda: tree.reference_kl(logits.log_softmax(-1)),
            settings,
        )
    pi = logits.detach().log_softmax(-1)
    y = tree.completion_logprobs(pi)
    return float(y.exp() @ (y - optimum)), abs(float(tree.reference_kl(pi)) - budget)
