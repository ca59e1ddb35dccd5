"""Distances of samples from data against closed forms."""

import math

import numpy as np
import pytest
import torch

from cdm_core.distances import (
    Moments,
    frechet,
    inception_score,
    kernel_distance,
    precision_recall,
)
from cdm_core.errors import UserError


def rows(count, dim, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) * scale + shift


def test_moments_of_batches_add_up():
    data = rows(50, 3) @ rows(3, 3, seed=1)
    parts = [Moments.of(part) for part in data.split([10, 2, 38])]
    total = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(total.mean, data.mean(0))
    torch.testing.assert_close(total.covariance, data.T.cov())
    assert total.count == 50
    with pytest.raises(UserError, match="2 images or more"):
        Moments.of(data[:1])


def test_frechet_distance_of_gaussians_whose_covariances_commute():
    """|mu|^2 + sum (s_a - s_b)^2 in the common eigenbasis."""
    basis = torch.linalg.qr(rows(4, 4)).Q
    a, b = torch.tensor([1.0, 2.0, 0.5, 0.0]).double(), torch.tensor([0.3, 2.0, 1.0, 0.4]).double()
    shift = rows(1, 4, seed=2)[0]
    first = Moments(9, torch.zeros(4).double(), basis * a**2 @ basis.T)
    second = Moments(9, shift, basis * b**2 @ basis.T)
    expected = float(shift.square().sum() + (a - b).square().sum())
    assert frechet(first, second) == pytest.approx(expected, abs=1e-6)
    assert frechet(second, first) == pytest.approx(expected, abs=1e-6)
    assert frechet(first, first) == pytest.approx(0, abs=1e-7)


def test_frechet_distance_where_they_do_not_commute():
    """Against the eigenvalues of the product itself, which are those of no symmetric matrix."""
    a, b = (Moments.of(rows(30, 3, seed) @ rows(3, 3, seed + 10)) for seed in (0, 1))
    overlap = torch.linalg.eigvals(a.covariance @ b.covariance).real.sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * overlap
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_statistics_come_from_npz_files(tmp_path):
    moments = Moments.of(rows(20, 3))
    np.savez(tmp_path / "ref.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    assert frechet(Moments.read(tmp_path / "ref.npz"), moments) == pytest.approx(0, abs=1e-7)
    np.savez(tmp_path / "other.npz", mu=np.zeros(2))
    (tmp_path / "text.npz").write_text("no")
    for name in ("other", "text", "absent"):
        with pytest.raises(UserError, match=r"not an \.npz of statistics"):
            Moments.read(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(2), sigma=np.eye(3))
    with pytest.raises(UserError, match="differ"):
        Moments.read(tmp_path / "odd.npz")


def test_kernel_distance_is_unbiased_and_grows_with_the_shift():
    """Of one distribution it is 0 in the mean; of two that differ the moments of either say what it is."""
    same = [kernel_distance(rows(40, 2, s), rows(40, 2, s + 500)) for s in range(300)]
    mean, error = np.mean(same), np.std(same) / math.sqrt(len(same))
    assert abs(mean) < 4 * error
    a, b = rows(4000, 1), rows(4000, 1, 1, shift=1.0)
    # E (xy + 1)^3 = 1 + 3 m m' + 3 q q' + c c' with the first three moments of either side
    first, second = (0.0, 1.0, 0.0), (1.0, 2.0, 4.0)
    expected = sum(w * (p - q) ** 2 for w, p, q in zip((3, 3, 1), first, second, strict=True))
    assert kernel_distance(a, b) == pytest.approx(expected, rel=0.15)


def test_precision_and_recall_of_known_sets():
    data = torch.arange(10.0).double()[:, None]
    assert precision_recall(data, data) == (1.0, 1.0)
    samples = torch.tensor([0.0, 0.1, 0.2, 0.3, 100.0, 101.0, 102.0, 103.0]).double()[:, None]
    found = precision_recall(data, samples, k=2)
    assert found.precision == 0.5
    # The samples 0 to 0.3 reach 0.3 at most, those from 100 on nothing of the data.
    assert found.recall == 0.1
    assert precision_recall(data, samples, k=2, chunk=3) == found
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(data[:3], data)


def test_inception_score_lies_between_one_and_the_number_of_classes():
    sure = 100 * torch.eye(4)
    assert inception_score(sure) == pytest.approx(4)
    assert inception_score(sure[:1].expand(6, 4)) == pytest.approx(1)
    assert inception_score(torch.zeros(5, 4)) == pytest.approx(1)
