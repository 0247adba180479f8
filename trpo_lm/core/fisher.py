"""Products with the Fisher matrix, which is never formed.

    F = Hessian of D(theta) at theta_old = E[ J^T (diag p - p p^T) J ],   J = d logits / d theta

One product costs about one forward+backward of the same tokens, in three steps:

    v -> J v          a vector-Jacobian product is linear in its cotangent u; differentiating the
                      retained graph of J^T u by u, along v, gives J v ("double vjp")
    z -> (diag p - p p^T) z      in closed form, chunk by chunk through the output layer
    c -> J^T c        one more vector-Jacobian product

The graph is built once an update, on a subset of whole completions, with the mathematical attention
kernel (the fused kernels have no second derivative) and with elementwise activations linearised
once: the Jacobian needs only their slope. A model whose layers have no second derivative
(hand-written kernels, quantised weights) gets its products as finite differences of grad D.

Source: the Gauss-Newton form of the Fisher, Martens (2020), arXiv:1412.1193, section 9.2; the
double-vjp trick is due to J. Townsend (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trpo_lm.core.parameters import ParameterVector, Reduce

Curvature = Callable[[Tensor], Tensor]

NUDGE = 3e-5  # KL of the move behind a finite difference, nats per completion


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


def softmax_curvature(logprobs: Tensor) -> Curvature:
    """Return z -> (diag p - p p^T) z for log-probabilities (n, V): the Fisher of the logits."""
    p = logprobs.exp()

    def product(z: Tensor) -> Tensor:
        z = z.to(p.dtype)
        return p * (z - torch.linalg.vecdot(p, z)[..., None])

    return product


def pullback(theta: ParameterVector, outputs: Tensor, u: Tensor) -> list[Tensor]:
    """Return J^T u for each parameter, with a graph in which it is linear in u."""
    parts = torch.autograd.grad(
        outputs, theta.tensors, grad_outputs=u, create_graph=True, allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    return list(parts)


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
        reduce: Reduce = lambda t: t,
    ):
        self.theta, self.count, self.reduce = theta, count, reduce
        self.pieces: list[tuple[Tensor, Curvature, Tensor, list[Tensor]]] = []
        for outputs, curvature in pieces:
            u = torch.zeros_like(outputs, requires_grad=True)
            self.pieces.append((outputs, curvature, u, pullback(theta, outputs, u)))

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


class FiniteDifference:
    """v -> F v as the change of grad D over a short move along v: first derivatives only.

        F v = (grad D(theta_old + eps v) - grad D(theta_old - eps v)) / (2 eps) + O(eps^2)

    A product costs two forward+backwards of D, and keeps nothing for the next. Rounding error grows
    as eps falls and truncation error as it rises: eps is chosen so that D changes by about `NUDGE`.
    (grad D(theta_old) = 0 would allow one-sided differences at half the cost, but in float32 no eps
    brings their error below 0.3% on a 1.6M-parameter LM.) The move is undone bit for bit.

    Args:
        theta: Parameters, M numbers, at theta_old.
        slope: Returns grad D at the current theta as a sum over this rank's completions, (M,).
        count: Completions the sum is divided by, over all ranks.
        reduce: Sums a tensor over ranks.
    """

    def __init__(
        self,
        theta: ParameterVector,
        slope: Callable[[], Tensor],
        *,
        count: float = 1.0,
        reduce: Reduce = lambda t: t,
    ):
        self.theta, self.slope, self.count, self.reduce = theta, slope, count, reduce
        self.curvature = 1.0  # v.Fv / v.v of the last product

    def __call__(self, v: Tensor) -> Tensor:
        """Return F v, (M,), accurate enough for conjugate gradient in float32."""
        squared = float(v.double().square().sum())
        if squared == 0.0:
            return torch.zeros_like(v)
        Fv, theta_old, guess = v, self.theta.snapshot(), self.curvature
        for _ in range(4):
            eps = math.sqrt(2 * NUDGE / (guess * squared))
            try:
                self.theta.assign(theta_old, v, eps)
                ahead = self.slope()
                self.theta.assign(theta_old, v, -eps)
                Fv = self.reduce(ahead - self.slope()) / (2 * eps * self.count)
            finally:
                self.theta.restore(theta_old)
            curvature = float(v.double() @ Fv.double()) / squared
            if 0.2 * guess < curvature < 5 * guess:  # the move had about the right length
                self.curvature = curvature
                break
            guess = min(max(curvature, 1e-3 * guess), 1e3 * guess)
        return Fv


def lacks_second_derivative(outputs: Callable[[], Tensor], theta: ParameterVector) -> str | None:
    """Return why `FisherOperator` cannot work on these outputs, or None if it can.

    Compares J v with a finite difference of the outputs: a kernel may raise when differentiated
    twice, or silently drop part of the derivative.

    Args:
        outputs: Runs the model on a probe, with a graph to theta.
        theta: Parameters, restored bit for bit.
    """
    v, eps = torch.ones_like(theta.vector()), 1e-3
    try:
        with twice_differentiable():
            before = outputs()
            u = torch.zeros_like(before, requires_grad=True)
            vjp = pullback(theta, before, u)
            (Jv,) = torch.autograd.grad(vjp, u, grad_outputs=theta.unflatten(v))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    if before.dtype in (torch.bfloat16, torch.float16):
        return None  # no difference to compare with survives the rounding
    theta_old = theta.snapshot()
    theta.assign(theta_old, v, eps)
    with torch.no_grad(), twice_differentiable():
        moved = (outputs() - before) / eps
    theta.restore(theta_old)
    if float((Jv - moved).norm()) > 0.1 * float(moved.norm()):
        return "the second derivative of a layer is incomplete"
    return None


def hessian_operator(theta: ParameterVector, divergence: Tensor) -> Callable[[Tensor], Tensor]:
    """Return v -> H v for any scalar with a graph, by differentiating its gradient again.

    For a divergence whose outputs are not available; at theta_old the Hessian of a KL is the
    Fisher. More expensive than `FisherOperator` (ratios in recipes/benchmarks).
    """
    gradient = torch.autograd.grad(
        divergence, theta.tensors, create_graph=True, allow_unused=True, materialize_grads=True
    )
    flat = theta.flatten(gradient)

    def product(v: Tensor) -> Tensor:
        return theta.gradient(flat @ v, retain=True)

    return product
