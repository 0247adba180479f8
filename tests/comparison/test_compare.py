"""recipes/compare.py: arms as text."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from trpo_lm import PPO, TRPO, TrainerConfig, TrpoLMError
from trpo_lm.config import TRLSettings

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("compare", ROOT / "recipes/compare.py")
compare = sys.modules["compare"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compare)


def test_a_grid_is_every_combination_and_keeps_the_row_of_its_algorithm():
    arms = compare.expand("grpo:learning_rate=3e-4,1e-3:beta=0,0.1", TrainerConfig())
    assert [given for _, given, _, _ in arms] == [
        {"learning_rate": lr, "beta": beta} for lr in ("3e-4", "1e-3") for beta in ("0", "0.1")
    ]
    for algorithm, given, settings, _ in arms:
        assert algorithm == "grpo" and settings.advantage == "group_normalised"
        assert settings.epochs == settings.minibatches == 1
        assert settings.beta == float(given["beta"])


@pytest.mark.parametrize("name", ["trpo", "ppo", "grpo", "rloo", "reinforce"])
def test_every_row_is_a_valid_algorithm(name):
    ((_, given, settings, _),) = compare.expand(name, TrainerConfig())
    rule = (TRPO if name == "trpo" else PPO)(**vars(settings))
    assert not given and rule.needs_critic == (name in ("trpo", "ppo", "reinforce"))


def test_arms_of_trl_expand_whether_or_not_it_is_installed():
    arms = compare.expand("trl-grpo:learning_rate=3e-4,1e-3", TrainerConfig())
    assert [settings for *_, settings, _ in arms] == [
        TRLSettings(3e-4, 0.0),
        TRLSettings(1e-3, 0.0),
    ]
    ((*_, settings, trainer),) = compare.expand("trl-rloo", TrainerConfig(prompts_per_update=64))
    assert settings.beta == 0.05  # TRL's default for this trainer
    assert (trainer.prompts_per_update, trainer.completions_per_prompt) == (16, 4)


def test_every_arm_samples_the_same_number_of_completions():
    args = TrainerConfig(prompts_per_update=64, completions_per_prompt=1)
    shape = {
        text: (trainer.prompts_per_update, trainer.completions_per_prompt)
        for text in ("ppo", "grpo", "rloo", "rloo:completions_per_prompt=16")
        for *_, trainer in compare.expand(text, args)
    }
    assert list(shape.values()) == [(64, 1), (8, 8), (16, 4), (4, 16)]
    with pytest.raises(TrpoLMError, match="64 completions, which is not a multiple of 5"):
        compare.expand("rloo:completions_per_prompt=5", args)
    ((*_, trainer),) = compare.expand("ppo:critic=value_head", args)
    assert trainer.critic == "value_head"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pppo", "unknown algorithm 'pppo'"),
        ("ppo:betta=0.1", "did you mean beta"),
        ("ppo:beta=much", "beta must be a number"),
        ("ppo:beta=-1", "not allowed"),
        ("trpo:clip=0.2", "unknown setting 'clip'"),
        ("ppo:seed=3", "seed cannot differ between arms"),
        ("trl-grpo:clip=0.2", "unknown setting 'clip'"),
        ("trl-rloo:learning_rate=0", "not allowed"),
    ],
)
def test_a_wrong_arm_is_named(text, message):
    with pytest.raises(TrpoLMError, match=message) as caught:
        compare.expand(text, TrainerConfig())
    assert text in str(caught.value.where)


def test_help_does_not_import_torch():
    code = (
        "import sys; sys.argv = ['compare.py', '--help']\n"
        "import compare\ntry: compare.run()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'recipes'}"}
    out = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "--limit_samples" in out.stdout
