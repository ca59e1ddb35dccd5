"""Points of a Gaussian mixture: data of which density, score and denoiser are known (`Data.mixture`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cdm_core.data.base import Data, DataInfo, Split, TensorSplit
from cdm_core.data.configs import GaussianMixtureConfig
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws, fold


def load(config: GaussianMixtureConfig) -> Data:
    """Continuous points (dim, 1, 1), labelled with their component; the splits are drawn independently."""
    config.check()
    mixture = build(config)
    info = DataInfo(
        name="gaussian-mixture",
        shape=(config.dim, 1, 1),
        num_classes=config.components,
        levels=None,
        dequantise=False,
    )

    def read(name: str, points: int) -> Split:
        draws = Draws(fold(config.seed, "points", name), points)
        return TensorSplit(*mixture.sample(points, draws))

    return Data(
        info,
        {
            "train": lambda: read("train", config.train_points),
            "valid": lambda: read("valid", config.valid_points),
            "test": lambda: read("test", config.test_points),
        },
        mixture=mixture,
    )


def build(config: GaussianMixtureConfig) -> GaussianMixture:
    """The distribution that `config` describes."""
    k, d = config.components, config.dim
    isotropic = (config.std**2 * torch.eye(d, dtype=torch.float64)).repeat(k, 1, 1)
    if config.layout == "ring":
        angles = 2 * math.pi * torch.arange(k, dtype=torch.float64) / k
        means = config.radius * torch.stack((angles.cos(), angles.sin()), -1)
        return GaussianMixture(torch.ones(k), means, isotropic)
    if config.layout == "explicit":
        weights = torch.tensor(config.weights) if config.weights else torch.ones(k)
        return GaussianMixture(weights, torch.tensor(config.means, dtype=torch.float64), isotropic)
    return GaussianMixture(*_random_layout(config))


def _random_layout(config: GaussianMixtureConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Weights within a factor 3, means uniform on the sphere, axes at random, std / 4 to std along each."""
    k, d = config.components, config.dim
    generator = torch.Generator().manual_seed(fold(config.seed, "layout"))
    weights = 0.5 + torch.rand(k, generator=generator, dtype=torch.float64)
    directions = torch.randn(k, d, generator=generator, dtype=torch.float64)
    means = config.radius * directions / directions.norm(dim=-1, keepdim=True)
    axes = torch.linalg.qr(torch.randn(k, d, d, generator=generator, dtype=torch.float64)).Q
    std = config.std * (0.25 + 0.75 * torch.rand(k, 1, d, generator=generator, dtype=torch.float64))
    covariances = (axes * std**2) @ axes.mT
    return weights, means, (covariances + covariances.mT) / 2
