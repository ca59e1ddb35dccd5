"""A plugin for the tests of the training loop: an energy model whose loss is differentiated twice.

Put this folder on PYTHONPATH and it is installed: the metadata beside it hold the entry point.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdm_core import hookimpl, records

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    width: int = 8
    dropout: float = 0.0


@dataclass(frozen=True)
class ObjectiveConfig:
    poison: int = -1  # the loss of this step (0 is the first) is not finite


@dataclass(frozen=True)
class DataConfig:
    count: int = 37
    valid: int = 11


@hookimpl
def register_models() -> Iterable[records.Model]:
    provides = ("denoise", "log_density")
    return [
        records.Model("energy", "An energy", "toy_plugin:energy", ModelConfig, provides),
        records.Model("mute", "A model that can do nothing", "toy_plugin:mute", ModelConfig),
    ]


@hookimpl
def register_objectives() -> Iterable[records.Objective]:
    return [
        records.Objective("score", "Denoising", "toy_plugin:score", ObjectiveConfig, requires=("denoise",)),
        records.Objective("split", "Denoising, to compile", "toy_plugin:Split", requires=("denoise",)),
    ]


@hookimpl
def register_datasets() -> Iterable[records.Dataset]:
    return [records.Dataset("squares", "Random 4x4 images", "toy_plugin:squares", DataConfig)]


@hookimpl
def register_recipes() -> Iterable[records.Recipe]:
    values = {
        "model": {"name": "energy"},
        "objective": {"name": "score"},
        "data": {"name": "squares"},
        "sampler": {"name": "core/ddim"},
        "sample": {"steps": 2, "grid": "rho", "batch_size": 64},
        "train": {"batch_size": 8, "lr": 1e-2, "log_every": 1, "validate_every": 10},
    }
    return [records.Recipe("default", "A few steps", values)]


def squares(config: DataConfig) -> Any:
    import torch

    from cdm_core.data import Data, DataInfo, TensorSplit

    generator = torch.Generator().manual_seed(0)
    count = config.count + config.valid
    pixels = torch.randint(256, (count, 1, 4, 4), generator=generator).to(torch.uint8)
    labels = torch.arange(count) % 2
    info = DataInfo("squares", (1, 4, 4), num_classes=2, flip=True)
    cut = config.count
    return Data(
        info,
        {
            "train": lambda: TensorSplit(pixels[:cut], labels[:cut]),
            "valid": lambda: TensorSplit(pixels[cut:], labels[cut:]),
        },
    )


def energy(config: ModelConfig, info: Any) -> nn.Module:
    import torch
    from torch import nn

    class Energy(nn.Module):
        """E(x, sigma); the denoiser is x - sigma^2 grad E."""

        sigma_range = (0.1, 10.0)

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(info.shape[0], config.width, 3, padding=1)
            self.dropout = nn.Dropout(config.dropout)
            self.read = nn.Linear(config.width, 1)
            self.unused = nn.Parameter(torch.ones(3))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("table", torch.linspace(0, 1, 5, dtype=torch.float64))

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            if self.training:
                self.calls += 1
            features = nn.functional.silu(self.conv(x / (1 + sigma[:, None, None, None] ** 2).sqrt()))
            return self.read(self.dropout(features).mean((2, 3)))[:, 0] + x.square().flatten(1).sum(1) / 2

        def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(
                    self(x, sigma).sum(), x, create_graph=self.training or torch.is_grad_enabled()
                )
            return x - sigma[:, None, None, None] ** 2 / (1 + sigma[:, None, None, None] ** 2) * slope

        def log_density(self, x: Tensor, y: Any = None, sigma: Any = None) -> Tensor:
            return -self(x, torch.zeros(len(x), device=x.device))

    return Energy()


def mute(config: ModelConfig, info: Any) -> nn.Module:
    from torch import nn

    return nn.Linear(1, 1)


class Split:
    """`score` in two halves: what is random, and what can be compiled."""

    def __init__(self, config: None) -> None:
        pass

    def __call__(self, model: Any, x0: Tensor, y: Tensor, draws: Any) -> dict[str, Tensor]:
        return self.loss(model, *self.prepare(model, x0, y, draws))

    def prepare(self, model: Any, x0: Tensor, y: Tensor, draws: Any) -> tuple[Tensor | None, ...]:
        sigma = draws.uniform() + 0.1
        x = x0 + sigma[:, None, None, None] * draws.normal(*x0.shape[1:])
        return x.detach().requires_grad_(), sigma, x0, None, y.float()

    def loss(
        self, model: Any, x: Tensor, sigma: Tensor, x0: Tensor, nothing: None, y: Tensor
    ) -> dict[str, Tensor]:
        import torch

        training = torch.is_grad_enabled()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(model(x, sigma).sum(), x, create_graph=training)
        share = (sigma**2 / (1 + sigma**2))[:, None, None, None]
        return {"label_mean": y.mean(), "loss": (x - share * slope - x0).square().mean()}


def score(config: ObjectiveConfig) -> Any:
    from cdm_core.random import fold

    # The step (0 is the first) to stop at until killed: no setting of the run, so it comes from outside.
    wait = fold(0, "train", int(os.environ.get("TOY_PLUGIN_WAIT", "-1")))

    def objective(model: Any, x0: Tensor, y: Tensor, draws: Any) -> dict[str, Tensor]:
        sigma = draws.uniform() + 0.1
        x = x0 + sigma[:, None, None, None] * draws.normal(*x0.shape[1:])
        loss = (model.denoise(x, sigma) - x0).square().mean()
        label_mean = y.float().mean()
        if draws.seed == fold(0, "train", config.poison):
            loss = loss / 0
        if draws.seed == wait:
            signal.pause()
        return {"loss": loss, "label_mean": label_mean}

    return objective
