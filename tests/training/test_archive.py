"""The files of a run on a disk that is full: case S09."""

import pytest

import runs
from runs import trainer
from trpo_lm import storage
from trpo_lm.errors import RunFault


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
    left = [22]  # lines; eight completions and a row of metrics are an update

    def full(path, mode="r", **options):
        left[0] -= mode == "ab"
        if mode == "ab" and left[0] <= 0:
            raise OSError(28, "No space left on device")
        return open(path, mode, **options)

    made = trainer(tmp_path, updates=3, save_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open", full, raising=False)
        with pytest.raises(RunFault, match=r"saved checkpoint-000002"):
            made.train()
    trainer(tmp_path, updates=3, save_steps=0, resume_from_checkpoint="auto").train()
    trainer(tmp_path / "b", updates=3, save_steps=0).train()
    runs.assert_same_end(tmp_path, tmp_path / "b", 3)
