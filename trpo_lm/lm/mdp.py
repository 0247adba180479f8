"""The token-level MDP.

    state s_t = (prompt, y_<t)      action y_t = next token (EOS is one)      s_t+1 = s_t + y_t

An episode ends at EOS or at the length limit. The score of the whole completion is paid at its last
action, plus rewards per token where a reward function gives them. `TokenMDP.step` is the
definition; `TokenMDP.rollout` is the batched path through `model.generate`, and a test holds them
together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trpo_lm.core.divergences import log_softmax, token_logprobs
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.policy import Policy
from trpo_lm.lm.prompts import Prompt, encode_prompts, is_prefilled
from trpo_lm.lm.rewards import RewardBatch, Rewards
from trpo_lm.lm.rollout import Rollout
from trpo_lm.seeds import global_seed

_BEFORE = 8  # tokens of a prompt that decide how a completion begins: a space, half a character
WATCHED = 8  # rows of which the log-probabilities are recorded while they are sampled
GENERATE_ROWS = 512  # completions generated at once; seeds derive per chunk

# What transformers would otherwise inherit from the model's own generation_config: the sampler must
# be the policy that is differentiated, nothing filtered and nothing penalised.
NEUTRAL_SAMPLING: dict[str, bool | int | float] = {
    "do_sample": True,
    "num_beams": 1,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "min_length": 0,
    "renormalize_logits": False,
}


# The settings of a generation config that change no distribution, or that a run has its own for.
FOLLOWED = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
    "transformers_version", "do_sample", "num_beams", "temperature",
    "max_length", "max_new_tokens", "num_return_sequences",
    "use_cache", "cache_implementation", "cache_config", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """A prompt and the actions taken so far."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...] = ()
    columns: Any = None


class TokenMDP:
    """The MDP of a tokenizer and a reward: prompts in, completions and rewards out.

    Args:
        tokenizer: Of the policy's model.
        rewards: Scores completions.
        eos_token_ids: Any of them ends a completion.
        max_completion_length: Actions allowed, >= 1.
        pad_token_id: Fills unused positions; EOS when the tokenizer has no pad token.
        template_arguments: For the chat template; a row's own win over these.
    """

    def __init__(
        self,
        tokenizer: Any,
        rewards: Rewards,
        *,
        eos_token_ids: Sequence[int],
        max_completion_length: int,
        pad_token_id: int | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ):
        if max_completion_length < 1:
            raise TrpoLMError("a completion needs room for a token", where="max_completion_length")
        if not eos_token_ids and pad_token_id is None and tokenizer.pad_token_id is None:
            raise TrpoLMError(
                "the tokenizer has neither a pad nor an eos token", where="processing_class",
                hint="set tokenizer.eos_token (a token that ends a text) before training",
            )  # fmt: skip
        self.tokenizer, self.rewards = tokenizer, rewards
        self.template_arguments = dict(template_arguments or {})
        self.eos_token_ids = sorted(set(eos_token_ids))
        self.max_completion_length = max_completion_length
        candidates = (pad_token_id, tokenizer.pad_token_id, *self.eos_token_ids)
        self.pad_token_id = next(i for i in candidates if i is not None)

    def reset(self, prompt: Prompt, columns: dict[str, Any] | None = None) -> State:
        """Return the initial state of a prompt."""
        values = {name: [value] for name, value in (columns or {}).items()}
        return State(prompt, tuple(self.encode([prompt], values)[0]), (), columns or {})

    def step(self, state: State, action: int) -> tuple[State, float, bool, bool]:
        """Append a token: returns the next state, the reward, terminated (EOS) and truncated.

        Reward functions see whole completions, so that rewards per token are paid with the last
        action here, and where they belong in a rollout; their sum is the same.
        """
        ids = (*state.completion_ids, int(action))
        after = State(state.prompt, state.prompt_ids, ids, state.columns)
        terminated = action in self.eos_token_ids
        truncated = not terminated and len(ids) >= self.max_completion_length
        if not (terminated or truncated):
            return after, 0.0, False, False
        columns = {name: [value] for name, value in (state.columns or {}).items()}
        text = self.text(ids, self.before(state.prompt, state.prompt_ids))
        cut = [truncated]
        scores = self.rewards([state.prompt], [text], [list(ids)], columns, truncated=cut)
        paid = _token_rewards(scores, torch.tensor([len(ids)]), len(ids)).sum()
        return after, float(paid), terminated, truncated

    def encode(
        self, prompts: Sequence[Prompt], columns: Mapping[str, list] | None = None
    ) -> list[list[int]]:
        """Return the token ids of prompts; see `prompts.encode_prompts`."""
        return encode_prompts(self.tokenizer, prompts, columns, self.template_arguments)

    def before(self, prompt: Prompt, prompt_ids: Sequence[int]) -> Sequence[int]:
        """Return the tokens of a prompt that a completion goes on from; none for a new message."""
        return prompt_ids[-_BEFORE:] if isinstance(prompt, str) or is_prefilled(prompt) else ()

    def text(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """Decode a completion for the reward functions: no special tokens.

        Args:
            ids: Tokens of the completion.
            before: From `before`. Some decoders drop the space at the beginning of a text, which a
                completion is not: prompt + completion is the text of all tokens.
        """
        return self._text(ids, before, self._decode(before))

    def _text(self, ids: Sequence[int], before: Sequence[int], start: str) -> str:
        """Return `text`, given that of `before`."""
        whole = self._decode([*before, *ids])
        return whole[len(start) :] if whole.startswith(start) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def rollout(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        *,
        completions_per_prompt: int = 1,
        columns: dict[str, list] | None = None,
        seed: tuple[int | str, ...] = (0,),
        trainer_state: Any = None,
        greedy: bool = False,
    ) -> Rollout:
        """Sample completions from the policy and score them.

        Args:
            policy: Samples with its own temperature and nothing else.
            prompts: One for each group.
            completions_per_prompt: Completions of each prompt; they stand side by side.
            columns: Further dataset columns, one value a prompt; they reach the reward functions.
            seed: What the random numbers derive from.
            trainer_state: Passed on to reward functions that ask for it.
            greedy: Take the likeliest token instead of sampling.

        Raises:
            RunFault: If the model returns non-finite logits, or a reward function fails.
        """
        groups = torch.arange(len(prompts)).repeat_interleave(completions_per_prompt)
        order = groups.tolist()
        repeated = [prompts[i] for i in order]
        values = {k: [v[i] for i in order] for k, v in (columns or {}).items()}
        encoded = self.encode(prompts, columns)
        ids, mask = self.left_pad([encoded[i] for i in order])
        length = ids.shape[1] + self.max_completion_length
        size = policy.room.tokens("rollout", length, len(ids) * length)
        rows = min(GENERATE_ROWS, size // length)
        slices = list(_slices(len(ids), rows))
        idle = policy.most(len(slices)) - len(slices)  # beside others that share the base
        parts = [
            self._generate(policy, ids[part], mask[part], (*seed, "generate", part.start), greedy)
            for part in slices
        ]
        for _ in range(idle):
            self._generate(policy, ids[:1], mask[:1], (*seed, "idle"), greedy)
        sampled = torch.cat([tokens for tokens, _ in parts])
        made = self.scored(repeated, ids, mask, sampled, groups, values, trainer_state)
        return replace(made, drawn_logprobs=parts[0][1])

    def scored(
        self,
        prompts: list[Prompt],
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampled: Tensor,
        groups: Tensor,
        columns: dict[str, list],
        trainer_state: Any = None,
    ) -> Rollout:
        """Build a scored rollout from N sampled completions.

        Args:
            prompts: Of each completion, (N,).
            prompt_ids: Their tokens, left-padded, (N, P), from `left_pad`.
            prompt_mask: 1 at real tokens, (N, P).
            sampled: Tokens of the completions, (N, max_completion_length); anything after EOS.
            groups: Index of the prompt of each completion, (N,).
            columns: Further dataset columns, N values each.
            trainer_state: Passed on to reward functions that ask for it.

        Raises:
            RunFault: If a reward function fails.
        """
        lengths, truncated = self._lengths(sampled)
        T = self.max_completion_length  # on every rank, however long its completions are
        action_mask = torch.arange(T)[None] < lengths[:, None]
        sampled = sampled.masked_fill(~action_mask, self.pad_token_id)
        completion_ids = [row[:n].tolist() for row, n in zip(sampled, lengths, strict=True)]
        before = self._before(prompts, prompt_ids, prompt_mask)
        completions = [self.text(*row) for row in zip(completion_ids, before, strict=True)]
        start = perf_counter()
        scores = self.rewards(
            prompts, completions, completion_ids, columns, trainer_state, truncated.tolist()
        )
        return Rollout(
            prompts=prompts,
            completions=completions,
            columns=columns,
            groups=groups,
            input_ids=torch.cat([prompt_ids, sampled], dim=1),
            attention_mask=torch.cat([prompt_mask, action_mask.to(prompt_mask.dtype)], dim=1),
            action_mask=action_mask,
            truncated=truncated,
            rewards=_token_rewards(scores, lengths, T),
            scores=scores,
            score_seconds=perf_counter() - start,
        )

    def prefix_texts(self, rollout: Rollout) -> list[list[str]]:
        """Decode every prefix y_<t of every completion: one text for each action's state."""
        P = rollout.input_ids.shape[1] - rollout.action_mask.shape[1]
        before = self._before(
            rollout.prompts, rollout.input_ids[:, :P], rollout.attention_mask[:, :P]
        )
        starts = [self._decode(tokens) for tokens in before]
        return [
            [self._text(ids[:t], tokens, start) for t in range(len(ids))]
            for ids, tokens, start in zip(rollout.completion_ids, before, starts, strict=True)
        ]

    def prefix_scores(self, rollout: Rollout) -> Tensor:
        """Return the score of the text of every state, (N, T) float64."""
        scores = self.rewards.score_prefixes(
            rollout.prompts, rollout.completions, self.prefix_texts(rollout), rollout.columns
        )
        flat = [score for row in scores for score in row]
        return rollout.padded(torch.tensor(flat, dtype=torch.float64))

    def _before(
        self, prompts: Sequence[Prompt], prompt_ids: Tensor, prompt_mask: Tensor
    ) -> list[Sequence[int]]:
        """Return `before` of each left-padded prompt."""
        rows = zip(prompts, prompt_ids[:, -_BEFORE:], prompt_mask[:, -_BEFORE:], strict=True)
        return [self.before(prompt, ids[mask.bool()].tolist()) for prompt, ids, mask in rows]

    def left_pad(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return the ids of prompts and their mask, (N, P), padded on the left."""
        P = max(map(len, prompts))
        ids = [[self.pad_token_id] * (P - len(p)) + p for p in prompts]
        mask = [[0] * (P - len(p)) + [1] * len(p) for p in prompts]
        return torch.tensor(ids), torch.tensor(mask)

    @torch.no_grad()
    def _generate(
        self, policy: Policy, ids: Tensor, mask: Tensor, seed: tuple, greedy: bool
    ) -> tuple[Tensor, Tensor]:
        """Return sampled tokens, (n, T), anything after EOS; and log-probabilities of the first."""
        config = GenerationConfig(
            **NEUTRAL_SAMPLING | {"top_k": int(greedy)},
            temperature=policy.temperature,
            max_new_tokens=self.max_completion_length,
            eos_token_id=self.eos_token_ids or None,
            pad_token_id=self.pad_token_id,
        )
        shipped, policy.base.generation_config = policy.base.generation_config, config
        computed = policy.prompt_cache(ids, mask, follow=self.max_completion_length)
        cache, ids, mask = computed or (None, ids, mask)
        watch = _Watch(policy.temperature)
        known = {} if cache is None else {policy.cache_argument: cache}
        try:
            with global_seed(*seed, device=policy.device):  # type: ignore[misc]
                out = policy.base.generate(
                    input_ids=ids.to(policy.device),
                    attention_mask=mask.to(policy.device),
                    generation_config=config,
                    **known,
                    logits_processor=LogitsProcessorList([watch]),
                )
        finally:
            policy.base.generation_config = shipped
        watch.take(out)
        drawn = torch.stack(watch.columns, dim=1).cpu()
        out = out[:, ids.shape[1] :].cpu()
        missing = (0, self.max_completion_length - out.shape[1])
        return pad(out, missing, value=self.pad_token_id), pad(drawn, missing)

    def _lengths(self, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of actions of each row, EOS included, and whether none was EOS."""
        eos = torch.isin(sampled, torch.tensor(self.eos_token_ids, dtype=sampled.dtype))
        ended = eos.any(-1)
        first = eos.int().argmax(-1) + 1
        return torch.where(ended, first, sampled.shape[1]), ~ended


class _Watch(LogitsProcessor):
    """Checks logits, and records the log-probability with which tokens of a few rows are drawn."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.latest: Tensor | None = None
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        whole = scores.sum()  # one pass: nan and +inf survive a sum, and -inf is a legal logit
        if torch.isnan(whole) or whole == torch.inf:
            raise RunFault(
                "non-finite logits at layer output", where="generation",
                hint="a weight of the model is nan or infinite, or its dtype overflows",
            )  # fmt: skip
        self.take(input_ids)
        self.latest = log_softmax(scores[:WATCHED].float() / self.temperature)
        return scores

    def take(self, input_ids: Tensor) -> None:
        """Record the log-probability of each row's last token, drawn from the latest logits."""
        if self.latest is not None:
            self.columns.append(token_logprobs(self.latest, input_ids[:WATCHED, -1]))


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _token_rewards(scores: RewardBatch, lengths: Tensor, T: int) -> Tensor:
    """Return (N, T): the terminal reward at each row's last action, plus its token rewards."""
    rewards = torch.zeros(len(lengths), T, dtype=torch.float64)
    rewards[torch.arange(len(lengths)), lengths - 1] = scores.terminal
    for row, values in enumerate(scores.token_rewards or []):
        rewards[row, : len(values)] += torch.tensor(values, dtype=torch.float64)
    return rewards


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return every id that ends a completion, by the generation config or the tokenizer."""
    given = getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id
    return sorted({int(i) for ids in given if ids is not None for i in np.ravel(ids)})


def ignored_sampling(model: Any) -> dict[str, Any]:
    """Return the sampling settings of the model's generation config that training ignores."""
    shipped = getattr(model.generation_config, "to_diff_dict", dict)()
    return {
        name: value
        for name, value in shipped.items()
        if name not in FOLLOWED and not name.startswith("_")
        and value not in (NEUTRAL_SAMPLING.get(name), None)
    }  # fmt: skip
