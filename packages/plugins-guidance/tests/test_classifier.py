"""The ordinary classifier and its objective."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_plugins_guidance.adm import NoisyClassifier
from cdm_plugins_guidance.adm_configs import ClassifierConfig as NoisyConfig
from cdm_plugins_guidance.classifier import Classification, Classifier, moved
from cdm_plugins_guidance.classifier_configs import ClassificationConfig, ResNetConfig

INFO = DataInfo("images", (1, 8, 8), num_classes=3)


def images(count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ResNetConfig.small(), INFO)


def test_logits_are_the_head_of_the_features_and_know_no_noise_level(model: Classifier) -> None:
    x = images()
    logits = model.class_logits(x, torch.full((5,), 3.0))
    torch.testing.assert_close(logits, model.head(model.features(x)))
    assert torch.equal(logits, model.class_logits(x, torch.zeros(5)))


def test_a_new_block_is_its_shortcut(model: Classifier) -> None:
    """The net begins as a chain of strided 1x1 convolutions behind the stem."""
    x = images()
    h = F.relu(model.norm(model.stem(x)))
    h = model.blocks[1].shortcut(h)
    torch.testing.assert_close(model.features(x), h.relu().mean((2, 3)))


def test_every_image_is_moved_by_itself() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    shown = moved(x, 1, False, Draws(0, 200))
    padded = F.pad(x[:1], (1, 1, 1, 1), mode="replicate")[0, 0]
    every = torch.stack([padded[r : r + 8, c : c + 8] for r in range(3) for c in range(3)])
    hits = (shown == every).flatten(2).all(2)
    assert bool((hits.sum(1) == 1).all())
    assert bool((hits.sum(0) > 10).all())  # all nine, about 22 times each


def test_half_of_the_images_are_mirrored() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    shown = moved(x, 0, True, Draws(1, 200))
    mirrored = (shown == x.flip(3)).flatten(1).all(1)
    assert bool((mirrored | (shown == x).flatten(1).all(1)).all())
    assert 70 < int(mirrored.sum()) < 130


def test_the_loss_is_the_cross_entropy_and_validation_moves_nothing(model: Classifier) -> None:
    x, y = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    objective = Classification(ClassificationConfig(smoothing=0.1))
    found = objective(model.eval(), x, y, Draws(0, 6))
    logits = model(x)
    q = 0.9 * F.one_hot(y, 3) + 0.1 / 3
    torch.testing.assert_close(found["loss"], -(q * logits.log_softmax(1)).sum(1).mean())
    assert float(found["accuracy"]) == float((logits.argmax(1) == y).float().mean())
    seen, _, _ = objective.prepare(model.train(), x, y, Draws(0, 6))
    assert not torch.equal(seen, x)


def test_a_noisy_classifier_is_shown_its_own_levels() -> None:
    torch.manual_seed(0)
    noisy = NoisyClassifier(NoisyConfig.small(), INFO)
    objective = Classification(ClassificationConfig(noisy=True, shift=0))
    x0, y = images(300), torch.arange(300) % 3
    x, sigma, _ = objective.prepare(noisy.train(), x0, y, Draws(0, 300))
    assert set(sigma.tolist()) == set(noisy.sigmas.float().tolist())
    standard = (x - x0) / sigma[:, None, None, None]
    assert abs(float(standard.mean())) < 0.04
    assert abs(float(standard.std()) - 1) < 0.03
    loss = objective(noisy.eval(), x0, y, Draws(1, 300))["ce"]
    x, sigma, _ = objective.prepare(noisy, x0, y, Draws(1, 300))
    torch.testing.assert_close(loss, F.cross_entropy(noisy.class_logits(x, sigma), y))


def test_what_it_cannot_do_is_said_in_a_line(model: Classifier) -> None:
    with pytest.raises(UserError, match="these have no labels"):
        Classification(ClassificationConfig())(model, images(), None, Draws(0, 5))
    with pytest.raises(UserError, match="'points' has none"):
        Classifier(ResNetConfig(), DataInfo("points", (1, 8, 8)))
    with pytest.raises(UserError, match="halve the images 4 times, too often for the 8x8 of 'images'"):
        Classifier(ResNetConfig(widths=(8,) * 5), INFO)
    with pytest.raises(UserError, match=r"objective\.noisy needs a classifier with noise levels"):
        Classification(ClassificationConfig(noisy=True))(model, images(), torch.zeros(5).long(), Draws(0, 5))
