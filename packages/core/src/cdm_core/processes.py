"""Images over several processes, as `torchrun` and `accelerate launch` start them.

Only the launchers' environment variables and gloo are used: what travels are finished images, on the CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Which of `world` processes this is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Self:
        """As the launcher says; the only process without one."""
        rank, world, local = (int(os.environ.get(key, "0")) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(rank, max(world, 1), local)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, total: int, rank: int | None = None) -> range:
        """The images of `total` that a process (None: this one) draws: contiguous, sizes within 1."""
        rank = self.rank if rank is None else rank
        return range(total * rank // self.world, total * (rank + 1) // self.world)

    def device(self, name: str) -> str:
        """`cuda` as the GPU of this process; other devices as they are."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world > 1 else name

    def gather(self, part: Tensor, total: int) -> Tensor | None:
        """The parts of all processes in order, (total, ...), on the main one; None elsewhere.

        part (len(share(total)), ...) on the CPU.
        """
        if self.world == 1:
            return part
        import torch.distributed as dist

        dist.init_process_group("gloo")
        try:
            sizes = [len(self.share(total, rank)) for rank in range(self.world)]
            padded = part.new_zeros(max(sizes), *part.shape[1:])  # gather wants equal shapes
            padded[: len(part)] = part
            parts = [torch.empty_like(padded) for _ in sizes] if self.main else None
            dist.gather(padded, parts)
        finally:
            dist.destroy_process_group()
        if parts is None:
            return None
        return torch.cat([rows[:size] for rows, size in zip(parts, sizes, strict=True)])
