"""The smallest kernel there is: does Triton work here?"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _double(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, 2.0 * tl.load(at))


def run(device: str) -> str:
    """Compile and launch it; empty if it did what it should, else what was wrong."""
    x = torch.ones(16, device=device)
    _double[(1,)](x, BLOCK=16)
    return "" if bool((x == 2).all()) else "a kernel of Triton's computes nothing"
