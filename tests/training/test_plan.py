"""What a run needs, said before it is loaded, beside what real models keep."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from trpo_lm.algorithms.ppo import PPO
from trpo_lm.config import TrainerConfig
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.memory import PHASES, device_memory, saved_bytes
from trpo_lm.lm.policy import Policy
from trpo_lm.training.plan import QUANTISED, Plan, _alternatives, _Run, make_plan, read_bytes
from trpo_lm.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent.parent
WIDE = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000,
}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**WIDE),
    "eager": lambda: LlamaConfig(**WIDE, attn_implementation="eager"),
    "qwen2": lambda: Qwen2Config(**WIDE),
    "gpt2": lambda: GPT2Config(n_embd=256, n_layer=4, n_head=4, vocab_size=2000, **IDS),
    "gemma2": lambda: Gemma2Config(**WIDE, head_dim=64),
}
LARGE = Qwen2Config(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=2, vocab_size=32000,
)  # fmt: skip


def plan(model=LARGE, *, memory="24GiB", algorithm=None, prompt=64, **settings):
    settings = {"prompts_per_update": 64, "max_completion_length": 64} | settings
    args = TrainerConfig(**settings)
    return make_plan(model, args, algorithm, memory=memory, prompt_length=prompt)


def sizes(found):
    return {p.name.split(",")[0]: p.size for p in found.phases}


@pytest.fixture
def costs(monkeypatch):
    """Return the costs that a plan worked out from a config."""

    def of(config, **settings):
        seen = []
        measured = "trpo_lm.training.plan.measured_costs"
        real = sys.modules["trpo_lm.lm.memory"].measured_costs
        monkeypatch.setattr(measured, lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
        plan(config, dtype="float32", **settings)
        return seen[0]

    return of


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_costs_without_weights_are_those_of_the_loaded_model(kind, recomputes, costs):
    expected = costs(CONFIGS[kind](), gradient_checkpointing=recomputes)
    loaded = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    policy = Policy(loaded, gradient_checkpointing=recomputes)
    for phase in PHASES:
        for length in (16, 256):
            found = policy.room.costs[phase].per_token(length)
            assert expected[phase].per_token(length) == pytest.approx(found, rel=0.02), phase
    length, weights = 96, list(policy.model.parameters())
    for phase, run in (("gradient", policy.features), ("fisher", policy.linearised)):
        if (phase, recomputes) == ("gradient", True):
            continue  # a layer's recomputation comes on top of what is saved
        kept = saved_bytes(lambda run=run: run(*policy._probe_rows(length)), weights)
        assert expected[phase].per_token(length) * length == pytest.approx(kept, rel=0.25)


def test_graphs_within_a_graph_do_not_count_once_they_are_gone():
    w = torch.ones(1000, requires_grad=True)

    def work():
        for _ in range(5):  # what each frees may be given to the next, and to what is kept
            torch.autograd.grad((w * w.detach().clone()).sum(), w)
        return (w * torch.ones(1000)).sum()

    assert saved_bytes(work, [w]) == 4000


def test_parameters_are_those_of_the_loaded_model():
    found, policy = plan(CONFIGS["qwen2"](), dtype="float32"), Policy(
        AutoModelForCausalLM.from_config(CONFIGS["qwen2"]())
    )  # fmt: skip
    every = list(policy.model.parameters())
    assert found.parameters == sum(p.numel() for p in every)
    assert found.trainable == len(policy.parameters)
    assert sizes(found)["weights"] == sum(p.nbytes for p in every if not p.requires_grad)


def test_nothing_but_the_config_is_read(tmp_path, monkeypatch):
    CONFIGS["llama"]().save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    found = Trainer.plan(
        str(tmp_path), None, train_dataset=["w1"], args=TrainerConfig(), memory="24GiB"
    )
    assert isinstance(found, Plan) and found.model == str(tmp_path) and found.fits
    assert "(assumed)" in found.batch and "fits: yes" in str(found)
    header, *rows = found.as_table()
    assert len(rows) == len(found.phases) and {len(row) for row in rows} == {len(header)}


def test_prompts_are_measured_where_tokenizer_and_data_are_at_hand():
    found = Trainer.plan(
        tiny.build(),
        None,
        train_dataset=["w1", "w1 w2 w3"],
        args=TrainerConfig(),
        processing_class=tiny.tokenizer(),
    )
    assert "prompts of 4 (the longest)" in found.batch
    assert found.memory == device_memory(torch.device("cpu"))


def test_a_model_with_an_adapter_is_planned_as_it_is(tmp_path):
    loaded = tiny.policy(peft=tiny.lora(r=3), model=tiny.build("llama")).model
    found = Trainer.plan(loaded, memory="1GiB")
    assert found.trainable == sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    loaded.get_base_model().config.save_pretrained(tmp_path / "base")
    loaded.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    loaded.peft_config["default"].save_pretrained(tmp_path / "adapter")
    by_name = Trainer.plan(str(tmp_path / "adapter"), memory="1GiB")
    assert (by_name.trainable, by_name.parameters) == (found.trainable, found.parameters)


def test_memory_grows_with_what_it_depends_on():
    base = sizes(plan())
    longer, wider = sizes(plan(max_completion_length=128)), sizes(plan(lora_r=16))
    assert longer["features"] == 2 * base["features"] and longer["weights"] == base["weights"]
    assert wider["adapters"] == 2 * base["adapters"]
    exact = sizes(plan(dtype="float32"))
    assert exact["weights"] == 2 * base["weights"] and exact["features"] == 2 * base["features"]
    for name, each in QUANTISED.items():
        smaller = sizes(plan(**{name: True}))["weights"]
        assert each / 2 < smaller / base["weights"] < 1  # embeddings stay as they are
    assert sizes(plan(gradient_checkpointing=True))["gradient"] < base["gradient"]
    assert sizes(plan(critic="none"))["critic"] < base["critic"]


@pytest.mark.parametrize(
    ("settings", "product"),
    [
        ({"memory": "80GiB"}, "retained"),
        ({"memory": "2GiB"}, "forward"),
        ({"load_in_4bit": True}, "scores"),
        ({"attn_implementation": "flash_attention_2"}, "scores"),
        ({"algorithm": PPO()}, None),
    ],
)
def test_the_product_is_the_one_that_works_and_fits(settings, product):
    found = plan(**settings)
    assert found.product == product
    assert ("Fisher" in str(found)) == (product is not None)


@pytest.mark.parametrize(
    ("memory", "dtype"),
    [("2.2GiB", "float32"), ("1.6GiB", "float32"), ("1.45GiB", "auto"), ("1.2GiB", "auto")],
)
def test_the_settings_it_names_do_fit(memory, dtype):
    found = plan(memory=memory, max_completion_length=256, dtype=dtype)
    assert not found.fits and "fits: no" in str(found)
    assert found.advice and " ".join(found.advice) in str(found)
    settings = {"memory": memory, "max_completion_length": 256, "dtype": dtype}
    for flag in found.advice:
        name, _, value = flag.removeprefix("--").partition(" ")
        settings[name] = int(value) if value.isdigit() else value or True
    assert plan(**settings).fits


def test_a_model_that_cannot_fit_is_said_to():
    found = plan(memory="100MiB")
    assert found.advice is None and "with no settings" in str(found)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("80 GB", 80e9), ("512MiB", 2**29), ("1.5g", 1.5e9), (1e9, 1e9)],
)
def test_memory_is_read_in_any_unit(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "1.2.3GB", "nan", "GiB"])
def test_what_is_no_memory_is_an_error(text):
    with pytest.raises(TrpoLMError, match="no amount of memory"):
        read_bytes(text)


def test_a_config_that_is_not_there_or_is_no_language_model_is_an_error(tmp_path):
    with pytest.raises(TrpoLMError, match="cannot be read"):
        plan(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(TrpoLMError, match="no causal LM"):
        plan(str(tmp_path))


def test_the_recipe_says_it_and_loads_nothing(tmp_path):
    CONFIGS["llama"]().save_pretrained(tmp_path)
    command = ["recipes/sentiment.py", "--model", str(tmp_path), "--dry_run", "--memory", "24GiB"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "fits: yes" in done.stdout and "Fisher, retained" in done.stdout


# ---------------------------------------------------------------- a base that is shared out


@pytest.mark.parametrize("on_node", [1, 4])
def test_a_sharded_base_is_planned_as_the_part_that_a_process_holds(monkeypatch, on_node):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_node))
    args = {"prompts_per_update": 64, "max_completion_length": 64}

    def of(processes, **settings):
        made = TrainerConfig(**args, **settings)
        return make_plan(LARGE, made, memory="24GiB", prompt_length=64, processes=processes)

    whole, parted = of(8), of(8, shard_base=True)
    sharers = 8 if on_node == 1 else 4
    assert f"among {sharers} processes" in str(parted)
    all_, held = sizes(whole)["weights"], sizes(parted)["weights"]
    layers = (all_ - held) / (1 - 1 / sharers - 2 / 4)  # two of the four layers are gathered
    assert all_ - layers == pytest.approx(2 * 32000 * 2048 * 2, rel=0.01)  # embeddings and head
    assert (whole.product, parted.product) == ("retained", "forward")
    assert sizes(of(1, shard_base=True)) == sizes(of(1))


@pytest.mark.parametrize("processes", [1, 8])
def test_several_processes_are_advised_to_share_the_base_out(processes):
    run = _Run(
        LARGE, TrainerConfig(), PPO(), None, torch.device("meta"), memory=1e9, prompt=64,
        scores_prefixes=False, processes=processes, known={},
    )  # fmt: skip
    advised = [set(flags) for flags, _ in _alternatives(run)]
    assert any("--shard_base" in flags for flags in advised) == (processes > 1)
    assert not any({"--shard_base", "--load_in_4bit"} <= flags for flags in advised)
    assert any("--load_in_4bit" in flags for flags in advised)
