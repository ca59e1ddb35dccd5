"""The noise-level head beside the cross-entropy of a running sum and the difference of two of its entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels import noise_level_cross_entropy, noise_level_head

SHAPES = {
    "16x1002": (16, 1002),
    "128x1002": (128, 1002),
    "4096x1002": (4096, 1002),
    "128x4098": (128, 4098),
    "64x102": (64, 102),
}


def outputs(rows: int, levels: int, trained: bool) -> Tensor:
    """o of a classifier: its logits lie within a few nats, and once trained in a well of 1e4 nats."""
    if not trained:
        return 0.1 * torch.randn(rows, levels)
    distance = torch.arange(levels) / levels - torch.rand(rows, 1)
    logits = 3 * torch.randn(rows, levels) - 1e4 * distance.double().square()
    return torch.diff(logits, dim=1, prepend=torch.zeros(rows, 1)).float()


def ours(o: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    head = noise_level_head(o, t, o.shape[1] - 1)
    return head.cross_entropy, head.log_ratio


def textbook(o: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    logits = o.cumsum(1)
    log_ratio = logits[:, -1] - logits.gather(1, t[:, None])[:, 0]
    return F.cross_entropy(logits, t, reduction="none"), log_ratio


def differentiate(
    function: Callable[..., tuple[Tensor, ...]], o: Tensor, t: Tensor, *along: Tensor, order: str
) -> tuple[Tensor, ...]:
    """forward: the values; backward: their gradient; full: those of values and of that gradient."""
    *g, v = along
    if order == "forward":
        with torch.no_grad():
            return function(o, t)
    values = function(o, t)
    if order == "backward":
        return torch.autograd.grad(values, o, g[: len(values)])
    (first,) = torch.autograd.grad(values, o, g[: len(values)], create_graph=True)
    return torch.autograd.grad((*values, first), o, (*g[: len(values)], v))


def compare(side_by_side: Any, mine: Any, theirs: Any, size: str, trained: bool, order: str) -> None:
    rows, levels = SHAPES[size]
    o, t = outputs(rows, levels, trained).requires_grad_(), torch.randint(levels, (rows,))
    inputs = (o, t, torch.rand(rows), torch.rand(rows), torch.randn(rows, levels))
    side_by_side(
        lambda: differentiate(mine, *inputs, order=order), lambda: differentiate(theirs, *inputs, order=order)
    )
    found, expected = (differentiate(function, *inputs, order=order) for function in (mine, theirs))
    for a, b in zip(found, expected, strict=True):
        # A running sum in float32 is off by 1e-3 at 1e4, and so are probabilities; o_0 is no input of ours.
        error = (a - b)[:, 1:] if a.ndim == 2 else a - b
        assert error.abs().max() <= 1e-2 * b.abs().max()


def official(o: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """As the official code has it: a matrix of rows by rows for its diagonal."""
    logits = o.cumsum(1)
    return F.cross_entropy(logits, t, reduction="none"), logits[:, -1] - torch.diag(logits[:, t])


@pytest.mark.parametrize("order", ["forward", "backward", "full"])
@pytest.mark.parametrize("size", ["16x1002", "128x1002"])
def test_noise_level_head_official(side_by_side: Any, size: str, order: str) -> None:
    compare(side_by_side, ours, official, size, True, order)


@pytest.mark.parametrize("order", ["forward", "backward", "full"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "untrained"])
@pytest.mark.parametrize("size", SHAPES)
def test_noise_level_head(side_by_side: Any, size: str, trained: bool, order: str) -> None:
    compare(side_by_side, ours, textbook, size, trained, order)


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("size", SHAPES)
def test_noise_level_cross_entropy(side_by_side: Any, size: str, order: str) -> None:
    compare(
        side_by_side,
        lambda o, t: (noise_level_cross_entropy(o, t),),
        lambda o, t: (F.cross_entropy(o.cumsum(1), t, reduction="none"),),
        size,
        True,
        order,
    )
