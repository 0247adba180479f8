"""TRPO for Hugging Face causal LMs: a trust region and a reference-KL budget, both in nats.

Dimension key, used in every docstring:
    N completions on this rank; P prompt length (left-padded); T completion length (right-padded);
    S action tokens of a batch, flattened row by row; V vocabulary; D hidden size;
    M trainable parameters.

Names are imported on first use, so that `import trpo_lm` does not cost an `import torch`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "TrpoLMError": "errors",
    "RunFault": "errors",
    "TrainerConfig": "config",
    "TRPO": "algorithms.trpo",
    "trust_region_step": "core.natural_step",
    "PPO": "algorithms.ppo",
    "Policy": "lm.policy",
    "TokenMDP": "lm.mdp",
    "RewardModel": "lm.reward_models",
    "scores_prefixes": "lm.rewards",
    "exact_number": "lm.verifiable",
    "math_equal": "lm.verifiable",
    "has_format": "lm.verifiable",
    "within_length": "lm.verifiable",
    "Trainer": "training.trainer",
    "TRPOTrainer": "training.trainer",
    "PPOTrainer": "training.trainer",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trpo_lm' has no attribute {name!r}")
    return getattr(import_module(f"trpo_lm.{_HOME[name]}"), name)
