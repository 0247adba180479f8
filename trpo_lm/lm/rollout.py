"""Sampled completions, and the old policy and the reference at their states.

A `Rollout` is what the MDP returns; a `Batch` adds one pass of the old policy and one of the
reference. Masks come from lengths, never from token values: the pad token may well be EOS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trpo_lm.core.divergences import categorical_kl, entropy, token_logprobs
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompt
from trpo_lm.lm.rewards import RewardBatch
from trpo_lm.lm.shared_prefixes import common_prompt, padded_tokens

INHERITED = 1 / 5  # of a token's memory: its keys and values, copied to each row that continues it
EVEN = 1 / 32  # how even groups are, as a share of the tokens allowed


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
        drawn_logprobs: log-probability of each action of the first rows as it was sampled, (n, T),
            n < N; None where something else sampled.
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
    drawn_logprobs: Tensor | None = None

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
        spans = (torch.arange(s, s + n) for s, n in self._spans(start, rows))
        return torch.cat([torch.zeros(0, dtype=torch.long), *spans])

    def _spans(self, start: Tensor, rows: Tensor) -> Iterator[tuple[int, int]]:
        return zip(start[rows].tolist(), self.lengths[rows].tolist(), strict=True)

    @cached_property
    def common(self) -> int:
        """Tokens that all prompts begin with."""
        width = self.action_mask.shape[1]
        prompts = {
            tuple(row[mask.bool()].tolist())
            for row, mask in zip(
                self.input_ids[:, :-width], self.attention_mask[:, :-width], strict=True
            )
        }
        return common_prompt(prompts)

    def micro_batches(
        self,
        tokens: int,
        rows: Tensor | None = None,
        *,
        shared: bool = False,
        held: float = math.inf,
    ) -> list[Tensor]:
        """Cut rows into groups that compute at most so many tokens each, or one row.

        Rows stand by length, so that little padding is computed, or by prompt, so that each prompt
        is computed once: whichever computes fewer tokens. The groups are about even.

        Args:
            tokens: Of a group, padding included.
            rows: Which completions; all when None.
            shared: Whether the model computes once what the rows of a group begin with.
            held: Tokens that fit in memory; a row that begins with others' holds a share of those.
        """
        rows = torch.arange(len(self)) if rows is None else rows
        if len(rows) == 0:
            return []
        completion = self.lengths - 1  # nothing reads the last action
        prompt = self.attention_mask.sum(-1) - self.lengths
        orders = [rows[(prompt + completion)[rows].argsort(stable=True)]]
        if shared:
            longest = completion.new_zeros(int(self.groups.max()) + 1)
            longest = longest.scatter_reduce(0, self.groups, completion, "amax")
            groups = self.groups[rows]
            by_group = groups.argsort(stable=True)
            orders.append(rows[by_group[longest[groups[by_group]].argsort(stable=True)]])
        spans = list(zip(self.groups.tolist(), prompt.tolist(), completion.tolist(), strict=True))
        in_order = [[spans[row] for row in order.tolist()] for order in orders]
        common = self.common if shared else 0

        def cut(most: int) -> list[Tensor]:
            cuts = [group_sizes(row, most, held, common, shared=shared) for row in in_order]
            best = min(range(len(orders)), key=lambda k: cuts[k][0])
            return list(orders[best].split(cuts[best][1]))

        parts, least = cut(tokens), tokens // 2
        while len(parts) > 1 and tokens - least > max(1, EVEN * tokens):
            middle = (least + tokens) // 2
            if len(even := cut(middle)) == len(parts):
                parts, tokens = even, middle
            else:
                least = middle
        return parts

    def model_inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return input_ids, attention_mask and state_mask of some rows, padding cut off.

        Of no rows, one token and no state: a pass that adds nothing.
        """
        if not len(rows):
            last = self.input_ids.shape[1] - self.action_mask.shape[1]  # of the first prompt
            ids, one = self.input_ids[:1, last - 1 : last], torch.ones(1, 1, dtype=torch.long)
            return ids, one, torch.zeros(1, 1, dtype=torch.bool)
        ids, mask, action = self.input_ids[rows], self.attention_mask[rows], self.action_mask[rows]
        states = torch.zeros_like(mask, dtype=torch.bool)
        T = action.shape[1]
        states[:, -T - 1 : -1] = action  # the output at a position is the policy for the next
        first = int(mask.any(0).nonzero()[0])
        keep = slice(first, int(states.any(0).nonzero()[-1]) + 1)  # nothing reads a last action
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

    @classmethod
    @torch.no_grad()
    def from_rollout(cls, policy: Policy, rollout: Rollout) -> Batch:
        """Run old policy and reference over a rollout.

        Args:
            policy: At theta_old.
            rollout: Sampled from it.
        """
        old = all_features(policy, rollout)[1]
        with policy.reference():
            hidden, ref = all_features(policy, rollout)
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
        )


def group_sizes(
    spans: Sequence[tuple[int, int, int]], most: int, held: float, common: int, *, shared: bool
) -> tuple[int, list[int]]:
    """Cut rows, taken in order, into groups; return the tokens computed and the groups' rows.

    Args:
        spans: Index of its prompt, tokens of the prompt and of the completion, of each row.
        most: Tokens that a group of several rows may compute.
        held: Tokens that it may hold.
        common: Tokens that all prompts begin with.
        shared: Whether what rows begin with is computed once.
    """
    sizes, total, cost = [0], 0, 0
    groups, P, T = set[int](), 0, 0
    for group, prompt, completion in spans:
        groups.add(group)
        P, T, count = max(P, prompt), max(T, completion), sizes[-1] + 1
        with_row = padded_tokens(count, len(groups), common, P, T, shared=shared)
        beside = INHERITED * (count * (P + T) - with_row)
        if sizes[-1] and (with_row > most or with_row + beside > held):
            total, sizes = total + cost, [*sizes, 0]
            groups, P, T = {group}, prompt, completion
            with_row = padded_tokens(1, 1, common, P, T, shared=shared)
        sizes[-1], cost = sizes[-1] + 1, with_row
    return total + cost, sizes


def micro_batches(
    policy: Policy, rollout: Rollout, phase: str, rows: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a rollout into what one pass of a phase may hold.

    Args:
        policy: Whose passes they are.
        rollout: To cut.
        phase: Of `memory.PHASES`.
        rows: Which completions; all when None.

    Returns:
        Pairs of row indices and the indices of their tokens in the flat order; both are empty in
        passes that only other processes make, which share the base with this one.
    """
    lengths = rollout.attention_mask.sum(-1)
    size = policy.room.tokens(phase, int(lengths.max()), int(lengths.sum()))
    shared = policy.shares(rollout.input_ids.shape[1])
    shared = shared and not (phase == "gradient" and policy.recomputes)
    held = math.inf if policy.room.most else policy.room.fits(phase, int(lengths.max()))
    for part in policy.in_step(rollout.micro_batches(size, rows, shared=shared, held=held)):
        yield part, rollout.token_index(part)


@torch.no_grad()
def all_features(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return hidden states and features of every state of a rollout, in flat order."""
    parts, order = [], []
    for rows, tokens in micro_batches(policy, rollout, "forward"):
        parts.append(policy.hidden_and_features(*rollout.model_inputs(rows)))
        order.append(tokens)
    back = torch.cat(order).argsort()
    hidden, features = (torch.cat(p)[back] for p in zip(*parts, strict=True))
    return hidden, features
