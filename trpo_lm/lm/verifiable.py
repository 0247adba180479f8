"""Rewards that check an answer: numbers, mathematics, format, length.

Plain functions with TRL's signature, and functions that return one. They take completions as text
or as messages, and the dataset's column `answer`. Where the answer itself cannot be read they
return None: the row has no score.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from trpo_lm.errors import TrpoLMError

_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?"  # a sign, not the minus of 10-7
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3})?(?!\d)"
)
_SECONDS = 5  # for one comparison of formulas, in the main thread of a process


def completion_text(completion: Any) -> str:
    """Return the text of a completion: of text itself, of messages their contents."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def exact_number(
    completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Return 1 where the last number of a completion is that of the answer, else 0.

    Args:
        completions: (N,) texts or messages.
        answer: (N,) numbers, or texts whose last number counts ("... #### 1,250" as in GSM8K).
        columns: Ignored.

    Returns:
        (N,) 1.0, 0.0, or None where the answer has no number. 42, 42.0, +42 and 4.2e1 are equal,
        and commas between thousands are read over.
    """
    pairs = zip(completions, answer, strict=True)
    numbers = [(last_number(completion_text(c)), last_number(str(a))) for c, a in pairs]
    return [None if wanted is None else float(found == wanted) for found, wanted in numbers]


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, or None."""
    found = [match[0] for match in _NUMBER.finditer(text)]
    return Decimal(found[-1].replace(",", "")) if found else None


def math_equal(
    completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    r"""Return 1 where a completion is mathematically equal to the answer, else 0.

    LaTeX (\boxed first), plain expressions, sets, intervals and equations are read and compared by
    `math-verify`. A comparison that takes longer than 5 s counts as unequal; outside the main
    thread of a process there is no limit.

    Args:
        completions: (N,) texts or messages.
        answer: (N,) expressions.
        columns: Ignored.

    Returns:
        (N,) 1.0, 0.0, or None where the answer cannot be read.

    Raises:
        TrpoLMError: If `math-verify` is not installed.
    """
    try:
        from math_verify import parse, verify  # type: ignore[import-not-found]
    except ImportError as error:
        raise TrpoLMError(
            "math_equal needs the package math-verify", where="reward 'math_equal'",
            hint="pip install 'trpo_lm[math]', from a clone pip install -e '.[math]'",
        ) from error  # fmt: skip
    main = threading.current_thread() is threading.main_thread()
    seconds = _SECONDS if main else None  # its limit is an alarm, which only main threads get
    scores: list[float | None] = []
    for completion, wanted in zip(completions, answer, strict=True):
        gold = parse(str(wanted), parsing_timeout=seconds) or parse(
            f"${wanted}$", parsing_timeout=seconds
        )
        found = parse(completion_text(completion), parsing_timeout=seconds)
        scores.append(float(verify(gold, found, timeout_seconds=seconds)) if gold else None)
    return scores


def has_format(pattern: str) -> Callable[..., list[float]]:
    r"""Return a reward: 1 where the whole completion has a format, else 0.

    Args:
        pattern: Regular expression, of which `.` also stands for line ends and the rest is Python's
            `re`, e.g. r"<think>.*</think>\s*\d+".

    Raises:
        TrpoLMError: If the pattern is not one.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise TrpoLMError(f"{pattern!r} is no regular expression: {error}") from error
    return functools.partial(_format, pattern=compiled)


def _format(completions: Sequence[Any], pattern: re.Pattern[str], **columns: Any) -> list[float]:
    return [float(pattern.fullmatch(completion_text(c)) is not None) for c in completions]


def within_length(most: int, *, margin: int = 0) -> Callable[..., list[float]]:
    """Return a reward: 0 up to a length, -1 above, falling linearly over a margin below it.

    Args:
        most: Longest completion without the full penalty, tokens.
        margin: Tokens before `most` in which the penalty grows from 0 to -1 (the soft overlong
            punishment of DAPO, arXiv 2503.14476).

    Raises:
        TrpoLMError: If they are negative, or the margin is longer than `most`.
    """
    if most < 1 or not 0 <= margin <= most:
        raise TrpoLMError(f"most = {most} and margin = {margin} must be 0 <= margin <= most")
    return functools.partial(_length, most=most, margin=margin)


def _length(
    completion_ids: Sequence[Sequence[int]], most: int, margin: int, **columns: Any
) -> list[float]:
    over = [len(ids) - (most - margin) for ids in completion_ids]
    return [-min(1.0, max(0.0, x / margin if margin else float(x > 0))) for x in over]


_format.__name__, _length.__name__ = "has_format", "within_length"  # names of their columns
