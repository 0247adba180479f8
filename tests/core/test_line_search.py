"""Backtracking: which scales are tried, and what is said about them."""

import pytest

from trpo_lm.core.line_search import backtrack


def run(objections, *, ratio=0.5, trials=4):
    """`objections` holds a reason, or None, for each trial in order."""
    measured, asked = [], []

    def measure(scale):
        measured.append(scale)
        return f"at {scale}"

    def objection(trial, scale):
        asked.append((trial, scale))
        return objections[len(asked) - 1]

    return backtrack(measure, objection, ratio=ratio, trials=trials), measured, asked


def test_the_first_trial_without_an_objection_is_taken():
    search, measured, asked = run(["kl", "gain", None, None])
    assert measured == [1.0, 0.5, 0.25] and asked[-1] == ("at 0.25", 0.25)
    assert search.scale == 0.25 and search.accepted and search.trial == "at 0.25"
    assert search.reasons == ("kl", "gain") and search.trials == 3


def test_the_full_step_may_be_accepted():
    search, measured, _ = run([None])
    assert measured == [1.0] and search.scale == 1.0 and search.trials == 1 and not search.reasons


@pytest.mark.parametrize("trials", [1, 2, 8])
def test_N05_all_trials_are_used_before_giving_up(trials):
    search, measured, _ = run(["no"] * trials, ratio=0.8, trials=trials)
    assert len(measured) == trials == search.trials == len(search.reasons)
    assert measured == pytest.approx([0.8**i for i in range(trials)])
    assert search.scale == 0.0 and not search.accepted
    assert search.trial == f"at {measured[-1]}"


@pytest.mark.parametrize(
    ("over", "scale"), [(0.5, 0.8), (1.0, 0.8), (1.5, 0.8), (1.6, 0.64), (100, 0.8**11)]
)
def test_scales_that_a_quadratic_divergence_rules_out_are_passed_over(over, scale):
    measured = []
    backtrack(
        lambda s: measured.append(s) or over * s * s,
        lambda trial, s: "kl" if len(measured) < 2 else None,
        ratio=0.8, trials=4, excess=lambda trial: trial,
    )  # fmt: skip
    assert measured == pytest.approx([1.0, scale])
    assert over * scale**2 <= 1


def test_a_divergence_that_is_not_finite_shortens_the_step_by_one_ratio():
    search, measured = None, []
    for bad in (float("inf"), float("nan")):
        measured.clear()
        search = backtrack(
            lambda s, bad=bad: measured.append(s) or bad, lambda trial, s: "bad",
            ratio=0.5, trials=3, excess=lambda trial: trial,
        )  # fmt: skip
        assert measured == [1.0, 0.5, 0.25] and search.shortest == 0.25
