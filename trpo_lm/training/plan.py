"""What a run needs of a device's memory, worked out from the model's config before it is loaded.

Model and adapters are built on torch's meta device, where tensors have a shape and no content. The
graphs of passes there keep what real ones keep, so that costs are those that a `Policy` measures,
and passes get the sizes that its `Room` would give them. Every row counts as one of the longest,
and what rows have in common as computed row by row: a plan is an upper bound in both.

Not counted: reward models, what other programs hold, and fragmentation (`USABLE`).
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from trpo_lm.algorithms.trpo import TRPO
from trpo_lm.config import TrainerConfig, TRPOSettings
from trpo_lm.core.fisher import linearised_activations, twice_differentiable
from trpo_lm.errors import TrpoLMError, first_line
from trpo_lm.lm.critic import make_critic
from trpo_lm.lm.loading import (
    as_tokenizer,
    context_length,
    is_quantized,
    load_dtype,
    load_tokenizer,
    trainable_tensors,
    with_adapter,
)
from trpo_lm.lm.memory import SHARE, Cost, Room, device_memory, fastest, measured_costs
from trpo_lm.lm.objective import CACHED_CHUNKS, FEWEST, SCORES, completions_in_fisher
from trpo_lm.lm.policy import (
    CHUNK_ELEMENTS,
    CHUNK_STATES,
    cache_argument,
    elementwise_modules,
    recomputed,
)
from trpo_lm.lm.prompts import encode_prompt, load_prompts
from trpo_lm.lm.sampling import GENERATE_ROWS
from trpo_lm.report.format import number
from trpo_lm.training.sharding import on_node, sharers

USABLE = 0.9  # of a device's memory; the rest is for its runtime and for fragmentation
ASSUMED_PROMPT = 128  # tokens, where neither prompts nor tokenizer are at hand
SHORTEST = 16  # tokens of a completion that is worth proposing
QUANTISED = {"load_in_4bit": 0.516, "load_in_8bit": 1.0}  # bytes of a weight, scales included
LASTING = 5  # vectors of M: theta, reference, fallback, what the algorithm remembers (Adam: two)
GRADIENTS = 7  # g and b in two halves each, one more of either in the making
SOLVER = 28  # g, b, halves, metric, square, both solves; the plane they span, in float64, twice
LOGITS = 6  # float32 tensors of a [tokens, V] chunk: old, new and reference, and their products
GRAMS, FEATURES = 3, 3  # of a value head: copies of its matrix, of its float64 inputs
_EITHER = {"--shard_base", "--load_in_4bit"}  # quantised weights cannot be divided
FUSED = (None, "sdpa")  # attention that the fused kernel computes, and the mathematical one can
SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # logits are no linear layer


@dataclass(frozen=True)
class Phase:
    """A part of the table of a plan.

    Attributes:
        name: What holds the memory.
        size: Bytes.
        tokens: How many go through the model at once; None where none do.
        how: Remark.
    """

    name: str
    size: float
    tokens: int | None = None
    how: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run needs of a device's memory.

    Attributes:
        model: Its name.
        parameters, trainable: How many numbers it has, and of these M that are trained.
        dtype: Of the frozen base; with its quantisation.
        batch: What the figures are for, as text.
        phases: What holds memory, bytes. The first two are held always, the third from the
            measurement on, of the others one at a time.
        peak: Most bytes held at any time.
        at: The phase in which they are.
        memory: Bytes of the device.
        advice: Settings with which the run fits, cheapest first; () where it fits as it is, None
            where no setting helps.
    """

    model: str
    parameters: int
    trainable: int
    dtype: str
    batch: str
    phases: tuple[Phase, ...]
    peak: float
    at: str
    memory: float
    advice: tuple[str, ...] | None = ()

    @property
    def fits(self) -> bool:
        """Whether `USABLE` of the memory holds the peak."""
        return self.peak <= USABLE * self.memory

    @property
    def product(self) -> str | None:
        """How Fisher products are made: 'retained', 'forward' or 'scores'; None without any."""
        found = [p.name.removeprefix("Fisher, ") for p in self.phases if p.name[:6] == "Fisher"]
        return found[0] if found else None

    def as_table(self) -> list[tuple[str, str, str, str]]:
        """Return the table, header first: phase, GiB, tokens at once, remark."""
        rows = [
            (p.name, _gib(p.size), "" if p.tokens is None else f"{p.tokens:,}", p.how)
            for p in self.phases
        ]
        return [("", "GiB", "tokens at once", ""), *rows]

    def verdict(self) -> str:
        """Return whether it fits, and the settings that would."""
        peak = f"peak {_gib(self.peak)} of {_gib(self.memory)} GiB, {self.at}"
        if self.fits:
            return f"fits: yes ({peak})"
        if self.advice is None:
            return f"fits: no ({peak}), with no settings: take a smaller model or a larger device"
        return f"fits: no ({peak})\nit would with {' '.join(self.advice)}"

    def __str__(self) -> str:
        share = self.trainable / self.parameters
        facts = {
            "model": f"{self.model}, {self.dtype}",
            "parameters": f"{self.parameters:,}, trainable {self.trainable:,} ({share:.2%})",
            "batch": self.batch,
        }
        lines = [f"{name:12}{text}" for name, text in facts.items()]
        table = self.as_table()
        a, b, c = (max(len(row[i]) for row in table) for i in range(3))
        lines += ["", *(f"{n:{a}}  {s:>{b}}  {t:>{c}}  {how}".rstrip() for n, s, t, how in table)]
        return "\n".join([*lines, "", self.verdict()])


def make_plan(
    model: Any,
    args: TrainerConfig,
    algorithm: Any = None,
    *,
    peft_config: PeftConfig | None = None,
    prompt_length: int | None = None,
    scores_prefixes: bool = False,
    memory: str | float | None = None,
    device: torch.device | None = None,
    processes: int = 1,
) -> Plan:
    """Work out what a run needs, without its model.

    Args:
        model: Hugging Face name or path, of which the config is read; a config; or a model object.
        args: Settings of the run.
        algorithm: Update rule; `TRPO()` when None.
        peft_config: Adapter; the LoRA of `args` when None.
        prompt_length: Tokens of the longest prompt; `ASSUMED_PROMPT` when None.
        scores_prefixes: Whether the reward can score unfinished text, which the critic depends on.
        memory: Of another device, a GPU with bfloat16: bytes, or text such as "24GiB".
        device: Where the run would be; the accelerator if there is one when None.
        processes: That share a batch.

    Raises:
        TrpoLMError: If config or memory cannot be read, or a pass cannot be made without a model.
    """
    device = device or torch.accelerator.current_accelerator() or torch.device("cpu")
    if memory is not None:
        device = torch.device("meta")
    run = _Run(
        model, args, algorithm or TRPO(), peft_config, device,
        memory=device_memory(device) if memory is None else read_bytes(memory),
        prompt=prompt_length, scores_prefixes=scores_prefixes, processes=processes, known={},
    )  # fmt: skip
    plan = run.plan()
    if plan.fits:
        return plan
    fitting = ((names, other.plan()) for names, other in _alternatives(run))
    return replace(plan, advice=next((names for names, other in fitting if other.fits), None))


def read_bytes(memory: str | float) -> float:
    """Return the bytes that a text such as "24GiB", "80 GB" or "512MiB" names.

    Raises:
        TrpoLMError: If it names none.
    """
    units = {"": 1, "k": 1, "m": 2, "g": 3, "t": 4}
    found = re.fullmatch(r"([\d.]+) ?([kmgt]?)(i?)b?", str(memory).strip().lower())
    try:
        assert found is not None
        size, unit, binary = found.groups()
        value = float(size) * (1024 if binary else 1000) ** (units[unit] if unit else 0)
    except (AssertionError, ValueError):
        value = 0.0
    if not 0 < value < math.inf:
        raise TrpoLMError(
            f"{memory!r} is no amount of memory", where="memory", hint="write 24GiB, or 80GB"
        )
    return value


def longest_prompt(source: Any, column: str, model: Any, tokenizer: Any = None) -> int | None:
    """Return the tokens of the longest prompt; None unless all that tells is on this machine.

    Args:
        source: As for `prompts.load_prompts`.
        column: That holds the prompt.
        model: Name or path of the model, whose tokenizer is used when there is none.
        tokenizer: Of the run, or its processor, name or path.

    Raises:
        TrpoLMError: If there are prompts that cannot be read, or there is no such tokenizer.
    """
    if source is None or (isinstance(source, str) and not Path(source).is_file()):
        return None
    prompts = sorted(load_prompts(source, column=column).prompts, key=lambda p: len(str(p)))
    if tokenizer is None and isinstance(model, str) and Path(model).is_dir():
        try:
            tokenizer = load_tokenizer(model)
        except TrpoLMError:
            return None
    if tokenizer is None:
        return None
    tokenizer = as_tokenizer(tokenizer)
    return max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts[-64:])


def rewards_score_prefixes(reward_funcs: Any) -> bool:
    """Return whether rewards can score unfinished text; models, given by name or loaded, can."""
    several = isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
    functions = list(reward_funcs) if several else [reward_funcs]
    return all(
        isinstance(f, str | torch.nn.Module)
        or getattr(getattr(f, "func", f), "scores_prefixes", False)
        for f in functions
    )


def processes() -> int:
    """Return how many processes share this run, by the environment that a launcher sets."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def _gib(size: float) -> str:
    return number(size / 2**30)


# ---------------------------------------------------------------- the model, on the meta device


@dataclass(frozen=True)
class _Sizes:
    """What a model on the meta device says of the real one."""

    name: str
    parameters: int
    trainable: int
    weights: float  # bytes of the frozen base
    divided: float  # of these, what shard_base divides: the decoder layers
    dtype: str
    number: int  # bytes of one of its features
    width: int  # of the features
    hidden: int
    vocabulary: int
    context: int | None
    layers: int
    exact: bool  # whether exact Fisher products can work
    costs: Mapping[str, Cost]


class _Fused(TorchFunctionMode):
    """Attention on the meta device as a fused kernel does it: without its weights.

    Left to itself, the meta device takes the mathematical kernel.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(*args[:3])[0]
        return func(*args, **(kwargs or {}))


class _CountingCache(DynamicCache):
    """A cache that keeps nothing but the bytes it would."""

    size = 0

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
        self.size += key_states.nbytes + value_states.nbytes
        return key_states, value_states


def _measure(
    model: Any, args: TrainerConfig, peft_config: PeftConfig | None, device: torch.device
) -> _Sizes:
    """Build a model on the meta device and measure what its passes would keep."""
    name, config, found, dtype = _config(model, args, device)
    config.pad_token_id = None  # or tokens would be compared with it
    kernels = args.attn_implementation or getattr(config, "_attn_implementation", None)
    try:
        with torch.device("meta"):
            base: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False,
                attn_implementation=kernels if kernels in (*FUSED, "eager") else "sdpa",
            )  # fmt: skip
    except Exception as error:  # whatever a config may lead to
        raise TrpoLMError(
            f"no causal LM can be made of the config of {name!r}: {first_line(error)}",
            where="model",
        ) from error
    output = base.get_output_embeddings()
    quantised = next((kind for kind in QUANTISED if getattr(args, kind)), None)
    linear = sum(
        m.weight.numel() for m in base.modules()
        if isinstance(m, torch.nn.Linear | Conv1D) and m is not output
    )  # fmt: skip
    count = sum(p.numel() for p in base.parameters())
    blocks = (m for m in base.modules() if isinstance(m, GradientCheckpointingLayer))
    divided = sum(p.nbytes for m in blocks for p in m.parameters())
    weights = (count - linear) * dtype.itemsize + linear * QUANTISED.get(
        quantised or "", dtype.itemsize
    )
    if isinstance(model, torch.nn.Module):
        weights = sum(p.nbytes for p in model.parameters())
        quantised = "quantised" if is_quantized(model) else None
    adapted = with_adapter(base, found or peft_config, args, seed=0)
    theta = trainable_tensors(adapted)
    adapted.eval()
    text = config.get_text_config()
    plain_head = type(output) is torch.nn.Linear and not output.weight.requires_grad
    linear_head = plain_head and all(getattr(text, n, None) in (None, 1, 1.0) for n in SCALED)
    layers = getattr(text, "num_hidden_layers", 1)
    return _Sizes(
        name=name,
        parameters=count + sum(p.numel() for p in theta),
        trainable=sum(p.numel() for p in theta),
        weights=weights,
        divided=divided,
        dtype=str(dtype).removeprefix("torch.") + (f", {quantised}" if quantised else ""),
        number=dtype.itemsize,
        width=text.hidden_size if linear_head else text.vocab_size,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        context=context_length(text),
        layers=layers,
        exact=quantised is None and kernels in (*FUSED, "eager"),
        costs=_costs(adapted, base, text, linear_head=linear_head, layers=layers, args=args),
    )


def _config(
    model: Any, args: TrainerConfig, device: torch.device
) -> tuple[str, Any, PeftConfig | None, torch.dtype]:
    """Return name, config, the adapter that comes with it, and dtype of a model."""
    dtype = torch.bfloat16 if device.type == "meta" else torch.float32
    if args.dtype != "auto" or device.type != "meta":
        dtype = load_dtype(args.dtype, device)
    if isinstance(model, torch.nn.Module):
        loaded: Any = model
        base = loaded.get_base_model() if isinstance(model, PeftModel) else loaded
        found = None if base is loaded else loaded.peft_config[str(loaded.active_adapter)]
        name = base.config.name_or_path or "model"
        return name, copy.deepcopy(base.config), _new(found), base.dtype
    if not isinstance(model, str):
        return getattr(model, "name_or_path", "") or "model", copy.deepcopy(model), None, dtype
    try:
        found, source = None, model
        if (Path(model) / "adapter_config.json").is_file():
            found = PeftConfig.from_pretrained(model)
            source = str(found.base_model_name_or_path)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever transformers may raise
        raise TrpoLMError(
            f"the config of model {model!r} cannot be read: {first_line(error)}",
            where="model", hint="give a folder that holds config.json, or a hub id",
        ) from error  # fmt: skip
    return model, config, _new(found), dtype


def _new(found: Any) -> PeftConfig | None:
    """Return the config of an adapter like another, to be trained."""
    return None if found is None else replace(found, inference_mode=False)


def _costs(
    adapted: PeftModel, base: Any, config: Any, *, linear_head: bool, layers: int,
    args: TrainerConfig,
) -> dict[str, Cost]:  # fmt: skip
    """Measure the passes of a `Policy` on the meta device."""
    body = base.base_model if linear_head else base
    argument = cache_argument(base.base_model)
    cached: list[float] = []

    def outputs(n: int) -> Any:
        # A mask's values would be looked at; without one so would be those of the positions, but
        # where there is a cache.
        cache = _CountingCache(config=config)
        ids = torch.zeros(1, n, dtype=torch.long, device="meta")
        known: Any = {argument: cache, "use_cache": True}
        found = body(input_ids=ids, **known)
        cached[:] = [cache.size / n]
        return (found.last_hidden_state if linear_head else found.logits)[:, n // 2 :]

    def plain(n: int) -> Any:
        with _Fused():
            return outputs(n)

    activations = elementwise_modules(base)

    def linearised(n: int) -> Any:
        with twice_differentiable(), linearised_activations(activations):
            return outputs(n)

    def checkpointed(n: int) -> Any:
        blocks = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
        for m in blocks:
            m.forward = partial(recomputed, m.forward)
        try:
            return plain(n)
        finally:
            for m in blocks:
                del m.forward

    graphs = {"plain": plain, "linearised": linearised}
    if args.gradient_checkpointing:
        graphs["recomputed"] = checkpointed
    try:
        plain(8)
        return measured_costs(
            graphs, adapted.parameters(), longest=context_length(config), layers=layers,
            cached=cached[0],
        )  # fmt: skip
    except Exception as error:  # a model without such a cache may raise anything
        raise TrpoLMError(
            f"{type(base).__name__} cannot be measured without its weights: "
            f"{first_line(error)}",
            where="model", hint="start a run: it measures the loaded model, and adapts",
        ) from error  # fmt: skip


# ---------------------------------------------------------------- the run


@dataclass(frozen=True)
class _Run:
    """A run to be planned; `known` holds the sizes of models measured before."""

    model: Any
    args: TrainerConfig
    algorithm: Any
    peft_config: PeftConfig | None
    device: torch.device
    memory: float
    prompt: int | None
    scores_prefixes: bool
    processes: int
    known: dict[tuple, _Sizes]

    def sizes(self) -> _Sizes:
        a = self.args
        key = (a.dtype, a.load_in_4bit, a.load_in_8bit, a.gradient_checkpointing)
        if key not in self.known:
            self.known[key] = _measure(self.model, a, self.peft_config, self.device)
        return self.known[key]

    def plan(self) -> Plan:
        s, a, M = self.sizes(), self.args, 4.0 * self.sizes().trainable
        weights, how = self._weights(s)
        N = math.ceil(a.prompts_per_update * a.completions_per_prompt / self.processes)
        T, V = a.max_completion_length, s.vocabulary
        P = ASSUMED_PROMPT if self.prompt is None else self.prompt
        if s.context is not None:
            P = max(1, min(P, s.context - T))
        length = P + T
        budget = SHARE * (self.memory - weights - M)
        room = Room(budget, dict(s.costs), a.micro_batch_tokens, fastest(self.device))

        def at_once(phase: str, rows: int) -> int:
            return min(rows, room.tokens(phase, length, rows * length) // length)

        def held(phase: str, rows: float, tokens: int = length) -> float:
            return rows * tokens * s.costs[phase].per_token(tokens)

        features = 3.0 * N * T * s.width * s.number
        chunk = min(max(CHUNK_STATES, CHUNK_ELEMENTS // V), N * T)
        logits = LOGITS * 4.0 * V
        sampled = min(GENERATE_ROWS, at_once("rollout", N))
        prefill = max(held("forward", sampled, P), logits * sampled)
        passed = at_once("forward", N)
        forward = held("forward", passed) + logits * chunk
        half = at_once("gradient", math.ceil(N / 2))
        gradient = held("gradient", half) + held("forward", half) + logits * chunk
        phases = [
            Phase(
                "rollout", held("rollout", sampled) + prefill, sampled * length, "cache, prefill"
            ),
            Phase("measurement", max(forward, features * 2 / 3), passed * length, "no graph"),
            Phase("gradient", gradient + GRADIENTS * M, half * length, "graph, g and b"),
        ]
        if isinstance(self.algorithm, TRPOSettings):
            phases.append(self._fisher(s, room, N, length, forward, gradient))
        critic = self._critic(s, N)
        on_host = self.device.type != "cpu"
        moments = {p.name: p.size + (features if p.name != "rollout" else 0.0) for p in phases}
        if not on_host:
            moments["critic"] = critic.size + features
        at = max(moments, key=lambda name: moments[name])
        held_always = [
            Phase("weights", weights, how=how),
            Phase("adapters", LASTING * M, how="theta, reference, fallback, what is learned"),
            Phase("features", features, how="old, reference, hidden states of a batch"),
        ]
        if on_host:
            critic = replace(critic, how=f"{critic.how}; not on the device")
        source = "assumed" if self.prompt is None else "the longest"
        return Plan(
            model=s.name,
            parameters=s.parameters,
            trainable=s.trainable,
            dtype=s.dtype,
            batch=f"{N:,} completions of {T:,} tokens after prompts of {P:,} ({source})",
            phases=(*held_always, *phases, critic),
            peak=weights + LASTING * M + moments[at],
            at=at,
            memory=self.memory,
        )

    @property
    def sharers(self) -> int:
        """Processes that hold a base together."""
        return sharers([on_node()], self.processes) if self.args.shard_base else 1

    def _weights(self, s: _Sizes) -> tuple[float, str]:
        """Return the bytes that a process holds of the base, two gathered layers included."""
        if self.sharers == 1:
            return s.weights, ""
        parts = s.divided / self.sharers + 2 * s.divided / max(1, s.layers)
        how = f"layers among {self.sharers} processes, two gathered"
        return s.weights - s.divided + parts, how

    def _fisher(
        self, s: _Sizes, room: Room, N: int, length: int, forward: float, gradient: float
    ) -> Phase:
        """Return what products take, made as `BatchObjective.fisher` would make them."""
        wanted, M = self.algorithm.fisher_completions, 4.0 * s.trainable
        T, V = self.args.max_completion_length, s.vocabulary
        if not s.exact:
            scores = min(SCORES, N) * M
            return Phase("Fisher, scores", scores + gradient + SOLVER * M, None, f"{SCORES} draws")
        share = completions_in_fisher(wanted, N * self.processes, T) / self.processes
        rows = min(N, math.ceil(share))
        whole, fewest = self.sharers == 1, FEWEST / self.processes
        fits = whole and room.holds("fisher", rows * length, length)
        while whole and not fits and wanted is None and rows > fewest:
            rows = math.ceil(rows / 2)
            fits = room.holds("fisher", rows * length, length)
        each = min(rows, max(1, room.tokens("fisher", length, rows * length) // length))
        chunks = math.ceil(each * T / max(CHUNK_STATES, CHUNK_ELEMENTS // V))
        curvature = 4.0 * V * rows * T if chunks <= CACHED_CHUNKS else 0.0
        if fits:
            kept = rows * length * s.costs["fisher"].per_token(length)
            size, name = kept + max(forward, kept / s.layers), "Fisher, retained"
            each = rows
        else:
            a_pass = each * length * s.costs["gradient"].per_token(length)
            dual = each * length * s.costs["fisher"].per_token(length) * 4 / s.layers
            size, name = max(a_pass, dual, forward), "Fisher, forward"
        how = f"{rows} completions, solver"
        return Phase(name, size + curvature + SOLVER * M, each * length, how)

    def _critic(self, s: _Sizes, N: int) -> Phase:
        if not getattr(self.algorithm, "needs_critic", True):
            return Phase("critic", 0.0, how="none")
        critic = make_critic(
            self.args.critic, can_score_prefixes=self.scores_prefixes, width=1,
            length=self.args.max_completion_length,
        )  # fmt: skip
        kind = critic.name.split("+")[0]
        if kind != "value_head":
            return Phase("critic", float(sum(t.nbytes for t in critic.state().values())), how=kind)
        inputs = N * self.args.max_completion_length * (s.hidden + 1)
        size = 8.0 * (GRAMS * (s.hidden + 2) ** 2 + FEATURES * inputs)
        return Phase("critic", size, how="value head")

    def changed(self, *, fisher: int | None = None, **settings: Any) -> _Run:
        """Return the run with other settings."""
        algorithm = self.algorithm
        if fisher is not None:
            algorithm = replace(algorithm, fisher_completions=fisher)
        return replace(self, args=replace(self.args, **settings), algorithm=algorithm)


def _alternatives(run: _Run) -> Iterator[tuple[tuple[str, ...], _Run]]:
    """Yield runs that need less, with the flags that make them, cheapest change first."""
    a, wanted = run.args, getattr(run.algorithm, "fisher_completions", None)
    by_name = not isinstance(run.model, PreTrainedModel | PeftModel)
    changes: list[tuple[str, dict[str, Any]]] = []
    if not a.gradient_checkpointing:
        changes.append(("--gradient_checkpointing", {"gradient_checkpointing": True}))
    if run.processes > 1 and not (a.shard_base or a.load_in_4bit or a.load_in_8bit):
        changes.append(("--shard_base", {"shard_base": True}))
    if wanted is not None and wanted > FEWEST:
        changes.append((f"--fisher_completions {FEWEST}", {"fisher": FEWEST}))
    if by_name and not (a.load_in_4bit or a.load_in_8bit):
        if run.sizes().number > 2:
            changes.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
        if not a.shard_base:
            changes.append(("--load_in_4bit", {"load_in_4bit": True}))
    one = a.max_completion_length + (ASSUMED_PROMPT if run.prompt is None else run.prompt)
    changes.append((f"--micro_batch_tokens {one}", {"micro_batch_tokens": one}))
    for chosen in range(1, 1 << len(changes)):  # all sets, those without the dearest first
        some = [change for i, change in enumerate(changes) if chosen >> i & 1]
        if {flag for flag, _ in some} >= _EITHER:
            continue
        yield tuple(flag for flag, _ in some), run.changed(**_joined(some))
    if {flag for flag, _ in changes} >= _EITHER:
        changes = [change for change in changes if change[0] != "--load_in_4bit"]
    completion = a.max_completion_length
    for shift in itertools.count(1):
        if (shorter := completion >> shift) < SHORTEST:
            return
        some = [*changes, ("", {"max_completion_length": shorter})]
        flags = [flag for flag, _ in changes]
        yield (*flags, f"--max_completion_length {shorter}"), run.changed(**_joined(some))


def _joined(changes: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return {name: value for _, settings in changes for name, value in settings.items()}
