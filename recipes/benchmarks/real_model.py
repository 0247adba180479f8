"""The cost of an update and of a whole loop on a real chat model: TRPO, PPO, and TRL's GRPO.

    python shared/bench/chat/smollm2.py LM        # or any causal LM with a chat template
    python recipes/benchmarks/real_model.py --model LM --dataset stories.jsonl --lengths 24 64 256
    python recipes/benchmarks/real_model.py --model LM --dataset sums_train.jsonl --lengths 24 \\
        --prompts 8 --each 8 --loop

TRPO first takes a step away from the reference, on completions of at most 24 tokens; the budget is
then where R stands, so that both distances are active. Every round times one TRPO update and one of
PPO (4 epochs x 4 minibatches) on the same batch; ratios are of the same round. Seconds are CPU
seconds of one thread. Peaks are the growth of resident memory beyond model and batch, in a process
of its own for each work. `--loop` times whole steps instead, sampling included, beside those of
TRL's GRPO on as many completions, if TRL is installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

import torch
from datasets import Dataset
from step_quality import collect
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from update_cost import Meter, alternate, high_water

from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO, TRPOState
from trpo_lm.comparison.trl_arms import trl_arguments
from trpo_lm.config import TrainerConfig, TRLSettings
from trpo_lm.lm.loading import default_lora
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.prompts import load_prompts
from trpo_lm.training.trainer import Trainer

WARM_KL, WARM_LENGTH = 0.5, 24  # nats and tokens of the step away from the reference
WORKS = ("trpo", "ppo")


def vowels(completions):
    """Return the share of vowels: a reward that costs nothing."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]


def trainer(a, length: int, algorithm, updates: int = 1) -> Trainer:
    """Return a trainer with default settings but for the batch."""
    args = TrainerConfig(
        output_dir=mkdtemp(), updates=updates, prompts_per_update=a.prompts,
        completions_per_prompt=a.each, max_completion_length=length, critic="value_head",
    )  # fmt: skip
    return Trainer(a.model, vowels, train_dataset=a.dataset, args=args, algorithm=algorithm)


def sampled(a, length: int) -> tuple[BatchObjective, TRPOState]:
    """Return the objective of a batch after a step, and what this has taught TRPO."""
    warm = trainer(a, min(length, WARM_LENGTH), TRPO(max_kl=WARM_KL, max_ref_kl=None))
    warm.train_step()
    made = trainer(a, length, TRPO(), 2)
    made.policy.parameters.restore(warm.policy.parameters.snapshot())
    made.updates_done = 1
    return collect(made, 1)[0], warm.algorithm_state


def works(objective: BatchObjective, state: TRPOState, epochs: int = 4) -> dict:
    """Return one update of each algorithm, undone after; TRPO's budget is what R is now."""
    theta = objective.theta
    start = theta.snapshot()
    trpo, ppo = TRPO(max_ref_kl=objective.reference_kl()[0]), PPO(learning_rate=1e-5, epochs=epochs)

    def run(rule, state):
        _, row = rule.update(objective, state)
        theta.restore(start)
        return row

    return {"trpo": lambda: run(trpo, state), "ppo": lambda: run(ppo, ppo.init_state(theta))}


def report(a, length: int) -> dict:
    """Measure updates on completions of one length."""
    objective, state = sampled(a, length)
    both, meter, rows = works(objective, state), Meter(), []

    def watched():
        with meter.watching():
            rows.append(both["trpo"]())

    seconds = alternate(both | {"trpo": watched}, a.repeats, warm=False)
    ratios = [x / y for x, y in zip(seconds["trpo"], seconds["ppo"], strict=True)]
    wanted = ("trust_region/case", "line_search/trials", "cg/iterations", "cg/product",
              "cg/completions", "cg/damping")  # fmt: skip
    return {
        "completions": len(objective.batch.rollout),
        "tokens": len(objective.batch.actions),
        "reference KL": round(objective.reference_kl()[0], 3),
        **{name: rows[0][name] for name in wanted},
        "seconds": {name: [round(s, 1) for s in values] for name, values in seconds.items()},
        "trpo over ppo": {"median": statistics.median(ratios), "all": ratios},
        "trpo by phase": {k: round(v / a.repeats, 1) for k, v in meter.seconds.items()},
        "peak MiB": {name: peak(a, length, name) for name in WORKS if not a.no_peaks},
    }


def peak(a, length: int, name: str) -> float:
    """Return the growth of resident memory during a work, MiB, in a process of its own."""
    command = [
        sys.executable, __file__, "--model", a.model, "--dataset", a.dataset, "--prompts",
        str(a.prompts), "--each", str(a.each), "--lengths", str(length), "--peak", name,
    ]  # fmt: skip
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def peak_here(a, length: int, name: str) -> float:
    """Do a work once and return how far resident memory rose, MiB; an epoch of PPO is enough."""
    objective, state = sampled(a, length)
    work = works(objective, state, epochs=1)[name]
    gc.collect()
    return high_water(work)


def loops(a, length: int) -> dict:
    """Time whole steps, sampling included; the first of each is not counted."""
    out = {}
    for name, rule in (("trpo", TRPO()), ("ppo", PPO())):
        made, seconds = trainer(a, length, rule, a.repeats + 1), []
        for _ in range(a.repeats + 1):
            start = time.process_time()
            made.train_step()
            seconds.append(time.process_time() - start)
        out[name] = seconds[1:]
        del made
    out["trl-grpo"] = trl_steps(a, length)
    return {name: {"median": statistics.median(s), "all": s} for name, s in out.items()}


def trl_steps(a, length: int) -> list[float]:
    """Return the CPU seconds of steps of TRL's GRPO, the first left out."""
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.process_time() - self.start)

    config = TrainerConfig(
        output_dir=mkdtemp(), updates=a.repeats + 1, prompts_per_update=a.prompts,
        completions_per_prompt=a.each, max_completion_length=length,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": load_prompts(a.dataset).prompts})
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32),
        reward_funcs=lambda completions, **rest: vowels(completions),
        args=GRPOConfig(**trl_arguments(config, TRLSettings(learning_rate=1e-4))),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(a.model),
        callbacks=[Clock()],
        peft_config=default_lora(),
    ).train()
    return seconds[1:]


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="causal LM")
    parser.add_argument("--dataset", required=True, help="prompts")
    parser.add_argument("--prompts", type=int, default=32, help="of the batch")
    parser.add_argument("--each", type=int, default=1, help="completions of a prompt")
    parser.add_argument("--lengths", type=int, nargs="+", default=[24, 64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="real_model.json", help="file for all figures")
    parser.add_argument("--loop", action="store_true", help="whole steps, beside TRL's GRPO")
    parser.add_argument("--no_peaks", action="store_true", help="leave memory out")
    parser.add_argument("--peak", choices=WORKS, help="print the memory of one work, MiB")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.peak:
        print(peak_here(a, a.lengths[0], a.peak))
        return
    found = {}
    for length in a.lengths:
        found[length] = loops(a, length) if a.loop else report(a, length)
        print(length, json.dumps(found[length]), flush=True)
        Path(a.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
