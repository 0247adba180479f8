"""What a launcher, a shell and other libraries pass: cases B19, B40 and B59."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import runs
from runs import trainer
from trpo_lm import TRPO, PPOTrainer, Trainer, TrainerConfig, TRPOTrainer
from trpo_lm.analysis.saved_run import open_run
from trpo_lm.errors import TrpoLMError
from trpo_lm.report.figures import plot_run
from trpo_lm.storage import writable_file, writable_folder

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"updates": 1, "prompts_per_update": 2, "completions_per_prompt": 1}


def test_B19_a_home_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    trainer("~/x", **SMALL).train()
    assert (tmp_path / "home" / "x" / "MANIFEST.json").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MIXED_PRECISION", "bf16"), ("MIXED_PRECISION", "fp16"), ("MIXED_PRECISION", "fp8"),
        ("USE_FSDP", "true"), ("USE_DEEPSPEED", "true"), ("USE_MEGATRON_LM", "true"),
        ("DYNAMO_BACKEND", "INDUCTOR"), ("GRADIENT_ACCUMULATION_STEPS", "4"),
        ("USE_PARALLELISM_CONFIG", "true"),
    ],
)  # fmt: skip
def test_B19_what_a_launcher_asks_for_is_answered(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(TrpoLMError, match=f"{name.lower()} {value.lower()}") as caught:
        trainer(tmp_path, **SMALL)
    assert caught.value.where == "launcher"
    divides = name.startswith("USE_")  # FSDP, DeepSpeed, tensor parallelism
    assert ("shard_base" in caught.value.hint) == divides, caught.value.hint
    assert ("dtype" in caught.value.hint) != divides


@pytest.mark.parametrize(
    ("name", "value"),
    [("MIXED_PRECISION", "no"), ("USE_FSDP", "false"), ("DYNAMO_BACKEND", "NO"),
     ("GRADIENT_ACCUMULATION_STEPS", "1")],
)  # fmt: skip
def test_B19_a_launcher_that_asks_for_nothing_is_let_through(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    trainer(tmp_path, **SMALL)


@pytest.mark.parametrize("whole", [np.int64, np.uint8, int])
@pytest.mark.parametrize("real", [np.float32, np.float64, float])
def test_B40_paths_and_numbers_of_other_libraries(tmp_path, whole, real):
    tiny.build().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    options = {name: whole(value) for name, value in SMALL.items()}
    algorithm = TRPO(max_kl=real(0.05), cg_iterations=whole(3))
    made = trainer(
        tmp_path / "run", model=tmp_path / "model", algorithm=algorithm, temperature=real(0.5),
        **options,
    )  # fmt: skip
    made.train()
    run = open_run(tmp_path / "run", reward=runs.score)
    assert run.settings["updates"] == 1 and run.settings["temperature"] == 0.5
    config = TrainerConfig(output_dir=tmp_path / "path", updates=np.int32(1))
    assert config.updates == 1
    for bad in (np.bool_(True), torch.ones(2), "1", 10**400, np.nan):
        with pytest.raises(TrpoLMError):
            TrainerConfig(temperature=bad)


# ---------------------------------------------------------------- B59: outputs before the work

IMPOSSIBLE = {
    "below a file": lambda p: p / "file" / "out",
    "proc": lambda p: Path("/proc/trpo_lm/out"),
    "NUL": lambda p: f"{p}/a\0b/out",
    "long": lambda p: p / ("x" * 300) / "out",
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
@pytest.mark.parametrize("check", [writable_file, writable_folder])
def test_B59_a_place_that_cannot_be_written_is_one_error(tmp_path, kind, check):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(TrpoLMError, match="cannot write"):
        check(IMPOSSIBLE[kind](tmp_path))


def test_B59_files_folders_and_links_in_the_wrong_place(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to("folder")
    for place in ("folder", "link"):
        with pytest.raises(TrpoLMError, match="not a regular file"):
            writable_file(tmp_path / place)
    with pytest.raises(TrpoLMError, match="it is a link"):
        writable_folder(tmp_path / "link")
    with pytest.raises(TrpoLMError, match="not empty"):
        writable_folder(tmp_path, new=True)


@pytest.mark.parametrize(
    "command",
    [["evaluate", "RUN", "--output", "OUT"], ["token_view", "RUN", "--output", "OUT"],
     ["merge", "RUN", "OUT"]],
    ids=lambda c: c[0],
)  # fmt: skip
def test_B59_a_recipe_tries_its_output_before_the_work(tmp_path, command):
    (tmp_path / "file").write_text("keep")
    words = {"RUN": "no/such/run", "OUT": str(tmp_path / "file" / "out")}
    name, *rest = [words.get(word, word) for word in command]
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *rest],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "cannot write" in done.stderr
    assert "loading torch" not in done.stdout and "Traceback" not in done.stderr


def test_B59_a_report_tries_its_output_before_it_draws(tmp_path):
    trainer(tmp_path / "run", **SMALL).train()
    (tmp_path / "file").write_text("keep")
    with pytest.raises(TrpoLMError, match="cannot write"):
        plot_run(tmp_path / "run", tmp_path / "file" / "out")


@pytest.mark.parametrize("make", [Trainer, TRPOTrainer, PPOTrainer, Trainer.plan, Trainer.examine])
def test_a_third_argument_without_its_name_is_named_in_the_error(make):
    with pytest.raises(TypeError, match=r"only model and reward_funcs .* write train_dataset=\.+$"):
        make("lm", runs.score, ["w1"])
    with pytest.raises(TypeError, match=r"write train_dataset=\.\.\., args=\.\.\.$"):
        make("lm", runs.score, ["w1"], None, eval_dataset=["w2"])
