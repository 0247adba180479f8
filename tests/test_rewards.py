"""Reward functions and reward models. Case ids (R01, T14, ...) name what each test holds."""

import asyncio
import functools
import math
import multiprocessing
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trpo_lm.errors import Interrupted, RunFault, TrpoLMError
from trpo_lm.rewards import KEYWORDS, RewardModel, Rewards, scores_prefixes

PROMPTS = ["w1 w2", "w3", "w1 w2", "w4 w5 w6"]
COMPLETIONS = [" w7", " w8 w9", " w9 w9 w9", ""]
IDS = [[7], [8, 9], [9, 9, 9], [0]]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}"
    "{{ ' ' + eos_token }}"
)


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

    def full(completions):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
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
    with pytest.raises(TrpoLMError, match="cannot be given `completions`") as info:
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
    message = r"reward 'needs' requires answer, which is no column of the dataset \(source\)"
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


async def slow(completions):
    await asyncio.sleep(0.1)
    return length(completions)


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
        slow,
        slow,
        functools.partial(slow),
    ]
    start = time.perf_counter()
    batch = score(functions)
    assert time.perf_counter() - start < 0.25  # three waits of 0.1 s, at once
    names = ["length", "reward_1", "f", "f_1", "Judge", "Judge_1", "slow", "slow_1", "slow_2"]
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


def hang(completions):
    os.system("sleep 600 &")  # what a function leaves behind is killed with it
    while True:
        pass


def worker_kit(completions, log_metric, answer):
    log_metric("pid", os.getpid())
    return torch.tensor([float(a) for a in answer]) + 1


def worker_raises(completions):
    raise KeyError("lost")


def worker_exits(completions):
    os._exit(7)


def living(group):
    """Processes of a group that are more than an unreaped entry in the table."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = entry.read_text().rpartition(")")[2].split()[:3]
            found += [entry] if int(its_group) == group and state != "Z" else []
    return found


def test_R07_a_function_that_cannot_be_sent_is_refused_at_construction():
    with pytest.raises(TrpoLMError, match=r"reward 'reward_1' cannot be sent(.|\n)*top level"):
        Rewards([length, lambda completions: [0.0]], timeout=5)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_R07_a_function_that_hangs_is_killed_and_nothing_stays():
    with Rewards([hang, slow], timeout=2) as rewards:
        workers = [worker.process.pid for worker in rewards._workers.values()]
        for worker in rewards._workers.values():
            worker.pipe.poll(60)  # both have imported torch
        start = time.perf_counter()
        with pytest.raises(RunFault, match="reward 'hang' took more than 2 s and was stopped"):
            rewards(PROMPTS, COMPLETIONS, IDS, {})
        assert 2 <= time.perf_counter() - start < 5
        assert multiprocessing.active_children() == []
        assert not any(living(pid) for pid in workers)


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
    found = rewards.score_prefixes(["p"] * 3, [" a b", "", ""], prefixes, {"offset": [0, 1, 2]})
    assert found == [[0.0, 2.0, 4.0], [], [4.0]]

    @scores_prefixes
    def per_token(completions):
        return [[1.0] for _ in completions]

    with pytest.raises(RunFault, match="returned 1 rewards for an unfinished text"):
        Rewards(per_token).score_prefixes(["p"], ["a"], [[""]])

    @scores_prefixes
    def chatty(completions):
        return [None if c[0]["content"] == "" else 1.0 for c in completions]

    talk = [{"role": "user", "content": "hi"}]
    found = Rewards(chatty).score_prefixes(
        [talk], [[{"role": "assistant", "content": "a"}]], [["", "a"]]
    )
    assert found == [[0.0, 1.0]]


# ---- reward models ----


def make_tokenizer(bos="<bos>", eos=None, pad="<pad>", template=None):
    """Words w0..w29 and single letters; adds `bos` in front and `eos` behind where given."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(30))]
    vocabulary = {word: i for i, word in enumerate([*words, *"abcdefghijk"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos or eos:
        single = " ".join(filter(None, [bos, "$A", eos]))
        special = [(word, vocabulary[word]) for word in ("<bos>", "<eos>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=template,
        **({"pad_token": pad} if pad else {}),
    )


def make_model(kind="gpt2", **options):
    torch.manual_seed(0)
    if kind == "bert":
        config = BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=24, initializer_range=0.5, **options,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval()
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=24, initializer_range=0.5, **options,
        )  # fmt: skip
        return LlamaForSequenceClassification(config).eval()
    config = GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=24,
        initializer_range=0.5,
        **options,
    )
    return GPT2ForSequenceClassification(config).eval()


def alone(model, ids):
    """The oracle: one text, no padding, no batch."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def prefixes_of(completions):
    """States of completions whose tokens are " word"."""
    return [[" ".join(c.split(" ")[:t]) for t in range(1, c.count(" ") + 2)] for c in completions]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_reward_model_scores_a_batch_like_one_by_one(kind):
    model, tokenizer = make_model(kind), make_tokenizer()
    reward = RewardModel(model, tokenizer, batch_size=3)
    assert reward.causal == (kind != "bert")
    found = reward(PROMPTS, COMPLETIONS, completion_ids=IDS)
    for p, c, x in zip(PROMPTS, COMPLETIONS, found, strict=True):
        assert x == pytest.approx(
            alone(model, tokenizer(p + c).input_ids).softmax(-1)[1].item(), abs=1e-5
        )
    assert Rewards(reward)(PROMPTS, COMPLETIONS, IDS, {}).score.tolist() == found
    messages = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
    assert reward(PROMPTS, messages) == found
    assert reward([], []) == []


def test_labels_choose_the_output():
    tokenizer = make_tokenizer()

    def outcome(names, label=None, **options):
        model = make_model(id2label=dict(enumerate(names)), **options)
        return RewardModel(model, tokenizer, label=label), alone(
            model, tokenizer("w1 w2 w7").input_ids
        )

    for names, label, index in [
        (["LABEL_0", "LABEL_1"], None, 1),
        (["positive", "negative"], None, 0),
        (["NEGATIVE", "POSITIVE"], "negative", 0),
        (["sad", "angry", "happy"], "happy", 2),
        (["sad", "angry", "happy"], 0, 0),
    ]:
        reward, logits = outcome(names, label)
        assert reward(["w1 w2"], [" w7"]) == pytest.approx(
            [logits.softmax(-1)[index].item()], abs=1e-5
        )
    reward, logits = outcome(["quality"])
    assert reward(["w1 w2"], [" w7"]) == pytest.approx([logits[0].item()], abs=1e-5)
    reward, logits = outcome(["toxic", "rude"], "rude", problem_type="multi_label_classification")
    assert reward(["w1 w2"], [" w7"]) == pytest.approx([logits[1].sigmoid().item()], abs=1e-5)
    with pytest.raises(TrpoLMError, match="labels sad, angry, happy: say which one to reward"):
        outcome(["sad", "angry", "happy"])
    with pytest.raises(TrpoLMError, match="'glad' is none of them"):
        outcome(["sad", "angry", "happy"], "glad")


def test_R15_untrained_head_is_refused(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=24)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(TrpoLMError, match=r"no trained head: its files lack score\.weight") as info:
        Rewards(str(tmp_path / "lm"))
    assert "--allow_untrained_reward_head" in str(info.value)
    rewards = Rewards(str(tmp_path / "lm"), reward_model_options={"allow_untrained_head": True})
    assert rewards.names == ["lm"] and rewards.can_score_prefixes


def test_reward_model_loads_from_a_folder_and_missing_ones_are_named(tmp_path, monkeypatch):
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    rewards = Rewards(
        [str(tmp_path / "rm"), f"{tmp_path}/rm/", model.from_pretrained(tmp_path / "rm")]
    )
    assert rewards.names == ["rm", "rm_1", "rm_2"]
    batch = rewards(PROMPTS, COMPLETIONS, IDS, {})
    expected = RewardModel(model, tokenizer)(PROMPTS, COMPLETIONS)
    assert batch.columns["rm"] == batch.columns["rm_2"] == pytest.approx(expected)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        TrpoLMError, match="'/no/such/model' not found locally and HF_HUB_OFFLINE=1"
    ):
        RewardModel("/no/such/model")


@pytest.mark.parametrize("target", ["os:system", "/etc/passwd", "../../x"])
def test_S08_a_string_is_only_ever_a_model(target, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TrpoLMError, match="reward model"):
        Rewards(target)


def test_missing_pad_token_falls_back_to_eos_without_changing_scores():
    with_pad, without = make_tokenizer(), make_tokenizer(pad=None)
    model = make_model()
    expected = RewardModel(model, with_pad)(PROMPTS, COMPLETIONS)
    other = make_model()
    reward = RewardModel(other, without)
    assert other.config.pad_token_id == reward.pad_id == without.eos_token_id
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    without.eos_token = None
    with pytest.raises(TrpoLMError, match="neither a padding nor an end token"):
        RewardModel(make_model(eos_token_id=None), without)


@pytest.mark.parametrize("bos", ["<bos>", None])
def test_T14_exactly_one_bos(bos, monkeypatch):
    """Whether the tokenizer, the template or the user writes it."""
    model, tokenizer = make_model(), make_tokenizer(bos=bos, template=TEMPLATE)
    reward, seen = RewardModel(model, tokenizer), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda input_ids, **k: seen.append(input_ids) or forward(input_ids, **k)
    )
    talk = [{"role": "user", "content": "w1 w2"}]
    for prompt, completion in [
        (talk, "w3"),
        (talk, [{"role": "assistant", "content": "w3"}]),
        ("<bos> w1 w2", " w3"),
    ]:
        reward([prompt], [completion])
        assert seen.pop().eq(tokenizer.bos_token_id).sum() == 1
    bare = RewardModel(model, make_tokenizer())
    with pytest.raises(TrpoLMError, match="has no chat template"):
        bare([talk], ["w3"])


def test_long_texts_keep_bos_and_the_end():
    model, tokenizer = make_model(), make_tokenizer()
    words = [f"w{i % 30}" for i in range(40)]
    ids = tokenizer(" ".join(words)).input_ids
    expected = alone(model, [ids[0], *ids[-23:]]).softmax(-1)[1].item()
    reward = RewardModel(model, tokenizer)
    assert reward.max_length == 24
    assert reward([" ".join(words[:38])], [" " + " ".join(words[38:])]) == pytest.approx(
        [expected], abs=1e-5
    )


# ---- reward models on prefixes ----

CASES = [" w7 w8 w9 w10", " w8", " w9 w9 w1", ""]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_prefix_scores_equal_scoring_each_prefix(kind):
    reward = RewardModel(make_model(kind), make_tokenizer())
    prefixes = prefixes_of(CASES)
    found = reward.score_prefixes(PROMPTS, CASES, prefixes)
    for p, c, texts, scores in zip(PROMPTS, CASES, prefixes, found, strict=True):
        assert texts[0] == "" and texts[-1] == c
        assert scores == pytest.approx(reward([p] * len(texts), texts), abs=1e-5)
    assert Rewards(reward, [2.0]).score_prefixes(PROMPTS, CASES, prefixes) == [
        [2 * x for x in row] for row in found
    ]


def test_causal_prefixes_take_one_pass_and_encoders_one_for_each_distinct_text(monkeypatch):
    counts = {}
    for kind in ("gpt2", "bert"):
        model = make_model(kind)
        reward, rows = RewardModel(model, make_tokenizer()), []
        forward = model.forward
        monkeypatch.setattr(
            model,
            "forward",
            lambda input_ids, f=forward, n=rows, **k: n.append(len(input_ids)) or f(input_ids, **k),
        )
        reward.score_prefixes(
            ["w1"] * 3, [" w2 w3", " w2 w4", " w2 w3"], prefixes_of([" w2 w3", " w2 w4", " w2 w3"])
        )
        counts[kind] = sum(rows)
    assert counts == {"gpt2": 3, "bert": 4}  # w1; w1 w2; w1 w2 w3; w1 w2 w4


def test_the_whole_text_takes_the_score_with_the_closing_token():
    reward = RewardModel(make_model(), make_tokenizer(eos="<eos>"))
    prefixes = prefixes_of(CASES)
    found = reward.score_prefixes(PROMPTS, CASES, prefixes)
    assert [row[-1] for row in found] == pytest.approx(reward(PROMPTS, CASES), abs=1e-6)
    bare = RewardModel(make_model(), make_tokenizer())
    assert found[0][:-1] == pytest.approx(bare([PROMPTS[0]] * 4, prefixes[0][:-1]), abs=1e-5)
    # Where the closing token is also the padding, the model pools in front of it, and so do we.
    shared = RewardModel(make_model(), make_tokenizer(eos="<eos>", pad=None))
    found = shared.score_prefixes(PROMPTS, CASES, prefixes)
    assert [row[-1] for row in found] == pytest.approx(shared(PROMPTS, CASES), abs=1e-6)


def test_prefixes_of_conversations():
    reward = RewardModel(make_model(), make_tokenizer(template=TEMPLATE))
    assert reward.causal
    talk, completion = [{"role": "user", "content": "w1"}], "w2 w3"
    (found,) = reward.score_prefixes([talk], [completion], [["", "w2", "w2 w3"]])
    states = [
        "<bos> user w1 assistant",
        "<bos> user w1 assistant w2",
        "<bos> user w1 assistant w2 w3 <eos>",
    ]
    assert found == pytest.approx(reward([""] * 3, states), abs=1e-5)


def test_prefixes_that_end_inside_a_token_or_character_do_not_look_ahead():
    reward = RewardModel(make_model(), make_tokenizer())
    prefixes = [["", " w1", " w12", " w12 w\ufffd", " w12 w3"]]
    (found,) = reward.score_prefixes(["w5"], [" w12 w3"], prefixes)
    expected = reward(["w5"] * 5, ["", "", " w12", " w12", " w12 w3"])
    assert found == pytest.approx(expected, abs=1e-5)


def test_prefixes_without_bos_and_beyond_the_context_are_scored_by_themselves():
    reward = RewardModel(make_model(), make_tokenizer(bos=None))
    long = "".join(f" w{i % 30}" for i in range(30))
    prefixes = prefixes_of([" w1 w2", long])
    found = reward.score_prefixes(["", ""], [" w1 w2", long], prefixes)
    for texts, scores in zip(prefixes, found, strict=True):
        assert scores == pytest.approx(reward([""] * len(texts), texts), abs=1e-5)


@pytest.mark.parametrize("stride", [2, 3, 100])
def test_encoder_stride_interpolates_between_scored_prefixes(stride):
    completion = "".join(f" w{i}" for i in range(8))
    prefixes = prefixes_of([completion, " w1", ""])
    every = RewardModel(make_model("bert"), make_tokenizer())
    some = RewardModel(make_model("bert"), make_tokenizer(), prefix_stride=stride)
    arguments = (["w5"] * 3, [completion, " w1", ""], prefixes)
    for full, sparse in zip(
        every.score_prefixes(*arguments), some.score_prefixes(*arguments), strict=True
    ):
        kept = sorted({*range(0, len(full), stride), len(full) - 1})
        expected = np.interp(range(len(full)), kept, [full[t] for t in kept])
        assert sparse == pytest.approx(expected.tolist(), abs=1e-5)


def test_causality_is_found_by_experiment():
    class TwoSided(GPT2ForSequenceClassification):
        """Looks at the whole text, whatever its name says."""

        def forward(self, input_ids, attention_mask=None, **kwargs):
            h = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
            h = h + (h * attention_mask[..., None]).sum(1, keepdim=True)
            logits = self.score(h)
            rows = torch.arange(len(logits))
            return type("Output", (), {"logits": logits[rows, attention_mask.sum(1) - 1]})()

    torch.manual_seed(0)
    model = TwoSided(make_model().config).eval()
    reward = RewardModel(model, make_tokenizer())
    assert not reward.causal
    prefixes = prefixes_of(CASES)
    for p, texts, scores in zip(
        PROMPTS, prefixes, reward.score_prefixes(PROMPTS, CASES, prefixes), strict=True
    ):
        assert scores == pytest.approx(reward([p] * len(texts), texts), abs=1e-5)
    assert not model.score._forward_hooks
