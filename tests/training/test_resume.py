"""Runs that stop and go on: cases X01-X04, X06, X08, X09, X11 and C06."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import runs
import tiny
import torch
from runs import assert_same_end, checkpoints, checksum, tensors, trainer

import trpo_lm.algorithms.trpo
import trpo_lm.training.checkpoint
import trpo_lm.training.trainer
from trpo_lm.errors import Interrupted, TrpoLMError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(trpo_lm.training.artifacts, "draw", lambda run: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six updates that nothing disturbed, with each algorithm."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trpo_lm.training.artifacts, "draw", lambda run: None)
        for name in runs.ALGORITHMS:
            trainer(folder / name, algorithm=name, evals=runs.HELD_OUT, eval_steps=2).train()
    return folder


def go_on(folder, algorithm="trpo", **options):
    options = {"evals": runs.HELD_OUT, "eval_steps": 2} | options
    made = trainer(folder, algorithm=algorithm, resume_from_checkpoint="auto", **options)
    return made, made.train()


def files(folder):
    """Return name, inode, time and content of every file."""
    return {
        p.relative_to(folder): (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# ---------------------------------------------------------------- X01, X02: the same run


def train_in_child(folder, reward=runs.score, algorithm="trpo", resume="auto", **options):
    """Start or go on in a process of its own; it returns the rows of all updates."""
    runs.no_pictures()
    trpo_lm.training.checkpoint.os.fsync = lambda descriptor: None
    options = {"evals": runs.HELD_OUT, "eval_steps": 2} | options
    made = trainer(
        folder, reward=reward, algorithm=algorithm, resume_from_checkpoint=resume, **options
    )
    return len(made.train())


@pytest.mark.parametrize("algorithm", list(runs.ALGORITHMS))
def test_X01_killed_and_resumed_is_the_run_that_was_never_stopped(straight, tmp_path, algorithm):
    """Killed in the fifth rollout: the checkpoint of update 3 and rows up to 4 are there."""
    reward = runs.Killer(calls=8)  # three evaluations and four rollouts went well
    status = processes.run(train_in_child, tmp_path / "run", reward, algorithm)
    assert status == (None, -signal.SIGKILL)
    assert checkpoints(tmp_path / "run") == ["checkpoint-000003"]
    assert len(runs.rows(tmp_path / "run")) == 4
    made, rows = go_on(tmp_path / "run", algorithm)
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert_same_end(tmp_path / "run", straight / algorithm)
    stale = [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]
    assert stale == []


def test_X01_a_prefix_critic_is_resumed_as_well(tmp_path):
    def prefixes(completions):
        return runs.score(completions)

    prefixes.scores_prefixes = True
    prefixes.__name__ = "score"
    trainer(tmp_path / "a", reward=prefixes, updates=4).train()
    trainer(tmp_path / "b", reward=prefixes, updates=2).train()
    trainer(tmp_path / "b", reward=prefixes, updates=4, resume_from_checkpoint="auto").train()
    assert_same_end(tmp_path / "a", tmp_path / "b", 4)
    assert ("value_head.safetensors", "sums") in tensors(tmp_path / "b")


def test_X01_a_run_can_be_made_longer(straight, tmp_path):
    trainer(tmp_path / "run", updates=3, evals=runs.HELD_OUT, eval_steps=2).train()
    go_on(tmp_path / "run")
    one, other = tensors(tmp_path / "run"), tensors(straight / "trpo")
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert [r["policy/checksum"] for r in runs.rows(tmp_path / "run")] == [
        r["policy/checksum"] for r in runs.rows(straight / "trpo")
    ]


def test_a_critic_that_holds_nothing_leaves_no_file(tmp_path):
    rloo = trpo_lm.training.trainer.PPO(
        advantage="leave_one_out", epochs=1, minibatches=1, beta=0.0
    )
    trainer(tmp_path / "a", algorithm=rloo, updates=4, save_steps=2).train()
    assert not list((tmp_path / "a").rglob("value_head*"))
    trainer(tmp_path / "b", algorithm=rloo, updates=2).train()
    trainer(tmp_path / "b", algorithm=rloo, updates=4, resume_from_checkpoint="auto").train()
    assert_same_end(tmp_path / "a", tmp_path / "b", 4)


@pytest.mark.parametrize("stop", [3, 7])
def test_X02_the_next_prompts_are_those_of_the_straight_run(tmp_path, stop):
    """7 prompts, 4 an update: an epoch ends within updates 2, 4 and 6, and exactly after 7."""
    seen = {}

    def watch(name):
        def reward(prompts, completions):
            seen.setdefault(name, []).append(tuple(prompts))
            return runs.score(completions)

        reward.__name__ = "score"
        return reward

    trainer(tmp_path / "a", reward=watch("a"), updates=9, save_steps=0).train()
    trainer(tmp_path / "b", reward=watch("b"), updates=stop, save_steps=0).train()
    trainer(
        tmp_path / "b", reward=watch("b"), updates=9, save_steps=0, resume_from_checkpoint="auto"
    ).train()
    assert seen["a"] == seen["b"]
    drawn = [p for batch in seen["a"] for p in batch[::2]]  # two completions each
    epochs = [drawn[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == sorted(runs.PROMPTS) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.slow
def test_X03_twenty_kills_at_random_times_end_in_the_same_parameters(straight, tmp_path):
    folder, when = tmp_path / "run", random.Random(5)
    for _ in range(20):
        child = processes.Running(train_in_child, (folder, runs.score, "trpo", "auto"))
        time.sleep(when.uniform(0.1, 1.5))
        child.kill()
        child.process.join(60)
    assert processes.run(train_in_child, folder) == (True, 6)
    assert_same_end(folder, straight / "trpo")


# ---------------------------------------------------------------- X06: other settings


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"algorithm": trpo_lm.training.trainer.TRPO(max_kl=0.01)}, "max_kl .*0.05 .*0.01"),
        ({"data": [*runs.PROMPTS[:-1], "w1"]}, "dataset "),
        ({"seed": 7}, "seed .*0 .*7"),
        ({"peft": tiny.lora(r=2)}, r"adapter.r .*1 .*2"),
        ({"temperature": 0.7}, "temperature .*1.0 .*0.7"),
        ({"reward": lambda completions: runs.score(completions)}, "reward_funcs .*score"),
    ],
)
def test_X06_other_settings_are_shown_and_refused(tmp_path, change, told):
    trainer(tmp_path, updates=1).train()
    before = files(tmp_path)
    with pytest.raises(TrpoLMError, match=told) as caught:
        trainer(tmp_path, updates=2, resume_from_checkpoint="auto", **change).train()
    assert caught.value.exit_code == 2
    assert "--allow_config_change" in caught.value.hint
    assert files(tmp_path) == before


def test_X06_what_is_allowed_may_differ_and_is_said(tmp_path, capsys):
    trainer(tmp_path, updates=1).train()
    options = {"resume_from_checkpoint": "auto", "updates": 2, "seed": 7}
    trainer(tmp_path, allow_config_change="seed", **options).train()
    assert "not bit-exact" in capsys.readouterr().out
    assert [row["update"] for row in runs.rows(tmp_path)] == [1, 2]


def test_X06_an_adapter_of_another_shape_is_an_error_and_not_a_traceback(tmp_path):
    trainer(tmp_path, updates=1).train()
    with pytest.raises(TrpoLMError, match="adapter does not fit"):
        trainer(
            tmp_path, updates=2, peft=tiny.lora(r=2), resume_from_checkpoint="auto",
            allow_config_change="adapter.r",
        ).train()  # fmt: skip


def test_X06_another_critic_and_algorithm_start_from_nothing_where_allowed(tmp_path):
    trainer(tmp_path, updates=1).train()
    ppo = runs.ALGORITHMS["ppo"]()
    with pytest.raises(TrpoLMError) as caught:
        trainer(tmp_path, updates=2, algorithm=ppo, resume_from_checkpoint="auto").train()
    allowed = caught.value.hint.split()[-1]
    trainer(
        tmp_path, updates=2, algorithm=ppo, resume_from_checkpoint="auto",
        allow_config_change=allowed,
    ).train()  # fmt: skip
    assert len(runs.rows(tmp_path)) == 2


# ---------------------------------------------------------------- X08: signals


def stop_in(monkeypatch, place, signum, calls):
    """Send ourselves a signal in the `calls`-th pass through a place of an update."""
    left = [calls]

    def and_stop(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signum)
            return function(*args, **kwargs)

        return wrapped

    module, name = {
        "rollout": (trpo_lm.training.trainer.TokenMDP, "_generate"),
        "cg": (trpo_lm.algorithms.trpo, "conjugate_gradient"),
        "line search": (trpo_lm.algorithms.trpo, "measure_at"),
        "ppo step": (trpo_lm.training.trainer.PPO, "_gradient"),
        "critic": (trpo_lm.training.trainer, "returns"),
        "evaluate": (trpo_lm.training.trainer.Trainer, "evaluate"),
        "record": (trpo_lm.training.trainer, "append_json_line"),
        "save": (trpo_lm.training.checkpoint, "save_settings"),
    }[place]
    monkeypatch.setattr(module, name, and_stop(getattr(module, name)))


@pytest.mark.parametrize(
    ("place", "signum", "calls"),
    [
        ("rollout", signal.SIGINT, 6),  # two evaluations, updates 1 to 3, update 4
        ("cg", signal.SIGTERM, 4),
        ("line search", signal.SIGINT, 7),
        ("ppo step", signal.SIGTERM, 15),
        ("critic", signal.SIGINT, 4),
        ("evaluate", signal.SIGINT, 3),
        ("record", signal.SIGTERM, 20),
        ("save", signal.SIGINT, 2),
    ],
)
def test_X08_a_signal_rolls_back_saves_and_can_be_resumed(
    straight, tmp_path, monkeypatch, place, signum, calls
):
    algorithm = "ppo" if place == "ppo step" else "trpo"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    options = {"algorithm": algorithm, "evals": runs.HELD_OUT, "eval_steps": 2}
    made = trainer(tmp_path, **options)
    with monkeypatch.context() as patch:
        stop_in(patch, place, signum, calls)
        with pytest.raises(Interrupted) as caught:
            made.train()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert caught.value.exit_code == 128 + signum
    done = made.update
    assert 0 < done < 6
    assert f"saved checkpoint-{done:06d}; go on with" in str(caught.value)
    assert checkpoints(tmp_path)[-1] == f"checkpoint-{done:06d}"
    rows = runs.rows(tmp_path)
    assert [row["update"] for row in made.rows] == list(range(1, done + 1))
    assert made.policy.parameters.checksum() == checksum(tmp_path)
    assert rows[done - 1]["policy/checksum"] == checksum(tmp_path)
    go_on(tmp_path, algorithm)
    assert_same_end(tmp_path, straight / algorithm)


def test_X08_before_the_first_update_there_is_a_checkpoint_too(straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in(patch, "critic", signal.SIGINT, 1)
        with pytest.raises(Interrupted, match="saved checkpoint-000000"):
            trainer(tmp_path, evals=runs.HELD_OUT, eval_steps=2).train()
    go_on(tmp_path)
    assert_same_end(tmp_path, straight / "trpo")


def stop_twice(folder):
    """Run in a child: SIGINT in the second rollout, and again while its checkpoint is written."""
    real = trpo_lm.training.checkpoint.save_settings

    def again(*args):
        if args[0].parent.name.startswith(".tmp"):
            os.kill(os.getpid(), signal.SIGINT)
        real(*args)

    trpo_lm.training.checkpoint.save_settings = again
    return train_in_child(folder, runs.Killer(3, signal.SIGINT), evals=None)


def test_X08_a_second_signal_stops_at_once_and_corrupts_nothing(tmp_path):
    assert processes.run(stop_twice, tmp_path) == (None, -signal.SIGINT)
    assert checkpoints(tmp_path) == []
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    trainer(tmp_path, updates=2, resume_from_checkpoint="auto").train()
    assert checkpoints(tmp_path) == ["checkpoint-000002"]
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- memory that is full


def full_in(monkeypatch, owner, name, calls):
    """Let memory run out in some passes, by number, through a place of an update."""
    passes, real = [0], getattr(owner, name)

    def wrapped(*args, **kwargs):
        passes[0] += 1
        if passes[0] in calls:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


PLACES = {
    "rollout": (trpo_lm.training.trainer.TokenMDP, "_generate", 5),
    "fisher": (trpo_lm.algorithms.trpo, "fisher", 4),
    "line search": (trpo_lm.algorithms.trpo, "measure_at", 7),
    "critic": (trpo_lm.training.trainer, "returns", 4),
    "evaluate": (trpo_lm.training.trainer.Trainer, "_evaluate", 2),
}


@pytest.mark.parametrize("place", list(PLACES))
def test_memory_that_is_full_once_halves_the_micro_batch_and_changes_no_result(
    straight, tmp_path, monkeypatch, capsys, place
):
    owner, name, call = PLACES[place]
    with monkeypatch.context() as patch:
        full_in(patch, owner, name, {call})
        made = trainer(tmp_path, evals=runs.HELD_OUT, eval_steps=2, micro_batch_size=64)
        made.train()
    assert made.micro_batch_size == 32  # still a whole batch of these runs: the same sums
    assert capsys.readouterr().out.count("out of memory: micro_batch_size is 32 now") == 1
    assert [r["policy/checksum"] for r in runs.rows(tmp_path)] == [
        r["policy/checksum"] for r in runs.rows(straight / "trpo")
    ]
    assert runs.rows(tmp_path) == runs.rows(straight / "trpo")


@pytest.mark.parametrize(("size", "calls"), [(64, {3, 4}), (1, {3})])
def test_memory_that_stays_full_ends_the_run_at_the_last_update(tmp_path, monkeypatch, size, calls):
    full_in(monkeypatch, trpo_lm.algorithms.trpo, "fisher", calls)
    with pytest.raises(TrpoLMError, match=r"memory of the device is full: tried to") as caught:
        trainer(tmp_path, micro_batch_size=size, save_steps=0).train()
    assert caught.value.exit_code == 3
    assert "lower micro_batch_size, fisher_completions" in caught.value.hint
    assert checkpoints(tmp_path) == ["checkpoint-000002"]
    assert runs.rows(tmp_path)[-1]["policy/checksum"] == checksum(tmp_path)


# ---------------------------------------------------------------- X09, X11, C06


def test_X09_a_finished_run_is_left_alone(straight, capsys):
    folder = straight / "trpo"
    before = files(folder)
    made, rows = go_on(folder)
    assert "already complete: 6 of 6 updates are done" in capsys.readouterr().out
    assert files(folder) == before
    assert len(rows) == 6


def test_X09_a_run_that_died_before_its_results_were_written_writes_them(straight, tmp_path):
    shutil.copytree(straight / "trpo", tmp_path / "run")
    for name in ("README.md", "adapter_model.safetensors"):
        (tmp_path / "run" / name).unlink()
    go_on(tmp_path / "run")
    assert (tmp_path / "run" / "README.md").is_file()
    assert_same_end(tmp_path / "run", straight / "trpo")


def test_X09_an_empty_folder_starts_fresh_and_says_so(tmp_path, capsys):
    trainer(tmp_path, updates=1, resume_from_checkpoint="auto").train()
    out = capsys.readouterr().out
    assert f"no checkpoint in {tmp_path}: starting from the beginning" in out
    assert "update 1/1" in out


def test_X04_a_damaged_checkpoint_named_explicitly_is_refused(tmp_path):
    trainer(tmp_path, updates=1).train()
    damaged = tmp_path / "checkpoint-000001"
    (damaged / "value_head.safetensors").unlink()
    with pytest.raises(TrpoLMError, match=r"value_head.safetensors is missing"):
        trainer(tmp_path, updates=2, resume_from_checkpoint=str(damaged)).train()


def test_X11_two_processes_on_one_folder(tmp_path):
    def second(completions):
        with pytest.raises(TrpoLMError) as caught:
            locked = processes.run(train_in_child, tmp_path)
            assert locked[0] is False
            raise TrpoLMError(locked[1][2])
        said.append(str(caught.value))
        return runs.score(completions)

    said = []
    trainer(tmp_path, reward=second, updates=1).train()
    assert f"is locked by pid {os.getpid()}" in said[0]
    assert not (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text("999999999\n")  # a dead process left it
    trainer(tmp_path, updates=2, reward=second, resume_from_checkpoint="auto",
            allow_config_change="reward_funcs").train()  # fmt: skip
    assert len(runs.rows(tmp_path)) == 2


def test_C06_a_folder_is_used_once(tmp_path):
    trainer(tmp_path, updates=1).train()
    before = files(tmp_path)
    with pytest.raises(TrpoLMError, match="is not empty") as caught:
        trainer(tmp_path, updates=1)
    assert "--overwrite_output_dir" in caught.value.hint
    assert files(tmp_path) == before
    trainer(tmp_path, updates=2, save_steps=1, overwrite_output_dir=True).train()
    assert [row["update"] for row in runs.rows(tmp_path)] == [1, 2]
    assert checkpoints(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]


# ---------------------------------------------------------------- on a terminal


def start_recipe(folder, *more):
    command = [
        sys.executable, "-u", str(ROOT / "recipes" / "sentiment.py"), "--output_dir", str(folder),
        "--updates", "4", "--prompts_per_update", "8", "--eval_prompts", "8",
        "--fisher_completions", "8", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_X08_ctrl_c_on_the_recipe_and_on_to_the_end(tmp_path):
    run = start_recipe(tmp_path / "run")
    for line in run.stdout:
        if line.startswith("update 2/4"):
            run.send_signal(signal.SIGINT)
            break
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 130
    saved = re.search(
        r"saved checkpoint-00000(\d); go on with --resume_from_checkpoint auto", errors
    )
    assert saved and saved[1] in "23"  # the third update may be done before the signal comes
    assert "Traceback" not in errors + out and "it/s]" not in errors
    run = start_recipe(tmp_path / "run", "--resume_from_checkpoint", "auto")
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert errors == ""
    shown = [line.split()[1] for line in out.splitlines() if line.startswith("update ")]
    assert shown == [f"{update}/4" for update in range(int(saved[1]) + 1, 5)]
    assert "held-out prompts, before and after" in out
    assert (tmp_path / "run" / "plots" / "overview.png").is_file()
