"""The parts of a run, put together in one place: for training, reopening and comparing.

`Trainer`, `analysis.saved_run.open_run` and TRL's arm of a comparison all call `assemble`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from trpo_lm.config import DTYPES, LORA, TrainerConfig, describe
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.critic import Critic, make_critic
from trpo_lm.lm.examination import (
    examine,
    ids_have_embeddings,
    longest_row_can_be_read,
    longest_text_fits,
    pooling_is_its_own,
    texts_join,
)
from trpo_lm.lm.identity import base_digest, equals_files, tensors_digest, tokenizer_digest
from trpo_lm.lm.loading import as_tokenizer, dtype_name, quiet_loading
from trpo_lm.lm.mdp import TokenMDP, end_token_ids
from trpo_lm.lm.policy import Policy, Shards
from trpo_lm.lm.prompts import TEMPLATE_COLUMNS, Prompts, check_prompts, load_prompts
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.rewards import Rewards
from trpo_lm.lm.servers import (
    Servers,
    longest_row_is_served,
    published_is_sampled,
    servers_answer,
    tokenizers_agree,
)
from trpo_lm.seeds import generator
from trpo_lm.training.folder import RunFolder, Settings
from trpo_lm.training.ranks import Ranks

TEXTS = 16  # prompts on which the decoder is tried
WORDIEST = 4  # tokens that a reward model may read one of the policy's as


@dataclass(frozen=True)
class Data:
    """The prompts of a run; every evaluation uses all the held-out ones."""

    train: Prompts
    held_out: Prompts | None = None


@dataclass(frozen=True)
class Parts:
    """A policy, and all that sampling, scoring and valuing its completions needs."""

    policy: Policy
    tokenizer: Any
    rewards: Rewards
    mdp: TokenMDP
    critic: Critic


def assemble(
    model: str | PreTrainedModel | PeftModel,
    rewards: Rewards,
    args: TrainerConfig,
    *,
    device: torch.device,
    peft_config: PeftConfig | None = None,
    tokenizer: Any = None,
    shards: Shards | None = None,
) -> Parts:
    """Load a model and build a run's parts around it.

    Args:
        model: Hugging Face name or path, a causal LM, or a PeftModel.
        rewards: From `make_rewards`.
        args: Settings of the run.
        device: Where to put the model.
        peft_config: Adapter to train; the LoRA of `args` when None.
        tokenizer: One, a processor that has one, or the name or path of either; the model's own
            when None.
        shards: Processes that hold the base together; None: this one holds it whole.

    Raises:
        TrpoLMError: If the model or its tokenizer cannot be used.
    """
    with quiet_loading():
        policy = Policy(
            model,
            peft_config,
            args,
            temperature=args.temperature,
            gradient_checkpointing=args.gradient_checkpointing,
            seed=args.seed,
            device=device,
            micro_batch_tokens=args.micro_batch_tokens,
            shards=shards,
        )
        tokenizer = as_tokenizer(policy.name if tokenizer is None else tokenizer)
    mdp = TokenMDP(
        tokenizer,
        rewards,
        eos_token_ids=end_token_ids(policy.base, tokenizer),
        max_completion_length=args.max_completion_length,
        template_arguments=args.chat_template_kwargs,
    )
    critic = make_critic(
        args.critic,
        can_score_prefixes=rewards.can_score_prefixes,
        width=policy.base.config.get_text_config().hidden_size,
        length=args.max_completion_length,
    )
    if critic.reads_prefixes:
        rewards.check_prefixes()
    return Parts(policy, tokenizer, rewards, mdp, critic)


def make_rewards(
    reward_funcs: Any, data: Data | None, args: TrainerConfig, device: torch.device
) -> Rewards:
    """Make one reward of several functions and reward models; see `rewards.Rewards`.

    Raises:
        TrpoLMError: If one cannot be used, or asks for a column that the data lacks.
    """
    many = isinstance(reward_funcs, list | tuple)
    given = [
        os.fspath(f) if isinstance(f, os.PathLike) else f
        for f in (reward_funcs if many else [reward_funcs])
    ]
    with quiet_loading():
        rewards = Rewards(
            given,
            args.reward_weights,
            on_bad_reward=args.on_bad_reward,
            timeout=args.reward_timeout,
            workers=args.reward_workers,
            retries=args.reward_retries,
            mask_truncated=args.mask_truncated_completions,
            truncated_penalty=args.truncated_penalty,
            reward_model_options={
                "prefix_stride": args.prefix_stride,
                "allow_untrained_head": args.allow_untrained_reward_head,
                "device": device,
            },
        )
    for model in rewards.models:
        examine(pooling_is_its_own, model, of=model.__name__)
    if data is not None:
        rewards.check_columns(data.train.columns)
        if data.held_out is not None:
            rewards.check_columns(data.held_out.columns)
    return rewards


# ---------------------------------------------------------------- prompts


def load_data(train: Any, held_out: Any, column: str, args: TrainerConfig, processes: int) -> Data:
    """Load the prompts of a run; see `prompts.load_prompts`.

    Raises:
        TrpoLMError: If a dataset cannot be used, or a process would get no prompt.
    """
    prompts = load_prompts(train, column=column)
    shares = {"prompts_per_update": args.prompts_per_update}
    evaluated = None
    if held_out is not None:
        evaluated = load_prompts(held_out, column=column)
        shares["eval_prompts"] = min(len(evaluated), args.eval_prompts)
    for setting, count in shares.items():
        if count < processes:
            raise TrpoLMError(
                f"{count} prompts cannot be shared by {processes} processes", where=setting
            )
    return Data(prompts, evaluated)


def fit_data(data: Data, parts: Parts, args: TrainerConfig, note: Callable[[str], None]) -> Data:
    """Return prompts that all fit into the model's context, and of the held-out ones the first.

    Args:
        data: From `load_data`.
        parts: Whose tokenizer and context they must fit.
        args: How long a completion is, whether to truncate prompts, how many to evaluate on.
        note: Told how many were truncated.

    Raises:
        TrpoLMError: Names a prompt that cannot be encoded, or does not fit and may not be cut.
    """
    context = parts.policy.context_length
    room = None if context is None else context - args.max_completion_length
    if room is not None and room < 1:
        raise TrpoLMError(
            f"{args.max_completion_length} tokens leave no room for a prompt in a context of "
            f"{context}",
            where="max_completion_length",
        )

    policy, mdp, models = parts.policy, parts.mdp, parts.rewards.models
    longest = [0] * len(models)  # prompt of each reward model, tokens

    def fit(prompts: Prompts) -> Prompts:
        """Every row of the dataset becomes tokens, for the policy and for reward models."""
        fitting, truncated = check_prompts(
            prompts,
            parts.tokenizer,
            room=room,
            truncate=args.truncate_prompts,
            embeddings=policy.embeddings,
            template_arguments=args.chat_template_kwargs,
        )
        for k, model in enumerate(models):
            longest[k] = max(longest[k], model.check_prompts(fitting.prompts, fitting.columns))
        if truncated:
            note(f"{truncated} prompts were truncated on the left to fit {room} tokens")
        return fitting

    ends = ("eos token", mdp.eos_token_ids), ("pad token", [mdp.pad_token_id])
    examine(ids_have_embeddings, ends, policy.embeddings, parts.tokenizer, of="eos and pad")
    train = examine(fit, data.train, of="training")
    held_out = data.held_out and examine(fit, data.held_out, of="held out")
    if context is None:
        tokens = longest_row(Data(train, held_out), parts)
        examine(longest_row_can_be_read, policy.base, tokens)
    few = Prompts(*train.take(range(min(len(train), TEXTS))))
    examine(texts_join, mdp, few.prompts, mdp.encode(few.prompts, few.columns))
    for model, prompt in zip(models, longest, strict=True):
        tokens = prompt + WORDIEST * args.max_completion_length
        examine(longest_text_fits, model, tokens, of=model.__name__)
    talks = any(not isinstance(prompt, str) for prompt in train.prompts)
    if args.chat_template_kwargs and not talks:
        raise TrpoLMError(
            f"{args.chat_template_kwargs} are for a chat template, and no prompt is a conversation",
            where="chat_template_kwargs",
            hint="give prompts as lists of messages, or leave it out",
        )
    unused = [n for n in train.columns if not parts.rewards.reads(n)]
    unused = [n for n in unused if not (talks and n in TEMPLATE_COLUMNS)]
    if unused:
        note(f"columns of the dataset that no reward takes, not used: {', '.join(unused)}")
    if unknown := {n for p in (train, held_out) if p is not None for n in p.uncompared()}:
        note(
            "values that cannot be told apart by their content; a resumed run will not notice if "
            f"they changed: {', '.join(sorted(unknown))}"
        )
    if held_out is not None:
        first = range(min(len(held_out), args.eval_prompts))
        held_out = Prompts(*held_out.take(first))
    return Data(train, held_out)


def join_servers(data: Data, parts: Parts, args: TrainerConfig, ranks: Ranks) -> Servers | None:
    """Return the servers that sample for a run, examined; None if it samples itself.

    Args:
        data: From `fit_data`.
        parts: What is sampled.
        args: Where the servers are, and how long they may take.
        ranks: The processes of the run.

    Raises:
        TrpoLMError: If a server is not there, or does not serve what is trained.
    """
    if args.rollout_servers is None:
        return None
    policy, mdp, run = parts.policy, parts.mdp, ranks.share(secrets.token_hex(4))
    servers = Servers(
        args.rollout_servers,
        RunFolder(args.output_dir).path / f".tmp-adapters-{run}",
        run=run,
        vocabulary=policy.vocabulary_size,
        patience=args.rollout_timeout,
        on_main=ranks.on_main,
    )
    few = mdp.encode(*data.train.take(range(min(len(data.train), TEXTS))))

    def from_here() -> None:
        """Check what every process relies on."""
        examine(servers_answer, servers)
        context = policy.context_length
        if context is None or any(server.context < context for server in servers.servers):
            examine(longest_row_is_served, servers, longest_row(data, parts))
        examine(tokenizers_agree, servers, parts.tokenizer)

    ranks.agree(from_here)
    length = args.max_completion_length
    ranks.agree(lambda: examine(published_is_sampled, servers, policy, few, most=length))
    return servers


def longest_row(data: Data, parts: Parts) -> int:
    """Return the tokens of the longest prompt and its completion."""
    mdp, of_run = parts.mdp, (data.train, data.held_out)
    rows = [row for p in of_run if p for row in mdp.encode(p.prompts, p.columns)]
    return max(map(len, rows)) + mdp.max_completion_length


def prompts_of_update(update: int, args: TrainerConfig, count: int) -> list[int]:
    """Return which of `count` prompts an update samples: a new shuffle each epoch, by the seed."""
    n = args.prompts_per_update
    places = range((update - 1) * n, update * n)
    shuffles = {
        epoch: torch.randperm(count, generator=generator(args.seed, "prompts", epoch)).tolist()
        for epoch in {place // count for place in places}
    }
    return [shuffles[place // count][place % count] for place in places]


# ---------------------------------------------------------------- settings


def run_settings(
    parts: Parts, algorithm: Any, args: TrainerConfig, prompts: Prompts, processes: int
) -> Settings:
    """Return all settings that decide the result of a run, as plain values."""
    policy, rewards = parts.policy, parts.rewards
    return {
        "model": policy.name,
        "adapter": _adapter_settings(policy),
        "algorithm": type(algorithm).__name__,
        "reward_funcs": rewards.names,
        "prompts": len(prompts),
        "dataset": prompts.fingerprint(),
        "hub_dataset": prompts.hub_id,
        "world_size": processes,
        "reference": "adapter" if policy.came_with_adapter else "base model",
        "reward_models": [_source(function) for function in rewards.functions],
        "digests": digests(parts),
        **{name: value for name, value in describe(args).items() if name not in LORA},
        **_precision(policy),
        **describe(algorithm),
    }


def _precision(policy: Policy) -> Settings:
    """Return how the base is loaded, whether by settings or as an object: what reopening needs."""
    dtype = dtype_name(policy.base)
    return {
        "dtype": dtype if dtype in DTYPES else "auto",
        "load_in_4bit": bool(getattr(policy.base, "is_loaded_in_4bit", False)),
        "load_in_8bit": bool(getattr(policy.base, "is_loaded_in_8bit", False)),
    }


def digests(parts: Parts, base: str | None = None) -> Settings:
    """Return what a run is trained on, as `identity` sees it; before the first update.

    base         the frozen model; given, if it was changed since it was loaded
    reference    the base, or the base below the adapter that the model came with
    tokenizer
    rewards      reward models; None for a function
    """
    policy = parts.policy
    base = reference = base or policy.digest or base_digest(policy.model)
    if policy.came_with_adapter:
        adapter = ((str(i), p) for i, p in enumerate(policy.parameters.tensors))
        reference = f"{base}+{tensors_digest(adapter)}"
    return {
        "base": base,
        "reference": reference,
        "tokenizer": tokenizer_digest(parts.tokenizer),
        "rewards": reward_digests(parts.rewards),
    }


def reward_digests(rewards: Rewards) -> list[str | None]:
    """Return the digest of each reward model; None for a function."""
    return [base_digest(f.model) if isinstance(f, RewardModel) else None for f in rewards.functions]


def unsaved_model_note(model: Any, policy: Policy) -> str | None:
    """Say if a model was passed as an object that no files under its name equal."""
    if isinstance(model, str) or policy.quantized or policy.sharded:
        return None  # these can be compared when they are loaded again only
    if equals_files(policy.model, policy.name):
        return None
    return (
        f"the model is an object, and no files under its name, {policy.name!r}, equal it: to open "
        "this run again, save the model first and train it from its folder"
    )


def _adapter_settings(policy: Policy) -> Settings:
    """Return the settings of the trained adapter on which its parameters depend."""
    adapter: Any = policy.model.peft_config[str(policy.model.active_adapter)]
    targets = adapter.target_modules
    return {
        **{name: getattr(adapter, name, None) for name in ("r", "lora_alpha", "lora_dropout")},
        "target_modules": targets if isinstance(targets, str) else sorted(targets or []),
    }


def _source(function: Any) -> Settings | None:
    """Return name and rewarded output of a reward model; None for a function."""
    if not isinstance(function, RewardModel):
        return None
    return {"model": function.model.name_or_path, "label": function.label}
