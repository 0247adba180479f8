"""Load models, adapters and tokenizers, never running code that comes with them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from trpo_lm.errors import TrpoLMError
from trpo_lm.seeds import global_seed

_SAFE = {"trust_remote_code": False}  # False, unlike None, also never asks on the terminal


def load_model(name: str, *, bf16: bool = False) -> PreTrainedModel | PeftModel:
    """Load a causal LM by name or path; a folder with an adapter loads its base as well.

    Raises:
        TrpoLMError: If it is not found, or needs code of its own.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        if (Path(name) / "adapter_config.json").is_file():
            base = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **_SAFE)
            return PeftModel.from_pretrained(model, name, is_trainable=True)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **_SAFE)
    except Exception as error:  # whatever a malformed file does to the libraries
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" and not os.path.isdir(name)
        reason = " not found locally and HF_HUB_OFFLINE=1" if offline else " cannot be loaded"
        raise TrpoLMError(
            f"model {name!r}{reason}: {_first_line(error)}",
            where="model",
            hint="give a folder that holds config.json and model.safetensors, or a hub id",
        ) from error


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model by name or path.

    Raises:
        TrpoLMError: If it has none, or needs code of its own.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **_SAFE)
    except Exception as error:
        raise TrpoLMError(
            f"no tokenizer for {name!r}: {_first_line(error)}", where="processing_class",
            hint="pass processing_class=AutoTokenizer.from_pretrained(...)",
        ) from error  # fmt: skip


def _first_line(error: Exception) -> str:
    """Return the first line of a message, or the error's type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' progress bars off the screen inside the block."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def require_single_device(model: torch.nn.Module) -> None:
    """Raise if a model is split across devices or offloaded.

    Raises:
        TrpoLMError: The adapters are one vector, on one device, and cannot be added to offloaded
            layers (whose weights are on "meta").
    """
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise TrpoLMError(
            f"the model's weights are on {', '.join(sorted(devices))}",
            where="device_map",
            hint="load it on one device; 8-bit weights (torchao, quanto) take a quarter of "
            "float32's memory, and adapters on them train as usual",
        )


def default_lora() -> LoraConfig:
    """Return LoRA of rank 8 on every linear layer but the output layer; no dropout."""
    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")


def with_adapter(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, *, seed: int
) -> PeftModel:
    """Freeze a model and add an adapter, or make the LoRA of a PeftModel trainable.

    Args:
        model: Causal LM.
        peft_config: Adapter to add; `default_lora()` when None. None for a PeftModel.
        seed: The adapter's initial values derive from it.

    Raises:
        TrpoLMError: If the adapter does not fit, or the model already has one.
    """
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
    device = next(model.parameters()).device
    try:
        with global_seed(seed, "adapter", device=device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            return get_peft_model(model, peft_config or default_lora())  # type: ignore
    except ValueError as error:
        raise TrpoLMError(
            f"the adapter does not fit the model: {str(error).splitlines()[0]}",
            where="peft_config",
            hint=f"target_modules can be 'all-linear' or any of {linear_module_names(model)}",
        ) from error


def trainable_tensors(model: PeftModel) -> list[torch.nn.Parameter]:
    """Return the trainable parameters of a model; those in half precision become float32.

    Raises:
        TrpoLMError: If there are none.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise TrpoLMError(
            "the adapter has no trainable parameters",
            hint=f"target {linear_module_names(model.get_base_model())}",
        )
    for p in trainable:
        if p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()
    return trainable


def linear_module_names(model: torch.nn.Module) -> list[str]:
    """Return the names of modules that an adapter can target (Linear, and GPT-2's Conv1D)."""
    kinds = ("Linear", "Conv1D")
    paths = (path for path, m in model.named_modules() if type(m).__name__ in kinds)
    return sorted({path.split(".")[-1] for path in paths})
