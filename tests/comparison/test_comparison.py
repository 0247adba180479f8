"""The comparison: arms as text, the limit, the statistics, the sweep, and the page."""

import csv
import importlib.util
import json
import math
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from trpo_lm import PPO, TRPO, TrainerConfig, TrpoLMError
from trpo_lm.analysis.probe import probe
from trpo_lm.comparison.limit import limit_curve, reference_scores, tilted
from trpo_lm.comparison.page import main as draw
from trpo_lm.comparison.page import write_page
from trpo_lm.comparison.results import Run, at_equal_kl, kept_promises, load_comparison
from trpo_lm.comparison.sweep import Arm, Sweep
from trpo_lm.comparison.trl_arms import _positions
from trpo_lm.config import TRLSettings
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompts
from trpo_lm.report.statistics import bootstrap_interval
from trpo_lm.training.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("compare", ROOT / "recipes/compare.py")
compare = sys.modules["compare"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compare)

# ---- arms as text ----


def test_a_grid_is_every_combination_and_keeps_the_row_of_its_algorithm():
    arms = compare.expand("grpo:learning_rate=3e-4,1e-3:beta=0,0.1", TrainerConfig())
    assert [given for _, given, _, _ in arms] == [
        {"learning_rate": lr, "beta": beta} for lr in ("3e-4", "1e-3") for beta in ("0", "0.1")
    ]
    for algorithm, given, settings, _ in arms:
        assert algorithm == "grpo" and settings.advantage == "group_normalised"
        assert settings.epochs == settings.minibatches == 1
        assert settings.beta == float(given["beta"])


@pytest.mark.parametrize("name", ["trpo", "ppo", "grpo", "rloo", "reinforce"])
def test_every_row_is_a_valid_algorithm(name):
    ((_, given, settings, _),) = compare.expand(name, TrainerConfig())
    rule = (TRPO if name == "trpo" else PPO)(**vars(settings))
    assert not given and rule.needs_critic == (name in ("trpo", "ppo", "reinforce"))


def test_arms_of_trl_expand_whether_or_not_it_is_installed():
    arms = compare.expand("trl-grpo:learning_rate=3e-4,1e-3", TrainerConfig())
    assert [settings for *_, settings, _ in arms] == [
        TRLSettings(3e-4, 0.0),
        TRLSettings(1e-3, 0.0),
    ]
    ((*_, settings, own),) = compare.expand("trl-rloo", TrainerConfig(prompts_per_update=64))
    assert settings.beta == 0.05  # TRL's default for this trainer
    assert (own.prompts_per_update, own.completions_per_prompt) == (16, 4)


def test_every_arm_samples_the_same_number_of_completions():
    args = TrainerConfig(prompts_per_update=64, completions_per_prompt=1)
    shape = {
        text: (own.prompts_per_update, own.completions_per_prompt)
        for text in ("ppo", "grpo", "rloo", "rloo:completions_per_prompt=16")
        for *_, own in compare.expand(text, args)
    }
    assert list(shape.values()) == [(64, 1), (8, 8), (16, 4), (4, 16)]
    with pytest.raises(TrpoLMError, match="64 completions, which is not a multiple of 5"):
        compare.expand("rloo:completions_per_prompt=5", args)
    ((*_, own),) = compare.expand("ppo:critic=value_head", args)
    assert own.critic == "value_head"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pppo", "unknown algorithm 'pppo'"),
        ("ppo:betta=0.1", "did you mean beta"),
        ("ppo:beta=much", "beta must be a number"),
        ("ppo:beta=-1", "not allowed"),
        ("trpo:clip=0.2", "unknown setting 'clip'"),
        ("ppo:seed=3", "seed cannot differ between arms"),
        ("trl-grpo:clip=0.2", "unknown setting 'clip'"),
        ("trl-rloo:learning_rate=0", "not allowed"),
    ],
)
def test_a_wrong_arm_is_named(text, message):
    with pytest.raises(TrpoLMError, match=message) as caught:
        compare.expand(text, TrainerConfig())
    assert text in str(caught.value.where)


def test_help_does_not_import_torch():
    code = (
        "import sys; sys.argv = ['compare.py', '--help']\n"
        "import compare\ntry: compare.run()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'recipes'}"}
    out = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "--limit_samples" in out.stdout


# ---- the limit ----


@pytest.mark.parametrize("beta", [0.2, 0.7, 3.0])
def test_the_tilted_reference_of_a_coin(beta):
    """Scores 1 with probability p: the tilt is another coin, and its KL has a closed form."""
    p, n = 0.3, 1000
    scores = (torch.arange(n) < p * n).double()[None].repeat(2, 1)
    kl, score = tilted(scores, beta)
    q = p * math.exp(1 / beta) / (p * math.exp(1 / beta) + 1 - p)
    assert score == pytest.approx(q, rel=1e-9)
    want = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert kl == pytest.approx(want, rel=1e-9)


def test_the_limit_starts_at_the_reference_rises_and_stops_where_it_is_not_trusted():
    scores = torch.randn(40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[0, :10] = torch.nan  # abstained
    curve = limit_curve(scores)
    kl, score = (np.array([row[k] for row in curve]) for k in ("ref_kl", "score"))
    assert kl[0] == 0 and score[0] == pytest.approx(float(scores.nanmean(-1).mean()))
    assert (np.diff(kl) > 0).all() and (np.diff(score) > 0).all()
    assert 0.8 * math.log(64) / 2 < kl[-1] <= math.log(64) / 2
    # normal scores: tilting by 1/beta shifts the mean by s and costs s^2/2 nats
    i = int(np.searchsorted(kl, 0.5))
    assert score[i] - score[0] == pytest.approx(math.sqrt(2 * kl[i]), rel=0.1)


def test_equal_scores_have_no_frontier():
    assert limit_curve(torch.full((3, 8), 0.5)) == [{"beta": None, "ref_kl": 0.0, "score": 0.5}]


# ---- what training broke ----


def test_the_reference_itself_forgot_nothing():
    policy = tiny.policy(spread=0.0)
    text = tiny.mdp().rollout(policy, tiny.PROMPTS, completions_per_prompt=4, seed=(1,))
    found = probe(policy, text, text, micro_batch_size=8, judge=lambda p, c: [0.25] * len(p))
    assert found["ref_kl"] == pytest.approx(0, abs=1e-6)
    assert found["nll"] == pytest.approx(found["nll_reference"], rel=1e-5)
    assert found["judge"] == 0.25
    first = [text.completions[i] for i in (0, 4, 8, 12)]
    assert found["duplicates"] == 1 - len(set(first)) / 4
    ids = [text.completion_ids[i] for i in (0, 4, 8, 12)]
    pairs = [(a, b) for row in ids for a, b in pairwise(row)]
    assert found["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))


def test_a_moved_policy_is_seen_to_have_forgotten():
    policy = tiny.policy(spread=0.6)
    mdp = tiny.mdp()
    with policy.reference():
        text = mdp.rollout(policy, tiny.PROMPTS, completions_per_prompt=64, seed=(1,))
    own = mdp.rollout(policy, tiny.PROMPTS, completions_per_prompt=64, seed=(1,))
    found = probe(policy, own, text, micro_batch_size=64)
    assert found["ref_kl"] > 0.1 and found["nll"] > found["nll_reference"]
    assert found["judge"] is None


def test_samples_for_the_limit_are_the_references():
    policy = tiny.policy(spread=0.6)
    prompts = tiny.PROMPTS * 5  # more than are sampled at once
    theta = policy.parameters.checksum()
    scores = reference_scores(policy, tiny.mdp(), prompts, {}, samples=3, seed=(0,))
    with policy.reference():
        again = reference_scores(policy, tiny.mdp(), prompts, {}, samples=3, seed=(0,))
    assert scores.shape == (20, 3) and torch.equal(scores, again)
    assert policy.parameters.checksum() == theta


# ---- statistics ----


def test_the_bootstrap_interval():
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])
    assert all(map(math.isnan, bootstrap_interval([1.0])))
    assert bootstrap_interval([2.0, 2.0, math.nan]) == (2.0, 2.0)
    x = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(x)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.1)


def a_run(kl, score, seed=0, **result):
    rows = [
        {"update": i + 1, "objective/ref_kl": k, "objective/score_mean": s}
        for i, (k, s) in enumerate(zip(kl, score, strict=True))
    ]
    return Run(seed, Path("."), result, rows)


def test_a_score_at_some_kl_is_the_last_one_there():
    steady = a_run(np.linspace(0, 2, 101), np.linspace(0, 1, 101))
    assert steady.at(1.0) == pytest.approx((1.0, 0.5))
    assert steady.at(9.0) == tuple(v[-1] for v in steady.trajectory())
    assert steady.at(0.0) == (0.0, 0.0)
    plateau = a_run([0, *[1.0] * 40], np.linspace(0, 1, 41))  # improves at a constant KL
    assert plateau.at(1.0) == (1.0, plateau.trajectory()[1][-1])


# ---- the page ----

HOSTILE = '<script>alert("x")</script> <img src=http://evil.example/x.png> \x1b[31mred & "quoted"'


def a_folder(root, arms=("trpo max_ref_kl=1", "ppo beta=0.1", "ppo beta=0.3"), seeds=2, updates=6):
    """Write what a sweep leaves, with made-up numbers."""
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


def test_the_page_is_self_contained_and_nothing_in_it_runs(tmp_path):
    page = write_page(a_folder(tmp_path / "c")).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5
    assert "<script" not in page and "<img src=http" not in page and "\x1b" not in page
    assert 'src="http' not in page and "href=" not in page and "url(" not in page
    assert "&lt;script&gt;" in page and "trpo max_ref_kl=1" in page
    for stem in ("frontier", "trust_region", "score", "prediction", "radar"):
        assert (tmp_path / "c/figures" / f"{stem}.png").stat().st_size > 10_000
        with open(tmp_path / "c/figures" / f"{stem}.csv", newline="") as file:
            header, *rows = csv.reader(file)
            assert rows and all(len(row) == len(header) for row in rows)
    with open(tmp_path / "c/results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 6


def test_a_comparison_of_many_arms_without_any_trust_region(tmp_path):
    arms = [f"ppo learning_rate={lr}" for lr in ("1e-4", "3e-4", "1e-3", "3e-3")]
    arms += [f"grpo learning_rate={lr}" for lr in ("1e-4", "3e-4", "1e-3", "3e-3")]
    folder = a_folder(tmp_path / "c", arms, seeds=1, updates=5)
    page = write_page(folder).read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4  # nothing was predicted
    assert [arm.name for arm in load_comparison(folder).arms][:2] == arms[:2]


def test_a_run_that_blew_up_is_a_result(tmp_path):
    folder = a_folder(tmp_path / "c", seeds=2)
    file = folder / "runs/ppo_beta=0.3/seed-0/result.json"
    result = json.loads(file.read_text())
    del result["held_out"], result["samples"]
    file.write_text(json.dumps(result | {"fault": "non-finite logits"}))
    (file.parent / "metrics.jsonl").unlink()  # in its first update
    assert "non-finite logits" in write_page(folder).read_text()
    assert kept_promises(load_comparison(folder)) == [
        ["trpo", 2, "100%", "0%"],
        ["ppo", 4, "75% *", "25%"],
    ]


@pytest.mark.parametrize(
    ("kl", "near", "collapsed"),
    [(0.89, "0%", "0%"), (0.91, "100%", "0%"), (1.09, "100%", "0%"), (1.11, "0%", "0%"),
     (21.0, "0%", "100%")],
)  # fmt: skip
def test_a_run_is_near_what_it_was_asked_for_within_ten_per_cent(tmp_path, kl, near, collapsed):
    folder = a_folder(tmp_path / "c", arms=["trpo max_ref_kl=1"], seeds=1)
    file = folder / "runs/trpo_max_ref_kl=1/seed-0/result.json"
    result = json.loads(file.read_text())
    result["held_out"]["ref_kl"] = kl
    file.write_text(json.dumps(result))
    assert kept_promises(load_comparison(folder)) == [["trpo", 1, near, collapsed]]


def test_equal_kl_pairs_runs_of_one_seed_and_picks_the_best_rival(tmp_path):
    comparison = load_comparison(a_folder(tmp_path / "c"))
    rivals = comparison.arms[1:]
    for run in rivals[1].runs:
        for row in run.rows:
            row["objective/score_mean"] += 0.2
    (row,) = at_equal_kl(comparison)
    assert row["rival"] is rivals[1] and row["difference"] == pytest.approx(-0.2, abs=0.05)
    assert row["low"] <= row["difference"] <= row["high"] < 0
    assert row["rival_ref_kl"] == pytest.approx(row["ref_kl"])


def test_a_rival_that_never_came_that_far_shows_its_own_kl(tmp_path):
    comparison = load_comparison(a_folder(tmp_path / "c", ("trpo max_ref_kl=1", "ppo beta=0.1")))
    for run in comparison.arms[1].runs:
        for row in run.rows:
            row["objective/ref_kl"] /= 10
    (row,) = at_equal_kl(comparison)
    assert row["rival_ref_kl"] == pytest.approx(row["ref_kl"] / 10)


def test_the_page_leads_with_the_best_of_all_other_arms(tmp_path):
    folder = a_folder(tmp_path / "c", ("trpo max_ref_kl=1", "ppo beta=0.1", "grpo"))
    file = folder / "runs/grpo/seed-0/metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["objective/score_mean"] += 0.2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_page(folder).read_text()
    first, every = page.split("<details>")[0], page.split("<details>")[1].split("</details>")[0]
    assert "trpo less the best other arm" in first
    assert "grpo" in first.split("best other arm there")[1]
    assert "ppo beta=0.1" not in first.split("best other arm there")[1].split("</table>")[0]
    assert "ppo beta=0.1" in every and "grpo" in every


def test_the_frontier_alone_has_few_arms(tmp_path):
    arms = [f"trpo max_ref_kl={k}" for k in (0.5, 1, 2)]
    arms += [f"{a} beta={b}" for a in ("ppo", "trl-rloo") for b in (0.1, 0.2, 0.3)]
    folder = a_folder(tmp_path / "c", arms, seeds=1)
    file = folder / "runs/ppo_beta=0.2/seed-0/metrics.jsonl"
    file.write_text(
        file.read_text().replace('"objective/score_mean": 0.', '"objective/score_mean": 0.9')
    )
    featured = load_comparison(folder).featured
    assert [arm.name for arm in featured[:4]] == [*arms[:3], "ppo beta=0.2"] and len(featured) == 5
    assert draw([str(folder), "--frontier", str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert not (folder / "comparison.html").exists()


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(TrpoLMError, match="no run of a comparison is finished"):
        load_comparison(tmp_path)


# ---- the sweep ----


def a_sweep(folder, arms, **settings):
    data = ROOT / "data"
    args = TrainerConfig(
        output_dir=str(folder), updates=1, prompts_per_update=4, completions_per_prompt=2,
        max_completion_length=6, **settings,
    )  # fmt: skip
    prompts = Prompts(["the film", "the story of", "a bold", "i thought the"], {})
    rules = {"trpo": TRPO(cg_iterations=2), "ppo": PPO(epochs=1)}
    rules |= dict.fromkeys(["trl-grpo", "trl-rloo"], TRLSettings(beta=0.05))
    made = [Arm(name, name, {}, rules[name], args) for name in arms]
    return Sweep(
        str(data / "lm"), str(data / "reward_model"), prompts, prompts, args, made,
        seeds=1, judge=None, completions=2, limit_prompts=2, limit_samples=4,
    )  # fmt: skip


def test_a_sweep_keeps_what_is_finished_and_leaks_nothing_between_arms(tmp_path, monkeypatch):
    a_sweep(tmp_path / "both", ["trpo", "ppo"]).run()
    result = tmp_path / "both/runs/ppo/seed-0/result.json"
    found = json.loads(result.read_text())
    assert found["held_out"]["ref_kl"] > 0 and found["passes"] > 3
    assert write_page(tmp_path / "both").is_file()

    # alone, after another one, or in another process: the same bits
    a_sweep(tmp_path / "alone", ["ppo"]).run()
    rows = [
        [json.loads(line)["policy/checksum"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("both/runs/ppo/seed-0/metrics.jsonl", "alone/runs/ppo/seed-0/metrics.jsonl")
    ]
    assert rows[0] == rows[1]

    # the same command again trains nothing; another arm is added; other settings are refused
    before = result.stat().st_mtime_ns
    a_sweep(tmp_path / "alone", ["trpo", "ppo"]).run()
    assert (tmp_path / "alone/runs/trpo/seed-0/result.json").is_file()
    monkeypatch.setattr(
        "trpo_lm.training.trainer.Trainer.train", lambda self: pytest.fail("trained again")
    )
    a_sweep(tmp_path / "both", ["trpo", "ppo"]).run()
    assert result.stat().st_mtime_ns == before
    with pytest.raises(TrpoLMError, match=r"other settings; temperature: 1.0 -> 0.9"):
        a_sweep(tmp_path / "both", ["ppo"], temperature=0.9).run()


def test_two_arms_of_one_name_are_refused(tmp_path):
    with pytest.raises(TrpoLMError, match="duplicate arm 'ppo'"):
        a_sweep(tmp_path, ["ppo", "ppo"])


def test_a_setting_that_is_younger_than_a_result_had_its_default(tmp_path):
    sweep, file = a_sweep(tmp_path, []), tmp_path / "result.json"
    file.write_text(json.dumps({"spec": {"temperature": 1.0}}))
    spec = {"temperature": 1.0, "prefix_stride": 1, "accept_ratio": 0.1}
    assert sweep._finished(file, spec, TRPO())
    with pytest.raises(TrpoLMError, match=r"other settings; accept_ratio: 0.1 -> 0.3"):
        sweep._finished(file, spec | {"accept_ratio": 0.3}, TRPO())


# ---- TRL's trainers ----


def test_without_trl_its_arms_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrpoLMError, match="TRL is not installed") as caught:
        a_sweep(tmp_path / "c", ["ppo", "trl-grpo"])
    assert "[trl]" in caught.value.hint and not (tmp_path / "c").exists()


def test_trl_in_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrpoLMError, match="in one process"):
        a_sweep(tmp_path, ["trl-rloo"])


def test_padding_does_not_move_the_positions_of_the_model_that_trl_gets():
    model = tiny.build("gpt2").eval()
    ids, mask = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        alone = model(input_ids=ids[:, 2:]).logits
        padded = model(input_ids=ids, attention_mask=mask).logits[:, 2:]
        assert not torch.allclose(padded, alone, atol=1e-2)
        model.base_model.register_forward_pre_hook(_positions, with_kwargs=True)
        padded = model(input_ids=ids, attention_mask=mask).logits[:, 2:]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_trl_trains_offline_and_is_measured_like_the_others(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    asked = []
    monkeypatch.delenv("CI", raising=False)  # where it is set, TRL is silent anyway
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **_: asked.append(args) or [])
    a_sweep(tmp_path, ["trl-grpo", "trl-rloo"]).run()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(10)
    assert not asked
    for name in ("trl-grpo", "trl-rloo"):
        folder = tmp_path / "runs" / name / "seed-0"
        (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert set(METRICS) <= set(row) and row["completions"] == 8
        assert row["objective/ref_kl"] == pytest.approx(0, abs=1e-6)  # sampled by the reference
        assert row["trust_region/kl"] > 1e-6 and row["trust_region/case"] is None
        assert len((folder / "completions.jsonl").read_text().splitlines()) == 8
        found = json.loads((folder / "result.json").read_text())
        assert found["held_out"]["ref_kl"] > 1e-6 and found["passes"] >= 1
        # what is measured is what TRL left: its adapter, loaded by peft alone
        saved = Policy(str(folder))
        assert saved.parameters.checksum() == row["policy/checksum"]
    assert write_page(tmp_path).is_file()
    monkeypatch.setattr(
        "trpo_lm.comparison.sweep.train_with_trl", lambda *args: pytest.fail("trained again")
    )
    a_sweep(tmp_path, ["trl-grpo", "trl-rloo"]).run()
