"""Folders as a run and a comparison leave them, with invented numbers."""

import csv
import json

import numpy as np

from trpo_lm.storage import append_json_line
from trpo_lm.training.metrics import metrics_row

HOSTILE = '<script>alert("x")</script> <img src=http://evil.example/x.png> \x1b[31mred & "quoted"'


def write_run(folder, updates=6, config="max_kl: 0.05\nmax_ref_kl: 1.5\n", trpo=True):
    folder.mkdir(exist_ok=True)
    for update in range(1, updates + 1):
        row = {
            "update": update,
            "completions": 256 * update,
            "objective/score_mean": 0.53 + 0.03 * update,
            "objective/score_std": 0.25,
            "objective/ref_kl": 0.2 * (update - 1),
            "objective/entropy": 3.0,
            "objective/completion_length": 18.0,
            "objective/eos_rate": 0.8,
            "trust_region/kl": 0.04,
        }
        if trpo:
            row |= {
                "trust_region/predicted_kl": 0.041,
                "trust_region/predicted_gain": 0.06,
                "trust_region/actual_gain": 0.05,
                "trust_region/radius": 0.05 if update < 5 else 0.025,
                "line_search/trials": 1 + update % 3,
                "line_search/accepted": update != 3,
            }
        if update == 4:  # skipped: nothing about the step is known
            row = {"update": 4, "completions": 1024, "skipped": "zero advantage"}
        append_json_line(folder / "metrics.jsonl", metrics_row(row))
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def write_comparison(
    root, arms=("trpo max_ref_kl=1", "ppo beta=0.1", "ppo beta=0.3"), seeds=2, updates=6
):
    """Write what a sweep leaves."""
    noise = np.random.default_rng(0)
    held = {k: 0.5 for k in ("score", "score_std", "ref_kl", "entropy", "length", "eos_rate", "nll",
                             "nll_reference", "distinct_2", "duplicates", "judge")}  # fmt: skip
    sample = {"prompt": HOSTILE, "completion": HOSTILE, "score": 0.5}
    limit = [
        {"beta": None, "ref_kl": 0.0, "score": 0.5},
        {"beta": 1.0, "ref_kl": 1.0, "score": 0.9},
    ]
    common = {"model": "/m/lm", "reward_model": "rm", "judge": None, "updates": updates,
              "prompts_per_update": 2, "completions_per_prompt": 2}  # fmt: skip
    reference = {"spec": common, "held_out": held, "samples": [sample], "limit": limit}
    root.mkdir(exist_ok=True)
    (root / "reference.json").write_text(json.dumps(reference))
    for name in arms:
        algorithm, *rest = name.split()
        given = dict(part.split("=") for part in rest)
        for seed in range(seeds):
            folder = root / "runs" / name.replace(" ", "_") / f"seed-{seed}"
            folder.mkdir(parents=True)
            rows = []
            for i in range(updates):
                step = {"trust_region/predicted_kl": 0.04, "trust_region/predicted_gain": 0.1,
                        "trust_region/actual_gain": 0.1, "line_search/trials": 1 + i % 2,
                        "line_search/accepted": i != 3}  # fmt: skip
                rows.append(
                    {"update": i + 1, "completions": 4 * (i + 1), "objective/ref_kl": 0.2 * i,
                     "objective/score_mean": 0.5 + 0.05 * i + 0.01 * noise.normal(),
                     "objective/entropy": 1.0, "objective/completion_length": 5.0,
                     "objective/eos_rate": 1.0, "trust_region/kl": 0.04 * (i != 3),
                     "time/total": 1.0, "time/rollout": 0.5, "time/score": 0.1,
                     "time/update": 0.3, "time/value": 0.1,
                     **(step if algorithm == "trpo" else {})}
                )  # fmt: skip
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            lines = [{"update": u, "score": s} for u in (1, 3, updates) for s in (0.1, 0.9)]
            (folder / "completions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
            spec = {**common, **{k: float(v) for k, v in given.items()}}
            spec |= {"algorithm": algorithm} | ({"max_kl": 0.05} if algorithm == "trpo" else {})
            result = {"spec": spec, "arm": name, "algorithm": algorithm, "given": given,
                      "seed": seed, "passes": 7.5, "samples": [sample],
                      "held_out": {**held, "score": 0.7, "ref_kl": 1.05}}  # fmt: skip
            (folder / "result.json").write_text(json.dumps(result))
    return root


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
