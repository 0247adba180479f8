"""Reward models against scoring one text at a time, and the models they must cope with."""

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
    OPTConfig,
    OPTForSequenceClassification,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.rewards import Rewards

PROMPTS = ["w1 w2", "w3", "w1 w2", "w4 w5 w6"]
COMPLETIONS = [" w7", " w8 w9", " w9 w9 w9", ""]
IDS = [[7], [8, 9], [9, 9, 9], [0]]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}"
    "{{ ' ' + eos_token }}"
)


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
    classes = {
        "bert": (BertConfig, BertForSequenceClassification),
        "llama": (LlamaConfig, LlamaForSequenceClassification),
        "opt": (OPTConfig, OPTForSequenceClassification),
    }
    if kind == "xlnet":  # pools at the last place of a row, padding or not
        sizes = {"vocab_size": 64, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
        return XLNetForSequenceClassification(XLNetConfig(**sizes, **options)).eval()
    if kind in classes:
        make_config, make = classes[kind]
        config = make_config(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=24, initializer_range=0.5, **options,
        )  # fmt: skip
        return make(config).eval()
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
    reward = RewardModel(model, tokenizer, batch_tokens=30)
    assert reward.causal == (kind != "bert")
    scores = reward(PROMPTS, COMPLETIONS, completion_ids=IDS)
    for p, c, x in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        assert x == pytest.approx(
            alone(model, tokenizer(p + c).input_ids).softmax(-1)[1].item(), abs=1e-5
        )
    assert Rewards(reward)(PROMPTS, COMPLETIONS, IDS, {}).score.tolist() == scores
    messages = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
    assert reward(PROMPTS, messages) == scores
    assert reward([], []) == []


HOST = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
FULL = [torch.OutOfMemoryError("tried to allocate 2 GiB"), MemoryError(), RuntimeError(HOST),
        RuntimeError("std::bad_alloc")]  # fmt: skip


@pytest.mark.parametrize("full", FULL, ids=lambda error: f"{error!r:.20}")
def test_B58_memory_that_is_full_halves_the_passes_and_changes_no_score(full):
    model, tokenizer = make_model("gpt2"), make_tokenizer()
    reward = RewardModel(model, tokenizer)
    expected, forward, sizes = reward(PROMPTS, COMPLETIONS, completion_ids=IDS), model.forward, []

    def full_above(tokens):
        def run(input_ids, **options):
            sizes.append(input_ids.numel())
            if len(input_ids) > 1 and input_ids.numel() > tokens:
                raise full
            return forward(input_ids=input_ids, **options)

        return run

    model.forward = full_above(20)
    scores = reward(PROMPTS, COMPLETIONS, completion_ids=IDS)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert sizes[0] > 20 and reward.batch_tokens <= 20

    def never(**_):
        raise full

    model.forward = never
    with pytest.raises(type(full)):
        reward(PROMPTS, COMPLETIONS, completion_ids=IDS)


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


SHIPPED_PADS = [None, 0, 2, 9, -1, 64]  # of a config: none, <pad>, <eos>, a word, and no token


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "bert", "xlnet"])
@pytest.mark.parametrize("pad", SHIPPED_PADS)
def test_B09_a_batch_pools_where_the_model_as_shipped_pools_each_text(kind, pad):
    """Whatever the tokenizer's pad is, and whichever tokens a text ends in."""
    if kind == "bert" and pad in (-1, 64):
        pytest.skip("an encoder cannot be built with them")
    model = make_model(kind)
    model.config.pad_token_id = pad
    shipped = model.config.to_dict()
    completions = [" w7", " w8 <eos>", " w9 w3 w3", " <pad> <pad>"]  # w3 has the id 9
    for own_pad, eos in [("<pad>", None), ("<eos>", "<eos>"), (None, "<eos>")]:
        tokenizer = make_tokenizer(eos=eos, pad=own_pad)
        texts = [p + c for p, c in zip(PROMPTS, completions, strict=True)]
        expected = [alone(model, tokenizer(text).input_ids).softmax(-1)[1] for text in texts]
        reward = RewardModel(model, tokenizer)
        expected = pytest.approx(torch.stack(expected).tolist(), abs=1e-5)  # rounding by threads
        assert reward(PROMPTS, completions) == expected
        states = reward.score_prefixes(PROMPTS, completions, [[c] for c in completions])
        assert [x for (x,) in states] == expected
        assert model.config.to_dict() == shipped


def test_B09_texts_that_use_the_whole_vocabulary_leave_no_token_to_pad_with():
    model, tokenizer = make_model(), make_tokenizer()
    model.resize_token_embeddings(12)
    reward = RewardModel(model, tokenizer)
    texts = [" ".join(["<pad> <eos> <unk> user assistant", *(f"w{i}" for i in range(n))]) for n in
             (6, 5, 4)]  # fmt: skip
    expected = [alone(model, tokenizer(text).input_ids).softmax(-1)[1].item() for text in texts]
    assert reward(texts, [""] * 3) == pytest.approx(expected, abs=1e-5)


def test_a_tokenizer_without_special_tokens_is_refused():
    bare = make_tokenizer(pad=None)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(TrpoLMError, match="no token that an empty text could be"):
        RewardModel(make_model(eos_token_id=None), bare)


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
    scores = reward.score_prefixes(PROMPTS, CASES, prefixes)
    for p, c, texts, row in zip(PROMPTS, CASES, prefixes, scores, strict=True):
        assert texts[0] == "" and texts[-1] == c
        assert row == pytest.approx(reward([p] * len(texts), texts), abs=1e-5)
    assert Rewards(reward, [2.0]).score_prefixes(PROMPTS, CASES, prefixes) == [
        [2 * x for x in row] for row in scores
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
    scores = reward.score_prefixes(PROMPTS, CASES, prefixes)
    assert [row[-1] for row in scores] == pytest.approx(reward(PROMPTS, CASES), abs=1e-6)
    bare = RewardModel(make_model(), make_tokenizer())
    assert scores[0][:-1] == pytest.approx(bare([PROMPTS[0]] * 4, prefixes[0][:-1]), abs=1e-5)
    # Where the closing token is also the padding, the model pools in front of it, and so do we.
    shared = RewardModel(make_model(pad_token_id=2), make_tokenizer(eos="<eos>", pad=None))
    scores = shared.score_prefixes(PROMPTS, CASES, prefixes)
    assert [row[-1] for row in scores] == pytest.approx(shared(PROMPTS, CASES), abs=1e-6)


def test_prefixes_of_conversations():
    reward = RewardModel(make_model(), make_tokenizer(template=TEMPLATE))
    assert reward.causal
    talk, completion = [{"role": "user", "content": "w1"}], "w2 w3"
    (scores,) = reward.score_prefixes([talk], [completion], [["", "w2", "w2 w3"]])
    states = [
        "<bos> user w1 assistant",
        "<bos> user w1 assistant w2",
        "<bos> user w1 assistant w2 w3 <eos>",
    ]
    assert scores == pytest.approx(reward([""] * 3, states), abs=1e-5)


def test_prefixes_that_end_inside_a_token_or_character_do_not_look_ahead():
    reward = RewardModel(make_model(), make_tokenizer())
    prefixes = [["", " w1", " w12", " w12 w\ufffd", " w12 w3"]]
    (scores,) = reward.score_prefixes(["w5"], [" w12 w3"], prefixes)
    expected = reward(["w5"] * 5, ["", "", " w12", " w12", " w12 w3"])
    assert scores == pytest.approx(expected, abs=1e-5)


def test_prefixes_without_bos_and_beyond_the_context_are_scored_by_themselves():
    reward = RewardModel(make_model(), make_tokenizer(bos=None))
    long = "".join(f" w{i % 30}" for i in range(30))
    prefixes = prefixes_of([" w1 w2", long])
    scores = reward.score_prefixes(["", ""], [" w1 w2", long], prefixes)
    for texts, row in zip(prefixes, scores, strict=True):
        assert row == pytest.approx(reward([""] * len(texts), texts), abs=1e-5)


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
        at = sorted({*range(0, len(full), stride), len(full) - 1})
        expected = np.interp(range(len(full)), at, [full[t] for t in at])
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


# ---- conversations


def test_B10_reward_models_score_the_answer_that_was_begun_as_one_message():
    reward = RewardModel(make_model(), make_tokenizer(template=TEMPLATE))
    talk = [{"role": "user", "content": "w1"}]
    begun = [*talk, {"role": "assistant", "content": "w2"}]
    whole = reward([talk], ["w2 w3"])
    assert reward([begun], [" w3"]) == whole
    assert Rewards(reward)([begun], [" w3"], IDS[:1], {}).score.tolist() == whole
    states = reward.score_prefixes([talk], ["w2 w3"], [["w2", "w2 w3"]])
    assert Rewards(reward).score_prefixes([begun], [" w3"], [["", " w3"]]) == states


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_texts_and_conversations_of_one_batch_score_as_each_does_alone(kind):
    """A template writes its own special tokens, and a text gets the tokenizer's."""
    reward = RewardModel(make_model(kind), make_tokenizer(template=TEMPLATE))
    asked = [{"role": "user", "content": "w1 w2"}]
    prompts = [asked, "w1 w2", asked, "w4"]
    said = [
        [{"role": "assistant", "content": "w7"}],
        " w7",
        *[[{"role": "assistant", "content": ""}]],
        "",
    ]
    alone = [reward([p], [c])[0] for p, c in zip(prompts, said, strict=True)]
    assert reward(prompts, said) == pytest.approx(alone, abs=1e-5)
    prefixes = [["", "w7"], ["", " w7"], [""], ["", ""]]
    scores = reward.score_prefixes(prompts, said, prefixes)
    for i, row in enumerate(scores):
        one = reward.score_prefixes(prompts[i : i + 1], said[i : i + 1], prefixes[i : i + 1])
        assert row == pytest.approx(one[0], abs=1e-5)
    longest = max(reward.check_prompts([p], {}) for p in prompts)
    assert reward.check_prompts(prompts, {}) == longest


def test_B31_a_conversation_that_the_template_of_a_reward_model_refuses_is_named_at_the_start():
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    talk = [{"role": "user", "content": "w1"}]
    system = [{"role": "system", "content": "w1"}, *talk]
    with pytest.raises(TrpoLMError, match=r"no system.*row 1"):
        reward = RewardModel(make_model(), make_tokenizer(template=refuse))
        reward.check_prompts([talk, system], {})
    with pytest.raises(TrpoLMError, match=r"has no chat template.*row 0"):
        RewardModel(make_model(), make_tokenizer()).check_prompts([talk], {})


def test_B15_tools_of_a_row_reach_the_template_of_a_reward_model():
    template = "{% if tools %}w5 {% endif %}" + TEMPLATE
    reward = RewardModel(make_model(), make_tokenizer(template=template))
    talk = [{"role": "user", "content": "w1"}]
    tools = {"tools": [[{"name": "f"}], None]}
    batch = Rewards(reward)([talk] * 2, ["w2"] * 2, IDS[:2], tools).score.tolist()
    assert batch[0] != batch[1]
    assert batch[1] == pytest.approx(reward([talk], ["w2"])[0], abs=1e-6)
    states = Rewards(reward).score_prefixes([talk] * 2, ["w2"] * 2, [["w2"]] * 2, tools)
    assert [row[0] for row in states] == pytest.approx(batch, abs=1e-5)
