"""Variance, noise scale and bias of the gradient for each critic and lambda.

    F=path/to/film; python recipes/benchmarks/credit.py --model $F/lm --reward_model $F/rm \\
        --dataset $F/prompts_train.jsonl

At the start of training, critics are fitted to earlier batches and evaluated on fresh ones. The
variance is that of one completion's gradient; the noise scale is variance / |mean gradient|^2, the
number of completions at which signal equals noise; agreement is mu . mu_1 / |mu_1|^2 with mu_1 the
mean gradient of the same critic at lambda = 1, which is unbiased. Products of different batches
make all estimates unbiased.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trpo_lm.cli import main, parse
from trpo_lm.config import option
from trpo_lm.lm.rollout import Batch, micro_batches

DATA = Path(__file__).resolve().parent.parent.parent / "data"
LAMBDAS = (0.0, 0.5, 0.8, 0.95, 1.0)


@dataclass(frozen=True)
class Arguments:
    """What is measured, and how much of it."""

    model: str = option(str(DATA / "lm"), "causal LM")
    reward_model: str = option(str(DATA / "reward_model"), "sequence classifier")
    dataset: str = option(str(DATA / "prompts_train.jsonl"), "prompts")
    seeds: int = option(3, "repetitions, each with other prompts, samples and adapters")
    fit_batches: int = option(6, "batches the critics learn from")
    batches: int = option(12, "batches that are judged")
    prompts: int = option(64, "prompts in a batch")
    completions: int = option(4, "completions of each prompt")
    length: int = option(24, "tokens a completion may have")
    output: str | None = option(None, "JSON file for the table")


def run() -> None:
    """Measure all critics on the same completions and print a table."""
    (a,) = parse((Arguments,), description=__doc__)
    from trpo_lm.lm.loading import load_tokenizer

    tables = [_measure(a, seed, load_tokenizer(a.model)) for seed in range(a.seeds)]
    rows = {}
    print(f"{'advantage':38} {'variance':>10} {'noise scale, completions':>32} {'agreement':>18}")
    for name in tables[0]["rows"]:
        values = [t["rows"][name] for t in tables]
        rows[name] = values
        scales = ", ".join(f"{v['noise_scale']:,.0f}" for v in values)
        agreement = ", ".join(f"{v['agreement']:.2f}" for v in values)
        variance = sum(v["variance"] for v in values) / len(values)
        print(f"{name:38} {variance:10.3g} {scales:>32} {agreement:>18}")
    for name in tables[0]["explained"]:
        print(f"explained variance by position, {name}:")
        for t in (1, 6, 12, 18):
            found = [table["explained"][name].get(t) for table in tables]
            print(f"  token {t:2d}: " + ", ".join("-" if v is None else f"{v:.2f}" for v in found))
    if a.output:
        Path(a.output).write_text(json.dumps({"rows": rows, "settings": vars(a)}, indent=1))


def _measure(a: Arguments, seed: int, tokenizer) -> dict:
    import torch

    from trpo_lm.core.advantages import gae, leave_one_out, returns
    from trpo_lm.core.divergences import logprob_gradient
    from trpo_lm.lm.critic import PrefixCritic, ValueHead
    from trpo_lm.lm.mdp import TokenMDP, end_token_ids
    from trpo_lm.lm.policy import Policy
    from trpo_lm.lm.prompts import load_prompts
    from trpo_lm.lm.rewards import Rewards
    from trpo_lm.seeds import generator

    policy, rewards = Policy(a.model, seed=seed), Rewards(a.reward_model)
    ends = end_token_ids(policy.base, tokenizer)
    mdp = TokenMDP(tokenizer, rewards, eos_token_ids=ends, max_completion_length=a.length)
    prompts = load_prompts(a.dataset)
    order = torch.randperm(len(prompts), generator=generator(seed, "prompts")).tolist()
    width = policy.base.config.get_text_config().hidden_size
    critics = {"value head": ValueHead(width)}
    if rewards.can_score_prefixes:
        critics["value head + prefix score"] = ValueHead(width, use_prefix=True)
        critics["prefix score"] = PrefixCritic(a.length)
    gradients: dict[str, list] = {}
    seen: dict[str, list] = {name: [] for name in critics}
    for i in range(a.fit_batches + a.batches):
        rows = [order[(i * a.prompts + j) % len(order)] for j in range(a.prompts)]
        chosen, columns = prompts.take(rows)
        r = mdp.rollout(
            policy, chosen, completions_per_prompt=a.completions, columns=columns, seed=(seed, i)
        )
        batch, mask = Batch.from_rollout(policy, r), r.action_mask
        scores = mdp.prefix_scores(r) if rewards.can_score_prefixes else None
        targets = returns(r.rewards, mask, gamma=1.0)
        if i >= a.fit_batches:
            advantages = {"leave-one-out": leave_one_out(r.scores.score, r.groups)[:, None] * mask}
            for name, critic in critics.items():
                values = critic.values(batch.hidden, scores, mask, untrained=0.0)
                seen[name].append((values, targets, mask))
                for lam in LAMBDAS:
                    A = gae(r.rewards, values, mask, gamma=1.0, lam=lam)
                    advantages[f"{name}, lambda {lam:g}"] = A
            flat = [A[mask].float() for A in advantages.values()]
            total = torch.zeros(len(flat), len(policy.parameters))
            for part, tokens in micro_batches(policy, r, "gradient"):
                features = policy.features(*r.model_inputs(part))

                def slopes(logprobs, s, tokens=tokens, actions=batch.actions, flat=flat):
                    at = tokens[s]
                    p = logprobs.exp()
                    return [logprob_gradient(p, actions[at], A[at]) for A in flat]

                for k, cotangent in enumerate(policy.cotangents(features, slopes)):
                    last = k + 1 == len(flat)
                    total[k] += policy.parameters.gradient(
                        features, cotangent=cotangent, retain=not last
                    )
            for name, g in zip(advantages, total / len(r), strict=True):
                gradients.setdefault(name, []).append(g.double())
        for critic in critics.values():
            critic.fit(batch.hidden, scores, mask, targets, r.scores.valid, lambda t: t)
    size = a.prompts * a.completions
    stacked = {name: torch.stack(g) for name, g in gradients.items()}
    out = {}
    for name, g in stacked.items():
        unbiased = stacked[name.split(",")[0] + ", lambda 1"] if "lambda" in name else g
        signal, total = _between(g, g), float(g.square().sum(-1).mean())
        out[name] = {
            "variance": size * (total - signal),
            "noise_scale": size * (total - signal) / signal if signal > 0 else float("inf"),
            "agreement": _between(g, unbiased) / _between(unbiased, unbiased),
        }
    explained = {
        name: {t: _explained(found, t) for t in range(1, a.length + 1)}
        for name, found in seen.items()
    }
    return {"rows": out, "explained": explained}


def _between(g, h) -> float:
    """Return the mean product of gradients of different batches: an unbiased mu_g . mu_h."""
    products = g @ h.T
    n = len(g)
    return float((products.sum() - products.diagonal().sum()) / (n * (n - 1)))


def _explained(found, t: int) -> float | None:
    """Return the share of the returns' variance that values at the t-th token explain."""
    import torch

    values = [(v[m[:, t - 1], t - 1], y[m[:, t - 1], t - 1]) for v, y, m in found]
    v, y = (torch.cat(c) for c in zip(*values, strict=True))
    return float(1 - (y - v).var() / y.var()) if len(y) > 30 else None


if __name__ == "__main__":
    main(run)
