"""ADM's networks as models: what they are built for, and how they are asked in variance-exploding units."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cdm_core import samplers, schedules
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.testing.conformance import randomise
from cdm_plugins_guidance.adm import ADM, NoisyClassifier, make_path
from cdm_plugins_guidance.adm_configs import ClassifierConfig, UNetConfig

DIGITS = DataInfo("digits", (1, 8, 8), 10)
COLOUR = DataInfo("colour", (3, 8, 8), 10)


def build(info: DataInfo = COLOUR, **changes: Any) -> ADM:
    torch.manual_seed(0)
    config = dataclasses.replace(UNetConfig.small(), **changes)
    config.check()
    model = ADM(config, info)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("info", [DIGITS, COLOUR], ids=["grey", "colour"])
def test_the_network_fits_its_images(info: DataInfo, learn_sigma: bool) -> None:
    model = build(info, learn_sigma=learn_sigma)
    x, y = torch.randn(2, *info.shape), torch.tensor([0, 9])
    out = model(model.path.to_path(x, torch.tensor([3, 12])), torch.tensor([3, 12]), y)
    value, variance = model.predict(x, model.sigmas[[3, 12]].float(), y)
    eps = out[:, : info.shape[0]]
    sigma = model.sigmas[[3, 12]].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(value, x - sigma * eps, rtol=1e-4, atol=1e-4)
    if learn_sigma:
        torch.testing.assert_close(variance, (out[:, info.shape[0] :] + 1) / 2)
    else:
        assert variance is None
        assert out.shape == x.shape


def test_the_schedules_are_those_of_guided_diffusion() -> None:
    """`linear` keeps its total noise however many steps there are."""
    config = UNetConfig(noise_schedule="linear")
    left = {
        T: float(make_path(dataclasses.replace(config, diffusion_steps=T)).alpha[-2] ** 2)
        for T in (1000, 250)
    }
    assert left[1000] == pytest.approx(4.0358e-5, rel=1e-4)
    assert left[250] == pytest.approx(left[1000], rel=0.3)
    betas = 1 - (make_path(config).alpha[1:-1] / make_path(config).alpha[:-2]) ** 2
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    cosine = make_path(UNetConfig())
    torch.testing.assert_close(cosine.alpha, schedules.cosine(1000).alpha)


def test_a_respaced_network_is_asked_at_the_levels_that_are_left() -> None:
    full, respaced = build(), build(timestep_respacing="ddim5")
    assert respaced.timesteps.tolist() == [0, 4, 8, 12, 16]
    assert torch.equal(respaced.sigmas, full.sigmas[::4])
    assert len(respaced.path) == 20  # it is trained on all of them
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    for sigma in (full.sigmas[[4, 16]], full.sigmas[[5, 19]]):
        expected = full.denoise(x, full.sigmas[[4, 16]].float(), y)
        torch.testing.assert_close(respaced.denoise(x, sigma.float(), y), expected)


def test_without_a_null_class_labels_are_needed() -> None:
    x, sigma, y = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 4.0]), torch.tensor([0, 9])
    released = build(null_class=False)
    assert released.label_emb.num_embeddings == 10
    assert released.null_label is None
    with pytest.raises(UserError, match="give it labels"):
        released.denoise(x, sigma)
    free = build(null_class=True)
    assert free.label_emb.num_embeddings == 11
    assert torch.equal(free.denoise(x, sigma), free.denoise(x, sigma, torch.tensor([10, 10])))
    assert not torch.equal(free.denoise(x, sigma), free.denoise(x, sigma, y))
    with pytest.raises(UserError, match="takes no labels"):
        build(class_cond=False, null_class=False).denoise(x, sigma, y)


def test_samples_of_a_class_with_the_learned_variance() -> None:
    """Every sample is its own function of its noise and class."""
    model = build()
    sigmas = schedules.grid(model.sigmas, 4)
    torch.manual_seed(3)
    x, fresh, y = (
        torch.randn(3, 3, 8, 8) * sigmas[0].float(),
        torch.randn(4, 3, 3, 8, 8),
        torch.tensor([4, 4, 7]),
    )

    def walk(rows: list[int]) -> torch.Tensor:
        noise = iter(fresh[:, rows])
        return samplers.ddpm(
            samplers.Conditional(model, y[rows]), x[rows], sigmas, noise=lambda x: next(noise)
        )

    together = walk([0, 1, 2])
    torch.testing.assert_close(torch.cat([walk([i]) for i in range(3)]), together, rtol=1e-3, atol=1e-3)
    assert bool(together.isfinite().all())


def test_the_classifier_scales_its_input_and_its_time() -> None:
    torch.manual_seed(0)
    model = NoisyClassifier(ClassifierConfig.small(), COLOUR)
    randomise(model)
    model.eval()
    x, sigma = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 0.7, 1e4])
    t = torch.tensor([0, int((model.sigmas.log() - torch.tensor(0.7).log()).abs().argmin()), 19])
    x_t = model.path.alpha[t].float().view(-1, 1, 1, 1) * x
    torch.testing.assert_close(model.class_logits(x, sigma), model(x_t, t))
    x.requires_grad_()
    loss = F.cross_entropy(model.class_logits(x, sigma), torch.tensor([1, 2, 3]), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    assert bool(gradient.flatten(1).any(1).all())


def test_a_classifier_learns_classes_through_noise() -> None:
    """Two classes that differ in their mean brightness, told apart at every level but the noisiest."""
    torch.manual_seed(0)
    model = NoisyClassifier(ClassifierConfig.small(), DataInfo("halves", (1, 8, 8), 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def noisy(rows: int, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, t = torch.randint(2, (rows,)), torch.randint(most, (rows,))
        x0 = (y * 1.0 - 0.5).view(-1, 1, 1, 1) + 0.1 * torch.randn(rows, 1, 8, 8)
        sigma = model.sigmas[t].float()
        return x0 + sigma.view(-1, 1, 1, 1) * torch.randn_like(x0), sigma, y

    for _ in range(60):
        x, sigma, y = noisy(32, 20)
        loss = F.cross_entropy(model.class_logits(x, sigma), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    x, sigma, y = noisy(200, 15)
    with torch.no_grad():
        assert float((model.class_logits(x, sigma).argmax(1) == y).float().mean()) > 0.95


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ADM(UNetConfig.small(), DataInfo("plain", (3, 8, 8))), "class_cond needs labels"),
        (lambda: ADM(UNetConfig.small(), DataInfo("odd", (3, 9, 8), 4)), "does not divide the 9x8"),
        (lambda: NoisyClassifier(ClassifierConfig.small(), DataInfo("plain", (3, 8, 8))), "needs classes"),
        (lambda: NoisyClassifier(ClassifierConfig.small(), DataInfo("wide", (3, 8, 16), 4)), "square images"),
    ],
)
def test_data_that_do_not_fit_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (UNetConfig(null_class=True), "null_class needs class_cond"),
        (UNetConfig(diffusion_steps=1), "diffusion_steps"),
        (UNetConfig(noise_schedule="linear", diffusion_steps=20), "beta_end"),
        (ClassifierConfig(num_head_channels=-1), "num_head_channels"),
    ],
)
def test_settings_are_checked(config: Any, words: str) -> None:
    UNetConfig().check()
    ClassifierConfig().check()
    with pytest.raises(ValueError, match=words):
        config.check()
