"""Rewards that check an answer, on texts and on messages."""

import functools
import pickle
import sys
import threading

import pytest

import trpo_lm
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.rewards import Rewards
from trpo_lm.lm.verifiable import (
    exact_number,
    has_format,
    last_number,
    math_equal,
    within_length,
)


def both(reward, texts, **columns):
    """Score texts, and the same as messages, which must not differ."""
    found = reward(completions=texts, **columns)
    talks = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(completions=talks, prompts=[""] * len(texts), **columns) == found
    return found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 42.", 42), ("42", 42), ("-7 or +8", 8), ("x = -7", -7), ("10-7", 7),
        ("1,250 dollars", 1250), ("1e9999", 9999),
        ("1,250,000.50", 1250000.5), ("3, 4, 5", 5), ("12,34", 34), (".5", 0.5), ("0.50", 0.5),
        ("2e3", 2000), ("1.5E-2", 0.015), ("no number", None), ("", None), ("...", None),
        ("so #### 18\n", 18), ("$ 18 . ", 18), ("1.2.3", 0.3), ("٣", 3),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    found = last_number(text)
    assert found is None if number is None else float(found) == number


def test_exact_number():
    texts = ["it is 42", "42.0", "4.2e1!", "41", "nothing", "1,042"]
    assert both(exact_number, texts, answer=["6*7 #### 42"] * 5 + [1042]) == [1, 1, 1, 0, 0, 1]
    assert both(exact_number, ["1"], answer=["unknown"]) == [None]
    assert both(exact_number, ["0.1"], answer=[0.1]) == [1.0]


def test_math_equal():
    pytest.importorskip("math_verify")
    texts = [r"so \boxed{\frac{1}{2}}", "$0.5$", "2", r"$x^2+2x+1$", "I do not know"]
    answers = [r"\frac{1}{2}", "1/2", "$1/2$", "(x+1)^2", "3"]
    assert both(math_equal, texts, answer=answers) == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert math_equal(["1"], [""]) == [None]
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(math_equal(texts, answers)))
    thread.start()
    thread.join(60)
    assert elsewhere == [[1.0, 1.0, 0.0, 1.0, 0.0]]


def test_math_equal_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(TrpoLMError, match=r"needs the package math-verify(.|\n)*trpo_lm\[math\]"):
        math_equal(["1"], ["1"])


def test_format_and_length():
    reward = has_format(r"<think>.*</think>\s*\d+")
    assert both(reward, ["<think>a\nb</think> 7", "a <think></think>7", "7", ""]) == [1, 0, 0, 0]
    with pytest.raises(TrpoLMError, match="is no regular expression"):
        has_format("(")
    ids = [[1] * n for n in (0, 2, 3, 4, 5, 9)]
    assert within_length(4, margin=2)(completion_ids=ids) == [0, 0, -0.5, -1, -1, -1]
    assert within_length(4)(completion_ids=ids) == [0, 0, 0, 0, -1, -1]
    for most, margin in ((0, 0), (3, 4), (3, -1)):
        with pytest.raises(TrpoLMError, match="must be 0 <= margin <= most"):
            within_length(most, margin=margin)


def test_they_are_public_and_can_be_sent_to_workers():
    functions = [exact_number, math_equal, has_format("a"), within_length(3)]
    names = ["exact_number", "math_equal", "has_format", "within_length"]
    assert Rewards(functions).names == names
    assert all(hasattr(trpo_lm, name) for name in names)
    for function in functions:
        copied = pickle.loads(pickle.dumps(function))
        assert isinstance(copied, functools.partial) or copied is function
