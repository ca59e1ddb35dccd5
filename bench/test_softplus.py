"""Softplus beside PyTorch's own, on the maps of a ResNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cdm_kernels.softplus import softplus

SHAPES = {"8x64x32x32": (8, 64, 32, 32), "8x256x16x16": (8, 256, 16, 16), "8x1024x4x4": (8, 1024, 4, 4)}


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("size", SHAPES)
def test_softplus(side_by_side: Any, size: str, order: str) -> None:
    z = torch.randn(SHAPES[size]).requires_grad_(order == "backward")
    dy = torch.randn_like(z)

    def run(function: Any) -> Any:
        y = function(z, 3.0)
        return torch.autograd.grad(y, z, dy)[0] if order == "backward" else y

    side_by_side(lambda: run(softplus), lambda: run(F.softplus))
    torch.testing.assert_close(run(softplus), run(F.softplus), rtol=1e-5, atol=1e-7)
