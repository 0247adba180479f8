"""Reward models: sequence classifiers that score whole and unfinished text.

For the prefix critic a reward model also scores the states of a completion, V(s_t) ~ score(prompt +
y_<t). A state is passed as *text*, so policy and reward model need not share a tokenizer. A causal
classifier scores all states of a completion in one forward pass, an encoder needs a pass for each.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trpo_lm.errors import TrpoLMError, first_line
from trpo_lm.lm.examination import (
    PROBE,
    each_text_has_logits,
    examine,
    ids_have_embeddings,
    weights_are_complete,
)
from trpo_lm.lm.memory import fastest, is_full, rows_within
from trpo_lm.lm.prompts import apply_template, as_turn, template_options, tokenised


class RewardModel:
    """A sequence classifier used as a reward.

    Scores prompt + completion as one text; conversations go through the tokenizer's own chat
    template. One output: its raw value. Several: the probability of `label` (softmax; sigmoid where
    the config says "multi_label_classification"). Texts longer than the model's context are
    truncated on the left, for the completion is at the end. A batch scores what each text alone
    scores, by the model and its config as they were shipped.

    Args:
        model: Name or folder for `AutoModelForSequenceClassification`, or a loaded model, which is
            put into eval mode.
        processing_class: Its tokenizer, a processor that has one, or the name or path of either;
            default: what is stored with the model.
        label: Output to reward, by name or index. Default with two outputs: the one named
            "positive", else index 1. Required with more.
        batch_tokens: Most tokens in one forward pass, padding included; halved where memory is
            full. None: `memory.MOST_TOKENS`, fewer on a CPU.
        prefix_stride: Without causal attention, score every k-th prefix and interpolate between.
        allow_untrained_head: Accept weights that are missing from the model's files.
        device: Where to put the model; None leaves it where it is.

    Attributes:
        causal: Whether one forward pass scores all prefixes of a text.
        max_length: Context length, tokens.

    Raises:
        TrpoLMError: If the model cannot be loaded, has no trained head or tokenizer, or `label` is
            not one of its outputs.
    """

    scores_prefixes = True

    def __init__(
        self,
        model: Any,
        processing_class: Any = None,
        *,
        label: str | int | None = None,
        batch_tokens: int | None = None,
        prefix_stride: int = 1,
        allow_untrained_head: bool = False,
        device: Any = None,
    ):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from trpo_lm.lm.loading import (
            REPORTED,
            as_tokenizer,
            context_length,
            require_safetensors,
        )

        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        self.__name__ = name.rstrip("/").split("/")[-1] or type(model).__name__
        if isinstance(model, str):
            require_safetensors(name, "transformers.AutoModelForSequenceClassification")
            model, report = _load(AutoModelForSequenceClassification, name, **REPORTED)
            examine(
                weights_are_complete, report,
                f"reward model {name!r} has no trained head: its files lack", where=None,
                hint="name a model trained for sequence classification, or pass "
                "allow_untrained_head=True (--allow_untrained_reward_head)",
                allowed=allow_untrained_head, of=self.__name__,
            )  # fmt: skip
        self.model = (model if device is None else model.to(device)).eval()
        examine(each_text_has_logits, self.model, self.__name__, of=self.__name__)
        self.tokenizer = tokenizer = (
            _load(AutoTokenizer, name)
            if processing_class is None
            else as_tokenizer(processing_class)
        )
        self.batch_tokens = batch_tokens or fastest(self.model.device)
        self.prefix_stride = prefix_stride
        config = self.model.config
        self.label = _label_index(label, config, name)

        # A causal classifier pools at the last token that is not this one; at the last if None.
        pad = getattr(config.get_text_config(), "pad_token_id", None)
        self.pad_id = pad if pad in range(self.embeddings) else None
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, self.pad_id)
        self._blank = next((i for i in ids if i is not None), None)
        if self._blank is None:
            raise TrpoLMError(
                f"the tokenizer of reward model {name!r} has no token that an empty text could be",
                hint="set tokenizer.bos_token or tokenizer.eos_token and pass the tokenizer as "
                "processing_class",
            )
        limits = context_length(config), tokenizer.model_max_length
        limits = [n for n in limits if isinstance(n, int) and n > 0]
        self.max_length = min([*limits, *_positions_behind_padding(self.model)], default=2**31)
        head = getattr(self.model, "score", None)
        self._head = head if isinstance(head, torch.nn.Module) else None
        self._ignores_padding = True
        self._ignores_padding = self._padding_is_ignored()
        self.causal = self._head is not None and tokenizer.is_fast and self._is_causal()

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """Score whole completions.

        Args:
            prompts: (N,) strings, or conversations of {"role", "content"}.
            completions: (N,) strings, or lists of messages. A string goes on with the last message
                of a conversation if that is an assistant's, and else answers it.
            columns: `tools` and `chat_template_kwargs` reach the chat template; the others are
                accepted so that a model can be called like a function.

        Returns:
            (N,) scores.
        """
        pairs = enumerate(zip(prompts, completions, strict=True))
        return self._score_texts([self._text(p, c, columns, i) for i, (p, c) in pairs], prompts)

    def check_prompts(self, prompts: list, columns: dict[str, list]) -> int:
        """Check that each prompt can be read; return the tokens of the longest.

        Args:
            prompts: (N,), as in `__call__`.
            columns: Of the dataset, (N,) each.

        Raises:
            TrpoLMError: Names the row that the chat template or the tokenizer refuses, or that has
                a token without an embedding.
        """
        try:  # all at once: ten times as fast
            texts = [self._text(p, "text", columns, i) for i, p in enumerate(prompts)]
            rows, _ = self._encode(texts, prompts)
        except Exception:  # whatever a tokenizer may raise; row by row tells which one it is
            rows = [self._row(prompts, columns, i) for i in range(len(prompts))]
        named = [(f"prompt in row {i}", ids) for i, ids in enumerate(rows)]
        named += [] if self.pad_id is None else [("pad token", [self.pad_id])]
        ids_have_embeddings(named, self.embeddings, self.tokenizer)
        return max(map(len, rows), default=0)

    def _row(self, prompts: list, columns: dict[str, list], i: int) -> list[int]:
        """Return the ids of a prompt and a word after it; an error names its row."""
        try:
            text = self._text(prompts[i], "text", columns, i)
            return self._encode([text], prompts[i : i + 1])[0][0]
        except Exception as error:
            raise TrpoLMError(
                f"{getattr(error, 'what', error)} (reward model {self.__name__!r})",
                where=f"prompt in row {i}", hint=getattr(error, "hint", None),
            ) from error  # fmt: skip

    def logits(self, rows: list[list[int]]) -> Tensor:
        """Return the logits of each text, (n, labels) float32, on the CPU.

        Args:
            rows: Token ids of each; its beginning is cut where it is too long.
        """
        return torch.stack([pooled for pooled, _ in self._logits(rows)])

    def score_prefixes(
        self,
        prompts: list,
        completions: list,
        prefixes: list[list[str]],
        columns: dict[str, list] | None = None,
    ) -> list[list[float]]:
        """Score the states of N completions.

        With a causal model the score of a state is that at the last token that ends within its
        text, all from one pass over the whole text; for the text of the whole completion it is the
        score of `__call__`. Otherwise each distinct text is scored by itself.

        Args:
            prompts: (N,), as in `__call__`.
            completions: (N,), as in `__call__`.
            prefixes: prefixes[i][t] is the decoded text of the first t tokens of completion i.
            columns: As in `__call__`.

        Returns:
            Scores in the shape of `prefixes`.
        """
        more = columns or {}
        pairs = enumerate(zip(prompts, prefixes, strict=True))
        texts = [[self._text(p, x, more, i) for x in row] for i, (p, row) in pairs]
        scores: list[dict[int, float]] = [{} for _ in texts]
        if self.causal and texts:
            pairs = enumerate(zip(prompts, completions, strict=True))
            whole = [self._text(p, c, more, i) for i, (p, c) in pairs]
            scores = self._score_in_one_pass(whole, texts, prompts)
        # The rest: everything for an encoder; for a causal model texts beyond its context.
        places: dict[str, list[tuple[int, int]]] = {}
        for i, row in enumerate(texts):
            rest = [t for t in range(len(row)) if t not in scores[i]]
            for t in {*rest[:: self.prefix_stride], *rest[-1:]}:
                places.setdefault(row[t], []).append((i, t))
        firsts = [prompts[at[0][0]] for at in places.values()]
        for text, score in zip(places, self._score_texts(list(places), firsts), strict=True):
            for i, t in places[text]:
                scores[i][t] = score
        return [
            np.interp(range(len(row)), sorted(at), [at[t] for t in sorted(at)]).tolist()
            if row
            else []
            for row, at in zip(texts, scores, strict=True)
        ]

    def _score_in_one_pass(
        self, whole: list[str], texts: list[list[str]], prompts: list
    ) -> list[dict[int, float]]:
        """Return {t: score} for each row: the states that one pass over `whole` can score."""
        scores: list[dict[int, float]] = [{} for _ in texts]
        rows, ends = self._encode(whole, prompts)
        fits = [i for i, row in enumerate(rows) if len(row) <= self.max_length]
        for i, (_, logits) in zip(fits, self._logits([rows[i] for i in fits]), strict=True):
            by_token = self._score(logits).tolist()
            pooled = max((j for j, token in enumerate(rows[i]) if token != self.pad_id), default=0)
            for t, text in enumerate(texts[i]):
                # Length of the common prefix: half a character decodes differently, and a template
                # closes the message.
                common = bisect_left(
                    range(len(text)), True, key=lambda n: not whole[i].startswith(text[: n + 1])
                )
                last = bisect_right(ends[i], common) - 1
                if last >= 0:
                    scores[i][t] = by_token[min(last, pooled)]
        return scores

    def _score_texts(self, texts: list[str], prompts: list) -> list[float]:
        """Score each text by itself: (len(texts),)."""
        if not texts:
            return []
        rows, _ = self._encode(texts, prompts)
        return self._score(self.logits(rows)).tolist()

    def _text(self, prompt: Any, completion: Any, columns: dict[str, list], row: int) -> str:
        """Join a prompt and a completion, through the chat template for conversations."""
        if isinstance(prompt, str):
            whole = isinstance(completion, str)
            return prompt + (completion if whole else "".join(m["content"] for m in completion))
        prompt, completion = as_turn(prompt, completion)
        if not self.tokenizer.chat_template:
            raise TrpoLMError(
                f"the tokenizer of reward model {self.__name__!r} has no chat template, and the "
                "prompts are conversations",
                hint="set tokenizer.chat_template and pass the tokenizer as processing_class",
            )
        options = template_options(columns, row)
        return apply_template(self.tokenizer, [*prompt, *completion], open_turn=False, **options)

    def _encode(self, texts: list[str], prompts: list) -> tuple[list[list[int]], list[list[int]]]:
        """Tokenise, with exactly one BOS if the tokenizer has one.

        Returns:
            Token ids of each text, at least one; and the character at which each token ends, as a
            running maximum: closing special tokens end with the text. No ends without a fast
            tokenizer.
        """
        tokenizer, fast = self.tokenizer, self.tokenizer.is_fast
        bare = [isinstance(prompt, str) for prompt in prompts]
        out = tokenised(tokenizer, texts, bare, return_offsets_mapping=fast, verbose=False)
        rows, bos = out["input_ids"], tokenizer.bos_token_id
        offsets = out["offset_mapping"] if fast else [[] for _ in rows]
        ends = [[end for _, end in row] for row in offsets]
        for ids, end in zip(rows, ends, strict=True):
            if len(ids) > 1 and ids[0] == ids[1] == bos:
                del ids[0], end[:1]
            if not ids:
                ids.append(self._blank)
        return rows, [list(accumulate(end, max)) for end in ends]

    @torch.no_grad()
    def _logits(self, rows: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
        """Run the classifier on token ids, in batches of similar length, padded on the right.

        Returns:
            For each row its logits (labels,) and the head's output at each position (T, labels),
            float32, on the CPU; the latter is empty if the head does not act on single positions.
        """
        special = set(self.tokenizer.all_special_ids)
        fitted = []
        for row in rows:
            first = row[:1] if len(row) > self.max_length and row[0] in special else []
            fitted.append(first + row[len(first) :][-self.max_length + len(first) :])
        order = sorted(range(len(rows)), key=lambda i: len(fitted[i]))
        results: dict[int, tuple[Tensor, Tensor]] = {}
        outputs: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
            outputs.append(output)

        hook = self._head and self._head.register_forward_hook(keep)
        try:
            while order:
                lengths = [len(fitted[i]) for i in order]
                count = rows_within(lengths, self.batch_tokens)
                if not self._ignores_padding:
                    count = min(count, lengths.count(lengths[0]))
                fill = self._filling([fitted[i] for i in order[:count]])
                count = count if fill is not None else 1
                batch = order[:count]
                tokens = [torch.tensor(fitted[i]) for i in batch]
                ids = pad_sequence(tokens, batch_first=True, padding_value=fill or 0)
                mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
                device = self.model.device
                try:
                    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
                    with self._padded_with(fill):
                        pooled = self.model(**inputs).logits.float().cpu()
                except Exception as error:
                    if count == 1 or not is_full(error):
                        raise
                    self.batch_tokens = ids.numel() // 2
                    outputs.clear()
                    continue
                order = order[count:]
                inside = outputs.pop().float().cpu() if outputs else pooled
                if inside.shape[:-1] != ids.shape:
                    inside = pooled.new_empty(len(batch), 0, pooled.shape[-1])
                for i, whole, positions in zip(batch, pooled, inside, strict=True):
                    results[i] = whole, positions[: len(fitted[i])]
        finally:
            if hook:
                hook.remove()
        return [results[i] for i in range(len(rows))]

    @property
    def embeddings(self) -> int:
        """Tokens that the model knows, ids 0 to that less 1."""
        return self.model.get_input_embeddings().weight.shape[0]

    def plain_text(self, tokens: int) -> list[int]:
        """Return the ids of a text of so many tokens, none of them special."""
        special = {*self.tokenizer.all_special_ids, self.pad_id}
        plain = islice((i for i in range(self.embeddings) if i not in special), PROBE)
        return list(islice(cycle(plain), tokens))

    def _filling(self, rows: list[list[int]]) -> int | None:
        """Return a token to pad rows with that no pooling takes for their own; None if all are."""
        if self.pad_id is not None:
            return self.pad_id
        used = {i for row in rows for i in row}
        return next((i for i in range(self.embeddings) if i not in used), None)

    @contextmanager
    def _padded_with(self, fill: int | None) -> Iterator[None]:
        """Let the model see which token is padding, inside the block."""
        configs = (self.model.config, self.model.config.get_text_config())
        shipped = [getattr(config, "pad_token_id", None) for config in configs]
        for config in configs:
            config.pad_token_id = fill
        try:
            yield
        finally:
            for config, pad in zip(configs, shipped, strict=True):
                config.pad_token_id = pad

    def _probe(self) -> list[list[int]]:
        """Return a short text and every beginning of it, as token ids."""
        ids = self.plain_text(min(PROBE, self.max_length))
        return [ids[: n + 1] for n in range(len(ids))]

    def _padding_is_ignored(self) -> bool:
        """Whether rows that are padded to one length get the scores that each gets alone."""
        rows = self._probe()
        alone = torch.cat([self._logits([row])[0][0][None] for row in rows])
        return self._same(torch.stack([pooled for pooled, _ in self._logits(rows)]), alone)

    def _is_causal(self) -> bool:
        """Whether the head's output at each position is that of the text truncated there."""
        cuts = self._logits(self._probe())
        return self._same(cuts[-1][1], torch.stack([pooled for pooled, _ in cuts]))

    def _same(self, found: Tensor, expected: Tensor) -> bool:
        """Whether logits agree up to rounding."""
        tolerance = 1e-4 if self.model.dtype in (torch.float32, torch.float64) else 5e-2
        return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance)

    def _score(self, logits: Tensor) -> Tensor:
        """Turn logits (..., labels) into scores (...)."""
        if logits.shape[-1] == 1:
            return logits[..., 0]
        if self.model.config.problem_type == "multi_label_classification":
            return logits[..., self.label].sigmoid()
        return logits.log_softmax(-1)[..., self.label].exp()


def _load(loader: Any, name: str, **options: Any) -> Any:
    """Load from a folder or the hub, never running code that comes with the model."""
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
        absent = offline and not os.path.isdir(name)
        why = "not found locally and HF_HUB_OFFLINE=1" if absent else "could not be loaded"
        raise TrpoLMError(
            f"reward model {name!r} {why}: {first_line(error)}",
            hint="give a folder with config.json, model.safetensors, tokenizer.json, or a hub id",
        ) from error


def _positions_behind_padding(model: Any) -> list[int]:
    """Return the tokens that tables of positions hold which begin behind a padding index."""
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    return [
        table.num_embeddings - table.padding_idx - 1
        for table in tables
        if getattr(table, "padding_idx", None) is not None
    ]


def _label_index(label: str | int | None, config: Any, name: str) -> int:
    """Return the index of the output to reward."""
    names = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
    if label is None and len(names) <= 2:
        positive = [i for i, text in enumerate(names) if text.upper() in ("POSITIVE", "POS")]
        return (positive or [len(names) - 1])[0]
    for i, text in enumerate(names):
        if label == i or (isinstance(label, str) and label.upper() == text.upper()):
            return i
    problem = "say which one to reward" if label is None else f"{label!r} is none of them"
    raise TrpoLMError(
        f"reward model {name!r} has the labels {', '.join(names)}: {problem}", where="label"
    )
