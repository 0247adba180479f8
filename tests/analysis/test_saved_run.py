"""A finished run opened again is the run that was trained: evaluation, tokens, merged model."""

import json
import shutil

import pytest
import tiny
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import runs
from trpo_lm.analysis.saved_run import evaluate, merge, open_run
from trpo_lm.analysis.token_view import token_rows
from trpo_lm.core.divergences import categorical_kl
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.prompts import Prompts, load_prompts
from trpo_lm.training.manifest import publish, write_manifest
from trpo_lm.training.trainer import Trainer

HELD_OUT = Prompts(runs.HELD_OUT, {})
BITS = {"load_in_4bit", "load_in_8bit"}


def classifier(folder, seed):
    config = GPT2Config(
        vocab_size=tiny.V, n_embd=8, n_layer=1, n_head=2, n_positions=64, num_labels=1,
        initializer_range=0.35, **tiny.ENDS,
    )  # fmt: skip
    torch.manual_seed(seed)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def train(folder, name, *, reward, model=None, peft=None, **options):
    options = {"updates": 4, "eval_steps": 1, "save_steps": 2, "save_total_limit": 1} | options
    made = Trainer(
        model or str(folder / "model"), reward, train_dataset=runs.PROMPTS,
        eval_dataset=runs.HELD_OUT, args=runs.config(folder / name, **options),
        peft_config=peft, algorithm=runs.ALGORITHMS["trpo"](), plots=False,
    )  # fmt: skip
    made.train()
    return made


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A model, two reward models and a run, on the disk; and the trainer that made the run."""
    folder = tmp_path_factory.mktemp("finished")
    tiny.build().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    classifier(folder / "judge", 5)
    reward = classifier(folder / "reward", 4)
    return folder, train(folder, "run", reward=reward, peft=tiny.lora())


def logits(model, text="w1 w2 w3"):
    ids = tiny.tokenizer()(text, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**ids).logits


def checksums(folder):
    return {row["update"]: row["policy/checksum"] for row in runs.rows(folder)}


# ---------------------------------------------------------------- opening


def test_the_policy_its_reference_and_its_critic_come_back(scene):
    folder, made = scene
    run = open_run(folder / "run")
    assert run.update == 4
    assert run.policy.parameters.checksum() == made.policy.parameters.checksum()
    assert torch.equal(logits(run.policy.base), logits(made.policy.base))
    base = logits(tiny.build())
    assert not torch.equal(logits(run.policy.base), base)
    with run.policy.reference():
        assert torch.equal(logits(run.policy.base), base)
    for name, value in made.critic.state().items():
        assert torch.equal(run.critic.state()[name], value)
    assert run.rewards.names == ["reward"] and run.mdp.eos_token_ids == made.mdp.eos_token_ids


def test_best_and_checkpoints_are_the_policies_of_their_updates(scene):
    folder, made = scene
    told = checksums(folder / "run")
    for name, update in (("best", made.best.update), ("4", 4)):
        run = open_run(folder / "run", name)
        assert run.update == update
        assert run.policy.parameters.checksum() == told[update]


def test_what_is_not_there_is_named(scene, tmp_path):
    folder, _ = scene
    with pytest.raises(TrpoLMError, match="no policy '3'; there are last, best, 4"):
        open_run(folder / "run", "3")
    with pytest.raises(TrpoLMError, match="there are none"):
        open_run(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    publish(tmp_path, 3, lambda new: None, settings={"model": "x"})
    with pytest.raises(TrpoLMError, match="not those of a run"):
        open_run(tmp_path)


def test_a_run_from_an_adapter_has_that_adapter_as_its_reference(scene):
    folder, made = scene
    start = str(folder / "run")
    further = train(
        folder, "further", reward=str(folder / "reward"), model=start, updates=1, eval_steps=0
    )
    run = open_run(folder / "further")
    assert run.policy.parameters.checksum() == further.policy.parameters.checksum()
    with run.policy.reference():
        assert torch.equal(logits(run.policy.base), logits(made.policy.base))


# ---------------------------------------------------------------- evaluating


def test_the_evaluation_is_what_the_trainer_measures(scene):
    """Reference KL is exact per state; the rollouts differ, so the trainer's are made again."""
    folder, made = scene
    run = open_run(folder / "run")
    found = evaluate(run, HELD_OUT, completions=64, judge=run.rewards.functions[0])
    policy, reference = found["policy"], found["reference"]
    assert reference["ref_kl"] == pytest.approx(0, abs=1e-6) and policy["ref_kl"] > 0.01
    assert policy["judge"] == pytest.approx(policy["score"], abs=1e-6)  # it is its own judge
    assert policy["judge_interval"] == pytest.approx(policy["score_interval"], abs=1e-6)
    for side in ("reference", "policy", "difference"):
        low, high = found[side]["score_interval"]
        assert low < found[side]["score"] < high
    gain = policy["score"] - reference["score"]
    assert found["difference"]["score"] == pytest.approx(gain, abs=1e-9)
    own = run.mdp.rollout(
        made.policy, runs.HELD_OUT, completions_per_prompt=64, seed=(0, "evaluate")
    )
    assert policy["score"] == pytest.approx(float(own.scores.score.mean()))
    greedy = run.mdp.rollout(made.policy, runs.HELD_OUT, seed=(1,), greedy=True)
    assert policy["greedy"] == pytest.approx(float(greedy.scores.score.mean()))
    assert evaluate(run, HELD_OUT, completions=64)["policy"]["score"] == policy["score"]
    json.dumps(found, allow_nan=False)


def test_one_prompt_has_no_interval(scene):
    folder, _ = scene
    run = open_run(folder / "run")
    found = evaluate(run, Prompts(["w1"], {}), completions=2)
    assert found["policy"]["score_interval"] is None
    assert found["difference"]["score_interval"] is None


def test_the_prompts_it_was_evaluated_on_are_kept_with_their_columns(scene):
    folder, made = scene
    assert load_prompts(folder / "run" / "held_out.jsonl").prompts == runs.HELD_OUT
    data = [{"prompt": "w1 w2", "label": i, "odd": {1}} for i in range(3)]
    Trainer(
        str(folder / "model"), runs.score, train_dataset=runs.PROMPTS,
        args=runs.config(folder / "function", updates=1, eval_prompts=2), eval_dataset=data,
        peft_config=tiny.lora(), plots=False,
    ).train()  # fmt: skip
    kept = load_prompts(folder / "function" / "held_out.jsonl")
    assert kept.prompts == ["w1 w2"] * 2 and kept.columns["label"] == [0, 1]

    run = open_run(folder / "function")  # a function is not in the folder
    assert run.rewards is None and run.critic is None
    with pytest.raises(TrpoLMError, match="trained on score, a function"):
        evaluate(run, kept)
    rows = token_rows(run, run.mdp.rollout(run.policy, ["w1"]))
    assert rows[0]["kl"] is not None and rows[0]["reward"] is None and rows[0]["value"] is None
    passed = open_run(folder / "function", reward=runs.score)
    assert evaluate(passed, kept, completions=2)["policy"]["score"] is not None


# ---------------------------------------------------------------- merging


def test_the_merged_model_says_what_the_policy_says_and_so_does_vanilla_peft(scene, tmp_path):
    folder, made = scene
    merge(open_run(folder / "run", plain=True), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(merged, "peft_config")
    vanilla = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model"), str(folder / "run")
    ).eval()
    own = logits(made.policy.base)
    assert torch.equal(logits(vanilla), own)
    assert torch.allclose(logits(merged), own, atol=1e-5)
    assert not torch.allclose(logits(tiny.build()), own, atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompts = tokenizer(["w1 w2 w3", "w4"], return_tensors="pt", padding=True)
    greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": tiny.PAD}
    said = [m.generate(**prompts, **greedy).tolist() for m in (made.policy.base, vanilla, merged)]
    assert said[0] == said[1] == said[2]
    with pytest.raises(TrpoLMError, match="not empty"):
        merge(open_run(folder / "run"), tmp_path / "merged")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_B41_an_adapter_with_a_bias_is_merged_where_the_layers_have_one(scene, tmp_path, kind):
    """Without one, loading the merged model would drop what was put in its place."""
    folder = scene[0]
    tiny.build(kind).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    train(
        tmp_path, "run", reward=str(folder / "reward"), updates=1, peft=tiny.lora(lora_bias=True),
        eval_steps=0,
    )  # fmt: skip
    opened = open_run(tmp_path / "run", plain=True)
    before = logits(opened.policy.base)
    if kind == "llama":
        with pytest.raises(TrpoLMError, match=r"cannot be merged: .*lora_bias.* no bias"):
            merge(opened, tmp_path / "merged")
        assert not (tmp_path / "merged" / "config.json").exists()
        return
    merge(opened, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), before, atol=1e-5)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("loaded", [
    {"dtype": "bfloat16"}, {"dtype": "float16"}, {"attn_implementation": "eager"},
    {"load_in_4bit": True}, {"load_in_8bit": True},
])  # fmt: skip
def test_a_run_reopens_and_merges_as_it_was_loaded(scene, tmp_path, loaded):
    if loaded.keys() & BITS:
        pytest.importorskip("bitsandbytes")
    folder, _ = scene
    reward = str(folder / "reward")
    made = train(folder, tmp_path / "run", reward=reward, updates=1, eval_steps=0,
                 lora_r=2, lora_target_modules="c_attn,c_fc", **loaded)  # fmt: skip
    run = open_run(tmp_path / "run")
    assert {name: run.settings[name] for name in loaded} == loaded
    assert run.policy.quantized == made.policy.quantized == bool(loaded.keys() & BITS)
    assert run.policy.base.dtype == made.policy.base.dtype
    assert run.policy.base.config._attn_implementation == (
        loaded.get("attn_implementation") or "sdpa"
    )
    assert run.policy.parameters.checksum() == made.policy.parameters.checksum()
    own = logits(made.policy.base)
    assert torch.equal(logits(run.policy.base), own)
    if "attn_implementation" not in loaded:
        with pytest.raises(TrpoLMError, match="full precision only"):
            merge(run, tmp_path / "merged")
    plain = open_run(tmp_path / "run", plain=True)
    assert plain.policy.base.dtype == torch.float32 and not plain.policy.quantized
    merge(plain, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    exact = not {"dtype", "load_in_8bit"} & loaded.keys()  # no rounding between layers
    gap = float((logits(merged) - own).norm() / own.norm())
    assert gap < (1e-5 if exact else 0.03)


def test_a_model_object_is_recorded_in_its_own_precision(scene, tmp_path):
    folder, _ = scene
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    reward = str(folder / "reward")
    made = train(folder, tmp_path / "run", reward=reward, model=model, updates=1, eval_steps=0)
    run = open_run(tmp_path / "run")
    assert run.settings["dtype"] == "bfloat16"
    assert torch.equal(logits(run.policy.base), logits(made.policy.base))


LATER = {"dtype", "attn_implementation", "load_in_4bit", "load_in_8bit", "micro_batch_tokens",
         "reward_workers", "reward_retries", "digests"}  # fmt: skip


def earlier(run, out, bf16):
    """Copy a run as an earlier version left it: no manifest but in checkpoints, other settings."""
    shutil.copytree(run, out)
    for name in ("MANIFEST.json", "best/MANIFEST.json", "best/config.yaml"):
        (out / name).unlink()
    for folder in (out, *out.glob("checkpoint-*")):
        file = folder / "config.yaml"
        settings = yaml.safe_load(file.read_text()).items()
        old = {name: value for name, value in settings if name not in LATER}
        file.write_text(yaml.safe_dump({**old, "bf16": bf16, "micro_batch_size": None}))
        if folder != out:
            (folder / "MANIFEST.json").unlink()
            write_manifest(folder, int(folder.name[-6:]))
    return out


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpoint", ["last", "best", "4"])
def test_a_run_of_an_earlier_version_reopens_with_a_note(scene, tmp_path, bf16, checkpoint, caplog):
    folder, made = scene
    out = earlier(folder / "run", tmp_path / "run", bf16)
    run = open_run(out, checkpoint)
    assert ["nothing vouches" in record.getMessage() for record in caplog.records] == [True]
    assert run.policy.base.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert run.update == (made.best.update if checkpoint == "best" else 4)
    assert run.policy.parameters.checksum() == checksums(out)[run.update]
    assert run.critic is not None
    assert evaluate(run, HELD_OUT, completions=1)["policy"]["score"] is not None
    merge(open_run(out, checkpoint, plain=True), tmp_path / "merged")


def test_weights_of_an_earlier_version_that_no_update_made_are_refused(scene, tmp_path):
    folder, _ = scene
    out = earlier(folder / "run", tmp_path / "run", False)
    weights = load_file(out / "adapter_model.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, out / "adapter_model.safetensors")
    with pytest.raises(TrpoLMError, match="no update in metrics"):
        open_run(out)


def test_a_run_of_this_version_without_its_manifest_is_not_one_of_an_earlier(scene, tmp_path):
    folder, _ = scene
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "MANIFEST.json").unlink()
    with pytest.raises(TrpoLMError, match="no policy 'last'; there are best, 4"):
        open_run(tmp_path / "run")


# ---------------------------------------------------------------- tokens


def test_the_numbers_of_every_token(scene):
    folder, _ = scene
    run = open_run(folder / "run")
    rollout = run.mdp.rollout(run.policy, ["w1 w2 w3", "w4"], seed=(1,))
    rows = token_rows(run, rollout, 1)
    with torch.no_grad():
        own = tiny.own_logits(run.policy, rollout, [1]).log_softmax(-1)
        with run.policy.reference():
            reference = tiny.own_logits(run.policy, rollout, [1]).log_softmax(-1)
    ids = rollout.completion_ids[1]
    assert [r["token_id"] for r in rows] == ids and [r["position"] for r in rows][-1] == len(ids)
    kl = categorical_kl(old=own, new=reference)
    for t, row in enumerate(rows):
        assert row["logprob"] == pytest.approx(float(own[t, ids[t]]), abs=1e-5)
        assert row["ref_logprob"] == pytest.approx(float(reference[t, ids[t]]), abs=1e-5)
        assert row["shift"] == pytest.approx(row["logprob"] - row["ref_logprob"], abs=1e-6)
        assert row["kl"] == pytest.approx(float(kl[t]), abs=1e-5)
    assert sum(r["reward"] for r in rows) == pytest.approx(float(rollout.scores.score[1]))
    lam = run.settings["lam"]
    assert 0 < lam < 1 and len(rows) > 2
    following = 0.0, 0.0  # V and A after the last action
    for row in reversed(rows):
        delta = row["reward"] + following[0] - row["value"]
        assert row["advantage"] == pytest.approx(delta + lam * following[1], abs=1e-9)
        following = row["value"], row["advantage"]
