"""The folder of a finished run: case S07, and what vanilla peft makes of it."""

import sys

import pytest
import tiny
import torch
from peft import PeftModel

import runs
from runs import trainer
from trpo_lm import Trainer
from trpo_lm.lm.loading import load_tokenizer


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
        made = Trainer(
            str(folder / "model"), runs.score, train_dataset=runs.PROMPTS,
            args=runs.config(folder / "run", updates=3, eval_steps=2, report_to="tensorboard"),
            eval_dataset=runs.HELD_OUT, peft_config=tiny.lora(),
            algorithm=runs.ALGORITHMS["trpo"](),
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
    base = load_tokenizer(str(folder / "model"))
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
