"""Folders that somebody made by hand: reading ends in a value or one error. B53, B54, B62."""

import json
import logging
import os
import shutil
import signal

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import runs
from runs import trainer
from trpo_lm.analysis.saved_run import open_run
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.loading import load_model, load_tokenizer
from trpo_lm.storage import read_file, read_json, read_json_lines, read_yaml
from trpo_lm.training.checkpoint import STATE
from trpo_lm.training.manifest import MANIFEST, write_manifest

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
SMALL = {"prompts_per_update": 2, "completions_per_prompt": 1, "max_completion_length": 3}


@pytest.fixture(autouse=True)
def no_hang():
    """Whatever waits, for a FIFO or for a parser, is ended."""

    def late(signum, frame):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- single files

CONTENTS = {
    "empty": b"", "binary": b"\xff\xfe\x00", "deep": b"[" * 100_000, "deep map": b'{"a":' * 100_000,
    "infinity": b'{"update": Infinity}', "nan": b'{"update": NaN}', "digits": b"1" * 10_000,
    "list": b"[1]", "text": b'"x"', "null": b"null",
}  # fmt: skip


def fifo(path):
    os.mkfifo(path)


def link(path):
    path.symlink_to("/etc/hostname")


PLACES = {"fifo": fifo, "link": link, "folder": lambda p: p.mkdir(), "missing": lambda p: None,
          "device": lambda p: p.symlink_to("/dev/zero")}  # fmt: skip


@pytest.mark.parametrize("kind", [*CONTENTS, *PLACES])
@pytest.mark.parametrize("read", [read_json, read_yaml, read_json_lines])
def test_B53_a_file_ends_in_a_value_or_an_error(tmp_path, kind, read):
    path = tmp_path / "file"
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind] + b"\n")
    else:
        PLACES[kind](path)
    try:
        value = read(path)
    except TrpoLMError as error:
        assert str(path) in error.where
    else:
        assert isinstance(value, dict | list)


def test_B53_bombs_and_sizes(tmp_path):
    (tmp_path / "bomb").write_text(BOMB)
    with pytest.raises(TrpoLMError, match="alias"):
        read_yaml(tmp_path / "bomb")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    for read in (read_file, read_json, read_yaml, read_json_lines):
        with pytest.raises(TrpoLMError, match="more than"):
            read(tmp_path / "large")
    with pytest.raises(TrpoLMError) as caught:
        read_file(tmp_path / "\x1b]0;owned\x07\x9b31m\u202e\udcff")
    assert str(caught.value).isprintable()


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    trainer(folder, updates=2, save_steps=1, **SMALL).train()
    return folder


def manifest_with(**changes):
    def damage(path):
        record = json.loads((path / MANIFEST).read_text())
        for key, value in changes.items():
            record["files" if key == "files" else key] = (
                {**record["files"], **value} if key == "files" else value
            )
        (path / MANIFEST).write_text(json.dumps(record))

    return damage


def signed(edit):
    """Edit a checkpoint, and give it a manifest that agrees."""

    def damage(path):
        (path / MANIFEST).unlink()
        edit(path)
        write_manifest(path, 2, world_size=1)

    return damage


def state(**changes):
    def edit(path):
        whole = json.loads((path / STATE).read_text()) | changes
        (path / STATE).write_text(json.dumps({k: v for k, v in whole.items() if v != "gone"}))

    return signed(edit)


def tensors(name, change):
    def edit(path):
        save_file(change(load_file(path / name)), path / name)

    return signed(edit)


def header(size):
    def edit(path):
        (path / "algorithm.safetensors").write_bytes(size.to_bytes(8, "little") + b" " * 64)

    return signed(edit)


def replaced(name, make):
    def damage(path):
        (path / name).unlink()
        make(path / name)

    return damage


HOSTILE = {
    "long name": manifest_with(files={"x" * 5000: {"bytes": 1, "sha256": ""}}),
    "escape codes": manifest_with(files={"\x1b[31mred": {"bytes": 1, "sha256": ""}}),
    "NUL": manifest_with(files={"a\0b": {"bytes": 1, "sha256": ""}}),
    "outside": manifest_with(files={"../x": {"bytes": 1, "sha256": ""}}),
    "size": manifest_with(files={STATE: {"bytes": float("inf"), "sha256": ""}}),
    "size as text": manifest_with(files={STATE: {"bytes": "9", "sha256": ""}}),
    "no files": manifest_with(files={"a": None}),
    "update": manifest_with(update=1),
    "update as text": manifest_with(update="2"),
    "deep manifest": lambda p: (p / MANIFEST).write_bytes(b"[" * 100_000),
    "fifo as manifest": replaced(MANIFEST, fifo),
    "fifo as state": replaced(STATE, fifo),
    "link to a file": lambda p: (
        shutil.move(p / STATE, p.parent / "elsewhere"), (p / STATE).symlink_to("../elsewhere")
    ),
    "link to a device": replaced("config.yaml", PLACES["device"]),
    "bomb": signed(lambda p: (p / "config.yaml").write_text(BOMB)),
    "settings as a list": signed(lambda p: (p / "config.yaml").write_text("[1]")),
    "deep state": signed(lambda p: (p / STATE).write_bytes(b"[" * 100_000)),
    "state as a list": signed(lambda p: (p / STATE).write_text("[]")),
    "no algorithm": signed(lambda p: (p / "algorithm.safetensors").unlink()),
    "no critic": signed(lambda p: (p / "value_head.safetensors").unlink()),
    "no adapter": signed(lambda p: (p / "adapter_model.safetensors").unlink()),
    "another file": signed(lambda p: save_file({"a": torch.ones(1)}, p / "more.safetensors")),
    "giant header": header(1 << 62),
    "large header": header(1 << 25),
    "no header": header(0),
    "critic's shape": tensors("value_head.safetensors", lambda t: {k: v[:1] for k, v in t.items()}),
    "critic's names": tensors("value_head.safetensors", lambda t: {f"{k}x": t[k] for k in t}),
    "moments' shape": tensors(
        "algorithm.safetensors", lambda t: {k: v[:1].clone() for k, v in t.items()}
    ),
    "adapter's shape": tensors(
        "adapter_model.safetensors", lambda t: {k: torch.zeros(3, 3) for k in t}
    ),
    "adapter's values": tensors(
        "adapter_model.safetensors", lambda t: {k: v + 1 for k, v in t.items()}
    ),
    "counter": state(tokens="many"),
    "no counter": state(completions="gone"),
    "algorithm": state(algorithm={}),
    "algorithm as a list": state(algorithm=[1]),
    "algorithm's numbers": state(algorithm={"noise": "x", "reference": None, "radius": [1]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_B53_auto_loads_before_it_chooses_and_goes_back_to_a_good_checkpoint(
    made, tmp_path, kind, caplog, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    bad = folder / "checkpoint-000002"
    HOSTILE[kind](bad)
    with pytest.raises(TrpoLMError) as caught:
        trainer(folder, updates=2, resume_from_checkpoint=str(bad), **SMALL).train()
    assert caught.value.exit_code == 2
    assert str(caught.value).replace("\n", "").isprintable()
    with caplog.at_level(logging.WARNING):
        trainer(folder, updates=2, save_steps=1, resume_from_checkpoint="auto", **SMALL).train()
    assert "resuming from checkpoint-000001" in capsys.readouterr().out
    assert [r for r in caplog.records if "going back to checkpoint-000001" in r.getMessage()]
    assert "\x1b" not in caplog.text
    runs.assert_same_end(folder, made, 2)


# ---------------------------------------------------------------- B54: links in the run's folder


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "README.md", "held_out.jsonl", "adapter_model.safetensors", "MANIFEST.json",
     "tokenizer.json", "value_head.safetensors", "adapter_config.json", "best", "plots",
     "checkpoint-000003", ".tmp-config.yaml", ".tmp-metrics.jsonl", ".tmp-MANIFEST.json",
     ".lock", "metrics.jsonl", "completions.jsonl"],
)  # fmt: skip
@pytest.mark.parametrize("target", ["file", "folder"])
def test_B54_nothing_is_written_through_a_link(made, tmp_path, name, target):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(made, folder)
    if target == "folder":
        outside.mkdir()
        (outside / "keep").write_text("keep")
    else:
        outside.write_text("keep")
    place = folder / name
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(outside)
    options = {"updates": 3, "evals": ["w1"], "eval_steps": 1, **SMALL}
    try:
        made_again = trainer(folder, resume_from_checkpoint="auto", **options)
        made_again.archive.plots = name == "plots"
        made_again.train()
    except TrpoLMError as error:
        assert name in (".lock", "metrics.jsonl", "completions.jsonl"), error
        assert name in str(error) and "link" in str(error)
    else:
        assert not place.is_symlink()
    if target == "folder":
        assert [p.name for p in outside.iterdir()] == ["keep"]
        outside = outside / "keep"
    assert outside.read_text() == "keep"


# ---------------------------------------------------------------- B62: malformed files of a model

MALFORMED = {"empty": b"", "binary": b"\xff\xfe\x00", "deep": b"[" * 100_000, "list": b"[1, 2]",
             "text": b'"x"', "object": b"{}", "wrong": b'{"model": 3}'}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "adapter_config.json"])
def test_B62_a_malformed_file_of_a_model_is_one_error(tmp_path, monkeypatch, name, kind):
    tiny.build().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(MALFORMED[kind])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load = load_tokenizer if name == "tokenizer.json" else load_model
    with pytest.raises(TrpoLMError) as caught:
        load(str(tmp_path))
    assert "not found locally" not in caught.value.what
    assert str(tmp_path) in caught.value.what


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("name", ["config.yaml", "adapter_config.json", "tokenizer.json", MANIFEST])
def test_B62_a_malformed_file_of_a_run_is_one_error(made, tmp_path, name, kind):
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    place = folder / "checkpoint-000002" if name == "config.yaml" else folder
    (place / name).write_bytes(MALFORMED[kind])
    policy = "2" if name == "config.yaml" else "last"
    with pytest.raises(TrpoLMError) as caught:
        open_run(folder, policy, reward=runs.score)
    assert name in str(caught.value)
    if name == "config.yaml":  # and where its manifest agrees with it
        signed(lambda path: None)(place)
        with pytest.raises(TrpoLMError):
            open_run(folder, policy, reward=runs.score)
