"""The state of a run between two updates: snapshot, restore, save, load.

It is the policy's parameters, the critic's and the algorithm's state and three counters, nothing
else: prompts and random numbers are functions of the seed and of the update's number.

In a checkpoint the parameters are the adapter's file, which `Policy.save` writes. The algorithm's
state is a dataclass, and `unpacked` into tensors and numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from trpo_lm.algorithms.algorithm import packed, unpacked
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.critic import Critic
from trpo_lm.lm.policy import Policy
from trpo_lm.training.checkpoint import Checkpoint
from trpo_lm.training.folder import ADAPTER, CRITIC, Settings

ALGORITHM = "algorithm"  # stem of the tensors of the algorithm's state
_CRITIC = Path(CRITIC).stem

# Settings on which nothing of the arithmetic depends: they may change when a run is resumed.
FREE = {
    "output_dir", "run_name", "updates", "logging_steps", "eval_steps", "eval_prompts",
    "save_steps", "save_total_limit", "resume_from_checkpoint", "allow_config_change",
    "overwrite_output_dir", "report_to", "reward_timeout", "ddp_timeout", "reference",
    "reward_models", "rollout_servers", "rollout_timeout", "push_to_hub", "hub_model_id",
    "hub_private_repo", "hub_dataset",
}  # fmt: skip


@dataclass(frozen=True)
class TrainState:
    """A copy of everything that an update changes.

    Attributes:
        theta: Trainable parameters, from `ParameterVector.snapshot`.
        critic: The critic's tensors.
        algorithm: The algorithm's own state.
        update: Number of updates done.
        completions, tokens: Sampled so far in the run, all processes.
    """

    theta: list[Tensor]
    critic: dict[str, Tensor]
    algorithm: Any
    update: int
    completions: int
    tokens: int


def snapshot(
    policy: Policy, critic: Critic, algorithm: Any, update: int, completions: int, tokens: int
) -> TrainState:
    """Copy the state of a run."""
    return TrainState(
        policy.parameters.snapshot(),
        {name: tensor.clone() for name, tensor in critic.state().items()},
        algorithm,
        update,
        completions,
        tokens,
    )


def restore(state: TrainState, policy: Policy, critic: Critic) -> Any:
    """Restore a snapshot exactly; return the algorithm's state."""
    policy.parameters.restore(state.theta)
    critic.load(state.critic)
    return state.algorithm


# ---------------------------------------------------------------- checkpoints


def to_checkpoint(
    state: TrainState, policy: Policy, critic: Critic, settings: Settings
) -> Checkpoint:
    """Return the checkpoint of the state that policy and critic are in."""
    values, tensors = unpacked(state.algorithm)
    files = {_CRITIC: state.critic, ALGORITHM: tensors}
    return Checkpoint(
        state.update,
        tensors={stem: named for stem, named in files.items() if named},
        state={
            "completions": state.completions,
            "tokens": state.tokens,
            "checksum": policy.parameters.checksum(),
            "critic": critic.name,
            "algorithm": values,
        },
        settings=settings,
    )


def from_checkpoint(
    saved: Checkpoint,
    policy: Policy,
    critic: Critic,
    algorithm: Any,
    *,
    where: Path,
    same_algorithm: bool = True,
) -> TrainState:
    """Load a checkpoint into policy and critic.

    The adapter comes first: where it has another shape, so have the moments of the algorithm.
    A critic or an algorithm of another kind, where the user allows one, keeps its initial state,
    which for the algorithm is the one passed.

    Raises:
        TrpoLMError: If a part is missing, does not fit, or is not the one that was saved.
    """
    values, stem = saved.state, Path(ADAPTER).stem
    tensors = {known: saved.tensors.get(known, {}) for known in (stem, _CRITIC, ALGORITHM)}
    if others := saved.tensors.keys() - tensors.keys():
        raise _unfit(where, f"it holds {min(others)}.safetensors, which is no part of a run")
    for key, kind in {
        "completions": int, "tokens": int, "checksum": str, "critic": str, "algorithm": dict,
    }.items():  # fmt: skip
        if type(values.get(key)) is not kind:
            raise _unfit(where, f"its state has no {key}")
    policy.load(tensors[stem], where=str(where))
    if policy.parameters.checksum() != values["checksum"]:
        raise TrpoLMError("the adapter did not load as it was saved", where=str(where))
    same_critic = values["critic"] == critic.name
    if same_critic and shapes(tensors[_CRITIC]) != shapes(critic.state()):
        raise _unfit(where, "its critic does not fit")
    if same_algorithm:
        numbers, moments = values["algorithm"], tensors[ALGORITHM]
        fresh = shapes(unpacked(algorithm)[1])
        complete = {*numbers, *moments} == {field.name for field in fields(algorithm)}
        sized = {key: shape for key, shape in shapes(moments).items() if key in fresh}
        kinds = all(_alike(getattr(algorithm, key), value) for key, value in numbers.items()
                    if complete)  # fmt: skip
        if not complete or not kinds or sized != fresh:
            raise _unfit(where, "the state of its algorithm is not complete")
        algorithm = packed(algorithm, numbers, moments)
    if same_critic:
        critic.load(tensors[_CRITIC])
    counts = saved.update, values["completions"], values["tokens"]
    return snapshot(policy, critic, algorithm, *counts)


def _unfit(where: Path, reason: str) -> TrpoLMError:
    return TrpoLMError(f"{where.name} cannot be resumed from: {reason}", where=str(where))


def shapes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return shape and dtype of named tensors."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _alike(fresh: Any, saved: Any) -> bool:
    """Whether a saved value has the type of a state's fresh one; None may stand for either."""
    if is_dataclass(fresh):
        names = {field.name for field in fields(fresh)}
        return isinstance(saved, dict) and saved.keys() == names and all(
            _alike(getattr(fresh, name), saved[name]) for name in names
        )  # fmt: skip
    if fresh is None or saved is None:
        return not isinstance(saved, dict | list)
    number = isinstance(fresh, int | float) and isinstance(saved, int | float)
    return number or (type(fresh), type(saved)) in ((str, str), (tuple, list), (list, list))


# ---------------------------------------------------------------- settings


def require_same_settings(saved: Settings, current: Settings, allowed: set[str]) -> None:
    """Refuse to resume with settings other than the checkpoint's, except `FREE` and allowed ones.

    Args:
        saved: The checkpoint's settings; may be nested.
        current: This run's settings.
        allowed: Names that may differ: `max_kl`, or `adapter.r` where settings are nested.

    Raises:
        TrpoLMError: With a table of every other difference.
    """
    then = flat(saved)
    now = flat(yaml.safe_load(yaml.safe_dump(current)))
    rows = [
        (key, *(repr(side[key]) if key in side else "(absent)" for side in (then, now)))
        for key in {**then, **now}
        if (key in then, then.get(key)) != (key in now, now.get(key))
        and key.partition(".")[0] not in FREE
        and not {key, key.rpartition(".")[2]} & allowed
    ]
    if not rows:
        return
    table = [("setting", "checkpoint", "now"), *rows]
    wide = [max(len(row[i]) for row in table) for i in (0, 1)]
    lines = "".join(f"\n  {a:<{wide[0]}}  {b:<{wide[1]}}  {c}" for a, b, c in table)
    raise TrpoLMError(
        f"the settings differ from the checkpoint's:{lines}",
        where="resume_from_checkpoint",
        hint=f"set them back, or accept them: --allow_config_change {','.join(r[0] for r in rows)}",
    )


def flat(settings: Settings) -> Settings:
    """Return {'a.b': value} of nested settings."""
    pairs: Settings = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            pairs |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            pairs[key] = value
    return pairs
