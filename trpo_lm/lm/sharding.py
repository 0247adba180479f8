"""A frozen base shared out over processes: each holds a part of every decoder layer.

A layer is gathered when a pass reaches it, and its parts of other processes are dropped behind it
(FSDP2, `torch.distributed.fsdp.fully_shard`). Embeddings, output layer and adapters are whole on
every process. The base does not train: nothing but its weights is exchanged in a pass.

Processes that hold a base together walk through its layers together, so that each of them makes as
many passes as the one with most: `Shards.most` is asked before every pass, and whoever has none
left makes an idle one, of one token and no state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from trpo_lm.errors import TrpoLMError, first_line
from trpo_lm.lm.loading import is_quantized


@dataclass(frozen=True)
class Shards:
    """The processes that hold a base together.

    Attributes:
        mesh: Those among which one copy of it is divided, in one dimension.
        most: Returns the largest of the numbers that the processes of the run pass, on all of them.
    """

    mesh: DeviceMesh
    most: Callable[[int], int]


def shard_layers(model: Any, shards: Shards) -> None:
    """Keep of every decoder layer this process' part, on the device of the mesh; freeze the base.

    Args:
        model: Causal LM, or a PeftModel, whose adapters stay whole.
        shards: The processes.

    Raises:
        TrpoLMError: If the weights are quantised, or there are no layers that can be divided.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if is_quantized(model):
        raise TrpoLMError(
            "quantised weights cannot be divided", where="shard_base",
            hint="load the base in bfloat16, or leave out shard_base: in 4 bits the whole base "
            "takes an eighth of float32's memory",
        )  # fmt: skip
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise TrpoLMError(
            f"{type(base).__name__} has no decoder layers that transformers marks as such",
            where="shard_base",
            hint="leave it out, and load the base with dtype bfloat16 or load_in_4bit",
        )
    whole = {p for p in model.parameters() if p.requires_grad} if base is not model else set()
    for p in set(base.parameters()) - whole:
        p.requires_grad_(False)
    try:
        for layer in reversed(layers):  # a layer within another comes first
            # A layer without a sharded parent counts as a root, and would stay gathered.
            fully_shard(layer, mesh=shards.mesh, reshard_after_forward=True, ignored_params=whole)
    except Exception as error:  # whatever a layer's parameters may lead to
        raise TrpoLMError(
            f"{type(layers[0]).__name__} cannot be divided: {first_line(error)}",
            where="shard_base", hint="leave it out",
        ) from error  # fmt: skip
    base._is_fsdp_managed_module = True  # so generate() goes on until the last process is done


def held(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def largest_layer(model: torch.nn.Module) -> int:
    """Return the bytes of the largest layer that is divided, when it is gathered; 0 for none."""
    layers = (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    return max(
        (sum(p.nbytes for p in m.parameters() if isinstance(p, DTensor)) for m in layers), default=0
    )
