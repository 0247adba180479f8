"""Nothing of an update or an evaluation survives it but parameters, critic and counters."""

import gc

import pytest
import torch

import runs
from trpo_lm.algorithms.ppo import PPO
from trpo_lm.algorithms.trpo import TRPO


def live_tensors():
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", [TRPO(), TRPO(max_ref_kl=None), PPO()])
@pytest.mark.parametrize("products", [None, ["forward"], []])
def test_B01_live_tensors_after_update_2_and_10_are_equal(tmp_path, algorithm, products):
    if products is not None and isinstance(algorithm, PPO):
        pytest.skip("PPO has no Fisher products")
    made = runs.trainer(
        tmp_path, evals=runs.HELD_OUT, algorithm=algorithm, updates=10, save_steps=0
    )
    if products is not None:
        made.policy.exact_products = products
    counts = []
    for _ in range(10):
        made.train_step()
        made.evaluate()
        counts.append(live_tensors())
    assert counts[9] == counts[4] == counts[1]
