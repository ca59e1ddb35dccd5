"""Operators beside their textbook formulations: `make bench`. One group an operator, one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cdm_kernels

LEVELS, WIDTH = 1002, 256


def official_cross_entropy(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o.cumsum(1), t, reduction="none")


def official_log_ratio(o: Tensor, t: Tensor) -> Tensor:
    logits = o.cumsum(1)
    return logits[:, -1] - torch.diag(logits[:, t])


def pooled_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1).mean((2, 3))


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = F.group_norm(x, 32, weight, bias, 1e-6)
    return h * torch.sigmoid(h)


def gradient(function: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    (result,) = torch.autograd.grad(function(x, *rest).sum(), x)
    return result


@pytest.mark.benchmark(group="noise-level cross-entropy, forward and backward, (128, 1002)")
@pytest.mark.parametrize("function", [cdm_kernels.noise_level_cross_entropy, official_cross_entropy])
def test_cross_entropy(benchmark: Any, function: Callable[..., Tensor]) -> None:
    o, t = torch.randn(128, LEVELS, requires_grad=True), torch.randint(LEVELS, (128,))
    found = benchmark(gradient, function, o, t)
    torch.testing.assert_close(
        found[:, 1:], gradient(official_cross_entropy, o, t)[:, 1:], rtol=1e-3, atol=1e-6
    )


@pytest.mark.benchmark(group="log-ratio of two levels, forward and backward, (128, 1002)")
@pytest.mark.parametrize("name", ["ours", "official"])
def test_log_ratio(benchmark: Any, name: str) -> None:
    o, t = torch.randn(128, LEVELS, requires_grad=True), torch.randint(LEVELS, (128,))
    function = {
        "ours": lambda o, t: cdm_kernels.log_ratio(o, t, LEVELS - 1),
        "official": official_log_ratio,
    }[name]
    found = benchmark(gradient, function, o, t)
    torch.testing.assert_close(found, gradient(official_log_ratio, o, t))


@pytest.mark.benchmark(group="last convolution and mean, forward and backward, (16, 128, 32, 32)")
@pytest.mark.parametrize("function", [cdm_kernels.mean_conv3x3, pooled_convolution])
def test_mean_conv3x3(benchmark: Any, function: Callable[..., Tensor]) -> None:
    x = torch.randn(16, 128, 32, 32, requires_grad=True)
    weight, bias = torch.randn(WIDTH, 128, 3, 3), torch.randn(WIDTH)
    found = benchmark(gradient, function, x, weight, bias)
    torch.testing.assert_close(found, gradient(pooled_convolution, x, weight, bias), rtol=1e-3, atol=1e-3)


@pytest.mark.benchmark(group="GroupNorm and SiLU, forward and backward, (16, 128, 32, 32)")
@pytest.mark.parametrize("name", ["ours", "official"])
def test_group_norm_silu(benchmark: Any, name: str) -> None:
    x, weight, bias = torch.randn(16, 128, 32, 32, requires_grad=True), torch.randn(128), torch.randn(128)
    function = {
        "ours": lambda x, w, b: cdm_kernels.group_norm_silu(x, 32, w, b, 1e-6),
        "official": norm_silu,
    }[name]
    found = benchmark(gradient, function, x, weight, bias)
    torch.testing.assert_close(found, gradient(norm_silu, x, weight, bias), rtol=1e-3, atol=1e-5)
