"""What the rows of a batch begin with, computed once.

Completions of one prompt share it, and the prompts of a chat model share its system message. A
model with a key-value cache runs what all rows begin with as one row, then what is left of each
distinct prompt, then the completions, each stage on the cache of the stage before. Attention sees
the keys and values of a plain pass, so that outputs and gradients are the same up to rounding.

    <system> You add numbers. <user>                           (1, A)
                                     3 + 4 ?    9 + 2 ?        (prompts, B)
                                     7   8      11   11        (n, C)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORTH = 0.85  # of a plain pass's tokens: with more, the stages' overhead is not worth it

Row = Sequence[int | None]  # token ids; None: padding


@dataclass(frozen=True)
class Stage:
    """Rows that continue rows of the stage before.

    Attributes:
        parents: Row of the stage before that each row continues, (n,); None in the first stage.
        input_ids: (n, L).
        attention_mask: 1 at real tokens, of all stages so far, (n, L_before + L).
        state_mask: True where the output is wanted, (n, L).
    """

    parents: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor
    state_mask: Tensor


@dataclass(frozen=True)
class Shared:
    """A batch in stages.

    Attributes:
        stages: Two or three.
        order: Where each state of the batch, row by row, is among those of the stages, (S,).
    """

    stages: list[Stage]
    order: Tensor


def common_length(sequences: Collection[tuple[int, ...]]) -> int:
    """Return how many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)  # in alphabetical order: the most different two
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def common_prompt(prompts: Collection[tuple[int, ...]]) -> int:
    """Return the tokens that all prompts begin with; of several, each keeps its last for itself.

    The output at a prompt's last token is a state, which no other prompt has.
    """
    alike = common_length(prompts)
    return alike if len(set(prompts)) == 1 else min(alike, min(map(len, prompts)) - 1)


def padded_tokens(
    rows: int, prompts: int, common: int, prompt: int, completion: int, *, shared: bool = True
) -> int:
    """Return the tokens that a pass computes, padding included.

    Args:
        rows: Completions.
        prompts: Distinct prompts among them.
        common: Tokens that all prompts begin with.
        prompt: Most tokens of a prompt.
        completion: Most tokens of a completion.
        shared: Whether it may run in stages; it does where that is worth it.
    """
    plain = rows * (prompt + completion)
    if not shared or rows < 2:
        return plain
    rest = prompt - common
    if prompts == rows:  # every prompt has one completion: one stage for both
        staged = common + rows * (rest + completion)
    else:
        staged = common + prompts * rest + rows * completion
    return staged if staged <= WORTH * plain else plain


def share_prefixes(ids: Tensor, mask: Tensor, states: Tensor) -> Shared | None:
    """Cut a batch into stages; None where a plain pass costs little more.

    Args:
        ids: Prompts (left-padded) and completions (right-padded), (n, L).
        mask: 1 at real tokens, (n, L).
        states: True where the output is wanted, (n, L).
    """
    if len(ids) < 2 or not states.any(1).all():
        return None
    prompts, completions, later = [], [], []  # later: the states after a prompt's last token
    for row, real, state in zip(ids, mask.bool(), states.bool(), strict=True):
        tokens, at = row[real].tolist(), state[real].nonzero()[:, 0].tolist()
        prompts.append(tuple(tokens[: at[0] + 1]))
        completions.append(tokens[at[0] + 1 : at[-1] + 1])
        later.append([i - at[0] - 1 for i in at[1:]])
    distinct = list(dict.fromkeys(prompts))
    common = common_prompt(distinct)
    rests = [prompt[common:] for prompt in distinct]
    rest, longest = max(map(len, rests)), max(map(len, completions))
    plain = len(prompts) * (common + rest + longest)
    if padded_tokens(len(prompts), len(distinct), common, common + rest, longest) == plain:
        return None
    left: list[Row] = [[None] * (rest - len(r)) + list(r) for r in rests]
    right: list[Row] = [c + [None] * (longest - len(c)) for c in completions]
    group = [distinct.index(prompt) for prompt in prompts]
    rows: list[tuple[list[int], list[Row], list[list[int]]]] = []  # parents, rows, wanted places
    if common:
        rows.append(([0], [prompts[0][:common]], [[] if rest else [common - 1]]))
    if len(distinct) == len(prompts):
        both: list[Row] = [[*p, *c] for p, c in zip(left, right, strict=True)]
        places = [[rest - 1, *(rest + i for i in at)] for at in later]
        rows.append(([0] * len(both), both, places))
        first = [(len(rows) - 1, i, rest - 1) for i in range(len(both))]
        later = [at[1:] for at in places]
    else:
        if rest:
            rows.append(([0] * len(left), left, [[rest - 1]] * len(left)))
        end = rest - 1 if rest else common - 1
        first = [(len(rows) - 1, g if rest else 0, end) for g in group]
        if longest:
            rows.append((group, right, later))
    stages: list[Stage] = []
    for parents, tokens, wanted in rows:
        stages.append(_stage(stages[-1] if stages else None, parents, tokens, wanted))
    flat, seen = [], 0  # the place of each state among those of all stages
    for stage in stages:
        flat.append(stage.state_mask.flatten().cumsum(0).view_as(stage.state_mask) - 1 + seen)
        seen += int(stage.state_mask.sum())
    order = [
        int(flat[k][i, j])
        for row, (at, rest_of) in enumerate(zip(first, later, strict=True))
        for k, i, j in (at, *((len(stages) - 1, row, j) for j in rest_of))
    ]
    return Shared(stages, torch.tensor(order))


def _stage(
    before: Stage | None, parents: list[int], rows: Sequence[Row], wanted: list[list[int]]
) -> Stage:
    """Build a stage; rows are of one length, `wanted` are columns."""
    ids = torch.tensor([[token or 0 for token in row] for row in rows])
    mask = torch.tensor([[token is not None for token in row] for row in rows]).long()
    states = torch.zeros_like(mask, dtype=torch.bool)
    for state, places in zip(states, wanted, strict=True):
        state[places] = True
    if before is None:
        return Stage(None, ids, mask, states)
    onto = torch.tensor(parents)
    return Stage(onto, ids, torch.cat([before.attention_mask[onto], mask], dim=1), states)
