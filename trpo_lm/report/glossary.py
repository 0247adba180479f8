"""What the names and codes in `metrics.jsonl` mean, in words.

Every metric has its unit here; the cases of a step, the reasons of a line search and the ways in
which a solve ends have a sentence each, and `step_in_words` tells an update's step from its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# "per completion" = summed over a completion's tokens, averaged over completions.
METRICS: dict[str, str] = {
    "update": "number of this update, from 1",
    "completions": "completions sampled so far in the run, all processes",
    "tokens": "completion tokens sampled so far in the run, all processes",
    "skipped": "why the policy was left alone in this update; null when it was not",
    "objective/score_mean": "mean score of this update's completions, units of the reward",
    "objective/score_std": "standard deviation of those scores, units of the reward",
    "objective/ref_kl": "KL(old || ref) of this update's rollouts, nats per completion",
    "objective/ref_kl_per_token": "the same, nats per token",
    "objective/sampler_kl": "KL(sampler || old) by the log-probabilities with which tokens were "
    "drawn (in process: in the first completions), nats per completion",
    "objective/sampler_gap": "mean distance of those from the old policy's, nats per token",
    "objective/sampler_truncated": "share of completions whose weight old / sampler was cut; null "
    "where the sampler needs no weights",
    "objective/entropy": "entropy of the policy that sampled, nats per token",
    "objective/completion_length": "mean length of a completion, tokens",
    "objective/eos_rate": "share of completions that end before the length limit",
    "objective/equal_scores": "share of prompts whose several completions all got one score",
    "objective/eval_score_mean": "mean score on held-out prompts after the update, reward's units",
    "objective/eval_ref_kl": "KL(policy || ref) on held-out prompts, nats per completion",
    "trust_region/kl": "exact KL(old || new) after the step, nats per completion",
    "trust_region/kl_per_token": "the same, nats per token",
    "trust_region/kl_max": "largest KL(old || new) of a single state, nats",
    "trust_region/predicted_kl": "KL of the step by the quadratic model, nats per completion",
    "trust_region/predicted_gain": "surrogate gain of the step by the linear model, per completion",
    "trust_region/actual_gain": "surrogate gain measured after the step, per completion",
    "trust_region/ref_kl_after": "KL(new || ref) estimated on the batch, nats per completion",
    "trust_region/case": "which constraint bound the step: old, ref, both or recover",
    "trust_region/alignment": "cosine of v and w in the Fisher metric; null without a budget near",
    "trust_region/price": "of KL(policy || ref) in the step's objective, standard deviations of "
    "the advantage per nat",
    "trust_region/radius": "KL the step was allowed, at most max_kl, nats per completion",
    "cg/iterations": "conjugate-gradient iterations of both solves",
    "cg/residual": "relative residual of the gradient's solve, dimensionless",
    "cg/status": "how the gradient's solve ended: converged, max_iterations, indefinite, nonfinite",
    "cg/ref_status": "how the solve for the reference KL ended; null without a budget near",
    "cg/product": "how Fisher products were made: retained, forward (both exact) or scores",
    "cg/completions": "completions whose tokens made up the Fisher products, of all processes",
    "cg/damping": "damping of both solves, as a share of the curvature along their right-hand side",
    "line_search/trials": "step lengths tried",
    "line_search/accepted": "whether a step was taken",
    "line_search/reason": "why the last rejected trial was rejected, or why there was none",
    "critic/explained_variance": "share of the returns' variance the critic explains, at most 1",
    "critic/loss": "mean squared error of the critic, squared units of the reward",
    "signal/half_batch_cosine": "cosine of the gradients of two halves of the batch, -1 to 1",
    "signal/noise_scale": "completions at which the gradient's signal equals its noise",
    "ppo/beta": "price of the reference KL after the update, units of the reward per nat",
    "policy/checksum": "checksum of the trainable parameters after the update",
    "time/rollout": "seconds spent on sampling",
    "time/score": "seconds spent on rewards",
    "time/update": "seconds spent on the policy's update",
    "time/value": "seconds spent on the critic",
    "time/total": "seconds of the whole update",
}

OUTCOMES = {
    "taken": "the whole step was taken",
    "shortened": "a part of the step was taken, as its exact KL or gain did not allow the whole",
    "rejected": "no length of the step was acceptable; every parameter is as it was, bit for bit",
    "skipped": "the batch had nothing to learn from, and no step was made",
    "updated": "an update by a rule without trust region",
}

# The case of a step: see `core.trust_region`.
CASES = {
    "old": "the trust region alone bound the step, not the budget",
    "ref": "the budget of the reference KL alone bound the step, which is shorter than the trust "
    "region allows",
    "both": "trust region and budget both bound the step: it raises the score along the budget's "
    "edge",
    "recover": "the policy was over its budget: the step leads back towards the reference",
    "none": "there was no step to take: nothing to gain, nothing to repair",
}

# Why a trial of the line search was rejected: see `core.natural_step`.
REASONS = {
    "kl above max_kl": "the exact KL was above max_kl",
    "reference kl above its limit": "the KL to the reference was above the budget",
    "reference kl did not fall": "the KL to the reference did not fall, which it must over budget",
    "gain below its promise": "the measured gain was too small a share of the predicted one",
    "non-finite": "a number was not finite there",
    "no step": "there was no step to try",
    "a Fisher product was not finite": "a Fisher product was not finite",
    "a Fisher product had no positive curvature": "a Fisher product had no positive curvature",
    "a gradient was not finite": "a gradient was not finite",
}

STATUSES = {
    "converged": "it reached its tolerance",
    "max_iterations": "it was cut after cg_iterations, which is usual",
    "indefinite": "a product had no positive curvature, and the direction before it was taken",
    "nonfinite": "a product was not finite",
    "zero": "its right-hand side is zero",
}

# What to do about a step that was not taken, by how solve or line search ended.
CAUSES = {
    "nonfinite": "a Fisher product was not finite: a weight is nan or infinite, or dtype overflows",
    "indefinite": "the Fisher is not positive definite to rounding: raise damping or "
    "fisher_completions, or set dtype to float32",
    "zero": "the gradient is zero: no completion of a batch is better than another",
    "non-finite": "the model's logits overflow: lower max_kl, or set dtype to float32",
    "kl above": "the quadratic model of the KL does not hold for the step: raise damping or "
    "fisher_completions, or lower max_kl",
    "reference kl": "the policy is at its budget: raise max_ref_kl, or end the run",
    "gain below": "the gradient is mostly noise: raise prompts_per_update",
}


def step_in_words(row: Mapping[str, Any]) -> str:
    """Tell in a sentence or two what bound an update's step, and what its line search found."""
    if row.get("skipped"):
        return f"The policy was left alone: {row['skipped']}."
    accepted, trials = row.get("line_search/accepted"), row.get("line_search/trials")
    case, reason = row.get("trust_region/case"), row.get("line_search/reason")
    if accepted is None and case is None:
        return "This update rule has no trust region; its KL is measured after the update."
    bound = _sentence(CASES.get(str(case), f"case {case}"))
    because = "; ".join(REASONS.get(part, part) for part in str(reason or "").split("; ") if part)
    if accepted:
        shortened = f" Trial {trials} was taken; of the one before, {because}."
        return f"{bound}{shortened}" if because else bound
    told = f"The policy is where it was. {bound}"
    if because and case != "none":
        tried = "the only trial" if trials == 1 else f"the last of {trials} trials"
        told += f" Of {tried}, {because}."
    advice = next((cure for key, cure in CAUSES.items() if str(reason).startswith(key)), None)
    return f"{told} Likely: {advice}." if advice else told


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def outcome(row: Mapping[str, Any]) -> str:
    """Return the outcome of an update: taken, shortened, rejected, skipped or updated."""
    if row.get("skipped"):
        return "skipped"
    accepted = row.get("line_search/accepted")
    if accepted is None:
        return "updated"
    if not accepted:
        return "rejected"
    return "shortened" if row.get("line_search/reason") else "taken"
