"""What a run tells when it begins, and what it leaves when it ends.

The banner; the folder that vanilla peft loads (adapter, tokenizer) with the critic, the settings,
the pictures and the model card beside it; and the tables of what changed.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trpo_lm import checkpoint as checkpoints
from trpo_lm.cli import command_line
from trpo_lm.config import TrainerConfig, describe
from trpo_lm.critic import Critic
from trpo_lm.mdp import Rollout
from trpo_lm.metrics import Console
from trpo_lm.policy import Policy
from trpo_lm.report import model_card, plot_run, summary

CARD = "README.md"
CRITIC = "value_head"  # stem of the critic's file, in checkpoints too


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
    policy.save(folder)
    tokenizer.save_pretrained(str(folder))
    checkpoints.save_settings(folder / "config.yaml", settings)
    if state := critic.state():
        checkpoints.save_tensors(folder / f"{CRITIC}.safetensors", state)
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
) -> None:
    """Show samples, scores before and after, what changed, and where everything lies."""
    if before is not None and after is not None:
        console.samples(before_and_after(before, after), "held-out prompts, before and after")
        console.table(
            "held-out prompts",
            ["", "score", "reference KL, nats per completion"],
            [
                ["reference", before["score"], before["ref_kl"]],
                ["policy", after["score"], after["ref_kl"]],
            ],
        )
    console.table("what changed", ["", "first", "last"], summary(rows))
    console.note(f"pictures: {run}/plots/")
    console.note(f"adapter:  {run}/adapter_model.safetensors")


def draw(run: Path) -> None:
    """Draw the pictures of a run that made an update."""
    if (run / "metrics.jsonl").exists():
        plot_run(run)
