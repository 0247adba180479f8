"""Products with the Fisher matrix, which is never formed.

    F = Hessian of D(theta) at theta_old = E[ J^T (diag p - p p^T) J ],   J = d logits / d theta

One product costs about one forward+backward of the same tokens, in three steps:

    v -> J v          a vector-Jacobian product is linear in its cotangent u; differentiating the
                      retained graph of J^T u by u, along v, gives J v ("double vjp")
    z -> (diag p - p p^T) z      in closed form, chunk by chunk through the output layer
    c -> J^T c        one more vector-Jacobian product

The graph is built once an update, on a subset of whole completions, with the mathematical attention
kernel: the fused kernels have no second derivative.

Source: the Gauss-Newton form of the Fisher, Martens (2020), arXiv:1412.1193, section 9.2; the
double-vjp trick is due to J. Townsend (2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trpo_lm.parameters import ParameterVector

Curvature = Callable[[Tensor], Tensor]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Use attention kernels that have a second derivative inside the block."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def softmax_curvature(logprobs: Tensor) -> Curvature:
    """Return z -> (diag p - p p^T) z for log-probabilities (n, V): the Fisher of the logits."""
    p = logprobs.exp()

    def product(z: Tensor) -> Tensor:
        z = z.to(p.dtype)
        return p * (z - torch.linalg.vecdot(p, z)[..., None])

    return product


class FisherOperator:
    """v -> F v for outputs that depend on theta through a retained graph.

    Args:
        theta: Parameters, M numbers.
        pieces: Pairs of outputs (with a graph to theta, built under `twice_differentiable`) and
            the curvature of the divergence in those outputs, a symmetric positive semidefinite
            linear map of the outputs' shape. Summed.
        count: Completions the sum is divided by, over all ranks.
        reduce: Sums a tensor over ranks.
    """

    def __init__(
        self,
        theta: ParameterVector,
        pieces: Sequence[tuple[Tensor, Curvature]],
        *,
        count: float = 1.0,
        reduce: Callable[[Tensor], Tensor] = lambda t: t,
    ):
        self.theta, self.count, self.reduce = theta, count, reduce
        self.products = 0
        self.pieces: list[tuple[Tensor, Curvature, Tensor, list[Tensor]]] = []
        for outputs, curvature in pieces:
            u = torch.zeros_like(outputs, requires_grad=True)
            vjp = torch.autograd.grad(
                outputs, theta.tensors, grad_outputs=u, create_graph=True, allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
            self.pieces.append((outputs, curvature, u, list(vjp)))

    def __call__(self, v: Tensor) -> Tensor:
        """Return F v, (M,)."""
        self.products += 1
        total = torch.zeros_like(v)
        parts = self.theta.unflatten(v)
        for outputs, curvature, u, vjp in self.pieces:
            (Jv,) = torch.autograd.grad(vjp, u, grad_outputs=parts, retain_graph=True)
            with torch.no_grad():
                HJv = curvature(Jv)
            total += self.theta.gradient(outputs, cotangent=HJv, retain=True)
        return self.reduce(total) / self.count


def hessian_operator(theta: ParameterVector, divergence: Tensor) -> Callable[[Tensor], Tensor]:
    """Return v -> H v for any scalar with a graph, by differentiating its gradient again.

    The way for a divergence whose outputs are not at hand; at theta_old the Hessian of a KL is the
    Fisher. Dearer than `FisherOperator` (ratios in recipes/benchmarks).
    """
    gradient = torch.autograd.grad(
        divergence, theta.tensors, create_graph=True, allow_unused=True, materialize_grads=True
    )
    flat = theta.flatten(gradient)

    def product(v: Tensor) -> Tensor:
        return theta.gradient(flat @ v, retain=True)

    return product
