"""The policy pi_theta: a causal LM whose LoRA parameters are theta, and its reference.

    pi_theta(a|s) = softmax(head(h_theta(s)) / temperature)

The *features* h_theta(s) are the last hidden states at the states of a batch, (S, D); the *head* is
the frozen output layer. Old, reference and new distributions are kept as features and pushed
through the head chunk by chunk, so that a [tokens, V] tensor never exists beyond one chunk. Where
the head is not a frozen linear layer (soft-capped logits, LoRA on lm_head; found out on a probe at
start-up) the features are the model's own logits and the head is the identity.

The reference is theta_ref: the parameters before training, swapped in. For a fresh LoRA that is the
model with adapters off (B = 0); an adapter that came with the model stays in the reference.

Dropout is off in every pass: the model is in eval mode from construction on.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.modeling_layers import GradientCheckpointingLayer

from trpo_lm.core.divergences import log_softmax
from trpo_lm.core.fisher import constant_slopes, lacks_second_derivative, twice_differentiable
from trpo_lm.core.parameters import ParameterVector
from trpo_lm.errors import RunFault, TrpoLMError
from trpo_lm.seeds import global_seed

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 1 << 19  # numbers in one [tokens, V] chunk: 2 MB in float32, near the cache
CHUNK_STATES = 64  # at least: the output layer's weights are read once a chunk
ELEMENTWISE = {found[0] if isinstance(found, tuple) else found for found in ACT2CLS.values()}


def default_lora() -> LoraConfig:
    """Return LoRA of rank 8 on every linear layer but the output layer; no dropout."""
    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")


class Policy:
    """A causal LM with trainable adapters, seen as a distribution over next tokens.

    Args:
        model: Hugging Face name or path, a causal LM, or a PeftModel (its adapter is trained on,
            and a frozen copy of it is the reference).
        peft_config: Adapter to add; `default_lora()` when None.
        temperature: Divides logits wherever the policy is evaluated or sampled, > 0.
        bf16: Load the frozen base in bfloat16; adapters stay in float32.
        gradient_checkpointing: Recompute activations in backward passes (non-reentrant).
        seed: The adapters' initial values derive from it.
        device: Where to put the model; where it is when None.

    Raises:
        TrpoLMError: If the model cannot be loaded or has no trainable parameters.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        peft_config: PeftConfig | None = None,
        *,
        temperature: float = 1.0,
        bf16: bool = False,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        self.name = model if isinstance(model, str) else model.config.name_or_path or "model"
        loaded = load_model(model, bf16=bf16) if isinstance(model, str) else model
        refuse_parts(loaded)
        if device is not None:
            loaded = loaded.to(device)  # type: ignore[arg-type]
        self.came_with_adapter = isinstance(loaded, PeftModel)
        self.model = self._with_adapter(loaded, peft_config, seed)
        self.base: Any = self.model.get_base_model()
        self.temperature = temperature
        self._refuse_reentrant_checkpointing()
        self._recompute = False  # layers recompute their activations in the backward pass
        asked = any(getattr(m, "gradient_checkpointing", False) for m in self.base.modules())
        if gradient_checkpointing or asked:
            self._checkpoint_layers()
        self.model.eval()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not trainable:
            raise TrpoLMError(
                "the adapter has no trainable parameters",
                hint=f"target {linear_module_names(self.base)}",
            )
        for p in trainable:
            if p.dtype in (torch.bfloat16, torch.float16):
                p.data = p.data.float()
        self.parameters = ParameterVector(trainable)
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
        """Longest sequence the model can read, None where its config names none."""
        config = self.base.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Be the reference inside the block: theta_ref in, and theta back after it, bit for bit."""
        theta = self.parameters.snapshot()
        self.parameters.restore(self._reference)
        try:
            yield
        finally:
            self.parameters.restore(theta)

    def hidden_and_features(
        self, input_ids: Tensor, attention_mask: Tensor, state_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the model and keep what the states of a batch need.

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

        Activations are kept even under gradient checkpointing: the graph is gone through many
        times, and its attention kernels must not be chosen anew.
        """
        with twice_differentiable(), constant_slopes(self._activations):
            return self.hidden_and_features(input_ids, attention_mask, state_mask)[1]

    def graph_bytes(self, input_ids: Tensor, attention_mask: Tensor, state_mask: Tensor) -> int:
        """Return the memory that the graph of `features` holds, weights not counted."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.enable_grad(), hooks:
            _ = self.features(input_ids, attention_mask, state_mask)
        return sum(held.values())

    def logprobs(self, features: Tensor) -> Tensor:
        """Return log pi(.|s) for features (n, D): (n, V) in float32. The one place temperature is.

        A generator's own temperature must equal it (mdp.py sets it).
        """
        logits = features if self.head is None else self.head(features)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(dtype)
        return log_softmax(logits if self.temperature == 1.0 else logits / self.temperature)

    def push(self, cotangent: Tensor) -> Tensor:
        """Map a change of features (n, D) to the change of tempered logits, (n, V)."""
        moved = cotangent if self.head is None else linear(cotangent, self.head.weight)
        return moved / self.temperature

    def pull(self, cotangent: Tensor) -> Tensor:
        """Map a cotangent of tempered logits (n, V) to one of features, (n, D)."""
        pulled = (
            cotangent
            if self.head is None
            else cotangent.to(self.head.weight.dtype) @ (self.head.weight)
        )
        return pulled / self.temperature

    def chunks(self, count: int) -> Iterator[slice]:
        """Cut `count` states into slices whose [states, V] tensors are one chunk each."""
        size = max(CHUNK_STATES, CHUNK_ELEMENTS // self.vocabulary_size)
        return (slice(i, min(i + size, count)) for i in range(0, count, size))

    @torch.no_grad()
    def cotangents(
        self, features: Tensor, slopes: Callable[[Tensor, slice], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Pull gradients by the logits back to the features, one chunk of the head at a time.

        Args:
            features: (S, D); its graph is not touched.
            slopes: Maps log-probabilities (n, V) and the slice of states they belong to, to the
                gradients of some scalars by the tempered logits of those states, (n, V) each.

        Returns:
            The gradient of each scalar by the features, (S, D) each.
        """
        parts = [
            [self.pull(slope) for slope in slopes(self.logprobs(features[where]), where)]
            for where in self.chunks(len(features))
        ]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def save(self, folder: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json, loadable by peft alone."""
        self.model.save_pretrained(str(folder), safe_serialization=True)

    def load(self, tensors: dict[str, Tensor], *, where: str) -> None:
        """Take over what `save` wrote; the reference stays what it is.

        Args:
            tensors: Content of adapter_model.safetensors.
            where: Its place, for the error.

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

    def _with_adapter(
        self, model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, seed: int
    ) -> PeftModel:
        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise TrpoLMError(
                    "the model already has an adapter", where="peft_config",
                    hint="pass peft_config=None to train the adapter that came with the model",
                )  # fmt: skip
            for name, p in model.named_parameters():
                if "lora_" in name and f".{model.active_adapter}." in name:
                    p.requires_grad_(True)
            return model
        for p in model.parameters():
            p.requires_grad_(False)
        try:
            with (
                global_seed(seed, "adapter", device=next(model.parameters()).device),
                warnings.catch_warnings(),
            ):
                warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
                return get_peft_model(model, peft_config or default_lora())  # type: ignore
        except ValueError as error:
            names = linear_module_names(model)
            raise TrpoLMError(
                f"the adapter does not fit the model: {str(error).splitlines()[0]}",
                where="peft_config",
                hint=f"target_modules can be 'all-linear' or any of {names}",
            ) from error

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

    def _refuse_reentrant_checkpointing(self) -> None:
        for module in self.base.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            keywords = getattr(function, "keywords", {})
            if getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"):
                raise TrpoLMError(
                    "reentrant gradient checkpointing cannot be differentiated with autograd.grad",
                    where="use_reentrant=True",
                    hint="pass gradient_checkpointing=True to the trainer, or "
                    "gradient_checkpointing_enable({'use_reentrant': False})",
                )

    def _second_derivative_missing(self) -> str | None:
        """Find out on a probe why there is no second derivative; None where there is one."""
        ids = torch.arange(8, device=self.device)[None] % self.vocabulary_size
        probe = (ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
        reason = lacks_second_derivative(lambda: self.linearised(*probe), self.parameters)
        if reason is not None:
            logger.warning("Fisher products will be finite differences: %s", reason)
        return reason

    @torch.no_grad()
    def _linear_head(self) -> torch.nn.Linear | None:
        """Return the output layer if logits == head(hidden) on a probe and it is frozen."""
        head = self.base.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head.weight.requires_grad:
            return None
        ids = torch.arange(8, device=self.device)[None] % self.vocabulary_size
        probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        hidden = self._transformer(**probe).last_hidden_state
        own, pushed = self.base(**probe).logits.float(), head(hidden).float()
        if not torch.isfinite(own).all():
            raise RunFault(
                "non-finite logits at layer output", where=f"model {self.name}",
                hint="a weight of the model is nan or infinite, or its dtype overflows",
            )  # fmt: skip
        return head if torch.allclose(own, pushed, rtol=1e-5, atol=1e-5) else None


def refuse_parts(model: torch.nn.Module) -> None:
    """Raise if a model does not lie whole on one device.

    Raises:
        TrpoLMError: If weights are offloaded (then they are on "meta") or spread over devices:
            adapters are one vector, on one device, and offloaded layers have none to add to.
    """
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise TrpoLMError(
            f"the model's weights lie on {', '.join(sorted(devices))}",
            where="device_map",
            hint="load it whole onto one device; weights of 8 bits (torchao, quanto) take a "
            "quarter of float32's memory, and their adapters train as usual",
        )


def load_model(name: str, *, bf16: bool = False) -> PreTrainedModel | PeftModel:
    """Load a causal LM by name or path; a folder with an adapter loads its base as well.

    Raises:
        TrpoLMError: If it is not found, or needs code of its own.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    safe = {"trust_remote_code": False}  # and never ask on the terminal
    try:
        if (Path(name) / "adapter_config.json").is_file():
            base = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **safe)
            return PeftModel.from_pretrained(model, name, is_trainable=True)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **safe)
    except (OSError, ValueError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        reason = " not found locally and HF_HUB_OFFLINE=1" if offline else " cannot be loaded"
        raise TrpoLMError(
            f"model {name!r}{reason}: {str(error).splitlines()[0]}",
            where="model",
            hint="give a folder that holds config.json and model.safetensors, or a hub id",
        ) from error


def linear_module_names(model: torch.nn.Module) -> list[str]:
    """Name the kinds of module that an adapter can target (Linear, and GPT-2's Conv1D)."""
    kinds = ("Linear", "Conv1D")
    found = (name for name, m in model.named_modules() if type(m).__name__ in kinds)
    return sorted({name.split(".")[-1] for name in found})
