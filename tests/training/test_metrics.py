"""Notes on the metrics of a run."""

from trpo_lm.training.metrics import noise_note


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
