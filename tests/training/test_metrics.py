"""Notes on the metrics of a run."""

from types import SimpleNamespace

import pytest
import torch

from trpo_lm.training.metrics import (
    budget_note,
    equal_scores,
    noise_note,
    notes,
    stalled_note,
)
from trpo_lm.training.ranks import Ranks


def rows(*scales):
    return [{"signal/noise_scale": s, "signal/half_batch_cosine": 0.1} for s in scales]


def test_a_noisy_gradient_is_told_of_once():
    quiet, loud = [100.0] * 4, [3000.0, None, 2600.0, 100.0, 2700.0, 2800.0]
    told = [noise_note(rows(*quiet, *loud)[:i], 256) for i in range(1, 11)]
    assert [text is not None for text in told] == [False] * 6 + [True] + [False] * 3
    assert "2,600 completions" in told[6] and "an update has 256" in told[6]
    assert "prompts_per_update" in told[6] and "scores prefixes" in told[6]


def test_a_gradient_whose_halves_never_agree_has_no_finite_noise_scale():
    assert "too large to measure" in noise_note(rows(*[None] * 5), 4)


def test_nothing_is_said_of_noise_that_was_not_measured():
    unmeasured = {"signal/noise_scale": None, "signal/half_batch_cosine": None}
    assert noise_note([], 4) is None and noise_note([unmeasured] * 9, 4) is None
    assert noise_note([*rows(*[None] * 4), unmeasured], 4) is None


def step(accepted, reason=None, status="converged", **other):
    row = {"line_search/accepted": accepted, "line_search/reason": reason, "cg/status": status}
    return row | other


MOVED = step(True)
SKIPPED = {"skipped": "zero advantage", "line_search/accepted": None}


def test_B21_a_policy_that_does_not_move_is_noted_once_a_stall():
    still = step(False, "gain below its promise")
    course = [still, still, MOVED, still, still, still, still, still, MOVED, *[still] * 3]
    said = [stalled_note(course[:i]) is not None for i in range(len(course) + 1)]
    assert [i for i, note in enumerate(said) if note] == [6, 12]


def test_B21_an_update_that_was_skipped_or_has_no_line_search_is_no_stall():
    still, ppo = step(False, "no step"), {"trust_region/kl": 0.1}
    assert stalled_note([still, still, SKIPPED, still]) is None
    assert stalled_note([SKIPPED] * 3) is None and stalled_note([ppo] * 3) is None
    assert stalled_note([]) is None


@pytest.mark.parametrize(
    ("reason", "status", "cause"),
    [
        ("no step", "nonfinite", "Fisher product was not finite"),
        ("no step", "indefinite", "not positive definite"),
        ("no step", "zero", "the gradient is zero"),
        ("kl above max_kl", "max_iterations", "raise damping"),
        ("reference kl above its limit", "converged", "raise max_ref_kl"),
        ("reference kl did not fall", "converged", "raise max_ref_kl"),
        ("gain below its promise", None, "raise prompts_per_update"),
        ("non-finite", "converged", "logits overflow"),
        ("something new", "converged", "line search: something new"),
    ],
)
def test_B21_a_stall_names_its_likely_cause(reason, status, cause):
    note = stalled_note([step(False, reason, status)] * 3)
    assert "not moved for 3 updates" in note and cause in note and reason in note
    assert "None" not in note


def test_the_budget_is_noted_when_it_first_bounds_a_step():
    cases = ["old", "both", "old", "ref"]
    rows = [MOVED | {"trust_region/case": case} for case in cases]
    assert [budget_note(rows[:i]) is not None for i in range(1, 5)] == [False, True, False, False]
    assert notes(rows[:2], 4) == [budget_note(rows[:2])] and notes([MOVED], 4) == []


@pytest.mark.parametrize(
    ("scores", "groups", "share"),
    [
        ([1.0, 1.0, 0.0, 1.0], [0, 0, 1, 1], 0.5),
        ([0.1 + 0.2, 0.3, 5.0, 5.0], [0, 1, 0, 1], 0.0),  # in any order
        ([0.1 + 0.2, 0.3, 0.0, 0.0], [0, 0, 1, 1], 1.0),  # rounding is no spread
        ([1.0, float("nan"), 0.0, 1.0], [0, 0, 1, 1], 0.0),  # one of two abstained: not counted
        ([1.0, 1.0], [0, 1], None),  # one completion a prompt
    ],
)
def test_equal_scores_is_the_share_of_prompts_without_contrast(scores, groups, share):
    score = torch.tensor(scores, dtype=torch.float64)
    marked = SimpleNamespace(score=score, valid=~score.isnan())
    rollout = SimpleNamespace(scores=marked, groups=torch.tensor(groups))
    assert equal_scores(rollout, Ranks()) == share
