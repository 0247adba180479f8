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

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.modeling_layers import GradientCheckpointingLayer

from trpo_lm.config import ModelSettings
from trpo_lm.core.divergences import log_softmax
from trpo_lm.core.fisher import (
    lacks_second_derivative,
    linearised_activations,
    twice_differentiable,
)
from trpo_lm.core.parameters import ParameterVector
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.lm.loading import (
    is_quantized,
    load_model,
    require_no_loading,
    require_single_device,
    trainable_tensors,
    with_adapter,
)

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 1 << 19  # numbers in one [tokens, V] chunk: 2 MB in float32, near the cache
CHUNK_STATES = 64  # at least: the output layer's weights are read once a chunk
ELEMENTWISE = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}


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

    Attributes:
        model: The PeftModel; `base` is the causal LM inside it.
        quantized: Whether weights of the base are quantised, by whatever library.
        parameters: theta, M numbers.
        head: The frozen output layer; None where the features are logits.
        lacks_second_derivative: Why `linearised` cannot be differentiated twice; None if it can.

    Raises:
        TrpoLMError: If the model cannot be loaded, is split across devices, has no trainable
            parameters, or is an object that the settings cannot apply to.
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
    ):
        self.name = model if isinstance(model, str) else model.config.name_or_path or "model"
        settings = settings or ModelSettings()
        if isinstance(model, str):
            model = load_model(model, settings, device=device)
        else:
            require_no_loading(model, settings)
        require_single_device(model)
        if device is not None:
            model = model.to(device)  # type: ignore[arg-type]
        self.came_with_adapter = isinstance(model, PeftModel)
        self.quantized = is_quantized(model)
        self.model = with_adapter(model, peft_config, settings, seed=seed)
        self.base: Any = self.model.get_base_model()
        self.temperature = temperature
        self._recompute = False  # layers recompute their activations in the backward pass
        if _enables_checkpointing(self.base) or gradient_checkpointing:
            self._checkpoint_layers()
        self.model.eval()
        self.parameters = ParameterVector(trainable_tensors(self.model))
        self._reference = self.parameters.snapshot()
        self._transformer = self.base.base_model
        self.head = self._linear_head()
        self._activations = [
            m for m in self.base.modules() if type(m) in ELEMENTWISE and not list(m.parameters())
        ]
        self.lacks_second_derivative = self._second_derivative_missing()

    @property
    def device(self) -> torch.device:
        """Device of the trainable parameters."""
        return self.parameters.tensors[0].device

    @property
    def vocabulary_size(self) -> int:
        """V, the number of actions."""
        return self.base.config.get_text_config().vocab_size

    @property
    def context_length(self) -> int | None:
        """Longest sequence the model can read; None if its config sets no limit."""
        config = self.base.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Temporarily swap in the reference parameters; theta is restored bit for bit."""
        theta = self.parameters.snapshot()
        self.parameters.restore(self._reference)
        try:
            yield
        finally:
            self.parameters.restore(theta)

    def hidden_and_features(
        self, input_ids: Tensor, attention_mask: Tensor, state_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the model and keep its outputs at the states of a batch.

        Args:
            input_ids: Prompts (left-padded) and completions (right-padded), (n, L).
            attention_mask: 1 at real tokens, (n, L).
            state_mask: True where the model's output is the distribution of an action, (n, L).

        Returns:
            Last hidden states (S, D), detached, and features, (S, D) or (S, V) where the head is
            the identity; both row by row.
        """
        attention_mask = attention_mask.to(self.device)
        state_mask = state_mask.to(self.device)
        inputs = {
            "input_ids": input_ids.to(self.device),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
            "use_cache": False,
        }
        if self.head is not None:
            features = self._transformer(**inputs).last_hidden_state[state_mask]
            return features.detach(), features
        output = self.base(**inputs, output_hidden_states=True)
        return output.hidden_states[-1][state_mask].detach(), output.logits[state_mask]

    def features(self, input_ids: Tensor, attention_mask: Tensor, state_mask: Tensor) -> Tensor:
        """Return the features of `hidden_and_features`, with a graph to theta."""
        self._recompute = torch.is_grad_enabled()
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

    def graph_bytes(self, input_ids: Tensor, attention_mask: Tensor, state_mask: Tensor) -> int:
        """Return the bytes of memory that the graph of `features` holds, weights not counted."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.enable_grad(), hooks:
            _ = self.features(input_ids, attention_mask, state_mask)
        return sum(storages.values())

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
        """Cut `count` states into slices whose [states, V] tensors are one chunk each."""
        size = max(CHUNK_STATES, CHUNK_ELEMENTS // self.vocabulary_size)
        return (slice(i, min(i + size, count)) for i in range(0, count, size))

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
        self.model.save_pretrained(str(folder), safe_serialization=True)

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
        ids = torch.arange(8, device=self.device)[None] % self.vocabulary_size
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _checkpoint_layers(self) -> None:
        """Let layers recompute; transformers' own switch works in train mode only, with dropout."""
        layers = [m for m in self.base.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise TrpoLMError(
                f"{type(self.base).__name__} has no layers that can recompute their activations",
                where="gradient_checkpointing",
                hint="lower micro_batch_size instead",
            )
        for layer in layers:
            layer.forward = self._recomputed(layer.forward)

    def _recomputed(self, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._recompute:
                return forward(*args, **kwargs)
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

        return run

    def _second_derivative_missing(self) -> str | None:
        """Return why there is no second derivative, tested on a probe; None where there is one.

        Kernels for quantised weights are not probed: bitsandbytes' second derivative is wrong
        without saying so.
        """
        if self.quantized:
            reason = "the weights are quantised"
        else:
            probe = self.probe_inputs()
            probe["state_mask"] = probe["attention_mask"].bool()
            reason = lacks_second_derivative(lambda: self.linearised(**probe), self.parameters)
        if reason is not None:
            logger.warning("Fisher products fall back to finite differences: %s", reason)
        return reason

    @torch.no_grad()
    def _linear_head(self) -> torch.nn.Linear | None:
        """Return the output layer if logits == head(hidden) on a probe and it is frozen."""
        head = self.base.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head.weight.requires_grad:
            return None
        probe = {**self.probe_inputs(), "use_cache": False}
        hidden = self._transformer(**probe).last_hidden_state
        logits, by_head = self.base(**probe).logits.float(), head(hidden).float()
        if not torch.isfinite(logits).all():
            raise RunFault(
                "non-finite logits at layer output", where=f"model {self.name}",
                hint="a weight of the model is nan or infinite, or its dtype overflows",
            )  # fmt: skip
        return head if torch.allclose(logits, by_head, rtol=1e-5, atol=1e-5) else None


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
