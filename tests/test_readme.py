"""The documents: every file::symbol exists, every link leads somewhere, every command is right."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

import trpo_lm
from trpo_lm import Trainer, TrainerConfig
from trpo_lm.report.glossary import METRICS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
DOCUMENTS = (
    "README.md", "recipes/README.md", "CONTRIBUTING.md", "docs/guide.md", "docs/method.md",
    "docs/results.md", "docs/notebook.md", "docs/processes.md",
)  # fmt: skip
PAGES = (
    *DOCUMENTS, "CHANGELOG.md", "tests/README.md", "data/README.md", "docs/metrics.md",
    "docs/settings.md", "recipes/statements/README.md",
)  # fmt: skip
LAUNCHERS = {"python", "accelerate", "torchrun", "trpo-lm"}
TOOLS = {"pip", "ruff", "pyright", "pytest"}


def commands():
    """Return (document, command) for every line of a code block that a shell would run."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            for part in line.split("&&") if line.startswith("    ") else ():
                if part.split()[:1] and part.split()[0] in LAUNCHERS | TOOLS:
                    found.append((document, shlex.join(shlex.split(part, comments=True))))
    return sorted(set(found))


COMMANDS = commands()
RECIPES = [(d, c) for d, c in COMMANDS if "recipes/" in c]
OTHERS = [(d, c) for d, c in COMMANDS if "recipes/" not in c]


def test_the_readme_is_read_without_scrolling_sideways_or_for_long():
    assert len(README.splitlines()) <= 120
    assert not [line for line in README.splitlines() if len(line) > 100]


def test_a_model_trains_before_the_readme_uses_a_term_of_the_method():
    first = README[: README.index(".train()")]
    for term in ("MDP", "Fisher", "conjugate", "critic", "surrogate", "natural gradient", "GAE"):
        assert term not in first


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`([\w/]+\.py)::([\w.]+)`", METHOD))))
def test_every_symbol_of_the_map_exists(place):
    file, symbol = place
    body = ast.parse((ROOT / "trpo_lm" / file).read_text(encoding="utf-8")).body
    for part in symbol.split("."):
        found = [n for n in body if getattr(n, "name", None) == part]
        assert found, f"{file} has no {symbol}"
        body = getattr(found[0], "body", [])


@pytest.mark.parametrize("document", PAGES)
def test_every_link_leads_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert ((ROOT / document).parent / path).exists(), path


def test_every_recipe_has_its_command():
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "recipes").rglob("*.py"):
        if "__main__" not in path.read_text(encoding="utf-8"):
            continue  # a part of a recipe
        name = path.relative_to(ROOT).as_posix()
        assert re.search(rf"^    .*\b{re.escape(name)}", text, re.M), name


def test_every_case_has_its_text():
    tests = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py")]
    names = re.findall(r"^def (test_\w+)", "\n".join(tests), re.M)
    used = {case for name in names for case in re.findall(r"_([A-Z]\d\d)(?=_)", name)}
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert used == set(re.findall(r"^\| ([A-Z]\d\d) \|", text, re.M))


def examples():
    """Return (document, its n-th Python block, the block) of what a reader would run."""
    for document in ("README.md", "docs/guide.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for n, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.S)):
            yield pytest.param(block, id=f"{document}-{n}")


def lengths(completions):
    return [float(len(text)) for text in completions]


@pytest.mark.slow
@pytest.mark.parametrize("block", [*examples()])
def test_python_examples_run(block, tmp_path, monkeypatch):
    """With the embedded model in place of one on the hub, one short update, and a reader's run."""

    class Short(Trainer):
        def __init__(self, *given, args=None, **named):
            small = {"updates": 1, "prompts_per_update": 4, "max_completion_length": 4}
            super().__init__(*given, args=replace(args or TrainerConfig(), **small), **named)

    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trpo_lm, "Trainer", Short)
    if "runs/sentiment" in block:
        args = TrainerConfig(output_dir="runs/sentiment")
        Short("data/lm", lengths, train_dataset=["a", "b"], args=args).train()
    exec(compile(block.replace("Qwen/Qwen2.5-0.5B", "data/lm"), "example", "exec"), {})


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(ROOT / "recipes" / "tour.ipynb", as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=None, startup_timeout=600, resources=place).execute()
    shown = [o for cell in notebook.cells if "outputs" in cell for o in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in shown) == 4
    assert not re.findall(r"(?<!\w)/\w+/[\w./-]+", saved_outputs())


def saved_outputs():
    """Return all text of the outputs that the tour is committed with."""
    notebook = nbformat.read(ROOT / "recipes" / "tour.ipynb", as_version=4)
    return "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))


@pytest.mark.parametrize("name", ["metrics.md", "settings.md"])
def test_pages_that_the_code_states_are_as_it_states_them(name):
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == reference.PAGES[name](), "python docs/reference.py writes it again"


def test_every_metric_of_the_guide_exists():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:objective|trust_region|line_search|critic|signal|cg)/\w+)`", text)
    )
    assert named and named <= METRICS.keys()


def launch(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=1000, cwd=ROOT,
        env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(("document", "command"), RECIPES, ids=[c for _, c in RECIPES])
def test_every_command_of_a_recipe_is_understood(document, command):
    """One more flag, which there is not, must be all that is wrong with it."""
    words = shlex.split(command)
    script = next(word for word in words if word.startswith("recipes/"))
    words = words[words.index(script) + 1 :]
    source = (ROOT / script).read_text(encoding="utf-8")
    compile(source, script, "exec")
    if "trpo_lm.cli" in source:
        done = launch([script, *words, "--no_such_setting"])
        assert done.returncode == 2
        error = done.stderr.splitlines()[0]
        assert error.startswith("error: unknown setting 'no_such_setting'")
    elif "argparse" in source:
        done = launch([script, *words, "--no_such_setting"])
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].endswith("unrecognized arguments: --no_such_setting")
    else:  # it takes no argument
        assert words == []


@pytest.mark.parametrize(("document", "command"), OTHERS, ids=[c for _, c in OTHERS])
def test_every_other_command_names_what_there_is(document, command):
    words = shlex.split(command)
    if {"trpo-lm", "trpo_lm"} & {*words}:
        start = next(i for i, word in enumerate(words) if word in ("trpo-lm", "trpo_lm"))
        done = launch(["-m", "trpo_lm", *words[start + 1 :], "--no_such_setting"])
        assert done.returncode == 2
        assert "no_such_setting" in done.stderr.splitlines()[-2]
        return
    if words[:2] == ["python", "-m"] and words[2].startswith("trpo_lm."):
        assert importlib.util.find_spec(words[2]) is not None
        done = launch(["-m", words[2], "--help"])
        assert done.returncode == 0 and "usage: " in done.stdout
        return
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if words[0] == "python" and words[1].endswith(".py"):
        compile((ROOT / words[1]).read_text(encoding="utf-8"), words[1], "exec")
        return
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    assert words[0] in TOOLS
    assert words[0] == "pip" or re.search(rf'"{words[0]}[=>]', settings), "not in the extra"
    for word in words[1:]:
        assert not word.startswith("tests/") or (ROOT / word).exists()
    if "-m" in words:
        named = set(re.findall(r"\w+", words[words.index("-m") + 1])) - {"not", "and", "or"}
        assert named <= set(re.findall(r'^    "(\w+):', settings, re.M))


@pytest.mark.slow
def test_a_short_recipe_runs():
    done = launch(["recipes/theory.py"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "every statement holds"


@pytest.mark.slow
def test_the_recipe_for_checked_answers_runs(tmp_path):
    """On a model that knows no sums: what counts is that it ends with its table."""
    rows = [{"prompt": f"a film from {i} is", "answer": str(i)} for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch([
        "recipes/verifiable.py", "--model", "data/lm", "--dataset", str(data),
        "--eval_dataset", str(data), "--updates", "1", "--prompts_per_update", "8",
        "--completions_per_prompt", "2", "--max_completion_length", "6",
        "--output_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("accuracy on 8 held-out questions") :]
    assert all(word in table for word in ("score, greedy", "KL to reference", "nll"))


def test_citation_and_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == trpo_lm.__version__ and citation["license"] == "MIT"
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    assert f"## {trpo_lm.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
