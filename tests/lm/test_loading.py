"""Models by name: precision, quantisation, attention, the adapter, and incomplete files."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from peft import OFTConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    ProcessorMixin,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from trpo_lm.config import ModelSettings
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm import loading
from trpo_lm.lm.loading import (
    as_tokenizer,
    default_lora,
    is_quantized,
    load_dtype,
    load_model,
    with_adapter,
)
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.training.plan import longest_prompt

KINDS = ["gpt2", "llama", "qwen2", "neox", "gemma2"]
BITS = ["load_in_4bit", "load_in_8bit"]
CPU = torch.device("cpu")
SMALL = {"vocab_size": tiny.V, "n_embd": 8, "n_layer": 1, "n_positions": 32}


def saved(folder, kind="llama", **options):
    model = tiny.build(kind, **options).eval()
    model.save_pretrained(folder)
    return model, str(folder)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def gradient(policy, batch):
    """The gradient of all kept features, weighted at random."""
    ids, mask, states = batch.rollout.model_inputs(torch.arange(len(batch.rollout)))
    features = policy.features(ids, mask, states)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    return policy.parameters.gradient(features, cotangent=noise.to(features.dtype))


# ---- precision ----


def test_auto_is_bfloat16_on_gpus_that_have_it_and_float32_elsewhere(monkeypatch):
    assert load_dtype("auto", CPU) == torch.float32
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)  # noqa: B023
        half = load_dtype("auto", torch.device("cuda")) == torch.bfloat16
        assert half == has
    for name in ("float32", "bfloat16", "float16"):
        assert load_dtype(name, torch.device("cuda")) == getattr(torch, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_has_the_dtype_and_the_adapter_is_float32(tmp_path, kind, dtype):
    model, folder = saved(tmp_path, kind)
    policy = Policy(folder, tiny.lora(), ModelSettings(dtype=dtype))
    frozen = {p.dtype for p in policy.model.parameters() if not p.requires_grad}
    assert frozen == {getattr(torch, dtype)}
    assert {p.dtype for p in policy.parameters.tensors} == {torch.float32}
    assert not policy.quantized
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = policy.base(input_ids=ids).logits.float()
        assert relative(logits, model(input_ids=ids).logits) < (1e-6 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_in_half_precision_are_near_those_in_float32_checkpointed_or_not(tmp_path, dtype):
    _, folder = saved(tmp_path, initializer_range=0.1)
    exact = Policy(folder, tiny.lora())
    tiny.perturb(exact, 0.3)
    batch = tiny.batch(exact)
    g = gradient(exact, batch)
    for checkpointing in (False, True):
        half = Policy(
            folder, tiny.lora(), ModelSettings(dtype=dtype), gradient_checkpointing=checkpointing
        )
        tiny.perturb(half, 0.3)
        assert relative(gradient(half, batch), g) < (0.1 if dtype == "bfloat16" else 0.02)


@pytest.mark.parametrize("adapted", [False, True])
def test_an_object_keeps_its_own_precision_and_settings_that_would_change_it_are_refused(adapted):
    def make():
        model = tiny.build("llama", dtype=torch.bfloat16)
        return get_peft_model(model, tiny.lora()) if adapted else model

    for dtype in ("auto", "bfloat16"):
        policy = Policy(make(), None, ModelSettings(dtype=dtype))
        assert policy.base.dtype == torch.bfloat16
    own = make().config._attn_implementation
    Policy(make(), None, ModelSettings(attn_implementation=own))
    for name, value in {
        "dtype": "float32", "attn_implementation": "eager", "load_in_4bit": True,
        "load_in_8bit": True,
    }.items():  # fmt: skip
        with pytest.raises(TrpoLMError, match="is an object, loaded already") as error:
            Policy(make(), None, ModelSettings(**{name: value}))
        assert error.value.where == name


# ---- attention ----


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attention_kernels_by_name(tmp_path, kind):
    _, folder = saved(tmp_path, kind)
    for name in ("eager", "sdpa"):
        model = load_model(folder, ModelSettings(attn_implementation=name))
        assert model.config._attn_implementation == name
    for name in ("nonsense", "flash_attention_2", "flash_attention_3"):
        with pytest.raises(TrpoLMError) as error:
            load_model(folder, ModelSettings(attn_implementation=name))
        assert error.value.where == "attn_implementation" and repr(name) in error.value.what
        assert "'eager'" in error.value.hint


# ---- quantised weights ----


def test_without_bitsandbytes_the_extra_is_named(tmp_path, monkeypatch):
    _, folder = saved(tmp_path)
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    for name in BITS:
        with pytest.raises(TrpoLMError, match="bitsandbytes is not installed") as error:
            load_model(folder, ModelSettings(**{name: True}))
        assert error.value.where == name and "trpo_lm[quantized]" in error.value.hint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_base_has_right_gradients_and_no_second_derivative(tmp_path, kind, bits):
    pytest.importorskip("bitsandbytes")
    model, folder = saved(tmp_path, kind)
    settings = ModelSettings(**{bits: True})
    peft = tiny.lora(r=2)
    policy = Policy(folder, peft, settings, device="cpu")
    assert (
        policy.quantized
        and policy.exact_products == []
        and set(policy.product_faults.values()) == {"the weights are quantised"}
    )
    assert {p.dtype for p in policy.parameters.tensors} == {torch.float32}
    plain = Policy(load_model(folder, settings, plain=True), peft)  # the same values, in float32
    assert not plain.quantized and plain.exact_products
    checkpointed = Policy(folder, peft, settings, gradient_checkpointing=True)
    for one in (policy, plain, checkpointed):
        tiny.perturb(one, 0.3)
    batch = tiny.batch(plain)
    g = gradient(policy, batch)
    assert relative(g, gradient(plain, batch)) < (1e-5 if bits == "load_in_4bit" else 0.1)
    assert torch.equal(gradient(checkpointed, batch), g)
    inputs = batch.rollout.model_inputs(torch.arange(2))
    assert 0 < policy.graph_bytes(*inputs) < 10 * plain.graph_bytes(*inputs)
    ids = torch.arange(8)[None]
    with torch.no_grad(), policy.reference():
        error = relative(policy.base(input_ids=ids).logits, model(input_ids=ids).logits)
    assert 1e-4 < error < (0.4 if bits == "load_in_4bit" else 0.1)  # small layers, large weights


@pytest.mark.parametrize("bits", BITS)
def test_model_objects_that_are_quantised_are_recognised(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    _, folder = saved(tmp_path)
    model = load_model(folder, ModelSettings(**{bits: True}))
    assert is_quantized(model) and Policy(model, tiny.lora()).quantized
    adapted = get_peft_model(load_model(folder, ModelSettings(**{bits: True})), tiny.lora())
    assert is_quantized(adapted) and Policy(adapted).quantized


class Packed(torch.Tensor):
    """A tensor of another class, as torchao and quanto use."""


@pytest.mark.parametrize("kind", ["integers", "one byte", "another class", "says so", "plain"])
def test_other_libraries_quantise_weights_in_their_own_way(kind):
    model = tiny.build("llama")
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.weight.data
    if kind == "integers":
        layer.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    elif kind == "one byte":
        layer.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    elif kind == "another class":
        layer.weight = torch.nn.Parameter(weight.as_subclass(Packed), requires_grad=False)
    elif kind == "says so":
        model.is_quantized = True
    assert is_quantized(model) == (kind != "plain")


# ---- the adapter ----


def test_lora_as_the_settings_say():
    settings = ModelSettings(lora_r=3, lora_alpha=5, lora_target_modules="q_proj, v_proj")
    policy = Policy(tiny.build("llama"), None, settings)
    adapter = policy.model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (3, 5, 0.0)
    assert adapter.target_modules == {"q_proj", "v_proj"}
    assert {t.shape[0] for t in policy.parameters.tensors[::2]} == {3}  # A of each layer
    assert default_lora().target_modules == "all-linear"
    with pytest.raises(TrpoLMError, match="does not fit") as error:
        Policy(tiny.build("llama"), None, ModelSettings(lora_target_modules="query"))
    assert error.value.where == "lora_target_modules" and "q_proj" in error.value.hint


@pytest.mark.parametrize("name, value", [
    ("lora_r", 4), ("lora_alpha", 8), ("lora_target_modules", "q_proj"),
])  # fmt: skip
def test_lora_settings_beside_another_adapter_are_refused(name, value):
    settings = ModelSettings(**{name: value})
    for model, peft in (
        (tiny.build("llama"), tiny.lora()),
        (get_peft_model(tiny.build("llama"), tiny.lora()), None),
    ):
        with pytest.raises(TrpoLMError, match=f"{name} cannot apply") as error:
            with_adapter(model, peft, settings, seed=0)
        assert error.value.where == name


# ---- incomplete files ----


def classifier(folder):
    config = GPT2Config(vocab_size=tiny.V, n_embd=8, n_layer=2, n_head=2, num_labels=1, **tiny.ENDS)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def rewrite(folder, change, name="model.safetensors"):
    file = Path(folder) / name
    tensors = load_file(file)
    save_file({k: v for k, v in change(tensors).items()}, file, metadata={"format": "pt"})


DAMAGE = {
    "a layer": lambda t: {k: v for k, v in t.items() if not re.search(r"\.1\.(mlp|attn)", k)},
    "one bias or norm": lambda t: {k: v for k, v in t.items() if k != sorted(t)[-1]},
    "wrong prefix": lambda t: {f"module.{k}": v for k, v in t.items()},
    "wrong shapes": lambda t: {k: torch.cat([v, v]) for k, v in t.items()},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("below", ["policy", "adapter"])
def test_B02_weights_that_the_files_lack_are_named(tmp_path, kind, damage, below):
    model, folder = saved(tmp_path / "base", kind)
    named = folder
    if below == "adapter":
        model.name_or_path = folder
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), tiny.lora())
        peft.save_pretrained(tmp_path / "adapter")
        named = str(tmp_path / "adapter")
    load_model(named)
    rewrite(folder, DAMAGE[damage])
    with pytest.raises(TrpoLMError, match=r"lack \w+\..*") as error:
        Policy(named)
    assert folder in error.value.what and error.value.where == "model"


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_B02_an_output_layer_is_missing_unless_it_is_tied(tmp_path, kind):
    _, folder = saved(tmp_path / "own", kind)
    name = {"llama": "lm_head.weight", "neox": "embed_out.weight"}[kind]
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != name})
    with pytest.raises(TrpoLMError, match=r"lack lm_head\.weight \("):
        load_model(folder)
    _, tied = saved(tmp_path / "tied", kind, tie_word_embeddings=True)
    assert name not in load_file(Path(tied) / "model.safetensors")
    load_model(tied)


@pytest.mark.parametrize("damage", DAMAGE)
def test_B02_a_reward_model_whose_files_lack_weights(tmp_path, damage):
    folder = classifier(tmp_path)
    RewardModel(folder)
    rewrite(folder, DAMAGE[damage])
    with pytest.raises(TrpoLMError, match="its files lack"):
        RewardModel(folder)


def test_B02_an_adapter_whose_file_lacks_weights(tmp_path):
    _, folder = saved(tmp_path / "base")
    Policy(folder, tiny.lora()).save(tmp_path / "adapter")
    name = "adapter_model.safetensors"
    rewrite(tmp_path / "adapter", lambda t: dict(list(t.items())[2:]), name)
    with pytest.raises(TrpoLMError, match="missing adapter keys"):
        load_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize("what", ["policy", "base", "adapter", "reward model"])
def test_B64_weights_that_can_run_code_are_refused_with_the_line_that_converts_them(tmp_path, what):
    _, base = saved(tmp_path / "base")
    Policy(base, tiny.lora()).save(tmp_path / "adapter")
    folder, load, file = {
        "policy": (base, load_model, "pytorch_model.bin"),
        "base": (base, lambda _: load_model(str(tmp_path / "adapter")), "pytorch_model.bin"),
        "adapter": (str(tmp_path / "adapter"), load_model, "adapter_model.bin"),
        "reward model": (str(tmp_path / "reward"), RewardModel, "pytorch_model.bin"),
    }[what]
    if what == "reward model":
        classifier(folder)
    (source,) = Path(folder).glob("*.safetensors")
    torch.save(load_file(source), Path(folder) / file)
    load(folder)  # safetensors are there: they are what is read
    source.unlink()
    with pytest.raises(TrpoLMError, match="can run code when it is read") as error:
        load(folder)
    assert f"{folder}/{file}" in error.value.what
    code = re.search(r'python -c "(.*)"', error.value.hint)[1]
    exec(code, {})
    assert source.is_file()
    load(folder)


def test_a_damaged_file_is_one_error(tmp_path):
    _, folder = saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(TrpoLMError, match="cannot be loaded"):
        load_model(folder)
    assert not isinstance(load_model(saved(tmp_path / "whole")[1]), PeftModel)


@pytest.mark.parametrize("base", ["/moved/away", "moved/away", "org/gone", ""])
def test_B41_an_adapter_whose_base_is_gone_says_where_its_base_is_named(
    tmp_path, monkeypatch, base
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapted = get_peft_model(tiny.build(), tiny.lora())
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path)
    with pytest.raises(TrpoLMError, match=f"'{base}'|names no base") as error:
        load_model(str(tmp_path))
    assert repr(str(tmp_path)) in error.value.what
    assert str(tmp_path / "adapter_config.json") in error.value.hint


def test_a_damaged_adapter_is_not_taken_for_a_damaged_base(tmp_path):
    model, base = saved(tmp_path / "base")
    adapted = get_peft_model(model, tiny.lora())
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(TrpoLMError, match=r"^adapter '.*adapter' cannot be loaded"):
        load_model(str(tmp_path / "adapter"))


# ---- tokenizers ----


class Reader(ProcessorMixin):
    """A processor of text alone."""

    def __init__(self, tokenizer=None):
        super().__init__(tokenizer)


@pytest.mark.parametrize("kind", ["tokenizer", "sound", "text", "name", "path", "of a processor"])
def test_B33_the_tokenizer_of_whatever_has_one_is_taken(tmp_path, kind):
    one = tiny.tokenizer()
    sound = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), one)
    (sound if kind == "of a processor" else one).save_pretrained(tmp_path)
    given = {
        "tokenizer": one, "sound": sound, "text": Reader(one), "name": str(tmp_path),
        "path": tmp_path, "of a processor": tmp_path,
    }[kind]  # fmt: skip
    ids = one("w1 w2").input_ids
    assert as_tokenizer(given)("w1 w2").input_ids == ids
    assert longest_prompt(["w1", "w1 w2"], "prompt", "absent", given) == len(ids)
    reward = RewardModel(GPT2ForSequenceClassification(GPT2Config(**SMALL, n_head=2)), given)
    assert len(reward(["w1"], [" w2"])) == 1


@pytest.mark.parametrize("given", [3, Wav2Vec2FeatureExtractor(), tiny.tokenizer()._tokenizer, {}])
def test_B33_what_has_no_tokenizer_is_refused(given):
    for use in (
        as_tokenizer,
        lambda given: longest_prompt(["w1"], "prompt", "absent", given),
        lambda given: RewardModel(
            GPT2ForSequenceClassification(GPT2Config(**SMALL, n_head=2)), given
        ),
    ):
        with pytest.raises(TrpoLMError, match=r"is no tokenizer, and has none .*processing_class"):
            use(given)


# ---- adapters that cannot be trained here ----


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_whole_layers_are_trained_in_float32_or_not_at_all(options, dtype):
    kind = "neox" if "bias" in options else "llama"  # Llama has no biases
    if dtype == torch.float32:
        assert len(Policy(tiny.build(kind), tiny.lora(**options)).parameters) > 0
        return
    with pytest.raises(TrpoLMError, match=r"would be trained in half precision.*peft_config"):
        Policy(tiny.build(kind, dtype=dtype), tiny.lora(**options))


@pytest.mark.parametrize("adapter", [OFTConfig, VeraConfig])
def test_an_adapter_that_supports_no_such_layer_is_one_error(adapter):
    """GPT-2 has layers of a class of its own; VeRA shares one matrix of every shape."""
    options = {"projection_prng_key": "x"} if adapter is VeraConfig else {"oft_block_size": 0}
    with pytest.raises(TrpoLMError, match=r"does not fit the model.*peft_config"):
        Policy(tiny.build("gpt2"), adapter(target_modules=["c_attn"], r=2, **options))


@pytest.mark.parametrize("settings", [{}, {"lora_target_modules": "out_proj"}])
def test_B41_layers_that_a_model_does_not_take_adapters_in_are_told_with_those_it_has(settings):
    """Mamba's kernels read two of its layers' weights themselves."""
    config = MambaConfig(
        vocab_size=tiny.V, hidden_size=8, num_hidden_layers=2, state_size=4, **tiny.ENDS
    )
    with pytest.raises(TrpoLMError, match=r"out_proj.*lora_target_modules") as error:
        with_adapter(MambaForCausalLM(config), None, ModelSettings(**settings), seed=0)
    assert "some of ['dt_proj', 'in_proj', 'lm_head', 'out_proj', 'x_proj']" in error.value.hint
    settings = ModelSettings(lora_target_modules="in_proj,x_proj")
    assert with_adapter(MambaForCausalLM(config), None, settings, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_B41_two_active_adapters_are_refused_and_one_of_two_is_trained(tmp_path, kind):
    base, folder = saved(tmp_path / "base", kind)
    model = get_peft_model(base, tiny.lora(init_lora_weights=False), adapter_name="one")
    model.add_adapter("two", tiny.lora())
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(TrpoLMError, match="2 adapters are active: one, two"):
        Policy(model)
    model.set_adapter("two")
    policy = Policy(model)
    tiny.perturb(policy, 0.3)
    policy.save(tmp_path / "saved")
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "two" not in files
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "saved"
    ).eval()
    probe = policy.probe_inputs()
    with torch.no_grad():
        assert torch.equal(plain(**probe).logits, policy.base(**probe).logits)


@pytest.mark.parametrize("error", [RuntimeError("mat2 must have the same dtype"), KeyError("x")])
def test_an_adapter_that_fails_in_its_first_pass_is_one_error(monkeypatch, error):
    """As some kinds do on a base in half precision."""

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(Policy, "features", fails)
    with pytest.raises(TrpoLMError, match=rf"^the check '.*' ended in {type(error).__name__}: "):
        Policy(tiny.build("llama"), tiny.lora())
