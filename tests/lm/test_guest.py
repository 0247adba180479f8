"""What foreign code does to the process is undone and told: case B14."""

import logging
import os
import random

import numpy as np
import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, TrainerCallback

import runs
from runs import trainer
from trpo_lm.lm.guest import Guest
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.rewards import Rewards

CHANGES = {
    "the current directory": lambda: os.chdir("/"),
    "the environment": lambda: os.environ.update(HF_HUB_OFFLINE="9", NEW_NAME="x"),
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's grad mode": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "torch's number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
}
SMALL = {"updates": 2, "prompts_per_update": 2, "completions_per_prompt": 1}


def process():
    return (
        os.getcwd(), dict(os.environ), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.get_num_threads(), random.getstate(), torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
    )  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("raises", [False, True])
def test_B14_a_change_is_undone_and_told_once(caplog, what, raises):
    before, guest = process(), Guest()
    for _ in range(2):
        try:
            with guest("reward 'x'"):
                CHANGES[what]()
                if raises:
                    raise KeyError
        except KeyError:
            pass
        assert process() == before
    assert [r.getMessage() for r in caplog.records] == [
        f"reward 'x' changed {what}; it is restored after each call"
    ]


def test_B14_a_guest_has_random_numbers_of_its_own_that_go_on(caplog):
    before, guest, drawn = process(), Guest(), []
    for _ in range(3):
        with guest("x"):
            drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        assert process() == before
    assert len(set(drawn)) == 3 and not caplog.records


@pytest.mark.parametrize("what", CHANGES)
def test_B14_a_reward_model_is_a_guest_when_it_scores_prefixes_too(what, caplog):
    class Changing(RewardModel):
        def score_prefixes(self, *args, **keywords):
            CHANGES[what]()
            return super().score_prefixes(*args, **keywords)

    config = GPT2Config(vocab_size=tiny.V, n_embd=8, n_layer=1, n_head=2, n_positions=64,
                        num_labels=1, **tiny.ENDS)  # fmt: skip
    model = Changing(GPT2ForSequenceClassification(config), tiny.tokenizer())
    rewards, before = Rewards([model]), process()
    rewards.score_prefixes(["w1"], ["w2 w3"], [["", "w2"]])
    assert process() == before
    assert [f"changed {what}" in r.getMessage() for r in caplog.records] == [True]


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("who", ["reward", "async reward", "callback"])
def test_B14_a_run_is_the_same_whatever_its_guests_do(tmp_path, monkeypatch, what, who, caplog):
    monkeypatch.chdir(tmp_path)
    trainer("straight", **SMALL).train()

    def score(completions):
        CHANGES[what]()
        return runs.score(completions)

    async def score_later(completions):
        CHANGES[what]()
        return runs.score(completions)

    class Guests(TrainerCallback):
        def on_step_end(self, *args, **keywords):
            CHANGES[what]()

    score_later.__name__ = "score"
    reward = {"reward": score, "async reward": score_later}.get(who, runs.score)
    callbacks = [Guests] if who == "callback" else []
    before = process()
    with caplog.at_level(logging.WARNING):
        trainer("run", reward=reward, callbacks=callbacks, **SMALL).train()
    assert process()[:5] == before[:5]
    runs.assert_same_end(tmp_path / "straight", tmp_path / "run", 2)
    told = [r.getMessage() for r in caplog.records if "changed" in r.getMessage()]
    assert told == [f"{'callback ' + 'Guests' if who == 'callback' else 'reward ' + repr('score')} "
                    f"changed {what}; it is restored after each call"]  # fmt: skip


def test_B14_paths_are_those_of_the_start(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    made = trainer("run", **SMALL)
    os.chdir("elsewhere")
    made.train()
    made.save_model()
    assert (tmp_path / "run" / "MANIFEST.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())
