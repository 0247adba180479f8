"""The policy pi_theta: a causal LM whose LoRA parameters are theta, and its reference.

    pi_theta(a|s) = softmax(head(h_theta(s)) / temperature)

The *features* h_theta(s) are the last hidden states at the states of a batch, (S, D); the *head* is
the frozen output layer. Old, reference and new distributions are kept as features and put through
the head chunk by chunk, so that a [tokens, V] tensor never exists beyond one chunk. Where the head
is not a frozen linear layer (soft-capped logits, LoRA on lm_head; tested on a probe at start-up),
the features are the model's own logits and the head is the identity.

The reference is theta_ref: the parameters before training, swapped in. For a fresh LoRA that is the
model with adapters off (B = 0); an adapter that came with the model stays in the reference.

Dropout is off in every pass: the model is in eval mode from construction on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from trpo_lm.config import ModelSettings
from trpo_lm.core.divergences import log_softmax
from trpo_lm.core.fisher import linearised_activations, pullback, twice_differentiable
from trpo_lm.core.parameters import ParameterVector
from trpo_lm.errors import TrpoLMError
from trpo_lm.lm.examination import (
    PROBE,
    a_token_can_be_sampled,
    adapter_is_identity,
    every_position_has_logits,
    examine,
    future_is_unseen,
    gradient_exists,
    head_is_linear,
    positions,
    probe_ids,
    product_is_right,
    rows_agree,
    stages_agree,
)
from trpo_lm.lm.identity import base_digest
from trpo_lm.lm.loading import (
    attention_window,
    context_length,
    is_quantized,
    load_model,
    require_no_loading,
    require_single_device,
    trainable_tensors,
    with_adapter,
)
from trpo_lm.lm.memory import SHARE, Cost, Room, device_memory, fastest, measured_costs
from trpo_lm.lm.shared_prefixes import Stage, share_prefixes

CHUNK_ELEMENTS = 1 << 19  # numbers in one [tokens, V] chunk: 2 MB in float32, near the cache
CHUNK_STATES = 64  # at least: the output layer's weights are read once a chunk
ELEMENTWISE = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}


@dataclass(frozen=True)
class Shards:
    """How a base is divided among processes, which then pass through it in step.

    Attributes:
        divide: Leaves this process' part of each layer of a model, on its device.
        most: Returns the largest of the numbers that the processes of the run pass, on all of them.
    """

    divide: Callable[[Any], None]
    most: Callable[[int], int]


class Policy:
    """A causal LM with trainable adapters, seen as a distribution over next tokens.

    Args:
        model: Hugging Face name or path, a causal LM, or a PeftModel (its adapter is trained on,
            and a frozen copy of it is the reference).
        peft_config: Adapter to add; the LoRA of `settings` when None.
        settings: How to load a model that is given by name, and which LoRA to add; the defaults
            when None.
        temperature: Divides logits wherever the policy is evaluated or sampled, > 0.
        gradient_checkpointing: Recompute activations in backward passes (non-reentrant).
        seed: The adapters' initial values derive from it.
        device: Where to put the model; None leaves it where it is.
        micro_batch_tokens: Most tokens of one pass; None: as many as memory allows.
        shards: Processes that hold the base together; None: it is whole. Each of them then makes
            the same passes: every method that runs the model is called on all, in the same order.

    Attributes:
        model: The PeftModel; `base` is the causal LM inside it.
        quantized: Whether weights of the base are quantised, by whatever library.
        sharded: Whether this process holds a part of the base only.
        digest: Of a sharded base, by `identity.base_digest`, when it was whole; None otherwise.
        parameters: theta, M numbers.
        head: The frozen output layer; None where the features are logits.
        shares_prefixes: Whether what rows begin with is computed once.
        exact_products: Which exact Fisher products work, of 'retained' and 'forward'.
        product_faults: Why the others do not.
        room: How many tokens each phase may put through the model at once.
        passes: Completions that went through the model outside sampling, in a list of one number.
        cache_argument: Under which name the model takes a key-value cache.

    Raises:
        TrpoLMError: If the model cannot be loaded, is split across devices, is an object that the
            settings cannot apply to, or a check of `examination` says that it cannot be trained.
        RunFault: If its logits are not finite.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        peft_config: PeftConfig | None = None,
        settings: ModelSettings | None = None,
        *,
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        micro_batch_tokens: int | None = None,
        shards: Shards | None = None,
    ):
        self.name = model if isinstance(model, str) else model.config.name_or_path or "model"
        settings = settings or ModelSettings()
        if isinstance(model, str):
            model = load_model(model, settings, device=device)
        else:
            require_no_loading(model, settings)
        require_single_device(model)
        self.quantized, self.digest = is_quantized(model), None
        self.sharded, self._shards = shards is not None, shards
        if shards is not None:
            self.digest = base_digest(model)
            shards.divide(model)
        if device is not None:
            model = model.to(device)  # type: ignore[arg-type]
        self.came_with_adapter = isinstance(model, PeftModel)
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        plain = every_position_has_logits, rows_agree, future_is_unseen, a_token_can_be_sampled
        for check in plain:
            examine(check, self.base.eval())
        self.model = with_adapter(model, peft_config, settings, seed=seed)
        self.temperature = temperature
        self.recomputes = self._recompute = False  # activations, in the backward pass
        if _enables_checkpointing(self.base) or gradient_checkpointing:
            self._checkpoint_layers()
        self.model.eval()
        self.parameters = ParameterVector(trainable_tensors(self.model))
        self._reference = self.parameters.snapshot()
        self._transformer = self.base.base_model
        self.cache_argument = cache_argument(self._transformer)
        self.passes = [0]
        self._activations = elementwise_modules(self.base)
        self.head: torch.nn.Linear | None = None
        self.shares_prefixes = False
        self._window = attention_window(self.base.config.get_text_config())
        self._examine()
        weights = sum(held(p).nbytes for p in self.model.parameters())
        gathered = largest_gathered(self.base)
        budget = SHARE * (device_memory(self.device) - weights - gathered)
        self.room = Room(budget, self._costs(), micro_batch_tokens, fastest(self.device))

    @property
    def device(self) -> torch.device:
        """Device of the trainable parameters."""
        return self.parameters.tensors[0].device

    @property
    def vocabulary_size(self) -> int:
        """V, the number of actions."""
        return self.base.config.get_text_config().vocab_size

    @property
    def embeddings(self) -> int:
        """Tokens that the model knows, ids 0 to that less 1."""
        return self.base.get_input_embeddings().weight.shape[0]

    @property
    def context_length(self) -> int | None:
        """Longest sequence the model can read; None if its config sets no limit."""
        return context_length(self.base.config.get_text_config())

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Temporarily be the reference; theta is restored bit for bit.

        A fresh adapter is the identity: it is switched off, which saves its computation. Otherwise
        the reference parameters are swapped in.
        """
        if self._starts_as_base:
            with self.model.disable_adapter():
                yield
            return
        theta = self.parameters.snapshot()
        self.parameters.restore(self._reference)
        try:
            yield
        finally:
            self.parameters.restore(theta)

    def from_reference(self) -> Tensor:
        """Return theta - theta_ref, (M,)."""
        return self.parameters.vector() - self.parameters.flatten(self._reference)

    def hidden_and_features(
        self, input_ids: Tensor, attention_mask: Tensor, state_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the model and keep its outputs at the states of a batch.

        What several rows begin with is computed once, where that saves enough (`shared_prefixes`).

        Args:
            input_ids: Prompts (left-padded) and completions (right-padded), (n, L).
            attention_mask: 1 at real tokens, (n, L).
            state_mask: True where the model's output is the distribution of an action, (n, L).

        Returns:
            Last hidden states (S, D), detached, and features, (S, D) or (S, V) where the head is
            the identity; both row by row.
        """
        shared, self.passes[0] = None, self.passes[0] + len(input_ids)
        if self.shares(input_ids.shape[1]) and not self._recompute:
            shared = share_prefixes(input_ids, attention_mask, state_mask)
        idle = self._idle(1 if shared is None else len(shared.stages))
        if shared is None:
            mask = attention_mask.to(self.device)
            parts = [self._outputs(input_ids.to(self.device), mask, state_mask)]
        else:
            cache = DynamicCache()
            parts = [self._run_stage(stage, cache) for stage in shared.stages]
        parts += [self._outputs(*one) for one in idle]  # without a state
        hidden, features = (p[0] if len(p) == 1 else torch.cat(p) for p in zip(*parts, strict=True))
        if shared is not None:
            order = shared.order.to(self.device)
            hidden, features = hidden[order], features[order]
        return hidden.detach(), features

    def most(self, count: int) -> int:
        """Return the largest count of any process that shares the base; else the count itself."""
        return count if self._shards is None else self._shards.most(count)

    def in_step(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return parts of a batch, and empty ones for the passes that only other processes make.

        Args:
            parts: Rows that go through the model together, (n,) each.
        """
        missing = self.most(len(parts)) - len(parts)
        return [*parts, *(torch.zeros(0, dtype=torch.long) for _ in range(missing))]

    def _idle(self, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the inputs of passes that add nothing, as many as others have beyond a count."""
        ids = torch.ones(1, 1, dtype=torch.long, device=self.device)
        return [(ids, ids, torch.zeros_like(ids).bool())] * (self.most(count) - count)

    def shares(self, tokens: int) -> bool:
        """Return whether what rows of so many tokens begin with is computed once.

        Rows of several lengths then have padding between their tokens, which takes up room in the
        window of a model whose attention sees only the latest ones.
        """
        return self.shares_prefixes and (self._window is None or tokens <= self._window)

    @torch.no_grad()
    def prompt_cache(
        self, ids: Tensor, mask: Tensor, *, follow: int
    ) -> tuple[DynamicCache, Tensor, Tensor] | None:
        """Return keys and values of prompts but for their last token, each computed once.

        Args:
            ids: Prompts, left-padded, (n, P).
            mask: 1 at real tokens, (n, P).
            follow: Tokens that will follow, at most.

        Returns:
            The cache, and ids and mask of the prompts as they lie in it, padding after what they
            have in common, (n, P') each; None where computing them row by row costs little more.
        """
        states = torch.zeros_like(mask, dtype=torch.bool)
        states[:, -2:-1] = mask[:, -2:-1].bool()
        shared = None
        if self.shares(ids.shape[1] + follow):
            shared = share_prefixes(ids[:, :-1], mask[:, :-1], states[:, :-1])
        for one in self._idle(0 if shared is None else len(shared.stages)):
            self._outputs(*one)
        if shared is None:
            return None
        cache, laid = DynamicCache(), ids[:0]
        for stage in shared.stages:
            laid = stage.input_ids if stage.parents is None else torch.cat(
                [laid[stage.parents], stage.input_ids], dim=1
            )  # fmt: skip
            self._run_stage(stage, cache)
        cache.batch_select_indices(shared.order.to(self.device))
        mask = torch.cat([shared.stages[-1].attention_mask[shared.order], mask[:, -1:]], dim=1)
        return cache, torch.cat([laid[shared.order], ids[:, -1:]], dim=1), mask

    def _run_stage(self, stage: Stage, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Run a stage on the cache of the stage before."""
        if stage.parents is not None:
            cache.batch_select_indices(stage.parents.to(self.device))
        ids, mask = stage.input_ids.to(self.device), stage.attention_mask.to(self.device)
        return self._outputs(ids, mask, stage.state_mask, cache)

    def _outputs(
        self, ids: Tensor, mask: Tensor, states: Tensor, cache: DynamicCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run tokens (n, L) that continue those of a cache; `mask` covers both."""
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions(mask)[:, -ids.shape[1] :],
            "use_cache": cache is not None,
            self.cache_argument: cache,
        }
        states = states.to(self.device)
        if self.head is not None:
            features = self._transformer(**inputs).last_hidden_state[states]
            return features, features
        output = self.base(**inputs, output_hidden_states=True)
        return output.hidden_states[-1][states], output.logits[states]

    def features(self, input_ids: Tensor, attention_mask: Tensor, state_mask: Tensor) -> Tensor:
        """Return the features of `hidden_and_features`, with a graph to theta."""
        self._recompute = self.recomputes and torch.is_grad_enabled()
        try:
            return self.hidden_and_features(input_ids, attention_mask, state_mask)[1]
        finally:
            self._recompute = False

    def linearised(self, input_ids: Tensor, attention_mask: Tensor, state_mask: Tensor) -> Tensor:
        """Return the same features with a graph for many products with their Jacobian.

        Activations are kept even under gradient checkpointing: the graph is reused, so it must not
        be recomputed with other kernels.
        """
        with twice_differentiable(), linearised_activations(self._activations):
            return self.hidden_and_features(input_ids, attention_mask, state_mask)[1]

    @torch.no_grad()
    def jvp(
        self, v: Tensor, input_ids: Tensor, attention_mask: Tensor, state_mask: Tensor
    ) -> Tensor:
        """Return J v, J the Jacobian of the features, by forward-mode differentiation; no graph.

        Args:
            v: Direction in theta, (M,).
            input_ids: As for `hidden_and_features`, with the other two.
            attention_mask: (n, L).
            state_mask: (n, L).
        """
        with forward_ad.dual_level(), twice_differentiable(), self._moving_along(v):
            features = self.hidden_and_features(input_ids, attention_mask, state_mask)[1]
            tangent = forward_ad.unpack_dual(features).tangent
        return torch.zeros_like(features) if tangent is None else tangent

    @contextmanager
    def _moving_along(self, v: Tensor) -> Iterator[None]:
        """Give the parameters, inside a `dual_level`, the tangent v."""
        tangents = {
            id(p): part
            for p, part in zip(self.parameters.tensors, self.parameters.unflatten(v), strict=True)
        }
        owners = [
            (module, dict(module._parameters))
            for module in self.model.modules()
            if any(id(p) in tangents for p in module._parameters.values())
        ]
        try:
            for module, own in owners:
                for name, p in own.items():
                    if p is not None and id(p) in tangents:
                        del module._parameters[name]
                        setattr(module, name, forward_ad.make_dual(p.detach(), tangents[id(p)]))
            yield
        finally:
            for module, own in owners:
                for name in own.keys() - module._parameters.keys():
                    delattr(module, name)
                module._parameters.clear()
                module._parameters.update(own)

    def logprobs(self, features: Tensor) -> Tensor:
        """Return log pi(.|s) for features (n, D): (n, V), in at least float32.

        Temperature is applied here and nowhere else; `mdp` generates at the same one.
        """
        logits = features if self.head is None else self.head(features)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(dtype)
        return log_softmax(logits if self.temperature == 1.0 else logits / self.temperature)

    def head_jvp(self, tangent: Tensor) -> Tensor:
        """Map a tangent of the features (n, D) to one of the tempered logits, (n, V)."""
        change = tangent if self.head is None else linear(tangent, self.head.weight)
        return change / self.temperature

    def head_vjp(self, cotangent: Tensor) -> Tensor:
        """Map a cotangent of the tempered logits (n, V) to one of the features, (n, D)."""
        if self.head is not None:
            cotangent = cotangent.to(self.head.weight.dtype) @ self.head.weight
        return cotangent / self.temperature

    def chunks(self, count: int) -> Iterator[slice]:
        """Cut states into slices, one at least, whose [states, V] tensors are one chunk each."""
        size = max(CHUNK_STATES, CHUNK_ELEMENTS // self.vocabulary_size)
        return (slice(i, min(i + size, count)) for i in range(0, max(count, 1), size))

    @torch.no_grad()
    def cotangents(
        self, features: Tensor, slopes: Callable[[Tensor, slice], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Turn gradients by the logits into gradients by the features, chunk by chunk.

        Args:
            features: (S, D); its graph is not touched.
            slopes: Maps log-probabilities (n, V) and their slice of the states to the gradients of
                some scalars by the tempered logits of those states, (n, V) each.

        Returns:
            The gradient of each scalar by the features, (S, D) each.
        """
        parts = [
            [self.head_vjp(slope) for slope in slopes(self.logprobs(features[chunk]), chunk)]
            for chunk in self.chunks(len(features))
        ]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def save(self, folder: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json, loadable by peft alone."""
        name = str(self.model.active_adapter)
        self.model.save_pretrained(str(folder), selected_adapters=[name])
        if name != "default":  # peft makes a folder of that name
            for file in (folder / name).iterdir():
                file.replace(folder / file.name)
            (folder / name).rmdir()

    def load(self, tensors: dict[str, Tensor], *, where: str) -> None:
        """Set theta to a saved adapter; the reference does not change.

        Args:
            tensors: Content of adapter_model.safetensors.
            where: Path of the file, for the error.

        Raises:
            TrpoLMError: If these are not exactly this adapter's tensors.
        """
        name = str(self.model.active_adapter)
        try:
            if tensors.keys() != get_peft_model_state_dict(self.model, adapter_name=name).keys():
                raise KeyError("other tensors")
            set_peft_model_state_dict(self.model, tensors, adapter_name=name)
        except (KeyError, RuntimeError) as error:
            raise TrpoLMError("the saved adapter does not fit the model", where=where) from error

    def probe_inputs(self) -> dict[str, Tensor]:
        """Return a text of 8 tokens, (1, 8), as the keywords input_ids and attention_mask."""
        ids, mask, _ = self._probe_rows(PROBE)
        return {"input_ids": ids, "attention_mask": mask}

    def _checkpoint_layers(self) -> None:
        """Let layers recompute; transformers' own switch works in train mode only, with dropout."""
        layers = [m for m in self.base.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise TrpoLMError(
                f"{type(self.base).__name__} has no layers that can recompute their activations",
                where="gradient_checkpointing",
                hint="lower max_completion_length instead",
            )
        self.recomputes = True
        for layer in layers:
            layer.forward = self._recomputed(layer.forward)

    def _recomputed(self, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._recompute:
                return forward(*args, **kwargs)
            return recomputed(forward, *args, **kwargs)

        return run

    def _examine(self) -> None:
        """Find out what holds for the model and its adapter, and what works with them."""
        theta, probe, fresh = self.parameters, self._probe_rows(PROBE), not self.came_with_adapter
        stages = self._staged_rows()

        def features() -> Tensor:
            return self.features(*probe)

        def retained(v: Tensor) -> Tensor:
            u, vjp = pullback(theta, self.linearised(*probe))
            return torch.autograd.grad(vjp, u, grad_outputs=theta.unflatten(v))[0]

        def in_stages(shared: bool) -> Tensor:
            self.shares_prefixes = shared
            return self.features(*stages)

        kind = type(self.model.active_peft_config).__name__
        examine(gradient_exists, theta, features, kind)
        head = self.base.get_output_embeddings()
        fault = examine(head_is_linear, self.base, self._transformer, head)
        self.head = head if fault is None else None
        fault = examine(adapter_is_identity, theta, self.model, features, fresh=fresh)
        self._starts_as_base = fault is None
        fault = examine(stages_agree, self.base, lambda: in_stages(False), lambda: in_stages(True))
        self.shares_prefixes = fault is None
        products = {"retained": retained, "forward": lambda v: self.jvp(v, *probe)}
        known = {name: "the weights are quantised" for name in products if self.quantized}
        if self.sharded:
            known["retained"] = "the base is sharded: its weights are gone behind a pass"
        faults = {
            name: examine(product_is_right, theta, features, jvp, known.get(name), of=name)
            for name, jvp in products.items()
        }
        self.exact_products = [name for name, fault in faults.items() if fault is None]
        self.product_faults = {name: fault for name, fault in faults.items() if fault is not None}

    def _staged_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return three rows, two of them alike, that begin with the same tokens.

        The third is shorter: where it continues them, padding stands between its tokens.
        """
        ids = self.probe_inputs()["input_ids"].repeat(3, 1).cpu()
        ids[2, 5:] = ids[2, 3:6].flip(0)
        ids[2, 2:5], ids[2, :2] = ids[0, :3], 0
        mask = torch.ones_like(ids)
        mask[2, :2] = 0
        states = torch.zeros_like(ids, dtype=torch.bool)
        states[:, 5:-1] = True
        return ids, mask, states

    def _probe_rows(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return one row as inputs of a pass; the latter half of its positions are states."""
        ids = probe_ids(self.base, length)
        states = torch.arange(length, device=self.device)[None] >= length // 2
        return ids, torch.ones_like(ids), states

    def _costs(self) -> dict[str, Cost]:
        """Measure what a pass of each phase holds."""
        passes: dict[str, Callable[..., Any]] = {
            "plain": self.hidden_and_features, "linearised": self.linearised
        }  # fmt: skip
        if self.recomputes:
            passes["recomputed"] = self.features
        return measured_costs(
            {name: lambda n, run=run: run(*self._probe_rows(n)) for name, run in passes.items()},
            [held(p) for p in self.model.parameters()],
            longest=self.context_length,
            layers=getattr(self.base.config.get_text_config(), "num_hidden_layers", 1),
            cached=self._cache_bytes(),
        )

    @torch.no_grad()
    def _cache_bytes(self) -> float:
        """Return the bytes of a token's keys and values."""
        cache, ids = DynamicCache(), self.probe_inputs()["input_ids"]
        try:
            mask = torch.ones_like(ids)
            self._outputs(ids, mask, mask.bool(), cache)
            layers: Any = cache.layers
            held = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
        except Exception:  # a model without such a cache may raise anything
            held = 0
        config = self.base.config.get_text_config()
        return held / ids.numel() or 2 * config.hidden_size * config.num_hidden_layers * 4


def held(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, which may be divided among several."""
    return getattr(tensor, "to_local", lambda: tensor)()


def largest_gathered(model: torch.nn.Module) -> int:
    """Return the bytes that a pass gathers of divided layers: the largest, and one on its way."""
    divided = (
        sum(p.nbytes for p in m.parameters() if held(p) is not p)
        for m in model.modules()
        if isinstance(m, GradientCheckpointingLayer)
    )
    return 2 * max(divided, default=0)


def elementwise_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the activations of a model, whose slope can be computed once."""
    return [m for m in model.modules() if type(m) in ELEMENTWISE and not list(m.parameters())]


def cache_argument(transformer: torch.nn.Module) -> str:
    """Return the name under which a model takes a key-value cache; transformers renamed it."""
    names = signature(transformer.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def recomputed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a layer that recomputes its activations in the backward pass."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _enables_checkpointing(model: torch.nn.Module) -> bool:
    """Return whether gradient checkpointing is switched on in a model; raise if it is reentrant."""
    modules = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise TrpoLMError(
                "reentrant gradient checkpointing cannot be differentiated with autograd.grad",
                where="use_reentrant=True",
                hint="pass gradient_checkpointing=True to the trainer, or "
                "gradient_checkpointing_enable({'use_reentrant': False})",
            )
    return bool(modules)
