"""The start-up examination: what it refuses, and that it refuses nothing that works."""

import copy

import pytest
import test_reward_models as rm
import tiny
import torch
import transformers
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch.nn.functional import pad

import runs
from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.config import TrainerConfig
from trpo_lm.core.divergences import categorical_kl
from trpo_lm.core.fisher import softmax_curvature
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm import loading
from trpo_lm.lm.examination import (
    a_token_can_be_sampled,
    disagreement,
    every_position_has_logits,
    examination,
    examine,
    future_is_unseen,
    longest_text_fits,
    rows_agree,
)
from trpo_lm.lm.objective import head_curvature
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.training.metrics import check_old_policy
from trpo_lm.training.ranks import Ranks
from trpo_lm.training.stages import Stages
from trpo_lm.training.trainer import Trainer

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
FEW = {k: v for k, v in SIZE.items() if k != "max_position_embeddings"}


def make(name, config, **options):
    """Return a random model of a class of transformers."""
    options = {**tiny.ENDS, "vocab_size": 40, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, name)(getattr(transformers, config)(**options))
    return made.eval()


GOOD = {
    "gpt2": lambda: make("GPT2LMHeadModel", "GPT2Config", **GPT),
    "llama": lambda: make("LlamaForCausalLM", "LlamaConfig", **SIZE),
    "gemma2": lambda: make(
        "Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=2, head_dim=16, **SIZE
    ),
    "opt": lambda: make("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32,
                        **{k: v for k, v in SIZE.items() if k != "intermediate_size"}),
    "bloom": lambda: make("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=2),
    "falcon": lambda: make("FalconForCausalLM", "FalconConfig", hidden_size=32,
                           num_hidden_layers=2, num_attention_heads=2),
    "mixtral": lambda: make("MixtralForCausalLM", "MixtralConfig", num_key_value_heads=2,
                            num_local_experts=4, **SIZE),
    "mamba": lambda: make("MambaForCausalLM", "MambaConfig", hidden_size=32, num_hidden_layers=2,
                          state_size=4),
    "bert as a decoder": lambda: make("BertLMHeadModel", "BertConfig", is_decoder=True, **SIZE),
}  # fmt: skip
PADDING = {  # other logits for padded rows
    "rwkv": lambda: make("RwkvForCausalLM", "RwkvConfig", attention_hidden_size=32, **FEW),
    "bart's decoder": lambda: make("BartForCausalLM", "BartConfig", **BART),
    "roberta's positions": lambda: make(
        "RobertaForCausalLM", "RobertaConfig", is_decoder=True, **{**SIZE, "pad_token_id": 1}
    ),
}
FUTURE = {
    "bert": lambda: make("BertLMHeadModel", "BertConfig", **SIZE),
    "masked": lambda: make("BertForMaskedLM", "BertConfig", **SIZE),
    "xlnet": lambda: make("XLNetLMHeadModel", "XLNetConfig", d_model=32, n_layer=2, n_head=2,
                          d_inner=48),
}  # fmt: skip
OTHERS = {
    "t5": lambda: make("T5ForConditionalGeneration", "T5Config", **T5),
    "bart": lambda: make("BartForConditionalGeneration", "BartConfig", **BART),
    "headless": lambda: make("LlamaModel", "LlamaConfig", **SIZE),
    "classifier": lambda: make("LlamaForSequenceClassification", "LlamaConfig", **SIZE),
    "encoder's classifier": lambda: make("BertForSequenceClassification", "BertConfig", **SIZE),
    "tagger": lambda: make("LlamaForTokenClassification", "LlamaConfig", **SIZE),
    "masked": FUTURE["masked"],
}
REWARDS = {
    "causal": GOOD["gpt2"], "tagger": OTHERS["tagger"], "masked": OTHERS["masked"],
    "headless": OTHERS["headless"], "t5": OTHERS["t5"],
}  # fmt: skip


# ---- passes that must be possible ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_B41_a_model_that_cannot_be_sampled_from_is_refused(dtype):
    """What `generate` makes for XLNet is in float32 whatever its weights are in."""
    model = FUTURE["xlnet"]().to(dtype)
    every_position_has_logits(model)
    if dtype == torch.float32:
        examine(a_token_can_be_sampled, model)
        return
    with pytest.raises(TrpoLMError, match="'A text can be continued' ended in RuntimeError"):
        examine(a_token_can_be_sampled, model)


@pytest.mark.parametrize("by", ["name", "a pass"])
def test_B41_a_row_beyond_the_limit_of_a_model_is_refused(tmp_path, monkeypatch, by):
    """MPT's positions end at `max_seq_len`; beyond them a rollout ended raw."""
    if by == "a pass":
        monkeypatch.setattr(loading, "CONTEXTS", ())
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "vocab_size": tiny.V}
    model = make("MptForCausalLM", "MptConfig", **sizes)
    runs.trainer(tmp_path / "short", model=copy.deepcopy(model)).train()
    with pytest.raises(TrpoLMError, match=r"only 59 fit|cannot read 66 tokens, the longest"):
        runs.trainer(tmp_path / "long", model=model, data=["w1", "w1 w2 w3 w4 w5 " * 12])


@pytest.mark.parametrize("kind, shares", [("mpt", False), ("bloom", True), ("opt", True)])
def test_B08_padding_between_the_tokens_of_a_row_moves_none_of_them(kind, shares):
    """MPT's attention falls with the distance in the row; BLOOM and OPT count real tokens."""
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": tiny.V}
    model = GOOD[kind]() if shares else make("MptForCausalLM", "MptConfig", **sizes)
    assert Policy(model).shares_prefixes is shares


# ---- passes that must agree ----


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_B08_families_that_pad_and_look_back_pass(kind, dtype):
    model = GOOD[kind]().to(dtype)
    for check in (every_position_has_logits, rows_agree, future_is_unseen):
        check(model)


@pytest.mark.parametrize("kind", PADDING)
def test_B08_a_model_that_reads_padding_is_refused_by_name(kind):
    model = PADDING[kind]()
    future_is_unseen(model)
    with pytest.raises(TrpoLMError, match=f"{type(model).__name__} gives a text other logits"):
        Policy(model)


@pytest.mark.parametrize("kind", FUTURE)
def test_B08_a_model_that_sees_the_future_is_refused_by_name(kind):
    with pytest.raises(TrpoLMError, match=r"sees the future.*%"):
        future_is_unseen(FUTURE[kind]())
    with pytest.raises(TrpoLMError, match=r"sees the future|other logits") as error:
        Policy(FUTURE[kind]())
    assert error.value.where == "model"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_B08_what_was_drawn_is_what_is_measured(kind, temperature):
    policy = tiny.policy(kind, spread=0.3, temperature=temperature)
    batch = tiny.batch(policy, prompts=["w1 w2", "w4"], each=6)
    drawn, mask = batch.rollout.drawn_logprobs, batch.rollout.action_mask
    assert drawn.shape == (8, mask.shape[1])
    measured = batch.rollout.padded(batch.old_logprobs)[:8]
    torch.testing.assert_close(drawn[mask[:8]], measured[mask[:8]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_B08_sampling_from_another_distribution_ends_in_update_1(kind):
    policy, ranks = tiny.policy(kind), Ranks(60.0, Stages())
    check_old_policy(policy, tiny.batch(policy), ranks)
    forward = policy.base.forward

    def other(*inputs, **options):
        out = forward(*inputs, **options)
        out.logits = out.logits + 2.0 * torch.arange(out.logits.shape[-1]).remainder(2)
        return out

    policy.base.forward = other  # the policy itself runs the layers below
    with pytest.raises(RunFault, match=r"nats from those measured.*first update"):
        check_old_policy(policy, tiny.batch(policy), ranks)


def test_two_outputs_are_compared_in_units_of_their_spread():
    a = torch.randn(5, 9)
    b = a + 1e-3 * torch.randn(5, 9)
    near = disagreement(b, a)
    assert 1e-4 < near < 1e-2 and disagreement(a, a) == 0
    assert disagreement(b + 0, a + 1e3) > 1 > near
    assert disagreement(1e6 * b, 1e6 * a) == pytest.approx(near, rel=1e-3)
    impossible = torch.zeros(9).index_fill(0, torch.tensor(3), -torch.inf)
    assert disagreement(a + impossible, a + impossible) == 0
    assert disagreement(b + impossible, a + impossible) < 1e-2
    assert not disagreement(a, a + impossible) < 1e9
    assert not disagreement(a * torch.nan, a) < 1e9


# ---- what is no policy ----


@pytest.mark.parametrize("kind", OTHERS)
def test_B34_what_is_no_causal_lm_is_refused_with_what_is_needed(kind):
    model = OTHERS[kind]()
    with pytest.raises(TrpoLMError, match=type(model).__name__) as error:
        Policy(model)
    assert error.value.where == "model"
    assert "causal (decoder-only)" in error.value.hint or "another family" in error.value.hint


@pytest.mark.parametrize("kind", ["t5", "encoder's classifier", "classifier", "masked"])
def test_B34_so_it_is_by_name(kind, tmp_path):
    OTHERS[kind]().save_pretrained(tmp_path)
    with pytest.raises(TrpoLMError) as error:
        Policy(str(tmp_path))
    assert error.value.where == "model"


# ---- adapters ----


PROMPT = {
    "prompt tuning": PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2),
    "prefix tuning": PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=2),
    "p-tuning": PromptEncoderConfig("CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
}


@pytest.mark.parametrize("kind", PROMPT)
def test_B36_an_adapter_without_a_gradient_is_refused(kind):
    with pytest.raises(TrpoLMError, match=r"no gradient reaches.*peft_config"):
        Policy(tiny.build("llama"), PROMPT[kind])


@pytest.mark.parametrize("config", [{"r": 4}, {"peft_type": "LORA"}, "lora", 4])
def test_B36_what_is_no_adapter_config_is_refused(config):
    with pytest.raises(TrpoLMError, match=r"does not fit.*peft_config") as error:
        Policy(tiny.build("llama"), config)
    assert "PeftConfig" in error.value.hint


LINEAR = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "lora": lambda: tiny.lora(),
    "gaussian": lambda: tiny.lora(init_lora_weights="gaussian"),
    "dora": lambda: tiny.lora(use_dora=True),
    "rank-stabilised": lambda: tiny.lora(r=4, use_rslora=True),
    "biases": lambda: tiny.lora(bias="all", target_modules=["c_attn"]),
    "own head": lambda: tiny.lora(target_modules=LINEAR, modules_to_save=["lm_head"]),
    "ia3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=LINEAR, feedforward_modules=["down_proj"]
    ),
    "loha": lambda: LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=LINEAR),
    "lokr": lambda: LoKrConfig(task_type="CAUSAL_LM", r=2, target_modules=LINEAR),
    "oft": lambda: OFTConfig(task_type="CAUSAL_LM", oft_block_size=4, target_modules=LINEAR),
}


def base(kind):
    return tiny.build("gpt2" if kind == "biases" else "llama")


@pytest.mark.parametrize("kind", KINDS)
def test_B16_a_fresh_adapter_is_the_identity_and_loads_in_plain_peft(kind, tmp_path):
    policy = Policy(base(kind), KINDS[kind]())
    batch = tiny.batch(policy)
    assert float(batch.ref_kl.abs().max()) <= 1e-6
    tiny.perturb(policy, 0.1)
    with torch.no_grad():
        moved = tiny.own_logits(policy, batch.rollout)
        with policy.reference():
            reference = tiny.own_logits(policy, batch.rollout)
        policy.save(tmp_path)
        plain, loaded = base(kind).eval(), base(kind)
        saved = PeftModel.from_pretrained(loaded, str(tmp_path)).eval()
        policy.base = plain
        torch.testing.assert_close(reference, tiny.own_logits(policy, batch.rollout))
        policy.base = saved.get_base_model()
        torch.testing.assert_close(moved, tiny.own_logits(policy, batch.rollout))
    assert not torch.allclose(moved, reference, atol=1e-3)


@pytest.mark.parametrize("start", [False, "pissa", "pissa_niter_4", "olora"])
def test_B16_an_adapter_that_begins_elsewhere_is_refused(start):
    with pytest.raises(TrpoLMError, match=r"fresh adapter changes the model.*peft_config") as error:
        Policy(tiny.build("llama"), tiny.lora(init_lora_weights=start))
    assert "init_lora_weights" in error.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_B17_all_of_an_adapter_that_came_with_the_model_is_trained(kind, tmp_path):
    get_peft_model(base(kind), KINDS[kind]()).save_pretrained(str(tmp_path))

    def trained(**options):
        model = PeftModel.from_pretrained(base(kind), str(tmp_path), **options)
        before = {n for n, p in model.named_parameters() if p.requires_grad}
        policy = Policy(model)
        return before, {n for n, p in policy.model.named_parameters() if p.requires_grad}

    before, names = trained()
    assert before < names == trained(is_trainable=True)[0]


# ---- logits of -inf ----

SUPPRESSED = [3, 7, 11]


def suppressed(kind):
    """Return a model that never says some words, by a bias of the head or behind it."""
    model, wall = tiny.build(kind), torch.zeros(tiny.V)
    wall[SUPPRESSED] = -torch.inf
    if kind == "llama":
        model.lm_head.bias = torch.nn.Parameter(wall)
        return model
    forward = model.forward

    def walled(*inputs, **options):
        out = forward(*inputs, **options)
        out.logits = out.logits + wall.to(out.logits)
        return out

    model.forward = walled
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_B60_impossible_tokens_are_legal_and_every_number_is_right(kind, temperature):
    policy = tiny.policy(model=suppressed(kind), spread=0.2, temperature=temperature)
    assert (policy.head is None) == (kind != "llama") and policy.shares_prefixes
    assert policy.exact_products == ["retained", "forward"]
    batch = tiny.batch(policy, each=4)
    assert not torch.isin(batch.actions, torch.tensor(SUPPRESSED)).any()
    allowed = [i for i in range(tiny.V) if i not in SUPPRESSED]

    def possible():
        return tiny.own_logits(policy, batch.rollout)[:, allowed].double().log_softmax(-1)

    with torch.no_grad():
        old = possible()
        with policy.reference():
            ref = possible()
        torch.testing.assert_close(
            batch.ref_kl.double(), categorical_kl(old=old, new=ref), atol=1e-6, rtol=1e-3
        )
        entropy = -(old.exp() * old).sum(-1)
        torch.testing.assert_close(batch.entropy.double(), entropy, atol=1e-5, rtol=1e-4)
        tangent = torch.randn_like(batch.old_features).nan_to_num()
        found = head_curvature(policy, batch.old_features)(tangent)
        z = policy.head_jvp(tangent)[:, allowed]
        H = pad(softmax_curvature(old)(z.double()), (0, tiny.V - len(allowed)))
        at = torch.tensor(allowed + SUPPRESSED).argsort()
        expected = policy.head_vjp(H[:, at].to(z))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    objective = tiny.objective(policy, batch)
    g, b = objective.gradients(reference=True)
    F = objective.fisher(10**6)
    assert all(torch.isfinite(x).all() for x in (g, b, F(g.sum(0)), objective.scores()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("algorithm", [TRPO(max_kl=0.05), PPO(learning_rate=0.02)])
def test_B60_both_algorithms_move_a_model_with_impossible_tokens(kind, algorithm):
    policy = tiny.policy(model=suppressed(kind))
    batch = tiny.batch(policy, each=6)
    state = algorithm.init_state(policy.parameters)
    _, row = algorithm.update(tiny.objective(policy, batch), state)
    moved = tiny.objective(policy, batch).measure()
    assert row.get("line_search/accepted", True)
    assert 0 < moved.kl < 1 and moved.ref_kl >= 0 and moved.kl_max < 10
    again = tiny.batch(policy, each=6, seed=1)
    assert torch.isfinite(again.ref_kl).all() and float(again.ref_kl.max()) > 0
    assert not torch.isin(again.actions, torch.tensor(SUPPRESSED)).any()


# ---- reward models ----


@pytest.mark.parametrize("kind", REWARDS)
def test_B37_a_model_without_a_row_of_logits_for_a_text_is_no_reward_model(kind):
    model = REWARDS[kind]()
    with pytest.raises(TrpoLMError, match=f"{type(model).__name__}.* is no reward model") as error:
        RewardModel(model, rm.make_tokenizer())
    assert error.value.where == "reward_funcs"


BEHIND = {
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig"),
    "camembert": ("CamembertForSequenceClassification", "CamembertConfig"),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig"),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig"),
    "bert": ("BertForSequenceClassification", "BertConfig"),
}


@pytest.mark.parametrize("kind", BEHIND)
def test_B35_the_longest_text_is_scored_wherever_positions_begin(kind):
    model = make(*BEHIND[kind], **{**SIZE, "max_position_embeddings": 24, "pad_token_id": 1})
    reward = RewardModel(model, rm.make_tokenizer())
    assert reward.max_length == (24 if kind == "bert" else 22)
    longest_text_fits(reward, 10**6)
    assert len(reward(["w1 " * 40], ["w2"])) == 1


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_B35_a_table_of_positions_that_is_too_short_is_found_at_the_start(kind):
    model = rm.make_model(kind)
    for name in ("max_position_embeddings", "n_positions"):
        if hasattr(model.config, name):
            setattr(model.config, name, 99)
    if kind == "bert":  # else the buffer of positions is too short first
        model.bert.embeddings.register_buffer("position_ids", torch.arange(99)[None])
    reward = RewardModel(model, rm.make_tokenizer())
    options = {"processing_class": tiny.tokenizer(), "peft_config": tiny.lora()}
    options["train_dataset"] = ["w1 w2"]
    args = TrainerConfig(max_completion_length=2, updates=1)
    assert Trainer.examine(tiny.build(), reward, args=args, **options).error is None
    args = TrainerConfig(max_completion_length=20, updates=1)
    error = Trainer.examine(tiny.build(), reward, args=args, **options).error
    assert "cannot score a text of 8" in str(error) and "model_max_length" in error.hint


# ---- tokens ----


def grown(**options):
    """Return a tokenizer with a token that no model of the tests has an embedding for."""
    tok = tiny.tokenizer()
    tok.add_tokens("new")
    tok.add_special_tokens(options)
    return tok


@pytest.mark.parametrize("case", ["row", "held out", "pad", "eos"])
def test_B30_a_token_without_an_embedding_is_named(case):
    special = {"pad": {"pad_token": "<new pad>"}, "eos": {"eos_token": "<new eos>"}}.get(case, {})
    word = {"row": "new", "held out": "new"}.get(case, f"<new {case}>")
    data = {"row": (["w1", "w2 new"], None), "held out": (["w1"], ["w1", "w2 new"])}
    train, held_out = data.get(case, (["w1"], None))
    with pytest.raises(TrpoLMError, match=f"token '{word}' has the id .* for {tiny.V} ") as error:
        Trainer(
            tiny.build(), lambda completions: [0.0] * len(completions), train_dataset=train,
            args=TrainerConfig(prompts_per_update=2), eval_dataset=held_out,
            processing_class=grown(**special), peft_config=tiny.lora(),
        )  # fmt: skip
    assert error.value.where == ("prompt in row 1" if word == "new" else f"{case} token")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("talks", [False, True])
def test_B30_so_is_one_of_a_reward_model(kind, talks):
    tok = rm.make_tokenizer(template=rm.TEMPLATE)
    tok.add_tokens([f"added{i}" for i in range(30)])
    reward = RewardModel(rm.make_model(kind), tok)

    def prompt(text):
        return [{"role": "user", "content": text}] if talks else text

    assert reward.check_prompts([prompt("w1 added1")], {}) > 2
    with pytest.raises(TrpoLMError, match=r"'added29' has the id .* for 64 .*row 1"):
        reward.check_prompts([prompt("w1"), prompt("w2 added29")], {})


# ---- the record ----


def test_the_examination_prints_what_was_checked_with_yes_or_no(tmp_path):
    def never(completions):
        raise AssertionError("nothing is generated")

    def checked(model, reward):
        folder = str(tmp_path / "run")
        return Trainer.examine(
            model, reward, train_dataset=["w1 w2"], args=TrainerConfig(output_dir=folder),
            processing_class=tiny.tokenizer(), peft_config=tiny.lora(),
        )  # fmt: skip

    good = checked(tiny.build(), [never, RewardModel(rm.make_model(), rm.make_tokenizer())])
    assert good.error is None and not list((tmp_path / "run").iterdir())
    lines = str(good).splitlines()
    assert lines[0] == "examination" and f"{len(good.findings)} checks in" in lines[-1]
    assert all(line.startswith("  yes ") for line in lines[1:-1]) and len(lines) > 12
    capped = checked(tiny.build("gemma2", final_logit_softcapping=2.0), never)
    assert capped.error is None and "  no " in str(capped) and "behind the output" in str(capped)
    bad = checked(OTHERS["headless"](), never)
    assert isinstance(bad.error, TrpoLMError) and "rest was not checked" in str(bad)
    assert str(bad).splitlines()[-2].startswith("  no ")


def test_records_nest_and_nothing_is_kept_outside_of_one():
    def holds():
        """It holds."""

    def lacks():
        """It lacks."""
        return "why"

    examine(holds)
    with examination() as outer:
        examine(holds, of="one")
        with examination() as inner:
            assert examine(lacks) == "why"
    assert inner is outer
    assert [(f.checked, f.fault) for f in outer.findings] == [
        ("It holds (one)", None), ("It lacks", "why"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_examination_of_a_small_model_is_cheap(kind):
    tiny.policy(kind)  # what is imported once
    with examination() as examined:
        tiny.policy(kind)
    assert len(examined.findings) == 10 and examined.seconds < 2.0
