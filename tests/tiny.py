"""Tiny random models, a small tokenizer and short rollouts for the tests of layers 0 to 2."""

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trpo_lm.core.divergences import categorical_kl, token_logprobs
from trpo_lm.lm.mdp import TokenMDP
from trpo_lm.lm.objective import BatchObjective
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.rewards import Rewards
from trpo_lm.lm.rollout import Batch

PAD, BOS, EOS, UNK = 0, 1, 2, 3
WORDS = [f"w{i}" for i in range(9)]
V = 4 + len(WORDS)  # 13
STOPS = (EOS, 6, 9)  # several ends, so that random models do end
LETTERS = {"vocab_size": V, "initializer_range": 0.35}
ENDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
ROTARY = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w0 w1 w2 w8 w7"]


def tokenizer(*, bos=True, pad=True, eos=True, chat_template=None):
    """Words and four special tokens; `bos` puts <bos> before a text."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    names = {"unk_token": "<unk>"}
    names |= {"bos_token": "<bos>"} if bos else {}
    names |= {"pad_token": "<pad>"} if pad else {}
    names |= {"eos_token": "<eos>"} if eos else {}
    out = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)
    out.chat_template = chat_template
    return out


def build(kind="gpt2", *, seed=0, dtype=torch.float32, **options):
    """Return a random causal LM of that kind with V words."""
    common = {**LETTERS, **ENDS, "tie_word_embeddings": kind == "gpt2"}
    gpt2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 64}
    heads = {"head_dim": 4}
    pythia = {k: v for k, v in ROTARY.items() if k != "num_key_value_heads"}
    config, cls = {
        "gpt2": (lambda o: GPT2Config(**{**common, **gpt2, **o}), GPT2LMHeadModel),
        "llama": (lambda o: LlamaConfig(**{**common, **ROTARY, **o}), LlamaForCausalLM),
        "qwen2": (lambda o: Qwen2Config(**{**common, **ROTARY, **o}), Qwen2ForCausalLM),
        "neox": (lambda o: GPTNeoXConfig(**{**common, **pythia, **o}), GPTNeoXForCausalLM),
        "gemma2": (
            lambda o: Gemma2Config(**{**common, **ROTARY, **heads, **o}),
            Gemma2ForCausalLM,
        ),
    }[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config(options)).to(dtype)


def lora(**options):
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 2, "target_modules": "all-linear"}
        | options
    )


def policy(kind="gpt2", *, seed=0, dtype=torch.float32, peft=None, spread=0.0, model=None, **rest):
    """Return a policy on a tiny model; `spread` moves the adapter away from its initial B = 0."""
    peft = lora() if peft is None else peft
    out = Policy(model or build(kind, seed=seed, dtype=dtype), peft, seed=seed, **rest)
    if spread:
        perturb(out, spread, seed=seed)
    return out


@torch.no_grad()
def perturb(policy, spread, *, seed=0):
    """Move every trainable parameter by normal noise."""
    noise = torch.Generator().manual_seed(seed + 1)
    for p in policy.parameters.tensors:
        p += spread * torch.randn(p.shape, generator=noise, dtype=torch.float64).to(p)


def mdp(reward=None, *, length=5, tok=None, eos=STOPS, **options):
    tok = tok or tokenizer()
    function = reward or (lambda completions: [float(c.count("w1")) for c in completions])
    return TokenMDP(
        tok, Rewards(function), eos_token_ids=list(eos), max_completion_length=length, **options
    )


def batch(policy, *, prompts=PROMPTS, each=2, length=5, seed=0, micro_batch_tokens=24, **options):
    """Return a rollout with what old policy and reference say of it."""
    rollout = mdp(length=length, **options).rollout(
        policy, prompts, completions_per_prompt=each, seed=(seed,)
    )
    policy.room.most = micro_batch_tokens
    return Batch.from_rollout(policy, rollout)


def advantages(batch):
    """Return made-up, standardised advantages of every action of a batch, (S,)."""
    noise = torch.Generator().manual_seed(7)
    A = torch.randn(len(batch.actions), generator=noise, dtype=torch.float64)
    return A.to(batch.old_logprobs)


def objective(policy, batch, A=None, seed=(0,)):
    """Return the objective of a batch with the advantages given, (N, T), or made-up ones."""
    A = batch.rollout.padded(advantages(batch)) if A is None else A
    return BatchObjective(policy, batch, A, identity, seed)


def identity(t):
    """The reduction of a single process."""
    return t


def dense(product, size, dtype=torch.float64):
    """Return the matrix of a linear map on vectors."""
    return torch.stack([product(e) for e in torch.eye(size, dtype=dtype)], dim=1)


def own_logits(policy, rollout, rows=None):
    """Return the model's own tempered logits at the states of some rows, by the plainest path."""
    rows = range(len(rollout)) if rows is None else rows
    P = rollout.input_ids.shape[1] - rollout.action_mask.shape[1]
    found = []
    for i in rows:
        real = rollout.attention_mask[i].bool()
        ids = rollout.input_ids[i][real][None]
        start = int(real[:P].sum())
        logits = policy.base(input_ids=ids, use_cache=False).logits[0]
        found.append(logits[start - 1 : start - 1 + int(rollout.lengths[i])])
    return torch.cat(found) / policy.temperature


def mean_gradients(policy, batch, *, reference=True):
    """grad L and grad R per completion."""
    g, b = objective(policy, batch).gradients(reference=reference)
    return g.sum(0) / len(batch.rollout), None if b is None else b.sum(0) / len(batch.rollout)


def plain_ref_kl(log_ratio, kl, rollout):
    """R = sum_t E[w_t KL_t] / E[w_t], w_t = prod_{t'<t} ratio_t', in loops.

    A completion that has ended has KL 0 and keeps its weight.
    """
    rows = [rollout.token_index(torch.tensor([i])) for i in range(len(rollout))]
    R = 0.0
    for t in range(int(rollout.lengths.max())):
        weights = [log_ratio[at[:t]].sum().exp() for at in rows]
        paid = [w * kl[at[t]] for w, at in zip(weights, rows, strict=True) if t < len(at)]
        R = R + sum(paid) / sum(weights)
    return R


def plain_quantities(policy, batch):
    """L, D and R with graphs, from the model's own logits, row by row, in the plainest way.

    The gradient of R has both parts, the change of each KL and the change of what is visited.
    """
    r = batch.rollout
    with torch.no_grad(), policy.reference():
        ref = own_logits(policy, r).log_softmax(-1)
    new = own_logits(policy, r).log_softmax(-1)
    logprob = token_logprobs(new, batch.actions)
    log_ratio = logprob - logprob.detach()
    L = (log_ratio.exp() * advantages(batch)).sum() / len(r)
    D = categorical_kl(old=new.detach(), new=new).sum() / len(r)
    return L, D, plain_ref_kl(log_ratio, categorical_kl(old=new, new=ref), r)
