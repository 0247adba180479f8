"""A saved run, opened again: to evaluate its policy, look at its tokens, or merge its adapter.

The folder of a run is enough: it holds the adapter, the settings, the critic, the tokenizer and the
held-out prompts. The base model and the reward models are loaded by name; a reward that is a
function has to be passed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from trpo_lm.analysis.probe import probe
from trpo_lm.config import LORA, ModelSettings, TrainerConfig, describe
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.critic import Critic
from trpo_lm.lm.loading import dtype_name, load_model, load_tokenizer, quiet_loading
from trpo_lm.lm.mdp import TokenMDP
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompts, load_prompts
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.rewards import Rewards, abstain
from trpo_lm.lm.rollout import Rollout
from trpo_lm.report.statistics import bootstrap_interval
from trpo_lm.storage import Row, read_json_lines
from trpo_lm.training.assembly import assemble, make_rewards
from trpo_lm.training.best import load_best
from trpo_lm.training.folder import (
    ADAPTER,
    CRITIC,
    RunFolder,
    Settings,
    checkpoint_order,
    load_settings,
)

# What the settings of a run hold of the trainer's; its adapter has a file of its own.
_SETTINGS = [name for name in describe(TrainerConfig()) if name not in LORA]


@dataclass(frozen=True)
class FinishedRun:
    """A saved policy, ready to use.

    Attributes:
        folder: Of the run.
        checkpoint: Which of its policies this is: 'last', 'best' or the number of an update.
        update: Number of updates that made it.
        settings: Content of `config.yaml`.
        policy: At the saved parameters; its reference is that of the run.
        mdp: Tokenizer, rewards, length of a completion.
        rewards: What the run was trained to raise; None where that is a function and none was
            passed. Completions then have no score.
        critic: As it was saved; None without one, or when other rewards were passed.
    """

    folder: Path
    checkpoint: str
    update: int
    settings: Settings
    policy: Policy
    mdp: TokenMDP
    rewards: Rewards | None
    critic: Critic | None


def open_run(
    folder: str | Path, checkpoint: str = "last", *, reward: Any = None, plain: bool = False
) -> FinishedRun:
    """Load a saved policy with its reference, critic and rewards.

    Args:
        folder: Of a run.
        checkpoint: 'last' (the finished run's own), 'best', or the number of a checkpoint.
        reward: As for `Trainer(reward_funcs=...)`; default: the run's own reward models.
        plain: Turn the base, which is loaded as the run did, into float32 weights of the same
            values: what an adapter can be merged into.

    Raises:
        TrpoLMError: If there is no such run or policy, or a model it was made from is missing.
    """
    run = RunFolder(folder)
    saved = _saved_policy(run, checkpoint)
    settings = _settings(run)
    args = TrainerConfig(**{name: settings[name] for name in _SETTINGS})
    args = replace(args, gradient_checkpointing=False)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = settings["model"]
    if plain:
        with quiet_loading():
            model = load_model(model, args, device=device, plain=True)
        args = replace(args, **describe(ModelSettings()))  # they cannot apply once more
    rewards = _rewards(settings, args, reward, device)
    valued = reward is None and rewards is not None and (saved / CRITIC).is_file()
    with_tokenizer = (run.path / "tokenizer_config.json").is_file()
    parts = assemble(
        model,
        rewards or Rewards(abstain),
        args if valued else replace(args, critic="none"),
        device=device,
        peft_config=_adapter(settings, saved),
        tokenizer=load_tokenizer(str(run.path)) if with_tokenizer else None,
    )
    parts.policy.load(load_file(saved / ADAPTER), where=str(saved))
    if valued:
        parts.critic.load(load_file(saved / CRITIC))
    return FinishedRun(
        run.path,
        checkpoint,
        _update(run, checkpoint),
        settings,
        parts.policy,
        parts.mdp,
        rewards,
        parts.critic if valued else None,
    )


def held_out_prompts(run: FinishedRun) -> Prompts | None:
    """Return the prompts that a run was evaluated on; None if it had none."""
    file = RunFolder(run.folder).held_out
    return load_prompts(file) if file.is_file() else None


def evaluate(
    run: FinishedRun,
    prompts: Prompts,
    *,
    completions: int = 4,
    seed: int = 0,
    judge: Callable[..., list[float]] | None = None,
) -> Row:
    """Measure a policy and its reference on prompts that neither was trained on.

    Both are sampled with the same random numbers, and differences are taken prompt by prompt.
    Intervals are 95% percentile bootstrap intervals over prompts: they say how far the figures
    would move with other prompts, not with another training run.

    Args:
        run: With rewards.
        prompts: Held-out ones.
        completions: Sampled for each prompt, >= 1.
        seed: What the random numbers derive from.
        judge: Scores prompts and completions; nothing was trained on it.

    Returns:
        `reference` and `policy`, each with the results of `probe`, `score_interval` and
        `judge_interval`; `difference` of `score` and `judge` with their intervals. What was not
        measured is None.

    Raises:
        TrpoLMError: If the run's rewards are not known.
    """
    if run.rewards is None:
        raise TrpoLMError(
            f"the run was trained on {', '.join(run.settings['reward_funcs'])}, a function that "
            "its folder does not hold",
            where="reward",
            hint="--reward_function module:callable, or in Python open_run(folder, reward=...)",
        )
    run.rewards.check_columns(prompts.columns)
    with run.policy.reference():
        text = _sample(run, prompts, completions, seed)
        reference, reference_means = _measure(run, text, text, completions, judge)
    rollout = _sample(run, prompts, completions, seed)
    policy, policy_means = _measure(run, rollout, text, completions, judge)
    difference: Row = {}
    for kind, before in reference_means.items():
        gain = policy_means[kind] - before
        mean = float(gain.nanmean())
        difference[kind] = mean if isfinite(mean) else None
        difference[f"{kind}_interval"] = _interval(gain)
    return {"reference": reference, "policy": policy, "difference": difference}


def _sample(run: FinishedRun, prompts: Prompts, completions: int, seed: int) -> Rollout:
    return run.mdp.rollout(
        run.policy,
        prompts.prompts,
        columns=prompts.columns,
        completions_per_prompt=completions,
        seed=(seed, "evaluate"),
    )


def _measure(
    run: FinishedRun,
    rollout: Rollout,
    text: Rollout,
    completions: int,
    judge: Callable[..., list[float]] | None,
) -> tuple[Row, dict[str, Tensor]]:
    """Return the results of `probe` with intervals, and the mean score of each prompt, (P,)."""
    verdicts = None if judge is None else judge(rollout.prompts, rollout.completions)
    results: Row = probe(
        run.policy,
        rollout,
        text,
        judge=None if verdicts is None else lambda *_: verdicts,
    )
    scores = rollout.scores
    each = {"score": scores.score.double().where(scores.valid, torch.nan)}
    if verdicts is not None:
        each["judge"] = torch.tensor(verdicts).double()
    means = {kind: x.reshape(-1, completions).nanmean(-1) for kind, x in each.items()}
    return results | {f"{kind}_interval": _interval(x) for kind, x in means.items()}, means


def merge(run: FinishedRun, out: str | Path) -> None:
    """Write the policy as a plain transformers model with its tokenizer.

    W + B A in place of each adapted layer's W. The logits are those of the policy before its
    temperature. W is what the run computed with: a base that was quantised is written as the
    float32 weights that its numbers stand for.

    Args:
        run: Opened with `plain=True`: rounding W + B A would change the logits. Its policy loses
            its adapter and cannot be used afterwards.
        out: New or empty folder.

    Raises:
        TrpoLMError: If the folder holds something, or the weights are not float32.
        RunFault: If the merged model's logits differ from the policy's.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrpoLMError(f"{out} exists and is not empty", where="out", hint="name a new folder")
    policy = run.policy
    if policy.quantized or dtype_name(policy.base) in ("bfloat16", "float16"):
        raise TrpoLMError(
            "an adapter can be merged into weights of full precision only", where=str(run.folder),
            hint="open_run(folder, plain=True), as recipes/merge.py does",
        )  # fmt: skip
    probe_text = policy.probe_inputs()
    with torch.no_grad():
        before = policy.base(**probe_text).logits.float()
        model: Any = policy.model.merge_and_unload()
        gap = float((model(**probe_text).logits.float() - before).abs().max())
    if gap > 1e-4 * float(before.abs().max()):
        raise RunFault(
            f"merging changes a logit by {gap:.2g}", where=str(run.folder),
            hint="keep the adapter: peft loads it (an adapted output layer that shares its weights "
            "with the embedding cannot be merged)",
        )  # fmt: skip
    with quiet_loading():
        model.save_pretrained(str(out))
    run.mdp.tokenizer.save_pretrained(str(out))


# ---------------------------------------------------------------- parts of opening


def _saved_policy(run: RunFolder, checkpoint: str) -> Path:
    """Return the folder that holds the adapter of a checkpoint."""
    places = {"last": run.path, "best": run.best}
    places |= {str(checkpoint_order(path)[0]): path for path in reversed(run.checkpoints())}
    there = [name for name, place in places.items() if (place / ADAPTER).is_file()]
    if checkpoint not in there:
        raise TrpoLMError(
            f"there is no policy {checkpoint!r}; there are {', '.join(there) or 'none'}",
            where=str(run.path),
            hint="name the folder of a finished run, and with --checkpoint one of its policies",
        )
    return places[checkpoint]


def _update(run: RunFolder, checkpoint: str) -> int:
    """Return the number of updates behind a policy."""
    if checkpoint == "best":
        return load_best(run.best).update
    if checkpoint != "last":
        return int(checkpoint)
    return max((row["update"] for row in read_json_lines(run.metrics)), default=0)


def _settings(run: RunFolder) -> Settings:
    """Read the settings of a run of this version."""
    try:
        settings = load_settings(run.path)
        if settings.keys() >= {"model", "reference", "reward_models", *_SETTINGS}:
            return settings
        reason = "they are not those of a run of this version"
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0]
    raise TrpoLMError(f"the settings of the run cannot be used: {reason}", where=str(run.settings))


def _adapter(settings: Settings, saved: Path) -> PeftConfig | None:
    """Return the adapter that the run added to its model; None where the model came with one."""
    if settings["reference"] != "adapter":
        adapter = PeftConfig.from_pretrained(str(saved))
        adapter.inference_mode = False
        return adapter
    if not (Path(settings["model"]) / "adapter_config.json").is_file():
        raise TrpoLMError(
            "the run trained an adapter that was passed as an object: its reference is not known "
            "by name",
            where=str(saved),
            hint="save that adapter and train from its folder",
        )
    return None


def _rewards(
    settings: Settings, args: TrainerConfig, reward: Any, device: torch.device
) -> Rewards | None:
    """Return the rewards passed, or else the run's own where all of them are models."""
    plain = replace(args, allow_untrained_reward_head=False, reward_timeout=None)
    if reward is not None:
        plain = replace(plain, reward_weights=None, on_bad_reward="error")
        return make_rewards(reward, None, plain, device)
    sources = settings["reward_models"]
    if not all(sources):
        return None
    options = {"prefix_stride": args.prefix_stride, "device": device}
    with quiet_loading():
        models = [RewardModel(s["model"], label=s["label"], **options) for s in sources]
    return make_rewards(models, None, plain, device)


def _interval(values: Tensor) -> list[float] | None:
    """Return a 95% interval of the mean; None for fewer than two values."""
    low, high = bootstrap_interval(values.numpy())
    return [low, high] if isfinite(low) else None
