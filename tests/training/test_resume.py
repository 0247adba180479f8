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
import tiny
import torch

import runs
from runs import assert_same_end, checkpoints, checksum, tensors, trainer
from trpo_lm import PPO, TRPO
from trpo_lm.errors import Interrupted, TrpoLMError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six updates that nothing disturbed, with each algorithm."""
    folder = tmp_path_factory.mktemp("straight")
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


def train_in_child(folder, reward=runs.score, algorithm="trpo", on_enter=None, **options):
    """Start or resume in a process of its own; return the number of all updates."""
    os.fsync = lambda descriptor: None
    options = {"evals": runs.HELD_OUT, "eval_steps": 2} | options
    made = trainer(
        folder, reward=reward, algorithm=algorithm, resume_from_checkpoint="auto", **options
    )
    made.stage.on_enter = on_enter or made.stage.on_enter
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
    rloo = PPO(advantage="leave_one_out", epochs=1, minibatches=1, beta=0.0)
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
        child = processes.Running(train_in_child, (folder, runs.score))
        time.sleep(when.uniform(0.1, 1.5))
        child.kill()
        child.process.join(60)
    assert processes.run(train_in_child, folder) == (True, 6)
    assert_same_end(folder, straight / "trpo")


# ---------------------------------------------------------------- X06: other settings


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"algorithm": TRPO(max_kl=0.01)}, "max_kl .*0.05 .*0.01"),
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


def signalling(signum):
    return lambda: os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    ("algorithm", "stage", "signum", "calls", "done"),
    [
        ("trpo", "rollout", signal.SIGINT, 4, 3),
        ("trpo", "measure", signal.SIGTERM, 2, 1),
        ("trpo", "values", signal.SIGINT, 4, 3),
        ("trpo", "critic", signal.SIGTERM, 5, 4),  # the policy has moved
        ("trpo", "evaluate", signal.SIGINT, 3, 3),
        ("trpo", "record", signal.SIGTERM, 3, 3),  # held until the update is complete
        ("trpo", "checkpoint/state", signal.SIGINT, 1, 3),  # likewise
        ("ppo", "update", signal.SIGTERM, 2, 1),
    ],
)
def test_X08_a_signal_rolls_back_saves_and_can_be_resumed(
    straight, tmp_path, algorithm, stage, signum, calls, done
):
    made = trainer(tmp_path, algorithm=algorithm, evals=runs.HELD_OUT, eval_steps=2)
    made.stage.on_enter = runs.entering(stage, calls, action=signalling(signum))
    assert_stopped_and_resumed(made, signum, done, tmp_path, straight / algorithm)


@pytest.mark.parametrize(
    ("algorithm", "signum", "update", "call"),
    [
        ("trpo", signal.SIGTERM, 2, 2),  # conjugate gradient
        ("trpo", signal.SIGINT, 4, "moved"),  # line search
        ("ppo", signal.SIGTERM, 4, "moved"),
    ],
)
def test_X08_a_signal_within_a_step_rolls_it_back(
    straight, tmp_path, algorithm, signum, update, call
):
    made = trainer(tmp_path, algorithm=algorithm, evals=runs.HELD_OUT, eval_steps=2)
    runs.in_step(made, update, call, signalling(signum))
    assert_stopped_and_resumed(made, signum, update - 1, tmp_path, straight / algorithm)


def assert_stopped_and_resumed(made, signum, done, folder, straight):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        made.train()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert caught.value.exit_code == 128 + signum
    assert made.updates_done == done
    assert f"saved checkpoint-{done:06d}; resume with" in str(caught.value)
    assert checkpoints(folder)[-1] == f"checkpoint-{done:06d}"
    rows = runs.rows(folder)
    assert [row["update"] for row in made.rows] == list(range(1, done + 1))
    assert made.policy.parameters.checksum() == checksum(folder)
    assert rows[done - 1]["policy/checksum"] == checksum(folder)
    go_on(folder, straight.name)
    assert_same_end(folder, straight)


def test_X08_before_the_first_update_there_is_a_checkpoint_too(straight, tmp_path):
    made = trainer(tmp_path, evals=runs.HELD_OUT, eval_steps=2)
    made.stage.on_enter = runs.entering("values", 1, action=signalling(signal.SIGINT))
    with pytest.raises(Interrupted, match="saved checkpoint-000000"):
        made.train()
    go_on(tmp_path)
    assert_same_end(tmp_path, straight / "trpo")


def stop_twice(folder):
    """Run in a child: SIGINT in the second rollout, and again while its checkpoint is written."""
    again = runs.entering("checkpoint/state", 1, action=signalling(signal.SIGINT))
    return train_in_child(folder, runs.Killer(3, signal.SIGINT), on_enter=again, evals=None)


def test_X08_a_second_signal_stops_at_once_and_corrupts_nothing(tmp_path):
    assert processes.run(stop_twice, tmp_path) == (None, -signal.SIGINT)
    assert checkpoints(tmp_path) == []
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    trainer(tmp_path, updates=2, resume_from_checkpoint="auto").train()
    assert checkpoints(tmp_path) == ["checkpoint-000002"]
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- memory that is full


def full():
    raise torch.OutOfMemoryError("tried to allocate 2 GiB")


PLACES = {
    "rollout": 3,
    "values": 4,
    "critic": 5,
    "evaluate": 2,
    "fisher": (4, 1),
    "line search": (4, "moved"),
}


@pytest.mark.parametrize("place", list(PLACES))
def test_memory_that_is_full_once_halves_its_phase_and_changes_results_by_rounding_only(
    straight, tmp_path, capsys, place
):
    made = trainer(tmp_path, evals=runs.HELD_OUT, eval_steps=2)
    match PLACES[place]:
        case int(passes):
            made.stage.on_enter = runs.entering(place, passes, action=full)
        case update, call:
            runs.in_step(made, update, call, full)
    made.train()
    assert len(made.policy.room.limits) == 1
    assert capsys.readouterr().out.count("takes half as many tokens at once now") == 1
    found, expected = runs.rows(tmp_path), runs.rows(straight / "trpo")
    update = {"rollout": 3, "values": 4, "critic": 5, "evaluate": 3}.get(place, 4)
    assert found[: update - 1] == expected[: update - 1]
    for name in ("objective/score_mean", "trust_region/kl", "objective/ref_kl"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], 0.02)


@pytest.mark.parametrize("tokens", [None, 1])
def test_memory_that_stays_full_ends_the_run_at_the_last_update(tmp_path, tokens):
    made = trainer(tmp_path, micro_batch_tokens=tokens, save_steps=0)
    made.stage.on_enter = runs.entering("update", *range(3, 99), action=full)
    with pytest.raises(TrpoLMError, match=r"device is out of memory: tried to") as caught:
        made.train()
    assert caught.value.exit_code == 3
    assert "takes one completion at a time" in caught.value.what
    assert "lower max_completion_length" in caught.value.hint
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
        r"saved checkpoint-00000(\d); resume with --resume_from_checkpoint auto", errors
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
