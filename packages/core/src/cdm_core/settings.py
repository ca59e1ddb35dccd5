"""The typed settings of a run: what `config.toml` holds. `cdm_core.config` fills them.

Fields marked `resumable` may change between two runs of the same `train` command without starting anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

RESUMABLE = {"resumable": True}

Compile = Literal["no", "auto", "trace", "whole", "cuda-graph"]


@dataclass(frozen=True)
class LRFactor:
    """One factor of the learning rate; the factors of a schedule multiply.

    warmup: rises linearly from 1/steps to 1 over `steps`. step: times `factor` every `steps`.
    cosine: falls from 1 to `factor` over `steps` (0: the whole run).
    """

    kind: Literal["warmup", "step", "cosine"]
    steps: int = 0
    factor: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop; method-free."""

    steps: int = field(default=1000, metadata=RESUMABLE)
    batch_size: int = 64  # images a step, over all processes and micro-batches
    micro_batches: int = 1  # gradient accumulation: a step's images in this many passes
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    lr_schedule: tuple[LRFactor, ...] = ()
    clip_norm: float | None = None  # None: no gradient clipping
    ema_decay: float = 0.9999
    ema_start: int = 0  # plain copy of the weights until this step
    precision: Literal["no", "bf16", "fp16"] = "no"
    # How the step is compiled (`cdm_core.compiled`). It changes rounding, and which elements dropout drops: a
    # run may go on where its compiler is missing, only not bit for bit as it would have with it.
    compile: Compile = field(default="no", metadata=RESUMABLE)
    log_every: int = field(default=50, metadata=RESUMABLE)
    validate_every: int = field(default=500, metadata=RESUMABLE)
    sample_every: int = field(default=0, metadata=RESUMABLE)  # 0: only at the end
    checkpoint_every: int = field(default=500, metadata=RESUMABLE)
    keep_checkpoints: int = field(default=3, metadata=RESUMABLE)
    num_workers: int = field(default=0, metadata=RESUMABLE)  # processes that read the data


@dataclass(frozen=True)
class SampleConfig:
    """How `sample` walks from noise to data unless told otherwise."""

    steps: int = 50
    grid: Literal["t", "logsnr", "quadratic", "rho"] = "t"
    batch_size: int = 64
    clip: bool = False  # every prediction of x0 is clamped to the data's range, [-1, 1]
    guidance: float = 0.0  # weight w of classifier-free guidance, (1 + w) D(x, y) - w D(x); 0: none


@dataclass(frozen=True)
class Selection:
    """A component chosen by its full name, with its settings (an instance of its record's `config`)."""

    name: str
    config: Any = None


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled: by which sampler, with which settings, through which adapter (None: none)."""

    sampler: Selection = field(default_factory=lambda: Selection("core/ddim"))
    sample: SampleConfig = field(default_factory=SampleConfig)
    adapter: Selection | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers."""

    recipe: str
    model: Selection
    objective: Selection
    data: Selection
    sampler: Selection
    seed: int = 0
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    adapter: Selection | None = None  # what `sample` draws through, a guide say; training knows nothing of it

    @property
    def sampling(self) -> Sampling:
        """The part that decides how samples are drawn."""
        return Sampling(self.sampler, self.sample, self.adapter)
