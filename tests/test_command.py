"""The command `trpo-lm`, in a clone and installed from a wheel."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trpo_lm
from trpo_lm import __main__ as command
from trpo_lm.cli import recipe_command

ROOT = Path(__file__).resolve().parent.parent
ASKED_FOR = {
    "sentiment", "train", "verifiable", "compare", "evaluate", "token-view", "merge", "plan",
    "examine", "serve",
}  # fmt: skip


def call(monkeypatch, *words):
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["trpo-lm", *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        command.main()
    return stop.value.code


@pytest.mark.parametrize("words", [[], ["--help"], ["help"]])
def test_it_lists_every_recipe_with_its_first_line(monkeypatch, capsys, words):
    assert call(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    listed = dict(line[2:].split(maxsplit=1) for line in out.splitlines() if line[:2] == "  ")
    recipes = {p.stem.replace("_", "-") for p in (ROOT / "recipes").glob("*.py")}
    assert listed.keys() == recipes | {"plan", "examine"} and listed.keys() >= ASKED_FOR
    for name, summary in listed.items():
        assert summary == command.commands()[name].summary and summary.endswith(".")


def test_it_says_its_version(monkeypatch, capsys):
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"trpo_lm {trpo_lm.__version__}\n"


@pytest.mark.parametrize("words", ["", "sentiment --help", "train --help"])
def test_help_does_not_import_torch(words):
    code = (
        "import sys, trpo_lm.__main__\n"
        f"sys.argv[1:] = {words.split()}\n"
        "try: trpo_lm.__main__.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_an_unknown_command_is_answered_with_the_closest(monkeypatch, capsys):
    assert call(monkeypatch, "sentimnet", "--debug_me") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: unknown command 'sentimnet'; did you mean sentiment? (command line)"
    assert second == "hint: trpo-lm --help lists the commands"
    assert call(monkeypatch, "qqqqqq") == 2
    assert "did you mean" not in capsys.readouterr().err


def test_train_names_what_is_missing(monkeypatch, capsys):
    assert call(monkeypatch, "train", "--model", "gpt2", "--reward_function", "a:b") == 2
    assert capsys.readouterr().err.startswith("error: missing: --dataset (command line)\n")
    assert call(monkeypatch, "train") == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert all(name in line for name in ("--model", "--reward_model", "--dataset"))


def test_errors_of_a_recipe_and_its_exit_code_pass_through(monkeypatch, capsys):
    assert call(monkeypatch, "token_view", "runs/none", "--rwo", "3") == 2
    assert "unknown setting 'rwo'; did you mean row?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plan", "examine"])
def test_plan_and_examine_are_settings_of_sentiment(monkeypatch, capsys, name):
    assert command.commands()[name].script == ROOT / "recipes" / "sentiment.py"
    assert call(monkeypatch, name, "--max_kl", "-1") == 2
    assert "max_kl = -1.0" in capsys.readouterr().err


def test_serving_without_vllm_says_whose_python_to_take(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert call(monkeypatch, "serve", "LM") == 2
    assert str(ROOT / "recipes" / "serve.py") in capsys.readouterr().err


def test_commands_are_named_as_they_work_in_the_current_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    assert recipe_command("token_view") == "python recipes/token_view.py"
    assert call(monkeypatch, "merge", "--help") == 0
    assert "    python recipes/merge.py runs/sentiment merged\n" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert recipe_command("token_view") == "trpo-lm token-view"
    assert call(monkeypatch, "merge", "--help") == 0
    out = capsys.readouterr().out
    assert "    trpo-lm merge runs/sentiment merged\n" in out and "recipes/" not in out
    assert out.startswith("usage: trpo-lm merge RUN OUT ")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "merge.py").touch()  # not the package's
    assert recipe_command("merge") == "trpo-lm merge"


# ---------------------------------------------------------------- installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy: a build leaves files where it is made."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("trpo_lm", "recipes", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return a function that runs words of Python in an empty folder, the wheel installed."""
    target = tmp_path_factory.mktemp("target")
    pip("install", "--no-deps", "--target", target, wheel)

    def run(folder, *words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(target)}
        environment |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        if words[0] == "trpo-lm":
            words = (target / "bin" / "trpo-lm", *words[1:])
        return subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip

    return run


def pip(*words):
    quiet = ["--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words), *quiet], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_carries_the_package_its_recipes_and_their_data(wheel):
    assert wheel.stat().st_size < 20e6
    names = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("trpo_lm/")}
    package = Path(trpo_lm.__file__).parent
    modules = {f"trpo_lm/{p.relative_to(package).as_posix()}" for p in package.rglob("*.py")}
    recipes = {p.name for p in (ROOT / "recipes").glob("*.py")}
    data = {
        f"{model}/{p.name}"
        for model in ("lm", "reward_model", "judge")
        for p in (ROOT / "data" / model).iterdir()
    }
    data |= {"prompts_train.jsonl", "prompts_test.jsonl"}
    assert modules <= names
    assert {f"trpo_lm/recipes/{name}" for name in recipes} <= names
    assert {f"trpo_lm/data/{name}" for name in data} <= names
    assert not any("corpus" in name or "test_" in name for name in names)


@pytest.mark.slow
def test_the_installed_command_trains_and_looks_at_its_run(installed, tmp_path):
    listed = installed(tmp_path, "trpo-lm", "--help")
    assert listed.returncode == 0 and "  sentiment  " in listed.stdout, listed.stderr
    small = ["--updates", "1", "--prompts_per_update", "8", "--max_completion_length", "6"]
    done = installed(tmp_path, "trpo-lm", "sentiment", *small)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*.py")) and (tmp_path / "runs" / "sentiment").is_dir()
    following = done.stdout[done.stdout.index("next:") :].splitlines()[1:4]
    assert [line.split()[:2] for line in following] == [
        ["trpo-lm", name] for name in ("evaluate", "token-view", "merge")
    ]
    merged = installed(tmp_path, *following[2].split())
    assert merged.returncode == 0, merged.stderr
    judged = installed(tmp_path, *following[0].split(), "--prompts", "4", "--completions", "1")
    assert judged.returncode == 0, judged.stderr
    found = json.loads((tmp_path / "runs" / "sentiment" / "evaluation.json").read_text())
    assert found["judge"].endswith("trpo_lm/data/judge")  # the embedded one


@pytest.mark.slow
@pytest.mark.distributed
def test_the_installed_command_runs_under_a_launcher(installed, tmp_path):
    done = installed(
        tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "-m", "trpo_lm", "sentiment", "--updates=1", "--prompts_per_update=8",
        "--max_completion_length=6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trpo-lm evaluate" in done.stdout
