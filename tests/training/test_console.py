"""Rows are valid JSON whatever happens, and the screen is plain, quiet or live as it should be."""

import io
import json
import math
import os

import numpy as np
import pytest
import torch

from trpo_lm.config import Limits
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.report.format import clean, number
from trpo_lm.storage import append_json_line, read_json_lines, truncate_json_lines
from trpo_lm.training.console import Console, update_line
from trpo_lm.training.metrics import METRICS, metrics_row

LIMITS = Limits(max_kl=0.05, max_ref_kl=3.0)
ROW = metrics_row(
    {
        "update": 7,
        "objective/score_mean": 0.61,
        "objective/ref_kl": 1.42,
        "objective/completion_length": 18.2,
        "trust_region/kl": 0.049,
        "cg/iterations": 8,
        "cg/residual": 0.003,
        "line_search/trials": 1,
        "line_search/accepted": True,
        "time/total": 2.1,
    }
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_a_row_has_every_metric_and_keeps_extra_ones(tmp_path):
    append_json_line(tmp_path / "m.jsonl", metrics_row({"update": 1, "rewards/length": 2.0}))
    (row,) = read_json_lines(tmp_path / "m.jsonl")
    assert list(row) == [*METRICS, "rewards/length"]
    assert row["update"] == 1 and row["rewards/length"] == 2.0 and row["cg/residual"] is None


def test_every_metric_has_a_one_line_meaning():
    assert all(text and "\n" not in text for text in METRICS.values())


def test_nan_and_infinity_become_null_and_are_named(tmp_path):
    path = tmp_path / "m.jsonl"
    row = {"a": math.nan, "b": 1.0, "c": [1.0, -math.inf], "d": {"e": torch.tensor(math.nan)}}
    append_json_line(path, row)

    def forbid(token):
        raise AssertionError(f"{token} is not JSON")

    assert json.loads(path.read_text(), parse_constant=forbid) == {
        "a": None, "b": 1.0, "c": [1.0, None], "d": {"e": None}, "nonfinite": ["a", "c", "d"],
    }  # fmt: skip


def test_tensors_and_numpy_values_become_numbers(tmp_path):
    append_json_line(
        tmp_path / "m.jsonl",
        {
            "tensor": torch.tensor(0.5, dtype=torch.bfloat16),
            "vector": torch.tensor([1, 2]),
            "numpy": np.float32(0.25),
            "flag": np.bool_(True),
        },
    )
    assert read_json_lines(tmp_path / "m.jsonl") == [
        {"tensor": 0.5, "vector": [1, 2], "numpy": 0.25, "flag": True}
    ]


def test_lines_are_ascii_and_give_any_text_back(tmp_path):
    text = "é\u2028\x9b31m\ud800\n\x1b[31m"
    append_json_line(tmp_path / "c.jsonl", {"completion": text})
    written = (tmp_path / "c.jsonl").read_bytes()
    assert written.isascii() and b"\x1b" not in written and written.count(b"\n") == 1
    assert read_json_lines(tmp_path / "c.jsonl") == [{"completion": text}]


def test_a_torn_last_line_is_dropped_and_any_other_is_an_error(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"update": 1}\n{"update": 2, "na\xc3')
    assert read_json_lines(path) == [{"update": 1}]
    path.write_bytes(b'{"update": 1}\n{"upd\n{"update": 3}\n')
    with pytest.raises(TrpoLMError, match="line 2"):
        read_json_lines(path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(TrpoLMError, match="not a JSON object"):
        read_json_lines(path)
    with pytest.raises(TrpoLMError, match="cannot be read"):
        read_json_lines(tmp_path / "missing.jsonl")


def test_truncation_keeps_rows_up_to_the_update_byte_for_byte(tmp_path):
    path = tmp_path / "m.jsonl"
    kept = b'{"update":  1, "x": 1e-3}\n{"note": "no update"}\n{"update": 2}\n'
    path.write_bytes(kept + b'{"update": 3}\n{"upda')
    truncate_json_lines(path, 2)
    assert path.read_bytes() == kept
    assert os.listdir(tmp_path) == ["m.jsonl"]
    truncate_json_lines(path, 0)
    assert path.read_bytes() == b'{"note": "no update"}\n'
    truncate_json_lines(tmp_path / "missing.jsonl", 2)
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_a_truncation_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_text('{"update": 1}\n{"update": 2}\n')

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        truncate_json_lines(path, 1)
    assert len(read_json_lines(path)) == 2


def test_a_line_that_cannot_be_written_is_a_fault_of_the_run(tmp_path):
    with pytest.raises(RunFault, match="could not be written"):
        append_json_line(tmp_path / "no" / "folder" / "m.jsonl", {"update": 1})


def test_the_update_line_in_the_agreed_style():
    assert update_line(ROW, LIMITS, total=40, first_score=0.56) == (
        "update 07/40  score 0.61 (+0.05)  kl 0.049/0.050  ref_kl 1.42/3.00  trials 1  "
        "cg 8 (3e-3)  len 18.2  2.1 s"
    )


def test_the_update_line_leaves_out_what_is_null():
    assert update_line(metrics_row({"update": 1}), LIMITS, total=9) == "update 1/9"
    ppo = metrics_row({"update": 2, "objective/score_mean": 0.5, "trust_region/kl": 0.031})
    assert update_line(ppo, Limits(), total=40, first_score=0.6) == (
        "update 02/40  score 0.50 (-0.10)  kl 0.031"
    )
    without_budget = update_line(ROW, Limits(max_kl=0.05), total=40)
    assert "ref_kl 1.42  " in without_budget


def test_skipped_and_rejected_updates_say_so():
    skipped = ROW | {"skipped": "zero advantage"}
    assert update_line(skipped, LIMITS, total=40) == "update 07/40  skipped: zero advantage"
    rejected = ROW | {
        "line_search/trials": 8,
        "line_search/accepted": False,
        "line_search/reason": "kl",
    }
    assert "  trials 8, rejected: kl  " in update_line(rejected, LIMITS, total=40)


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        (0.0, None, "0.00"),
        (0.049, 0.05, "0.049"),
        (0.0, 0.0012, "0.0000"),
        (1234.5, None, "1234.50"),
        (2.5e9, None, "2.5e+09"),
        (1e-9, None, "1e-09"),
        (math.nan, None, "nan"),
        (math.inf, 1.0, "inf"),
    ],
)
def test_numbers_have_the_digits_their_scale_needs(value, scale, text):
    assert number(value, scale) == text


def show_everything(stream, enabled=True):
    console = Console(enabled, 40, stream)
    console.banner({"model": "tiny", "output folder": "runs/" + "x" * 200})
    console.update(ROW, LIMITS)
    console.update(ROW | {"update": 8, "objective/score_mean": 0.66}, LIMITS)
    sample = {
        "prompt": "The [bold]film[/bold] :smile:",
        "reference": "\x1b[31mred\x1b[0m \x1b]8;;http://evil\x07link\x1b]8;;\x07\x9b2J",
        "policy": "good " * 200,
        "score_before": 0.25,
        "score_after": 0.987,
    }
    console.samples([sample], "samples [red]x[/red]")
    console.table("held out", ["", "before", "after"], [["score", 0.5, None]])
    console.note("saved [checkpoint-8]\n  resume with ...")
    console.close()
    console.close()
    return stream.getvalue()


def test_off_a_terminal_there_are_plain_lines_and_no_ansi_codes(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = show_everything(io.StringIO())
    assert not [c for c in shown if ord(c) < 32 and c != "\n"] and "\x9b" not in shown
    lines = shown.splitlines()
    assert lines[0] == "model          tiny"
    assert lines[1] == "output folder  runs/" + "x" * 200  # a log keeps it whole
    assert update_line(ROW, LIMITS, total=40) in lines
    assert any("score 0.66 (+0.05)" in line for line in lines)
    assert "  resume with ..." in lines


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_text_of_models_is_shown_as_it_is(stream):
    shown = show_everything(stream)
    assert "[bold]film[/bold]" in shown and "[red]x[/red]" in shown and "[checkpoint-8]" in shown
    assert ":smile:" in shown
    assert "evil" not in shown and "\x1b[31m" not in shown and "\x9b" not in shown
    assert shown.count("good") < 60 and "…" in shown


def test_samples_are_plain_lines_off_a_terminal_and_a_table_on_one():
    sample = {"prompt": "the film", "reference": "is bad", "policy": "is good", "score_after": 0.9}
    plain, table = io.StringIO(), Terminal()
    for stream in (plain, table):
        Console(True, 40, stream).samples([sample], "samples of update 20")
    assert plain.getvalue().splitlines()[1:] == [
        "samples of update 20",
        "  prompt              the film",
        "  reference           is bad",
        "  policy        0.90  is good",
    ]
    assert "before" not in table.getvalue() and "score" in table.getvalue()


@pytest.mark.parametrize(("stream", "every"), [(io.StringIO(), 20), (Terminal(), 5)])
def test_samples_are_shown_now_and_then(stream, every):
    due = [u for u in range(1, 41) if Console(True, 40, stream).samples_due(u)]
    assert due == list(range(every, 41, every))
    assert not Console(False, 40, stream).samples_due(every)


def test_a_terminal_gets_a_live_bar_and_its_cursor_back():
    shown = show_everything(Terminal())
    assert "\x1b[" in shown and "8/40" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_no_color_is_honoured_on_a_terminal(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    shown = show_everything(Terminal())
    assert "\x1b[3" not in shown.replace("\x1b[3A", "")  # no foreground colours


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in show_everything(Terminal())


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_processes_are_silent(stream):
    assert show_everything(stream, enabled=False) == ""


def test_a_stream_without_unicode_does_not_end_the_run():
    raw = io.BytesIO()
    console = Console(True, 2, io.TextIOWrapper(raw, encoding="ascii"))
    console.samples([{"prompt": "é\ud800", "reference": "😀", "policy": "x" * 999}], "日本")
    console.close()
    assert b"?" in raw.getvalue() and raw.getvalue().isascii()


def test_a_resumed_run_counts_from_where_it_was():
    console = Console(True, 40, stream := io.StringIO())
    console.banner({}, 0.5)
    console.update(ROW, LIMITS)
    assert "update 07/40  score 0.61 (+0.11)" in stream.getvalue()


def test_clean_leaves_readable_text_alone():
    text = "naïve 日本 👩\u200d🔬 \u0645\u06cc\u200c\u062e"  # joiners carry meaning
    assert clean(text) == text
    assert clean("a\r\nb\tc\x00\x08d\u202ee\u2066f") == "a  b cdef"
