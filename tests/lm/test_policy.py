"""The policy against the model's own logits, its reference, and the models it must cope with."""

import re

import pytest
import tiny
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

import trpo_lm.lm.policy
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.config import ModelSettings
from trpo_lm.core.fisher import hessian_operator, twice_differentiable
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.loading import linear_module_names, load_model
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.rollout import micro_batches

WIDE = 10**6
KINDS = ["gpt2", "llama", "qwen2", "neox", "gemma2"]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def update(policy, batch, **settings):
    algorithm = TRPO(**settings)
    return algorithm.update(tiny.objective(policy, batch), algorithm.init_state(policy.parameters))[
        1
    ]


def inputs(batch):
    return batch.rollout.model_inputs(torch.arange(len(batch.rollout)))


# ---- the distribution ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_features_are_the_models_own(kind, temperature):
    policy = tiny.policy(kind, spread=0.3, temperature=temperature)
    batch = tiny.batch(policy, each=1)
    assert (policy.head is None) == (kind == "gemma2")
    with torch.no_grad():
        expected = tiny.own_logits(policy, batch.rollout).float().log_softmax(-1)
        logprobs = policy.logprobs(policy.features(*inputs(batch)))
    assert logprobs.dtype == torch.float32
    assert float((logprobs - expected).abs().max()) < 2e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tied_and_untied_heads(kind, tied):
    policy = tiny.policy(model=tiny.build(kind, tie_word_embeddings=tied), spread=0.3)
    embedding = policy.base.get_input_embeddings().weight
    assert (policy.head.weight is embedding) == tied
    batch = tiny.batch(policy, each=1)
    with torch.no_grad():
        expected = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
        logprobs = policy.logprobs(policy.features(*inputs(batch)))
    assert float((logprobs - expected).abs().max()) < 2e-5
    update(policy, batch, max_kl=0.01)


def test_head_jvp_and_vjp_are_the_tempered_head_and_its_transpose():
    policy = tiny.policy("llama", dtype=torch.float64, temperature=0.7)
    x = torch.randn(3, 8, dtype=torch.float64)
    z = torch.randn(3, tiny.V, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    logits = policy.head(leaf) / 0.7
    Jx, JTz = policy.head_jvp(x), policy.head_vjp(z)
    torch.testing.assert_close(Jx, logits.detach())
    torch.testing.assert_close(JTz, torch.autograd.grad(logits, leaf, z)[0])
    assert float((Jx * z).sum()) == pytest.approx(float((x * JTz).sum()))


def test_a_bias_of_the_head_is_part_of_the_policy_and_not_of_its_change():
    model = tiny.build("llama", dtype=torch.float64)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(tiny.V, dtype=torch.float64))
    policy = tiny.policy(model=model, spread=0.3)
    x = torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(
        policy.logprobs(x), (x @ model.lm_head.weight.T + model.lm_head.bias).log_softmax(-1)
    )
    torch.testing.assert_close(policy.head_jvp(x), x @ model.lm_head.weight.T)


def test_cotangents_do_not_depend_on_chunks(monkeypatch):
    policy = tiny.policy(dtype=torch.float64)
    x = torch.randn(7, 8, dtype=torch.float64)
    weight = torch.randn(7, tiny.V, dtype=torch.float64)

    def slopes(logprobs, s):
        p, w = logprobs.exp(), weight[s]
        return [w - p * w.sum(-1, keepdim=True), p * (w - (p * w).sum(-1, keepdim=True))]

    leaf = x.clone().requires_grad_()
    logprobs = policy.logprobs(leaf)
    values = [(logprobs * weight).sum(), (logprobs.exp() * weight).sum()]
    expected = [torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in values]
    for chunk in (1, 3 * tiny.V, 1 << 21):
        monkeypatch.setattr(trpo_lm.lm.policy, "CHUNK_STATES", 1)
        monkeypatch.setattr(trpo_lm.lm.policy, "CHUNK_ELEMENTS", chunk)
        sizes = [s.stop - s.start for s in policy.chunks(7)]
        assert sum(sizes) == 7 and max(sizes) == max(1, min(7, chunk // tiny.V))
        for cotangent, gradient in zip(policy.cotangents(x, slopes), expected, strict=True):
            torch.testing.assert_close(cotangent, gradient)


# ---- the reference ----


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_K05_the_reference_of_a_fresh_adapter_is_the_model_without_it(kind):
    policy = tiny.policy(kind)
    batch = tiny.batch(policy)
    assert float(batch.ref_kl.abs().max()) <= 1e-7
    tiny.perturb(policy, 0.3)
    with torch.no_grad():
        with policy.model.disable_adapter():
            disabled = tiny.own_logits(policy, batch.rollout)
        with policy.reference():
            reference = tiny.own_logits(policy, batch.rollout)
        now = tiny.own_logits(policy, batch.rollout)
    assert torch.equal(disabled, reference) and not torch.allclose(now, reference, atol=0.1)


def test_an_adapter_that_came_with_the_model_is_the_reference(tmp_path):
    first = tiny.policy(spread=0.3)
    first.save(tmp_path / "adapter")
    came = PeftModel.from_pretrained(tiny.build(), str(tmp_path / "adapter"))  # not trainable
    policy = Policy(came)
    assert len(policy.parameters) == len(first.parameters)
    trainable = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    batch = tiny.batch(policy)
    with torch.no_grad():
        came_logits = tiny.own_logits(first, batch.rollout)
        tiny.perturb(policy, 0.3, seed=4)
        with policy.reference():
            assert torch.allclose(tiny.own_logits(policy, batch.rollout), came_logits, atol=1e-5)
        with policy.model.disable_adapter():
            assert not torch.allclose(tiny.own_logits(policy, batch.rollout), came_logits, atol=0.1)
    with pytest.raises(TrpoLMError, match="already has an adapter"):
        Policy(came, tiny.lora())


@pytest.mark.parametrize("fresh", [True, False])
def test_the_reference_gives_the_policy_back_bit_for_bit_also_after_an_exception(fresh):
    policy = Policy(
        tiny.build() if fresh else get_peft_model(tiny.build(), tiny.lora(init_lora_weights=False))
    )
    tiny.perturb(policy, 0.3)
    before, probe = policy.parameters.checksum(), policy.probe_inputs()
    moved = policy.base(**probe).logits
    with policy.reference():
        reference = policy.base(**probe).logits
        assert (policy.parameters.checksum() == before) == fresh  # switched off, or swapped
    assert not torch.allclose(reference, moved)
    assert policy.parameters.checksum() == before
    assert torch.equal(policy.base(**probe).logits, moved)
    assert all(p.requires_grad for p in policy.parameters.tensors)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert policy.parameters.checksum() == before


def test_saved_adapters_load_with_peft_alone(tmp_path):
    policy = tiny.policy("llama", spread=0.3)
    batch = tiny.batch(policy, each=1)
    policy.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))
    other = PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path)).eval()
    expected = tiny.own_logits(policy, batch.rollout).detach()
    policy.base = other.get_base_model()
    torch.testing.assert_close(tiny.own_logits(policy, batch.rollout).detach(), expected)


def test_models_load_by_folder_and_so_do_adapters(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    policy = Policy(str(tmp_path / "base"), tiny.lora())
    tiny.perturb(policy, 0.3)
    policy.save(tmp_path / "adapter")
    again = Policy(str(tmp_path / "adapter"))
    assert again.parameters.checksum() == policy.parameters.checksum()
    assert (
        load_model(str(tmp_path / "base"), ModelSettings(dtype="bfloat16")).dtype == torch.bfloat16
    )


def test_C07_a_model_that_is_not_there(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        TrpoLMError, match="'/nowhere/model' not found locally and HF_HUB_OFFLINE=1"
    ):
        Policy("/nowhere/model")


# ---- adapters ----


def test_the_initial_adapter_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(0)
    one = tiny.policy(seed=3).parameters.checksum()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    two = tiny.policy(model=tiny.build(seed=3), seed=3).parameters.checksum()
    assert torch.equal(state, torch.get_rng_state())
    assert one == two != tiny.policy(seed=4).parameters.checksum()


def test_only_the_adapter_is_trainable_and_dropout_is_off():
    model = tiny.build(resid_pdrop=0.5).train()
    policy = tiny.policy(model=model, peft=tiny.lora(lora_dropout=0.5))
    for name, p in policy.model.named_parameters():
        assert p.requires_grad == ("lora_" in name), name
    assert not any(m.training for m in policy.model.modules())
    batch = tiny.batch(policy)
    a, b = (policy.features(*inputs(batch)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_N10_wrong_target_modules_are_answered_with_the_right_ones(kind):
    with pytest.raises(TrpoLMError) as error:
        tiny.policy(kind, peft=tiny.lora(target_modules=["query"]))
    for name in {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj", "lm_head"]}[kind]:
        assert name in str(error.value)
    assert error.value.where == "peft_config" and "query" in str(error.value)


def test_linear_modules_are_found_in_both_families():
    names = {n.split(".")[-1] for n in linear_module_names(tiny.build("gpt2"))}
    assert names == {"c_attn", "c_proj", "c_fc", "lm_head"}


def test_N10_an_adapter_without_trainable_parameters():
    frozen = get_peft_model(tiny.build(), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    frozen.requires_grad_(False)
    with pytest.raises(TrpoLMError, match=re.escape("no trainable parameters")) as error:
        Policy(frozen)
    assert "c_attn" in str(error.value)


@pytest.mark.parametrize("case", ["soft-capped", "lora on lm_head"])
def test_N10_where_the_head_is_not_a_frozen_layer_logits_are_the_features(case):
    """The same gradients and Fisher products as plain autograd gives."""
    if case == "soft-capped":
        model = tiny.build("gemma2", final_logit_softcapping=2.0)
        policy = tiny.policy(model=model, spread=0.3, peft=tiny.lora(target_modules=["q_proj"]))
    else:
        policy = tiny.policy("llama", spread=0.3, temperature=0.8,
                             peft=tiny.lora(target_modules=["q_proj", "lm_head"]))  # fmt: skip
    assert policy.head is None
    batch = tiny.batch(policy, each=1, length=3)
    assert batch.hidden.shape == (len(batch.actions), 8)
    assert batch.old_features.shape == (len(batch.actions), tiny.V)
    with policy.reference(), torch.no_grad():
        ref = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
    N, theta = float(len(batch.rollout)), policy.parameters
    with twice_differentiable():
        new = tiny.own_logits(policy, batch.rollout).log_softmax(-1)
    logprob = new.gather(-1, batch.actions[:, None])[:, 0]
    expected = theta.gradient((logprob * tiny.advantages(batch)).sum() / N, retain=True)
    g, b = (x.sum(0) / N for x in tiny.objective(policy, batch).gradients(reference=True))
    assert relative(g, expected) < 1e-4 and float(b.norm()) > 0
    old = new.detach()
    D = (old.exp() * (old - new)).sum() / N
    H = hessian_operator(theta, D)
    F = tiny.objective(policy, batch).fisher(WIDE)
    v = torch.randn(theta.size)
    assert relative(F(v), H(v)) < 1e-4
    ref_kl = (old.exp() * (old - ref)).sum(-1)
    torch.testing.assert_close(batch.ref_kl, ref_kl, rtol=1e-4, atol=1e-6)
    row = update(policy, batch, max_kl=0.01)
    assert row["line_search/accepted"] and row["trust_region/kl"] <= 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_takes_a_step(kind):
    policy = tiny.policy(kind, peft=tiny.lora(r=2))
    batch = tiny.batch(policy, each=6, micro_batch_tokens=10**6)
    row = update(policy, batch, max_kl=0.01)
    assert row["line_search/accepted"]
    assert 0 < tiny.objective(policy, batch).measure().kl <= 0.01


# ---- faults and options ----


def test_K09_a_nan_weight_is_refused_at_the_start():
    model = tiny.build()
    model.transformer.h[0].mlp.c_fc.weight.data[0] = torch.nan
    with pytest.raises(RunFault, match="non-finite logits at layer output"):
        tiny.policy(model=model)


@pytest.mark.parametrize("parts", ["offloaded", "partly offloaded"])
def test_a_model_that_is_split_across_devices_or_offloaded_is_refused(parts):
    model = tiny.build("llama")
    for layer in model.modules() if parts == "offloaded" else [model.model.layers[1]]:
        layer.to("meta")  # where accelerate's offloading to cpu or disk leaves weights
    with pytest.raises(TrpoLMError, match=r"weights are on .*meta") as error:
        tiny.policy(model=model)
    assert error.value.where == "device_map" and "load_in_4bit" in error.value.hint


def test_N09_reentrant_checkpointing_is_refused_with_a_hint():
    model = tiny.build("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(TrpoLMError, match="use_reentrant") as error:
        tiny.policy(model=model)
    assert "gradient_checkpointing=True" in str(error.value)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("asked", ["policy", "model"])
def test_gradient_checkpointing_recomputes_and_changes_no_number(kind, asked):
    plain = tiny.policy(kind, spread=0.3)
    model = tiny.build(kind)
    if asked == "model":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = tiny.policy(model=model, spread=0.3, gradient_checkpointing=asked == "policy")
    batch, same = tiny.batch(plain), tiny.batch(policy)
    assert torch.equal(batch.old_logprobs, same.old_logprobs)
    passes = []
    layer = next(m for m in policy.base.modules() if type(m).__name__.endswith("MLP"))
    layer.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    one = tiny.objective(plain, batch).gradients(reference=True)
    two = tiny.objective(policy, same).gradients(reference=True)
    groups = same.rollout.groups % 2
    parts = sum(
        len(list(micro_batches(policy, same.rollout, "gradient", (groups == h).nonzero()[:, 0])))
        for h in range(2)
    )
    assert len(passes) > parts, "activations were kept, not recomputed"
    torch.testing.assert_close(one[0], two[0])
    torch.testing.assert_close(one[1], two[1])
    passes.clear()
    F = tiny.objective(policy, same).fisher(WIDE)
    built = len(passes)
    v = torch.ones(policy.parameters.size)
    torch.testing.assert_close(F(v), tiny.objective(plain, batch).fisher(WIDE)(v))
    assert len(passes) == built, "a product runs no layer again"
    row = update(policy, same, max_kl=0.01)
    assert row["line_search/accepted"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_K06_a_bfloat16_base_with_float32_adapters_takes_a_step(kind):
    policy = tiny.policy(model=tiny.build(kind, dtype=torch.bfloat16), peft=tiny.lora(r=2))
    assert all(p.dtype == torch.float32 for p in policy.parameters.tensors)
    assert policy.base.dtype == torch.bfloat16 or kind == "gpt2"
    batch = tiny.batch(policy, each=6, micro_batch_tokens=10**6)
    assert batch.old_logprobs.dtype == torch.float32
    assert bool((batch.ref_kl >= 0).all()) and float(batch.ref_kl.max()) <= 1e-7
    row = update(policy, batch, max_kl=0.05)
    assert row["line_search/accepted"] and 0 < row["trust_region/kl"] <= 0.05
    moved = tiny.objective(policy, batch).measure()
    assert 0 <= moved.kl <= 0.05 * (1 + 1e-3)


def test_products_in_bfloat16_are_near_those_in_float32():
    v, products = None, []
    for dtype in (torch.float32, torch.bfloat16):
        rounded = tiny.build("llama", initializer_range=0.1).bfloat16().to(dtype)  # same weights
        policy = tiny.policy(model=rounded, spread=0.1)
        if not products:
            batch = tiny.batch(policy, each=4)
            v = torch.randn(policy.parameters.size)
        products.append(tiny.objective(policy, batch).fisher(WIDE)(v))
    assert relative(products[1], products[0]) < 0.03
