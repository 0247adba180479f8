"""What users see of a run: its first lines, samples on the way, and what is next."""

import json
import math
from pathlib import Path

import tiny
from transformers.utils import logging as transformers_logging

import runs
from runs import trainer
from trpo_lm import PPO, TRPO, Trainer
from trpo_lm.comparison.sweep import Progress
from trpo_lm.training.console import Console
from trpo_lm.training.display import banner

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_but_our_own_lines_reaches_the_screen(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("trpo_lm.training.trainer.LONG", math.inf)  # however busy the machine is
    tiny.build().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    capfd.readouterr()
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in runs.PROMPTS)
    )
    (tmp_path / "p.csv").write_text("prompt\nw1 w2\nw3\n")
    Trainer(
        str(tmp_path / "model"), runs.score, train_dataset=str(tmp_path / "p.jsonl"),
        args=runs.config(tmp_path / "run", updates=1), eval_dataset=str(tmp_path / "p.csv"),
        plots=False,
    ).train()  # fmt: skip
    out, errors = capfd.readouterr()
    assert errors == ""
    assert "\x1b" not in out and "\r" not in out and "it/s" not in out
    banner = out.split("\n\n")[0].splitlines()
    assert len(banner) <= 12 and banner[0].startswith("model ")
    assert transformers_logging.is_progress_bar_enabled()


def test_samples_on_the_way_call_no_reward_and_change_no_bit(tmp_path, capsys, monkeypatch):
    calls = []

    def score(completions):
        calls.append(len(completions))
        return runs.score(completions)

    trainer(tmp_path / "plain", updates=3, reward=score).train()
    assert "samples of update" not in capsys.readouterr().out
    expected, calls[:] = list(calls), []
    monkeypatch.setattr(Console, "samples_due", lambda self, update: update != 2)
    trainer(tmp_path / "shown", updates=3, reward=score).train()
    runs.assert_same_end(tmp_path / "plain", tmp_path / "shown", 3)
    assert calls == expected
    out = capsys.readouterr().out
    assert "samples of update 1" in out and "samples of update 2" not in out
    assert "samples of update 3" not in out  # the last update's table comes instead
    block = out.split("samples of update 1\n")[1].splitlines()
    lines = [json.loads(line) for line in runs.completions(tmp_path / "shown").splitlines()]
    for k in range(3):  # two completions of each prompt: the first of three prompts
        prompt, reference, policy = block[3 * k : 3 * k + 3]
        assert prompt.split() == ["prompt", *lines[2 * k]["prompt"].split()]
        assert reference.split()[0] == "reference"
        assert policy.split()[2:] == lines[2 * k]["completion"].split()


def test_the_end_of_a_run_names_what_to_do_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    trainer(tmp_path, updates=1).train()
    out = capsys.readouterr().out
    for recipe in ("evaluate.py", "token_view.py", "merge.py"):
        assert f"python recipes/{recipe} {tmp_path}" in out
        assert (ROOT / "recipes" / recipe).is_file()


def test_the_line_of_a_sweep_is_a_display_too_and_shows_updates_alone(tmp_path, capsys):
    progress = Progress(4, enabled=True)
    progress.start("trpo, seed 0")
    trainer(tmp_path, updates=2, evals=runs.HELD_OUT, eval_steps=1, display=progress).train()
    (line,) = capsys.readouterr().out.splitlines()  # the second one comes too soon
    assert line.startswith(" 25%  about 0 min left  trpo, seed 0  update 1  score ")
    assert progress.done == 2 and not hasattr(progress, "anything")


def test_the_banner_names_the_limits_that_an_algorithm_has(tmp_path):
    kl = "0.2 nats per completion, each update"
    for algorithm, limit, budget in (
        (TRPO(max_kl=0.2, max_ref_kl=1.5), kl, "1.5 nats per completion, whole run"),
        (TRPO(max_kl=0.2, max_ref_kl=None), kl, "none"),
        (PPO(), None, None),
    ):
        made = trainer(tmp_path, algorithm=algorithm)
        facts = banner(made.parts, made.algorithm.limits, made.archive.settings)
        assert facts.get("max_kl") == limit
        assert facts.get("max_ref_kl") == budget
        assert facts["batch"].startswith("8 completions an update (4 prompts x 2)")
        assert facts["algorithm"] == type(algorithm).__name__ and len(facts) <= 12
