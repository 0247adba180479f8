"""Files are whole after a crash. JSON lines are tested with the console that shows them."""

import os

import pytest

from trpo_lm.storage import replace_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    replace_file(path, b"old")
    replace_file(path, b"new\r\n\xff")
    assert path.read_bytes() == b"new\r\n\xff"
    assert os.listdir(tmp_path) == ["state.json"]

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        replace_file(path, b"lost")
    assert path.read_bytes() == b"new\r\n\xff"
