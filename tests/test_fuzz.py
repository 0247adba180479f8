"""Any model, tokenizer, data, reward, adapter and settings: one error at the start, or a true run.

Each example draws one kind from each list below, builds the run and holds it to one contract:
either a `TrpoLMError` before anything is generated, or updates whose log-probabilities are those of
a plain forward pass of transformers, whose KL starts at 0, and whose saved adapter is the policy
under plain peft. Only an unusable reward may end a run, as a `RunFault` that keeps the policy.

A hundred examples by default; thousands by hand, new ones each time:

    TRPO_LM_FUZZ=2000 python -m pytest tests/test_fuzz.py
"""

import copy
import json
import math
import os
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import PreTrainedTokenizerFast as Fast

import trpo_lm.training.trainer
from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.config import TrainerConfig
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.rewards import scores_prefixes
from trpo_lm.lm.rollout import Batch
from trpo_lm.training.trainer import Trainer

BY_HAND = os.environ.get("TRPO_LM_FUZZ")
CONTEXT = 48
VOCABULARY = {"bytes": 320, "metaspace": 96, "wordpiece": 96}  # of the models, by tokenizer

# ---------------------------------------------------------------- models

WIDTH = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = {**WIDTH, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
WINDOW = {"sliding_window": 6}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT,
    "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": CONTEXT,
    },
    "gpt_neox": WIDTH,
    "llama": GROUPED,
    "mistral": {**GROUPED, **WINDOW},
    "mixtral": {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**HEADS, **EXPERTS},
    "gpt_oss": {**HEADS, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": HEADS,
    "gemma2": {**HEADS, **WINDOW},
    "gemma3_text": {**HEADS, **WINDOW, "sliding_window_pattern": 2},
    "phi3": {**GROUPED, **WINDOW},
    "cohere2": {**GROUPED, **WINDOW},
    "olmo3": {**GROUPED, **WINDOW},
    "exaone4": {**GROUPED, **WINDOW},
    "smollm3": GROUPED,
    "glm": HEADS,
    "glm4": HEADS,
    "nemotron": GROUPED,
    "bitnet": GROUPED,
    "persimmon": WIDTH,
    "ctrl": {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "xglm": {
        "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "openai-gpt": GPT,
    "phi": {**WIDTH, "num_key_value_heads": 4},
    "stablelm": GROUPED,
    "olmo2": GROUPED,
    "granite": GROUPED,
    "cohere": GROUPED,
    "starcoder2": GROUPED,
    "falcon": {**WIDTH, "alibi": False},
    "opt": {**WIDTH, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "biogpt": WIDTH,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "jamba": {
        **GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
        "use_mamba_kernels": False, "mamba_d_state": 4,
    },
    "llama4_text": {
        **HEADS, "attention_chunk_size": 6, "intermediate_size_mlp": 48, "num_local_experts": 2,
        "no_rope_layers": [1, 0],
    },
    # These read padding or see the future.
    "bert": WIDTH,
    "roberta": WIDTH,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "rwkv": {
        "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2,
        "intermediate_size": 48,
    },
}  # fmt: skip
DTYPES = ["float32", "float32", "bfloat16"]
# In half precision rounding picks other experts.
ROUTED = {kind for kind, sizes in MODELS.items() if any("expert" in name for name in sizes)}


@cache
def shipped_model(kind, core, tied, pad, dtype):
    """Return a model that nothing may change; runs get copies."""
    ends = {"pad_token_id": pad, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied}
    sizes = {**MODELS[kind], "vocab_size": VOCABULARY[core]}
    config = transformers.AutoConfig.for_model(kind, **sizes, **ends)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()


# ---------------------------------------------------------------- tokenizers

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CORPUS = ["the cast of the film", "a plot, and an end.", "good good film", "user assistant system"]
TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"


def _bytes():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return core, trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def _metaspace():
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return core, trainers.BpeTrainer(vocab_size=96, special_tokens=SPECIAL, show_progress=False)


def _wordpiece():
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    options = {"vocab_size": 96, "special_tokens": SPECIAL, "show_progress": False}
    return core, trainers.WordPieceTrainer(**options)


CORES = {"bytes": _bytes, "metaspace": _metaspace, "wordpiece": _wordpiece}
AROUND = ["$A", "<s> $A", "$A </s>", "<s> $A </s>"]  # what the tokenizer adds to a text
TEMPLATES = {"none": None, "plain": TEMPLATE, "refusing": REFUSING + TEMPLATE}
PADS = {"own": "<pad>", "end": "</s>", "none": None}


TOKENIZER = ("core", "around", "template", "pad", "side")


@cache
def _trained(core):
    made, trainer = CORES[core]()
    made.train_from_iterator(CORPUS, trainer)
    return made.to_str()


def tokenizer(core, around, template, pad, side):
    made = Tokenizer.from_str(_trained(core))
    if around != "$A":
        ends = [("<s>", 1), ("</s>", 2)]
        made.post_processor = processors.Sequence(
            [processors.ByteLevel(), processors.TemplateProcessing(around, special_tokens=ends)]
            if core == "bytes"
            else [processors.TemplateProcessing(around, special_tokens=ends)]
        )
    return Fast(
        tokenizer_object=made, unk_token="<unk>", eos_token="</s>", pad_token=PADS[pad],
        bos_token="<s>" if "<s>" in around else None, padding_side=side,
        chat_template=TEMPLATES[template],
    )  # fmt: skip


# ---------------------------------------------------------------- data


def asked(text):
    return [{"role": "user", "content": text}]


def begun(text):
    return [*asked("good?"), {"role": "assistant", "content": text}]


def instructed(text):
    return [{"role": "system", "content": "film"}, *asked(text)]


TEXTS = {
    "words": ["the film", "a plot", "good", "the cast of the film and"],
    "duplicates": ["the film", "the film", "the film"],
    "one": ["an end."],
    "empty": ["", "the film", " "],
    "long": ["the film " * 40, "good"],
    "unicode": ["naïve ☃ 電影", "e\u0301 \u200f ", "👩‍👩‍👧", "\x00\x07"],
    "special": ["<s> the film </s>", "</s>", "<pad><pad> good"],
    "lines": ["a\nplot\n", "\n", "\tgood  "],
}
TALKS = {"texts": str, "asked": asked, "begun": begun, "instructed": instructed}
COLUMNS = {
    "none": lambda i: {},
    "numbers": lambda i: {"answer": i, "weight": 0.5},
    "nested": lambda i: {"answer": {"a": [i, None], "b": "☃"}},
    "objects": lambda i: {"answer": object()},
}
SOURCES = ["list", "rows", "dataset", "stream", "jsonl", "generator"]


def data(source, rows, folder):
    if source == "list":
        return [row["prompt"] for row in rows]
    if source == "dataset":
        return Dataset.from_list(rows)
    if source == "stream":
        return IterableDataset.from_generator(partial(iter, rows))
    if source == "generator":
        return (row for row in rows)
    if source == "jsonl":
        path = folder / "prompts.jsonl"
        path.write_text("\n".join(json.dumps(row, default=str) for row in rows))
        return path
    return rows


# ---------------------------------------------------------------- rewards


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def by_text(completions):
    return [text_of(c).count("e") + len(text_of(c)) / 7 for c in completions]


def by_token(completion_ids):
    return [[(i % 7) / 7 for i in ids] for ids in completion_ids]


def constant(completions):
    return [1.0] * len(completions)


def sometimes(completions):
    return [None if i % 2 else x for i, x in enumerate(by_text(completions))]


def never(completions):
    return [None] * len(completions)


def not_a_number(completions):
    return [math.nan if i == 0 else x for i, x in enumerate(by_text(completions))]


def infinite(completions):
    return [math.inf if i == 0 else x for i, x in enumerate(by_text(completions))]


def huge(completions):
    return [1e13 * x for x in by_text(completions)]


def overflowing(completions):
    return [1e30 * (1 + x) for x in by_text(completions)]


def tiny_differences(completions):
    return [1e6 + 1e-9 * x for x in by_text(completions)]


def raises(completions):
    raise KeyError("no such key")


def too_few(completions):
    return by_text(completions)[1:]


def greedy(prompts, completions, completion_ids, **columns):
    """Change every argument."""
    scores = by_text(completions)
    for values in (prompts, completions, completion_ids, *columns.values()):
        if isinstance(values, list):
            for value in values:
                if isinstance(value, list | dict):
                    value.clear()
            values.clear()
    torch.manual_seed(1)
    return scores


@scores_prefixes
def on_prefixes(completions):
    return by_text(completions)


def with_answer(completions, answer):
    return [x + len(str(a)) / 100 for x, a in zip(by_text(completions), answer, strict=True)]


REWARDS = {
    f.__name__: f
    for f in (by_text, by_token, constant, sometimes, never, not_a_number, infinite, huge,
              overflowing, tiny_differences, raises, too_few, greedy, on_prefixes, with_answer)
}  # fmt: skip
USUAL = ["by_text", "by_token", "on_prefixes", "gpt2 model", "greedy"]  # drawn more often
UNUSABLE = {"not_a_number", "infinite", "overflowing", "raises", "too_few"}
JUDGES = {
    "gpt2 model": ("gpt2", GPT),
    "llama model": ("llama", GROUPED),
    "bert model": ("bert", WIDTH),
}


@cache
def shipped_judge(kind):
    name, sizes = JUDGES[kind]
    config = transformers.AutoConfig.for_model(name, **sizes, vocab_size=VOCABULARY["bytes"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_config(config).eval()


def reward(kind):
    if kind in REWARDS:
        return REWARDS[kind]
    judge = tokenizer("bytes", "<s> $A", "plain", "own", "right")
    return RewardModel(copy.deepcopy(shipped_judge(kind)), judge)


# ---------------------------------------------------------------- adapters

lora = partial(LoraConfig, task_type="CAUSAL_LM", target_modules="all-linear")
others = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
ADAPTERS = {
    "default": lambda: None,
    "rank 1": lambda: lora(r=1),
    "rank 8": lambda: lora(r=8, lora_alpha=64),
    "dropout": lambda: lora(r=2, lora_dropout=0.3),
    "dora": lambda: lora(r=2, use_dora=True),
    "rslora": lambda: lora(r=4, use_rslora=True),
    "bias": lambda: lora(r=2, bias="lora_only"),
    "lora bias": lambda: lora(r=2, lora_bias=True),
    "gaussian": lambda: lora(r=2, init_lora_weights="gaussian"),
    "head": lambda: lora(r=2, target_modules=["lm_head"]),
    "saved head": lambda: lora(r=2, modules_to_save=["lm_head"]),
    "no such layer": lambda: lora(r=2, target_modules=["absent"]),
    "loha": lambda: LoHaConfig(r=2, **others),
    "lokr": lambda: LoKrConfig(r=2, **others),
    "oft": lambda: OFTConfig(r=2, oft_block_size=0, **others),
    "vera": lambda: VeraConfig(r=2, **others),
    "ia3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules="all-linear", feedforward_modules=[]
    ),
}

CAME = {"came": "default", "came with a name": "other"}  # with the model, under these names


# ---------------------------------------------------------------- settings

ALGORITHMS = {
    "trpo": lambda: TRPO(max_kl=0.05, cg_iterations=3),
    "far": lambda: TRPO(max_kl=3.0, max_ref_kl=0.5, cg_iterations=3, fisher_completions=2),
    "no budget": lambda: TRPO(max_ref_kl=None, cg_iterations=3, gamma=0.9),
    "npg": lambda: TRPO(line_search_trials=0, cg_iterations=3),
    "ppo": lambda: PPO(epochs=2, minibatches=2),
    "rloo": lambda: PPO(epochs=1, minibatches=1, clip=None, advantage="leave_one_out"),
    "grpo": lambda: PPO(epochs=1, minibatches=2, advantage="group_normalised"),
}
SEARCHING = ("trpo", "far", "no budget")  # hold each step to max_kl
SETTINGS = st.fixed_dictionaries(
    {
        "updates": st.sampled_from([1, 1, 2]),
        "prompts_per_update": st.sampled_from([1, 2, 3]),
        "completions_per_prompt": st.sampled_from([1, 2, 4]),
        "max_completion_length": st.sampled_from([1, 3, 6]),
        "temperature": st.sampled_from([1.0, 0.7, 2.0]),
        "truncate_prompts": st.sampled_from(["left", "left", "error"]),
        "micro_batch_tokens": st.sampled_from([None, 1, 20, 64]),
        "critic": st.sampled_from(["auto", "auto", "prefix", "value_head", "none"]),
        "prefix_stride": st.sampled_from([1, 2]),
        "on_bad_reward": st.sampled_from(["error", "skip"]),
        "mask_truncated_completions": st.sampled_from([False, False, True]),
        "truncated_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "gradient_checkpointing": st.booleans(),
    }
)
RUNS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(sorted(MODELS)),
        "tied": st.booleans(),
        "model_pad": st.sampled_from([None, 0, 2]),
        "dtype": st.sampled_from(DTYPES),
        "core": st.sampled_from(sorted(CORES)),
        "around": st.sampled_from(AROUND),
        "template": st.sampled_from(["plain", "plain", "refusing", "none"]),
        "pad": st.sampled_from(sorted(PADS)),
        "side": st.sampled_from(["left", "right"]),
        "texts": st.sampled_from(sorted(TEXTS)),
        "talk": st.sampled_from(["texts", "texts", "asked", "begun", "instructed"]),
        "columns": st.sampled_from(sorted(COLUMNS)),
        "source": st.sampled_from(SOURCES),
        "reward": st.sampled_from([*sorted([*REWARDS, *JUDGES]), *2 * USUAL]),
        "adapter": st.sampled_from(sorted([*ADAPTERS, *CAME])),
        "algorithm": st.sampled_from(sorted(ALGORITHMS)),
        "settings": SETTINGS,
    }
)


class Silent:
    """A display that shows nothing."""

    def __getattr__(self, name):
        return lambda *_, **__: False


def build(run, folder):
    """Return what makes the trainer of an example, and the untouched rows and base."""
    rows = [
        {"prompt": TALKS[run["talk"]](text), **COLUMNS[run["columns"]](i)}
        for i, text in enumerate(TEXTS[run["texts"]])
    ]
    dtype = "float32" if run["model"] in ROUTED else run["dtype"]
    base = shipped_model(*(run[k] for k in ("model", "core", "tied", "model_pad")), dtype)
    source = run["source"]
    if run["columns"] == "objects" and source in ("dataset", "stream"):
        source = "rows"  # they hold no such thing

    def model():
        made = copy.deepcopy(base)
        if run["adapter"] not in CAME or run["model"] == "mamba":  # where peft refuses it
            return made
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapter = lora(r=2, init_lora_weights=False)
            return get_peft_model(made, adapter, adapter_name=CAME[run["adapter"]])

    def make():
        return Trainer(
            model(),
            reward(run["reward"]),
            train_dataset=data(source, rows, folder),
            args=TrainerConfig(output_dir=str(folder / "run"), save_steps=0, **run["settings"]),
            processing_class=tokenizer(*(run[name] for name in TOKENIZER)),
            peft_config=ADAPTERS.get(run["adapter"], lambda: None)(),
            algorithm=ALGORITHMS[run["algorithm"]](),
            display=Silent(),
            plots=False,
        )  # fmt: skip

    return make, base


# ---------------------------------------------------------------- the contract


@torch.no_grad()
def plain_logits(model, ids):
    """One row, nothing but its tokens."""
    return model(input_ids=torch.tensor([ids])).logits[0].float()


def plain_logprobs(policy, rollout):
    """Log-probability of every action by a forward pass of each row by itself."""
    found = []
    P = rollout.input_ids.shape[1] - rollout.action_mask.shape[1]
    for row, mask, n in zip(
        rollout.input_ids, rollout.attention_mask, rollout.lengths, strict=True
    ):
        ids = row[mask.bool()].tolist()
        prompt = int(mask[:P].sum())
        assert len(ids) == prompt + int(n)
        logprobs = (plain_logits(policy.base, ids) / policy.temperature).log_softmax(-1)
        found += [logprobs[t - 1, ids[t]] for t in range(prompt, len(ids))]
    return torch.stack(found)


def hold_to_contract(run, folder):
    make, base = build(run, folder)
    made, generated, batches = None, [], []
    loose = run["dtype"] == "bfloat16"

    def measured(policy, rollout):
        batch = Batch.from_rollout(policy, rollout)
        error = (batch.old_logprobs.float() - plain_logprobs(policy, rollout)).abs().max()
        assert error <= (0.3 if loose else 2e-4), f"log-probabilities are {error} off"
        if not batches:
            assert batch.ref_kl.max() <= (1e-4 if loose else 1e-6), "KL does not start at 0"
        batches.append(batch)
        return batch

    def generate(model, *args, **options):
        if made is not None:  # before, the examination tries a token
            generated.append(1)
        return plain_generate(model, *args, **options)

    mixin = transformers.GenerationMixin
    plain_generate = mixin.generate
    with patch.object(mixin, "generate", generate), patch.object(
        trpo_lm.training.trainer, "Batch", wraps=Batch, from_rollout=measured
    ):  # fmt: skip
        try:
            made = make()
            start = made.policy.parameters.checksum()
            before = made.prompts.fingerprint()
            rows = made.train()
        except RunFault as fault:
            assert run["reward"] in UNUSABLE, fault
            assert made.policy.parameters.checksum() == start
            return f"fault: {run['reward']}"
        except TrpoLMError as error:
            assert not generated, error
            return f"refused: {error.what:.50}"
    assert made.prompts.fingerprint() == before
    assert len(rows) == len(batches) == made.args.updates
    if run["algorithm"] in SEARCHING:
        kls = [row["trust_region/kl"] for row in rows if row["line_search/accepted"]]
        assert all(kl <= made.algorithm.max_kl for kl in kls), kls
    last = batches[-1].rollout
    ids = last.input_ids[0][last.attention_mask[0].bool()].tolist()
    saved = PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "run")).eval()
    error = (plain_logits(saved, ids) - plain_logits(made.policy.model, ids)).abs().max()
    assert error <= (0.1 if loose else 1e-4), f"the saved adapter's logits are {error} off"
    return f"skipped: {rows[0]['skipped']}" if rows[0]["skipped"] else "trained"


@pytest.mark.slow
@settings(
    max_examples=int(BY_HAND or 100),
    derandomize=BY_HAND is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink] if BY_HAND else [Phase.generate],
)
@given(run=RUNS)
def test_any_run_is_refused_at_the_start_or_true(tmp_path_factory, run):
    event(hold_to_contract(run, tmp_path_factory.mktemp("run")))
