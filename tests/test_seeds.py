"""Randomness is a function of its purpose."""

import subprocess
import sys

import torch

from trpo_lm.seeds import derive_seed, generator, global_seed


def test_a_seed_depends_on_every_part_and_on_their_order():
    parts = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, 1, "a"), (0, 12)]
    parts.append((0, 1, 2))
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= derive_seed(*p) < 2**63 for p in parts)


def test_a_seed_is_the_same_in_another_process():
    """Python's own hash() is not: it is salted."""
    code = "from trpo_lm.seeds import derive_seed; print(derive_seed(3, 'generate', 7))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == derive_seed(3, "generate", 7)


def test_generators_of_one_purpose_agree():
    a, b, c = generator(0, "x"), generator(0, "x"), generator(0, "y")
    draws = [torch.rand(5, generator=g).tolist() for g in (a, b, c)]
    assert draws[0] == draws[1] != draws[2]


def test_global_state_is_put_back_also_after_an_exception():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with global_seed(5, "x", device=torch.device("cpu")):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    try:
        with global_seed(5, "x", device=torch.device("cpu")):
            second = torch.rand(3)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(first, second)
