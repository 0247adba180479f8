"""Train a causal LM of your own, on your prompts, with your reward.

    accelerate launch recipes/train.py --model gpt2 --reward_model lvwerra/distilbert-imdb \\
        --dataset stanfordnlp/imdb --prompt_column text --truncate_prompts left
    python recipes/train.py --model LM --reward_function my_rewards:short --dataset prompts.jsonl

It is sentiment.py without the embedded model, reward and prompts, and with the package's own
defaults. A reward function is imported from a folder of PYTHONPATH.
"""

from __future__ import annotations

from dataclasses import dataclass

import sentiment

from trpo_lm.cli import main, parse, recipe_command
from trpo_lm.config import TrainerConfig, TRPOSettings, option
from trpo_lm.errors import TrpoLMError


@dataclass(frozen=True)
class Arguments(sentiment.Arguments):
    """What is trained, on what, to please whom."""

    model: str | None = option(None, "causal LM: folder or hub id; required")
    reward_model: str | None = option(
        None, "sequence classifier: folder or hub id; required, or reward_function"
    )
    dataset: str | None = option(
        None, "prompts: .jsonl, .csv, .txt, or a folder or hub id; required"
    )


@dataclass(frozen=True)
class Run(TrainerConfig):
    """The trainer's settings, with this recipe's own folder."""

    output_dir: str = option("runs/train", "folder that receives everything the run writes")


def run() -> None:
    """Parse, refuse what is incomplete, train."""
    arguments, args, settings = parse((Arguments, Run, TRPOSettings), description=__doc__)
    needed = {
        "--model": arguments.model,
        "--reward_model or --reward_function": arguments.reward_model or arguments.reward_function,
        "--dataset": arguments.dataset,
    }
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise TrpoLMError(
            f"missing: {'; '.join(missing)}", where="command line",
            hint=f"{recipe_command('sentiment')} has an embedded model, reward and prompts",
        )  # fmt: skip
    sentiment.train(arguments, args, settings)


if __name__ == "__main__":
    main(run)
