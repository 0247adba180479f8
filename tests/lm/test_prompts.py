"""Prompts from everywhere, and what is refused: cases T01, T02, T03, T13."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import trpo_lm.lm.prompts
from trpo_lm.config import DatasetSettings
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.prompts import (
    Prompts,
    check_prompts,
    encode_prompt,
    load_both,
    load_from_settings,
    load_prompts,
)
from trpo_lm.training.artifacts import save_prompts

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


class Plain:
    """Only its address tells it from others."""


@dataclass
class Point:
    x: int
    inner: Any = None


OF_CONTENT = {  # two values of each kind; that of the same content is made anew
    "image": lambda n: Image.new("RGB", (40, 40), (n, 0, 0)),
    "long array": lambda n: np.arange(5000) * (1 + n * (np.arange(5000) == 2500)),
    "tensor": lambda n: torch.arange(3000).bfloat16() * (1 + n * (torch.arange(3000) == 1500)),
    "objects in an array": lambda n: np.array([{"x": n}, "y"], dtype=object),
    "date": lambda n: datetime(2020, 1, 1 + n),
    "decimal": lambda n: Decimal(n),
    "bytes": lambda n: b"x" * 5000 + bytes([n]) + b"x" * 5000,
    "dataclass": lambda n: Point(1, np.arange(5000) * (1 + n * (np.arange(5000) == 2500))),
    "set": lambda n: {f"word {i}" for i in range(20 + n)},
    "nested": lambda n: [{"a": (n, Decimal(n))}],
}
WITHOUT = {
    "plain": Plain,
    "function": lambda: lambda: 1,
    "inside": lambda: [{"a": Point(1, Plain())}],
    "odd keys": lambda: {(1, 2): 3},
    "circle": lambda: (lambda x: x.append(x) or x)([]),
}


@pytest.mark.parametrize("kind", OF_CONTENT)
def test_B18_a_fingerprint_is_of_content(kind):
    make = OF_CONTENT[kind]
    one, same, other = (
        Prompts(["w1", "w2"], {"x": [make(0), make(n)], "y": [1, 2]}) for n in (0, 0, 1)
    )
    assert one.uncompared() == []
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_B18_a_fingerprint_is_the_same_in_every_process():
    """Addresses and the order of sets change from process to process."""
    code = (
        "import test_prompts as t, numpy as np; made = {k: [f(1)] for k, f in t.OF_CONTENT.items()}"
        "; made |= {k: [f()] for k, f in t.WITHOUT.items()}"
        "; print(t.Prompts(['w1'], made).fingerprint())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize("kind", WITHOUT)
def test_B18_what_has_no_content_is_left_out_by_name(kind):
    one, other = (Prompts(["w1"], {"x": [WITHOUT[kind]()], "y": [1]}) for _ in range(2))
    assert one.uncompared() == ["x"] and one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != Prompts(["w1"], {"x": one.columns["x"], "y": [2]}).fingerprint()
    assert one.fingerprint() != Prompts(["w1"], {"y": [1]}).fingerprint()


def test_held_out_prompts_are_the_file_named_or_the_last_rows(tmp_path):
    rows = [f"w{i}" for i in range(40)]
    train, held_out = load_both(rows, None, column="prompt", split_off=256)
    assert train.prompts == rows[:36] and held_out.prompts == rows[36:]  # at most a tenth
    assert load_both(rows, None, column="prompt", split_off=2)[1].prompts == rows[38:]
    (tmp_path / "own.csv").write_text("q\nx\ny\n")
    train, held_out = load_both(rows, tmp_path / "own.csv", column="q", split_off=2)
    assert train.prompts == rows and held_out.prompts == ["x", "y"]


# ---------------------------------------------------------------- tables, streams and messages


def tables():
    pandas = pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")
    yield pandas.DataFrame(ROWS)
    yield pandas.DataFrame(ROWS, index=[7, 9])
    yield pyarrow.Table.from_pylist(ROWS)
    yield datasets.IterableDataset.from_generator(lambda: iter(ROWS))
    yield (row for row in ROWS)


def test_B05_tables_are_read_as_rows():
    for table in tables():
        loaded = load_prompts(table)
        assert loaded.prompts == ["a b", "c"] and loaded.columns == {"label": [1, 0]}
    pandas = pytest.importorskip("pandas")
    assert load_prompts(pandas.Series(["a", "b"])).prompts == ["a", "b"]
    talks = pandas.DataFrame({"prompt": [TALK, TALK], "x": [1.5, None]})
    assert load_prompts(talks) == Prompts([TALK, TALK], {"x": [1.5, None]})

    class Names(dict):
        pass

    class Frame:
        columns = ("prompt", "answer")

        def __iter__(self):
            return iter(self.columns)

    for source in (Names(prompt=["a"]), Frame(), {"prompt": ["a"]}.keys):
        with pytest.raises(TrpoLMError, match="cannot read prompts from"):
            load_prompts(source)


@pytest.mark.parametrize("content", [None, 3, [{"type": "image", "url": "x"}], [None], ["a", 3]])
def test_B11_a_message_is_text_or_parts_of_text(content):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    for source in (parts, ["a ", "b"]):
        assert load_prompts([[{"role": "user", "content": source}]]).prompts == [
            [{"role": "user", "content": "a b"}]
        ]
    bad = [*TALK, {"role": "user", "content": content}]
    with pytest.raises(TrpoLMError, match=r"row 1 has a 'user' message with the content") as info:
        load_prompts([TALK, bad])
    assert "column 'prompt'" in str(info.value)


def test_messages_lose_the_keys_that_arrow_put_there_and_an_empty_beginning():
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows = [{"prompt": [*TALK, called, *TALK]}, {"prompt": TALK}]
    loaded = load_prompts(Dataset.from_list(rows))
    assert loaded.prompts == [[*TALK, {**called, "content": ""}, *TALK], TALK]
    assert load_prompts([[*TALK, {"role": "assistant", "content": " "}]]).prompts == [TALK]


def test_B13_a_column_called_prompt_beside_the_prompt_column(tmp_path):
    loaded = load_prompts([{"text": "a", "prompt": 3, "x": 1}], column="text")
    assert loaded == Prompts(["a"], {"x": [1]})
    save_prompts(tmp_path / "held_out.jsonl", Prompts(["a"], {"x": [1], "prompt": [3]}))
    assert load_prompts(tmp_path / "held_out.jsonl").prompts == ["a"]


def test_B32_a_source_without_an_end_is_refused_and_a_stated_number_read():
    def endless():
        yield from ({"prompt": f"w{i}"} for i in itertools.count())

    for source in (endless, lambda: datasets.IterableDataset.from_generator(endless)):
        assert load_prompts(source(), rows=3).prompts == ["w0", "w1", "w2"]
    streamed = datasets.IterableDataset.from_generator(lambda: ({"prompt": "a"} for _ in range(9)))
    assert len(load_prompts(streamed)) == 9
    for source, line in (
        (endless(), r"itertools.islice\(source, 10_000\)"),
        (iter(endless()), "islice"),
        (("w" for _ in itertools.count()), "islice"),
    ):
        with pytest.raises(TrpoLMError, match=f"without a length, and it did not end(.|\n)*{line}"):
            load_prompts(source)

    def breaks():
        yield "a"
        raise OSError("lost")

    with pytest.raises(TrpoLMError, match="cannot be read: OSError: lost"):
        load_prompts(breaks())


def test_B32_a_stream_names_its_own_line(monkeypatch):
    monkeypatch.setattr(trpo_lm.lm.prompts, "_MOST_UNCOUNTED", 5)
    streamed = datasets.IterableDataset.from_generator(lambda: ({"prompt": "a"} for _ in range(9)))
    with pytest.raises(TrpoLMError, match=r"dataset.take\(10_000\)"):
        load_prompts(streamed)


@pytest.mark.parametrize("source", [ROWS, Dataset.from_list(ROWS), Prompts(["a b", "c"], {})])
def test_the_first_rows(source):
    assert load_prompts(source, rows=1).prompts == ["a b"]
    assert len(load_prompts(source, rows=9)) == 2


def test_B41_endings_of_files_in_capitals_and_tabs(tmp_path):
    table = "prompt\tlabel\na, b\t1\n"
    for name, text in {
        "p.tsv": table, "P.TSV": table, "P.JSONL": lines([{"prompt": "a, b", "label": 1}]),
        "P.Csv": 'prompt,label\n"a, b",1\n', "p.JSON": '[{"prompt": "a, b", "label": 1}]',
    }.items():  # fmt: skip
        assert load_prompts(written(tmp_path, name, text)) == Prompts(["a, b"], {"label": [1]})
    assert load_prompts(written(tmp_path, "p.TXT", "a, b\n")).prompts == ["a, b"]


# ---------------------------------------------------------------- what cannot be encoded


REFUSALS = {
    "a role": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "an attribute": "{{ messages[0].content.parts[0].text + 3 }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("template", REFUSALS.values(), ids=REFUSALS)
def test_B31_a_template_that_refuses_a_row_is_an_error_with_the_row(template):
    talk = [{"role": "system", "content": "w1"}, *TALK]
    with pytest.raises(TrpoLMError, match=r"template refuses the conversation.*row 0"):
        check([talk], chat_template=template)


def test_B31_a_tokenizer_that_refuses_a_row_is_an_error_with_the_row(monkeypatch):
    tok = tiny.tokenizer()

    def refuse(self, text, **options):
        if "w2" in text:
            raise UnicodeEncodeError("utf-8", text, 0, 1, "surrogates not allowed")
        return {"input_ids": [4]}

    monkeypatch.setattr(type(tok), "__call__", refuse)
    with pytest.raises(TrpoLMError, match=r"cannot encode the text: UnicodeEncodeError.*row 1"):
        check_prompts(load_prompts(["w1", "w2"]), tok, room=6, truncate="error")


@pytest.mark.parametrize("bos", [True, False])
def test_B07_truncation_keeps_a_suffix_of_the_tokens(bos):
    text = "w0 w1 w2 <eos> w3 <pad> w4 <eos> w5"
    tok = tiny.tokenizer(bos=bos)
    ids = encode_prompt(tok, text)
    for room in range(2, len(ids)):
        (cut,) = check([text], room=room, truncate="left", bos=bos)[0].prompts
        kept = encode_prompt(tok, cut)
        assert kept[bos:] == ids[len(ids) - room + bos :] and len(kept) == room


def test_B07_a_text_whose_end_has_other_tokens_loses_more_or_is_refused():
    """A word of two tokens is not cut in the middle, where its end alone is another token."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "\u2581", "a", "b", "c"])}
    vocabulary |= {"\u2581a": 5, "\u2581c": 6}
    merges = [("\u2581", "a"), ("\u2581", "c")]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    cut, _ = check_prompts(load_prompts(["c abb c c"]), tok, room=4, truncate="left")
    assert cut.prompts == ["c c"]
    with pytest.raises(TrpoLMError, match=r"no end of its text has the same tokens.*row 0"):
        check_prompts(load_prompts(["c abb"]), tok, room=2, truncate="left")


# ---------------------------------------------------------------- datasets by name

SUMS = [{"question": f"{i} + 1?", "answer": f"so #### {i + 1}"} for i in range(30)]


@pytest.fixture
def named(tmp_path):
    """A folder of the shape of openai/gsm8k: two configurations, two splits each."""
    card = ["---", "configs:"]
    for name in ("main", "socratic"):
        (tmp_path / "sums" / name).mkdir(parents=True)
        card += [f"- config_name: {name}", "  data_files:"]
        for split, rows in (("train", SUMS), ("test", SUMS[:3])):
            path = f"{name}/{split}.parquet"
            Dataset.from_list(rows).to_parquet(tmp_path / "sums" / path)
            card += [f"  - split: {split}", f"    path: {path}"]
    (tmp_path / "sums" / "README.md").write_text("\n".join([*card, "---", ""]))
    return str(tmp_path / "sums")


def test_a_dataset_with_configurations_and_columns_of_its_own(named):
    settings = DatasetSettings(
        named, dataset_config="main", eval_split="test", prompt_template="Q: {question} {{}}"
    )
    train, held_out = load_from_settings(settings, None, split_off=2)
    assert (len(train), len(held_out)) == (30, 3) and train.asked
    assert train.prompts[0] == "Q: 0 + 1? {}" and train.columns["answer"][0] == "so #### 1"
    some = load_prompts(named, name="socratic", split="test", rows=2, column="question")
    assert some == Prompts(["0 + 1?", "1 + 1?"], {"answer": ["so #### 1", "so #### 2"]})
    sliced = load_prompts(named, name="main", split="train[:5]", column="question")
    assert len(sliced) == 5


def test_what_is_wrong_with_a_dataset_by_name_is_said(named):
    for options, message in (
        ({}, r"Config name is missing(.|\n)*main(.|\n)*dataset_config"),
        ({"name": "other"}, "other"),
        ({"name": "main", "split": "dev"}, r"dev(.|\n)*dataset_split"),
        ({"name": "main"}, r"no column 'prompt'.*question(.|\n)*prompt_template"),
        ({"name": "main", "template": "{quest}"}, r"names quest; the columns are \['question'"),
        ({"name": "main", "template": "no column"}, "names no column"),
        ({"name": "main", "template": "{question"}, "cannot be read"),
        ({"name": "main", "column": "question", "answer_column": "x"}, "no column 'x'"),
        ({"name": "main", "rows": 0}, "rows = 0 must be at least 1"),
    ):
        with pytest.raises(TrpoLMError, match=message):
            load_prompts(named, **options)


def test_a_template_makes_a_users_message_where_there_is_a_chat_template():
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    loaded = load_prompts(rows, template="w{a}", answer_column="b")
    assert loaded == Prompts(["w1", "w2"], {"answer": ["x", "y"], "a": [1, 2]}, asked=True)
    assert check_prompts(loaded, tiny.tokenizer(), room=None, truncate="error")[0].prompts == [
        "w1", "w2",
    ]  # fmt: skip
    chat = tiny.tokenizer(chat_template="{{ messages[0]['content'] }}")
    fitted, _ = check_prompts(loaded, chat, room=None, truncate="error")
    assert fitted.prompts[1] == [{"role": "user", "content": "w2"}] and not fitted.asked
    assert load_prompts(loaded) == loaded and loaded.split_off(1)[1].asked


def test_a_function_makes_prompts_and_columns():
    def make(row):
        return {"prompt": [{"role": "user", "content": row["q"]}], "answer": row["n"] + 1}

    loaded = load_prompts([{"q": "w1", "n": 1}], template=make)
    assert loaded.prompts == [[{"role": "user", "content": "w1"}]]
    assert loaded.columns == {"q": ["w1"], "n": [1], "answer": [2]}
    with pytest.raises(TrpoLMError, match="template failed on row 0: KeyError: 'x'"):
        load_prompts([{"q": "w1"}], template=lambda row: row["x"])
    with pytest.raises(TrpoLMError, match="row 0 holds 3"):
        load_prompts([{"q": "w1"}], template=lambda row: 3)


def test_a_dataset_of_a_hub_is_remembered_by_its_id_and_a_file_is_not(tmp_path, monkeypatch):
    found = datasets.Dataset.from_dict({"prompt": ["w1", "w2", "w3"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    prompts = load_prompts("org/prompts")
    assert load_prompts(prompts.split_off(1)[0]).hub_id == "org/prompts"
    (tmp_path / "p.txt").write_text("w1\n")
    assert load_prompts(tmp_path / "p.txt").hub_id is None and load_prompts(["w1"]).hub_id is None
