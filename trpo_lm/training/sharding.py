"""A frozen base divided among processes: each holds a part of every decoder layer.

A layer is gathered when a pass reaches it, and what belongs to others is dropped behind it (FSDP2,
`torch.distributed.fsdp.fully_shard`). Embeddings, output layer and adapters are whole on every
process. The base does not train: nothing but its weights is exchanged in a pass.

Processes that hold a base together walk through its layers together, so each of them makes as many
passes as the one with most: `Policy` asks `Shards.most` before a pass, and whoever has none left
makes an idle one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from typing import Any

from peft import PeftModel
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from trpo_lm.errors import TrpoLMError, first_line
from trpo_lm.lm.loading import is_quantized
from trpo_lm.lm.policy import Shards
from trpo_lm.training.ranks import Ranks


def on_node() -> int:
    """Return how many processes of a run are on this node, by the launcher's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def sharers(on_nodes: Iterable[int], count: int) -> int:
    """Return how many processes hold a base together: those of a node, or all if it has one.

    All of them too where nodes have unequal numbers of processes.

    Args:
        on_nodes: What `on_node` is for each process, as far as known.
        count: Processes of the run.
    """
    sizes = set(on_nodes)
    size = min(sizes)
    return count if len(sizes) > 1 or size == 1 or count % size else size


def shards_of(ranks: Ranks, timeout: float | None = None) -> Shards | None:
    """Return the processes that hold a base together: those of a node, or all if it has one.

    Links within a node are fast. Weights have a process group of their own, so that none of them
    is ever taken for a sum.

    Args:
        ranks: The processes of the run.
        timeout: Seconds after which one that waits for a layer gives up; None: torch's own.

    Returns:
        None if there is one process only.
    """
    if ranks.count == 1:
        return None
    size = sharers(ranks.gather([on_node()]), ranks.count)
    limit = None if timeout is None else timedelta(seconds=timeout)
    group: Any = distributed.new_subgroups(size, timeout=limit)[0]
    mesh = DeviceMesh.from_group(group, ranks.device.type)
    return Shards(partial(shard_layers, mesh=mesh), ranks.most)


def shard_layers(model: Any, mesh: DeviceMesh) -> None:
    """Keep of every decoder layer this process' part, on its device; freeze the base.

    Args:
        model: Causal LM, or a PeftModel, whose adapters stay whole.
        mesh: The processes among which it is divided, in one dimension.

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
    adapters = {p for p in model.parameters() if p.requires_grad} if base is not model else set()
    for p in set(base.parameters()) - adapters:
        p.requires_grad_(False)
    try:
        for layer in reversed(layers):  # a layer within another comes first
            # A layer without a sharded parent counts as a root, which would stay gathered.
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    except Exception as error:  # whatever a layer's parameters may lead to
        raise TrpoLMError(
            f"{type(layers[0]).__name__} cannot be divided: {first_line(error)}",
            where="shard_base", hint="leave it out",
        ) from error  # fmt: skip
    managed: Any = base
    managed._is_fsdp_managed_module = True  # generate() goes on until the last process is done
