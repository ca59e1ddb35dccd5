"""The tempered log-likelihood and its gradient beside their definition in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels import softmax_gradient

SHAPES = {"16x10": (16, 10), "16x1000": (16, 1000), "128x1000": (128, 1000), "1024x1000": (1024, 1000)}
TEMPERATURES = 1.0, 0.5


def textbook(f: Tensor, target: Tensor, tau1: float, tau2: float) -> tuple[Tensor, Tensor]:
    q = target if target.ndim == 2 else F.one_hot(target, f.shape[1]).to(f.dtype)
    tempered = tau2 * f
    value = tau1 * (q * f).sum(1) - torch.logsumexp(tempered, 1)
    return value, tau1 * q - tau2 * torch.softmax(tempered, 1)


def differentiate(
    function: Callable[..., tuple[Tensor, Tensor]], f: Tensor, target: Tensor, *along: Tensor, order: str
) -> tuple[Tensor, ...]:
    """forward: value and cotangent; backward: their gradient; full: those of both and of that gradient."""
    *g, u = along
    if order == "forward":
        with torch.no_grad():
            return function(f, target, *TEMPERATURES)
    parts = function(f, target, *TEMPERATURES)
    if order == "backward":
        return torch.autograd.grad(parts, f, g)
    (first,) = torch.autograd.grad(parts, f, g, create_graph=True)
    return torch.autograd.grad((*parts, first), f, (*g, u))


@pytest.mark.parametrize("order", ["forward", "backward", "full"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("size", SHAPES)
def test_softmax_gradient(side_by_side: Any, size: str, soft: bool, order: str) -> None:
    rows, classes = SHAPES[size]
    f = (3 * torch.randn(rows, classes)).requires_grad_()
    target = torch.randn(rows, classes).softmax(1) if soft else torch.randint(classes, (rows,))
    inputs = (f, target, torch.randn(rows), torch.randn(rows, classes), torch.randn(rows, classes))
    side_by_side(
        lambda: differentiate(softmax_gradient, *inputs, order=order),
        lambda: differentiate(textbook, *inputs, order=order),
    )
    found, expected = (
        differentiate(function, *inputs, order=order) for function in (softmax_gradient, textbook)
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()
