"""What draws completions: the seam between the MDP and an engine that samples.

A `Sampler` continues token ids, and says with which log-probability it drew each token. `InProcess`
generates with the policy itself; `servers.Servers` asks vLLM's servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trpo_lm.core.divergences import log_softmax, token_logprobs
from trpo_lm.errors import RunFault
from trpo_lm.lm.policy import Policy
from trpo_lm.seeds import global_seed

WATCHED = 8  # rows of which the log-probabilities are recorded while they are generated
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


class Drawn(NamedTuple):
    """Completions as they were drawn.

    Attributes:
        tokens: Of N completions, those of a prompt side by side, (N, max_tokens) int64; each with
            its stop id, if it came to one, and anything after it.
        logprobs: log-probability of each token of the first rows when it was drawn, in nats,
            (k, max_tokens), k <= N; anything after a stop id.
    """

    tokens: Tensor
    logprobs: Tensor


class Sampler(Protocol):
    """Draws completions from a policy."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        *,
        max_tokens: int,
        stop_ids: Sequence[int],
        temperature: float,
        seed: tuple[int | str, ...],
    ) -> Drawn:
        """Draw n completions of each prompt.

        Args:
            prompts: Token ids of each.
            n: Completions of each.
            max_tokens: Tokens of a completion, at most.
            stop_ids: Any of them ends a completion, whose last token it is.
            temperature: Of the policy.
            seed: What the random numbers derive from; equal ones draw the same.

        Raises:
            RunFault: If an engine cannot, or does something else.
        """
        ...


class InProcess:
    """Samples by `generate` of transformers, on the policy's own model.

    Args:
        policy: To sample from, as it is at each call.
        pad_token_id: Fills unused positions.
        greedy: Take the likeliest token instead of sampling.
    """

    def __init__(self, policy: Policy, pad_token_id: int, *, greedy: bool = False):
        self.policy, self.pad_token_id, self.greedy = policy, pad_token_id, greedy

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        *,
        max_tokens: int,
        stop_ids: Sequence[int],
        temperature: float,
        seed: tuple[int | str, ...],
    ) -> Drawn:
        """Draw n completions of each prompt; see `Sampler.complete`.

        Raises:
            RunFault: If the model returns non-finite logits.
        """
        ids, mask = left_pad([p for p in prompts for _ in range(n)], self.pad_token_id)
        length = ids.shape[1] + max_tokens
        size = self.policy.room.tokens("rollout", length, len(ids) * length)
        config = GenerationConfig(
            **NEUTRAL_SAMPLING | {"top_k": int(self.greedy)},
            temperature=temperature,
            max_new_tokens=max_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=self.pad_token_id,
        )
        slices = list(_slices(len(ids), min(GENERATE_ROWS, size // length)))
        idle = self.policy.most(len(slices)) - len(slices)  # beside others that share the base
        parts = [
            self._generate(ids[part], mask[part], config, (*seed, "generate", part.start))
            for part in slices
        ]
        for _ in range(idle):
            self._generate(ids[:1], mask[:1], config, (*seed, "idle"))
        return Drawn(torch.cat([part.tokens for part in parts]), parts[0].logprobs)

    @torch.no_grad()
    def _generate(self, ids: Tensor, mask: Tensor, config: GenerationConfig, seed: tuple) -> Drawn:
        """Continue the rows of one chunk."""
        policy, length = self.policy, config.max_new_tokens
        assert length is not None
        shipped, policy.base.generation_config = policy.base.generation_config, config
        computed = policy.prompt_cache(ids, mask, follow=length)
        cache, ids, mask = computed or (None, ids, mask)
        watch = _Watch(policy.temperature)
        known = {} if cache is None else {policy.cache_argument: cache}
        try:
            with global_seed(*seed, device=policy.device):
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
        missing = (0, length - out.shape[1])
        return Drawn(pad(out, missing, value=self.pad_token_id), pad(drawn, missing))


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


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return the ids of prompts and their mask, (N, P), padded on the left."""
    P = max(map(len, prompts))
    ids = [[pad_token_id] * (P - len(p)) + list(p) for p in prompts]
    mask = [[0] * (P - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, count)) for i in range(0, count, size))
