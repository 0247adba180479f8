"""The token MDP: rollout against its step-by-step definition, ends, padding, and the sampler."""

import importlib
import math
from contextlib import suppress
from itertools import chain

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from trpo_lm.core.divergences import token_logprobs
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.mdp import end_token_ids, ignored_sampling
from trpo_lm.lm.prompts import encode_prompt, encode_prompts
from trpo_lm.lm.rewards import scores_prefixes
from trpo_lm.lm.rollout import Batch

CHAT = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} w8{% endif %}"
)


def count_w1(completions, bonus=None):
    bonus = bonus or [0.0] * len(completions)
    return [c.count("w1") + 10.0 * len(c) + b for c, b in zip(completions, bonus, strict=True)]


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(spread=0.3)


def favour(policy, token, amount):
    """Make one token likelier by the bias of an untied head (Llama)."""
    head = policy.base.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(tiny.V), requires_grad=False)
    head.bias.data[token] += amount
    return policy


# ---- rollout is the iterated step ----


@pytest.mark.parametrize("seed", [0, 1])
def test_rollout_is_the_iterated_step(policy, seed):
    mdp = tiny.mdp(count_w1, length=6)
    bonus = [0.5, 0.25, 0.0, 2.0]
    rollout = mdp.rollout(policy, tiny.PROMPTS, completions_per_prompt=4, columns={"bonus": bonus},
                          seed=(seed,))  # fmt: skip
    assert set(rollout.truncated.tolist()) == {True, False}
    assert rollout.groups.tolist() == [i for i in range(4) for _ in range(4)]
    for i, actions in enumerate(rollout.completion_ids):
        state = mdp.reset(tiny.PROMPTS[i // 4], {"bonus": bonus[i // 4]})
        P = rollout.input_ids.shape[1] - rollout.action_mask.shape[1]
        real = rollout.attention_mask[i, :P].bool()
        assert state.prompt_ids == tuple(rollout.input_ids[i, :P][real].tolist())
        for t, action in enumerate(actions):
            state, reward, terminated, truncated = mdp.step(state, action)
            last = t == len(actions) - 1
            assert reward == float(rollout.rewards[i, t])
            assert (terminated or truncated) == last
        assert truncated == bool(rollout.truncated[i]) and terminated != truncated
        assert state.completion_ids == tuple(actions)
        before = mdp.before(state.prompt, state.prompt_ids)
        assert rollout.completions[i] == mdp.text(actions, before)


def test_rewards_per_token_stand_where_they_belong_and_step_pays_their_sum(policy):
    def each(completion_ids):
        return [[float(i) for i in ids] for ids in completion_ids]

    mdp = tiny.mdp(each, length=4)
    rollout = mdp.rollout(policy, tiny.PROMPTS)
    assert rollout.rewards[rollout.action_mask].tolist() == [float(a) for a in rollout.actions]
    assert bool((rollout.rewards[~rollout.action_mask] == 0).all())
    state, total = mdp.reset(tiny.PROMPTS[0]), 0.0
    for action in rollout.completion_ids[0]:
        state, reward, *_ = mdp.step(state, action)
        total += reward
    assert total == float(rollout.rewards[0].sum()) != 0.0


# ---- ends ----


def test_T12_the_score_is_paid_at_the_last_action_and_nowhere_else(policy):
    rollout = tiny.mdp(lambda completions: [1.5] * len(completions), length=6).rollout(
        policy, tiny.PROMPTS, completions_per_prompt=4
    )
    assert len(set(rollout.lengths.tolist())) > 2
    for row, n in zip(rollout.rewards, rollout.lengths, strict=True):
        assert row.nonzero().flatten().tolist() == [int(n) - 1] and row[n - 1] == 1.5


def test_T11_several_end_tokens_and_the_end_token_is_an_action(policy):
    eos = (tiny.EOS, 7, 9)
    rollout = tiny.mdp(length=12, eos=eos).rollout(policy, tiny.PROMPTS, completions_per_prompt=8)
    ended = ~rollout.truncated
    assert ended.sum() > 20
    last = [ids[-1] for ids in rollout.completion_ids]
    assert {last[i] for i in ended.nonzero().flatten().tolist()} == set(eos)
    assert not any(set(ids[:-1]) & set(eos) for ids in rollout.completion_ids)


def test_T11_ends_come_from_the_generation_config_and_the_tokenizer():
    model, tokenizer = tiny.build(), tiny.tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=[9, 5])
    assert end_token_ids(model, tokenizer) == [tiny.EOS, 5, 9]
    model.generation_config = GenerationConfig(eos_token_id=5)
    assert end_token_ids(model, tiny.tokenizer(eos=False)) == [5]
    model.generation_config = GenerationConfig()
    assert end_token_ids(model, tiny.tokenizer(eos=False)) == []


@pytest.mark.parametrize(
    "given", [[9, 5], (9, 5), torch.tensor([9, 5]), np.array([9, 5]), [np.int64(9), 5, 9]]
)
def test_B41_end_tokens_of_any_type_are_numbers(given):
    model = tiny.build()
    model.generation_config.eos_token_id = given
    assert end_token_ids(model, tiny.tokenizer()) == [tiny.EOS, 5, 9]
    for one in (5, torch.tensor(5), np.int64(5)):
        model.generation_config.eos_token_id = one
        ids = end_token_ids(model, tiny.tokenizer(eos=False))
        assert ids == [5] and type(ids[0]) is int


def test_T09_an_empty_completion_has_length_one_and_a_reward():
    said = []

    def reward(completions):
        said.extend(completions)
        return [2.0] * len(completions)

    policy = favour(tiny.policy("llama"), tiny.EOS, 50.0)
    mdp = tiny.mdp(reward)
    rollout = mdp.rollout(policy, tiny.PROMPTS)
    assert said == [""] * 4 and rollout.lengths.tolist() == [1] * 4
    assert rollout.rewards.tolist() == [[2.0, 0, 0, 0, 0]] * 4 and not rollout.truncated.any()
    batch = Batch.from_rollout(policy, rollout)
    assert torch.isfinite(batch.old_logprobs).all() and len(batch.actions) == 4
    assert mdp.prefix_texts(rollout) == [[""]] * 4


def test_T10_without_an_end_token_a_completion_is_truncated(policy):
    rollout = tiny.mdp(length=3, eos=()).rollout(policy, tiny.PROMPTS, completions_per_prompt=4)
    assert rollout.truncated.all() and (rollout.lengths == 3).all()
    never = favour(tiny.policy("llama"), tiny.EOS, -50.0)
    rollout = tiny.mdp(length=3, eos=[tiny.EOS]).rollout(never, tiny.PROMPTS)
    assert rollout.truncated.all()
    assert bool((rollout.rewards[:, :2] == 0).all())


def test_an_end_token_as_the_last_possible_action_is_not_a_truncation():
    policy = favour(tiny.policy("llama"), tiny.EOS, 50.0)
    assert not tiny.mdp(length=1).rollout(policy, tiny.PROMPTS).truncated.any()


def test_T16_one_token_at_most(policy):
    rollout = tiny.mdp(length=1).rollout(policy, tiny.PROMPTS, completions_per_prompt=8)
    assert rollout.lengths.tolist() == [1] * 32 and rollout.rewards.shape == (32, 1)
    ended = torch.tensor([ids[0] in tiny.STOPS for ids in rollout.completion_ids])
    assert bool((ended == ~rollout.truncated).all())
    with pytest.raises(TrpoLMError, match="max_completion_length"):
        tiny.mdp(length=0)


def test_T04_masks_come_from_lengths_though_pad_is_eos_and_eos_is_sampled(policy):
    """The pad token of a tokenizer without one is EOS; nothing else changes."""
    reward = lambda completion_ids: [float(ids[0]) for ids in completion_ids]  # noqa: E731
    with_pad = tiny.mdp(reward, length=6)
    without = tiny.mdp(reward, length=6, tok=tiny.tokenizer(pad=False))
    assert (with_pad.pad_token_id, without.pad_token_id) == (tiny.PAD, tiny.EOS)
    a, b = (m.rollout(policy, tiny.PROMPTS, completions_per_prompt=20) for m in (with_pad, without))
    assert a.completion_ids == b.completion_ids
    assert torch.equal(a.action_mask, b.action_mask) and torch.equal(a.rewards, b.rewards)
    assert any(ids[-1] == without.pad_token_id for ids in b.completion_ids)
    one, two = (Batch.from_rollout(policy, r).old_logprobs for r in (a, b))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_T05_neither_pad_nor_end_token():
    with pytest.raises(TrpoLMError, match="neither a pad nor an eos token") as error:
        tiny.mdp(tok=tiny.tokenizer(pad=False, eos=False), eos=())
    assert "tokenizer.eos_token" in str(error.value)


# ---- prompts ----


def test_T01_an_empty_prompt_becomes_bos_or_an_error():
    silent = tiny.tokenizer(bos=False)
    with pytest.raises(TrpoLMError, match="the prompt is empty"):
        encode_prompt(silent, "")
    silent.bos_token = "<bos>"  # known, but not put before texts
    assert encode_prompt(silent, "") == [tiny.BOS] and encode_prompt(silent, "w0") == [4]
    assert encode_prompt(tiny.tokenizer(), "") == [tiny.BOS]


def test_T02_a_prompt_is_text_or_messages():
    for prompt in (None, 3, {"role": "user"}):
        with pytest.raises(TrpoLMError, match=type(prompt).__name__):
            encode_prompt(tiny.tokenizer(), prompt)


def test_T13_a_conversation_needs_a_chat_template():
    with pytest.raises(TrpoLMError, match="no chat template"):
        encode_prompt(tiny.tokenizer(), [{"role": "user", "content": "w1"}])


def test_T14_a_template_that_writes_bos_gives_exactly_one():
    tokenizer = tiny.tokenizer(chat_template=CHAT)
    ids = encode_prompt(tokenizer, [{"role": "w2", "content": "w1"}])
    assert ids == [tiny.BOS, 6, 5, 12]  # ... w2 w1, and the generation prompt


# ---- padding ----


def test_prompts_are_padded_left_and_completions_right(policy):
    rollout = tiny.mdp(length=6).rollout(policy, tiny.PROMPTS, completions_per_prompt=2)
    T = rollout.action_mask.shape[1]
    for i, row in enumerate(rollout.attention_mask):
        n, length = len(encode_prompt(tiny.tokenizer(), rollout.prompts[i])), rollout.lengths[i]
        P = len(row) - T
        assert row[:P].tolist() == [0] * (P - n) + [1] * n
        assert row[P:].tolist() == [1] * int(length) + [0] * (T - int(length))
    assert int(rollout.lengths.max()) == T


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "neox"])
def test_T07_mixed_lengths_in_one_batch_equal_one_by_one(kind):
    policy = tiny.policy(kind, spread=0.3)
    batch = tiny.batch(policy, each=3, micro_batch_tokens=10**6)
    rollout = batch.rollout
    assert len(set(rollout.attention_mask.sum(-1).tolist())) >= 4
    with torch.no_grad():
        alone = tiny.own_logits(policy, rollout).log_softmax(-1)
    alone = token_logprobs(alone, rollout.actions)
    assert float((batch.old_logprobs - alone).abs().max()) <= 1e-5
    for size in (1, 25, 60):
        policy.room.most = size
        again = Batch.from_rollout(policy, rollout)
        assert float((again.old_logprobs - alone).abs().max()) <= 1e-5
        assert float((again.ref_kl - batch.ref_kl).abs().max()) <= 1e-5


def test_flat_order_and_token_index(policy):
    rollout = tiny.batch(policy, each=3).rollout
    assert rollout.actions.tolist() == [*chain(*rollout.completion_ids)]
    padded = rollout.padded(rollout.actions.double())
    for i, ids in enumerate(rollout.completion_ids):
        assert padded[i].tolist() == ids + [0] * (padded.shape[1] - len(ids))
        assert rollout.actions[rollout.token_index(torch.tensor([i]))].tolist() == ids
    rows = torch.tensor([4, 0, 2])
    expected = [*chain(*(rollout.completion_ids[i] for i in rows))]
    assert rollout.actions[rollout.token_index(rows)].tolist() == expected
    assert rollout.micro_batches(5, torch.tensor([], dtype=torch.long)) == []


# ---- the sampler is the policy ----


def scores_and_tokens(policy, mdp, monkeypatch, prompts, n):
    """Roll out and catch what `generate` sampled from at its first step."""
    caught = []
    generate = policy.base.generate

    def spy(**options):
        out = generate(**options, return_dict_in_generate=True, output_scores=True)
        caught.append(out.scores)
        return out.sequences

    monkeypatch.setattr(policy.base, "generate", spy)
    rollout = mdp.rollout(policy, prompts, completions_per_prompt=n)
    return caught[0], rollout


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_K01_the_sampler_draws_from_the_tempered_policy(kind, monkeypatch):
    policy = tiny.policy(kind, spread=0.3, temperature=0.7)
    scores, rollout = scores_and_tokens(policy, tiny.mdp(), monkeypatch, tiny.PROMPTS, 4)
    batch = Batch.from_rollout(policy, rollout)
    recomputed = rollout.padded(batch.old_logprobs)
    T = rollout.action_mask.shape[1]
    sampled = torch.stack(scores[:T], dim=1).log_softmax(-1)  # (N, T, V)
    ids = rollout.input_ids[:, -T:]
    gap = (token_logprobs(sampled, ids) - recomputed)[rollout.action_mask]
    assert float(gap.abs().max()) <= 1e-4
    full = policy.logprobs(batch.old_features).detach()
    assert float((sampled[rollout.action_mask] - full).abs().max()) <= 1e-4
    untempered = tiny.own_logits(policy, rollout).detach() * 0.7
    assert float((full - untempered.log_softmax(-1)).abs().max()) > 0.1


def test_K02_nothing_of_the_models_generation_config_reaches_the_sampler():
    policy = tiny.policy(spread=0.3)
    shipped = GenerationConfig(
        do_sample=True, top_k=5, top_p=0.5, min_p=0.3, repetition_penalty=1.3, typical_p=0.5,
        no_repeat_ngram_size=1, suppress_tokens=[5, 6], bad_words_ids=[[7]], min_new_tokens=3,
        temperature=0.2, max_length=7, num_beams=2, epsilon_cutoff=0.1, eta_cutoff=0.1,
        forced_eos_token_id=8, guidance_scale=2.0,
    )  # fmt: skip
    policy.base.generation_config = shipped
    n = 2000
    rollout = tiny.mdp(length=2).rollout(policy, ["w1 w2"], completions_per_prompt=n)
    first = torch.tensor([ids[0] for ids in rollout.completion_ids])
    p = tiny.own_logits(policy, rollout, rows=[0]).detach()[0].softmax(-1).double()
    counts = torch.bincount(first, minlength=tiny.V).double()
    chi2 = float(((counts - n * p) ** 2 / (n * p)).sum())
    assert chi2 < 12 + 4 * math.sqrt(24), (counts / n, p)  # V - 1 degrees of freedom, 4 sigma
    assert policy.base.generation_config is shipped


def test_K09_a_nan_weight_is_refused_by_name_instead_of_sampling():
    policy = tiny.policy()
    next(p for n, p in policy.model.named_parameters() if "mlp" in n and p.dim() == 2).data[0] = (
        math.nan
    )
    with pytest.raises(RunFault, match="non-finite logits at layer output"):
        tiny.mdp().rollout(policy, tiny.PROMPTS)


def test_the_same_seed_gives_the_same_rollout_and_global_randomness_is_untouched(policy):
    mdp = tiny.mdp(length=6)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = mdp.rollout(policy, tiny.PROMPTS, completions_per_prompt=4, seed=(1, "a"))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    same = mdp.rollout(policy, tiny.PROMPTS, completions_per_prompt=4, seed=(1, "a"))
    other = mdp.rollout(policy, tiny.PROMPTS, completions_per_prompt=4, seed=(1, "b"))
    assert one.completion_ids == same.completion_ids != other.completion_ids


def test_rows_are_sampled_in_parts_with_seeds_of_their_own(policy, monkeypatch):
    monkeypatch.setattr("trpo_lm.lm.sampling.GENERATE_ROWS", 8)
    rollout = tiny.mdp(length=6).rollout(policy, ["w1 w2"], completions_per_prompt=16)
    assert len(rollout) == 16
    assert rollout.completion_ids[:8] != rollout.completion_ids[8:]


# ---- what is measured ----


def test_measured_quantities_equal_the_models_own_logits():
    policy = tiny.policy("llama", spread=0.4, temperature=1.3)
    batch = tiny.batch(policy)
    with torch.no_grad():
        old = tiny.own_logits(policy, batch.rollout).double().log_softmax(-1)
        with policy.reference():
            ref = tiny.own_logits(policy, batch.rollout).double().log_softmax(-1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for found, logprobs in ((batch.old_logprobs, old), (batch.ref_logprobs, ref)):
        expected = token_logprobs(logprobs, batch.actions)
        torch.testing.assert_close(found.double(), expected, **close)
    torch.testing.assert_close(batch.entropy.double(), -(old.exp() * old).sum(-1), **close)
    expected = (old.exp() * (old - ref)).sum(-1)
    torch.testing.assert_close(batch.ref_kl.double(), expected, **close)
    assert float(expected.mean()) > 0.01
    torch.testing.assert_close(policy.logprobs(batch.ref_features).double(), ref, **close)


def test_hidden_states_are_those_of_the_reference():
    policy = tiny.policy(spread=0.4)
    batch = tiny.batch(policy)
    assert torch.equal(batch.hidden, batch.ref_features)
    assert not torch.allclose(batch.hidden, batch.old_features, atol=1e-2)


def test_K02_what_the_model_ships_and_training_ignores_is_told():
    policy = tiny.policy()
    assert ignored_sampling(policy.base) == {}
    policy.base.generation_config.update(top_k=5, top_p=0.5, repetition_penalty=1.3)
    assert ignored_sampling(policy.base) == {"top_k": 5, "top_p": 0.5, "repetition_penalty": 1.3}


@pytest.mark.parametrize(
    "setting",
    [
        {"suppress_tokens": [4]}, {"begin_suppress_tokens": [4]}, {"bad_words_ids": [[5]]},
        {"forced_eos_token_id": 2}, {"min_new_tokens": 2}, {"min_p": 0.1}, {"stop_strings": "w1"},
        {"sequence_bias": [[[4], -9.0]]}, {"exponential_decay_length_penalty": (2, 1.1)},
        {"no_repeat_ngram_size": 2},
    ],
)  # fmt: skip
def test_B41_a_setting_that_changes_the_distribution_is_told_and_changes_nothing(setting):
    one, two = tiny.policy(), tiny.policy()
    two.base.generation_config.update(**setting)
    assert ignored_sampling(two.base) == setting
    drawn = [
        tiny.mdp(length=8).rollout(p, tiny.PROMPTS, completions_per_prompt=4, seed=(3,))
        for p in (one, two)
    ]
    assert torch.equal(drawn[0].input_ids, drawn[1].input_ids)


# ---- texts ----

CORPUS = [
    "the cat sat on the mat .",
    "a dog saw the cat",
    "don ' t see \u20ac 5 \U0001f600",
    "the\n dog",
]


def decoder(kind):
    """A small tokenizer whose decoder treats the space at the beginning in its own way."""
    llama = [
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]  # fmt: skip
    pre, back = {
        "byte_level": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        "metaspace": (pre_tokenizers.Metaspace(), decoders.Metaspace()),
        "metaspace_first": (
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            decoders.Metaspace(prepend_scheme="first"),
        ),
        "llama": (pre_tokenizers.Metaspace(), decoders.Sequence(llama)),
        "word_piece": (pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=False)),
        "none": (pre_tokenizers.WhitespaceSplit(), None),
    }[kind]
    model, trainer = models.BPE(unk_token="<unk>"), trainers.BpeTrainer
    if kind in ("word_piece", "none"):
        model, trainer = models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer  # type: ignore
    core = Tokenizer(model)
    core.pre_tokenizer = pre
    if back is not None:
        core.decoder = back
    core.train_from_iterator(
        CORPUS, trainer(vocab_size=90, special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"])
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>",
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["byte_level", "metaspace", "metaspace_first", "llama", "word_piece", "none"]
)
def test_B04_prompt_and_completion_are_the_text_of_all_tokens(kind):
    """For rewards, for every prefix, and in a conversation that goes on with a message."""
    tok, seen = decoder(kind), []

    def watch(completions, prompts):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    tok.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
    )
    prompts = ["the cat", "a dog saw the", "", "the cat sat on the mat ."]
    prompts += [[{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat sat"}]]
    made = tiny.mdp(watch, length=7, tok=tok, eos=[2])
    noise = torch.Generator().manual_seed(0)
    sampled = torch.randint(4, len(tok), (len(prompts), 7), generator=noise)
    spaced = tok(" the dog sat", add_special_tokens=False)["input_ids"]
    sampled[0, : len(spaced)] = torch.tensor(spaced)[:7]
    encoded = made.encode(prompts)
    rollout = made.scored(prompts, *made.left_pad(encoded), sampled, torch.arange(5), {})

    def text(ids):
        return tok.decode(ids, skip_special_tokens=True)

    for ids, actions, completion, states in zip(
        encoded, sampled.tolist(), rollout.completions, made.prefix_texts(rollout), strict=True
    ):
        assert text(ids) + completion == text([*ids, *actions])
        for t, state in enumerate(states):
            assert text(ids) + state == text([*ids, *actions[:t]])
    assert seen[0] == ("the cat", rollout.completions[0])
    assert seen[4] == (
        prompts[4][:1],
        [{"role": "assistant", "content": f"cat sat{rollout.completions[4]}"}],
    )
    if kind != "byte_level":  # the decoder alone would glue the words
        assert rollout.completions[0].startswith(" ")


TALK = [{"role": "user", "content": "w1 w2"}]


def talk(policy, reward, prompts, **options):
    tok = tiny.tokenizer(chat_template=CHAT)
    return tiny.mdp(reward, length=4, tok=tok).rollout(policy, prompts, **options)


def test_B38_completions_of_conversations_are_messages_as_in_trl(policy):
    """Whole, per token, async, and prefixes; those of plain text stay strings."""
    seen = []

    def copied_from_trl(completions, answer, **kwargs):
        seen.extend(completions)
        contents = [completion[0]["content"] for completion in completions]
        return [float(a in c) for c, a in zip(contents, answer, strict=True)]

    async def patient(prompts, completions):
        return [float(p[-1]["role"] == "user") + len(c[0]["content"]) * 0 for p, c in
                zip(prompts, completions, strict=True)]  # fmt: skip

    @scores_prefixes
    def by_state(completions):
        return [float(len(c[0]["content"].split())) for c in completions]

    def by_token(completions, completion_ids):
        return [[float(c[0]["role"] == "assistant")] * len(ids) for c, ids in
                zip(completions, completion_ids, strict=True)]  # fmt: skip

    for reward in (copied_from_trl, patient, by_token, by_state):
        rollout = talk(policy, reward, [TALK, TALK], columns={"answer": ["w", "w"]})
        assert rollout.scores.valid.all() and all(isinstance(c, str) for c in rollout.completions)
    assert [list(c[0]) for c in seen] == [["role", "content"]] * 2
    tok = tiny.tokenizer(chat_template=CHAT)
    made = tiny.mdp(by_state, length=4, tok=tok)
    scores = made.prefix_scores(made.rollout(policy, [TALK] * 3))
    assert scores[:, 0].tolist() == [0.0] * 3 and (scores.max(-1).values >= 1).any()
    plain = []
    tiny.mdp(lambda completions: plain.extend(completions) or [0.0] * 4).rollout(
        policy, tiny.PROMPTS
    )
    assert all(isinstance(c, str) for c in plain)


def test_B38_the_rewards_of_trl_run_unchanged(policy):
    rewards = pytest.importorskip("trl.rewards")
    functions = [
        rewards.think_format_reward,
        rewards.get_soft_overlong_punishment(4, 2),
        rewards.get_repetition_penalty_reward(2),
    ]
    with suppress(ImportError):
        importlib.import_module("math_verify")
        functions += [rewards.accuracy_reward, rewards.reasoning_accuracy_reward]
        functions += [rewards.get_cosine_scaled_reward(4)]
    rollout = talk(policy, functions, [TALK] * 4, columns={"solution": ["$1$"] * 4})
    assert len(rollout.scores.columns) == len(functions) and rollout.scores.valid.all()


def test_B10_an_answer_that_was_begun_is_continued(policy):
    begun = [*TALK, {"role": "assistant", "content": "w3 w4"}]
    ids = encode_prompt(tiny.tokenizer(chat_template=CHAT), begun)
    assert ids[-2:] == [7, 8] and tiny.EOS not in ids  # w3 w4, and no new turn
    seen = []

    def whole(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    rollout = talk(policy, whole, [begun])
    ((prompt, completion),) = seen
    assert prompt == TALK
    assert completion == [{"role": "assistant", "content": f"w3 w4{rollout.completions[0]}"}]


OPTIONS = (
    "{% if tools %}{{ tools[0]['function']['name'] }} {% endif %}"
    "{% if loud is defined and loud %}w7 {% endif %}"
    "{% for m in messages %}{{ m.content }} {% endfor %}"
)


def test_B15_tools_and_template_arguments_of_settings_and_rows_reach_the_template(policy):
    tok = tiny.tokenizer(chat_template=OPTIONS)
    made = tiny.mdp(tok=tok, length=2, template_arguments={"loud": True})
    tools = [[{"type": "function", "function": {"name": "w5", "other": None}}], None, None]
    columns = {"tools": tools, "chat_template_kwargs": [None, {"loud": False}, '{"loud": true}']}
    texts = [tok.decode(ids) for ids in made.encode([TALK] * 3, columns)]
    assert texts == ["w5 w7 w1 w2", "w1 w2", "w7 w1 w2"]
    rollout = tiny.mdp(lambda completions: [0.0] * 3, tok=tok, length=2).rollout(
        policy, [TALK] * 3, columns=columns
    )
    real = rollout.attention_mask[:, :-2].sum(-1).tolist()
    assert real == [3, 2, 3]
    with pytest.raises(TrpoLMError, match=r"'tools' holds 7, not a list .*row 0"):
        made.encode([TALK], {"tools": [7]})
    with pytest.raises(TrpoLMError, match=r"holds no JSON.*row 0"):
        made.encode([TALK], {"chat_template_kwargs": ["{"]})


@pytest.mark.parametrize("ending", [None, "<bos> $A <eos>", "$A <eos>"])
def test_many_prompts_become_the_tokens_of_each(ending):
    tok = tiny.tokenizer(chat_template=CHAT)
    if ending:
        tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=ending, special_tokens=[("<bos>", tiny.BOS), ("<eos>", tiny.EOS)]
        )
    prompts = ["w1", TALK, "", "w1 <eos>", "<bos> w2 w3", TALK[:1], "w4 w5"]
    assert encode_prompts(tok, prompts) == [encode_prompt(tok, prompt) for prompt in prompts]


def test_T14_one_bos_whoever_writes_it():
    twice = tiny.tokenizer(
        chat_template="{{ bos_token }} {{ bos_token }} {{ messages[0]['content'] }}"
    )
    for tok, prompt in ((twice, TALK), (tiny.tokenizer(), "<bos> w1 w2")):
        assert encode_prompt(tok, prompt).count(tiny.BOS) == 1


@pytest.mark.parametrize("ending", ["<bos> $A <eos>", "$A <eos>", "<bos> $A <eos> <eos>"])
def test_B06_an_end_token_that_the_tokenizer_appends_is_taken_off(ending):
    tok = tiny.tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=ending, special_tokens=[("<bos>", tiny.BOS), ("<eos>", tiny.EOS)]
    )
    front = [tiny.BOS] * ending.startswith("<bos>")
    assert encode_prompt(tok, "w1 w2") == [*front, 5, 6]
    assert encode_prompt(tok, "") == [tiny.BOS]
    assert encode_prompt(tok, "w1 <eos>") == [*front, 5, tiny.EOS]  # the text's own stays
