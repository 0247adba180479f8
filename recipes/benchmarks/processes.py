"""One update of a real model on one or several processes: steps, seconds, memory, bytes exchanged.

    python recipes/benchmarks/processes.py --model LM --dataset sums_train.jsonl --out /tmp/steps
    torchrun --nproc_per_node 2 recipes/benchmarks/processes.py --model LM \\
        --dataset sums_train.jsonl --out /tmp/steps
    torchrun --nproc_per_node 2 recipes/benchmarks/processes.py --model LM \\
        --dataset sums_train.jsonl --out /tmp/steps --shard_base

The first call keeps its completions in OUT, the others sample as many, then take the step on those
of the first, each process on its prompts: steps can be compared. Every process prints a line; rank
0 also prints how far its step is from that of the first call. Bytes are what a process receives, by
torch's calls: of an all-gather all but its own part, of a sum 2 (n - 1) / n of the tensor.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch import distributed

from trpo_lm import TRPO, Trainer, TrainerConfig
from trpo_lm.lm.rewards import load_reward
from trpo_lm.lm.rollout import Rollout

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--reward_function", default="trpo_lm:exact_number")
    parser.add_argument("--out", required=True, help="folder for completions and steps")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--each", type=int, default=2)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--fisher_completions", type=int, default=4)
    parser.add_argument("--shard_base", action="store_true")
    a = parser.parse_args()
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    args = TrainerConfig(
        output_dir=str(out / "run"), updates=1, prompts_per_update=a.prompts,
        completions_per_prompt=a.each, max_completion_length=a.length, critic="value_head",
        shard_base=a.shard_base,
    )  # fmt: skip
    algorithm = TRPO(fisher_completions=a.fisher_completions, max_ref_kl=0.05)
    made = Trainer(
        a.model,
        load_reward(a.reward_function),
        train_dataset=a.dataset,
        args=args,
        algorithm=algorithm,
    )
    ranks, start = made.ranks, made.policy.parameters.vector()
    loaded, most_loaded = resident()
    sample, file = made._rollout, out / "completions.pt"
    if not file.exists():  # the first batch whose scores differ: others would be skipped
        tried = ((update, sample(update)) for update in count(1))
        update, found = next((u, r) for u, r in tried if len(set(r.scores.score.tolist())) > 1)
        torch.save((update, replace(found, drawn_logprobs=None)), file)
    update, every = torch.load(file, weights_only=False)
    made.updates_done = update - 1
    received = counted(ranks.count)

    def rollout(update: int) -> Rollout:
        sample(update)
        times.append(clock())
        received["sampling"] = received["all"]
        rows = (every.groups % ranks.count == ranks.rank).nonzero()[:, 0].tolist()
        return share(every, rows)

    made._rollout, times = rollout, [clock()]
    row, _ = made.train_step()
    times.append(clock())
    spent = [[round(b - a, 1) for a, b in zip(*pair, strict=True)] for pair in pairwise(times)]
    theta = made.policy.parameters.vector()
    name = f"{ranks.count}{'-sharded' if made.policy.sharded else ''}"
    told = {
        "processes": name,
        "rank": ranks.rank,
        "seconds and CPU seconds": dict(zip(("sampling", "the rest"), spent, strict=True)),
        "MiB after loading": round(loaded / MIB),
        "MiB while loading": round(most_loaded / MIB),
        "MiB at the most": round(resident()[1] / MIB),
        "MiB received": {k: round(v / MIB, 2) for k, v in received.items()},
        "KL": row["trust_region/kl"],
        "products": [row["cg/product"], row["cg/iterations"], row["line_search/trials"]],
    }
    print(json.dumps(told), flush=True)
    if ranks.main:
        torch.save(theta, out / f"{name}.pt")
        first = torch.load(out / "1.pt")
        apart = {
            "largest difference": float((theta - first).abs().max()),
            "relative to the step": float((theta - first).norm() / (first - start).norm()),
        }
        print(json.dumps(apart), flush=True)


def clock() -> tuple[float, float]:
    """Return the time, and the CPU time of this process, in seconds."""
    return perf_counter(), process_time()


def resident() -> tuple[int, int]:
    """Return the resident memory of this process, and the most it ever was, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize(), most * 1024


def counted(processes: int) -> Counter[str]:
    """Return counters of the bytes that this process receives from now on, in all and by kind."""
    received: Counter[str] = Counter()

    def counting(real, kind, size, *args, **kwargs):
        bytes_ = size(*args, **kwargs)
        received["all"] += bytes_
        received[kind] += bytes_
        return real(*args, **kwargs)

    ring = 2 * (processes - 1) / processes
    sizes = {
        "all_reduce": lambda tensor, *_, **__: int(ring * tensor.nbytes),
        "all_gather_single": lambda output_tensor, input_tensor, *_, **__: (
            output_tensor.nbytes - input_tensor.nbytes
        ),
    }
    for name, size in sizes.items():
        real = getattr(distributed, name)
        setattr(distributed, name, partial(counting, real, name, size))
    return received


def share(rollout: Rollout, rows: list[int]) -> Rollout:
    """Return some completions of a rollout, as if they were all there is."""

    def pick(values):
        return [values[i] for i in rows] if isinstance(values, list) else values[rows]

    s, r = rollout.scores, rollout
    scores = replace(
        s, score=pick(s.score), valid=pick(s.valid), terminal=pick(s.terminal),
        columns={name: pick(values) for name, values in s.columns.items()},
    )  # fmt: skip
    return replace(
        r, prompts=pick(r.prompts), completions=pick(r.completions), groups=pick(r.groups),
        columns={name: pick(values) for name, values in r.columns.items()},
        input_ids=pick(r.input_ids), attention_mask=pick(r.attention_mask),
        action_mask=pick(r.action_mask), truncated=pick(r.truncated), rewards=pick(r.rewards),
        scores=scores,
    )  # fmt: skip


if __name__ == "__main__":
    main()
