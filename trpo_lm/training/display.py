"""Console output of a run: start-up banner, samples, final tables, and the `Display` they go to.

`console.Console` is the display of a single run, `sweep.Progress` that of many.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from trpo_lm.cli import recipe_command
from trpo_lm.config import Limits
from trpo_lm.lm.mdp import TokenMDP, ignored_sampling
from trpo_lm.lm.objective import choose_product, completions_in_fisher
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.rewards import Rewards, abstain
from trpo_lm.lm.rollout import Rollout
from trpo_lm.report.format import conversation
from trpo_lm.report.model_card import summary
from trpo_lm.storage import Row
from trpo_lm.training.assembly import Parts
from trpo_lm.training.best import BestPolicy
from trpo_lm.training.folder import RunFolder, Settings
from trpo_lm.training.metrics import Evaluation


class Display(Protocol):
    """Where a run shows its progress."""

    def banner(self, facts: Mapping[str, Any], first_score: float | None) -> None:
        """Show the start-up banner.

        Args:
            facts: Label and value of each line.
            first_score: Mean score of the run's first update, where one was made already; later
                scores are compared with it.
        """
        ...

    def update(self, row: Row, limits: Limits) -> None:
        """Show the metrics of an update."""
        ...

    def note(self, text: str) -> None:
        """Show a remark."""
        ...

    def samples_due(self, update: int) -> bool:
        """Whether to show samples at this update."""
        ...

    def samples(self, rows: Sequence[Mapping[str, Any]], title: str) -> None:
        """Show completions of the reference and the policy.

        Args:
            rows: Each with `prompt`, `reference` and `policy` (texts), `score_before` (the
                reference's) and `score_after` (the policy's); absent ones stay empty.
            title: Text above them.
        """
        ...

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table."""
        ...

    def close(self) -> None:
        """Stop; called however the run ends."""
        ...


def banner(parts: Parts, limits: Limits, settings: Settings) -> dict[str, str]:
    """Return the start-up banner: label and value of at most 12 lines."""
    policy, processes = parts.policy, settings["world_size"]
    total, trained = sum(p.numel() for p in policy.model.parameters()), len(policy.parameters)
    facts = {
        "model": policy.name,
        "parameters": f"{total:,}, of which {trained:,} trainable ({trained / total:.1%})",
        "device": f"{policy.device}, base in {str(policy.base.dtype).removeprefix('torch.')}, "
        f"{processes} process{'es' * (processes > 1)}",
        "prompts": f"{settings['prompts']:,}",
        "rewards": ", ".join(parts.rewards.names),
        "critic": f"{parts.critic.name}, lambda {settings.get('lam')}",
        "algorithm": settings["algorithm"],
    }
    if limits.max_kl is not None:
        unit = "nats per completion"
        budget = "none" if limits.max_ref_kl is None else f"{limits.max_ref_kl} {unit}, whole run"
        facts |= {"max_kl": f"{limits.max_kl} {unit}, each update", "max_ref_kl": budget}
    each, prompts = settings["completions_per_prompt"], settings["prompts_per_update"]
    facts["batch"] = (
        f"{prompts * each} completions an update ({prompts} prompts x {each}), "
        f"at most {settings['max_completion_length']} tokens"
    )
    if settings.get("rollout_servers"):
        facts["sampling"] = ", ".join(settings["rollout_servers"])
    return {**facts, "output": settings["output_dir"]}


def sampling_notes(parts: Parts) -> list[str]:
    """Return notes on how sampling differs from the model's own settings."""
    notes = []
    if parts.tokenizer.pad_token_id is None:
        notes.append("the tokenizer has no pad token: an end token fills the padding")
    if ignored := ignored_sampling(parts.policy.base):
        notes.append(f"sampling is neutral in training; the model's own {ignored} is not used")
    return notes


def product_notes(policy: Policy, settings: Settings) -> list[str]:
    """Return how Fisher products will be made, judged by the longest completions allowed."""
    if "fisher_completions" not in settings:
        return []
    completions = settings["prompts_per_update"] * settings["completions_per_prompt"]
    length = settings["max_completion_length"]
    rows = math.ceil(completions_in_fisher(settings["fisher_completions"], completions, length))
    lengths = torch.full((math.ceil(min(rows, completions) / settings["world_size"]),), length)
    kind, why = choose_product(policy, lengths)
    return [f"Fisher products of {rows} completions: {kind} ({why})"]


def samples(
    policy: Policy, mdp: TokenMDP, rollout: Rollout, *, seed: tuple[int | str, ...], count: int = 3
) -> list[Row]:
    """Return some completions of a rollout beside the reference's, for `Display.samples`.

    The reference's are sampled here and not scored: no reward function is called for show.
    """
    firsts = [int((rollout.groups == g).nonzero()[0]) for g in rollout.groups.unique()[:count]]
    unscored = TokenMDP(
        mdp.tokenizer,
        Rewards(abstain),
        eos_token_ids=mdp.eos_token_ids,
        max_completion_length=mdp.max_completion_length,
        pad_token_id=mdp.pad_token_id,
        template_arguments=mdp.template_arguments,
    )
    with policy.reference():
        columns = {name: [values[i] for i in firsts] for name, values in rollout.columns.items()}
        prompts = [rollout.prompts[i] for i in firsts]
        reference = unscored.rollout(policy, prompts, columns=columns, seed=seed)
    return [
        {
            "prompt": conversation(rollout.prompts[i]),
            "reference": text,
            "policy": rollout.completions[i],
            "score_after": float(rollout.scores.score[i]) if rollout.scores.valid[i] else None,
        }
        for i, text in zip(firsts, reference.completions, strict=True)
    ]


def before_and_after(
    before: Evaluation | None, after: Evaluation | None, count: int = 6
) -> list[Row]:
    """Return completions of two evaluations side by side, for `Display.samples`."""
    if before is None or after is None:
        return []
    first, last = before.rollout, after.rollout
    return [
        {
            "prompt": conversation(first.prompts[i]),
            "reference": first.completions[i],
            "policy": last.completions[i],
            "score_before": float(first.scores.score[i]),
            "score_after": float(last.scores.score[i]),
        }
        for i in range(min(count, len(first)))
    ]


def show_outcome(
    display: Display,
    run: RunFolder,
    rows: Sequence[Row],
    before: Evaluation | None,
    after: Evaluation | None,
    best: BestPolicy | None,
) -> None:
    """Show samples and scores before and after, the changes, the files, and the next commands."""
    if before is not None and after is not None:
        display.samples(before_and_after(before, after), "held-out prompts, before and after")
        scores: list[list[Any]] = [
            ["reference", before.score, before.ref_kl],
            [f"policy, update {rows[-1]['update']}", after.score, after.ref_kl],
        ]
        if best is not None:
            label = f"best within the budget, update {best.update}"
            scores.append([label, best.score, best.ref_kl])
        header = ["", "score", "reference KL, nats per completion"]
        display.table("held-out prompts", header, scores)
    display.table("what changed", ["", "first", "last"], summary(rows))
    display.note(f"page:     {run.page}")
    display.note(f"pictures: {run.plots}/")
    display.note(f"adapter:  {run.adapter}")
    if best is not None:
        display.note(f"best:     {run.best}/, the policy of update {best.update}")
    display.note("next:")
    quoted = shlex.quote(str(run.path))
    for recipe, words in (("evaluate", "{}"), ("token_view", "{}"), ("merge", "{} {}-merged")):
        display.note(f"  {recipe_command(recipe)} {words.format(quoted, quoted)}")
