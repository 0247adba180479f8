"""Prompts from datasets, lists, files and the hub, checked before anything is generated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from trpo_lm.errors import TrpoLMError

Prompt = str | list[dict[str, str]]

_READERS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Prompts:
    """Prompts and the columns that go with them, row by row."""

    prompts: list[Prompt]
    columns: dict[str, list]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> tuple[list[Prompt], dict[str, list]]:
        """Return the prompts and columns of some rows."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return [self.prompts[i] for i in rows], columns

    def split_off(self, count: int) -> tuple[Prompts, Prompts]:
        """Split off the last `count` rows, at most a tenth of all; return the others and these."""
        cut = len(self) - min(count, max(1, len(self) // 10))
        first, last = self.take(range(cut)), self.take(range(cut, len(self)))
        return Prompts(*first), Prompts(*last)

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with any prompt or column."""
        content = json.dumps([self.prompts, self.columns], sort_keys=True, default=repr)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_both(
    dataset: Any, eval_dataset: Any, *, column: str, split_off: int
) -> tuple[Prompts, Prompts]:
    """Return training prompts and held-out prompts.

    Args:
        dataset: Any source that `load_prompts` accepts.
        eval_dataset: Likewise; None: the last rows of the dataset.
        column: Column of both that holds the prompt.
        split_off: Rows to hold out without an eval_dataset, at most a tenth of all.
    """
    prompts = load_prompts(dataset, column=column)
    if eval_dataset is None:
        return prompts.split_off(split_off)
    return prompts, load_prompts(eval_dataset, column=column)


def load_prompts(source: Any, *, column: str = "prompt", split: str = "train") -> Prompts:
    """Read prompts from a dataset, a list, a file or a hub id.

    Args:
        source: A `datasets.Dataset`, a list of texts, conversations or rows (dicts), the path of a
            .jsonl, .json, .csv, .parquet or .txt file (one prompt a line), or the id of a dataset
            on the hub.
        column: Column that holds the prompt: text, or a list of {"role", "content"} messages.
        split: Split to take from a hub dataset.

    Raises:
        TrpoLMError: If it cannot be read, is empty, or a row holds no prompt.
    """
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    where = f"dataset {source!r}" if isinstance(source, str) else "dataset"
    rows = _read(source, column, split, where)
    names = list(rows.column_names)
    if column not in names:
        raise TrpoLMError(
            f"no column {column!r}; the columns are {names}", where=where,
            hint="name the column with prompt_column",
        )  # fmt: skip
    if len(rows) == 0:
        raise TrpoLMError("the dataset is empty", where=where, hint="give at least one prompt")
    prompts = list(rows[column])
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            raise TrpoLMError(
                f"row {i} holds {prompt!r}, which is neither text nor a list of messages",
                where=f"{where}, column {column!r}; columns {names}",
            )
    return Prompts(prompts, {n: list(rows[n]) for n in names if n != column})


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)
    )


def _read(source: Any, column: str, split: str, where: str) -> Any:
    """Return columns by name: a Dataset, or a `_Table`."""
    if isinstance(source, Prompts):
        return _Table({column: source.prompts, **source.columns})
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):
        if isinstance(source.column_names, dict):
            raise TrpoLMError(
                f"a DatasetDict with the splits {list(source)} was given", where=where,
                hint="pass one split, e.g. dataset['train']",
            )  # fmt: skip
        return source
    if isinstance(source, str):
        return _read_file(Path(source), column, split, where)
    if isinstance(source, Iterable) and not isinstance(source, dict):
        return _table(list(source), column)
    raise TrpoLMError(
        f"cannot read prompts from {type(source).__name__}", where=where,
        hint="give a datasets.Dataset, a list of texts or dicts, a file or a hub id",
    )  # fmt: skip


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


def _read_file(path: Path, column: str, split: str, where: str) -> Any:
    if path.suffix in (*_READERS, ".jsonl", ".txt") and not path.is_file():
        raise TrpoLMError("the file does not exist", where=where)
    try:
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            return _Table({column: [line for line in lines if line.strip()]})
        if path.suffix == ".jsonl":
            return _table(_json_lines(path), column)
        with _no_progress():
            if path.suffix in _READERS:
                return datasets.load_dataset(
                    _READERS[path.suffix], data_files=str(path), split="train", keep_in_memory=True
                )
            return datasets.load_dataset(str(path), split=split)
    except Exception as error:
        raise TrpoLMError(
            f"the dataset cannot be read: {type(error).__name__}: {error}", where=where,
            hint="give a .jsonl, .csv, .parquet or .txt file, or the id of a dataset on the hub",
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
    prompts: Prompts, tokenizer: Any, *, room: int | None, truncate: str
) -> tuple[Prompts, int]:
    """Encode every prompt once, so that a bad row is an error before anything is generated.

    Args:
        prompts: From `load_prompts`.
        tokenizer: The policy's.
        room: Most tokens of a prompt: the context minus the completion; None without a limit.
        truncate: 'error', or 'left' to drop the beginning of prompts that are too long.

    Returns:
        The prompts, truncated where needed, and the number of truncated ones.

    Raises:
        TrpoLMError: If a row is empty, not text or too long; names the row.
    """
    texts, truncated = list(prompts.prompts), 0
    for i, prompt in enumerate(prompts.prompts):
        try:
            ids = encode_prompt(tokenizer, prompt)
        except TrpoLMError as error:
            raise TrpoLMError(error.what, where=f"prompt in row {i}", hint=error.hint) from error
        if room is None or len(ids) <= room:
            continue
        if truncate == "error" or not isinstance(prompt, str):
            raise TrpoLMError(
                f"the prompt has {len(ids)} tokens and only {room} fit before the completion",
                where=f"prompt in row {i}",
                hint="shorten it, or lower max_completion_length"
                + ", or set truncate_prompts='left'" * isinstance(prompt, str),
            )
        texts[i], truncated = _drop_beginning(tokenizer, prompt, ids, room), truncated + 1
    return Prompts(texts, prompts.columns), truncated


def _drop_beginning(tokenizer: Any, prompt: str, ids: list[int], room: int) -> str:
    """Return the longest tail of the prompt that fits, as text, which rewards need."""
    drop = len(ids) - room
    while True:
        plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(plain[drop:], skip_special_tokens=True)
        if len(encode_prompt(tokenizer, text)) <= room:
            return text
        drop += 1


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt, with the beginning-of-text token if its tokenizer adds one.

    Raises:
        TrpoLMError: If the prompt is neither text nor messages, or has no token at all.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    elif isinstance(prompt, list):
        if not getattr(tokenizer, "chat_template", None):
            raise TrpoLMError(
                "the prompt is a conversation and the tokenizer has no chat template",
                hint="set tokenizer.chat_template, or give prompts as plain text",
            )
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        raise TrpoLMError(f"a prompt must be text or messages, not {type(prompt).__name__}")
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise TrpoLMError(
            "the prompt is empty and the tokenizer has no bos token",
            hint="remove the row, or give it at least one token",
        )
    return ids
