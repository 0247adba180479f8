"""The start-up examination: what a run stands on, tried on short probes before it generates.

A check is a function whose first line says what holds. It returns as text why that does not hold,
where a run can do without, and raises where it cannot. `examine` makes a check and records it;
`Trainer.examine` and `--examine` print the record.

Two passes are compared by how far their logits differ, in units of how far the logits of different
positions do: rounding is far below 1 in any precision, and what is wrong is near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from trpo_lm.core.fisher import Linear, adjoint_error
from trpo_lm.core.parameters import ParameterVector
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.memory import is_full
from trpo_lm.seeds import generator

T = TypeVar("T")

PROBE, SHORT = 8, 5  # tokens of the text that checks are made on, and of its shortened form
ROUNDING = {8: 1e-3, 4: 1e-3, 2: 0.1, 1: 0.1}  # of a model, by bytes of its shortest numbers
PROBE_MOVE = 1e-2  # of each parameter, away from B = 0, while derivatives are compared
PROBE_ERROR = {8: 1e-3, 4: 1e-3, 2: 0.1}  # relative, by bytes of a number; rounding: 1e-5, 0.04
CAUSAL = "a causal (decoder-only) LM with an output layer is needed, as AutoModelForCausalLM loads"

# ---------------------------------------------------------------- the record


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        checked: What should hold.
        fault: Why it does not; None if it does.
        seconds: That the check took.
    """

    checked: str
    fault: str | None
    seconds: float


@dataclass
class Examination:
    """The checks that were made, in order.

    Attributes:
        findings: One for each check.
        error: What ended it, if anything did; checks after it were not made.
    """

    findings: list[Finding] = field(default_factory=list)
    error: TrpoLMError | None = None

    @property
    def seconds(self) -> float:
        """Of all checks together."""
        return sum(finding.seconds for finding in self.findings)

    def __str__(self) -> str:
        lines = [
            f"  {'yes' if f.fault is None else 'no ':3}  {f.seconds:6.2f} s  {f.checked}"
            + (f": {f.fault}" if f.fault is not None else "")
            for f in self.findings
        ]
        end = "" if self.error is None else "; the rest was not checked"
        lines += [f"  {len(lines)} checks in {self.seconds:.2f} s{end}"]
        return "\n".join(["examination", *lines])


_open: ContextVar[Examination | None] = ContextVar("examination", default=None)


@contextmanager
def examination() -> Iterator[Examination]:
    """Record the checks that are made inside the block; one inside another is the same."""
    record = _open.get() or Examination()
    token = _open.set(record)
    try:
        yield record
    finally:
        _open.reset(token)


def examine(check: Callable[..., T], *subject: Any, of: str = "", **options: Any) -> T:
    """Make a check, record it where a record is open, and return what it returns.

    Args:
        check: The first line of its docstring says what holds.
        subject: Its arguments.
        of: Which of several subjects that is.
        options: Its keyword arguments.

    Raises:
        TrpoLMError: If a pass fails in whatever way, memory that is full apart.
    """
    checked = (check.__doc__ or check.__name__).strip().splitlines()[0].removesuffix(".")
    start, fault, record = perf_counter(), None, _open.get()
    try:
        found = check(*subject, **options)
        fault = found if isinstance(found, str) else None
        return found
    except TrpoLMError as error:
        fault = error.what
        raise
    except Exception as error:  # a model or an adapter may raise anything in its first pass
        if is_full(error):
            raise
        fault = _reason(error)
        raise TrpoLMError(
            f"the check '{checked}' ended in {fault}",
            where=of or "model",
            hint="load the model with dtype 'float32', or choose another adapter; LoRA on all "
            "linear layers is the default",
        ) from error
    finally:
        if record is not None:
            label = checked + (f" ({of})" if of else "")
            record.findings.append(Finding(label, fault, perf_counter() - start))


# ---------------------------------------------------------------- passes


def probe_ids(model: Any, length: int = PROBE) -> Tensor:
    """Return a text, (1, length), from the middle of the vocabulary.

    Special tokens stand at its ends, and a text of nothing else may take a model where rounding is
    all there is: on a 135M chat model in bfloat16 its features were at a cosine of 0.7 to float32.
    """
    size = model.config.get_text_config().vocab_size
    return (size // 2 + torch.arange(length, device=model.device))[None] % size


def plain_pass(model: Any, ids: Tensor) -> Any:
    """Return what a model makes of whole rows, (n, L)."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids))


def positions(mask: Tensor) -> Tensor:
    """Return the position of each token in its row, padding left out; mask and result (n, L)."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def disagreement(found: Tensor, expected: Tensor) -> float:
    """Return how far two outputs differ, relative to how the positions of one do.

    Args:
        found: (n, V).
        expected: (n, V); where both are -inf they agree.
    """
    gap = torch.where(found == expected, 0.0, found.double() - expected.double()).norm()
    if gap == 0:
        return 0.0
    seen = torch.where(expected.isfinite(), expected.double(), 0.0)
    return float(gap / (seen - seen.mean(0)).norm())


def shortest_number(model: torch.nn.Module) -> int:
    """Return the bytes of the shortest numbers that a model's weights are made of."""
    return min(p.element_size() for p in model.parameters())


def rounding(model: torch.nn.Module) -> float:
    """Return the disagreement of two passes that is rounding."""
    return ROUNDING[shortest_number(model)]


@contextmanager
def moved(theta: ParameterVector, by: float = PROBE_MOVE) -> Iterator[None]:
    """Move theta, at which half of a fresh LoRA is zero, inside the block; always the same way."""
    start = theta.snapshot()
    step = torch.randn(len(theta), generator=generator(0, "probe move")).to(theta.vector())
    theta.assign(start, step, by)
    try:
        yield
    finally:
        theta.restore(start)


def _random(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator(0, "probe")).to(like)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.flatten(), dim=0).view_as(x)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


# ---------------------------------------------------------------- the model as it comes


def weights_are_complete(
    report: dict[str, Any], lack: str, *, where: str | None, hint: str, allowed: bool = False
) -> str | None:
    """The files hold all weights.

    Args:
        report: From `from_pretrained` with `loading.REPORTED`. Tied weights are not missing.
        lack: The error up to their names.
        where: As in the error.
        hint: Likewise.
        allowed: Whether some may be missing.
    """
    names = sorted(report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]})
    if not names:
        return None
    more = f" and {len(names) - 4} more weights" if names[4:] else ""
    lacking = f"{lack} {', '.join(names[:4])}{more}"
    if not allowed:
        raise TrpoLMError(lacking, where=where, hint=hint)
    return lacking


@torch.no_grad()
def every_position_has_logits(model: Any) -> None:
    """The model returns logits over the vocabulary at every position."""
    size = model.config.get_text_config().vocab_size
    try:
        logits = plain_pass(model, probe_ids(model)).logits
        found = f"logits of the shape {tuple(logits.shape)} for 1 text of {PROBE} tokens"
        fits = logits.shape == (1, PROBE, size)
    except Exception as error:  # whatever a model of another kind may raise
        found, fits = _reason(error), False
    if not fits:
        raise TrpoLMError(
            f"{type(model).__name__} is no causal LM: {found}", where="model", hint=CAUSAL
        )
    if torch.isnan(logits).any() or torch.isposinf(logits).any():  # -inf is a legal logit
        raise RunFault(
            "non-finite logits at layer output", where="model",
            hint="a weight of the model is nan or infinite, or its dtype overflows",
        )  # fmt: skip


@torch.no_grad()
def rows_agree(model: Any) -> None:
    """A plain, a padded and a shortened row agree."""
    ids = probe_ids(model)
    short, filling = ids[:, :SHORT], ids[:, : PROBE - SHORT]
    rows = torch.cat([ids, torch.cat([filling, short], 1), torch.cat([short, filling], 1)])
    mask = torch.ones_like(rows)
    mask[1, : PROBE - SHORT] = mask[2, SHORT:] = 0
    plain = plain_pass(model, ids).logits[0]
    try:
        whole, padded, shortened = model(
            input_ids=rows, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).logits
    except Exception as error:  # a model that takes no mask may raise anything
        raise TrpoLMError(
            f"{type(model).__name__} cannot read padded rows: {_reason(error)}",
            where="model", hint=CAUSAL,
        ) from error  # fmt: skip
    pairs = {
        "in a batch": (whole, plain),
        "padded on the left": (padded[PROBE - SHORT :], plain[:SHORT]),
        "shortened": (shortened[:SHORT], plain[:SHORT]),
    }
    apart = {name: disagreement(*pair) for name, pair in pairs.items()}
    if wrong := [f"{name} by {x:.1%}" for name, x in apart.items() if not x <= rounding(model)]:
        raise TrpoLMError(
            f"{type(model).__name__} gives a text other logits {', '.join(wrong)}",
            where="model",
            hint="it ignores the attention mask or position ids, and would be sampled as another "
            "policy than the one that is trained; choose a model of another family",
        )


@torch.no_grad()
def future_is_unseen(model: Any) -> None:
    """Changing a later token changes no earlier logits."""
    ids = probe_ids(model)
    other = ids.clone()
    other[:, SHORT:] = ids[:, : PROBE - SHORT]
    one, two = plain_pass(model, torch.cat([ids, other])).logits[:, :SHORT]
    if not (apart := disagreement(two, one)) <= rounding(model):
        raise TrpoLMError(
            f"{type(model).__name__} sees the future: a later token changes the logits of earlier "
            f"ones by {apart:.1%}",
            where="model",
            hint=f"{CAUSAL}; some need is_decoder=True in their config",
        )


def a_token_can_be_sampled(model: Any) -> None:
    """A text can be continued."""
    ids = probe_ids(model)
    one = GenerationConfig(max_new_tokens=1, pad_token_id=0)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=one)


@torch.no_grad()
def longest_row_can_be_read(model: Any, tokens: int) -> None:
    """The longest row can be read by a model that sets no limit.

    Args:
        model: The causal LM.
        tokens: Of the longest prompt and its completion.
    """
    try:
        plain_pass(model.base_model, probe_ids(model, tokens))  # logits of a row may fill memory
    except Exception as error:  # an index beyond a table, memory that is full
        raise TrpoLMError(
            f"{type(model).__name__} cannot read {tokens} tokens, the longest prompt and its "
            f"completion: {_reason(error)}",
            where="dataset",
            hint="set max_position_embeddings in its config to what it can read",
        ) from error


# ---------------------------------------------------------------- the policy


def gradient_exists(theta: ParameterVector, features: Callable[[], Tensor], adapter: str) -> None:
    """A gradient reaches the trainable parameters.

    Args:
        theta: The parameters.
        features: A pass over the probe, with a graph to them.
        adapter: Class of its config.
    """
    outputs = features()
    if outputs.requires_grad and theta.gradient(outputs, cotangent=_random(outputs)).any():
        return
    raise TrpoLMError(
        f"no gradient reaches the {len(theta)} trainable parameters of the adapter ({adapter})",
        where="peft_config",
        hint="adapters that change layers can be trained (LoRA, DoRA, IA3), those that change the "
        "prompt cannot",
    )


@torch.no_grad()
def adapter_is_identity(
    theta: ParameterVector, model: Any, outputs: Callable[[], Tensor], *, fresh: bool
) -> str | None:
    """The adapter begins as the identity.

    Args:
        theta: Its parameters.
        model: The PeftModel.
        outputs: A pass over the probe, (n, D).
        fresh: Whether the adapter was made for this run.

    Returns:
        Text unless switching the adapter off gives the bits of the start, wherever theta is.
    """
    start = outputs()
    with model.disable_adapter():
        off = outputs()
        apart = disagreement(start, off)
        with moved(theta):
            restores = torch.equal(start, outputs())
    if fresh and not apart <= rounding(model):
        raise TrpoLMError(
            f"the fresh adapter changes the model, by {apart:.1%}: the reference would not be the "
            "base model, and what is saved would not fit it",
            where="peft_config",
            hint="leave init_lora_weights at its default; an adapter that begins elsewhere can be "
            "passed with its model, as a PeftModel",
        )
    return None if restores else "the reference is a copy of its parameters"


@torch.no_grad()
def head_is_linear(model: Any, transformer: Any, head: Any) -> str | None:
    """Logits are a frozen linear layer of the last hidden states."""
    if type(head) is not torch.nn.Linear or head.weight.requires_grad:
        return "the output layer is trained, or none: logits are computed by the model"
    ids = probe_ids(model)
    logits, hidden = plain_pass(model, ids).logits, plain_pass(transformer, ids).last_hidden_state
    by_head = head(hidden)
    same = torch.allclose(logits.float(), by_head.float(), rtol=1e-5, atol=1e-5)
    return None if same else "logits are changed behind the output layer"


@torch.no_grad()
def stages_agree(
    model: Any, plain: Callable[[], Tensor], staged: Callable[[], Tensor]
) -> str | None:
    """What rows begin with can be computed once.

    Args:
        model: Whose passes they are.
        plain: A pass, (n, D).
        staged: The same in stages, on a key-value cache.
    """
    expected = plain()
    try:
        apart = disagreement(staged(), expected)
    except Exception as error:  # a model without such a cache may raise anything
        return _reason(error)
    return None if apart <= rounding(model) else f"stages differ by {apart:.1%}"


def product_is_right(
    theta: ParameterVector, features: Callable[[], Tensor], jvp: Linear, known: str | None
) -> str | None:
    """Fisher products exist and are right.

    They must agree with a plain backward pass of the model as it is, which kernels that drop or
    distort a derivative do not. A random cotangent u is almost orthogonal to J J^T u, and rounding
    counts by the inverse of that cosine: half of u is made of J J^T u itself.

    Args:
        theta: The parameters.
        features: A pass over the probe, with a graph to them.
        jvp: v -> J v of that pass.
        known: Why they cannot be, where that is known: kernels may be differentiable once only, and
            not say so.
    """
    if known is not None:
        return known
    with moved(theta):
        outputs = features()
        u = _random(outputs)
        c = theta.gradient(outputs, cotangent=u)
        try:
            u = _unit(u) + _unit(jvp(c)).to(u)
            c = theta.gradient(features(), cotangent=u)
            error = adjoint_error(u, c, jvp)
        except Exception as missing:  # a kernel may raise anything
            return _reason(missing)
    exact = error < PROBE_ERROR[outputs.dtype.itemsize]
    return None if exact else f"a layer's derivative is off by {error:.1%}"


# ---------------------------------------------------------------- reward models


@torch.no_grad()
def each_text_has_logits(model: Any, name: str) -> None:
    """A reward model returns one row of logits for a text."""
    try:
        logits = plain_pass(model, probe_ids(model)).logits
        found = f"logits of the shape {tuple(logits.shape)} for 1 text of {PROBE} tokens"
        fits = logits.shape == (1, model.config.num_labels)
    except Exception as error:  # whatever a model of another kind may raise
        found, fits = _reason(error), False
    if not fits:
        raise TrpoLMError(
            f"{name!r} ({type(model).__name__}) is no reward model: {found}, not "
            f"(1, {model.config.num_labels})",
            where="reward_funcs",
            hint="name a model trained for sequence classification",
        )


@torch.no_grad()
def pooling_is_its_own(reward: Any) -> None:
    """A batch has the logits that each of its texts has alone."""
    rows = [reward.plain_text(n) for n in (PROBE, SHORT, 1)]
    for row, found in zip(rows, reward.logits(rows), strict=True):
        ids = torch.tensor([row], device=reward.model.device)
        logits = plain_pass(reward.model, ids).logits[0]
        expected, tolerance = logits.float().cpu(), max(1e-4, rounding(reward.model))
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
            raise TrpoLMError(
                f"reward model {reward.__name__!r} scores a text otherwise beside longer ones: "
                f"logits {found.tolist()}, alone {expected.tolist()}",
                where="reward_funcs",
                hint="set its config.pad_token_id to a token that ends no text",
            )


def longest_text_fits(reward: Any, tokens: int) -> None:
    """The longest text fits the reward model.

    Args:
        reward: The `RewardModel`.
        tokens: Of the longest text of the run.
    """
    tokens = min(tokens, reward.max_length)
    try:
        reward.logits([reward.plain_text(tokens)])
    except Exception as error:  # an index beyond a table, memory that is full
        raise TrpoLMError(
            f"reward model {reward.__name__!r} cannot score a text of {tokens} tokens: "
            f"{_reason(error)}",
            where="reward_funcs",
            hint="set model_max_length of its tokenizer to what it can read",
        ) from error


# ---------------------------------------------------------------- tokens


def ids_have_embeddings(
    rows: Iterable[tuple[str, Sequence[int]]], count: int, tokenizer: Any
) -> None:
    """Every token has an embedding.

    Args:
        rows: Where tokens are from, and their ids.
        count: Rows of the embedding.
        tokenizer: To name the token.
    """
    for where, ids in rows:
        if ids and max(ids) >= count:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise TrpoLMError(
                f"token {token!r} has the id {max(ids)}, and the model has embeddings for {count}",
                where=where,
                hint="use the model's own tokenizer, or resize_token_embeddings and save the model",
            )


def texts_join(mdp: Any, prompts: Sequence[Any], encoded: Sequence[Sequence[int]]) -> None:
    """Prompt + completion decodes as the whole does.

    Args:
        mdp: The `TokenMDP`, whose decoder it is.
        prompts: Each is cut in two; conversations are passed over, for an answer stands alone.
        encoded: Their tokens.
    """
    for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        if not isinstance(prompt, str):
            continue
        first, second = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        whole, begins = mdp.text(ids), mdp.text(first)
        joined = begins + mdp.text(second, mdp.before(prompt, first))
        if joined != whole and "\ufffd" not in begins:  # half a character has no text
            raise TrpoLMError(
                f"the tokenizer decodes a text otherwise in two parts: {joined!r:.80}, whole "
                f"{whole!r:.80}",
                where=f"prompt in row {i}",
                hint="set tokenizer.clean_up_tokenization_spaces = False, or use the model's own",
            )
