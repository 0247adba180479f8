"""A sweep of one update on the embedded models."""

from pathlib import Path

from trpo_lm import PPO, TRPO, TrainerConfig
from trpo_lm.comparison.sweep import Arm, Sweep
from trpo_lm.config import TRLSettings
from trpo_lm.lm.prompts import Prompts

DATA = Path(__file__).resolve().parent.parent / "data"


def a_sweep(folder, arms, **settings):
    args = TrainerConfig(
        output_dir=str(folder), updates=1, prompts_per_update=4, completions_per_prompt=2,
        max_completion_length=6, **settings,
    )  # fmt: skip
    prompts = Prompts(["the film", "the story of", "a bold", "i thought the"], {})
    rules = {"trpo": TRPO(cg_iterations=2), "ppo": PPO(epochs=1)}
    rules |= dict.fromkeys(["trl-grpo", "trl-rloo"], TRLSettings(beta=0.05))
    made = [Arm(name, name, {}, rules[name], args) for name in arms]
    return Sweep(
        str(DATA / "lm"), str(DATA / "reward_model"), prompts, prompts, args, made,
        seeds=1, judge=None, completions=2, limit_prompts=2, limit_samples=4,
    )  # fmt: skip
