"""A finished run, opened again: to evaluate its policy, look at its tokens, or merge its adapter.

What a run leaves in its folder is enough: the adapter, the settings (`config.yaml`), the critic,
the tokenizer and the held-out prompts (`held_out.jsonl`). The base model and the reward models are
loaded by the names they had; a reward that is a function has to be passed again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from trpo_lm.analysis.probe import probe
from trpo_lm.config import TrainerConfig, describe
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.critic import Critic, make_critic
from trpo_lm.lm.loading import load_tokenizer, quiet_loading
from trpo_lm.lm.mdp import Rollout, TokenMDP, end_token_ids
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompts, load_prompts
from trpo_lm.lm.reward_models import RewardModel
from trpo_lm.lm.rewards import Rewards, abstain
from trpo_lm.report.statistics import bootstrap_interval
from trpo_lm.storage import read_json_lines
from trpo_lm.training.artifacts import CRITIC
from trpo_lm.training.trainer import HELD_OUT, METRICS

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class FinishedRun:
    """What a run left behind, ready to use.

    Attributes:
        folder: Of the run.
        checkpoint: Which of its policies this is: 'last', 'best' or the number of an update.
        update: Number of updates that made it.
        settings: Content of `config.yaml`.
        policy: At the saved parameters; its reference is that of the run.
        mdp: The prompts' side: tokenizer, rewards, length of a completion.
        rewards: What the run was trained to raise; None where that is a function and none was
            passed. Completions then have no score.
        critic: As it was saved; None without one, or when other rewards were passed.
    """

    folder: Path
    checkpoint: str
    update: int
    settings: dict[str, Any]
    policy: Policy
    mdp: TokenMDP
    rewards: Rewards | None
    critic: Critic | None


def open_run(
    folder: str | Path, checkpoint: str = "last", *, reward: Any = None, bf16: bool | None = None
) -> FinishedRun:
    """Load a saved policy with its reference, critic and rewards.

    Args:
        folder: Of a run.
        checkpoint: 'last' (the finished run's own), 'best', or the number of a checkpoint.
        reward: As for `Trainer(reward_funcs=...)`; default: the run's own reward models.
        bf16: Whether the base is loaded in bfloat16; default: as in the run.

    Raises:
        TrpoLMError: If there is no such run or policy, or what it was made from is gone.
    """
    folder = Path(folder)
    saved = _saved_policy(folder, checkpoint)
    settings = _settings(folder)
    in_bf16: bool = settings["bf16"] if bf16 is None else bf16
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    own = (folder / "tokenizer_config.json").is_file()
    with quiet_loading():
        policy = _policy(settings, saved, bf16=in_bf16, device=device)
        tokenizer = load_tokenizer(str(folder) if own else settings["model"])
        rewards = _rewards(settings, reward, device)
    mdp = TokenMDP(
        tokenizer,
        rewards or Rewards(abstain),
        eos_token_ids=end_token_ids(policy.base, tokenizer),
        max_completion_length=settings["max_completion_length"],
    )
    critic = None
    if reward is None and rewards is not None and (saved / f"{CRITIC}.safetensors").is_file():
        critic = make_critic(
            settings["critic"],
            can_score_prefixes=rewards.can_score_prefixes,
            width=policy.base.config.get_text_config().hidden_size,
            length=settings["max_completion_length"],
        )
        critic.load(load_file(saved / f"{CRITIC}.safetensors"))
    update = _update(folder, saved, checkpoint)
    return FinishedRun(folder, checkpoint, update, settings, policy, mdp, rewards, critic)


def held_out_prompts(run: FinishedRun) -> Prompts | None:
    """Return the prompts that a run was evaluated on; None if it had none."""
    file = run.folder / HELD_OUT
    return load_prompts(file) if file.is_file() else None


def evaluate(
    run: FinishedRun,
    prompts: Prompts,
    *,
    completions: int = 4,
    seed: int = 0,
    judge: Callable[..., list[float]] | None = None,
) -> dict[str, Any]:
    """Measure a policy and its reference on prompts that neither was trained on.

    Both are sampled with the same random numbers, and differences are taken prompt by prompt.
    Intervals are 95% percentile bootstrap intervals over prompts: they say how far the figures
    would move with other prompts, not with another training run.

    Args:
        run: With rewards.
        prompts: Held-out ones.
        completions: Sampled for each prompt, >= 1.
        seed: What the random numbers derive from.
        judge: Scores prompts and completions; was not trained on.

    Returns:
        `reference` and `policy`, each with what `frontier.probe` measures, `score_interval` and
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
    found: dict[str, Any] = {}
    each: dict[str, dict[str, Tensor]] = {}
    text: Rollout | None = None
    for name in ("reference", "policy"):
        with run.policy.reference() if name == "reference" else nullcontext():
            rollout = run.mdp.rollout(
                run.policy,
                prompts.prompts,
                columns=prompts.columns,
                completions_per_prompt=completions,
                seed=(seed, "evaluate"),
            )
            text = text or rollout  # the reference's own
            judged = None if judge is None else judge(rollout.prompts, rollout.completions)
            found[name] = probe(
                run.policy,
                rollout,
                text,
                micro_batch_size=run.settings["micro_batch_size"],
                judge=None if judged is None else lambda *_, judged=judged: judged,
            )
        scores = rollout.scores.score.double()
        each[name] = {"score": scores.where(rollout.scores.valid, torch.nan)}
        each[name] |= {} if judged is None else {"judge": torch.tensor(judged).double()}
        each[name] = {k: v.reshape(-1, completions).nanmean(-1) for k, v in each[name].items()}
        for kind, values in each[name].items():
            found[name][f"{kind}_interval"] = _interval(values)
    found["difference"] = {}
    for kind, before in each["reference"].items():
        gain = each["policy"][kind] - before
        mean = float(gain.nanmean())
        found["difference"][kind] = mean if isfinite(mean) else None
        found["difference"][f"{kind}_interval"] = _interval(gain)
    return found


def merge(run: FinishedRun, out: str | Path) -> None:
    """Write the policy as a plain transformers model with its tokenizer; the run is used up.

    W + B A in place of each adapted layer's W. The logits are those of the policy before its
    temperature; open the run with `bf16=False`, lest rounding W + B A to bfloat16 change them.

    Args:
        run: Its policy loses its adapter.
        out: New or empty folder.

    Raises:
        TrpoLMError: If the folder holds something.
        RunFault: If the merged model says something else than the policy.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrpoLMError(f"{out} exists and is not empty", where="out", hint="name a new folder")
    policy = run.policy
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


def _saved_policy(folder: Path, checkpoint: str) -> Path:
    """Return the folder that holds the adapter which a checkpoint's name means."""
    numbers = sorted(int(p.name[11:]) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit())
    places = {"last": folder, "best": folder / "best"}
    places |= {str(n): folder / f"checkpoint-{n:06d}" for n in numbers}
    there = [name for name, place in places.items() if (place / ADAPTER).is_file()]
    if checkpoint not in there:
        raise TrpoLMError(
            f"there is no policy {checkpoint!r}; there are {', '.join(there) or 'none'}",
            where=str(folder),
            hint="name the folder of a finished run, and with --checkpoint one of its policies",
        )
    return places[checkpoint]


def _settings(folder: Path) -> dict[str, Any]:
    """Read config.yaml."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if settings.keys() >= {"model", "reference", "reward_models", *describe(TrainerConfig())}:
            return settings
        reason = "they are not those of a run of this version"
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        reason = str(error).splitlines()[0]
    raise TrpoLMError(
        f"the settings of the run cannot be used: {reason}", where=str(folder / "config.yaml")
    )


def _policy(settings: dict[str, Any], saved: Path, *, bf16: bool, device: torch.device) -> Policy:
    """Build the run's policy as it was before training, then load what training made of it."""
    model, adapter = settings["model"], None
    if settings["reference"] != "adapter":
        adapter = PeftConfig.from_pretrained(str(saved))
        adapter.inference_mode = False
    elif not (Path(model) / "adapter_config.json").is_file():
        raise TrpoLMError(
            "the run went on from an adapter that was passed as an object: its reference is not "
            "known by name",
            where=str(saved),
            hint="save that adapter and train from its folder",
        )
    policy = Policy(
        model,
        adapter,
        temperature=settings["temperature"],
        bf16=bf16,
        seed=settings["seed"],
        device=device,
    )
    policy.load(load_file(saved / ADAPTER), where=str(saved))
    return policy


def _rewards(settings: dict[str, Any], reward: Any, device: torch.device) -> Rewards | None:
    """Return the rewards passed, or else the run's own where all of them are models."""
    options = {"prefix_stride": settings["prefix_stride"], "device": device}
    if reward is not None:
        return Rewards(reward, reward_model_options=options)
    sources = settings["reward_models"]
    if not all(sources):
        return None
    models = [RewardModel(s["model"], label=s["label"], **options) for s in sources]
    weights, bad = settings["reward_weights"], settings["on_bad_reward"]
    return Rewards(models, weights, on_bad_reward=bad)


def _update(folder: Path, saved: Path, checkpoint: str) -> int:
    """Return the number of updates behind a policy."""
    if checkpoint == "best":
        return yaml.safe_load((saved / "best.json").read_text())["update"]  # JSON is YAML
    if checkpoint != "last":
        return int(checkpoint)
    return max((row["update"] for row in read_json_lines(folder / METRICS)), default=0)


def _interval(values: Tensor) -> list[float] | None:
    """Return a 95% interval of the mean; None for fewer than two values."""
    low, high = bootstrap_interval(values.numpy())
    return [low, high] if isfinite(low) else None
