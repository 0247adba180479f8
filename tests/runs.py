"""Whole runs on tiny models: what the trainer's tests share.

Nothing here depends on pytest, so that processes of their own can start runs too.
"""

import itertools
import json
import multiprocessing
import os
import signal

import tiny
import torch
from safetensors.torch import load_file

from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.config import TrainerConfig
from trpo_lm.training.trainer import Trainer

PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w0 w1 w2 w8 w7", "w7 w7", "w3 w0", "w8"]
HELD_OUT = ["w2 w1", "w6", "w0 w0 w4"]
ALGORITHMS = {
    "trpo": lambda: TRPO(max_kl=0.05, max_ref_kl=0.3, cg_iterations=4, fisher_completions=8),
    "ppo": lambda: PPO(learning_rate=0.05, epochs=2, minibatches=2, target_ref_kl=0.1),
}


def score(completions):
    """Small words are good, early ones most; no two completions of the tests are alike."""
    return [
        sum((9 - int(w[1:])) / (i + 2) for i, w in enumerate(c.split()) if w[0] == "w") / 9
        for c in completions
    ]


def config(folder, **options):
    options = {
        "updates": 6,
        "prompts_per_update": 4,
        "completions_per_prompt": 2,
        "max_completion_length": 5,
        "save_steps": 3,
    } | options
    return TrainerConfig(output_dir=str(folder), **options)


def trainer(folder, *, reward=score, algorithm="trpo", model=None, peft=None, data=PROMPTS,
            evals=None, callbacks=(), display=None, **options):  # fmt: skip
    made = ALGORITHMS[algorithm]() if isinstance(algorithm, str) else algorithm
    return Trainer(
        model or tiny.build(),
        reward,
        train_dataset=data,
        args=config(folder, **options),
        eval_dataset=evals,
        processing_class=tiny.tokenizer(),
        peft_config=peft or tiny.lora(),
        algorithm=made,
        callbacks=callbacks,
        display=display,
        plots=False,  # drawing takes longer than a tiny run
    )


def rows(folder):
    """Return the metrics without what the clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


def completions(folder):
    return (folder / "completions.jsonl").read_text()


def tensors(folder):
    """Return every tensor that a finished run or a checkpoint holds, by file and name."""
    return {
        (file.name, name): tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def checkpoints(folder):
    return sorted(p.name for p in folder.glob("checkpoint-*"))


def assert_same_end(a, b, update=6):
    """Two folders hold the same run, bit for bit."""
    assert rows(a) == rows(b)
    assert completions(a) == completions(b)
    for where in ("", f"checkpoint-{update:06d}"):
        one, other = tensors(a / where), tensors(b / where)
        assert one and one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key
    states = [
        json.loads((x / f"checkpoint-{update:06d}" / "trainer_state.json").read_text())
        for x in (a, b)
    ]
    assert states[0] == states[1]


def checksum(folder):
    """Return the newest checkpoint's checksum of the parameters."""
    newest = folder / checkpoints(folder)[-1] / "trainer_state.json"
    return json.loads(newest.read_text())["checksum"]


def entering(stage, *calls, action):
    """Return an `on_enter` that acts in some passes, by number, through a stage."""
    passes = [0]

    def on_enter(name):
        passes[0] += name == stage
        if name == stage and passes[0] in calls:
            action()

    return on_enter


def in_step(made, update, call, action):
    """Act at a sum over ranks inside the step of an update, which is past its stage's beginning.

    Args:
        made: The trainer.
        update: Which update.
        call: Number of the sum among those of M numbers, which are Fisher products in TRPO; or
            'moved', the first sum after the parameters moved.
        action: What to do; once.
    """
    reduce, theta = made.ranks.reduce, made.policy.parameters
    start, products = [], []

    def wrapped(tensor):
        if made.stage.name == "update" and made.updates_done + 1 == update:
            start.append(theta.checksum())
            products.extend([1] * (tensor.shape == (len(theta),)))
            if start[-1] != start[0] if call == "moved" else len(products) == call:
                made.ranks.reduce = reduce
                action()
        return reduce(tensor)

    made.ranks.reduce = wrapped


def in_child(action):
    """Run in a process of its own; return its exit code (negative: the signal that ended it)."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(600)
    return child.exitcode


def killed_at(k):
    """Return an `on_enter` that kills its process in the k-th stage."""
    stages = itertools.count(1)

    def on_enter(name):
        if next(stages) == k:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_enter


class Killer:
    """A reward that kills its own process, for good, the n-th time it is asked."""

    def __init__(self, calls, signum=signal.SIGKILL):
        self.left, self.signum = calls, signum
        self.__name__ = "score"

    def __call__(self, completions):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)
        return score(completions)
