"""A token MDP that can be written out: a tiny transformer, every state and every completion.

A GPT-2 of transformers' own class (one layer, eight channels, float64) with LoRA, four words and
three or four steps says a few hundred completions, so E[...] is a finite sum. `TokenMDP.step`
defines the MDP, `Policy` the probabilities; `Tree` adds up.

Letters: S states (prompt + unfinished prefix), V words, Y completions; pi is a table of
log-probabilities (..., S, V), where leading dimensions stand for several policies at once.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from trpo_lm.config import TRPOSettings
from trpo_lm.core.divergences import categorical_kl
from trpo_lm.core.fisher import FisherOperator, twice_differentiable
from trpo_lm.core.natural_step import Measurement, StepLimits, Update, constrained_update
from trpo_lm.lm.mdp import TokenMDP
from trpo_lm.lm.objective import BatchObjective, head_curvature
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.rewards import Rewards
from trpo_lm.lm.rollout import Batch


def alone(x: Tensor) -> Tensor:
    """Sum over the ranks of a run that has one."""
    return x


class Letters:
    """A tokenizer as small as they come: token 0 ends a text, 1, 2, 3 are 'a', 'b', 'c'."""

    pad_token_id = eos_token_id = bos_token_id = 0
    all_special_ids = (0,)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - ord("a") + 1 for c in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + i - 1) for i in ids if i or not skip_special_tokens)


class Tree:
    """A TokenMDP and its policy with every state and every completion written out.

    `TokenMDP.step` is walked from every prompt (all equally likely) until nothing is left to do.

    Attributes:
        time: Actions taken before each state, (S,).
        paths: 1 where a state is reached through (s, a), (S, S V): log d(s) = paths . log pi.
        choices: The same for completions, (Y, S V): log pi(y) = choices . log pi.
        steps: Flat index of the (s_t, a_t) of each completion, (Y, T); 0 off `mask`.
        scores: Score of each completion, (Y,).
    """

    def __init__(self, policy: Policy, mdp: TokenMDP, prompts: tuple[str, ...]):
        self.policy, self.mdp, self.prompts = policy, mdp, prompts
        V = self.V = policy.vocabulary_size
        self.states, self.completions, scores, steps, seen = [], [], [], [], []
        frontier = [(i, mdp.reset(p), []) for i, p in enumerate(prompts)]
        for i, state, path in frontier:  # grows while it is walked: breadth first
            s = len(self.states)
            self.states.append(state)
            seen.append((i, path))
            for a in range(V):
                after, score, terminated, truncated = mdp.step(state, a)
                if terminated or truncated:
                    self.completions.append((i, after.completion_ids))
                    scores.append(score)
                    steps.append([*path, s * V + a])
                else:
                    frontier.append((i, after, [*path, s * V + a]))
        S, Y, T = len(self.states), len(steps), max(map(len, steps))
        self.scores = torch.tensor(scores, dtype=torch.float64)
        self.time = torch.tensor([len(path) for _, path in seen])
        self.lengths = torch.tensor([len(path) for path in steps])
        self.mask = torch.arange(T)[None] < self.lengths[:, None]
        self.steps = torch.zeros(Y, T, dtype=torch.int64)
        self.steps[self.mask] = torch.tensor([flat for path in steps for flat in path])
        self.paths, self.choices = torch.zeros(2, max(S, Y), S * V, dtype=torch.float64)
        for s, (_, path) in enumerate(seen):
            self.paths[s, path] = 1.0
        for y, path in enumerate(steps):
            self.choices[y, path] = 1.0
        self.paths, self.choices = self.paths[:S], self.choices[:Y]
        rows = [[*s.prompt_ids, *s.completion_ids] for s in self.states]
        width = max(map(len, rows))
        self.input_ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
        self.attention = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        self.last = torch.zeros_like(self.attention, dtype=torch.bool)
        self.last[:, -1] = True
        with torch.no_grad(), policy.reference():
            self.reference = self.table()

    # ---- the policy as a table

    def features(self) -> Tensor:
        """Return the policy's features at every state, (S, D), with a graph to theta."""
        return self.policy.features(self.input_ids, self.attention, self.last)

    def table(self) -> Tensor:
        """Return log pi(a|s) of the transformer, (S, V), with a graph to theta."""
        return self.policy.logprobs(self.features())

    def draw(self, seed: int, scale: float = 0.4) -> None:
        """Put random numbers into LoRA, B and A alike."""
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in self.policy.parameters.tensors:
                p.copy_(scale * torch.randn_like(p))

    # ---- finite sums: what pi visits, earns and is worth

    def discount(self, gamma: float) -> Tensor:
        """Return gamma^t of every state, (S,)."""
        return torch.tensor(gamma, dtype=torch.float64) ** self.time

    def paid(self, gamma: float) -> Tensor:
        """Return the score of every completion, discounted to its beginning, (Y,)."""
        return self.scores * torch.tensor(gamma, dtype=torch.float64) ** (self.lengths - 1)

    def visits(self, pi: Tensor) -> Tensor:
        """Return d(s), the probability that a completion passes through s, (..., S)."""
        return (pi.flatten(-2) @ self.paths.T).exp() / len(self.prompts)

    def completion_logprobs(self, pi: Tensor) -> Tensor:
        """Return log of prompt and completion together, (..., Y); sums to one in exp."""
        return pi.flatten(-2) @ self.choices.T - math.log(len(self.prompts))

    def eta(self, pi: Tensor, gamma: float = 1.0) -> Tensor:
        """Return the expected discounted reward of a completion, (...)."""
        return self.completion_logprobs(pi).exp() @ self.paid(gamma)

    def values(self, pi: Tensor, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return Q (..., S, V) and V (..., S): mean reward-to-go of the completions through."""
        y = self.completion_logprobs(pi).exp()
        Q = ((y * self.paid(gamma)) @ self.choices) / (y @ self.choices)
        Q = Q.view(pi.shape) / self.discount(gamma)[:, None]
        return Q, (pi.exp() * Q).sum(-1)

    def advantages(self, pi: Tensor, gamma: float = 1.0) -> Tensor:
        """Return A(s, a) = Q(s, a) - V(s), (..., S, V)."""
        Q, values = self.values(pi, gamma)
        return Q - values[..., None]

    def gain(self, visits: Tensor, new: Tensor, A: Tensor, gamma: float = 1.0) -> Tensor:
        """Return sum_s gamma^t d(s) sum_a pi_new(a|s) A(s, a), (...)."""
        return (visits * self.discount(gamma) * (new.exp() * A).sum(-1)).sum(-1)

    def reference_kl(self, pi: Tensor) -> Tensor:
        """Return R = KL(pi ‖ pi_ref) per completion, (...), with its whole graph."""
        return (self.visits(pi) * categorical_kl(old=pi, new=self.reference)).sum(-1)

    # ---- the same through the package's batches

    def objective(self, copies: Tensor) -> BatchObjective:
        """Return that of a batch with copies[y] of each completion y, and exact advantages."""
        pick = torch.arange(len(copies)).repeat_interleave(copies)
        chosen = [self.completions[y] for y in pick]
        prompts = [self.prompts[i] for i, _ in chosen]
        ids, attention = self.mdp.left_pad([list(self.mdp.reset(p).prompt_ids) for p in prompts])
        mask = self.mask[pick]
        actions = self.steps[pick].remainder(self.V).masked_fill(~mask, self.mdp.pad_token_id)
        texts = [self.mdp.text(c) for _, c in chosen]
        rewards = torch.zeros(mask.shape, dtype=torch.float64)
        rewards[torch.arange(len(pick)), self.lengths[pick] - 1] = self.scores[pick]
        rollout = replace(
            self.mdp.rollout(self.policy, self.prompts[:1]),  # any, for the fields not named here
            prompts=prompts,
            completions=texts,
            columns={},
            groups=torch.tensor([i for i, _ in chosen]),
            input_ids=torch.cat([ids, actions], dim=1),
            attention_mask=torch.cat([attention, mask.to(attention.dtype)], dim=1),
            action_mask=mask,
            truncated=torch.tensor([c[-1] != 0 for _, c in chosen]),
            rewards=rewards,
            scores=self.mdp.rewards(prompts, texts, [list(c) for _, c in chosen], {}),
        )
        batch = Batch.from_rollout(self.policy, rollout)
        with torch.no_grad():
            A = self.advantages(self.table()).flatten()[self.steps[pick]] * mask
        return BatchObjective(self.policy, batch, A, alone)


def build(
    *, steps: int = 4, rank: int = 1, width: int = 8, targets: tuple[str, ...] = ("c_fc", "c_proj"),
    prompts: tuple[str, ...] = ("a", "bc"), seed: int = 0, uniform: bool = False, score=None,
) -> Tree:  # fmt: skip
    """Build a tiny GPT-2 with LoRA and the tree of all it can say.

    Args:
        steps: Length limit, actions.
        rank: Of LoRA on the modules in `targets`.
        width: Channels of the transformer.
        prompts: Of different lengths, so that padding takes part.
        seed: Of the weights and of the scores.
        uniform: Make pi the uniform policy at theta = 0 (the output layer reads channels that only
            LoRA writes to) and the reference a random adapter, so that exact expectations under pi
            are means over a batch that holds every completion a whole number of times.
        score: Text -> number; by default a fixed random number for each prompt and completion.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=4, n_positions=16, n_embd=width, n_layer=1, n_head=2, n_inner=4 * width,
        initializer_range=0.5, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()
    if uniform:
        half, block = width // 2, model.transformer.h[0]
        with torch.no_grad():
            for embedding in (model.transformer.wte.weight, model.transformer.wpe.weight):
                embedding[:, half:] = 0.0
                embedding[:, :half] -= embedding[:, :half].mean(-1, keepdim=True)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            model.lm_head.weight[:, :half] = 0.0
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=list(targets))
    policy = Policy(model, lora)
    generator = torch.Generator().manual_seed(seed)
    table: dict[tuple[str, tuple], float] = {}

    def random_score(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
        for key in zip(prompts, map(tuple, completion_ids), strict=True):
            if key not in table:
                table[key] = float(torch.randn((), generator=generator))
        return [table[key] for key in zip(prompts, map(tuple, completion_ids), strict=True)]

    def given_score(completions: list[str]) -> list[float]:
        return [float(score(text)) for text in completions]

    rewards = Rewards(given_score if score else random_score)
    mdp = TokenMDP(Letters(), rewards, eos_token_ids=[0], max_completion_length=steps)
    if uniform:
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for p in policy.parameters.tensors:
                p.copy_(0.5 * torch.randn_like(p))
        policy = Policy(policy.model)  # an adapter that came with the model is its reference
    tree = Tree(policy, mdp, prompts)
    if uniform:
        with torch.no_grad():
            for p in policy.parameters.tensors:
                if p.shape[0] != rank:
                    p.zero_()  # B = 0
    return tree


def exact_update(tree: Tree, settings: TRPOSettings) -> tuple[float, Update]:
    """Make the update of `TRPO` with sums over all completions in place of means over a batch.

    Returns eta before the update, and what the update did.
    """
    theta = tree.policy.parameters
    with twice_differentiable():
        features = tree.features()
        pi = tree.policy.logprobs(features)
        old, curvature = pi.detach(), head_curvature(tree.policy, features.detach())
        d, A, before = tree.visits(old), tree.advantages(old), float(tree.reference_kl(old))
        F = FisherOperator(theta, [(features, lambda u: d[:, None] * curvature(u))])
    budgeted = settings.max_ref_kl is not None
    g = theta.gradient(tree.gain(d, pi, A), retain=True)
    b = theta.gradient(tree.reference_kl(pi), retain=True) if budgeted else None

    @torch.no_grad()
    def measure_here() -> Measurement:
        new = tree.table()
        kl = categorical_kl(old=old, new=new)
        R = float(tree.reference_kl(new)) if budgeted else math.nan
        return Measurement(float(tree.gain(d, new, A)), float(d @ kl), R, float(kl.max()))

    return float(tree.eta(old)), constrained_update(
        theta, g, b, F, measure_here,
        StepLimits(
            settings.max_kl, before, settings.max_ref_kl if budgeted else math.inf,
            settings.damping or 0.0,
        ),
        settings,
    )  # fmt: skip


def exact_fisher(tree: Tree) -> FisherOperator:
    """Return the package's F with each state weighted by d(s)."""
    with twice_differentiable():
        features = tree.features()
        d = tree.visits(tree.policy.logprobs(features).detach())
        curvature = head_curvature(tree.policy, features.detach())
        pieces = [(features, lambda u: d[:, None] * curvature(u))]
        return FisherOperator(tree.policy.parameters, pieces)


def whole_number_objective(tree: Tree) -> BatchObjective:
    """Return that of the batch that *is* the uniform policy: V^(T - length) copies of each."""
    return tree.objective(tree.V ** (tree.mask.shape[1] - tree.lengths))


@dataclass(frozen=True)
class Line:
    """One measurement of a statement, and the range that bears the statement out."""

    what: str
    value: float
    least: float = -math.inf
    most: float = math.inf

    @property
    def holds(self) -> bool:
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        allowed = [f">= {self.least:g}"] * (self.least > -math.inf)
        allowed += [f"<= {self.most:g}"] * (self.most < math.inf)
        verdict = ("ok" if self.holds else "FAILS") if allowed else ""
        return f"  {self.what:<80}{self.value:>10.4g}  {' '.join(allowed):<20} {verdict}"


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def many_policies(tree: Tree, count: int = 64) -> Tensor:
    """Return the tables of random policies: half anywhere, half near one of those, (K, S, V)."""
    tables = []
    for k in range(count // 2):
        tree.draw(k, scale=0.6)
        tables.append(tree.table().detach())
        with torch.no_grad():
            for p in tree.policy.parameters.tensors:
                p.add_(0.3 * 0.7 ** (k % 8) * torch.randn_like(p))
        tables.append(tree.table().detach())
    return torch.stack(tables)


def at_steps(tree: Tree, x: Tensor, sizes: list[float]) -> list[Tensor]:
    """Return the tables at theta + h x for each h, and come back to theta."""
    theta, tables = tree.policy.parameters, []
    old = theta.snapshot()
    for h in sizes:
        theta.assign(old, x, h)
        tables.append(tree.table().detach())
    theta.restore(old)
    return tables


def orders(errors: list[float]) -> list[float]:
    """Return the power of the step that an error falls with, from each halving of the step."""
    return [math.log2(abs(a) / abs(b)) for a, b in pairwise(errors)]
