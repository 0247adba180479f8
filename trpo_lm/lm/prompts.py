"""Prompts from datasets, lists, files and the hub, checked before anything is generated."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trpo_lm.config import DatasetSettings
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.examination import ids_have_embeddings

T = TypeVar("T")
Prompt = str | list[dict[str, Any]]  # text, or messages with a role and a content

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # what a row gives to the chat template
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".parquet": ("parquet", {}),
}
_MOST_UNCOUNTED = 100_000  # rows read of what has no length, unless their number is stated


Template = str | Callable[[dict[str, Any]], Any]  # how a row becomes a prompt; see `load_prompts`


@dataclass(frozen=True)
class Prompts:
    """Prompts and the columns that go with them, row by row.

    Attributes:
        prompts, columns: N values each.
        asked: Whether texts become the message of a user where the tokenizer has a chat template.
        hub_id: Dataset on a hub that they were read from, if any.
    """

    prompts: list[Prompt]
    columns: dict[str, list]
    asked: bool = False
    hub_id: str | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> tuple[list[Prompt], dict[str, list]]:
        """Return the prompts and columns of some rows."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return [self.prompts[i] for i in rows], columns

    def split_off(self, count: int) -> tuple[Prompts, Prompts]:
        """Split off the last `count` rows, at most a tenth of all; return the others and these."""
        cut = len(self) - min(count, max(1, len(self) // 10))
        (prompts, columns), last = self.take(range(cut)), self.take(range(cut, len(self)))
        first = replace(self, prompts=prompts, columns=columns)
        return first, replace(self, prompts=last[0], columns=last[1])

    def fingerprint(self) -> str:
        """Return 16 hex digits of the content, the same in every process; see `uncompared`."""
        unknown = self.uncompared()
        prompts = [] if "prompt" in unknown else self.prompts
        columns = {n: values for n, values in self.columns.items() if n not in unknown}
        content = json.dumps([prompts, columns, *unknown], sort_keys=True, default=_content)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def uncompared(self) -> list[str]:
        """Return the columns with values that no other process could tell apart by content."""
        columns = {"prompt": self.prompts, **self.columns}
        return sorted(name for name, values in columns.items() if not _has_content(values))


def _has_content(values: list) -> bool:
    try:
        json.dumps(values, sort_keys=True, default=_content)
    except (TypeError, ValueError, RecursionError):  # no content; a circle; too deep
        return False
    return True


def _content(value: Any) -> Any:
    """Return what a value that JSON does not have holds, as values that it has, or others.

    Raises:
        TypeError: If only its address tells it from others.
    """
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(item, sort_keys=True, default=_content) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, {f.name: getattr(value, f.name) for f in fields(value)}]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().resolve_conj().resolve_neg()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return value.tolist()
    as_bytes = getattr(value, "tobytes", None)  # arrays, images, views of memory
    if as_bytes is not None:
        kind = [str(getattr(value, name, "")) for name in ("dtype", "shape", "mode", "size")]
        return [*kind, hashlib.sha256(as_bytes()).hexdigest()]
    text = repr(value)
    if re.search(r"\bat 0x[0-9a-fA-F]+", text):
        raise TypeError(f"{text:.80} has no content")
    return text


def load_both(
    dataset: Any,
    eval_dataset: Any,
    *,
    split_off: int,
    split: str = "train",
    eval_split: str | None = None,
    **options: Any,
) -> tuple[Prompts, Prompts]:
    """Return training prompts and held-out prompts.

    Args:
        dataset: Any source that `load_prompts` accepts.
        eval_dataset: Likewise; None: `eval_split` of the dataset, or else its last rows.
        split_off: Rows to hold out without an eval_dataset and eval_split, at most a tenth of all.
        split: Split of the dataset to train on.
        eval_split: Split to evaluate on; None: `split`, of an eval_dataset.
        options: Of `load_prompts`, for both.
    """
    prompts = load_prompts(dataset, split=split, **options)
    if eval_dataset is None and eval_split is None:
        return prompts.split_off(split_off)
    source = dataset if eval_dataset is None else eval_dataset
    return prompts, load_prompts(source, split=eval_split or split, **options)


def load_from_settings(
    settings: DatasetSettings, eval_dataset: str | None, *, split_off: int
) -> Any:
    """Return training and held-out prompts as a command line names them; see `load_both`."""
    return load_both(
        settings.dataset,
        settings.eval_dataset or eval_dataset,
        split_off=split_off,
        split=settings.dataset_split,
        eval_split=settings.eval_split,
        name=settings.dataset_config,
        revision=settings.dataset_revision,
        rows=settings.dataset_rows,
        column=settings.prompt_column,
        template=settings.prompt_template,
        answer_column=settings.answer_column,
    )


def load_prompts(
    source: Any,
    *,
    column: str = "prompt",
    template: Template | None = None,
    answer_column: str | None = None,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    rows: int | None = None,
) -> Prompts:
    """Read prompts from a dataset, a list, a file or a hub id.

    A prompt is text, or a list of messages with "role" and "content"; text parts of a content are
    joined, and a conversation that ends in an assistant message is continued there. The columns
    `tools` and `chat_template_kwargs` reach the chat template, all reach the reward functions; a
    column called "prompt" beside another prompt column is left out.

    Args:
        source: A `datasets.Dataset` or `IterableDataset`, a data frame or table of pandas, polars
            or pyarrow, a list or generator of texts, conversations or rows (dicts), the path of a
            .jsonl, .json, .csv, .tsv, .parquet or .txt file (one prompt a line), or the folder or
            hub id of a dataset.
        column: Column that holds the prompt.
        template: Makes the prompt from a row instead: text with {column} placeholders, or a
            function that takes the row and returns a prompt, or a dict of it ("prompt") and of
            columns to set. Text becomes the message of a user where the tokenizer has a chat
            template.
        answer_column: Column that reaches reward functions as `answer`.
        name: Configuration of a folder or hub dataset, e.g. "main" of openai/gsm8k.
        split: Split of it, e.g. "train" or "test[:100]".
        revision: Branch, tag or commit of a hub dataset.
        rows: Most rows to read, the first ones; a hub dataset is then streamed. None: all, and at
            most 100,000 of what has no length.

    Raises:
        TrpoLMError: If it cannot be read, is empty, or a row holds no prompt.
    """
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    where = f"dataset {source!r}" if isinstance(source, str) else "dataset"
    if rows is not None and rows < 1:
        raise TrpoLMError(f"rows = {rows} must be at least 1", where=where)
    table = _read(source, column, _Hub(name, split, revision), rows, where)
    names = list(table.column_names)
    for wanted in (None if template else column, answer_column):
        if wanted not in (None, *names):
            raise TrpoLMError(
                f"no column {wanted!r}; the columns are {names}", where=where,
                hint="name the column with prompt_column (or answer_column), or make prompts from "
                "other columns with prompt_template",
            )  # fmt: skip
    if len(table) == 0:
        raise TrpoLMError("the dataset is empty", where=where, hint="give at least one prompt")
    columns = {n: list(table[n]) for n in names}
    if template is not None:
        column = "prompt"
        columns = _from_template(template, columns, where)
    place = f"{where}, column {column!r}; columns {names}"
    prompts = [_prompt(value, i, place) for i, value in enumerate(columns[column])]
    if answer_column is not None:
        columns = {"answer": columns[answer_column], **columns}
        columns["answer"] = columns.pop(answer_column)
    columns = {n: values for n, values in columns.items() if n not in (column, "prompt")}
    asked = source.asked if isinstance(source, Prompts) else template is not None
    if isinstance(source, Prompts):
        hub_id = source.hub_id
    else:
        local = not isinstance(source, str) or os.path.lexists(os.path.expanduser(source))
        hub_id = None if local else source
    return Prompts(prompts, columns, asked, hub_id)


def _from_template(template: Template, columns: dict[str, list], where: str) -> dict[str, list]:
    """Return the columns, with the prompt that a template makes of each row."""
    count = len(next(iter(columns.values())))
    if isinstance(template, str):
        where = "prompt_template"
        try:
            fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
        except ValueError as error:
            raise TrpoLMError(f"{template!r} cannot be read: {error}", where=where) from error
        if not fields or fields - columns.keys():
            raise TrpoLMError(
                f"{template!r} names {', '.join(sorted(fields)) or 'no column'}; the columns are "
                f"{list(columns)}",
                where=where,
                hint="write a column's name in braces, e.g. {question}; a brace itself is {{",
            )
    made = []
    for i in range(count):
        row = {n: values[i] for n, values in columns.items()}
        try:
            made.append(template.format_map(row) if isinstance(template, str) else template(row))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise TrpoLMError(f"the template failed on row {i}: {reason}", where=where) from error
    rows = [value if isinstance(value, dict) else {"prompt": value} for value in made]
    names = dict.fromkeys(n for row in rows for n in row)
    return {**columns, **{n: [row.get(n) for row in rows] for n in names}}


def _prompt(value: Any, row: int, where: str) -> Prompt:
    """Return the prompt of a row: text, or messages whose contents are text."""
    if isinstance(value, str):
        return value
    if not (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    ):
        raise TrpoLMError(
            f"row {row} holds {value!r}, which is neither text nor a list of messages", where=where
        )
    # Arrow fills the keys that other rows have with None, and templates ask whether a key is there.
    messages = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in value]
    for message in messages:
        content = _text_content(message["content"], called=bool(message.get("tool_calls")))
        if content is None:
            raise TrpoLMError(
                f"row {row} has a {message['role']!r} message with the content "
                f"{message['content']!r:.80}, which is neither text nor a list of text parts",
                where=where,
                hint='a part is {"type": "text", "text": ...}; images and sounds are not read',
            )
        message["content"] = content
    if len(messages) > 1 and is_prefilled(messages) and not str(messages[-1]["content"]).strip():
        messages.pop()  # an empty beginning of an answer
    return messages


def _text_content(content: Any, *, called: bool) -> str | None:
    """Return the text of a message; None if it holds anything else."""
    if content is None and called:  # a call of a tool needs no text
        return ""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    kinds = {part.get("type", "text") for part in content if isinstance(part, dict)}
    if kinds - {"text"} or not all(isinstance(text, str) for text in texts):
        return None
    return "".join(texts)  # type: ignore[arg-type]


def is_prefilled(prompt: Prompt) -> bool:
    """Whether a prompt is a conversation that ends in the beginning of an answer."""
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"


def as_turn(prompt: Prompt, completion: Any) -> tuple[Prompt, Any]:
    """Return a prompt and a completion as reward functions get them, which is as in TRL.

    Args:
        prompt: Text or a conversation.
        completion: The text that was sampled; messages are returned as they are.

    Returns:
        Text and text; or a conversation and a list with the one message that answers it. A
        prefilled answer moves from the end of the conversation into that message.
    """
    if isinstance(prompt, str) or not isinstance(completion, str):
        return prompt, completion
    if is_prefilled(prompt):
        return prompt[:-1], [{**prompt[-1], "content": prompt[-1]["content"] + completion}]
    return prompt, [{"role": "assistant", "content": completion}]


class _Hub(NamedTuple):
    """Which part of a dataset with a name."""

    name: str | None
    split: str
    revision: str | None


def _read(source: Any, column: str, hub: _Hub, rows: int | None, where: str) -> Any:
    """Return columns by name: a Dataset, or a `_Table`."""
    if isinstance(source, Prompts):
        return _first(_Table({**source.columns, column: source.prompts}), rows)
    if isinstance(getattr(source, "column_names", None), dict):
        raise TrpoLMError(
            f"a DatasetDict with the splits {list(source)} was given", where=where,
            hint="pass one split, e.g. dataset['train']",
        )  # fmt: skip
    if isinstance(source, datasets.Dataset):
        return _first(source, rows)
    if isinstance(source, str):
        return _first(_read_file(Path(source), column, hub, rows, where), rows)
    for convert in ("to_pylist", "to_dicts", "to_list"):  # pyarrow, polars, a series
        if hasattr(source, convert) and not isinstance(source, datasets.IterableDataset):
            source = getattr(source, convert)()
    if hasattr(source, "iterrows"):  # pandas
        frame: Any = source
        source = frame.astype(object).where(frame.notna(), None).to_dict("records")
    by_name = isinstance(source, Mapping) or hasattr(source, "keys") or hasattr(source, "columns")
    if isinstance(source, Iterable) and not by_name:
        return _table(_listed(source, rows, where), column)
    raise TrpoLMError(
        f"cannot read prompts from {type(source).__name__}", where=where,
        hint="give a datasets.Dataset, a list of texts or dicts, a file or a hub id",
    )  # fmt: skip


def _first(table: Any, rows: int | None) -> Any:
    """Return the first rows of a table."""
    if rows is None or rows >= len(table):
        return table
    if isinstance(table, datasets.Dataset):
        return table.select(range(rows))
    return _Table({name: values[:rows] for name, values in table.items()})


def _listed(source: Iterable, rows: int | None, where: str) -> list[Any]:
    """Read the rows of an iterable to its end, which must come."""
    if isinstance(source, Sequence):
        return list(source[:rows])
    most = _MOST_UNCOUNTED + 1 if rows is None and not hasattr(source, "__len__") else rows
    try:
        found = list(islice(source, most))
    except Exception as error:
        raise TrpoLMError(
            f"the dataset cannot be read: {type(error).__name__}: {error}", where=where
        ) from error
    if rows is None and most is not None and len(found) == most:
        streamed = isinstance(source, datasets.IterableDataset)
        line = "dataset.take(10_000)" if streamed else "itertools.islice(source, 10_000)"
        raise TrpoLMError(
            f"{_MOST_UNCOUNTED:,} rows were read of a {type(source).__name__} without a length, "
            "and it did not end",
            where=where,
            hint=f"say how many rows to use: {line}",
        )
    return found


class _Table(dict):
    """Columns by name, with the part of a Dataset's interface that is used here."""

    @property
    def column_names(self) -> list[str]:
        return list(self)

    def __len__(self) -> int:
        return len(next(iter(self.values()), []))


def _table(rows: list[Any], column: str) -> _Table:
    """Turn rows (dicts, or prompts alone) into columns."""
    if not rows or not all(isinstance(row, dict) for row in rows):
        return _Table({column: rows})
    names = dict.fromkeys(name for row in rows for name in row)
    return _Table({name: [row.get(name) for row in rows] for name in names})


def _read_file(path: Path, column: str, hub: _Hub, rows: int | None, where: str) -> Any:
    ending = path.suffix.lower()
    if ending in (*_READERS, ".jsonl", ".txt") and not path.is_file():
        raise TrpoLMError("the file does not exist", where=where)
    try:
        if ending == ".txt":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            return _Table({column: [line for line in lines if line.strip()]})
        if ending == ".jsonl":
            return _table(_json_lines(path), column)
        with _no_progress():
            if ending in _READERS:
                kind, options = _READERS[ending]
                return datasets.load_dataset(
                    kind, data_files=str(path), split="train", keep_in_memory=True, **options
                )
            options = {"split": hub.split, "revision": hub.revision}
            if rows is None:
                return datasets.load_dataset(str(path), hub.name, **options)
            streamed = datasets.load_dataset(str(path), hub.name, streaming=True, **options)
            return _table(list(islice(streamed, rows)), column)
    except Exception as error:
        raise TrpoLMError(
            f"the dataset cannot be read: {type(error).__name__}: {error}", where=where,
            hint="give a .jsonl, .csv, .parquet or .txt file, or the folder or hub id of a dataset,"
            " whose configuration and split dataset_config and dataset_split name",
        ) from error  # fmt: skip


def _json_lines(path: Path) -> list[Any]:
    """Parse each line; ValueError names a line that is not JSON."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


@contextmanager
def _no_progress() -> Iterator[None]:
    """Keep the progress bars of `datasets` off the screen inside the block."""
    enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()


def check_prompts(
    prompts: Prompts,
    tokenizer: Any,
    *,
    room: int | None,
    truncate: str,
    embeddings: int | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> tuple[Prompts, int]:
    """Encode every prompt once, so that a bad row is an error before anything is generated.

    Args:
        prompts: From `load_prompts`.
        tokenizer: The policy's.
        room: Most tokens of a prompt: the context minus the completion; None without a limit.
        truncate: 'error', or 'left' to drop the beginning of prompts that are too long.
        embeddings: How many tokens the model knows; None: all.
        template_arguments: For the chat template; a row's own win over these.

    Returns:
        The prompts, truncated where needed, and the number of truncated ones.

    Raises:
        TrpoLMError: If a row cannot be encoded, has no token, one that the model does not know, or
            is too long; names the row.
    """
    texts, truncated = list(prompts.prompts), 0
    if prompts.asked and getattr(tokenizer, "chat_template", None):
        texts = [_question(p) if isinstance(p, str) else p for p in texts]
    encoded = encode_prompts(tokenizer, texts, prompts.columns, template_arguments)
    if embeddings is not None:
        rows = ((f"prompt in row {i}", ids) for i, ids in enumerate(encoded))
        ids_have_embeddings(rows, embeddings, tokenizer)
    for i, (prompt, ids) in enumerate(zip(texts, encoded, strict=True)):
        if room is None or len(ids) <= room:
            continue
        if truncate == "error" or not isinstance(prompt, str):
            raise TrpoLMError(
                f"the prompt has {len(ids)} tokens and only {room} fit before the completion",
                where=f"prompt in row {i}",
                hint="shorten it, or lower max_completion_length"
                + ", or set truncate_prompts='left'" * isinstance(prompt, str),
            )
        texts[i], truncated = _drop_beginning(tokenizer, ids, room, row=i), truncated + 1
    return Prompts(texts, prompts.columns, hub_id=prompts.hub_id), truncated


def _question(text: str) -> Prompt:
    """Return a text as the message of a user."""
    return [{"role": "user", "content": text}]


def _drop_beginning(tokenizer: Any, ids: list[int], room: int, *, row: int) -> str:
    """Return the longest text whose tokens are the last ones of a prompt, and fit.

    Text, because rewards need it; but of the ids that the policy would have seen. What the
    tokenizer puts in front of every text is put in front of this one.
    """
    front = len(_front(tokenizer, ids))
    for start in range(len(ids) - room + front, len(ids)):
        text = tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
        if encode_prompt(tokenizer, text) == [*ids[:front], *ids[start:]]:
            return text
    raise TrpoLMError(
        f"the prompt has {len(ids)} tokens, only {room} fit before the completion, and no end of "
        "its text has the same tokens",
        where=f"prompt in row {row}",
        hint="shorten it, or lower max_completion_length",
    )


def _front(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the beginning-of-text token of a prompt, if it has one."""
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    columns: Mapping[str, list] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
        tokenizer: The policy's.
        prompts: Texts and conversations.
        columns: Of the same rows; `tools` and `chat_template_kwargs` are for the chat template.
        template_arguments: For the chat template; a row's own win over these.

    Raises:
        TrpoLMError: If one cannot be encoded; names the row.
    """

    def written(i: int) -> str:
        options = template_options(columns or {}, i, template_arguments)
        return _written(tokenizer, prompts[i], **options)

    count, bare = len(prompts), [isinstance(prompt, str) for prompt in prompts]
    texts = _by_row(written, count)
    encoded = None
    if isinstance(tokenizer, PreTrainedTokenizerBase):  # then all at once: ten times as fast
        with suppress(Exception):  # whatever it may raise; row by row tells which text it is
            encoded = tokenised(tokenizer, texts, bare)["input_ids"]
    if encoded is None:
        encoded = _by_row(lambda i: _encode(tokenizer, texts[i], bare=bare[i]), count)
    return _by_row(lambda i: _as_prompt(tokenizer, prompts[i], list(encoded[i])), count)


def _by_row(work: Callable[[int], T], count: int) -> list[T]:
    """Return the work of each row; an error names the row."""
    done = []
    for i in range(count):
        try:
            done.append(work(i))
        except TrpoLMError as error:
            raise TrpoLMError(error.what, where=f"prompt in row {i}", hint=error.hint) from error
    return done


def tokenised(
    tokenizer: Any, texts: Sequence[str], bare: Sequence[bool], **options: Any
) -> dict[str, list]:
    """Return what a tokenizer makes of many texts, field by field.

    Args:
        tokenizer: Called once for each kind of text.
        texts: N of them.
        bare: Whether each gets the tokenizer's special tokens; a chat template writes its own.
        options: Of the call.
    """
    fields: dict[str, list] = {}
    for kind in sorted(set(bare)):
        rows = [i for i, b in enumerate(bare) if b == kind]
        out = tokenizer([texts[i] for i in rows], **_special(kind), **options)
        for name in out:
            column = fields.setdefault(name, [None] * len(texts))
            for i, value in zip(rows, out[name], strict=True):
                column[i] = value
    return fields


def template_options(
    columns: Mapping[str, list], row: int, template_arguments: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a row, and the settings, give to the chat template.

    Args:
        columns: `tools` and `chat_template_kwargs`, where present, hold JSON text or its value.
        row: Which row of them.
        template_arguments: For every row; a row's own win over these.

    Raises:
        TrpoLMError: If they hold anything else.
    """
    found = {}
    for name, kind in zip(TEMPLATE_COLUMNS, (list, dict), strict=True):
        value = columns[name][row] if name in columns else None
        try:
            value = _without_none(json.loads(value) if isinstance(value, str) else value)
        except ValueError as error:
            raise TrpoLMError(f"the column {name!r} holds no JSON: {error}") from error
        if not isinstance(value, kind | None):
            raise TrpoLMError(f"the column {name!r} holds {value!r:.60}, not a {kind.__name__}")
        found[name] = value or kind()
    return {
        "tools": found["tools"] or None,
        **(template_arguments or {}),
        **found[TEMPLATE_COLUMNS[1]],
    }


def _without_none(value: Any) -> Any:
    """Drop the keys that Arrow added to a row because other rows have them."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def encode_prompt(tokenizer: Any, prompt: Prompt, **template_options: Any) -> list[int]:
    """Return the token ids of a prompt.

    They begin with one beginning-of-text token if its tokenizer or template writes one. An end
    token that the tokenizer appends to every text is taken off: the policy continues the text.

    Args:
        tokenizer: The policy's.
        prompt: Text, or a conversation. One that ends in an assistant message is continued there.
        template_options: `tools` and other arguments of the chat template.

    Raises:
        TrpoLMError: If the prompt is neither text nor messages, cannot be encoded, or has no token.
    """
    text = _written(tokenizer, prompt, **template_options)
    ids = _encode(tokenizer, text, bare=isinstance(prompt, str))
    return _as_prompt(tokenizer, prompt, ids)


def _written(tokenizer: Any, prompt: Prompt, **template_options: Any) -> str:
    """Return a prompt as text."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise TrpoLMError(f"a prompt must be text or messages, not {type(prompt).__name__}")
    if not getattr(tokenizer, "chat_template", None):
        raise TrpoLMError(
            "the prompt is a conversation and the tokenizer has no chat template",
            hint="set tokenizer.chat_template, or give prompts as plain text",
        )
    return apply_template(tokenizer, prompt, open_turn=True, **template_options)


def _as_prompt(tokenizer: Any, prompt: Prompt, ids: list[int]) -> list[int]:
    """Return the ids of a prompt, of those of its text: one beginning of text, and no end."""
    if isinstance(prompt, str) and ids and ids[-1] in tokenizer.all_special_ids:
        ids = _without_ending(ids, _encode(tokenizer, prompt, bare=False))
    bos = tokenizer.bos_token_id
    if len(ids) > 1 and ids[0] == ids[1] == bos:
        del ids[0]
    if not ids and bos is not None:
        ids = [bos]
    if not ids:
        raise TrpoLMError(
            "the prompt is empty and the tokenizer has no bos token",
            hint="remove the row, or give it at least one token",
        )
    return ids


def apply_template(
    tokenizer: Any, messages: list[dict[str, Any]], *, open_turn: bool, **options: Any
) -> str:
    """Return a conversation as text, by the tokenizer's chat template.

    Args:
        tokenizer: With a chat template.
        messages: The conversation.
        open_turn: Whether the text ends where an answer begins, or where its last message, an
            assistant's, goes on; otherwise the conversation is complete.
        options: `tools` and other arguments of the template.

    Raises:
        TrpoLMError: If the template refuses the conversation.
    """
    prefilled = open_turn and is_prefilled(messages)
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=open_turn and not prefilled,
            continue_final_message=prefilled,
            **options,
        )
    except Exception as error:
        raise TrpoLMError(
            f"the chat template refuses the conversation: {type(error).__name__}: {error}",
            hint=f"its roles are {', '.join(str(m['role']) for m in messages)}",
        ) from error


def _special(bare: bool) -> dict[str, bool]:
    """Return the option of a call that keeps a tokenizer's special tokens from a text, if any."""
    return {} if bare else {"add_special_tokens": False}


def _encode(tokenizer: Any, text: str, *, bare: bool) -> list[int]:
    try:
        return list(tokenizer(text, **_special(bare))["input_ids"])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise TrpoLMError(f"the tokenizer cannot encode the text: {reason}") from error


def _without_ending(ids: list[int], plain: list[int]) -> list[int]:
    """Take off what the tokenizer appended to the ids of the text itself."""
    n = len(plain)
    starts = (k for k in range(len(ids) - n + 1) if ids[k : k + n] == plain)
    return ids[: next(starts, len(ids)) + n]
