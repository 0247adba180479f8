"""Checkpoints, without a model: cases S01, S09, X03-X05 and X07."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from runs import in_child, killed_at
from trpo_lm import storage
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.training import checkpoint
from trpo_lm.training.checkpoint import (
    STATE,
    Checkpoint,
    discard_checkpoints,
    load_checkpoint,
    newest_usable,
    remove_unfinished,
)
from trpo_lm.training.folder import OutputLock, RunFolder
from trpo_lm.training.manifest import MANIFEST
from trpo_lm.training.stages import Stages

ALONE = SimpleNamespace(rank=0, count=1, main=True, wait=lambda: None, share=lambda text: text)


def tensors(value):
    return {
        "adapter_model": {"a": torch.full((3, 2), float(value)), "b": torch.arange(4)},
        "value_head": {"weight": torch.full((2,), value, dtype=torch.bfloat16)},
        "rng_rank0": {"torch": torch.arange(8, dtype=torch.uint8)},
    }


def save_checkpoint(folder, update, *, tensors, state, config, ranks=ALONE, on_enter=None, **rest):
    content = Checkpoint(update, tensors, state, config)
    stage = Stages() if on_enter is None else Stages(on_enter)
    return checkpoint.save_checkpoint(RunFolder(folder), content, ranks, stage, **rest)


def save(folder, update, value=None, **options):
    options = {"state": {"update": update, "kl": 0.1}, "config": {"max_kl": 0.05}} | options
    value = update if value is None else value
    return save_checkpoint(folder, update, **{"tensors": tensors(value), **options})


def newest_checkpoint(folder):
    """Return the checkpoint that 'auto' takes."""
    run = RunFolder(folder)
    remove_unfinished(run)
    return newest_usable(run.checkpoints(), lambda path: load_checkpoint(path) and path)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def value_of(path):
    return load_checkpoint(path).tensors["adapter_model"]["a"][0, 0].item()


# ---------------------------------------------------------------- the way there and back


def test_what_is_loaded_is_what_was_saved(tmp_path):
    state = {"rng": [1, 2**70, "text"], "loss": 0.1 + 0.2, "none": None, "nested": {"x": [1e-300]}}
    config = {"max_kl": 0.05, "max_ref_kl": None, "weights": [1.0, 1e-5], "name": "no"}

    def extra(folder):
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")

    path = save(tmp_path, 12, state=state, config=config, extra=extra)
    assert path == tmp_path / "checkpoint-000012"
    assert names(tmp_path) == ["checkpoint-000012"]
    loaded = load_checkpoint(path)
    assert (loaded.update, loaded.state, loaded.settings) == (12, state, config)
    assert loaded.tensors.keys() == tensors(12).keys()
    for stem, named in tensors(12).items():
        for name, tensor in named.items():
            assert loaded.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[stem][name], tensor)
    manifest = json.loads((path / MANIFEST).read_text())
    assert (manifest["format"], manifest["update"], manifest["world_size"]) == (1, 12, 1)
    assert "tokenizer/vocab.txt" in manifest["files"]


def test_views_and_parameters_are_saved_as_they_read(tmp_path):
    whole = torch.arange(12.0)
    views = {
        "transposed": whole.view(3, 4).T,
        "same": whole.view(3, 4),
        "scalar": whole[3],
        "empty": whole[:0],
        "parameter": torch.nn.Parameter(whole[:2]),
    }
    path = save_checkpoint(tmp_path, 1, tensors={"x": views, "none": {}}, state={}, config={})
    loaded = load_checkpoint(path).tensors
    assert loaded["none"] == {}
    for name, view in views.items():
        assert torch.equal(loaded["x"][name], view)


def test_a_number_that_json_lacks_is_named(tmp_path):
    save(tmp_path, 1)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(RunFault, match=r"metrics\.kl\[1\] = (nan|inf)"):
            save(tmp_path, 2, state={"metrics": {"kl": [0.1, bad]}})
    assert names(tmp_path) == ["checkpoint-000001"]


def test_a_bug_in_the_callers_values_stays_what_it_is(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, state={"x": torch.zeros(1)})
    assert names(tmp_path) == []


def test_no_checkpoint_yet(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(TrpoLMError, match="no checkpoint folder"):
        load_checkpoint(tmp_path / "checkpoint-000001")


# ---------------------------------------------------------------- saving again, and pruning


def test_saving_the_same_twice_leaves_it_alone(tmp_path):
    path = save(tmp_path, 3)
    before = (path / MANIFEST).stat()
    assert save(tmp_path, 3) == path
    assert (path / MANIFEST).stat().st_ino == before.st_ino
    assert names(tmp_path) == ["checkpoint-000003"]


def test_saving_something_else_replaces_it(tmp_path):
    path = save(tmp_path, 3, value=1)
    assert save(tmp_path, 3, value=2) == path
    assert value_of(path) == 2
    assert names(tmp_path) == ["checkpoint-000003"]


def test_a_damaged_checkpoint_of_the_same_update_is_replaced(tmp_path):
    path = save(tmp_path, 3, value=1)
    (path / MANIFEST).unlink()
    assert save(tmp_path, 3, value=2) == path
    assert value_of(path) == 2
    assert names(tmp_path) == ["checkpoint-000003"]


def test_X07_save_total_limit(tmp_path):
    for update in range(1, 5):
        save(tmp_path, update, keep=2)
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000004"]
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["checkpoint-000005"]
    save(tmp_path, 1000000, keep=2)
    assert names(tmp_path) == ["checkpoint-000005", "checkpoint-1000000"]


def test_checkpoints_of_an_abandoned_continuation_are_deleted(tmp_path, caplog):
    for update in (10, 20, 30):
        save(tmp_path, update, keep=3)
    save(tmp_path, 20, value=7, keep=3)  # the run was resumed from 10
    assert names(tmp_path) == ["checkpoint-000010", "checkpoint-000020"]
    assert value_of(newest_checkpoint(tmp_path)) == 7
    assert "removed checkpoint-000030: it is newer than the update" in caplog.text


def test_discard_checkpoints_removes_nothing_else(tmp_path):
    save(tmp_path, 1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "checkpoint-000002").symlink_to(outside)
    (tmp_path / "metrics.jsonl").touch()
    discard_checkpoints(RunFolder(tmp_path))
    assert names(tmp_path) == ["metrics.jsonl", "outside"]


# ---------------------------------------------------------------- dying while saving

fork = multiprocessing.get_context("fork")  # a new interpreter would import torch for seconds


def complete(folder):
    """Return the complete checkpoints, by what they hold, without touching the folder."""
    found = []
    for path in sorted(folder.glob("checkpoint-*")):
        try:
            found.append(value_of(path))
        except TrpoLMError:
            continue
    return found


@pytest.mark.parametrize("scene", ["first", "next", "same update", "same update, damaged"])
def test_X03_X07_killed_at_every_stage_of_a_save(tmp_path, scene):
    points = 0
    for k in itertools.count(1):
        folder = tmp_path / str(k)
        folder.mkdir()
        if scene != "first":
            save(folder, 1)
        if scene == "same update, damaged":
            (save(folder, 2, value=9) / STATE).unlink()
        update = 1 if scene == "same update" else 2
        options = {"value": 2, "keep": 1, "on_enter": killed_at(k)}
        code = in_child(lambda: save(folder, update, **options))  # noqa: B023
        if code == 0:
            break
        assert code == -signal.SIGKILL
        points += 1
        whole = complete(folder)
        assert whole or scene == "first"  # X07, with save_total_limit = 1
        newest = newest_checkpoint(folder)
        assert not list(folder.glob(".tmp-*"))
        assert (newest is None) == (not whole)
        if newest is not None:
            assert value_of(newest) == max(v for v in whole if v != 9)
        save(folder, update, value=2, keep=1)  # the restarted run gets there again
        assert names(folder) == [f"checkpoint-{update:06d}"]
        assert value_of(folder / f"checkpoint-{update:06d}") == 2
    assert points >= 8
    assert names(folder) == [f"checkpoint-{update:06d}"]


def test_X03_killed_in_the_second_save(tmp_path):
    def two_saves(on_enter):
        save(tmp_path, 1, on_enter=on_enter)
        save(tmp_path, 2, on_enter=on_enter)

    stages = []
    save(tmp_path, 9, on_enter=stages.append)
    shutil.rmtree(tmp_path / "checkpoint-000009")
    assert in_child(lambda: two_saves(killed_at(len(stages) + 2))) == -signal.SIGKILL
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-000001"


def test_X03_killed_at_random_times(tmp_path):
    def run():
        for update in itertools.count(1):
            save(tmp_path, update, keep=1)

    save(tmp_path, 0)
    chance = random.Random(0)
    for _ in range(20):
        child = fork.Process(target=run)
        child.start()
        time.sleep(chance.uniform(0.005, 0.06))
        child.kill()
        child.join(60)
        assert complete(tmp_path)
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        loaded = load_checkpoint(newest)
        assert loaded.update == loaded.state["update"] == value_of(newest)
        assert not list(tmp_path.glob(".tmp-*"))


def test_newest_checkpoint_spares_the_work_of_a_living_process(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp-checkpoint-000002-ab").mkdir()
    locked, done = fork.Event(), fork.Event()

    def hold():
        with OutputLock(tmp_path):
            locked.set()
            done.wait(60)

    living = fork.Process(target=hold)
    living.start()
    assert locked.wait(60)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-000001"
    assert (tmp_path / ".tmp-checkpoint-000002-ab").is_dir()
    done.set()
    living.join(60)
    newest_checkpoint(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))


# ---------------------------------------------------------------- damage


def truncate(path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def flip(path):
    file = path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def manifest_lists(name):
    def edit(path):
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["files"][name] = {"bytes": 1, "sha256": "0"}
        (path / MANIFEST).write_text(json.dumps(manifest))

    return edit


def fifo(path):
    (path / STATE).unlink()
    os.mkfifo(path / STATE)  # opening it would wait for ever


DAMAGE = {
    "truncated": (truncate, "adapter_model.safetensors has .* bytes instead of"),
    "flipped": (flip, "adapter_model.safetensors has other content"),
    "value head": (lambda p: (p / "value_head.safetensors").unlink(), "value_head.* is missing"),
    "rng": (lambda p: (p / "rng_rank0.safetensors").unlink(), "rng_rank0.safetensors is missing"),
    "empty state": (lambda p: (p / STATE).write_text(""), "trainer_state.json has 0 bytes"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "MANIFEST.json is missing"),
    "empty manifest": (lambda p: (p / MANIFEST).write_text(""), "MANIFEST.json cannot be read"),
    "binary manifest": (lambda p: (p / MANIFEST).write_bytes(b"\xff"), "MANIFEST.json cannot be"),
    "odd manifest": (lambda p: (p / MANIFEST).write_text("[1]"), "MANIFEST.json cannot be read"),
    "outside": (manifest_lists("../../secret"), "outside the folder"),
    "absolute": (manifest_lists("/etc/passwd"), "outside the folder"),
    "fifo": (fifo, "trainer_state.json is missing"),
    "format": (
        lambda p: (p / MANIFEST).write_text('{"format": 2, "update": 1, "files": {}}'),
        "has format 2; this version of trpo_lm reads format 1",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_X04_damage_is_told_and_passed_over(tmp_path, caplog, kind):
    damage, reason = DAMAGE[kind]
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad)
    with pytest.raises(TrpoLMError, match=reason) as error:
        load_checkpoint(bad)
    assert error.value.exit_code == 2
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == good
    assert len(caplog.records) == 1
    assert error.value.what in caplog.text
    assert bad.exists()


def test_X05_every_checkpoint_bad(tmp_path, caplog):
    truncate(save(tmp_path, 1))
    flip(save(tmp_path, 2))
    with pytest.raises(TrpoLMError) as error:
        newest_checkpoint(tmp_path)
    assert "checkpoint-000001 is damaged: adapter_model.safetensors has" in error.value.what
    assert "checkpoint-000002 is damaged: adapter_model.safetensors has other" in error.value.what
    assert error.value.exit_code == 2
    assert names(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]


def test_S01_files_that_could_run_code_are_never_opened(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    sentinel = tmp_path / "sentinel"
    attack = f"cos\nsystem\n(S'touch {sentinel}'\ntR.".encode()
    planted = {"optimizer.pt", "rng.pth", "pytorch_model.bin", "state.pkl", "x.safetensors"}
    for name in planted:
        (path / name).write_bytes(attack)
    opened = set()

    def watch(event, args):
        if event == "open" and active:
            opened.add(os.path.basename(str(args[0])))

    active = True
    sys.addaudithook(watch)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    loaded = load_checkpoint(newest)
    active = False
    assert STATE in opened
    assert not opened & planted
    assert not sentinel.exists()
    assert loaded.tensors.keys() == tensors(1).keys()


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("where", ["write", "sync", "rename"])
def test_S09_disk_full_at_each_write(tmp_path, monkeypatch, where):
    save(tmp_path, 1)

    def extra(folder):
        (folder / "adapter_config.json").write_text("{}")

    calls = {
        "write": (storage, "open", open),
        "sync": (os, "fsync", os.fsync),
        "rename": (os, "rename", os.rename),
    }
    module, name, real = calls[where]
    for k in itertools.count():
        count = itertools.count()

        def fail(*args, **kwargs):
            if next(count) == k:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail, raising=False)
            try:
                save(tmp_path, 2, extra=extra)
                break
            except RunFault as fault:
                assert fault.exit_code == 3
                assert "No space left on device" in fault.what
                assert "free some space" in str(fault.hint)
        assert names(tmp_path)[0] == "checkpoint-000001"
        assert not list(tmp_path.glob(".tmp-*"))
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        assert value_of(newest) == newest.name.endswith("2") + 1
        shutil.rmtree(tmp_path / "checkpoint-000002", ignore_errors=True)
    assert k >= {"write": 6, "sync": 6, "rename": 1}[where]


def test_S09_the_fault_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFault, match=r"could not write adapter_model\.safetensors: No space"):
        save(tmp_path, 2)
    with pytest.raises(RunFault, match="No such file or directory"):
        save(tmp_path / "absent", 2)


# ---------------------------------------------------------------- several processes


def save_on_ranks(folder, world_size, make=lambda rank: {}):
    """Save with threads as ranks; return what each rank returned or raised."""
    gate = threading.Barrier(world_size)
    said, results = {}, {}

    def rank_main(rank):
        def share(text):
            if rank == 0:
                said["text"] = text
            gate.wait(10)
            text = said["text"]
            gate.wait(10)
            return text

        stems = {f"rng_rank{rank}": {"torch": torch.full((2,), rank)}}
        if rank == 0:
            stems = tensors(5) | stems
        options = {"tensors": stems, "state": {"n": 1}, "config": {}} | make(rank)
        try:
            ranks = SimpleNamespace(
                rank=rank, count=world_size, main=rank == 0, wait=lambda: gate.wait(10),
                share=share,
            )  # fmt: skip
            results[rank] = save_checkpoint(folder, 5, ranks=ranks, **options)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(r,)) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[r] for r in range(world_size)]


def test_every_rank_writes_its_part(tmp_path):
    path = tmp_path / "checkpoint-000005"
    assert save_on_ranks(tmp_path, 3) == [path] * 3
    loaded = load_checkpoint(path)
    for rank in range(3):
        assert loaded.tensors[f"rng_rank{rank}"]["torch"].tolist() == [rank, rank]
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["world_size"] == 3
    assert not [name for name in manifest["files"] if name.endswith(".done")]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_cannot_write_fails_them_all(tmp_path, bad):
    save(tmp_path, 1)
    stem = "no/such/folder"
    faults = save_on_ranks(tmp_path, 3, lambda rank: {"tensors": {stem: {}}} if rank == bad else {})
    assert all(isinstance(fault, RunFault) for fault in faults)
    assert "No such file" in str(faults[bad])
    assert f"rank {bad} could not" in str(faults[2])
    assert names(tmp_path) == ["checkpoint-000001"]
