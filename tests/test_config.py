"""Settings check themselves, and say everything that is wrong at once."""

import copy
import dataclasses
import math
import pickle

import pytest

from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.config import ELSEWHERE, PPOSettings, TrainerConfig, TRPOSettings, describe
from trpo_lm.errors import TrpoLMError

BROKEN_TRPO = {
    "max_kl": [0, -0.1, math.nan, math.inf, "abc", None, True],
    "max_ref_kl": [0, -1.0, math.nan, math.inf],
    "gamma": [0.0, 1.1, -0.5, math.nan],
    "lam": [-0.1, 1.1, "x"],
    "cg_iterations": [0, -1, 2.5, True, None],
    "cg_tolerance": [-1e-3, math.nan],
    "damping": [-0.1, math.inf],
    "fisher_completions": [0, 1.5],
    "line_search_trials": [-1, "3"],
    "backtrack_ratio": [0.0, 1.0, 1.5, -0.2],
    "accept_ratio": [-0.1, 1.5],
}
BROKEN_PPO = {
    "learning_rate": [0.0, -1.0, math.nan], "epochs": [0, 1.5], "minibatches": [0], "clip": [0.0],
    "beta": [-0.1], "target_ref_kl": [0.0], "advantage": ["rloo"], "gamma": [0.0], "lam": [2.0],
    "max_grad_norm": [0.0],
}  # fmt: skip
BROKEN_TRAINER = {
    "temperature": [0, 0.0, -1.0, math.nan, math.inf, "hot"],
    "updates": [0, 3.7, [1, 2], None, True],
    "prompts_per_update": [0], "completions_per_prompt": [0], "max_completion_length": [0, -3],
    "micro_batch_tokens": [0], "prefix_stride": [0], "logging_steps": [0], "eval_steps": [-1],
    "eval_prompts": [0], "save_steps": [-1], "save_total_limit": [0], "seed": [-1, 0.5],
    "truncate_prompts": ["right"], "critic": ["learned"], "on_bad_reward": ["ignore"],
    "reward_weights": [[], [0.0], [math.nan, 1.0], [1.0, "x"]], "reward_timeout": [0, -1.0],
    "ddp_timeout": [0, math.inf], "rollout_timeout": [0, "x"],
    "rollout_servers": [[], "http://a", ["a:8000"], ["http://a", "http://a/"], [1], ["http://"],
                        ["http://me:secret@host"]],
    "dtype": ["half", "float64", None], "attn_implementation": ["", "someone/kernels", 2],
    "lora_r": [0, 1.5], "lora_alpha": [0, None], "lora_target_modules": ["", "q_proj,", ["q_proj"]],
}  # fmt: skip


@pytest.mark.parametrize(
    "settings, broken",
    [(TRPOSettings, BROKEN_TRPO), (PPOSettings, BROKEN_PPO), (TrainerConfig, BROKEN_TRAINER)],
)
def test_N07_K03_each_broken_value_is_named_with_what_is_allowed(settings, broken):
    for name, values in broken.items():
        for value in values:
            with pytest.raises(TrpoLMError) as error:
                settings(**{name: value})
            assert f"{name} = {value!r} is not allowed: it must be" in error.value.what, name
            assert error.value.where == settings.__name__ and error.value.exit_code == 2


def test_N07_all_broken_settings_are_listed_in_one_error():
    with pytest.raises(TrpoLMError) as error:
        TRPOSettings(max_kl=0, damping=-1, cg_iterations=0, backtrack_ratio=1, gamma=2, lam=3)
    for name in ("max_kl", "damping", "cg_iterations", "backtrack_ratio", "gamma", "lam"):
        assert f"{name} = " in str(error.value)
    assert "accept_ratio" not in str(error.value)


def test_two_kinds_of_quantisation_exclude_each_other():
    with pytest.raises(TrpoLMError, match="load_in_8bit = True is not allowed") as error:
        TrainerConfig(load_in_4bit=True, load_in_8bit=True, updates=0)
    assert "False where load_in_4bit is True" in error.value.what and "updates" in error.value.what


@pytest.mark.parametrize("prompts, each, fits", [(1, 1, False), (1, 2, True), (2, 1, True)])
def test_B41_an_update_of_one_completion_is_refused(prompts, each, fits):
    batch = {"prompts_per_update": prompts, "completions_per_prompt": each}
    if fits:
        TrainerConfig(**batch)
        return
    with pytest.raises(TrpoLMError, match="one completion has nothing to compare it with") as error:
        TrainerConfig(**batch)
    assert error.value.where == "prompts_per_update" and "at least 2" in error.value.hint


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_a_name_of_another_library_is_answered_with_the_one_to_use(name):
    for settings in (TrainerConfig, TRPOSettings, TRPO):
        with pytest.raises(TrpoLMError, match=f"unknown setting '{name}'") as error:
            settings(**{name: 1})
        assert ELSEWHERE[name] in error.value.what and error.value.where == settings.__name__
    with pytest.raises(TypeError, match="nonsense"):
        TrainerConfig(nonsense=1)


def test_a_name_that_a_class_has_is_its_own():
    assert PPOSettings(beta=0.2, learning_rate=0.1, max_grad_norm=None).beta == 0.2
    made = TrainerConfig(updates=3)
    assert dataclasses.replace(made, updates=4) == TrainerConfig(updates=4)
    assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made


def test_defaults_and_borderline_values_are_allowed():
    TRPOSettings(max_ref_kl=None, gamma=1, lam=0, damping=0, cg_tolerance=0, accept_ratio=0)
    TRPOSettings(lam=1.0, gamma=1e-9, backtrack_ratio=0.5, accept_ratio=1.0)
    PPOSettings(clip=None, beta=0.0, max_grad_norm=None, advantage="leave_one_out")
    TrainerConfig(eval_steps=0, save_steps=0, reward_weights=[0, -1.0], temperature=0.1)


@pytest.mark.parametrize("settings", [TRPOSettings, PPOSettings, TrainerConfig])
def test_settings_are_frozen_and_every_field_explains_itself(settings):
    made = settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 3
    for field in dataclasses.fields(settings):
        assert len(field.metadata["help"]) > 10, field.name
    assert settings(**describe(made)) == made
