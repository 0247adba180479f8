"""Sampled completions, and the old policy and the reference at their states.

A `Rollout` is what the MDP returns; a `Batch` adds one pass of the old policy and one of the
reference. Masks come from lengths, never from token values: the pad token may well be EOS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trpo_lm.core.divergences import categorical_kl, entropy, token_logprobs
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompt
from trpo_lm.lm.rewards import RewardBatch

MOST_ROWS = 64  # completions per forward pass where memory allows


@dataclass(frozen=True)
class Rollout:
    """N completions with their rewards.

    Its tensors live on the CPU; `Policy` moves what it runs on.

    Attributes:
        prompts, completions: Text, N each; completions without special tokens.
        columns: Further dataset columns, N values each.
        groups: Index of the prompt of each completion, (N,) int64.
        input_ids, attention_mask: Prompt (left-padded) and completion (right-padded), (N, P + T).
        action_mask: True where the policy chose the token, (N, T).
        truncated: Ended by the length limit, not by EOS, (N,) bool.
        rewards: Reward of each action, (N, T) float64.
        scores: Of the reward functions.
        score_seconds: Time of scoring.
    """

    prompts: list[Prompt]
    completions: list[str]
    columns: dict[str, list]
    groups: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    truncated: Tensor
    rewards: Tensor
    scores: RewardBatch
    score_seconds: float

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """Actions of each completion, (N,)."""
        return self.action_mask.sum(-1)

    @property
    def completion_ids(self) -> list[list[int]]:
        """Actions of each completion, without padding."""
        ids = self.input_ids[:, -self.action_mask.shape[1] :]
        return [row[mask].tolist() for row, mask in zip(ids, self.action_mask, strict=True)]

    @property
    def actions(self) -> Tensor:
        """All actions row by row, (S,)."""
        return self.input_ids[:, -self.action_mask.shape[1] :][self.action_mask]

    def padded(self, flat: Tensor) -> Tensor:
        """Return (S,) values of the action tokens as (N, T), zeros elsewhere."""
        out = flat.new_zeros(self.action_mask.shape)
        out[self.action_mask.to(flat.device)] = flat
        return out

    def token_index(self, rows: Tensor) -> Tensor:
        """Return the flat indices of the action tokens of some rows, row by row."""
        start = self.lengths.cumsum(0) - self.lengths
        return torch.cat([torch.arange(s, s + n) for s, n in self._spans(start, rows)])

    def _spans(self, start: Tensor, rows: Tensor) -> Iterator[tuple[int, int]]:
        return zip(start[rows].tolist(), self.lengths[rows].tolist(), strict=True)

    def micro_batches(self, size: int, rows: Tensor | None = None) -> Iterator[Tensor]:
        """Cut rows into groups of about equal length, so that little padding is computed."""
        rows = torch.arange(len(self)) if rows is None else rows
        if len(rows) == 0:
            return iter(())
        return iter(rows[self.attention_mask.sum(-1)[rows].argsort(stable=True)].split(size))

    def model_inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return input_ids, attention_mask and state_mask of some rows, padding cut off."""
        ids, mask, action = self.input_ids[rows], self.attention_mask[rows], self.action_mask[rows]
        states = torch.zeros_like(mask, dtype=torch.bool)
        T = action.shape[1]
        states[:, -T - 1 : -1] = action  # the output at a position is the policy for the next
        used = mask.any(0).nonzero()
        keep = slice(int(used[0]), int(used[-1]) + 1)
        return ids[:, keep], mask[:, keep], states[:, keep]


@dataclass(frozen=True)
class Batch:
    """A rollout with the old policy and the reference at each of its states.

    Attributes:
        rollout: The completions, N.
        old_features, ref_features: Features of both at every state, (S, D).
        hidden: The reference's last hidden states, (S, D): features of a value head.
        old_logprobs, ref_logprobs: log-probability of each action, (S,), nats.
        entropy: Entropy of pi_old at each state, (S,), nats.
        ref_kl: KL(pi_old ‖ pi_ref) at each state, exact, (S,), nats.
        actions: The tokens that were chosen, (S,) int64.
        micro_batch_size: Completions per forward pass.
    """

    rollout: Rollout
    old_features: Tensor
    ref_features: Tensor
    hidden: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    ref_kl: Tensor
    actions: Tensor
    micro_batch_size: int

    @classmethod
    @torch.no_grad()
    def from_rollout(
        cls, policy: Policy, rollout: Rollout, *, micro_batch_size: int | None = None
    ) -> Batch:
        """Run old policy and reference over a rollout.

        Args:
            policy: At theta_old.
            rollout: Sampled from it.
            micro_batch_size: Completions per forward pass; None: `affordable_rows`.
        """
        micro_batch_size = micro_batch_size or affordable_rows(policy, rollout)
        old = all_features(policy, rollout, micro_batch_size)[1]
        with policy.reference():
            hidden, ref = all_features(policy, rollout, micro_batch_size)
        columns: list[tuple[Tensor, ...]] = []
        actions = rollout.actions.to(old.device)
        for chunk in policy.chunks(len(old)):
            log_old, log_ref = policy.logprobs(old[chunk]), policy.logprobs(ref[chunk])
            columns.append(
                (
                    token_logprobs(log_old, actions[chunk]),
                    token_logprobs(log_ref, actions[chunk]),
                    entropy(log_old),
                    categorical_kl(old=log_old, new=log_ref),
                )
            )
        logprobs, ref_logprobs, entropies, ref_kl = (
            torch.cat(column) for column in zip(*columns, strict=True)
        )
        return cls(
            rollout=rollout,
            old_features=old,
            ref_features=ref,
            hidden=hidden,
            old_logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            entropy=entropies,
            ref_kl=ref_kl,
            actions=actions,
            micro_batch_size=micro_batch_size,
        )

    def micro_batches(
        self, rows: Tensor | None = None, *, share: float = 1.0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return pairs of row indices and the indices of their tokens in the flat order.

        Args:
            rows: Which completions; all when None.
            share: Of `micro_batch_size`, where a pass keeps more than one graph's memory.
        """
        size = max(1, int(self.micro_batch_size * share))
        for part in self.rollout.micro_batches(size, rows):
            yield part, self.rollout.token_index(part)


def affordable_rows(policy: Policy, rollout: Rollout) -> int:
    """Return how many completions a forward pass may take: 64, or fewer where memory is short.

    A graph over that many may fill an eighth of the memory that the weights leave, judged by what
    the longest completion's graph holds. All memory counts, not what is free just now: the size,
    and with it the rounding, must not depend on what else runs.
    """
    longest = rollout.attention_mask.sum(-1).argmax()[None]
    weights = sum(p.nbytes for p in policy.model.parameters())
    each = policy.graph_bytes(*rollout.model_inputs(longest))
    rows = (memory(policy.device) - weights) // 8 // each
    return min(MOST_ROWS, 1 << max(rows, 1).bit_length() - 1)


def memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@torch.no_grad()
def all_features(policy: Policy, rollout: Rollout, size: int) -> tuple[Tensor, Tensor]:
    """Return hidden states and features of every state of a rollout, in flat order."""
    parts, order = [], []
    for rows in rollout.micro_batches(size):
        parts.append(policy.hidden_and_features(*rollout.model_inputs(rows)))
        order.append(rollout.token_index(rows))
    back = torch.cat(order).argsort()
    hidden, features = (torch.cat(p)[back] for p in zip(*parts, strict=True))
    return hidden, features
