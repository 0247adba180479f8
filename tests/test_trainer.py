"""Whole runs of one process: cases R02-R13, N05-N11, T02, T03, C07, S05, S07 and what users see."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import tiny
import torch
from peft import PeftModel
from runs import checkpoints, checksum, trainer
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

import trpo_lm.trainer
import trpo_lm.trpo
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.metrics import METRICS
from trpo_lm.ppo import PPO
from trpo_lm.trust_region import Step

ROOT = Path(__file__).resolve().parent.parent
NAMES = {name for name in METRICS if not name.startswith("time/")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(trpo_lm.outcome, "draw", lambda run: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def bad_in(call, value, at=2):
    """Return a reward that says `value` about sample `at` in its n-th call; an exception raises."""
    left = [call]

    def reward(completions):
        left[0] -= 1
        said = runs.score(completions)
        if left[0] == 0:
            if isinstance(value, Exception):
                raise value
            said[at] = value
        return said

    return reward


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (math.inf, r"R02 returned inf for sample 2 \(prompt 'w"),
        (-math.inf, r"R02 returned -inf for sample 2"),
        (math.nan, r"R03 returned nan for sample 2"),
        (KeyError("label"), r"R06 raised KeyError: 'label'"),
    ],
)
def test_R02_R03_R06_a_fault_in_the_third_update_leaves_the_second_to_go_on_from(
    tmp_path, value, told
):
    case, told = told[:3], told[3:].strip()
    made = trainer(tmp_path / case, reward=bad_in(3, value), updates=4, save_steps=0)
    with pytest.raises(RunFault, match=told) as caught:
        made.train()
    assert caught.value.exit_code == 3
    assert "reward 'reward'" in str(caught.value)
    assert "saved checkpoint-000002; go on with --resume_from_checkpoint auto" in str(caught.value)
    if isinstance(value, Exception):
        assert caught.value.__cause__.__cause__ is value
    rows = runs.rows(tmp_path / case)
    assert [row["update"] for row in rows] == [1, 2] == [row["update"] for row in made.rows]
    kept = made.policy.parameters.checksum()
    assert kept == rows[-1]["policy/checksum"] == checksum(tmp_path / case)

    def reward(completions):
        return runs.score(completions)

    trainer(
        tmp_path / case, reward=reward, updates=4, save_steps=0, resume_from_checkpoint="auto"
    ).train()
    trainer(tmp_path / "straight", reward=reward, updates=4, save_steps=0).train()
    runs.assert_same_end(tmp_path / case, tmp_path / "straight", 4)


def test_R03_skip_drops_the_row_and_counts_it(tmp_path):
    trainer(tmp_path, reward=bad_in(1, math.nan), updates=2, on_bad_reward="skip").train()
    rows = runs.rows(tmp_path)
    assert [row["rewards/skipped"] for row in rows] == [1, 0]
    assert rows[0]["line_search/accepted"]
    first = json.loads(runs.completions(tmp_path).splitlines()[2])
    assert first["score"] is None and first["nonfinite"] == ["score"]


def test_R04_rows_may_abstain_and_a_batch_that_all_abstains_is_skipped(tmp_path, capsys):
    calls = []

    def reward(completions):
        calls.append(1)
        said = runs.score(completions)
        return [None] * 8 if len(calls) in (1, 3) else [None, *said[1:]]

    made = trainer(tmp_path, reward=reward, updates=4)
    start = made.policy.parameters.checksum()
    made.train()
    rows = runs.rows(tmp_path)
    assert [row["skipped"] for row in rows] == [
        "no reward: all 8 completions abstained", None,
        "no reward: all 8 completions abstained", None,
    ]  # fmt: skip
    sums = [start, *(row["policy/checksum"] for row in rows)]
    assert sums[0] == sums[1] != sums[2] == sums[3] != sums[4]
    assert rows[0]["objective/score_mean"] is None and rows[0]["trust_region/kl"] is None
    assert rows[1]["critic/explained_variance"] is not None
    out = capsys.readouterr().out
    assert "update 1/4  skipped: no reward: all 8 completions abstained" in out
    assert "(+" in out.split("update 4/4")[1] or "(-" in out.split("update 4/4")[1]


@pytest.mark.parametrize("algorithm", list(runs.ALGORITHMS))
def test_R12_a_constant_reward_skips_the_update(tmp_path, algorithm):
    made = trainer(
        tmp_path, reward=lambda completions: [0.3] * len(completions), updates=2,
        algorithm=algorithm,
    )  # fmt: skip
    start = made.policy.parameters.checksum()
    made.train()
    assert made.policy.parameters.checksum() == start
    for row in runs.rows(tmp_path):
        assert row["skipped"] == "zero advantage: every completion got the same reward"
        assert set(row) >= NAMES


@pytest.mark.parametrize(("scale", "shift"), [(1e12, 0.0), (1.0, 1e9)])
def test_R13_scale_and_shift_of_the_rewards_leave_the_run_alone(tmp_path, scale, shift):
    def moved(completions):
        return [scale * x + shift for x in runs.score(completions)]

    plain = trainer(tmp_path / "a", updates=2)
    other = trainer(tmp_path / "b", reward=moved, updates=2)
    plain.train(), other.train()
    one, two = (
        torch.cat([p.flatten() for p in t.policy.parameters.tensors]) for t in (plain, other)
    )
    assert (one - two).norm() <= 1e-4 * one.norm()


def test_log_metric_and_columns_reach_the_rows(tmp_path):
    def reward(completions, label, log_metric):
        log_metric("mine/words", len(completions))
        assert all(isinstance(x, int) for x in label)
        return runs.score(completions)

    data = [{"prompt": p, "label": i} for i, p in enumerate(runs.PROMPTS)]
    trainer(tmp_path, reward=[reward, runs.score], data=data, updates=1).train()
    (row,) = runs.rows(tmp_path)
    assert row["mine/words"] == 8.0
    assert row["rewards/reward"] == row["rewards/score"] == row["objective/score_mean"] / 2


# ---------------------------------------------------------------- trust region, over a run


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_N06_N11_every_step_of_a_run_keeps_both_distances(tmp_path, kind):
    """One batch measures the reference KL to a few per cent: fresh completions judge the budget."""
    K = 0.12
    algorithm = trpo_lm.trpo.TRPO(max_kl=0.05, max_ref_kl=K, fisher_completions=32)
    made = trainer(
        tmp_path, model=tiny.build(kind), algorithm=algorithm, updates=10,
        prompts_per_update=7, completions_per_prompt=10, save_steps=0,
        evals=runs.PROMPTS * 40, eval_prompts=280,
    )  # fmt: skip
    made.train()
    rows = runs.rows(tmp_path)
    accepted = [row for row in rows if row["line_search/accepted"]]
    assert len(accepted) > 5
    for row in accepted:
        assert 0 <= row["trust_region/kl"] <= 0.05
        if row["trust_region/case"] == "old":
            assert row["trust_region/actual_gain"] > 0
    assert {row["trust_region/case"] for row in rows} & {"ref", "both", "recover"}
    assert 0.5 * K < made.after["ref_kl"] < 1.2 * K


def test_N05_a_run_goes_on_after_a_step_that_nothing_could_save(tmp_path, monkeypatch):
    real, calls = trpo_lm.trpo.plane_step, []

    def worse(*args, **kwargs):
        step = real(*args, **kwargs)
        calls.append(1)
        wrong = tuple(-m for m in step.multipliers)
        return Step(**{**vars(step), "multipliers": wrong}) if len(calls) == 2 else step

    monkeypatch.setattr(trpo_lm.trpo, "plane_step", worse)
    made = trainer(tmp_path, updates=3)
    made.train()
    rows = runs.rows(tmp_path)
    assert [row["line_search/accepted"] for row in rows] == [True, False, True]
    assert rows[1]["line_search/trials"] == made.algorithm.line_search_trials
    assert rows[1]["line_search/reason"] and rows[1]["trust_region/kl"] == 0
    assert rows[0]["policy/checksum"] == rows[1]["policy/checksum"] != rows[2]["policy/checksum"]


def test_K04_noise_in_the_policy_is_found_before_the_first_step(tmp_path):
    made = trainer(tmp_path, updates=2)
    made.policy._transformer.h[0].mlp.dropout = torch.nn.Dropout(0.5).train()
    with pytest.raises(RunFault, match="two passes of the same policy differ"):
        made.train()
    assert checkpoints(tmp_path) == ["checkpoint-000000"]


# ---------------------------------------------------------------- before anything is generated


def test_T02_T03_prompts_are_checked_at_construction(tmp_path):
    with pytest.raises(TrpoLMError, match="dataset is empty"):
        trainer(tmp_path, data=[])
    with pytest.raises(TrpoLMError, match=r"no column 'prompt'; the columns are \['text'\]"):
        trainer(tmp_path, data=[{"text": "w1"}])
    with pytest.raises(TrpoLMError, match="row 1 holds None"):
        trainer(tmp_path, data=["w1", None])
    long = " ".join(["w1"] * 70)
    with pytest.raises(TrpoLMError, match=r"71 tokens and only 59 fit .*row 1\)") as caught:
        trainer(tmp_path, data=["w1", long])
    assert "truncate_prompts='left'" in caught.value.hint
    made = trainer(tmp_path, data=["w1", long], truncate_prompts="left")
    assert made.prompts.prompts[1].split() == ["w1"] * 58  # and <bos>
    with pytest.raises(TrpoLMError, match="leave no room for a prompt"):
        trainer(tmp_path, max_completion_length=64)
    with pytest.raises(TrpoLMError, match="row 0"):
        trainer(tmp_path, evals=[3])


def test_a_reward_that_wants_a_column_finds_it_in_both_datasets(tmp_path):
    def reward(completions, label):
        return runs.score(completions)

    data = [{"prompt": "w1", "label": 0}]
    trainer(tmp_path, reward=reward, data=data, evals=data)
    with pytest.raises(TrpoLMError, match="requires label"):
        trainer(tmp_path, reward=reward, data=data, evals=["w1"])


def test_C07_a_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.perf_counter()
    with pytest.raises(TrpoLMError, match="not found locally and HF_HUB_OFFLINE=1") as caught:
        trainer(tmp_path, model=str(tmp_path / "no-such-model"))
    assert caught.value.exit_code == 2
    assert time.perf_counter() - start < 5


def test_S05_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "mine",
                "auto_map": {
                    "AutoConfig": "mine.MineConfig",
                    "AutoModelForCausalLM": "mine.MineModel",
                },
            }
        )
    )
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    start = time.perf_counter()
    with pytest.raises(TrpoLMError, match="contains custom code"):
        trainer(tmp_path / "run", model=str(folder))
    assert not ran.exists()
    assert time.perf_counter() - start < 5  # it did not wait for an answer either


def test_unknown_trackers_are_refused(tmp_path):
    with pytest.raises(TrpoLMError, match="nonsense is not supported") as caught:
        trainer(tmp_path, report_to="nonsense")
    assert caught.value.where == "report_to"


# ---------------------------------------------------------------- what is left behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything: evaluation, pictures, trackers, secrets in the environment."""
    folder = tmp_path_factory.mktemp("finished")
    tiny.build().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    secret = "hf_" + "x" * 20
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
            patch.setenv(name, secret)
        patch.setattr(sys, "orig_argv", ["python", "train.py", "--hub_token", secret, "--seed=1"])
        made = trpo_lm.trainer.Trainer(
            str(folder / "model"), runs.score, runs.PROMPTS,
            runs.config(folder / "run", updates=3, eval_steps=2, report_to="tensorboard"),
            runs.HELD_OUT, peft_config=tiny.lora(), algorithm=runs.ALGORITHMS["trpo"](),
        )  # fmt: skip
        made.train()
    return folder, made, secret


def test_S07_no_secret_is_written_anywhere(finished):
    folder, _, secret = finished
    written = [p for p in (folder / "run").rglob("*") if p.is_file()]
    assert len(written) > 20
    assert not [p for p in written if secret.encode() in p.read_bytes()]
    assert "--hub_token '***'" in (folder / "run" / "README.md").read_text()


def test_the_folder_of_a_finished_run(finished):
    run = finished[0] / "run"
    expected = {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint-000003",
        "completions.jsonl", "config.yaml", "metrics.jsonl", "plots", "tokenizer.json",
        "tokenizer_config.json", "value_head.safetensors",
    }  # fmt: skip
    assert expected <= {p.name for p in run.iterdir()}
    assert (run / "plots" / "overview.png").is_file()
    card = (run / "README.md").read_text()
    assert "## Samples" in card and "w2 w1" in card
    rows = runs.rows(run)
    assert [row["objective/eval_score_mean"] is None for row in rows] == [True, False, False]
    assert [row["completions"] for row in rows] == [8, 16, 24]


def test_vanilla_peft_loads_the_adapter_and_says_the_same(finished):
    folder, made, _ = finished
    base = trpo_lm.trainer.load_tokenizer(str(folder / "model"))
    model = tiny.build()
    loaded = PeftModel.from_pretrained(model, str(folder / "run")).eval()
    ids = base("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**ids).logits, made.policy.model(**ids).logits)


def test_tensorboard_gets_the_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (finished[0] / "run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    told = {e.step: e.value for e in events.Scalars("train/objective/score_mean")}
    rows = runs.rows(finished[0] / "run")
    assert told == {r["update"]: pytest.approx(r["objective/score_mean"]) for r in rows}


def test_the_model_can_be_saved_elsewhere_before_any_update(tmp_path):
    made = trainer(tmp_path / "run")
    made.save_model(tmp_path / "copy")
    assert (tmp_path / "copy" / "adapter_model.safetensors").is_file()


def test_a_full_disk_at_the_end_is_told_and_mended_by_going_on(tmp_path, monkeypatch):
    made = trainer(tmp_path, updates=1)
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device", "README.md")
        patch.setattr(made.tokenizer, "save_pretrained", lambda folder: (_ for _ in ()).throw(full))
        with pytest.raises(RunFault, match="No space left on device") as caught:
            made.train()
    assert "--resume_from_checkpoint auto" in caught.value.hint
    trainer(tmp_path, updates=1, resume_from_checkpoint="auto").train()
    assert (tmp_path / "README.md").is_file()


def test_S09_a_full_disk_while_an_update_is_recorded_leaves_the_one_before(tmp_path, monkeypatch):
    real, left = trpo_lm.trainer.append_json_line, [22]

    def write(path, row):
        left[0] -= 1
        if left[0] <= 0:
            raise RunFault("a line could not be written: No space left on device", where=str(path))
        real(path, row)

    made = trainer(tmp_path, updates=3, save_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(trpo_lm.trainer, "append_json_line", write)
        with pytest.raises(RunFault, match=r"saved checkpoint-000002"):
            made.train()
    trainer(tmp_path, updates=3, save_steps=0, resume_from_checkpoint="auto").train()
    trainer(tmp_path / "b", updates=3, save_steps=0).train()
    runs.assert_same_end(tmp_path, tmp_path / "b", 3)


# ---------------------------------------------------------------- evaluation and callbacks


def test_evaluation_without_prompts_and_at_every_update(tmp_path):
    made = trainer(tmp_path / "a", updates=2)
    with pytest.raises(TrpoLMError, match="nothing to evaluate on"):
        made.evaluate()
    assert made.before is None and made.after is None
    made = trainer(tmp_path / "b", updates=2, evals=runs.HELD_OUT, eval_steps=1, eval_prompts=2)
    theta = made.policy.parameters.checksum()
    assert made.evaluate(reference=True)["ref_kl"] == 0.0
    assert made.policy.parameters.checksum() == theta
    made.train()
    first, again = made.evaluate(), made.evaluate()
    assert first["rollout"].completions == again["rollout"].completions  # fixed seeds
    assert len(first["rollout"]) == 2
    assert runs.rows(tmp_path / "b")[-1]["objective/eval_score_mean"] == first["score"]


class Listener(TrainerCallback):
    def __init__(self, **asks):
        self.heard, self.asks = [], asks

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def hear(args, state, control, **kwargs):
            self.heard.append((name, state.global_step))
            if name == "on_log":
                assert kwargs["logs"]["objective/score_mean"] is not None
            if name == "on_evaluate":
                assert set(kwargs["metrics"]) == {"eval_score_mean", "eval_ref_kl"}
            for flag, (event, step) in self.asks.items():
                if (event, step) == (name, state.global_step):
                    setattr(control, flag, True)
            return control

        return hear


def test_callbacks_hear_what_transformers_would_tell_them(tmp_path):
    listener = Listener()
    trainer(
        tmp_path, updates=2, evals=runs.HELD_OUT, eval_steps=2, save_steps=1, logging_steps=2,
        callbacks=[listener],
    ).train()  # fmt: skip
    assert listener.heard == [
        ("on_train_begin", 0),
        ("on_step_begin", 0), ("on_step_end", 1), ("on_save", 1),
        ("on_step_begin", 1), ("on_step_end", 2), ("on_evaluate", 2), ("on_log", 2), ("on_save", 2),
        ("on_train_end", 2),
    ]  # fmt: skip


def test_what_callbacks_ask_for_is_done(tmp_path):
    listener = Listener(
        should_save=("on_step_end", 1),
        should_evaluate=("on_step_end", 2),
        should_training_stop=("on_evaluate", 2),
    )
    made = trainer(
        tmp_path, updates=5, save_steps=0, logging_steps=5, evals=runs.HELD_OUT,
        callbacks=[listener],
    )  # fmt: skip
    rows = made.train()
    assert len(rows) == 2 and rows[1]["objective/eval_score_mean"] is not None
    assert checkpoints(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]
    assert (tmp_path / "README.md").is_file()
    assert ("on_log", 2) in listener.heard and ("on_log", 1) not in listener.heard
    trainer(tmp_path, updates=3, evals=runs.HELD_OUT, resume_from_checkpoint="auto").train()
    assert len(runs.rows(tmp_path)) == 3


def test_stopping_by_callback_evaluates_and_saves(tmp_path):
    listener = Listener(should_training_stop=("on_step_end", 1))
    made = trainer(tmp_path, updates=5, save_steps=0, evals=runs.HELD_OUT, callbacks=[listener])
    made.train()
    assert made.after is not None and checkpoints(tmp_path) == ["checkpoint-000001"]


# ---------------------------------------------------------------- the screen


def test_nothing_but_our_own_lines_reaches_the_screen(tmp_path, capfd):
    tiny.build().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    capfd.readouterr()
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (tmp_path / "p.csv").write_text("prompt\nw1 w2\nw3\n")
    trpo_lm.trainer.Trainer(
        str(tmp_path / "model"), runs.score, str(tmp_path / "p.jsonl"),
        runs.config(tmp_path / "run", updates=1), str(tmp_path / "p.csv"),
    ).train()  # fmt: skip
    out, errors = capfd.readouterr()
    assert errors == ""
    assert "\x1b" not in out and "\r" not in out and "it/s" not in out
    banner = out.split("\n\n")[0].splitlines()
    assert len(banner) <= 12 and banner[0].startswith("model ")
    assert transformers_logging.is_progress_bar_enabled()


PROMPTS = runs.PROMPTS


def test_ppo_names_its_numbers_alike(tmp_path):
    relatives = {
        "reinforce": PPO(epochs=1, minibatches=1, clip=None, beta=0.0),
        "rloo": PPO(advantage="leave_one_out", epochs=1, minibatches=1, clip=None),
        "grpo": PPO(advantage="group_normalised"),
    }
    for name, algorithm in relatives.items():
        trainer(tmp_path / name, algorithm=algorithm, updates=2).train()
        for row in runs.rows(tmp_path / name):
            assert set(row) >= NAMES
            assert row["trust_region/kl"] > 0 and row["trust_region/case"] is None
            assert (row["critic/loss"] is None) == (name != "reinforce")


@pytest.mark.slow
def test_C07_the_recipe_says_it_in_two_lines(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "sentiment.py"), "--model", "no/such"]
    command += ["--output_dir", str(tmp_path / "run")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: model 'no/such' not found locally and HF_HUB_OFFLINE=1")
    assert hint.startswith("hint: ")
