"""Load models, adapters and tokenizers, never running code that comes with them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
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
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available
from transformers.utils import logging as transformers_logging

from trpo_lm.config import LORA, ModelSettings
from trpo_lm.errors import TrpoLMError, first_line
from trpo_lm.lm.examination import examine, weights_are_complete
from trpo_lm.seeds import global_seed

# How files are read: no code in them, and what they lack is reported.
REPORTED = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
# Under which names configs keep the longest sequence, and the tokens that attention sees, in some
# layers or all.
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len")
WINDOWS = (
    "sliding_window", "sliding_window_size", "window_size", "attention_window_size",
    "attention_chunk_size",
)  # fmt: skip
HALF = (torch.bfloat16, torch.float16)
_SAFE = {"trust_remote_code": False}  # False, unlike None, also never asks on the terminal


def load_model(
    name: str,
    settings: ModelSettings | None = None,
    *,
    device: torch.device | str | None = None,
    plain: bool = False,
    loaded: Callable[[PreTrainedModel], object] = lambda base: None,
) -> PreTrainedModel | PeftModel:
    """Load a causal LM by name or path; a folder with an adapter loads its base as well.

    Args:
        name: Hugging Face name or path.
        settings: Precision, quantisation and attention of the base; the defaults when None.
        device: Where the model will run: "auto" depends on it, and a quantised base is put there.
            The CPU when None.
        plain: Turn the base into float32 weights that have the values of the ones loaded.
        loaded: Called with the base as it is in memory before that.

    Raises:
        TrpoLMError: If it is not found, needs code of its own, has weights that are no safetensors
            or lacks some, or if the quantisation or the attention kernels are not installed.
    """
    settings = settings or ModelSettings()
    place = torch.device(device or "cpu")
    options: dict[str, Any] = {"dtype": load_dtype(settings.dtype, place)}
    options |= _quantisation(settings, options["dtype"], place)
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    adapter = None
    try:
        if (Path(name) / "adapter_config.json").is_file():
            adapter, source = name, PeftConfig.from_pretrained(name).base_model_name_or_path
            if not source:  # else a hub would be asked for a model called None
                raise TrpoLMError(
                    f"the adapter_config.json of {adapter!r} names no base", where="model",
                    hint=_rename_base(adapter),
                )  # fmt: skip
            name = source
        base = _base(name, options, plain, loaded)
    except TrpoLMError:
        raise
    except Exception as error:  # whatever transformers, safetensors or a kernel may raise
        raise _unloadable(name, settings, error, adapter) from error
    return base if adapter is None else _adapted(base, adapter)


def load_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a setting names; "auto" is bfloat16 on GPUs that have it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def require_no_loading(model: PreTrainedModel | PeftModel, settings: ModelSettings) -> None:
    """Raise if settings ask for something that only happens while a model is loaded.

    Raises:
        TrpoLMError: Names the settings that cannot apply to a model object.
    """
    asked = {
        "dtype": settings.dtype not in ("auto", dtype_name(model)),
        "attn_implementation": settings.attn_implementation
        not in (None, getattr(model.config, "_attn_implementation", None)),
        "load_in_4bit": settings.load_in_4bit,
        "load_in_8bit": settings.load_in_8bit,
    }
    if names := [name for name, differs in asked.items() if differs]:
        raise TrpoLMError(
            f"the model is an object, loaded already in {dtype_name(model)}: "
            f"{', '.join(names)} cannot apply to it",
            where=", ".join(names),
            hint="load the object that way, or pass its name instead",
        )


def dtype_name(model: torch.nn.Module) -> str:
    """Return the dtype of a model's floating-point weights: 'float32', 'bfloat16', ..."""
    return str(model.dtype).removeprefix("torch.")


def is_quantized(model: torch.nn.Module) -> bool:
    """Return whether weights of a model are quantised, by whatever library.

    transformers says so of models that it loaded; others (torchao, quanto) replace weights by
    tensors of another class, or of less than two bytes a number.
    """
    return bool(getattr(model, "is_quantized", False)) or any(
        type(p.data) is not torch.Tensor or not p.is_floating_point() or p.element_size() < 2
        for p in model.parameters()
    )


def _quantisation(
    settings: ModelSettings, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return the options of `from_pretrained` that quantise with bitsandbytes."""
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return {}
    if not is_bitsandbytes_available():
        raise TrpoLMError(
            "bitsandbytes is not installed, or too old",
            where="load_in_4bit" if settings.load_in_4bit else "load_in_8bit",
            hint="pip install 'trpo_lm[quantized]', from a clone pip install -e '.[quantized]'",
        )
    # It would warn at every product that the inputs of 8-bit layers are rounded to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _base(
    name: str,
    options: dict[str, Any],
    plain: bool,
    loaded: Callable[[PreTrainedModel], object],
) -> PreTrainedModel:
    """Load a causal LM whose files hold all its weights."""
    require_safetensors(name, "transformers.AutoModelForCausalLM")
    options = {**REPORTED, **options, **_SAFE}
    model, report = AutoModelForCausalLM.from_pretrained(name, **options)  # type: ignore[misc]
    examine(
        weights_are_complete, report, f"the files of model {name!r} lack", where="model",
        hint="name a complete causal LM, saved by save_pretrained of that class",
    )  # fmt: skip
    loaded(model)
    return _plain(model) if plain else model


def _plain(model: Any) -> PreTrainedModel:
    """Turn weights into float32 numbers, in layers of the classes that the model's files have."""
    paths = [p for p, m in model.named_modules() if getattr(m, "source_cls", None) is Conv1D]
    if is_quantized(model):
        model = model.dequantize()
    for path in paths:  # dequantised to Linear, whose weight is transposed
        linear = model.get_submodule(path)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight = torch.nn.Parameter(linear.weight.data.T.contiguous())
        layer.bias = linear.bias
        model.set_submodule(path, layer)
    return model.float()


def _adapted(base: PreTrainedModel, folder: str) -> PeftModel:
    """Put an adapter whose file holds all its weights on its base."""
    require_safetensors(folder, "peft.AutoPeftModelForCausalLM")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return PeftModel.from_pretrained(base, folder, is_trainable=True)
    except Exception as error:  # whatever peft or safetensors may raise
        raise TrpoLMError(
            f"adapter {folder!r} cannot be loaded: {first_line(error)}", where="model",
            hint="give a folder that PeftModel.save_pretrained wrote, with "
            "adapter_model.safetensors",
        ) from error  # fmt: skip


def require_safetensors(folder: str, loader: str) -> None:
    """Raise if a folder has weights, but none in the format that is safe to read.

    Args:
        folder: Of a model or an adapter; a hub id has none and passes.
        loader: Package and class that can convert the weights, for the error.

    Raises:
        TrpoLMError: With the command that converts them.
    """
    weights = sorted(Path(folder).glob("*.bin"))
    if weights and not any(Path(folder).glob("*.safetensors")):
        package, name = loader.split(".")
        raise TrpoLMError(
            f"{weights[0]} can run code when it is read, and there are no safetensors beside it",
            where="model",
            hint=f'convert it, if you trust it: python -c "from {package} import {name} as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\"",
        )


def _unloadable(
    name: str, settings: ModelSettings, error: Exception, adapter: str | None
) -> TrpoLMError:
    """Return the error for a model, or for the base of an adapter, that cannot be loaded."""
    text = first_line(error)
    kernels = settings.attn_implementation
    if kernels is not None and ("attn" in text or "attention" in text.lower()):
        return TrpoLMError(
            f"the attention kernels {kernels!r} cannot be used with model {name!r}: {text}",
            where="attn_implementation",
            hint="install them, or choose 'sdpa' or 'eager'; without a choice the model's default "
            "is used",
        )
    offline = os.environ.get("HF_HUB_OFFLINE") == "1" and not os.path.isdir(name)
    reason = " not found locally and HF_HUB_OFFLINE=1" if offline else " cannot be loaded"
    if adapter is not None:
        return TrpoLMError(
            f"the base {name!r} of adapter {adapter!r}{reason}: {text}", where="model",
            hint=_rename_base(adapter),
        )  # fmt: skip
    return TrpoLMError(
        f"model {name!r}{reason}: {text}",
        where="model",
        hint="give a folder that holds config.json and model.safetensors, or a hub id",
    )


def _rename_base(adapter: str) -> str:
    """Return how to say where the base of an adapter is."""
    file = Path(adapter, "adapter_config.json")
    return f"set base_model_name_or_path in {file} to where the base is"


def as_tokenizer(given: Any) -> Any:
    """Return the tokenizer that is meant: one as it is, that of a processor, or by name or path.

    Raises:
        TrpoLMError: If there is none.
    """
    if isinstance(given, str | os.PathLike):
        return load_tokenizer(os.fspath(given))
    tokenizer = getattr(given, "tokenizer", given)
    if not (
        callable(tokenizer) and hasattr(tokenizer, "decode") and hasattr(tokenizer, "pad_token_id")
    ):
        raise TrpoLMError(
            f"{type(given).__name__} is no tokenizer, and has none", where="processing_class",
            hint="pass a tokenizer of transformers, a processor with one, or the name or path of "
            "either; a tokenizers.Tokenizer becomes one by PreTrainedTokenizerFast(tokenizer_object"
            "=..., eos_token=...)",
        )  # fmt: skip
    return tokenizer


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model by name or path.

    Raises:
        TrpoLMError: If it has none, or needs code of its own.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **_SAFE)
    except Exception as error:
        raise TrpoLMError(
            f"no tokenizer for {name!r}: {first_line(error)}", where="processing_class",
            hint="pass processing_class=AutoTokenizer.from_pretrained(...)",
        ) from error  # fmt: skip


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
            hint="load it on one device; --load_in_4bit takes an eighth of float32's memory, and "
            "adapters on it train as usual",
        )


def context_length(config: Any) -> int | None:
    """Return the longest sequence a model of this config can read; None if it sets no limit."""
    limits = [getattr(config, name, None) for name in CONTEXTS]
    return min((n for n in limits if isinstance(n, int) and n > 0), default=None)  # some say -1


def attention_window(config: Any) -> int | None:
    """Return how many tokens back the shortest-sighted layer sees; None if all see everything."""
    sizes = [getattr(config, name, None) for name in WINDOWS]
    return min((n for n in sizes if isinstance(n, int) and n > 0), default=None)


def default_lora(settings: ModelSettings | None = None) -> LoraConfig:
    """Return the LoRA of the settings, or of their defaults; no dropout."""
    settings = settings or ModelSettings()
    names = [name.strip() for name in settings.lora_target_modules.split(",")]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        target_modules="all-linear" if names == ["all-linear"] else names,
    )


def with_adapter(
    model: PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    settings: ModelSettings | None = None,
    *,
    seed: int,
) -> PeftModel:
    """Freeze a model and add an adapter, or make that of a PeftModel trainable, all of it.

    Args:
        model: Causal LM.
        peft_config: Adapter to add; `default_lora(settings)` when None. None for a PeftModel.
        settings: Rank, scale and layers of that LoRA; left at their defaults where the adapter is
            another one.
        seed: The adapter's initial values derive from it.

    Raises:
        TrpoLMError: If the adapter does not fit, or the model already has one.
    """
    settings = settings or ModelSettings()
    changed = [name for name in LORA if getattr(settings, name) != getattr(ModelSettings(), name)]
    if changed and (peft_config is not None or isinstance(model, PeftModel)):
        raise TrpoLMError(
            f"{', '.join(changed)} cannot apply: "
            + ("peft_config says" if peft_config is not None else "the model came with")
            + " which adapter is trained",
            where=", ".join(changed),
            hint="leave it at its default",
        )
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise TrpoLMError(
                "the model already has an adapter", where="peft_config",
                hint="pass peft_config=None to train the adapter that came with the model",
            )  # fmt: skip
        if len(model.active_adapters) != 1:
            raise TrpoLMError(
                f"{len(model.active_adapters)} adapters are active: "
                f"{', '.join(model.active_adapters)}; one is trained, on a base without others",
                where="model",
                hint="activate one with model.set_adapter(name); merge what belongs to the base "
                "first: PeftModel.from_pretrained(base, folder).merge_and_unload(), then save it",
            )
        saved = get_peft_model_state_dict(model, adapter_name=str(model.active_adapter))
        held = {tensor.data_ptr() for tensor in saved.values()}
        for p in model.parameters():
            if p.data_ptr() in held:
                p.requires_grad_(True)
        return model
    for p in model.parameters():
        p.requires_grad_(False)
    device, targets = next(model.parameters()).device, linear_module_names(model)
    try:
        with global_seed(seed, "adapter", device=device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            return get_peft_model(model, peft_config or default_lora(settings))  # type: ignore
    except Exception as error:  # each kind of adapter has its own for what it does not support
        raise TrpoLMError(
            f"the adapter does not fit the model: {first_line(error)}",
            where="peft_config" if peft_config is not None else "lora_target_modules",
            hint="give a PeftConfig, as LoraConfig; its target_modules can be 'all-linear' or, "
            f"where the model does not take that, some of {targets}",
        ) from error


def trainable_tensors(model: PeftModel) -> list[torch.nn.Parameter]:
    """Return the trainable parameters of a model; those in half precision become float32.

    Raises:
        TrpoLMError: If there are none, or some are not the adapter's own and in half precision:
            peft casts the inputs of adapters, not those of whole layers.
    """
    own = str(getattr(model.base_model, "prefix", "lora_"))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    half = [name for name, p in named if own not in name and p.dtype in HALF]
    if half:
        raise TrpoLMError(
            f"{', '.join(half[:3])} would be trained in half precision",
            where="peft_config",
            hint="load the base with dtype 'float32', or leave out modules_to_save and bias",
        )
    trainable = [p for _, p in named]
    if not trainable:
        raise TrpoLMError(
            "the adapter has no trainable parameters",
            hint=f"target {linear_module_names(model.get_base_model())}",
        )
    for p in trainable:
        if p.dtype in HALF:
            p.data = p.data.float()
    return trainable


def linear_module_names(model: torch.nn.Module) -> list[str]:
    """Return the names of modules that an adapter can target (Linear, and GPT-2's Conv1D)."""
    kinds = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
    paths = (path for path, m in model.named_modules() if type(m).__name__ in kinds)
    return sorted({path.split(".")[-1] for path in paths})
