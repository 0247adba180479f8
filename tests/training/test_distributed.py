"""Several processes with a real gloo group: cases D01-D05, D07, D08 and the rest of X08."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import tiny
import torch

import runs
from runs import checkpoints, checksum, trainer
from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.core.advantages import returns
from trpo_lm.lm.critic import PrefixCritic, ValueHead
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.rollout import Batch
from trpo_lm.training.ranks import Ranks

pytestmark = pytest.mark.distributed
HERE = Path(__file__).resolve().parents[1]


def train(folder, *, reward=runs.score, **options):
    """Run on this rank and return what must be the same on all."""
    return trained(trainer(folder, reward=reward, **options))


def trained(made):
    os.fsync = lambda descriptor: None
    made.train()
    return made.policy.parameters.checksum(), len(made.rows), made.completions


def at_rank(rank, then, otherwise=runs.score):
    return then if int(os.environ["RANK"]) == rank else otherwise


def same(answers):
    """Return what all ranks returned, once it is the same."""
    assert all(ok for ok, _ in answers), answers
    assert len({repr(value) for _, value in answers}) == 1, answers
    return answers[0][1]


# ---------------------------------------------------------------- D01: sums


def share(rollout, rows):
    """Return some rows of a rollout, as if they were all there is."""

    def pick(values):
        return [values[i] for i in rows] if isinstance(values, list) else values[rows]

    scores = rollout.scores
    return replace(
        rollout,
        prompts=pick(rollout.prompts), completions=pick(rollout.completions), columns={},
        groups=pick(rollout.groups), input_ids=pick(rollout.input_ids),
        attention_mask=pick(rollout.attention_mask), action_mask=pick(rollout.action_mask),
        truncated=pick(rollout.truncated), rewards=pick(rollout.rewards),
        scores=replace(
            scores, score=pick(scores.score), valid=pick(scores.valid),
            terminal=pick(scores.terminal), columns={},
        ),
    )  # fmt: skip


PARTS = [range(8), range(8, 14)]  # 4 prompts and 3, two completions each, of unequal length


def updates_of(algorithm, prefix, dtype):
    """Make two updates on this rank's part of the same completions; return all that came of it."""
    ranks = Ranks()
    policy = tiny.policy(spread=0.3, dtype=dtype)
    state = algorithm.init_state(policy.parameters)
    critic = PrefixCritic(5) if prefix else ValueHead(8)
    mdp = tiny.mdp(lambda completions: [None if c == "w5" else len(c) for c in completions])
    told = []
    for update in range(2):
        rollout = mdp.rollout(policy, runs.PROMPTS, completions_per_prompt=2, seed=("D01", update))
        if ranks.count > 1:
            rollout = share(rollout, list(PARTS[ranks.rank]))
        batch = Batch.from_rollout(policy, rollout)
        mask, valid = rollout.action_mask, rollout.scores.valid
        rewards = algorithm.rewards(batch, state)
        targets = returns(rewards, mask, gamma=1.0)
        scores = rollout.input_ids[:, -mask.shape[1] :].double() * mask / 13
        values = critic.values(batch.hidden, scores, mask, untrained=0.5)
        A = algorithm.advantages(rollout, rewards, values, ranks.reduce)
        objective = BatchObjective(policy, batch, A, ranks.reduce, ("D01", update))
        state, row = algorithm.update(objective, state)
        critic.fit(batch.hidden, scores, mask, targets, valid, ranks.reduce)
        told.append([row["trust_region/kl"], row["trust_region/ref_kl_after"]])
        told[-1] += [row.get("line_search/trials"), row.get("line_search/accepted")]
    theta = policy.parameters.vector().tolist()
    return theta, told, {k: v.tolist() for k, v in critic.state().items()}


@pytest.mark.parametrize(
    ("algorithm", "prefix"),
    [
        (TRPO(max_kl=0.05, max_ref_kl=0.5, fisher_completions=14, lam=0.9), False),
        (TRPO(max_kl=0.05, max_ref_kl=None, fisher_completions=14, lam=0.5), True),
        (PPO(learning_rate=0.02, epochs=2, minibatches=1, lam=0.9, beta=0.1), False),
    ],
)
def test_D01_two_processes_take_the_step_of_one(algorithm, prefix):
    # float64: what is left is the order of sums alone; CG amplifies float32's by its condition
    alone = updates_of(algorithm, prefix, torch.float64)
    answers = processes.ranks(2, updates_of, algorithm, prefix, torch.float64)
    theta, told, critic = same(answers)
    close = pytest.approx(torch.tensor(alone[0]).numpy(), abs=1e-6)
    assert torch.tensor(theta).numpy() == close
    for one, two in zip(alone[1], told, strict=True):
        assert two == pytest.approx(one, abs=1e-6)
    for name, values in alone[2].items():
        assert torch.allclose(torch.tensor(critic[name]), torch.tensor(values), atol=1e-6), name


# ---------------------------------------------------------------- D02, D03: whole runs


def test_D02_seven_prompts_on_two_ranks(tmp_path):
    options = {"prompts_per_update": 7, "updates": 3, "evals": runs.HELD_OUT}
    checksum_, updates, count = same(
        processes.ranks(2, train_with, tmp_path / "two", options, None)
    )
    assert (updates, count) == (3, 42)
    assert checksum_ == checksum(tmp_path / "two")
    lines = [json.loads(line) for line in runs.completions(tmp_path / "two").splitlines()]
    for update in (1, 2, 3):
        prompts = sorted(line["prompt"] for line in lines if line["update"] == update)
        assert prompts == sorted(runs.PROMPTS * 2)  # each once, with its two completions
    first = runs.rows(tmp_path / "two")[0]
    assert first["objective/completion_length"] == first["tokens"] / 14
    for row in runs.rows(tmp_path / "two"):
        scores = [line["score"] for line in lines if line["update"] == row["update"]]
        assert row["objective/score_mean"] == pytest.approx(sum(scores) / 14)
    assert runs.rows(tmp_path / "two")[-1]["objective/eval_score_mean"] is not None


def train_with(folder, options, special):
    """Train with a reward that is special on one rank: (rank, name of a reward below)."""
    reward = runs.score if special is None else at_rank(special[0], REWARDS[special[1]])
    calls = []

    def score(completions, log_metric):
        calls.append(1)
        log_metric("rank", float(os.environ.get("RANK", 0)))
        if len(calls) == 1:
            return runs.score(completions)
        if reward is not runs.score:
            (folder / "special").touch()
        return reward(completions)

    try:
        return train(folder, reward=score, **options)
    finally:
        (folder / f"end{os.environ.get('RANK', 0)}").touch()


def abstain(completions):
    return [None] * len(completions)


def louder(completions):
    return [10 * x - 3 for x in runs.score(completions)]


def broken(completions):
    raise KeyError("label")


def infinite(completions):
    return [float("inf")] * len(completions)


REWARDS = {"abstain": abstain, "louder": louder, "broken": broken, "infinite": infinite}


@pytest.mark.parametrize("name", ["abstain", "louder"])
def test_D02_D03_ranks_that_see_different_rewards_decide_alike(tmp_path, name):
    options = {"updates": 4, "prompts_per_update": 5}
    answers = processes.ranks(2, train_with, tmp_path, options, (1, name))
    assert same(answers)[0] == checksum(tmp_path)
    rows = runs.rows(tmp_path)
    assert [row["skipped"] for row in rows] == [None] * 4
    assert all(row["rank"] == 0.5 for row in rows)  # logged by both, averaged
    said = [json.loads(line)["score"] for line in runs.completions(tmp_path).splitlines()]
    assert said.count(None) == (12 if name == "abstain" else 0)


def test_D03_parameters_that_differ_are_noticed(tmp_path):
    answers = processes.ranks(2, train_apart, tmp_path)
    for ok, (kind, code, message) in answers:
        assert (ok, kind, code) == (False, "RunFault", 3)
        assert "the ranks' parameters differ (update 2)" in message
    assert checkpoints(tmp_path) == ["checkpoint-000001"]


def train_apart(folder):
    made = trainer(folder, updates=3, save_steps=1)
    real = made.critic.fit

    def fit(*args):
        if made.updates_done == 1 and made.ranks.rank == 1:
            with torch.no_grad():
                made.policy.parameters.tensors[0][0, 0] += 1e-7
        real(*args)

    made.critic.fit = fit
    made.train()


# ---------------------------------------------------------------- D04, X08, C06: shared ends


@pytest.mark.parametrize(("rank", "name"), [(0, "broken"), (1, "infinite")])
def test_D04_one_ranks_exception_is_everyones(tmp_path, rank, name):
    answers = processes.ranks(2, train_with, tmp_path, {"save_steps": 0}, (rank, name))
    times = [(tmp_path / f).stat().st_mtime for f in ("special", "end0", "end1")]
    assert max(times) - times[0] < 10
    what = "raised KeyError: 'label'" if name == "broken" else "returned inf for sample 0"
    messages = {message for _, (_, _, message) in answers}
    assert len(messages) == 1
    assert what in messages.pop()
    for ok, (kind, code, message) in answers:
        assert (ok, kind, code) == (False, "RunFault", 3)
        assert f"rank {rank}" in message and "saved checkpoint-000001" in message
    assert runs.rows(tmp_path)[0]["policy/checksum"] == checksum(tmp_path)


def train_full(folder, rank, times):
    """The memory of a rank is full in its first Fisher products."""
    made = trainer(folder, updates=2, save_steps=0)
    left = [times]

    def full():
        left[0] -= 1
        if left[0] > 0:
            runs.in_step(made, 1, 1, full)
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    if made.ranks.rank == rank:
        runs.in_step(made, 1, 1, full)
    return trained(made)


@pytest.mark.parametrize("rank", [0, 1])
def test_D04_memory_that_is_full_on_one_rank_only(tmp_path, rank):
    same(processes.ranks(2, train_full, tmp_path / "a", rank, 1))
    log = tmp_path / "log"
    log.mkdir()
    for ok, (kind, code, message) in processes.ranks(
        2, train_full, tmp_path / "b", rank, 99, logs=log
    ):
        assert (ok, kind, code) == (False, "RunFault", 3)
        assert "the device is out of memory: tried to allocate 2 GiB" in message
        assert f"rank {rank}" in message and "lower max_completion_length" in message
        assert "saved checkpoint-000000" in message
    assert "takes half as many tokens at once now" in (log / "rank0.log").read_text()
    assert "takes half as many tokens" not in (log / "rank1.log").read_text()


def train_late(folder, gone):
    """Rank 1 does not come to the update before rank 0 has given up."""
    made = trainer(folder, updates=2, ddp_timeout=20)

    def late():
        while made.ranks.rank == 1 and not gone.exists():
            time.sleep(0.1)

    made.stage.on_enter = runs.entering("update", 1, action=late)
    try:
        trained(made)
    finally:
        gone.touch()


def test_D07_a_rank_that_does_not_come_is_told_with_what_the_others_were_doing(tmp_path):
    answers = processes.ranks(2, train_late, tmp_path / "run", tmp_path / "gone")
    for rank, (ok, (kind, code, message)) in enumerate(answers):
        assert (ok, kind, code) == (False, "RunFault", 3)
        assert f"rank {rank} got no answer from the others" in message
        assert "(stage update)" in message
        assert "ddp_timeout" in message and "resume from the newest checkpoint" in message


def test_C06_a_mistake_that_rank_0_finds_is_everyones(tmp_path):
    (tmp_path / "notes.txt").touch()
    for ok, (kind, code, message) in processes.ranks(2, train_with, tmp_path, {}, None):
        assert (ok, kind, code) == (False, "TrpoLMError", 2)
        assert "is not empty: it holds notes.txt" in message and "rank 0" in message


def test_every_rank_needs_a_prompt(tmp_path):
    options = {"evals": ["w1"], "updates": 1}
    for ok, (_, code, message) in processes.ranks(2, train_with, tmp_path, options, None):
        assert (ok, code) == (False, 2) and "1 prompts cannot be shared by 2" in message


def train_until_told(folder, signalled):
    """Rank `signalled` gets SIGTERM in the middle of its third update."""
    reward = at_rank(signalled, runs.Killer(3, signal.SIGTERM))
    return train(folder, reward=reward, save_steps=0, updates=4)


@pytest.mark.parametrize("signalled", [0, 1])
def test_X08_a_signal_to_one_rank_stops_all_of_them_together(tmp_path, signalled):
    answers = processes.ranks(2, train_until_told, tmp_path / "a", signalled)
    for ok, (kind, code, message) in answers:
        assert (ok, kind, code) == (False, "Interrupted", 143)
        assert "saved checkpoint-000003" in message
    if signalled == 0:
        options = {"updates": 4, "save_steps": 0}
        went_on = options | {"resume_from_checkpoint": "auto"}
        same(processes.ranks(2, train_plain, tmp_path / "a", went_on))
        same(processes.ranks(2, train_plain, tmp_path / "b", options))
        runs.assert_same_end(tmp_path / "a", tmp_path / "b", 4)


def train_plain(folder, options):
    return train(folder, **options)


# ---------------------------------------------------------------- D08


def test_D08_saved_on_two_ranks_and_resumed_on_one(tmp_path):
    same(processes.ranks(2, train_plain, tmp_path, {"updates": 1}))
    options = {"updates": 2, "resume_from_checkpoint": "auto"}
    ok, (kind, code, message) = processes.run(train_plain, tmp_path, options)
    assert (ok, kind, code) == (False, "TrpoLMError", 2)
    assert "world_size  2" in message and "--allow_config_change world_size" in message
    log = tmp_path.parent / "log"
    options["allow_config_change"] = "world_size"
    assert processes.run(train_plain, tmp_path, options, log=log)[0]
    assert "not bit-exact" in log.read_text()


# ---------------------------------------------------------------- the end of a process


def joined_after_exit():
    Ranks().wait()
    atexit._run_exitfuncs()
    return torch.distributed.is_initialized()


def test_the_process_group_ends_before_python_does():
    # A gloo thread left running aborts one exit in five, and the launcher calls the run failed.
    assert same(processes.ranks(2, joined_after_exit)) is False


# ---------------------------------------------------------------- the launcher itself

SCRIPT = """
import faulthandler, sys
faulthandler.dump_traceback_later(1000, exit=True)
sys.path.insert(0, {here!r})
import os, pathlib, runs
killed = runs.Killer(5) if os.environ.get("RANK") == {rank!r} else runs.score
killed.__name__ = "score"
made = runs.trainer(pathlib.Path({folder!r}), reward=killed, prompts_per_update=7, save_steps=2,
                    resume_from_checkpoint="auto", shard_base={shard})
made.train()
print("rank", os.environ["RANK"], "ends with", made.policy.parameters.checksum(), flush=True)
"""


ACCELERATE = ["accelerate.commands.launch", "--mixed_precision=no", "--dynamo_backend=no",
              "--main_process_port={port}", "--num_processes=2"]  # fmt: skip
TORCHRUN = ["torch.distributed.run", "--master_port={port}"]
LAUNCHERS = {
    "accelerate": [*ACCELERATE, "--multi_gpu", "--num_machines=1"],
    "torchrun": [*TORCHRUN, "--nproc_per_node=2"],
    "accelerate on the cpu": [*ACCELERATE, "--cpu"],
    "accelerate with a config": [*ACCELERATE, "--config_file={config}"],
}
NODES = {
    "accelerate": [*ACCELERATE, "--multi_gpu", "--num_machines=2", "--machine_rank={node}",
                   "--main_process_ip=127.0.0.1"],
    "torchrun": [*TORCHRUN, "--nproc_per_node=1", "--nnodes=2", "--node_rank={node}",
                 "--master_addr=127.0.0.1"],
}  # fmt: skip
CONFIG = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_machines: 1
num_processes: 2
use_cpu: true
"""


def start(words, script, log, **places):
    """Start a launcher; what it prints goes to the log."""
    command = [sys.executable, "-m", *(word.format(**places) for word in words), str(script)]
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)


def write_script(log, folder, rank, *, shard=False):
    script, config = log.with_suffix(".py"), log.with_suffix(".yaml")
    script.write_text(SCRIPT.format(here=str(HERE), rank=rank, folder=str(folder), shard=shard))
    config.write_text(CONFIG)
    return script


def launch(launcher, folder, rank, log):
    script = write_script(log, folder, rank)
    places = {"port": processes.free_port(), "config": log.with_suffix(".yaml")}
    return start(LAUNCHERS[launcher], script, log, **places).wait(300)


def alive(script):
    """Return the processes whose command line holds the script."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(script).encode() in words:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_D02_D05_under_accelerate_launch_with_a_rank_that_is_killed(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "launch.log"
    assert launch("accelerate", folder, "1", log) != 0
    assert alive(log.with_suffix(".py")) == []
    assert checkpoints(folder)[-1] == "checkpoint-000004"
    assert launch("torchrun", folder, "none", log) == 0
    ends = {line.split()[-1] for line in log.read_text().splitlines() if "ends with" in line}
    assert len(ends) == 1 and ends == {checksum(folder)}
    assert len([x for x in log.read_text().splitlines() if "ends with" in x]) == 2
    assert [row["update"] for row in runs.rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert [row["completions"] for row in runs.rows(folder)] == list(range(14, 85, 14))
    assert log.read_text().count("update 6/6") == 1  # nothing from the other rank


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "shard"), [("accelerate", True), ("torchrun", False)])
def test_two_launchers_are_two_nodes_of_one_run(tmp_path, launcher, shard):
    folder, port = tmp_path / "run", processes.free_port()
    script = write_script(tmp_path / "launch.log", folder, "none", shard=shard)
    logs = [tmp_path / f"node{node}.log" for node in range(2)]
    nodes = [
        start(NODES[launcher], script, log, port=port, node=node) for node, log in enumerate(logs)
    ]
    codes = [node.wait(300) for node in nodes]
    told = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(told)
    for node, text in enumerate(told):
        assert f"rank {node} ends with {checksum(folder)}" in text
    assert "update 6/6" in told[0] and "update" not in told[1]
    assert ("forward (exact, nothing is kept; the base is sharded" in told[0]) == shard
    assert [row["completions"] for row in runs.rows(folder)] == list(range(14, 85, 14))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate on the cpu", "accelerate with a config"])
def test_a_launcher_that_starts_one_process_instead_of_two_is_noticed(tmp_path, launcher):
    log = tmp_path / "launch.log"
    assert launch(launcher, tmp_path / "run", "none", log) != 0
    assert "launched for several processes, but only one started" in log.read_text()
    assert "torchrun --nproc_per_node N" in log.read_text()


# ---------------------------------------------------------------- B55: what the ranks were given


def differing(folder, kind):
    """Start a run that rank 1 was given differently."""
    rank = int(os.environ["RANK"])
    options = {"updates": 2, "evals": runs.HELD_OUT}
    if rank == 1:
        tokenizer = tiny.tokenizer(chat_template="x") if kind == "tokenizer" else None
        options |= {
            "base": {"model": tiny.build(seed=1)}, "adapter": {"peft": tiny.lora(r=2)},
            "dataset": {"data": [*runs.PROMPTS[:-1], "w1"]}, "updates": {"updates": 3},
            "save_steps": {"save_steps": 1}, "eval_steps": {"eval_steps": 1},
            "held_out": {"evals": runs.HELD_OUT[:2]}, "no held_out": {"evals": None},
            "max_kl": {"algorithm": TRPO(max_kl=0.01)}, "algorithm": {"algorithm": "ppo"},
            "seed": {"seed": 1},
        }.get(kind, {})  # fmt: skip
        if tokenizer is not None:
            runs.tiny.tokenizer = lambda: tokenizer
    return trained(trainer(folder, **options))


@pytest.mark.parametrize(
    ("kind", "told"),
    [("base", "digests.base"), ("adapter", "adapter.r"), ("dataset", "dataset"),
     ("updates", "updates"), ("save_steps", "save_steps"), ("eval_steps", "eval_steps"),
     ("held_out", "held_out"), ("no held_out", "held_out"), ("max_kl", "max_kl"),
     ("algorithm", "algorithm"), ("tokenizer", "digests.tokenizer"), ("seed", "seed")],
)  # fmt: skip
def test_B55_ranks_that_were_given_other_things_end_before_the_first_rollout(tmp_path, kind, told):
    answers = processes.ranks(2, differing, tmp_path, kind)
    for ok, failure in answers:
        assert not ok and failure[:2] == ("TrpoLMError", 2), answers
        assert f"\n  {told}: " in failure[2] and "rank 1" in failure[2]
    assert not (tmp_path / "metrics.jsonl").exists()
