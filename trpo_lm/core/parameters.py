"""The trainable parameters as one vector theta of M numbers, and exact snapshots of them.

A step is  theta = theta_old + scale * x;  after a rejected step the very bits of theta_old are
restored (a - b + b need not be a).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over ranks


class ParameterVector:
    """Trainable tensors in a fixed order; M is their total size.

    Args:
        parameters: Leaf tensors that require gradients, of one dtype and device.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self.tensors: list[Tensor] = list(parameters)
        self.size = sum(p.numel() for p in self.tensors)

    def __len__(self) -> int:
        return self.size

    def zeros(self) -> Tensor:
        """Return a zero for each parameter, (M,)."""
        return self.flatten([None] * len(self.tensors))

    def vector(self) -> Tensor:
        """Return a copy of theta, (M,), detached."""
        return self.flatten(self.tensors).detach()

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Concatenate one tensor per parameter into (M,); None (no gradient) counts as zero."""
        return torch.cat(
            [
                torch.zeros_like(p).reshape(-1) if t is None else t.reshape(-1)
                for p, t in zip(self.tensors, tensors, strict=True)
            ]
        )

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Split (M,) into views shaped like the parameters."""
        parts = vector.split([p.numel() for p in self.tensors])
        return [part.view_as(p) for part, p in zip(parts, self.tensors, strict=True)]

    def gradient(self, output: Tensor, *, cotangent: Tensor | None = None, retain: bool = False):
        """Return d(output . cotangent)/d theta as (M,); no `.grad` is touched."""
        grads = torch.autograd.grad(
            output, self.tensors, grad_outputs=cotangent, retain_graph=retain, allow_unused=True
        )
        return self.flatten(grads)

    def snapshot(self) -> list[Tensor]:
        """Copy the parameters."""
        return [p.detach().clone() for p in self.tensors]

    @torch.no_grad()
    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Restore a snapshot bit for bit."""
        for p, saved in zip(self.tensors, snapshot, strict=True):
            p.copy_(saved)

    @torch.no_grad()
    def assign(self, snapshot: Sequence[Tensor], step: Tensor, scale: float = 1.0) -> None:
        """Set theta = snapshot + scale * step, with `step` (M,)."""
        for p, saved, part in zip(self.tensors, snapshot, self.unflatten(step), strict=True):
            p.copy_(saved + scale * part)

    def checksum(self) -> str:
        """Return 16 hex digits that change with any bit of any parameter."""
        digest = hashlib.sha256()
        for p in self.tensors:
            digest.update(p.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]
