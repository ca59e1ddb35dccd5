"""Random numbers that do not depend on how a batch is spread over processes.

Every draw of training and evaluation is keyed by (seed, purpose, step): nothing has to be saved to resume,
and two processes see the numbers that one would.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def fold(seed: int, *keys: int | str) -> int:
    """A 63-bit seed from a seed and keys; different keys give unrelated seeds."""
    text = "/".join(map(str, (seed, *keys)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Draws:
    """Draws for rows `start:stop` of a batch of `total` rows.

    Each call draws for the whole batch and keeps the rows asked for, so row i gets the same numbers whatever
    the split. Drawn on the CPU, then moved: a run's numbers do not depend on the device either.
    """

    def __init__(
        self,
        seed: int,
        total: int,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed = seed
        self.total, self.rows, self.device = total, slice(start, total if stop is None else stop), device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, (rows, *shape) float32."""
        return torch.randn(self.total, *shape, generator=self._generator)[self.rows].to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), (rows, *shape) float32."""
        return torch.rand(self.total, *shape, generator=self._generator)[self.rows].to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high), (rows, *shape) int64."""
        draws = torch.randint(high, (self.total, *shape), generator=self._generator)
        return draws[self.rows].to(self.device)
