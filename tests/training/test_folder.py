"""A run's folder: whether it may be used, its logs, and its lock. Cases C06, S03 and X11."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import trpo_lm
from trpo_lm.errors import TrpoLMError
from trpo_lm.training.folder import OutputLock, RunFolder, check_run_name

fork = multiprocessing.get_context("fork")  # a new interpreter would import torch for seconds

# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    ["../../x", "/abs", "a\0b", "-rf", ".hidden", "x" * 300, "", "a/b", "a b", "a\n", "ü", ".."],
)
def test_S03_run_name_is_a_slug(name):
    with pytest.raises(TrpoLMError, match="run_name"):
        check_run_name(name)


def test_S03_run_name_accepted():
    for name in ("a", "film-1.2_b", "0", "x" * 100):
        assert check_run_name(name) == name


def test_S03_run_name_as_a_link_out_of_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (root / "inside").mkdir()
    with pytest.raises(TrpoLMError, match="leads out"):
        check_run_name("link", root=root)
    assert check_run_name("inside", root=root) == "inside"
    assert check_run_name("new", root=root) == "new"


# ---------------------------------------------------------------- the output folder


def test_C06_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(TrpoLMError, match=r"not empty: it holds metrics\.jsonl"):
        RunFolder(tmp_path).require_usable(resume=None, overwrite=False)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    RunFolder(tmp_path).require_usable(resume="auto")
    RunFolder(tmp_path).require_usable(overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_C06_new_empty_or_abandoned_folders_are_fine(tmp_path):
    folder = tmp_path / "a" / "b"
    RunFolder(folder).require_usable()
    assert folder.is_dir()
    (folder / ".lock").write_text("1\n")
    (folder / ".tmp-checkpoint-000001-ab").mkdir()
    RunFolder(folder).require_usable()


def test_C06_a_file_or_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("keep me")
    for path in (file, file / "below"):
        with pytest.raises(TrpoLMError, match="is a file"):
            RunFolder(path).require_usable()
    assert file.read_text() == "keep me"
    with pytest.raises(TrpoLMError, match="cannot write"):
        RunFolder("/proc/trpo_lm").require_usable()
    with pytest.raises(TrpoLMError, match="cannot write"):
        RunFolder("a\0b").require_usable()
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)

    def refuse(**_):  # what the kernel says; the tests may run as root, which it lets through
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(TrpoLMError, match="Permission denied"):
        RunFolder(folder).require_usable()


# ---------------------------------------------------------------- logs


def test_an_update_is_logged_after_its_completions_and_truncation_drops_both(tmp_path):
    run = RunFolder(tmp_path)
    assert run.rows(9) == []
    for update in (1, 2, 3):
        run.append({"update": update, "kl": 0.1}, [{"update": update, "score": i} for i in (0, 1)])
    assert [row["update"] for row in run.rows(2)] == [1, 2]
    run.truncate(2)
    assert [row["update"] for row in run.rows(9)] == [1, 2]
    assert len(run.completions.read_text().splitlines()) == 4


def test_checkpoints_come_newest_first_and_nothing_else_is_one(tmp_path):
    run = RunFolder(tmp_path)
    for name in ("checkpoint-000002-replaced", "checkpoint-1000000", "checkpoint-best", "plots"):
        (tmp_path / name).mkdir()
    for update in (2, 10):
        run.checkpoint(update).mkdir()
    assert [p.name for p in run.checkpoints()] == [
        "checkpoint-1000000", "checkpoint-000010", "checkpoint-000002",
        "checkpoint-000002-replaced",
    ]  # fmt: skip


def test_the_folder_needs_no_torch():
    code = "import sys, trpo_lm.training.folder; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------- the lock

HOLD = """
import sys
from trpo_lm.training.folder import OutputLock
with OutputLock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_X11_a_second_process_is_kept_out(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        for _ in range(2):
            with pytest.raises(TrpoLMError, match=f"is locked by pid {holder.pid}") as error:
                OutputLock(tmp_path).__enter__()
            assert error.value.exit_code == 2
        holder.kill()
        holder.wait(30)
        assert (tmp_path / ".lock").exists()
        with OutputLock(tmp_path):  # the lock of a dead process is taken over
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    finally:
        holder.kill()
        holder.communicate()
    assert list(tmp_path.iterdir()) == []


def test_X11_the_outermost_holder_removes_the_lock(tmp_path):
    with OutputLock(tmp_path):
        with OutputLock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()
    with pytest.raises(ZeroDivisionError), OutputLock(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("content", ["", "words", "-1", "0", "99999999999999999999"])
def test_X11_a_lock_file_that_names_no_process(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with OutputLock(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def test_X11_nobody_waits_for_a_pipe_or_writes_through_a_link(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(TrpoLMError, match="not a regular file"), OutputLock(tmp_path):
        pass
    (tmp_path / ".lock").unlink()
    (tmp_path / "keep").write_text("keep")
    (tmp_path / ".lock").symlink_to(tmp_path / "keep")
    with pytest.raises(TrpoLMError, match="it is a link"), OutputLock(tmp_path):
        pass
    assert (tmp_path / "keep").read_text() == "keep"


def test_X11_a_child_that_outlives_its_parent_holds_no_lock(tmp_path):
    code = HOLD.replace(
        'print("lo', 'import os, time\n    os.fork() or time.sleep(30)\n    print("lo'
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    holder.kill()
    holder.wait(30)
    with OutputLock(tmp_path):
        pass


def test_fcntl_is_imported_nowhere():
    package = Path(trpo_lm.__file__).parent
    assert not [p for p in package.rglob("*.py") if "fcntl" in p.read_text(encoding="utf-8")]


def test_X11_only_one_of_many_gets_the_lock(tmp_path):
    (tmp_path / ".lock").write_text("0")
    won, done = fork.Value("i", 0), fork.Event()

    def attempt():
        try:
            with OutputLock(tmp_path):
                with won.get_lock():
                    won.value += 1
                done.wait(30)
        except TrpoLMError:
            sys.exit(2)

    children = [fork.Process(target=attempt) for _ in range(8)]
    for child in children:
        child.start()
    while sum(child.is_alive() for child in children) > 1:
        time.sleep(0.01)
    done.set()
    for child in children:
        child.join(30)
    assert won.value == 1
    assert sorted(child.exitcode for child in children) == [0] + [2] * 7
