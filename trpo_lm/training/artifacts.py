"""What a run tells when it begins, and what it leaves when it ends.

The banner; samples on the way; the folder that vanilla peft loads (adapter, tokenizer) with the
critic, the settings, the pictures and the model card beside it; and the tables of what changed.
"""

from __future__ import annotations

import json
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trpo_lm.cli import command_line
from trpo_lm.config import TrainerConfig, describe
from trpo_lm.lm.critic import Critic
from trpo_lm.lm.mdp import TokenMDP
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompts
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.rewards import Rewards, abstain
from trpo_lm.lm.rollout import Rollout
from trpo_lm.report.figures import plot_run
from trpo_lm.report.model_card import model_card, summary
from trpo_lm.training import checkpoint as checkpoints
from trpo_lm.training.console import Console

CARD = "README.md"
CRITIC = "value_head"  # stem of the critic's file, in checkpoints too
TOLERANCE = 0.05  # a few hundred completions measure the reference KL to a few per cent


def banner(
    policy: Policy,
    critic: Critic,
    algorithm: Any,
    args: TrainerConfig,
    *,
    processes: int,
    prompts: int,
    rewards: list[str],
) -> dict[str, str]:
    """Return what is about to run, in at most 12 lines of label and value."""
    total, trained = sum(p.numel() for p in policy.model.parameters()), len(policy.parameters)
    settings = describe(algorithm)
    facts = {
        "model": policy.name,
        "parameters": f"{total:,}, of which {trained:,} trainable ({trained / total:.1%})",
        "device": f"{policy.device}, base in {str(policy.base.dtype).removeprefix('torch.')}, "
        f"{processes} process{'es' * (processes > 1)}",
        "prompts": f"{prompts:,}",
        "rewards": ", ".join(rewards),
        "critic": f"{critic.name}, lambda {settings.get('lam')}",
        "algorithm": type(algorithm).__name__,
    }
    if "max_kl" in settings:
        budget = settings["max_ref_kl"]
        unit = "nats per completion"
        facts["max_kl"] = f"{settings['max_kl']} {unit}, each update"
        facts["max_ref_kl"] = "none" if budget is None else f"{budget} {unit}, whole run"
    each, prompts_each = args.completions_per_prompt, args.prompts_per_update
    facts["batch"] = (
        f"{prompts_each * each} completions an update ({prompts_each} prompts x {each}), "
        f"at most {args.max_completion_length} tokens"
    )
    return {**facts, "output": args.output_dir}


def completion_lines(rollout: Rollout, update: int) -> list[dict[str, Any]]:
    """Return the rows of completions.jsonl for one update."""
    return [
        {
            "update": update,
            "prompt": prompt,
            "completion": completion,
            "score": score,
            **{f"rewards/{name}": values[i] for name, values in rollout.scores.columns.items()},
        }
        for i, (prompt, completion, score) in enumerate(
            zip(rollout.prompts, rollout.completions, rollout.scores.score.tolist(), strict=True)
        )
    ]


def samples(
    policy: Policy, mdp: TokenMDP, rollout: Rollout, *, seed: tuple[int | str, ...], count: int = 3
) -> list[dict[str, Any]]:
    """Put some completions of a rollout beside the reference's, as `Console.samples` takes them.

    The reference's are sampled for this and not scored: a reward function is never called for show.
    """
    firsts = [int((rollout.groups == g).nonzero()[0]) for g in rollout.groups.unique()[:count]]
    silent = TokenMDP(
        mdp.tokenizer,
        Rewards(abstain),
        eos_token_ids=mdp.eos_token_ids,
        max_completion_length=mdp.max_completion_length,
        pad_token_id=mdp.pad_token_id,
    )
    with policy.reference():
        reference = silent.rollout(policy, [rollout.prompts[i] for i in firsts], seed=seed)
    return [
        {
            "prompt": rollout.prompts[i],
            "reference": text,
            "policy": rollout.completions[i],
            "score_after": float(rollout.scores.score[i]) if rollout.scores.valid[i] else None,
        }
        for i, text in zip(firsts, reference.completions, strict=True)
    ]


def is_better(facts: dict[str, Any], best: dict[str, Any] | None) -> bool:
    """Say whether an evaluated policy takes the place of the best one so far.

    It must lie within the budget of the whole run, to a tolerance of `TOLERANCE` of it: the
    reference KL is itself measured on a few hundred completions. Of equal scores the first stays.

    Args:
        facts: Its `score`, None where nothing was evaluated or scored, `ref_kl` and `max_ref_kl`
            (nats per completion; None: no budget).
        best: The same of the best one so far, or None.
    """
    score, budget = facts["score"], facts["max_ref_kl"]
    if score is None or (budget is not None and facts["ref_kl"] > (1 + TOLERANCE) * budget):
        return False
    return best is None or score > best["score"]


def reward_sources(rewards: Rewards) -> list[dict[str, Any] | None]:
    """Return name and rewarded output of each reward model; None for what is no model."""
    return [
        {"model": f.model.name_or_path, "label": f.label} if isinstance(f, RewardModel) else None
        for f in rewards.functions
    ]


def save_prompts(path: Path, prompts: Prompts) -> None:
    """Write prompts with their columns, a JSON object a line; other types become text."""
    columns = {"prompt": prompts.prompts, **prompts.columns}
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    lines = (json.dumps(row, default=str) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def save_policy(folder: Path, policy: Policy, critic: Critic) -> None:
    """Write the adapter, which vanilla peft loads, and the critic if it holds anything."""
    policy.save(folder)
    (folder / CARD).unlink(missing_ok=True)  # peft's own, with nothing filled in
    if state := critic.state():
        checkpoints.save_tensors(folder / f"{CRITIC}.safetensors", state)


def save_outcome(
    folder: Path,
    run: Path,
    *,
    policy: Policy,
    critic: Critic,
    tokenizer: Any,
    settings: dict[str, Any],
    samples: list[dict[str, Any]],
) -> None:
    """Write everything but the pictures into a folder; the model card last.

    Args:
        folder: Where to write; made if need be.
        run: Folder of the run, whose metrics the card tells.
        policy: What was trained.
        critic: Its critic; one that holds nothing leaves no file.
        tokenizer: Of its model.
        settings: The resolved settings.
        samples: Rows for the card, as `Console.samples` takes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_policy(folder, policy, critic)
    tokenizer.save_pretrained(str(folder))
    checkpoints.save_settings(folder / "config.yaml", settings)
    if (run / "metrics.jsonl").exists():
        packages = ("trpo_lm", "torch", "transformers", "peft")
        facts = {
            "base_model": policy.name,
            "command": command_line(),
            "algorithm": settings["algorithm"],
            "rewards": settings["reward_funcs"],
            "data": f"{settings['prompts']} prompts",
            "seed": settings["seed"],
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in packages},
            },
            "settings": settings,
            "samples": samples,
        }
        (folder / CARD).write_text(model_card(run, facts), encoding="utf-8")


def is_finished(run: Path) -> bool:
    """Whether the model card, which a run writes last, is not older than its last update."""
    metrics, card = run / "metrics.jsonl", run / CARD
    if not (metrics.is_file() and card.is_file()):
        return False
    return card.stat().st_mtime_ns >= metrics.stat().st_mtime_ns


def before_and_after(
    before: dict[str, Any] | None, after: dict[str, Any] | None, count: int = 6
) -> list[dict[str, Any]]:
    """Pair the completions of two evaluations as `Console.samples` wants them."""
    if before is None or after is None:
        return []
    first, last = before["rollout"], after["rollout"]
    return [
        {
            "prompt": first.prompts[i],
            "reference": first.completions[i],
            "policy": last.completions[i],
            "score_before": float(first.scores.score[i]),
            "score_after": float(last.scores.score[i]),
        }
        for i in range(min(count, len(first)))
    ]


def show_outcome(
    console: Console,
    run: Path,
    rows: list[dict[str, Any]],
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    best: dict[str, Any] | None = None,
) -> None:
    """Show samples, scores before and after, what changed, where all of it lies, and what next."""
    if before is not None and after is not None:
        console.samples(before_and_after(before, after), "held-out prompts, before and after")
        console.table(
            "held-out prompts",
            ["", "score", "reference KL, nats per completion"],
            [
                ["reference", before["score"], before["ref_kl"]],
                [f"policy, update {rows[-1]['update']}", after["score"], after["ref_kl"]],
            ]
            + [
                [f"best within the budget, update {kept['update']}", kept["score"], kept["ref_kl"]]
                for kept in [best]
                if kept is not None
            ],
        )
    console.table("what changed", ["", "first", "last"], summary(rows))
    console.note(f"pictures: {run}/plots/")
    console.note(f"adapter:  {run}/adapter_model.safetensors")
    if best is not None:
        console.note(f"best:     {run}/{checkpoints.BEST}/, the policy of update {best['update']}")
    console.note("next:")
    quoted = shlex.quote(str(run))
    for command in ("evaluate.py {}", "token_view.py {}", "merge.py {} {}-merged"):
        console.note(f"  python recipes/{command.format(quoted, quoted)}")


def draw(run: Path) -> None:
    """Draw the pictures of a run that made an update."""
    if (run / "metrics.jsonl").exists():
        plot_run(run)
