"""A run writes its page, and what follows a run from outside knows when it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from folders import write_run
from runs import trainer

from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.report.page_sections import State
from trpo_lm.report.run_page import RunPage
from trpo_lm.training import follow
from trpo_lm.training.archive import PAGE_SHARE
from trpo_lm.training.folder import OutputLock
from trpo_lm.training.follow import find_run, run_state, watch

VIEW = Path(__file__).parents[2] / "recipes" / "view.py"


@pytest.fixture
def written(monkeypatch):
    """The states of every page written, as (kind, note, updates)."""
    found = []
    write = RunPage.write

    def noted(page, state):
        path = write(page, state)
        found.append((state.kind, state.note, len(page.metrics.rows)))
        return path

    monkeypatch.setattr(RunPage, "write", noted)
    return found


def with_page(folder, **options):
    made = trainer(folder, **options)
    made.archive.plots = True
    return made


def test_a_run_writes_its_page_while_it_trains(tmp_path, written, monkeypatch):
    monkeypatch.setattr("trpo_lm.training.archive.PAGE_SHARE", 1e9)  # whenever it logs
    with_page(tmp_path / "run", updates=3, evals=runs.HELD_OUT, eval_steps=2).train()
    assert [(kind, n) for kind, _, n in written] == [
        ("running", 0), ("running", 1), ("running", 2), ("running", 3), ("finished", 3),
    ]  # fmt: skip
    assert run_state(tmp_path / "run") == State("finished")
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    pairs = [row for row in map(json.loads, lines) if row["of"] == "held-out prompt"]
    assert [row["update"] for row in pairs] == [2] * 3 + [3] * 3
    assert all(isinstance(row["reference"], str) for row in pairs)


def test_the_page_takes_a_small_share_of_the_time(tmp_path, written, monkeypatch):
    assert PAGE_SHARE <= 0.005
    clock = iter(range(0, 10_000, 10))  # each write takes ten seconds, and so does everything else
    monkeypatch.setattr("trpo_lm.training.archive.time.monotonic", lambda: next(clock))
    with_page(tmp_path / "run", updates=3).train()
    assert [kind for kind, *_ in written] == ["running", "finished"]


def test_a_page_that_cannot_be_written_is_told_once_and_no_more(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trpo_lm.training.archive.PAGE_SHARE", 1e9)
    monkeypatch.setattr(RunPage, "html", lambda *_: 1 / 0)
    rows = with_page(tmp_path / "run", updates=2).train()
    assert len(rows) == 2 and not (tmp_path / "run" / "run.html").exists()
    assert capsys.readouterr().out.count("run.html could not be written: division by zero") == 1


def test_the_page_of_a_run_that_failed_says_why(tmp_path, written):
    def reward(completions, trainer_state):
        if trainer_state.global_step == 1:
            raise ValueError("no more rewards")
        return runs.score(completions)

    with pytest.raises(RunFault):
        with_page(tmp_path / "run", updates=3, reward=reward).train()
    kind, note, updates = written[-1]
    assert (kind, updates) == ("stopped", 1) and "no more rewards" in note
    assert run_state(tmp_path / "run").kind == "stopped"


def test_samples_after_the_checkpoint_go_when_a_run_resumes(tmp_path):
    options = {"evals": runs.HELD_OUT, "eval_steps": 1, "save_steps": 1}
    trainer(tmp_path / "run", updates=2, **options).train()
    before = (tmp_path / "run" / "samples.jsonl").read_text()
    resumed = trainer(
        tmp_path / "run", updates=2, resume_from_checkpoint=str(tmp_path / "run/checkpoint-000001"),
        **options,
    )  # fmt: skip
    resumed.train()
    assert (tmp_path / "run" / "samples.jsonl").read_text() == before


# ---------------------------------------------------------------- from outside


@pytest.mark.parametrize("make", ["nothing", "file", "empty"])
def test_what_is_no_run_is_one_clear_error(tmp_path, make):
    folder = tmp_path / "it"
    if make == "file":
        folder.touch()
    elif make == "empty":
        folder.mkdir()
    with pytest.raises(TrpoLMError) as error:
        find_run(str(folder))
    assert error.value.where == "run" and error.value.hint and "it'" in error.value.what
    with pytest.raises(TrpoLMError, match="is needed"):
        find_run(None)


def test_a_run_is_running_finished_or_stopped(tmp_path):
    run = write_run(tmp_path / "run")
    assert run_state(run).kind == "stopped"
    (run / "MANIFEST.json").write_text('{"update": 5}')  # of an earlier end: the run went on
    assert run_state(run).kind == "stopped"
    (run / "MANIFEST.json").write_text('{"update": 6}')
    assert run_state(run) == State("finished")
    (run / ".lock").write_text(f"{os.getpid()}\n")  # left by a process that was killed
    assert run_state(run) == State("finished")
    with OutputLock(run):
        assert run_state(run) == State("running")
    assert run_state(run) == State("finished")


def test_watching_writes_what_is_new_and_ends_with_the_run(tmp_path, monkeypatch, written):
    run = write_run(tmp_path / "run", updates=1)
    lock, seconds = OutputLock(run), []

    def sleep(interval):
        seconds.append(interval)
        if len(seconds) == 2:
            (run / "metrics.jsonl").open("a").write('{"update": 2}\n')
        if len(seconds) == 4:
            lock.__exit__()

    monkeypatch.setattr(follow.time, "sleep", sleep)
    lock.__enter__()
    assert watch(RunPage(run), interval=3.0).kind == "stopped"
    assert [(kind, n) for kind, _, n in written] == [("running", 1), ("running", 2), ("stopped", 2)]
    assert seconds == [3.0] * 4


def test_watching_goes_on_when_the_page_cannot_be_written_for_a_moment(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", updates=1)
    lock, write, told = OutputLock(run), RunPage.write, []

    def fails_once(page, state):
        if not told:
            raise OSError(28, "No space left on device")
        return write(page, state)

    monkeypatch.setattr(RunPage, "write", fails_once)
    monkeypatch.setattr(follow.time, "sleep", lambda _: lock.__exit__())
    lock.__enter__()
    watch(RunPage(run), interval=1.0, told=told.append)
    assert len(told) == 1 and "No space" in told[0] and (run / "run.html").is_file()


def test_the_recipe_writes_the_page_and_loads_no_torch(tmp_path):
    run = write_run(tmp_path / "run")
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['view.py', {str(run)!r}, '--watch']\n"
        "try: runpy.run_path(%r, run_name='__main__')\n"
        "except SystemExit as stop: print('exit', stop.code)\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code % str(VIEW)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "the run is stopped" in done.stdout and "exit 0" in done.stdout
    assert (run / "run.html").as_uri() in done.stdout


@pytest.mark.parametrize(
    "words", [["no/such"], [], ["{run}", "--interval", "0"], ["{run}", "--completions_mb", "-1"]]
)
def test_the_recipe_answers_mistakes_in_one_line(tmp_path, words):
    run = write_run(tmp_path / "run", updates=1)
    words = [word.format(run=run) for word in words]
    done = subprocess.run(
        [sys.executable, str(VIEW), *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr and not (run / "run.html").exists()
