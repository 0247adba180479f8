"""The token MDP: rollout against its step-by-step definition, ends, padding, and the sampler."""

import math
from itertools import chain

import pytest
import tiny
import torch
from transformers import GenerationConfig

from trpo_lm.core.divergences import token_logprobs
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.mdp import end_token_ids, ignored_sampling
from trpo_lm.lm.prompts import encode_prompt
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
        assert rollout.completions[i] == mdp.text(actions)


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
    monkeypatch.setattr("trpo_lm.lm.mdp.GENERATE_ROWS", 8)
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
