"""The recipe `mixture-2d`, whose truth is known, trained to its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cdm_core
from cdm_core.config import resolve
from cdm_core.manager import load_registry
from cdm_core.training import train


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 64) -> float:
    """Mean over directions of the 1-Wasserstein distance; a, b (N, 2)."""
    angle = torch.linspace(0, torch.pi, directions + 1)[:-1]
    project = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ project).sort(0).values - (b @ project).sort(0).values).abs().mean())


@pytest.mark.slow
def test_trained_density_and_samples_are_close_to_the_truth(tmp_path: Path) -> None:
    registry = load_registry()
    config = resolve(registry, plugins=("cdm",), recipe="cdm/mixture-2d")
    train(config, tmp_path / "run", registry=registry, device="cpu", quiet=True)
    run = cdm_core.load_run(tmp_path / "run", device="cpu")
    assert run.data is not None
    assert run.data.mixture is not None
    x0, _ = run.examples("test", range(5000))
    excess = (run.data.mixture.log_density(x0) - run.log_density(x0)).mean() / 2
    assert abs(excess) < 0.03  # nats/dim
    samples = run.sample(5000, seed=0)
    assert sliced_wasserstein(samples.flatten(1), x0.flatten(1)) < 0.05
    # As a density it integrates to 1, to a few per cent.
    axis = torch.linspace(-2.5, 2.5, 201)
    plane = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    integral = run.log_density(plane, batch_size=5000).double().exp().sum() * (axis[1] - axis[0]) ** 2
    assert integral == pytest.approx(1, abs=0.05)
