"""Bayes' rule where the truth is known: a mixture of Gaussians, with its normalisers and without them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from cdm_core.backbones.adm import UNet
from cdm_core.backbones.adm_configs import ADMConfig
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws, fold
from cdm_core.runs import ImageDraws
from cdm_core.testing.conformance import randomise
from cdm_plugins_zeroshot.bayes_configs import ExactBayesConfig
from cdm_plugins_zeroshot.calibration import Affine
from cdm_plugins_zeroshot.exact_bayes import Centring, ExactBayes

POINTS = DataInfo("points", (2, 1, 1), num_classes=3, levels=None)
UNKNOWN = torch.tensor([0.0, 9.0, -4.0])


class Unnormalised(nn.Module):
    """The exact class densities of a mixture, each times a factor of its own that grows with the noise."""

    def __init__(self, unknown: Tensor) -> None:
        super().__init__()
        angle = torch.arange(3) * 2 * math.pi / 3
        means = torch.stack([angle.cos(), angle.sin()], 1)
        self.mixture = GaussianMixture(torch.ones(3), means, 0.35 * torch.eye(2).expand(3, 2, 2))
        self.unknown, self.num_classes = unknown, 3

    def log_density(self, x: Tensor, y: Tensor, sigma: Tensor | None = None) -> Tensor:
        level = 0.0 if sigma is None else sigma
        return self.mixture.log_density(x, y, sigma) + (1 + level) * self.unknown[y]


def build(unknown: Tensor = UNKNOWN, **settings: Any) -> ExactBayes:
    return ExactBayes(Unnormalised(unknown), POINTS, ExactBayesConfig(**settings))


def points(count: int, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    x0, y = Unnormalised(UNKNOWN).mixture.sample(count, Draws(seed, count))
    return x0, y.numpy()


def test_without_unknown_factors_it_is_the_posterior() -> None:
    x0, _ = points(50)
    bayes = build(torch.zeros(3), sigmas=(0.0, 0.4), centre="none")
    scores = bayes.scores(x0, torch.arange(50))
    noise = ImageDraws(fold(0, "exact Bayes", repr(0.4), 0), range(50)).normal(2, 1, 1)
    for level, (x, sigma) in enumerate([(x0, 0.0), (x0 + 0.4 * noise, 0.4)]):
        posterior = Centring.fit(scores[:, level : level + 1], None, "none")(scores[:, level : level + 1])
        truth = bayes.model.mixture.class_logits(x.double(), sigma).numpy()
        np.testing.assert_allclose(posterior, truth, atol=1e-5)


def test_labels_find_the_factors_of_every_level() -> None:
    """Offsets and scales of the truth to their statistical error, and its posterior with them."""
    x0, y = points(6000)
    bayes = build(sigmas=(0.0, 0.3))
    scores = bayes.scores(x0, torch.arange(6000))
    centring = Centring.fit(scores, y, "labels")
    assert (centring.images, centring.labelled) == (6000, True)
    for affine, sigma in zip(centring.levels, (0.0, 0.3), strict=True):
        factor = (1 + sigma) * (UNKNOWN - UNKNOWN.mean())
        assert affine.scale == pytest.approx(1, abs=0.08)
        assert np.array(affine.offsets) / affine.scale == pytest.approx(factor.numpy(), abs=0.12)

    new, labels = points(2000, seed=1)
    raw = bayes.scores(new, torch.arange(2000))
    truth = bayes.model.mixture.class_logits(new, 0.0).numpy()
    assert (raw[:, 0].argmax(1) == labels).mean() < 0.5  # the factors decide
    found = Centring(centring.levels[:1], 6000, True)(raw[:, :1])
    assert np.abs(np.exp(found) - np.exp(truth)).max() < 0.06
    agree = (found.argmax(1) == truth.argmax(1)).mean()
    assert agree > 0.97


def test_means_find_the_factors_of_classes_alike() -> None:
    """The three classes are turns of one another: every mean log-density but for its factor is the same."""
    x0, labels = points(3000)
    bayes = build(sigmas=(0.0,), centre="mean")
    scores = bayes.scores(x0, torch.arange(3000))
    centring = Centring.fit(scores, None, "mean")
    assert (centring.images, centring.labelled) == (3000, False)
    assert centring.levels[0].offsets == pytest.approx((UNKNOWN - UNKNOWN.mean()).tolist(), abs=0.25)
    best = (bayes.model.mixture.class_logits(x0, 0.0).argmax(1).numpy() == labels).mean()
    assert (centring(scores).argmax(1) == labels).mean() > best - 0.02


def test_levels_are_opinions_of_equal_rank() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 2, 3))
    levels = (Affine(2.0, (1.0, 0.0, -1.0)), Affine(0.5))
    product = np.exp((levels[0](scores[:, 0]) + levels[1](scores[:, 1])) / 2)
    wanted = product / product.sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(Centring(levels, 9, True)(scores)), wanted, rtol=1e-12)


# -- draws ---------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """N(-0.4, 0.5^2) and N(0.5, 0.2^2) of one pixel."""

    num_classes = 2

    def log_density(self, x: Tensor, y: Tensor, sigma: Tensor | None = None) -> Tensor:
        mean, std = torch.tensor([-0.4, 0.5])[y], torch.tensor([0.5, 0.2])[y]
        std = std if sigma is None else (std**2 + sigma**2).sqrt()
        return torch.distributions.Normal(mean, std).log_prob(x.flatten(1)[:, 0])


def test_dequantisation_draws_give_the_probability_of_a_grey_level() -> None:
    """The mean density over a cell of width 1/2 is its probability times 2."""
    info, draws = DataInfo("pixel", (1, 1, 1), num_classes=2, levels=4), 400
    pixels = torch.tensor([0, 1, 2, 3, 1]).to(torch.uint8).view(-1, 1, 1, 1)
    x0 = info.to_model(pixels, ImageDraws(5, range(5)))
    bayes = ExactBayes(Line(), info, ExactBayesConfig(sigmas=(0.0,), draws=draws))
    found = np.exp(bayes.scores(x0, torch.arange(5))[:, 0])
    edges = np.array([-1, -0.5, 0, 0.5, 1.0])
    for label, (mean, std) in enumerate([(-0.4, 0.5), (0.5, 0.2)]):
        cell = np.diff(norm(mean, std).cdf(edges)) * 2
        density = norm(mean, std).pdf(np.linspace(-1, 1, 4001)).reshape(-1)
        for image, grey in enumerate(pixels.flatten().tolist()):
            inside = density[1000 * grey : 1000 * (grey + 1)]
            assert abs(found[image, label] - cell[grey]) < 4 * inside.std() / math.sqrt(draws) + 1e-6
    # The two images of grey level 1 are drawn apart from one another.
    assert found[1, 0] != found[4, 0]


def test_pools_of_draws() -> None:
    x0, _ = points(6)
    numbers = torch.arange(6)
    one = [build(sigmas=(0.5,), seed=seed).scores(x0, numbers) for seed in (0, 1)]
    assert not (one[0] == one[1]).any()
    log, density, auto = (
        build(sigmas=(0.0, 0.5), draws=3, pool=pool).scores(x0, numbers)
        for pool in ("log", "density", "auto")
    )
    assert (auto[:, 1] == log[:, 1]).all()
    assert (density[:, 1] > log[:, 1]).all()  # Jensen
    np.testing.assert_array_equal(log[:, 0], density[:, 0])  # nothing is random on clean, continuous data


def test_passes_are_counted() -> None:
    calls = []

    class Counting(Unnormalised):
        def log_density(self, x: Tensor, y: Tensor, sigma: Tensor | None = None) -> Tensor:
            calls.append(len(x))
            return super().log_density(x, y, sigma)

    config = ExactBayesConfig(sigmas=(0.0, 0.2), draws=4, tile=5)
    bayes = ExactBayes(Counting(UNKNOWN), POINTS, config)
    bayes.scores(points(10)[0], torch.arange(10))
    assert bayes.passes == 3 * (1 + 4)
    assert calls == [5] * (10 * bayes.passes // 5)


# -- what a score depends on ---------------------------------------------------------------------------------


class Network(UNet):
    """A real U-Net's mean output as a log-density."""

    def __init__(self) -> None:
        config = ADMConfig(32, (1, 2), 1, (2,), num_head_channels=16)
        super().__init__(config, 1, 1, 11)
        self.num_classes = 10

    def log_density(self, x: Tensor, y: Tensor, sigma: Tensor | None = None) -> Tensor:
        level = torch.zeros(len(x), dtype=torch.int64) if sigma is None else (sigma * 100).long()
        return self(x, level, y).flatten(1).sum(1)


def test_scores_depend_on_their_image_alone_bit_for_bit() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network()
    randomise(model, 0.1)
    info = DataInfo("test", (1, 8, 8), num_classes=10)
    x0 = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    bayes = ExactBayes(model.eval(), info, ExactBayesConfig(sigmas=(0.0, 0.2), draws=2, tile=16))
    numbers = torch.tensor([4, 9, 2, 33, 5, 6, 7])
    whole = bayes.scores(x0, numbers)
    assert len(np.unique(whole)) == whole.size
    for part in ([0], [3, 1], [6, 5, 4, 2]):
        assert (bayes.scores(x0[part], numbers[part]) == whole[part]).all()


# -- what is refused -----------------------------------------------------------------------------------------


def test_models_without_densities_or_labels_are_refused() -> None:
    with pytest.raises(UserError, match="exact Bayes classification needs `log_density`, which net does not"):
        ExactBayes(nn.Linear(1, 1), POINTS, ExactBayesConfig(), name="net")
    model = Unnormalised(UNKNOWN)
    model.num_classes = 0
    with pytest.raises(UserError, match="needs a class-conditional model: net has no labels"):
        ExactBayes(model, POINTS, ExactBayesConfig(), name="net")


def test_centring_says_what_it_lacks() -> None:
    scores = np.zeros((0, 1, 3))
    with pytest.raises(UserError, match="centre = mean needs held-out images; there are none"):
        Centring.fit(scores, None, "mean")
    with pytest.raises(UserError, match="centre = labels needs labelled held-out images"):
        Centring.fit(np.zeros((2, 1, 3)), None, "labels")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sigmas": ()}, "one or more"),
        ({"sigmas": (-1.0,)}, "at least 0"),
        ({"sigmas": (math.nan,)}, "finite"),
        ({"sigmas": (0.1, 0.1)}, "differ from one another"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"tile": 0}, "tile must be at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ExactBayesConfig(**settings).check()
