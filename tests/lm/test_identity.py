"""Digests: which base, reference and reward models a run was trained on. Case B03."""

import time

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

import runs
from trpo_lm.analysis.saved_run import merge, open_run
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.identity import base_digest, equals_files, tensors_digest, tokenizer_digest
from trpo_lm.lm.policy import Policy
from trpo_lm.training.trainer import Trainer

KINDS = ("gpt2", "llama", "qwen2", "neox", "gemma2")
OPTIONS = {"updates": 1, "prompts_per_update": 2, "completions_per_prompt": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_B03_a_digest_is_of_the_base_alone_in_any_precision(tmp_path, kind):
    model = tiny.build(kind)
    digest = base_digest(model)
    assert base_digest(tiny.build(kind)) == digest != base_digest(tiny.build(kind, seed=1))
    assert base_digest(tiny.build(kind).to(torch.bfloat16)) == digest
    for targets in ("all-linear", ["lm_head"]):
        if kind == "neox" and targets == ["lm_head"]:
            continue
        adapted = get_peft_model(tiny.build(kind), tiny.lora(target_modules=targets))
        assert base_digest(adapted) == digest
    model.save_pretrained(tmp_path)
    assert equals_files(tiny.build(kind), str(tmp_path))
    assert not equals_files(tiny.build(kind, seed=1), str(tmp_path))
    assert not equals_files(model, str(tmp_path / "absent"))


@pytest.mark.parametrize("where", ["first", "last", "row", "column"])
@pytest.mark.parametrize("shape", [(3, 4), (2100, 2048), (1025, 4097)])
def test_B03_a_change_is_seen_in_small_and_in_large_tensors(shape, where):
    x = torch.zeros(shape)
    before = tensors_digest([("x", x)])
    {"first": x[0, :9], "last": x[-1, -9:], "row": x[1], "column": x[:, 1]}[where].fill_(1)
    assert tensors_digest([("x", x)]) != before
    assert tensors_digest([("y", x)]) != tensors_digest([("x", x)])


def test_B03_a_digest_is_cheap():
    weights = [(str(i), torch.zeros(1 << 24)) for i in range(4)]
    begun = time.process_time()
    tensors_digest(weights)
    assert time.process_time() - begun < 2  # 67M numbers


def test_B03_a_tokenizer_is_known_by_what_it_does_and_not_by_its_last_call():
    one, other = tiny.tokenizer(), tiny.tokenizer()
    one(["w1", "w2 w3"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(one) == tokenizer_digest(other)
    for changed in (tiny.tokenizer(bos=False), tiny.tokenizer(chat_template="x")):
        assert tokenizer_digest(changed) != tokenizer_digest(one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begins", ["fresh", "given, as the base", "given, elsewhere"])
def test_B03_the_digest_of_a_base_is_the_same_wherever_its_policy_is(kind, begins):
    """Also inside `reference()`, which switches an adapter off that began as the base."""
    policy = tiny.policy(kind, spread=0.3 * (begins == "given, elsewhere"))
    if begins != "fresh":
        policy = Policy(policy.model)
    digest = base_digest(tiny.build(kind))
    for spread in (0.0, 0.5):
        tiny.perturb(policy, spread)
        assert base_digest(policy.model) == digest
        with policy.reference():
            assert base_digest(policy.model) == digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_B03_an_object_equals_its_files_in_its_own_precision(tmp_path, kind, dtype):
    tiny.build(kind).save_pretrained(tmp_path)
    assert equals_files(tiny.build(kind).to(dtype), str(tmp_path))
    assert not equals_files(tiny.build(kind, seed=1).to(dtype), str(tmp_path))


def train(folder, model, **options):
    made = Trainer(
        model, runs.score, train_dataset=runs.PROMPTS,
        args=runs.config(folder, **OPTIONS | options), processing_class=tiny.tokenizer(),
        algorithm=runs.ALGORITHMS["trpo"](), plots=False,
    )  # fmt: skip
    made.train()
    return made


@pytest.fixture
def model(tmp_path):
    tiny.build().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def changed(model, how):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    if how == "merged in memory":
        adapted = get_peft_model(loaded, tiny.lora())
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        loaded = adapted.merge_and_unload()
        loaded.config.name_or_path = model
    elif how == "a weight":
        next(loaded.parameters()).data[3].add_(0.5)
    return loaded


@pytest.mark.parametrize("how", ["merged in memory", "a weight", "as saved"])
def test_B03_an_object_that_differs_from_its_files(tmp_path, model, how, capsys):
    train(tmp_path / "run", changed(model, how))
    noted = "no files under its name" in capsys.readouterr().out
    assert noted == (how != "as saved")
    if not noted:
        merge(open_run(tmp_path / "run", reward=runs.score), tmp_path / "merged")
        return
    with pytest.raises(TrpoLMError, match="not the model that the run was trained on"):
        open_run(tmp_path / "run", reward=runs.score)
    with pytest.raises(TrpoLMError, match=r"digests\.base"):
        train(tmp_path / "run", model, updates=2, resume_from_checkpoint="auto")


def test_B03_a_first_stage_that_was_trained_again(tmp_path, model):
    train(tmp_path / "one", model)
    train(tmp_path / "two", str(tmp_path / "one"))
    assert open_run(tmp_path / "two", reward=runs.score).settings["reference"] == "adapter"
    train(tmp_path / "one", model, seed=5, overwrite_output_dir=True)
    with pytest.raises(TrpoLMError, match="another reference"):
        open_run(tmp_path / "two", reward=runs.score)
    with pytest.raises(TrpoLMError, match=r"digests\.reference"):
        train(tmp_path / "two", str(tmp_path / "one"), updates=2, resume_from_checkpoint="auto")


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_B03_a_run_from_an_adapter_that_begins_as_the_base_or_elsewhere_reopens(
    tmp_path, model, spread
):
    given = tiny.policy(model=changed(model, "as saved"), spread=spread).model
    given.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    made = train(tmp_path / "run", str(tmp_path / "adapter"))
    run = open_run(tmp_path / "run", reward=runs.score)
    assert run.policy.parameters.checksum() == made.policy.parameters.checksum()
    assert run.settings["digests"]["reference"].startswith(run.settings["digests"]["base"] + "+")


def test_B03_a_base_that_changed_below_a_finished_run(tmp_path, model):
    train(tmp_path / "run", model)
    tiny.build(seed=9).save_pretrained(model)
    for policy in ("last", "1"):
        with pytest.raises(TrpoLMError, match="another base"):
            open_run(tmp_path / "run", policy, reward=runs.score)
    assert PeftModel.from_pretrained(tiny.build(seed=9), str(tmp_path / "run"))  # peft cannot tell
