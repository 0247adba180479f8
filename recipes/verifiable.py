"""Train an instruction-tuned model on questions whose answers are checked, and say what changed.

    accelerate launch recipes/verifiable.py --model HuggingFaceTB/SmolLM2-360M-Instruct \\
        --dataset openai/gsm8k --dataset_config main --eval_split test \\
        --prompt_template "{question} End with the number."

The dataset needs a prompt (text or messages) and a column `answer`; the reward is 1 where the last
number of a completion is that of the answer. At the end: accuracy sampled and greedy, before and
after, at which KL from the reference, and what was forgotten: the loss on the reference's own text.
"""

import os
from dataclasses import dataclass

from evaluate import show

from trpo_lm.cli import main, parse
from trpo_lm.config import DatasetSettings, TrainerConfig, TRPOSettings, describe, option


@dataclass(frozen=True)
class Arguments(DatasetSettings):
    """What is trained, on which questions."""

    model: str = option("HuggingFaceTB/SmolLM2-360M-Instruct", "instruction-tuned causal LM")
    reward_function: str = option("trpo_lm:exact_number", "module:callable that checks answers")


@dataclass(frozen=True)
class Run(TrainerConfig):
    """The trainer's settings, with several answers to each question."""

    output_dir: str = option("runs/verifiable", "folder that receives everything the run writes")
    prompts_per_update: int = option(32, "questions of an update, all processes")
    completions_per_prompt: int = option(8, "answers sampled for each question")
    max_completion_length: int = option(128, "most tokens of an answer")


def run() -> None:
    """Parse, train, evaluate, print."""
    arguments, args, settings = parse((Arguments, Run, TRPOSettings), description=__doc__)
    from trpo_lm import TRPO, Trainer
    from trpo_lm.analysis.saved_run import evaluate, open_run
    from trpo_lm.lm.prompts import load_from_settings
    from trpo_lm.lm.rewards import load_reward
    from trpo_lm.training.console import Console

    reward = load_reward(arguments.reward_function)
    prompts, held_out = load_from_settings(arguments, None, split_off=256)
    rule = TRPO(**describe(settings))
    Trainer(
        arguments.model,
        reward,
        train_dataset=prompts,
        args=args,
        eval_dataset=held_out,
        algorithm=rule,
    ).train()
    if os.environ.get("RANK", "0") == "0":
        found = evaluate(open_run(args.output_dir, reward=reward), held_out)
        show(Console(True, 1), found, f"accuracy on {len(held_out)} held-out questions, 4 answers")


if __name__ == "__main__":
    main(run)
