"""The cost of an update: seconds, passes and memory of TRPO and PPO, on one synthetic batch.

    python recipes/benchmarks/update_cost.py --sizes film six --model path/to/lm
    python recipes/benchmarks/update_cost.py --scaling

The policy is at its budget, so that both distances are active, and every variant starts from the
same parameters. Seconds are CPU seconds of one thread, alternating over variants, which other work
on the machine hardly affects; compare them within one run only. Memory is the growth of the
high-water mark of resident memory, one process for each variant: the need of an update beyond the
model and the batch. Completions are random tokens; no cost depends on their content.
"""

import argparse
import csv
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.core.divergences import categorical_kl
from trpo_lm.core.fisher import (
    FisherOperator,
    ForwardFisher,
    ScoreFisher,
    hessian_operator,
    twice_differentiable,
)
from trpo_lm.core.parameters import ParameterVector
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.rewards import RewardBatch
from trpo_lm.lm.rollout import Batch, Rollout, all_features
from trpo_lm.seeds import generator

HERE = Path(__file__).resolve().parent
FIGURES = HERE.parent / "figures"
EMBEDDED = HERE.parent.parent / "data" / "lm"
PROMPT, LENGTH = 6, 24
FISHER = 32  # completions on which the parts of an update are compared
COMPLETIONS = {"film": 512, "six": 512, "small": 64, "qwen": 16}
PHASES = {"gradients": "g and b", "fisher": "Fisher graph", "measure": "line search"}
PEAKS = ("trpo", "ppo", "measure")


def build(size: str, model: str):
    """Return the causal LM of a size: a path, or random weights."""
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if size == "film":
        return model
    if size == "qwen":
        config = Qwen2Config(
            vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, **ends,
        )  # fmt: skip
        return Qwen2ForCausalLM(config)
    if size == "small":
        return GPT2LMHeadModel(GPT2Config(**ends))
    layers, width, vocabulary = (6, 384, 8192) if size == "six" else (2, int(size), 2048)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=layers, n_embd=width, n_head=width // 32, vocab_size=vocabulary, **ends)
    )


def setting(size: str, model: str, completions: int, length: int):
    """Return the objective of random completions, with the policy away from its reference."""
    policy, noise = Policy(build(size, model)), generator(0, size)
    with torch.no_grad():
        for p in policy.parameters.tensors:
            p += 0.02 * torch.randn(p.shape, generator=noise)
    V, shape = policy.vocabulary_size, (completions, PROMPT + length)
    lengths = torch.randint(length // 2, length + 1, (completions,), generator=noise)
    action_mask = torch.arange(length)[None] < lengths[:, None]
    mask = torch.cat([torch.ones(completions, PROMPT).long(), action_mask.long()], dim=1)
    rollout = Rollout(
        prompts=[""] * completions,
        completions=[""] * completions,
        columns={},
        groups=torch.arange(completions),
        input_ids=torch.randint(3, V, shape, generator=noise) * mask,
        attention_mask=mask,
        action_mask=action_mask,
        truncated=torch.zeros(completions, dtype=torch.bool),
        rewards=torch.zeros(action_mask.shape, dtype=torch.float64),
        scores=RewardBatch(
            score=torch.zeros(completions),
            valid=torch.ones(completions, dtype=torch.bool),
            terminal=torch.zeros(completions),
            token_rewards=None,
            columns={},
            logged={},
        ),
        score_seconds=0.0,
    )
    batch = Batch.from_rollout(policy, rollout)
    A = rollout.padded(torch.randn(len(batch.actions), generator=noise))
    return BatchObjective(policy, batch, A, alone)


def alone(tensor):
    """Sum over one process."""
    return tensor


def updates(objective) -> dict:
    """Return one TRPO update with both distances active and one PPO update, undone after."""
    theta = objective.theta
    start = theta.snapshot()
    rules = {
        "trpo": TRPO(max_ref_kl=objective.reference_kl()[0]),
        "ppo": PPO(learning_rate=1e-5, epochs=4, minibatches=4),
    }

    def run(rule):
        _, row = rule.update(objective, rule.init_state(theta))
        theta.restore(start)
        return row

    return {name: lambda rule=rule: run(rule) for name, rule in rules.items()}


def subset(objective):
    """Return the objective of the first FISHER completions of a batch."""
    policy, r = objective.policy, objective.batch.rollout
    rows = torch.arange(min(FISHER, len(r)))
    names = ("groups", "input_ids", "attention_mask", "action_mask", "truncated", "rewards")
    fields = {name: getattr(r, name)[rows] for name in names}
    texts = {"prompts": [""] * len(rows), "completions": [""] * len(rows)}
    few = Batch.from_rollout(policy, replace(r, **fields, **texts))
    return BatchObjective(policy, few, r.padded(objective.advantages)[rows], alone)


def pieces(objective) -> dict:
    """Return the parts of an update on the same completions, to be compared with one another."""
    policy, few, theta = objective.policy, objective.batch, objective.theta
    rows = torch.arange(len(few.rollout))
    F = objective.fisher(len(rows))
    policy.exact_products = ["forward"]
    kept_nothing = objective.fisher(len(rows))
    policy.exact_products = ["retained", "forward"]
    S = objective.scores()
    v = torch.randn(len(theta), generator=generator(1))

    def divergence():
        with twice_differentiable():
            features = policy.features(*few.rollout.model_inputs(rows))
        new = policy.logprobs(features)
        return categorical_kl(old=new.detach(), new=new).sum() / objective.N

    out = {
        "forward": lambda: all_features(policy, few.rollout),
        "forward+backward of L": lambda: objective.gradients(reference=False),
        "product": lambda: F(v),
        "product, forward mode": lambda: kept_nothing(v),
        "scores": objective.scores,
        "product of scores": lambda: S.T @ (S @ v),
    }
    if policy.vocabulary_size * len(few.actions) < 2e7:  # all of [tokens, V] in one graph
        H = hessian_operator(theta, divergence())
        out["product, double backward"] = lambda: H(v)
        out["product, graph built anew"] = lambda: hessian_operator(theta, divergence())(v)
    return out


def alternate(works: dict, repeats: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Time each work `repeats` times in turn; with `warm`, one round before is not counted."""
    seconds = {name: [] for name in works}
    for i in range(not warm, repeats + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if i:
                seconds[name].append(time.process_time() - start)
    return seconds


class Meter:
    """CPU seconds of each phase of a TRPO update, and completions through the model by purpose."""

    def __init__(self):
        self.phase, self.rows = "rest", 0
        self.seconds, self.forward, self.backward = Counter(), Counter(), Counter()

    @contextmanager
    def watching(self):
        """Count inside the block."""
        with ExitStack() as stack:
            for name, phase in PHASES.items():
                stack.enter_context(self._replaced(BatchObjective, name, phase))
            for kind in (FisherOperator, ForwardFisher, ScoreFisher):
                stack.enter_context(self._replaced(kind, "__call__", "products"))
            passes, gradient = Policy.hidden_and_features, ParameterVector.gradient

            def forward(policy, ids, *rest):
                self.rows = len(ids)
                self.forward[self.phase] += self.rows
                return passes(policy, ids, *rest)

            def backward(theta, *args, **options):
                self.backward[self.phase] += self.rows
                return gradient(theta, *args, **options)

            stack.enter_context(patch.object(Policy, "hidden_and_features", forward))
            stack.enter_context(patch.object(ParameterVector, "gradient", backward))
            yield

    def _replaced(self, owner, name, phase):
        work = getattr(owner, name)

        def timed(*args, **options):
            outer, self.phase, start = self.phase, phase, time.process_time()
            try:
                return work(*args, **options)
            finally:
                self.seconds[phase] += time.process_time() - start
                self.phase = outer

        return patch.object(owner, name, timed)


def quartiles(values: list[float]) -> list[float]:
    """Return the quartiles of at least two numbers, three of them."""
    return [round(q, 4) for q in statistics.quantiles(values, n=4)]


def ratios(seconds: dict[str, list[float]], to: str) -> dict[str, list[float]]:
    """Return the quartiles of each work's time over that of `to` in the same round."""
    return {
        name: quartiles([a / b for a, b in zip(values, seconds[to], strict=True)])
        for name, values in seconds.items()
    }


def outside_tensor_work(work) -> float:
    """Return the share of a work's time that no tensor operation accounts for, from above.

    The profiler's own time counts as outside.
    """
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=cpu) as found,
        torch.profiler.record_function("all of it"),
    ):
        work()
    events = {e.key: e for e in found.key_averages()}
    whole = events.pop("all of it")
    return whole.self_cpu_time_total / whole.cpu_time_total


def rollout_speed(policy, repeats: int) -> dict[str, list[float]]:
    """Return tokens per CPU second of ways to sample, and of one forward pass over as many."""
    rows, length = 64, LENGTH
    ids = torch.randint(3, policy.vocabulary_size, (rows, PROMPT), generator=generator(2))
    whole = torch.randint(3, policy.vocabulary_size, (rows, PROMPT + length))
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "eos_token_id": None}

    @torch.no_grad()
    def sample(**options):
        mask = torch.ones_like(ids)
        settings = sampling | {"pad_token_id": 0} | options
        policy.base.generate(input_ids=ids, attention_mask=mask, **settings)

    def merged():
        with torch.no_grad():
            policy.model.merge_adapter()
            sample()
            policy.model.unmerge_adapter()

    def bound():
        with torch.no_grad():
            policy.base(input_ids=whole, use_cache=False)

    start = policy.parameters.snapshot()
    weights = [p.detach().clone() for p in policy.base.parameters()]
    ways = {
        "generate": sample,
        "generate, static cache": lambda: sample(cache_implementation="static"),
        "generate, adapters merged": merged,
        "one forward pass": bound,
    }
    seconds = alternate(ways, repeats)
    for p, was in zip(policy.base.parameters(), weights, strict=True):
        p.data.copy_(was)  # merging rounds
    policy.parameters.restore(start)
    return {
        name: quartiles([rows * length / s for s in values]) for name, values in seconds.items()
    }


def report(size: str, args) -> dict:
    """Measure one size."""
    N = args.completions or COMPLETIONS[size]
    objective = setting(size, args.model, N, LENGTH)
    tokens = len(objective.batch.actions)
    out = {"completions": N, "tokens": tokens, "trainable": len(objective.theta)}
    few = subset(objective)
    parts = pieces(few)
    of_pieces = ratios(alternate(parts, args.repeats), "forward+backward of L")
    out["over forward+backward of L"] = of_pieces
    works, meter = updates(objective), Meter()
    with meter.watching():
        row = works["trpo"]()
    out["case"], out["trials"] = row["trust_region/case"], row["line_search/trials"]
    out["cg iterations"] = row["cg/iterations"]
    out["completions forward"], out["completions backward"] = meter.forward, meter.backward
    exact = {"measure": objective.measure}
    seconds = alternate(works | exact, args.repeats)
    out["over ppo"] = ratios(seconds, "ppo")["trpo"]
    rounds = zip(seconds["ppo"], seconds["measure"], strict=True)
    bare = seconds | {"bare": [ppo - exact for ppo, exact in rounds]}
    out["over ppo without its exact KL"] = ratios(bare, "bare")["trpo"]
    total = statistics.median(seconds["trpo"])
    meter.seconds["rest"] = max(0.0, total - sum(meter.seconds.values()))
    out["share of trpo"] = {k: round(v / total, 3) for k, v in meter.seconds.items()}
    if size == "six":
        out["outside tensor work"] = round(outside_tensor_work(works["trpo"]), 4)
    out["rollout, tokens per CPU second"] = rollout_speed(objective.policy, args.repeats)
    out["peak MiB"] = {name: peak(size, name, args, N, LENGTH) for name in PEAKS}
    return out


def peak(size: str, name: str, args, completions: int, length: int) -> float:
    """Return the growth of resident memory during a work, MiB, in a process of its own."""
    command = [
        sys.executable, __file__, "--peak", name, "--sizes", size, "--model", str(args.model),
        "--completions", str(completions), "--length", str(length),
    ]  # fmt: skip
    # Every tensor in pages of its own: what is freed is gone, and holes in the heap do not count.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout)


def peak_here(size: str, name: str, args) -> float:
    """Do a work once and return how far resident memory rose above where it stood, MiB."""
    objective = setting(size, args.model, args.completions, args.length)
    works = updates(objective) | {"measure": objective.measure}
    gc.collect()
    return high_water(works[name])


def high_water(work) -> float:
    """Do a work and return how far resident memory rose above where it stood, MiB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, or a work would find it there
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    work()
    return round((_resident("VmHWM") - before) / 1024, 1)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def scaling(args):
    """Time a TRPO update over completions, length and width; a CSV and a picture of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = {"completions": (128, 256, 512), "length": (8, 16, 32), "width": (64, 128, 256)}
    rows = []
    for axis, values in axes.items():
        for value in values:
            at = {"completions": 128, "length": 16, "width": 64} | {axis: value}
            objective = setting(str(at["width"]), "", at["completions"], at["length"])
            times = alternate({"trpo": updates(objective)["trpo"]}, args.repeats)["trpo"]
            rows.append({"axis": axis, "value": value, "seconds": statistics.median(times)})
    with (FIGURES / "update_cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["axis", "value", "seconds"])
        writer.writeheader()
        writer.writerows(rows)
    figure, panels = pyplot.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for panel, axis in zip(panels, axes, strict=True):
        points = [(row["value"], row["seconds"]) for row in rows if row["axis"] == axis]
        x, y = zip(*points, strict=True)
        panel.plot(x, y, "o-", label="measured")
        panel.plot(x, [y[0] * value / x[0] for value in x], "k:", label="linear")
        panel.set(xlabel=axis, ylabel="CPU seconds of an update", xlim=0, ylim=0)
    panels[0].legend()
    figure.savefig(FIGURES / "update_cost.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["film", "six"], help="of " + str(COMPLETIONS)
    )
    parser.add_argument("--model", default=str(EMBEDDED), help="the LM of size 'film'")
    parser.add_argument("--completions", type=int, help="in the batch")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", default="update_cost.json", help="file for all figures")
    parser.add_argument("--scaling", action="store_true", help="the picture instead")
    parser.add_argument("--peak", choices=PEAKS, help="print the memory of one work, MiB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.scaling:
        scaling(args)
    elif args.peak:
        print(peak_here(args.sizes[0], args.peak, args))
    else:
        found = {size: report(size, args) for size in args.sizes}
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
