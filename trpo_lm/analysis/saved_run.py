"""A saved run, opened again: to evaluate its policy, look at its tokens, or merge its adapter.

The folder of a run is enough: it holds the adapter, the settings, the critic, the tokenizer and the
held-out prompts. The base model and the reward models are loaded by name; a reward that is a
function has to be passed again.
"""

from __future__ import annotations

import logging
import numbers
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from trpo_lm.analysis.probe import probe
from trpo_lm.config import LORA, ModelSettings, TrainerConfig, describe
from trpo_lm.errors import RunFault, TrpoLMError, first_line
from trpo_lm.lm.critic import Critic
from trpo_lm.lm.identity import base_digest
from trpo_lm.lm.loading import dtype_name, load_model, load_tokenizer, quiet_loading
from trpo_lm.lm.mdp import TokenMDP
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompts, load_prompts
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.rewards import Rewards, abstain
from trpo_lm.lm.rollout import Rollout
from trpo_lm.report.statistics import bootstrap_interval
from trpo_lm.storage import Row, read_json_lines, writable_folder
from trpo_lm.training.assembly import assemble, digests, make_rewards, reward_digests
from trpo_lm.training.checkpoint import load_tensors
from trpo_lm.training.folder import (
    ADAPTER,
    CRITIC,
    SETTINGS,
    RunFolder,
    Settings,
    checkpoint_order,
    disk_fault,
    load_settings,
    temporary,
)
from trpo_lm.training.manifest import MANIFEST, Manifest, damaged, read_manifest, verify
from trpo_lm.training.metrics import none_if_nan
from trpo_lm.training.state import shapes

logger = logging.getLogger(__name__)

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
        TrpoLMError: If there is no such run or policy, a file of it is damaged, or a model it was
            made from is missing or is not the one it was.
    """
    run = RunFolder(folder)
    saved = _saved_policy(run, checkpoint)
    manifest = read_manifest(saved) if os.path.lexists(saved / MANIFEST) else None
    if manifest is not None:  # the folder of a run that goes on has settings and a card of its own
        spare = {SETTINGS, run.card.name} if saved == run.path else set()
        verify(saved, manifest, spare=frozenset(spare))
    settings, args = _settings(run, saved, manifest)
    args = replace(args, gradient_checkpointing=False)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = settings["model"]
    seen: list[str] = []  # digest of the base as the run had it
    if plain:
        with quiet_loading():
            model = load_model(
                model, args, device=device, plain=True,
                loaded=lambda base: seen.append(base_digest(base)),
            )  # fmt: skip
        args = replace(args, **describe(ModelSettings()))  # they cannot apply once more
    rewards = _rewards(settings, args, reward, device)
    files = manifest.files if manifest else {path.name for path in saved.iterdir()}
    valued = reward is None and rewards is not None and CRITIC in files
    parts = assemble(
        model,
        rewards or Rewards(abstain),
        args if valued else replace(args, critic="none"),
        device=device,
        peft_config=_adapter(settings, saved),
        tokenizer=_tokenizer(run, settings),
    )
    if "digests" in settings:
        _require_same_models(settings, digests(parts, *seen), saved)
    else:
        logger.warning(
            "%s is of an earlier version: nothing vouches that base, reference and reward models "
            "are those it was trained on", saved,
        )  # fmt: skip
    parts.policy.load(load_tensors(saved / ADAPTER), where=str(saved))
    if valued:
        critic = load_tensors(saved / CRITIC)
        if shapes(critic) != shapes(parts.critic.state()):
            raise damaged(saved, CRITIC, "does not fit the critic")
        parts.critic.load(critic)
    return FinishedRun(
        run.path,
        checkpoint,
        manifest.update if manifest else _update(run, parts.policy),
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
        `reference` and `policy`, each with the results of `probe`, the score `greedy` of the
        likeliest completion of each prompt, and the intervals `score_interval`, `greedy_interval`
        and `judge_interval`; `difference` of these scores with their intervals. What was not
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
        likeliest = _sample(run, prompts, 1, seed, greedy=True)
        reference, reference_means = _measure(run, text, likeliest, text, completions, judge)
    rollout = _sample(run, prompts, completions, seed)
    likeliest = _sample(run, prompts, 1, seed, greedy=True)
    policy, policy_means = _measure(run, rollout, likeliest, text, completions, judge)
    difference: Row = {}
    for kind, before in reference_means.items():
        gain = policy_means[kind] - before
        difference[kind] = none_if_nan(float(gain.nanmean()))
        difference[f"{kind}_interval"] = _interval(gain)
    return {"reference": reference, "policy": policy, "difference": difference}


def _sample(
    run: FinishedRun, prompts: Prompts, completions: int, seed: int, *, greedy: bool = False
) -> Rollout:
    return run.mdp.rollout(
        run.policy,
        prompts.prompts,
        columns=prompts.columns,
        completions_per_prompt=completions,
        seed=(seed, "evaluate"),
        greedy=greedy,
    )


def _measure(
    run: FinishedRun,
    rollout: Rollout,
    likeliest: Rollout,
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
    means["greedy"] = likeliest.scores.score.double().where(likeliest.scores.valid, torch.nan)
    results["greedy"] = none_if_nan(float(means["greedy"].nanmean()))
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
        RunFault: If the merged model's logits differ from the policy's, or the disk is full.
    """
    out = writable_folder(Path(out).resolve(), new=True, where="out")
    policy = run.policy
    if policy.quantized or dtype_name(policy.base) in ("bfloat16", "float16"):
        raise TrpoLMError(
            "an adapter can be merged into weights of full precision only", where=str(run.folder),
            hint="open_run(folder, plain=True), as `trpo-lm merge` does",
        )  # fmt: skip
    probe_text = policy.probe_inputs()
    with torch.no_grad():
        before = policy.base(**probe_text).logits.float()
        try:
            model: Any = policy.model.merge_and_unload()
        except Exception as error:  # each kind of adapter has its own for what cannot be merged
            raise TrpoLMError(
                f"the adapter cannot be merged: {first_line(error)}", where=str(run.folder),
                hint="keep the adapter: peft loads it",
            ) from error  # fmt: skip
        gap = float((model(**probe_text).logits.float() - before).abs().max())
    if gap > 1e-4 * float(before.abs().max()):
        raise RunFault(
            f"merging changes a logit by {gap:.2g}", where=str(run.folder),
            hint="keep the adapter: peft loads it (an adapted output layer that shares its weights "
            "with the embedding cannot be merged)",
        )  # fmt: skip
    new = temporary(out)
    try:
        with quiet_loading():
            model.save_pretrained(str(new))
        run.mdp.tokenizer.save_pretrained(str(new))
        os.rename(new, out)  # in place of the empty one
    except Exception as error:
        shutil.rmtree(new, ignore_errors=True)
        raise disk_fault(error, out) from error


# ---------------------------------------------------------------- parts of opening


def _saved_policy(run: RunFolder, checkpoint: str) -> Path:
    """Return the folder that holds the adapter of a checkpoint."""
    places = {"last": run.path, "best": run.best}
    places |= {str(checkpoint_order(path)[0]): path for path in reversed(run.checkpoints())}
    mark = ADAPTER if _is_earlier(run) else MANIFEST
    there = [name for name, place in places.items() if (place / mark).is_file()]
    if checkpoint not in there:
        raise TrpoLMError(
            f"there is no policy {checkpoint!r}; there are {', '.join(there) or 'none'}",
            where=str(run.path),
            hint="name the folder of a finished run, and with --checkpoint one of its policies; "
            "--resume_from_checkpoint auto finishes a run that was stopped",
        )
    return places[checkpoint]


def _is_earlier(run: RunFolder) -> bool:
    """Whether a run is of an earlier version, whose outcome has no manifest and no digests."""
    if not run.settings.is_file() or (run.path / MANIFEST).is_file():
        return False
    return "digests" not in load_settings(run.path)


def _update(run: RunFolder, policy: Policy) -> int:
    """Return which update of a run of an earlier version made its weights: its row says."""
    checksum = policy.parameters.checksum()
    for row in reversed(read_json_lines(run.metrics)):
        if row.get("policy/checksum") == checksum and type(row.get("update")) is int:
            return row["update"]
    raise TrpoLMError(
        f"no update in {run.metrics.name} made these weights (checksum {checksum})",
        where=str(run.path),
        hint="the weights or the log were changed since; open a checkpoint of the run instead",
    )


def _settings(
    run: RunFolder, saved: Path, manifest: Manifest | None
) -> tuple[Settings, TrainerConfig]:
    """Return the settings that a policy was trained with."""
    noted = manifest and manifest.facts.get("settings")
    folder = saved if manifest else run.path
    settings = noted if isinstance(noted, dict) else load_settings(folder)
    needed = {"model", "reference", "reward_models", "reward_funcs", *_SETTINGS}
    try:
        if not settings.keys() >= needed:
            raise TypeError("they are not those of a run of this version")
        kinds = {"model": str, "reference": str, "reward_funcs": list}
        sources, budget = settings["reward_models"], settings.get("max_ref_kl")
        if (
            any(not isinstance(settings[name], kind) for name, kind in kinds.items())
            or not isinstance(settings.get("digests", {}), dict)
            or any(s is not None and not isinstance(s["model"], str) for s in sources)
            or any(s is not None and "label" not in s for s in sources)
            or not (budget is None or isinstance(budget, numbers.Real))
            or any(not isinstance(settings.get(n, 1.0), numbers.Real) for n in ("gamma", "lam"))
        ):
            raise TypeError("a value is of another type")
        return settings, TrainerConfig(**{name: settings[name] for name in _SETTINGS})
    except (TypeError, KeyError, ValueError) as error:
        reason = first_line(error)
    what = f"the settings of the run cannot be used: {reason}"
    raise TrpoLMError(what, where=str(folder / (MANIFEST if noted else SETTINGS)))


def _tokenizer(run: RunFolder, settings: Settings) -> Any:
    """Return the tokenizer that a finished run wrote; None if it did not finish."""
    if (run.path / MANIFEST).is_file():
        manifest = read_manifest(run.path)
        if "tokenizer_config.json" not in manifest.files:
            return None
        verify(run.path, manifest, spare=frozenset(n for n in manifest.files if "token" not in n))
    elif "digests" in settings or not (run.path / "tokenizer_config.json").is_file():
        return None
    return load_tokenizer(str(run.path))


def _require_same_models(settings: Settings, now: Settings, saved: Path) -> None:
    """Raise if base or reference are not those that the run was trained on."""
    then = settings["digests"]
    differ = [name for name in ("base", "reference") if then.get(name) != now[name]]
    if differ:
        raise TrpoLMError(
            f"{settings['model']!r} is not the model that the run was trained on: another "
            f"{' and another '.join(differ)} (digest {now[differ[0]]}, then {then.get(differ[0])})",
            where=str(saved),
            hint="its files changed since, or it was changed in memory before training; the run "
            "can be opened only with the weights it was trained on under that name",
        )


def _adapter(settings: Settings, saved: Path) -> PeftConfig | None:
    """Return the adapter that the run added to its model; None where the model came with one."""
    if settings["reference"] != "adapter":
        try:
            adapter = PeftConfig.from_pretrained(str(saved))
        except Exception as error:  # whatever a malformed file does to peft
            raise TrpoLMError(
                f"the adapter's settings cannot be used: {type(error).__name__}: {error}",
                where=str(saved / "adapter_config.json"),
            ) from error
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
    rewards = make_rewards(models, None, plain, device)
    then, now = settings.get("digests"), reward_digests(rewards)
    if then is not None and then.get("rewards") != now:
        raise TrpoLMError(
            f"the reward models are not those that the run was trained on (digests {now}, then "
            f"{then.get('rewards')})",
            where=", ".join(source["model"] for source in sources),
            hint="their files changed since; pass the reward that you mean",
        )
    return rewards


def _interval(values: Tensor) -> list[float] | None:
    """Return a 95% interval of the mean; None for fewer than two values."""
    low, high = bootstrap_interval(values.numpy())
    return [low, high] if isfinite(low) else None
