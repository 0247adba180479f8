"""Files of a run: lines of its logs, and the folder that vanilla peft loads.

That folder holds adapter and tokenizer, and beside them critic, settings, figures and model card.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from trpo_lm.cli import command_line
from trpo_lm.lm.critic import Critic
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompts
from trpo_lm.lm.rollout import Rollout
from trpo_lm.report.figures import plot_run
from trpo_lm.report.model_card import model_card
from trpo_lm.storage import Row, replace_file, write_through
from trpo_lm.training.assembly import Parts
from trpo_lm.training.checkpoint import save_tensors
from trpo_lm.training.folder import CRITIC, RunFolder, Settings, save_settings
from trpo_lm.training.manifest import publish


def completion_lines(rollout: Rollout, update: int) -> list[Row]:
    """Return the lines of completions.jsonl for one update."""
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


def save_prompts(path: Path, prompts: Prompts) -> None:
    """Write prompts with their columns, a JSON object a line; other types become text."""
    columns = {**prompts.columns, "prompt": prompts.prompts}
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    lines = (json.dumps(row, default=str) + "\n" for row in rows)
    replace_file(path, "".join(lines).encode())


def save_policy(folder: Path, policy: Policy, critic: Critic) -> None:
    """Write the adapter, which vanilla peft loads, and the critic if it has any tensors."""
    policy.save(folder)
    RunFolder(folder).card.unlink(missing_ok=True)  # peft's own, with nothing filled in
    if state := critic.state():
        save_tensors(folder / CRITIC, state)


def save_outcome(
    folder: Path,
    update: int,
    run: RunFolder,
    parts: Parts,
    settings: Settings,
    samples: Sequence[Row],
) -> None:
    """Write everything but the figures into a folder; its manifest last.

    The manifest notes the settings and the checksum of the parameters too: config.yaml beside it is
    the run's, which may have gone on since.

    Args:
        folder: Where to write; made if need be.
        update: Number of updates made.
        run: Folder of the run, whose metrics the card reports.
        parts: What was trained, and with what.
        settings: The resolved settings.
        samples: For the card, as `Display.samples` takes them.
    """

    def write(new: Path) -> None:
        save_policy(new, parts.policy, parts.critic)
        parts.tokenizer.save_pretrained(str(new))
        save_settings(new, settings)
        if run.metrics.exists():
            card = model_card(run.path, _card_facts(parts, settings, samples))
            write_through(RunFolder(new).card, card.encode())

    checksum = parts.policy.parameters.checksum()
    publish(folder, update, write, checksum=checksum, settings=settings)


def _card_facts(parts: Parts, settings: Settings, samples: Sequence[Row]) -> Row:
    packages = ("trpo_lm", "torch", "transformers", "peft")
    return {
        "base_model": parts.policy.name,
        "command": command_line(),
        "name": Path(settings["output_dir"]).name,
        "dataset": settings["hub_dataset"],
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


def draw(run: RunFolder) -> None:
    """Draw the figures of a run that made an update."""
    if run.metrics.exists():
        if run.plots.is_symlink():  # never written through
            run.plots.unlink()
        plot_run(run.path)
