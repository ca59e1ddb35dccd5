"""One tolerance table and one comparison for every operator's test: value, first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Largest error relative to the largest entry, by precision: of values, first derivatives, second derivatives.
TOLERANCES = {
    torch.float64: (1e-12, 1e-11, 1e-10),
    torch.float32: (2e-6, 1e-5, 4e-5),
    torch.bfloat16: (8e-3, 1.6e-2, 3e-2),
    torch.float16: (1e-3, 2e-3, 4e-3),
}

Orders = tuple[list[Tensor], list[Tensor], list[Tensor]]


def orders(function: Callable[..., Any], inputs: Sequence[Tensor], seed: int = 0) -> Orders:
    """Values of function(*inputs), and its first and second derivatives along random cotangents.

    Derivatives are in those inputs that require grad: first of the floating-point values, then of those first
    derivatives. The cotangents are the same in every precision. A derivative that is nowhere defined is
    zeros.
    """
    generator = torch.Generator().manual_seed(seed)

    def cotangents(tensors: Sequence[Tensor]) -> list[Tensor]:
        drawn = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tensors)
        return [c.to(t) for c, t in zip(drawn, tensors, strict=True)]

    values = function(*inputs)
    values = [values] if isinstance(values, Tensor) else list(values)
    sources = [t for t in inputs if t.requires_grad]
    smooth = [v for v in values if v.requires_grad]
    first = torch.autograd.grad(
        smooth, sources, cotangents(smooth), create_graph=True, allow_unused=True, materialize_grads=True
    )
    along = cotangents(first)
    bent = [(f, c) for f, c in zip(first, along, strict=True) if f.requires_grad]
    if bent:
        second = torch.autograd.grad(
            [f for f, _ in bent], sources, [c for _, c in bent], allow_unused=True, materialize_grads=True
        )
    else:
        second = tuple(torch.zeros_like(t) for t in sources)
    detach = lambda tensors: [t.detach() for t in tensors]  # noqa: E731
    return detach(values), detach(first), detach(second)


def assert_orders_close(actual: Orders, exact: Orders, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Every tensor within `factor` times its order's tolerance of `dtype`, and of the dtype of its own."""
    for order, tolerance in enumerate(TOLERANCES[dtype]):
        for index, (a, e) in enumerate(zip(actual[order], exact[order], strict=True)):
            assert a.shape == e.shape, f"order {order}, tensor {index}: shape {a.shape}, not {e.shape}"
            if not e.numel():
                continue
            error = (a.double() - e.double()).abs().max()
            scale = e.double().abs().max().clamp(min=1e-30)
            assert error <= factor * tolerance * scale, (
                f"order {order}, tensor {index}: off by {error / scale:.1e} of its scale, "
                f"allowed {factor * tolerance:.1e}"
            )
