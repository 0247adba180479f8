"""Products with the Fisher matrix, which is never formed.

    F = Hessian of D(theta) at theta_old = E[ J^T (diag p - p p^T) J ],   J = d logits / d theta

Three ways, for three budgets of memory:

`FisherOperator`   retains a graph and makes any number of products with it:
    v -> J v       a vector-Jacobian product J^T u is linear in its cotangent u; differentiating its
                   graph by u, along v, gives J v ("double vjp")
    z -> (diag p - p p^T) z      in closed form, chunk by chunk through the output layer
    c -> J^T c     one more vector-Jacobian product
`ForwardFisher`    is as exact and retains nothing: J v by forward-mode differentiation, without a
                   graph, then J^T c on a fresh one. A product costs more than twice as much.
`ScoreFisher`      needs first derivatives only, of scores s = grad log pi(y) of sampled actions:
                   F = E[s s^T], exact in expectation. For kernels without the derivatives that the
                   others need: quantised weights, hand-written attention.

The first two use the mathematical attention kernel, as the fused ones are differentiable once. The
retained graph holds the slopes of elementwise activations, computed once: the Jacobian needs no
more.

Source: the Gauss-Newton form of the Fisher, Martens (2020), arXiv:1412.1193, section 9.2; the
double-vjp trick is due to J. Townsend (2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trpo_lm.core.parameters import ParameterVector, Reduce

Linear = Callable[[Tensor], Tensor]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Use attention kernels that have a second derivative inside the block."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class _LinearisedOnce(torch.autograd.Function):
    """An elementwise function whose slope is computed once and constant from then on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = function(leaf)
            (slope,) = torch.autograd.grad(y.sum(), leaf)
        ctx.save_for_backward(slope)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None


@contextmanager
def linearised_activations(activations: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Freeze the slope of elementwise modules.

    A product with J or its transpose then costs one multiplication per activation, instead of its
    whole formula. Wrong for a Hessian, which needs the derivative of the slope.
    """
    before = [module.__dict__.get("forward") for module in activations]
    for module in activations:
        module.forward = lambda x, function=module.forward: _LinearisedOnce.apply(x, function)
    try:
        yield
    finally:
        for module, forward in zip(activations, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def softmax_curvature(logprobs: Tensor) -> Linear:
    """Return z -> (diag p - p p^T) z for log-probabilities (n, V): the Fisher of the logits."""
    p = logprobs.exp()

    def product(z: Tensor) -> Tensor:
        z = z.to(p.dtype)
        return p * (z - torch.linalg.vecdot(p, z)[..., None])

    return product


def pullback(theta: ParameterVector, outputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return u = 0 and J^T u for each parameter, with a graph in which it is linear in u.

    Everything that this graph saves and that depends on u is zero, and is kept as one zero: it
    serves derivatives by theta, which nobody takes. The graph then holds little more than that of
    the outputs does; otherwise it would hold twice as much.
    """

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, Tensor]:
        return saved if saved.any() else (saved.shape, saved.new_zeros(()))

    def unpack(kept: Tensor | tuple[torch.Size, Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].expand(kept[0])

    u = torch.zeros_like(outputs, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        parts = torch.autograd.grad(
            outputs, theta.tensors, grad_outputs=u, create_graph=True, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
    return u, list(parts)


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

    name = "retained"

    def __init__(
        self,
        theta: ParameterVector,
        pieces: Sequence[tuple[Tensor, Linear]],
        *,
        count: float = 1.0,
        reduce: Reduce = lambda t: t,
    ):
        self.theta, self.count, self.reduce = theta, count, reduce
        self.pieces: list[tuple[Tensor, Linear, Tensor, list[Tensor]]] = []
        for outputs, curvature in pieces:
            self.pieces.append((outputs, curvature, *pullback(theta, outputs)))

    def __call__(self, v: Tensor) -> Tensor:
        """Return F v, (M,)."""
        total = torch.zeros_like(v)
        parts = self.theta.unflatten(v)
        for outputs, curvature, u, vjp in self.pieces:
            (Jv,) = torch.autograd.grad(vjp, u, grad_outputs=parts, retain_graph=True)
            with torch.no_grad():
                HJv = curvature(Jv)
            total += self.theta.gradient(outputs, cotangent=HJv, retain=True)
        return self.reduce(total) / self.count


class ForwardFisher:
    """v -> F v without a graph that outlives a product.

    Args:
        theta: Parameters, M numbers.
        pieces: For each part of the batch, three functions: v -> J v by forward-mode
            differentiation; its curvature, as in `FisherOperator`; c -> J^T c, (M,). Summed.
        count: Completions the sum is divided by, over all ranks.
        reduce: Sums a tensor over ranks.
    """

    name = "forward"

    def __init__(
        self,
        theta: ParameterVector,
        pieces: Sequence[tuple[Linear, Linear, Linear]],
        *,
        count: float = 1.0,
        reduce: Reduce = lambda t: t,
    ):
        self.theta, self.pieces, self.count, self.reduce = theta, pieces, count, reduce

    def __call__(self, v: Tensor) -> Tensor:
        """Return F v, (M,)."""
        total = torch.zeros_like(v)
        for jvp, curvature, vjp in self.pieces:
            total += vjp(curvature(jvp(v)))
        return self.reduce(total) / self.count


class ScoreFisher:
    """v -> S^T S v / count: the Fisher of sampled scores, one row of S each.

    A score is the gradient of the log-probability of actions drawn from the policy at the states of
    some completions. Draws at different states are independent and their scores have mean zero, so
    that the square of a sum over states is, in expectation, the sum of their squares: one backward
    pass over any number of completions makes one unbiased sample. The error of F v falls as one
    over the root of the number of scores.

    Args:
        scores: (K, M), in any floating dtype: sums over completions.
        count: Completions behind all scores, over all ranks.
        reduce: Sums a tensor over ranks.

    Source: on sampling from the model rather than the data, Kunstner et al. (2019),
    arXiv:1905.12558.
    """

    name = "scores"

    def __init__(self, scores: Tensor, *, count: float = 1.0, reduce: Reduce = lambda t: t):
        self.scores, self.count, self.reduce = scores, count, reduce

    def __call__(self, v: Tensor) -> Tensor:
        """Return F v, (M,)."""
        S = self.scores
        return self.reduce((S @ v.to(S)) @ S).to(v) / self.count


def adjoint_error(u: Tensor, c: Tensor, jvp: Linear) -> float:
    """Return how far u.J c is from |c|^2, relatively, where c = J^T u by a plain backward pass.

    A kernel may silently drop or distort part of the derivative that `jvp` needs. Two derivatives
    of the same pass either agree to rounding or one is wrong, at any depth and width.

    Args:
        u: Cotangent of the outputs.
        c: J^T u, (M,), not zero.
        jvp: v -> J v.
    """
    expected = float(c.double() @ c.double())
    found = float((u.double() * jvp(c).double()).sum())
    return abs(found - expected) / expected if expected > 0 else 0.0


def hessian_operator(theta: ParameterVector, divergence: Tensor) -> Callable[[Tensor], Tensor]:
    """Return v -> H v for any scalar with a graph, by differentiating its gradient again.

    For a divergence whose outputs are not available; at theta_old the Hessian of a KL is the
    Fisher. More expensive than `FisherOperator` (ratios in docs/notebook.md).
    """
    gradient = torch.autograd.grad(
        divergence, theta.tensors, create_graph=True, allow_unused=True, materialize_grads=True
    )
    flat = theta.flatten(gradient)

    def product(v: Tensor) -> Tensor:
        return theta.gradient(flat @ v, retain=True)

    return product
