"""Passes in stages against plain passes: the same outputs, gradients, products and samples."""

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoConfig,
    MistralConfig,
    Qwen2Config,
    Starcoder2Config,
)

from trpo_lm.core.divergences import token_logprobs
from trpo_lm.errors import RunFault
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.rollout import Batch, micro_batches
from trpo_lm.lm.shared_prefixes import common_length, padded_tokens, share_prefixes
from trpo_lm.training.metrics import check_old_policy
from trpo_lm.training.ranks import Ranks
from trpo_lm.training.stages import Stages

SYSTEM = "w0 w1 w2 w3 w4 w5"
CHAT = [f"{SYSTEM} w6", f"{SYSTEM} w7 w8 w6", f"{SYSTEM} w8", SYSTEM]
KINDS = ["gpt2", "llama", "qwen2", "neox"]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def both(policy, work):
    """Return what some work gives with stages, and without."""
    policy.shares_prefixes = True
    shared = work()
    policy.shares_prefixes = False
    plain = work()
    policy.shares_prefixes = True
    return shared, plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("prompts", [CHAT, CHAT[:1], [*CHAT, CHAT[0]]])
def test_stages_change_no_output_and_no_gradient(kind, each, prompts):
    policy = tiny.policy(kind, dtype=torch.float64, spread=0.3)
    assert policy.shares_prefixes
    batch = tiny.batch(policy, prompts=prompts, each=each, micro_batch_tokens=10**6)
    inputs = batch.rollout.model_inputs(torch.arange(len(batch.rollout)))
    staged = share_prefixes(*inputs)
    assert (staged is None) == (len(batch.rollout) == 1)
    features = both(policy, lambda: policy.features(*inputs).detach())
    assert relative(*features) < 1e-6  # Llama's norm and rotary angles are float32
    policy.room.most = 60  # several micro-batches
    measured = both(policy, lambda: Batch.from_rollout(policy, batch.rollout))
    assert relative(measured[0].ref_kl, measured[1].ref_kl) < 1e-6
    gradients = both(policy, lambda: tiny.mean_gradients(policy, batch))
    assert all(relative(a, b) < 1e-6 for a, b in zip(*gradients, strict=True))
    v = torch.randn(policy.parameters.size, dtype=torch.float64)
    for way in ("retained", "forward"):
        policy.exact_products = [way]
        products = both(policy, lambda: tiny.objective(policy, batch).fisher(999)(v))
        assert relative(*products) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("prompts", [CHAT, CHAT[:1], ["w1", *CHAT]])
def test_prompts_that_are_computed_once_lead_to_the_same_samples(kind, each, prompts):
    policy = tiny.policy(kind, dtype=torch.float64, spread=0.3)
    mdp, calls, cached = tiny.mdp(length=5), [], policy.prompt_cache
    policy.prompt_cache = lambda *inputs, **follow: (
        calls.append(cached(*inputs, **follow)) or calls[-1]
    )
    a, b = both(policy, lambda: mdp.rollout(policy, prompts, completions_per_prompt=each))
    assert calls[1] is None and (calls[0] is not None or (each == 1 and len(prompts) != 4))
    assert torch.equal(a.input_ids, b.input_ids) and a.completions == b.completions


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [30, 64, 100, 150])
def test_groups_are_about_even_and_as_few_as_can_be(shared, tokens):
    policy = tiny.policy("llama")
    rollout = tiny.batch(policy, prompts=[*CHAT, "w1"], each=5).rollout

    def computed(rows):
        inputs = rollout.model_inputs(rows)
        staged = share_prefixes(*inputs) if shared else None
        return sum(s.input_ids.numel() for s in staged.stages) if staged else inputs[0].numel()

    groups = rollout.micro_batches(tokens, shared=shared)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(rollout)))
    sizes = [computed(rows) for rows in groups]
    assert max(sizes) <= tokens
    row = max(computed(torch.tensor([i])) for i in range(len(rollout)))
    if len(groups) > 1:  # with a tenth less there would be more of them
        fewer = rollout.micro_batches(max(sizes) - max(row, tokens // 10), shared=shared)
        assert len(fewer) > len(groups)
        assert max(sizes) <= sum(sizes) / len(sizes) + 2 * row


def test_a_row_that_begins_with_others_holds_a_share_of_what_they_computed():
    policy = tiny.policy("llama")
    rollout = tiny.batch(policy, prompts=[" ".join(["w1"] * 40)], each=16).rollout
    many = rollout.micro_batches(10**4, shared=True)
    few = rollout.micro_batches(10**4, shared=True, held=100)
    assert [len(rows) for rows in many] == [16]
    assert len(few) > 1
    for rows in few:
        longest = int(rollout.lengths[rows].max()) - 1
        assert 41 + len(rows) * longest + (len(rows) - 1) * 41 / 5 <= 100
    assert len(rollout.micro_batches(10**4, shared=False, held=10**4)) == 1


def test_a_model_whose_stages_differ_is_run_in_plain_passes(monkeypatch):
    model = tiny.build("llama")
    forward = model.model.forward

    def deaf(*args, cache=None, past_key_values=None, **kwargs):
        return forward(*args, **kwargs)  # takes a cache and does not look at it

    monkeypatch.setattr(model.model, "forward", deaf)
    assert not tiny.policy(model=model).shares_prefixes
    assert tiny.policy("llama").shares_prefixes


def windowed(kind):
    """Models whose attention sees 4 tokens, in one layer or in both."""
    sizes = {**tiny.LETTERS, **tiny.ENDS, **tiny.ROTARY}
    neo = {
        "vocab_size": tiny.V, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "window_size": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, **tiny.ENDS,
    }  # fmt: skip
    configs = {
        "mistral": lambda: MistralConfig(**sizes, sliding_window=4),
        "qwen2": lambda: Qwen2Config(
            **sizes, use_sliding_window=True, sliding_window=4, max_window_layers=1
        ),
        "gemma2": lambda: Gemma2Config(**sizes, head_dim=4, sliding_window=4),
        "starcoder2": lambda: Starcoder2Config(**sizes, sliding_window=4),
        "gpt_neo": lambda: GPTNeoConfig(**neo, initializer_range=0.35),
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[kind]()).eval()


WINDOWED = ["mistral", "qwen2", "gemma2", "starcoder2", "gpt_neo"]


@pytest.mark.parametrize("kind", WINDOWED)
def test_B08_padding_between_tokens_takes_no_room_in_a_window(kind):
    policy = Policy(windowed(kind), tiny.lora())
    tiny.perturb(policy, 0.3)
    assert policy.shares(4) and not policy.shares(5)
    batch = tiny.batch(policy, prompts=CHAT, each=2, micro_batch_tokens=10**6)
    logits = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
    measured = batch.old_logprobs
    torch.testing.assert_close(
        measured, token_logprobs(logits, batch.actions), atol=1e-4, rtol=1e-4
    )
    check_old_policy(policy, batch, Ranks(60.0, Stages()))


@pytest.mark.parametrize("kind", WINDOWED)
def test_B08_a_window_that_no_one_knows_of_ends_the_run_in_update_1(kind):
    policy, ranks = Policy(windowed(kind), tiny.lora()), Ranks(60.0, Stages())
    policy._window = None
    batch = tiny.batch(policy, prompts=CHAT, each=2, micro_batch_tokens=10**6)
    measured = batch.rollout.padded(batch.old_logprobs)[:8]
    consistent = replace(batch, rollout=replace(batch.rollout, drawn_logprobs=measured))
    with pytest.raises(RunFault, match=r"in a pass over whole rows are .* nats from those measur"):
        check_old_policy(policy, consistent, ranks)


def test_recomputed_layers_run_in_plain_passes():
    policy = tiny.policy("llama", dtype=torch.float64, spread=0.3, gradient_checkpointing=True)
    batch = tiny.batch(policy, prompts=CHAT, each=4)
    plain = tiny.policy("llama", dtype=torch.float64, spread=0.3)
    one = tiny.mean_gradients(policy, batch)
    two = tiny.mean_gradients(plain, tiny.batch(plain, prompts=CHAT, each=4))
    assert all(relative(a, b) < 1e-5 for a, b in zip(one, two, strict=True))


rows = st.lists(
    st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=6),
              st.lists(st.integers(1, 3), min_size=1, max_size=5)),
    min_size=2, max_size=7,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(rows, st.integers(0, 4), st.integers(0, 4))
def test_stages_hold_each_row_once_and_each_state_in_its_place(rows, system, repeats):
    rows = [([3] * 2 * system + prompt, completion) for prompt, completion in rows]
    rows = rows + rows[:1] * repeats
    P, T = (max(len(row[i]) for row in rows) for i in (0, 1))
    ids = torch.tensor([[0] * (P - len(p)) + p + c + [0] * (T - len(c)) for p, c in rows])
    mask = torch.tensor(
        [[0] * (P - len(p)) + [1] * len(p + c) + [0] * (T - len(c)) for p, c in rows]
    )
    states = torch.zeros_like(mask, dtype=torch.bool)
    for row, (_, c) in zip(states, rows, strict=True):
        row[P - 1 : P - 1 + len(c)] = True
    shared = share_prefixes(ids[:, :-1], mask[:, :-1], states[:, :-1])
    plain = ids[:, :-1].numel()
    if shared is None:
        return
    computed = sum(stage.input_ids.numel() for stage in shared.stages)
    assert computed < plain
    texts, found = [], []  # of every place of the stage, what it has read so far
    for stage in shared.stages:
        before = [[]] * len(stage.input_ids) if stage.parents is None else [
            texts[-1][int(i)] for i in stage.parents
        ]  # fmt: skip
        read = [list(text) for text in before]
        new = stage.attention_mask[:, -stage.input_ids.shape[1] :]
        for i, (tokens, real, wanted) in enumerate(
            zip(stage.input_ids.tolist(), new.tolist(), stage.state_mask.tolist(), strict=True)
        ):
            for token, is_real, is_wanted in zip(tokens, real, wanted, strict=True):
                read[i] += [token] * is_real
                if is_wanted:
                    assert is_real
                    found.append(list(read[i]))
        texts.append(read)
    expected = [p + c[:t] for p, c in rows for t in range(len(c))]
    assert [found[i] for i in shared.order.tolist()] == expected


def test_what_sequences_begin_with():
    assert common_length([(1, 2, 3), (1, 2), (1, 2, 4)]) == 2
    assert common_length([(1, 2)]) == 2 and common_length([(1,), (2,)]) == 0


def test_tokens_are_counted_as_stages_compute_them():
    assert padded_tokens(8, 8, 0, 10, 5) == 8 * 15
    assert padded_tokens(8, 8, 9, 10, 5) == 9 + 8 * 6
    assert padded_tokens(8, 2, 0, 10, 5) == 2 * 10 + 8 * 5
    assert padded_tokens(8, 2, 0, 10, 5, shared=False) == 8 * 15
    assert padded_tokens(8, 8, 1, 100, 5) == 8 * 105  # not worth it


@pytest.mark.parametrize("tokens", [1, 40, 200, 10**6])
@pytest.mark.parametrize("each", [1, 6])
def test_micro_batches_hold_all_rows_and_no_more_tokens_than_allowed(tokens, each):
    policy = tiny.policy("llama")
    rollout = tiny.batch(policy, prompts=CHAT, each=each).rollout
    policy.room.most = tokens
    tokens = max(tokens, int(rollout.attention_mask.sum(-1).max()))  # one row at least
    parts = [rows for rows, _ in micro_batches(policy, rollout, "gradient")]
    assert sorted(torch.cat(parts).tolist()) == list(range(len(rollout)))
    for rows in parts:
        inputs = rollout.model_inputs(rows)
        shared = share_prefixes(*inputs)
        computed = inputs[0].numel() if shared is None else sum(
            stage.input_ids.numel() for stage in shared.stages
        )  # fmt: skip
        assert len(rows) == 1 or computed <= tokens


def test_long_and_short_completions_cost_their_own_tokens():
    policy = tiny.policy("llama")
    rollout = tiny.batch(policy, each=8, length=12).rollout
    policy.room.most = 100
    policy.shares_prefixes = False
    lengths = rollout.attention_mask.sum(-1)
    parts = [rows for rows, _ in micro_batches(policy, rollout, "gradient")]
    computed = sum(rollout.model_inputs(rows)[0].numel() for rows in parts)
    assert computed < 0.75 * len(rollout) * int(lengths.max())
