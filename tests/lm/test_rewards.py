"""Reward functions and reward models. Case ids (R01, T14, ...) name what each test holds."""

import asyncio
import functools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from worker_rewards import (
    Flaky,
    chat_in_worker,
    chunks_only,
    hang,
    hangs_on_w8,
    own_pid,
    slow,
    worker_exits,
    worker_kit,
    worker_raises,
)

from trpo_lm.errors import Interrupted, RunFault, TrpoLMError
from trpo_lm.lm.rewards import KEYWORDS, Rewards, load_reward, scores_prefixes

PROMPTS = ["w1 w2", "w3", "w1 w2", "w4 w5 w6"]
COMPLETIONS = [" w7", " w8 w9", " w9 w9 w9", ""]
IDS = [[7], [8, 9], [9, 9, 9], [0]]


def score(functions, columns=None, prompts=PROMPTS, completions=COMPLETIONS, ids=IDS, **options):
    with Rewards(functions, **options) as rewards:
        return rewards(prompts, completions, ids, columns or {})


def length(completions):
    return [float(len(c.split())) for c in completions]


def constant(value):
    return lambda completions: [value] * len(completions)


# ---- what a function may return ----


@pytest.mark.parametrize(
    "result, message",
    [
        ([1.0, 2.0, 3.0], "reward 'f' returned 3 rewards for 4 completions"),
        ([1.0], "reward 'f' returned 1 rewards for 4 completions"),
        (torch.zeros(4, 2), r"reward 'f' returned an array of shape \(4, 2\) for 4 completions"),
        (np.zeros((4, 1)), r"shape \(4, 1\) for 4 completions"),
        (torch.tensor(1.0), r"shape \(\) for 4 completions"),
        (1.0, "reward 'f' returned float for 4 completions"),
        (None, "reward 'f' returned NoneType"),
        ("good", "reward 'f' returned str"),
        ([1.0, 2.0, "True", 4.0], "returned 'True', which is not a number, for sample 2"),
        ([1.0, [2.0, "x"], 1.0, 1.0], r"which is not a number, for sample 1 \(prompt 'w3'\)"),
    ],
)
def test_R01_wrong_shapes_and_types_are_errors_that_name_the_function(result, message):
    def f(completions):
        return result

    with pytest.raises(RunFault, match=message):
        score(f)


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_R02_infinite_reward_names_function_sample_and_prompt(bad):
    def f(completions):
        return [0.0, 0.0, bad, 0.0]

    with pytest.raises(
        RunFault, match=rf"reward 'f' returned {bad} for sample 2 \(prompt 'w1 w2'\)"
    ):
        score(f)
    with pytest.raises(
        RunFault, match=r"returned inf for sample 0 .prompt 'wwwwwwwwwwwwwwwwwwww.*…'"
    ):
        score(constant(math.inf), prompts=["w" * 100], completions=["x"], ids=[[1]])


def test_R03_nan_is_an_error_and_skip_drops_and_counts_the_row():
    def f(completions):
        return [1.0, math.nan, 2.0, [math.inf]]

    with pytest.raises(RunFault, match="returned nan for sample 1"):
        score(f)
    batch = score([f, length], on_bad_reward="skip")
    assert batch.valid.tolist() == [True, False, True, False]
    assert batch.score.isnan().tolist() == [False, True, False, True]
    assert batch.terminal.tolist() == [2.0, 0.0, 5.0, 0.0]
    assert batch.columns == {"f": [1.0, None, 2.0, None], "length": [1.0, 2.0, 3.0, 0.0]}
    assert batch.logged == {"rewards/skipped": 2.0}


def test_R04_none_abstains_for_its_row_only():
    def sometimes(completions):
        return [None, 1.0, None, 4.0]

    batch = score([sometimes, length], reward_weights=[10.0, 1.0])
    assert batch.score.tolist() == [1.0, 12.0, 3.0, 40.0]
    assert batch.columns["sometimes"] == [None, 1.0, None, 4.0]
    alone = score(sometimes)
    assert alone.valid.tolist() == [False, True, False, True]
    nobody = score(constant(None))
    assert not nobody.valid.any() and nobody.score.isnan().all() and not nobody.terminal.any()
    # A function without weight has no say in whether a row has a score.
    assert not score([constant(None), length], reward_weights=[1, 0]).valid.any()


def test_R06_exception_names_the_function_and_is_chained():
    def f(completions):
        raise KeyError("lost")

    with pytest.raises(
        RunFault, match=r"reward 'f' raised KeyError: 'lost'.*4 samples.*'w1 w2'"
    ) as info:
        score(f)
    assert isinstance(info.value.__cause__, KeyError)

    async def g(completions):
        raise OSError("no server")

    with pytest.raises(RunFault, match="reward 'g' raised OSError: no server"):
        score(g)


def test_a_signal_or_our_own_error_passes_through_unchanged():
    async def stopped(completions):
        raise Interrupted("saved", signum=2)

    with pytest.raises(Interrupted):
        score(stopped)

    def mistaken(completions):
        raise TrpoLMError("no such file")

    with pytest.raises(TrpoLMError, match=r"^no such file$"):
        score(mistaken)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), MemoryError()])
def test_B58_memory_that_is_full_in_a_reward_is_no_fault_of_its_own(error):
    def full(completions):
        raise error

    with pytest.raises(type(error)):
        score(full)


def test_numbers_arrays_and_tensors_are_summed_in_float64():
    class Half:
        def __call__(self, completions, **_):
            return torch.tensor([0.5] * len(completions), dtype=torch.bfloat16)

    functions = [
        Half(),
        lambda completions: np.arange(4),
        lambda completions: tuple(c == "" for c in completions),
        lambda completions: [torch.tensor(1.0), np.float32(1), np.bool_(True), 1],
    ]
    batch = score(functions)
    assert batch.score.dtype == batch.terminal.dtype == torch.float64
    assert batch.score.tolist() == [1.5, 2.5, 3.5, 5.5]
    assert batch.token_rewards is None


def test_R13_large_offsets_keep_their_differences():
    batch = score(lambda completions: [1e9 + 1e-3 * i for i in range(4)])
    torch.testing.assert_close(
        batch.score.diff(), torch.full((3,), 1e-3).double(), rtol=1e-3, atol=0
    )


def test_token_level_lists_are_paid_where_they_stand():
    def per_token(completion_ids):
        return [[float(i) for i in ids] for ids in completion_ids]

    def some_rows(completions):
        return [1.0, torch.tensor([1.0, -1.0]), None, np.array([5.0])]

    batch = score([per_token, some_rows, length], reward_weights=[1.0, 2.0, 3.0])
    assert batch.token_rewards == [[7.0], [10.0, 7.0], [9.0, 9.0, 9.0], [10.0]]
    assert batch.terminal.tolist() == [5.0, 6.0, 9.0, 0.0]
    whole = batch.terminal + torch.tensor([sum(row) for row in batch.token_rewards])
    assert batch.score.tolist() == whole.tolist()
    assert batch.columns["per_token"] == [7.0, 17.0, 27.0, 0.0]

    def short(completion_ids):
        return [[1.0] for _ in completion_ids]

    with pytest.raises(RunFault, match="returned 1 rewards for 2 tokens for sample 1"):
        score(short)


def test_no_samples_no_calls():
    def f(completions):
        raise AssertionError("called with nothing")

    batch = score(f, prompts=[], completions=[], ids=[])
    assert batch.score.shape == batch.valid.shape == (0,)


# ---- what a function may look like ----


def test_R08_a_function_gets_what_its_signature_names():
    seen = {}

    def everything(**kwargs):
        seen.update(kwargs)
        return [0.0] * 4

    def with_column(completions, answer, unused=7):
        assert unused == 7
        return [float(c.strip() == a) for c, a in zip(completions, answer, strict=True)]

    batch = score([length, everything, with_column], {"answer": ["w7", "w7", "", ""]})
    assert batch.columns["with_column"] == [1.0, 0.0, 0.0, 1.0]
    assert set(seen) == {*KEYWORDS, "answer"}


@pytest.mark.parametrize(
    "wrong", [lambda x: x, lambda c, /: c, lambda *a: a, lambda answer: answer]
)
def test_R08_a_function_that_cannot_take_completions_is_refused(wrong):
    with pytest.raises(TrpoLMError, match="needs `completions` or `completion_ids`") as info:
        Rewards(wrong)
    assert all(keyword in str(info.value) for keyword in KEYWORDS) and "columns" in str(info.value)


def test_R08_not_callable_empty_and_unknown_requirements():
    with pytest.raises(TrpoLMError, match="3 is not callable"):
        Rewards([length, 3])
    with pytest.raises(TrpoLMError, match="reward_funcs is empty"):
        Rewards([])
    with pytest.raises(TrpoLMError, match="on_bad_reward"):
        Rewards(length, on_bad_reward="ignore")

    def needs(completions, answer):
        raise AssertionError("called")

    rewards = Rewards(needs)
    rewards.check_columns(["answer", "source"])
    message = r"reward 'needs' requires answer, which is not a column of the dataset \(source\)"
    with pytest.raises(TrpoLMError, match=message) as info:
        rewards.check_columns(["source"])
    assert "log_metric" in str(info.value)
    with pytest.raises(TrpoLMError, match="it has none"):
        rewards(PROMPTS, COMPLETIONS, IDS, {})


class Judge:
    def __init__(self, bonus):
        self.bonus = bonus

    def __call__(self, completions, **kwargs):
        return [self.bonus] * len(completions)


def meeting(count):
    """Return an async function that answers once `count` calls of it are under way at once."""
    waiting = []

    async def meet(completions):
        waiting.append(asyncio.get_running_loop().create_future())
        if len(waiting) == count:
            for future in waiting:
                future.set_result(None)
        await asyncio.wait_for(waiting[-1], 60)
        return length(completions)

    return meet


def test_R09_all_kinds_of_callables_with_distinct_names():
    def f(completions, bonus):
        return [bonus] * len(completions)

    functions = [
        length,
        lambda completions: [1.0] * len(completions),
        functools.partial(f, bonus=2.0),
        functools.partial(f, bonus=3.0),
        Judge(4.0),
        Judge(5.0),
        meet := meeting(3),
        meet,
        functools.partial(meet),
    ]
    batch = score(functions)
    names = ["length", "reward_1", "f", "f_1", "Judge", "Judge_1", "meet", "meet_1", "meet_2"]
    assert list(batch.columns) == names
    assert [batch.columns[n][0] for n in names] == [1, 1, 2, 3, 4, 5, 1, 1, 1]


def test_R09_async_functions_work_inside_a_running_loop():
    async def notebook():
        return score(slow)

    assert asyncio.run(notebook()).score.tolist() == [1.0, 2.0, 3.0, 0.0]


def test_log_metric_and_trainer_state():
    def f(completions, log_metric, trainer_state):
        for c in completions:
            log_metric("words", len(c.split()))
        return [trainer_state.step] * 4

    class State:
        step = 3.0

    batch = Rewards(f)(PROMPTS, COMPLETIONS, IDS, {}, State())
    assert batch.score.tolist() == [3.0] * 4
    assert batch.logged == {"words": 1.5}


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [0.0, 0.0], [1.0, "2"]]
)
def test_R11_bad_weights_are_refused(weights):
    with pytest.raises(TrpoLMError, match=r"reward_weights = .* must be 2 finite numbers"):
        Rewards([length, slow], weights)


# ---- time limits ----


def living(group):
    """Processes of a group that are more than an unreaped entry in the table."""
    processes = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = entry.read_text().rpartition(")")[2].split()[:3]
            processes += [entry] if int(its_group) == group and state != "Z" else []
    return processes


def test_R07_a_function_that_cannot_be_sent_is_refused_at_construction():
    with pytest.raises(TrpoLMError, match=r"reward 'reward_1' cannot be sent(.|\n)*top level"):
        Rewards([length, lambda completions: [0.0]], timeout=5)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_R07_a_function_that_always_hangs_ends_the_run_and_nothing_stays():
    with Rewards(hang, timeout=1) as rewards:
        workers = [w.process.pid for pool in rewards._workers.values() for w in pool.idle]
        with pytest.raises(RunFault, match=r"'hang' took more than 1 s .* each of 3 completions"):
            rewards(PROMPTS, COMPLETIONS, IDS, {})
        assert multiprocessing.active_children() == []
        assert not any(living(pid) for pid in workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_R07_a_sample_that_hangs_abstains_and_is_counted(workers):
    with Rewards(hangs_on_w8, timeout=1, workers=workers) as rewards:
        first = [w.process.pid for w in rewards._workers[0].idle]
        for _ in range(2):
            batch = rewards(PROMPTS, COMPLETIONS, IDS, {"answer": [1, 2, 3, 4]})
            assert batch.valid.tolist() == [True, False, True, True]
            assert batch.columns["hangs_on_w8"] == [4.0, None, 12.0, 4.0]
            assert batch.logged == {"rewards/timed_out": 1.0}
        assert sum(not living(pid) for pid in first) >= 1
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_several_workers_share_the_completions():
    with Rewards(own_pid, timeout=60, workers=3) as rewards:
        batch = rewards(PROMPTS, COMPLETIONS, IDS, {})
        assert len(set(batch.columns["own_pid"])) == 2  # 4 completions, 2 each
        assert batch.logged["calls"] == 2.0
    with pytest.raises(RunFault, match=r"returned \[1.0\] for 2 completions"):
        score(chunks_only, timeout=60, workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_a_function_that_fails_now_and_then_is_tried_again(tmp_path, dies):
    for failures, retries in ((2, 2), (2, 1)):
        flaky = Flaky(tmp_path / f"{retries}", failures, dies)
        with Rewards(flaky, timeout=60, retries=retries) as rewards:
            if retries < failures:
                with pytest.raises(RunFault, match="exit code 7" if dies else "ZeroDivisionError"):
                    rewards(PROMPTS, COMPLETIONS, IDS, {})
            else:
                assert rewards(PROMPTS, COMPLETIONS, IDS, {}).valid.all()


@pytest.mark.slow
def test_B38_messages_reach_functions_in_workers():
    talk = [{"role": "user", "content": "hi"}]
    batch = score(chat_in_worker, prompts=[talk] * 4, timeout=60, workers=2)
    assert batch.score.tolist() == [float(len(c)) for c in COMPLETIONS]


@pytest.mark.slow
@pytest.mark.parametrize("work", ["hang", "nap"])
def test_B57_a_worker_and_all_it_started_die_with_a_parent_that_is_killed(work):
    """Whether the worker computes or sleeps, and holds the interpreter or not."""
    code = (
        "import sys; sys.path[:0] = ['tests']\n"
        "import worker_rewards as w\n"
        "from trpo_lm.lm.reward_workers import Pool\n"
        f"pool = Pool(w.{work}, 'f', count=1, seconds=600, retries=0)\n"
        "print(pool.idle[0].process.pid, flush=True)\n"
        "pool.run({'completions': ['a']}, 1)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    try:
        until(lambda: len(living(worker)) >= 2)  # it has started a process of its own
        parent.kill()
        until(lambda: not living(worker))
    finally:
        parent.kill()
        parent.wait()
        with suppress(ProcessLookupError):
            os.killpg(worker, signal.SIGKILL)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_truncated_completions_are_masked_or_penalised_and_counted():
    cut = [True, False, False, True]

    def both(completions):
        return [[1.0], [0.5, 0.5], 2.0, 4.0]

    for options, valid, scores in (
        ({}, [True] * 4, [1.0, 1.0, 2.0, 4.0]),
        ({"truncated_penalty": 3.0}, [True] * 4, [-2.0, 1.0, 2.0, 1.0]),
        ({"mask_truncated": True}, [False, True, True, False], [1.0, 2.0]),
    ):
        batch = Rewards(both, **options)(PROMPTS, COMPLETIONS, IDS, {}, truncated=cut)
        assert batch.valid.tolist() == valid and batch.score[batch.valid].tolist() == scores
        paid = batch.terminal + torch.tensor([sum(row) for row in batch.token_rewards])
        assert paid.tolist() == batch.score.nan_to_num(0.0).tolist()
        assert batch.logged == ({"rewards/truncated": 2.0} if options else {})


@pytest.mark.slow
def test_R07_functions_in_workers_give_the_same_and_say_the_same():
    answer = {"answer": [1, 2, 3, 4]}
    with Rewards([worker_kit, slow], timeout=60) as rewards:
        for _ in range(2):
            batch = rewards(PROMPTS, COMPLETIONS, IDS, answer)
            assert batch.columns["worker_kit"] == [2.0, 3.0, 4.0, 5.0]
            assert batch.columns["slow"] == [1.0, 2.0, 3.0, 0.0]
            assert batch.logged["pid"] != os.getpid()
    for function, message in {
        worker_raises: "reward 'worker_raises' raised KeyError: 'lost'",
        worker_exits: r"reward 'worker_exits' lost its worker process \(exit code 7\)",
    }.items():
        with Rewards(function, timeout=60) as rewards:
            with pytest.raises(RunFault, match=message) as info:
                rewards(PROMPTS, COMPLETIONS, IDS, {})
            if function is worker_raises:
                assert "worker_raises" in str(info.value.__cause__.__cause__)  # its traceback
    assert multiprocessing.active_children() == []


# ---- unfinished text ----


@scores_prefixes
def words_so_far(completions, prompts, offset):
    return [len(c.split()) + o for c, o in zip(completions, offset, strict=True)]


def test_functions_score_prefixes_when_their_author_says_so():
    assert not Rewards([length, words_so_far]).can_score_prefixes
    assert Rewards([length, words_so_far], [0, 2]).can_score_prefixes
    assert Rewards(functools.partial(words_so_far)).can_score_prefixes
    rewards = Rewards([length, words_so_far], [0, 2])
    prefixes = [["", " a", " a b"], [], [""]]
    scores = rewards.score_prefixes(["p"] * 3, [" a b", "", ""], prefixes, {"offset": [0, 1, 2]})
    assert scores == [[0.0, 2.0, 4.0], [], [4.0]]

    @scores_prefixes
    def per_token(completions):
        return [[1.0] for _ in completions]

    with pytest.raises(RunFault, match="returned 1 rewards for an unfinished text"):
        Rewards(per_token).score_prefixes(["p"], ["a"], [[""]])

    @scores_prefixes
    def chatty(completions):
        return [None if c[0]["content"] == "" else 1.0 for c in completions]

    talk = [{"role": "user", "content": "hi"}]
    scores = Rewards(chatty).score_prefixes(
        [talk], [[{"role": "assistant", "content": "a"}]], [["", "a"]]
    )
    assert scores == [[0.0, 1.0]]


# ---- rewards by name ----


@pytest.mark.parametrize("target", ["os:system", "/etc/passwd", "../../x"])
def test_S08_a_string_is_only_ever_a_model(target, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TrpoLMError, match="reward model"):
        Rewards(target)


def write_module(folder, monkeypatch, text):
    name = f"rewards_of_{folder.name}".replace("-", "_")
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    return name


def test_S08_module_and_callable_name_a_function_to_import(tmp_path, monkeypatch):
    text = "def happy(completions):\n    return [float(len(c)) for c in completions]\nx = 3\n"
    name = write_module(tmp_path, monkeypatch, text)
    function = load_reward(f"{name}:happy")
    assert score(function).columns["happy"] == [float(len(c)) for c in COMPLETIONS]
    for wrong, message in {
        "os:system": "'os:system' takes \\(command\\)",
        f"{name}:x": "is not callable",
        f"{name}:sad": "cannot be imported: AttributeError",
        "no_such_module:f": "cannot be imported: ModuleNotFoundError",
        f"{tmp_path}/{name}.py": "not of the form module:callable",
        f"{tmp_path}/{name}.py:happy": "not of the form module:callable",
        "..x:f": "not of the form", name: "not of the form", "": "not of the form",
        f"{name}:happy()": "not of the form",
    }.items():  # fmt: skip
        with pytest.raises(TrpoLMError, match=message):
            load_reward(wrong)


# ---- arguments and results


def test_B12_a_function_that_changes_its_arguments_changes_nothing_else():
    talk = [{"role": "user", "content": "hi"}]
    prompts, ids = [talk, talk], [[7], [8, 9]]
    columns = {
        "tests": [["a"], ["b"]],
        "facts": [{"x": [1]}, {"x": [2]}],
        "array": [np.ones(2)] * 2,
    }
    before = json.dumps([prompts, ids, columns], default=np.ndarray.tolist)

    def vandal(prompts, completions, completion_ids, tests, facts, array):
        assert prompts == [talk, talk] and prompts[0] is not prompts[1]
        for p, c, i, t, f, a in zip(
            prompts, completions, completion_ids, tests, facts, array, strict=True
        ):
            p.pop(), c.clear(), i.append(3), t.append("z"), f["x"].clear(), a.fill(0)
        prompts.clear()
        return [0.0, 0.0]

    def reads(completions, tests):
        assert tests == [["a"], ["b"]]
        return [float(len(c[0]["content"])) for c in completions]

    batch = score([vandal, reads], columns, prompts, [" w7", " w8 w9"], ids)
    assert batch.columns["reads"] == [3.0, 6.0]
    assert json.dumps([prompts, ids, columns], default=np.ndarray.tolist) == before


NUMBERS = [Decimal("0.5"), Fraction(1, 2), np.float16(0.5), torch.tensor(0.5), np.array(0.5), 0.5]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: type(n).__name__)
def test_B63_numbers_of_every_kind_are_rewards(number):
    assert score(constant(number)).score.tolist() == [0.5] * 4
    batch = score(lambda completion_ids: [[number] * len(ids) for ids in completion_ids])
    assert batch.score.tolist() == [0.5, 1.0, 1.5, 0.5]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(4, device="meta"), "reward 'f' raised"),
        ([1j] * 4, "which is not a number, for sample 0"),
        ([[[1.0]]] * 4, "which is not a number, for sample 0"),
        ([torch.zeros(2, 2)] * 4, "for sample 0"),
    ],
)
def test_B63_what_is_no_number_is_refused_with_its_sample(result, message):
    def f(completions):
        return result

    with pytest.raises(RunFault, match=message):
        score(f)
    sparse = torch.tensor([0.0, 1.0, 0.0, 2.0]).to_sparse()
    assert score(lambda completions: sparse).score.tolist() == [0.0, 1.0, 0.0, 2.0]


@pytest.mark.parametrize(
    "value", [1e308, -1e16, 10**400, Decimal("1e200"), [1e15]], ids=lambda v: type(v).__name__
)
def test_B56_finite_means_finite_through_gradients_and_squares(value):
    def f(completions):
        return [0.0, value if not isinstance(value, list) else value * 2, 0.0, 0.0]

    with pytest.raises(RunFault, match=r"reward 'f' returned .* for sample 1 \(prompt 'w3'\)"):
        score(f)
    with pytest.raises(RunFault, match=r"reward 'g' returned 100000000.0, beyond 1e\+07, for s"):

        def g(completions):  # fmt: skip
            return [1e8] * 4

        score(g, reward_weights=[1e8])
    big = score(lambda completions: [1e14, 9e14, 0.0, 0.0]).score.float()
    assert math.isfinite(big.sum()) and math.isfinite(big.square().sum())


def test_B15_columns_that_reach_nothing_are_known():
    def named(completions, answer):
        return [0.0] * 4

    def anything(completions, **kwargs):
        return [0.0] * 4

    names = ["answer", "images", "completions", "tools"]
    assert [Rewards(named).reads(n) for n in names] == [True, False, False, False]
    assert [Rewards([named, anything]).reads(n) for n in names] == [True, True, False, True]
