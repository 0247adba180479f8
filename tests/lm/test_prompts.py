"""Prompts from everywhere, and what is refused: cases T01, T02, T03, T13."""

import json

import datasets
import pytest
import tiny
from datasets import Dataset, DatasetDict

from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.prompts import Prompts, check_prompts, load_both, load_prompts

TALK = [{"role": "user", "content": "w1 w2"}]
ROWS = [{"prompt": "a b", "label": 1}, {"prompt": "c", "label": 0}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---------------------------------------------------------------- where they come from


@pytest.mark.parametrize("source", [Dataset.from_list(ROWS), ROWS, tuple(ROWS), iter(ROWS)])
def test_rows_of_a_dataset_or_a_list(source):
    loaded = load_prompts(source)
    assert loaded.prompts == ["a b", "c"] and loaded.columns == {"label": [1, 0]}
    assert len(loaded) == 2


def test_texts_conversations_and_what_was_loaded_before():
    assert load_prompts(["a", "b"]) == Prompts(["a", "b"], {})
    assert load_prompts([TALK, TALK]).prompts == [TALK, TALK]
    assert load_prompts(Dataset.from_dict({"prompt": [TALK]})).prompts == [TALK]
    loaded = load_prompts(ROWS)
    assert load_prompts(loaded) == loaded


def test_rows_need_not_have_the_same_columns():
    loaded = load_prompts([{"prompt": "a"}, {"prompt": "b", "x": 1}])
    assert loaded.columns == {"x": [None, 1]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", lines(ROWS)),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(ROWS).replace("\n", "\r\n\n").encode()),
        ("p.json", json.dumps(ROWS)),
        ("p.csv", "prompt,label\na b,1\nc,0\n"),
    ],
)
def test_files(tmp_path, capfd, name, text):
    path = written(tmp_path, name, text)
    for source in (path, str(path)):
        loaded = load_prompts(source)
        assert loaded.prompts == ["a b", "c"] and loaded.columns == {"label": [1, 0]}
    assert capfd.readouterr() == ("", "")  # no progress bars
    assert not datasets.are_progress_bars_disabled()


def test_more_files(tmp_path):
    text = written(tmp_path, "p.txt", "\ufeffa b\n\n  \nc\u2028d\r\n")
    assert load_prompts(text).prompts == ["a b", "c", "d"]
    talk = written(tmp_path, "talk.jsonl", lines([{"prompt": TALK}]))
    assert load_prompts(talk).prompts == [TALK]
    plain = written(tmp_path, "plain.jsonl", '"a"\n"b"\n')
    assert load_prompts(plain).prompts == ["a", "b"]
    table = tmp_path / "p.parquet"
    Dataset.from_list(ROWS).to_parquet(table)
    assert load_prompts(table).columns == {"label": [1, 0]}
    other = written(tmp_path, "q.jsonl", lines([{"text": "a", "prompt": 3}]))
    assert load_prompts(other, column="text").prompts == ["a"]


def test_a_file_that_changed_is_read_anew(tmp_path):
    for word in ("a", "b"):
        assert load_prompts(written(tmp_path, "p.csv", f"prompt\n{word}\n")).prompts == [word]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "dataset is empty"),
        (Dataset.from_dict({"prompt": []}), "dataset is empty"),
        ([{"text": "a"}], r"no column 'prompt'; the columns are \['text'\]"),
        (TALK, r"no column 'prompt'; the columns are \['role', 'content'\]"),
        (["a", None], "row 1 holds None"),
        ([{"prompt": "a", "x": 1}, {"x": 2}], r"row 1 holds None.*columns \['prompt', 'x'\]"),
        (Dataset.from_dict({"prompt": [1, 2]}), "row 0 holds 1"),
        ([[]], r"row 0 holds \[\]"),
        ([[{"role": "user"}]], "row 0 holds"),
        (["a", {"prompt": "b"}], "row 1 holds"),
        (DatasetDict({"train": Dataset.from_list(ROWS)}), r"splits \['train'\]"),
        ({"prompt": ["a"]}, "cannot read prompts from dict"),
        (7, "cannot read prompts from int"),
    ],
)
def test_T02_bad_rows_name_the_row_and_the_columns(source, message):
    with pytest.raises(TrpoLMError, match=message):
        load_prompts(source)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.jsonl", None, "file does not exist"),
        ("absent.txt", None, "file does not exist"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: "),
        ("p.jsonl", "", "dataset is empty"),
        ("p.txt", "\n\n", "dataset is empty"),
        ("p.txt", b"\xff\xfe\x00", "cannot be read: UnicodeDecodeError"),
        ("p.csv", "prompt\n", "empty|cannot be read"),
        ("p.csv", "prompt,x\n1,2\n", "row 0 holds 1"),
        ("p.csv", "prompt,x\na,2\n,3\n", "row 1 holds None"),
        ("p.parquet", "no parquet", "cannot be read"),
        ("p.json", "{", "cannot be read"),
    ],
)
def test_T02_bad_files_name_the_file(tmp_path, name, text, message):
    path = tmp_path / name if text is None else written(tmp_path, name, text)
    with pytest.raises(TrpoLMError, match=message) as caught:
        load_prompts(path)
    assert name in str(caught.value)


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TrpoLMError, match="cannot be read") as caught:
        load_prompts("no/such-dataset")
    assert "no/such-dataset" in str(caught.value)


# ---------------------------------------------------------------- length and content


def check(prompts, *, room=6, truncate="error", **options):
    return check_prompts(load_prompts(prompts), tiny.tokenizer(**options), room=room,
                         truncate=truncate)  # fmt: skip


def test_T01_an_empty_prompt():
    assert check([""])[0].prompts == [""]  # <bos> is put
    with pytest.raises(TrpoLMError, match=r"empty .*row 1"):
        check(["w1", ""], bos=False)


def test_T03_too_long_is_an_error_or_loses_its_beginning():
    long = "w0 w1 w2 w3 w4 w5 w6 w7"
    with pytest.raises(TrpoLMError, match=r"9 tokens and only 6 fit .*row 1") as caught:
        check(["w1", long])
    assert "truncate_prompts='left'" in caught.value.hint
    cut, shortened = check(["w1", long], truncate="left")
    assert cut.prompts == ["w1", "w3 w4 w5 w6 w7"] and shortened == 1
    assert check([long], room=None) == (load_prompts([long]), 0)


def test_T03_a_conversation_is_never_cut():
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    talk = [{"role": "user", "content": "w1 " * 9}]
    with pytest.raises(TrpoLMError, match="9 tokens and only 6 fit") as caught:
        check([talk], truncate="left", chat_template=template)
    assert "truncate_prompts" not in caught.value.hint


def test_T13_a_conversation_needs_a_template():
    with pytest.raises(TrpoLMError, match=r"no chat template .*row 0"):
        check([TALK])


# ---------------------------------------------------------------- small things


def test_take_split_and_fingerprint():
    rows = [{"prompt": f"w{i}", "x": i} for i in range(30)]
    prompts = load_prompts(rows)
    assert prompts.take([3, 1]) == (["w3", "w1"], {"x": [3, 1]})
    first, last = prompts.split_off(256)
    assert (len(first), len(last)) == (27, 3) and last.prompts == ["w27", "w28", "w29"]
    assert prompts.fingerprint() == load_prompts(rows).fingerprint()
    others = [rows[::-1], rows[:-1], [{**row, "x": 0} for row in rows]]
    assert len({load_prompts(o).fingerprint() for o in [rows, *others]}) == 4


def test_held_out_prompts_are_the_file_named_or_the_last_rows(tmp_path):
    rows = [f"w{i}" for i in range(40)]
    train, held_out = load_both(rows, None, column="prompt", split_off=256)
    assert train.prompts == rows[:36] and held_out.prompts == rows[36:]  # at most a tenth
    assert load_both(rows, None, column="prompt", split_off=2)[1].prompts == rows[38:]
    (tmp_path / "own.csv").write_text("q\nx\ny\n")
    train, held_out = load_both(rows, tmp_path / "own.csv", column="q", split_off=2)
    assert train.prompts == rows and held_out.prompts == ["x", "y"]
