"""Finished means finished: a run that dies at any file operation is whole after the next start.

Cases B50, B51 and B52. `every_operation` by hand goes through all of them:

    PYTHONPATH=tests python tests/training/test_finished.py [new | longer] [killed | full]
"""

import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import disk
import pytest
import tiny
import torch

import runs
from runs import in_child, trainer
from trpo_lm.analysis.saved_run import open_run
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.training import folder as run_folder
from trpo_lm.training.folder import load_settings
from trpo_lm.training.manifest import read_manifest, verify

SETTINGS = {
    "updates": 2, "prompts_per_update": 2, "completions_per_prompt": 1,
    "max_completion_length": 3, "evals": runs.HELD_OUT[:1], "eval_steps": 1, "save_steps": 1,
    "save_total_limit": 1,
}  # fmt: skip
OUTCOME = {
    "adapter_model.safetensors", "adapter_config.json", "value_head.safetensors", "tokenizer.json",
    "tokenizer_config.json", "config.yaml", "README.md",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The threads of a process are not in a fork of it, and their number changes the rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(folder, **options):
    options = SETTINGS | {"resume_from_checkpoint": "auto"} | options
    return trainer(folder, **options).train()


def prepared(folder, scene):
    """A folder as the scene finds it: empty, or of a finished run that is made longer."""
    if scene == "longer":
        start(folder, updates=1)
    return folder


def assert_whole(folder, straight):
    """The folder holds the outcome of the straight run, and each file agrees with its manifest."""
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    manifest = read_manifest(folder)
    verify(folder, manifest)
    assert manifest.update == 2 and manifest.files.keys() == OUTCOME
    for name in OUTCOME - {"README.md", "config.yaml", "adapter_config.json"}:  # sets, in any order
        assert (folder / name).read_bytes() == (straight / name).read_bytes(), name
    assert (folder / "held_out.jsonl").read_bytes() == (straight / "held_out.jsonl").read_bytes()
    runs.assert_same_end(folder, straight, 2)
    one, other = ({**load_settings(f), "output_dir": ""} for f in (folder, straight))
    assert one == other
    verify(folder / "best", read_manifest(folder / "best"))
    bests = [json.loads((f / "best" / "best.json").read_text()) for f in (folder, straight)]
    assert bests[0] == bests[1]
    one, other = runs.tensors(folder / "best"), runs.tensors(straight / "best")
    assert one and all(torch.equal(one[key], other[key]) for key in other)


def set_clock_back(folder):
    """Give every file the time that a clock gone wrong would: newer ones are older."""
    files = sorted(folder.rglob("*"), key=lambda p: p.stat().st_mtime_ns)
    for age, file in enumerate(files):
        os.utime(file, (1e9 - age, 1e9 - age))


def operations(folder, scene):
    """Return the kind of each file operation of a start of the scene."""
    folder = prepared(folder, scene)
    with disk.Operations(folder) as counted:
        start(folder)
    return counted.names


def killed_at(folder, scene, k, straight):
    """Kill a start at its k-th operation, set the clock back, start again."""
    folder = prepared(folder, scene)

    def run():
        with disk.Operations(folder, at=k):
            start(folder)

    code = in_child(run)
    assert code in (-9, 0), code
    set_clock_back(folder)
    start(folder)
    assert_whole(folder, straight)


def full_from(folder, scene, k, straight):
    """Fill the disk at the k-th operation of a start; make room, start again."""
    folder = prepared(folder, scene)
    try:
        with disk.Operations(folder, disk.full, at=k, every=True):
            start(folder)
    except RunFault as fault:
        assert disk.FULL in str(fault), fault
    except TrpoLMError as error:  # before the run: it cannot write there
        assert error.where == "output_dir" and disk.FULL in str(error), error
    set_clock_back(folder)
    start(folder)
    assert_whole(folder, straight)


ACCIDENTS = {"killed": killed_at, "full": full_from}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    start(folder)
    return folder


@pytest.mark.parametrize("scene", ["new", "longer"])
@pytest.mark.parametrize("accident", ACCIDENTS)
def test_B50_after_an_accident_at_a_file_operation_the_next_start_is_whole(
    straight, tmp_path, scene, accident
):
    names = operations(tmp_path / "all", scene)
    assert len(names) > 150
    ends = [len(names) - back for back in (0, 2, 6, 12)]  # the outcome is published there
    for k in sorted({*ends, *random.Random(scene + accident).sample(range(1, len(names)), 3)}):
        folder = tmp_path / f"{k}"
        ACCIDENTS[accident](folder, scene, k, straight)
        shutil.rmtree(folder)


# ---------------------------------------------------------------- B51: weights know their update


@pytest.fixture
def named(tmp_path):
    """A model on the disk, and a run of three updates that began from its name."""
    tiny.build().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "save_total_limit": 9}
    start(tmp_path / "run", updates=3, **options)
    return tmp_path / "run", options


def test_B51_a_finished_run_that_was_extended_and_killed_reports_its_own_update(named):
    folder, options = named

    def longer():
        start(folder, updates=9, reward=runs.Killer(calls=6), **options)

    assert in_child(longer) == -9
    checksums = {row["update"]: row["policy/checksum"] for row in runs.rows(folder)}
    assert len(checksums) > 3
    for shift in (0, -1e6):  # whatever the clock says
        for file in folder.rglob("*.safetensors"):
            os.utime(file, (1e9 + shift, 1e9 + shift))
        run = open_run(folder, reward=runs.score)
        assert run.update == 3 and run.settings["updates"] == 3
        assert run.policy.parameters.checksum() == checksums[3]
    for name in ("best", "4"):
        run = open_run(folder, name, reward=runs.score)
        assert run.policy.parameters.checksum() == checksums[run.update]


@pytest.mark.parametrize(
    ("policy", "file"),
    [
        ("last", "adapter_model.safetensors"), ("last", "value_head.safetensors"),
        ("last", "tokenizer.json"), ("last", "adapter_config.json"),
        ("best", "adapter_model.safetensors"), ("best", "best.json"),
        ("best", "value_head.safetensors"), ("2", "adapter_model.safetensors"),
        ("2", "config.yaml"),
    ],
)  # fmt: skip
def test_B51_weights_that_are_not_those_of_their_record_are_refused(named, policy, file):
    folder, _ = named
    place = folder / {"last": ".", "best": "best", "2": "checkpoint-000002"}[policy] / file
    content = bytearray(place.read_bytes())
    content[-2] ^= 1
    place.write_bytes(content)
    with pytest.raises(TrpoLMError, match=re.escape(file)):
        open_run(folder, policy, reward=runs.score)


def test_B51_a_run_that_starts_over_does_not_keep_the_old_outcome(tmp_path):
    start(tmp_path)
    trainer(tmp_path, **SETTINGS, seed=1, overwrite_output_dir=True).archive.prepare(0, None)
    assert not (tmp_path / "MANIFEST.json").exists()


# ---------------------------------------------------------------- B52: rows 1 to the update


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:20]], "lacks update 2"),  # torn
        (lambda lines: lines[1:], "lacks update 1"),
        (lambda lines: [], "lacks updates 1, 2"),
        (lambda lines: [lines[0], *lines], "repeats update 1"),
        (lambda lines: [*lines, lines[1].replace(b": 2,", b": 7,", 1)], None),
        (lambda lines: [*lines, b"{"], None),
    ],
)
def test_B52_rows_that_are_missing_are_told_and_no_others_stay(tmp_path, capsys, damage, told):
    start(tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b"\n".join(damage(log.read_bytes().splitlines())))
    start(tmp_path, updates=3)
    out = capsys.readouterr().out
    assert f"metrics.jsonl {told}" in out if told else "metrics.jsonl lacks" not in out
    assert {row["update"] for row in runs.rows(tmp_path)} <= {1, 2, 3}
    if told is None:
        assert [row["update"] for row in runs.rows(tmp_path)] == [1, 2, 3]


def test_B52_lines_are_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    done = []
    sync, rename = run_folder.sync, os.rename
    monkeypatch.setattr(run_folder, "sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append(Path(b).name), rename(a, b)))
    start(tmp_path)
    for update in (1, 2):
        name = f"checkpoint-00000{update}"
        assert {"metrics.jsonl", "completions.jsonl"} <= set(done[: done.index(name)])
        done = done[done.index(name) + 1 :]


def every_operation(scene, accident, root):
    """Go through all of them; print what fails."""
    os.fsync = lambda descriptor: None
    straight = root / "straight"
    start(straight)
    base = prepared(root / "base", scene) if scene == "longer" else None
    names = operations(root / "all", scene)
    failed, begun = 0, time.time()
    for k in range(1, len(names) + 1):
        folder = root / f"{k}"
        if base:
            shutil.copytree(base, folder)
        try:
            ACCIDENTS[accident](folder, "new", k, straight)
        except BaseException as error:
            failed += 1
            print(f"{k} {names[k - 1]}: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    print(f"{scene} {accident}: {len(names)} operations, {failed} failed, "
          f"{time.time() - begun:.0f} s", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    import tempfile

    every_operation(sys.argv[1], sys.argv[2], Path(tempfile.mkdtemp()))
