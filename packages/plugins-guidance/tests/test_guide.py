"""The guide's values and gradients against float64 autograd, finite differences and a Gaussian mixture."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core.errors import UserError
from cdm_core.formats import filled
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws
from cdm_core.runs import ImageDraws
from cdm_plugins_guidance.guide import Guide
from cdm_plugins_guidance.guide_configs import ClassifierConfig, Contract, GuideConfig

K = 5


class Rows(nn.Module):
    """A smooth classifier in which a row's arithmetic does not depend on how many there are."""

    num_classes = K

    def __init__(self, channels: int = 2, size: int = 4, classes: int = K) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(classes, channels * size * size, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return torch.tanh(x.flatten(1)[:, None] * self.weight).sum(-1)


@pytest.fixture
def net() -> nn.Module:
    return Rows().eval()


def images(rows: int = 3, channels: int = 2, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, channels, size, size, generator=generator, dtype=torch.float64)


CLASSES = torch.tensor([0, 3, 4])
SOFT = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0], [1.0, 0, 0, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2]]).double()
SETS = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 0]]).bool()
TARGETS = {"classes": CLASSES, "soft": SOFT, "sets": SETS}


# -- in the logits -------------------------------------------------------------------------------------------


def softmax_ratio(f: Tensor, target: Tensor, tau1: float, tau2: float, away: bool) -> Tensor:
    """L as it is defined, row by row, for autograd to differentiate."""
    values = []
    for row, wanted in zip(f, target, strict=True):
        if target.dtype == torch.float64:
            energy = sum(q * logit for q, logit in zip(wanted, row, strict=True))
        else:
            named = {int(wanted)} if target.ndim == 1 else set(wanted.nonzero().flatten().tolist())
            chosen = [i for i in range(K) if (i in named) != away]
            energy = torch.stack([row[i].exp() for i in chosen]).sum().log()
        values.append(tau1 * energy - (tau2 * row).exp().sum().log())
    return torch.stack(values)


def sigmoid_ratio(f: Tensor, target: Tensor, tau1: float, tau2: float, away: bool) -> Tensor:
    values = []
    for row, wanted in zip(f, target, strict=True):
        if target.ndim == 1:
            logit, q = row[int(wanted)], float(not away)
            values.append(tau1 * q * logit - (1 + (tau2 * logit).exp()).log())
        else:
            q = 1 - wanted.double() if away else wanted.double()
            values.append((tau1 * q * row - (1 + (tau2 * row).exp()).log()).sum())
    return torch.stack(values)


def divergence(name: str, f: Tensor, target: Tensor, smoothing: float) -> Tensor:
    p = f.exp() / f.exp().sum(1, keepdim=True)
    q = (F.one_hot(target, K) if target.ndim == 1 else target).double()
    q = (1 - smoothing) * q / q.sum(1, keepdim=True) + smoothing / K
    m = (p + q) / 2
    return {
        "rkl": (q * (q / p).log()).sum(1),
        "fkl": (p * (p / q).log()).sum(1),
        "js": (p * (p / m).log()).sum(1) / 2 + (q * (q / m).log()).sum(1) / 2,
        "entropy": -(p * p.log()).sum(1),
    }[name]


def assert_as_autograd(config: GuideConfig, target: Tensor | None, expected) -> None:
    f = torch.randn(3, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    f.requires_grad_()
    guide = Guide(Rows().eval(), config)
    value = expected(f)
    (cotangent,) = torch.autograd.grad(value.sum(), f)
    torch.testing.assert_close(guide.value(f, target), value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(guide.cotangent(f, target), cotangent, rtol=1e-12, atol=1e-13)
    (through,) = torch.autograd.grad(guide.value(f, target).sum(), f)
    torch.testing.assert_close(through, cotangent, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("taus", [(1.0, 1.0), (1.0, 0.5), (0.7, 1.3), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize(
    ("wanted", "likelihood", "target"),
    [
        (wanted, likelihood, target)
        for wanted in ("class", "not_class")
        for likelihood in ("softmax", "sigmoid")
        for target in TARGETS
        if (wanted, likelihood, target) != ("not_class", "softmax", "soft")
    ],
)
def test_the_ratio_and_its_cotangent(wanted, likelihood, target, taus) -> None:
    config = GuideConfig(target=wanted, likelihood=likelihood, tau1=taus[0], tau2=taus[1])
    ratio = softmax_ratio if likelihood == "softmax" else sigmoid_ratio
    labels, away = TARGETS[target], wanted == "not_class"
    assert_as_autograd(config, labels, lambda f: ratio(f, labels, *taus, away))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["rkl", "fkl", "js", "entropy"])
def test_regularisers(name, target) -> None:
    config = GuideConfig(tau2=0.5, alpha=0.3, regulariser=name, smoothing=0.2)
    labels = TARGETS[target]
    assert_as_autograd(
        config,
        labels,
        lambda f: softmax_ratio(f, labels, 1.0, 0.5, False) - 0.3 * divergence(name, f, labels, 0.2),
    )


def test_the_reverse_divergence_pulls_by_q_minus_p() -> None:
    f = torch.randn(3, K, dtype=torch.float64)
    with_it, without = (Guide(Rows().eval(), GuideConfig(alpha=a, smoothing=0.1)) for a in (1.0, 0.0))
    q = 0.9 * F.one_hot(CLASSES, K).double() + 0.1 / K
    difference = with_it.cotangent(f, CLASSES) - without.cotangent(f, CLASSES)
    torch.testing.assert_close(difference, q - f.softmax(1), rtol=1e-12, atol=1e-12)


def test_a_regulariser_away_from_a_class_smooths_its_complement() -> None:
    config = GuideConfig(target="not_class", alpha=0.3, smoothing=0.2)
    others = ~F.one_hot(CLASSES, K).bool()
    f = torch.randn(3, K, dtype=torch.float64)
    as_sets = Guide(Rows().eval(), replace(config, target="class"))
    away = Guide(Rows().eval(), config)
    torch.testing.assert_close(away.value(f, CLASSES), as_sets.value(f, others), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        away.cotangent(f, CLASSES), as_sets.cotangent(f, others), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("tilt", [-0.2, 0.5])
def test_tilt_weighs_each_row_by_its_own_likelihood(tilt) -> None:
    def expected(f: Tensor) -> Tensor:
        return (1 - (-tilt * softmax_ratio(f, CLASSES, 1.0, 1.0, False)).exp()) / tilt

    assert_as_autograd(GuideConfig(tilt=tilt), CLASSES, expected)


def test_no_label_minimises_the_entropy() -> None:
    def expected(f: Tensor) -> Tensor:
        p = f.softmax(1)
        return 0.5 * (p * p.log()).sum(1)

    assert_as_autograd(GuideConfig(target="none", tau1=0.5), None, expected)


def test_both_temperatures_one_is_log_softmax_and_none_the_joint_energy(net) -> None:
    f = torch.randn(3, K, dtype=torch.float64)
    conditional, joint = Guide(net), Guide(net, GuideConfig(tau1=0.8, tau2=0.0))
    torch.testing.assert_close(
        conditional.value(f, CLASSES), f.log_softmax(1).gather(1, CLASSES[:, None])[:, 0]
    )
    assert torch.equal(joint.cotangent(f, CLASSES), 0.8 * F.one_hot(CLASSES, K).double())


def test_discount_is_the_second_temperature_over_the_first(net) -> None:
    f = torch.randn(3, K, dtype=torch.float64)
    one = Guide(net, GuideConfig(tau1=0.8, discount=0.5))
    other = Guide(net, GuideConfig(tau1=0.8, tau2=0.4))
    assert torch.equal(one.value(f, CLASSES), other.value(f, CLASSES))


def test_logits_beyond_the_range_of_exp(net) -> None:
    f = torch.tensor([[200.0, 0.0, -200.0, 90.0, 0.0]])
    for config in (GuideConfig(), GuideConfig(target="not_class"), GuideConfig(alpha=1.0, regulariser="js")):
        guide, target = Guide(net, config), torch.tensor([0])
        assert guide.value(f, target).isfinite().all()
        assert guide.cotangent(f, target).isfinite().all()


# -- in x ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture() -> GaussianMixture:
    generator = torch.Generator().manual_seed(4)
    factors = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    covariances = factors @ factors.mT / 4 + 0.2 * torch.eye(4)
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2]), means, covariances).eval()


def test_of_a_mixture_it_is_the_difference_of_two_scores(mixture) -> None:
    x = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    sigma, y = torch.linspace(0.1, 2, 6, dtype=torch.float64), torch.arange(6) % 3
    guide = Guide(mixture)
    assert guide.noise_aware
    graded = guide.gradient(x, y, sigma)
    exact = mixture.score(x, sigma, y) - mixture.score(x, sigma)
    torch.testing.assert_close(graded.gradient, exact, rtol=1e-9, atol=1e-10)
    exact_value = mixture.class_logits(x, sigma).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(graded.value, exact_value, rtol=1e-9, atol=1e-10)
    clean = mixture.score(x, 0.0, y) - mixture.score(x, 0.0)
    torch.testing.assert_close(guide.gradient(x, y).gradient, clean, rtol=1e-9, atol=1e-10)


def test_any_of_two_components_is_the_score_of_their_mixture(mixture) -> None:
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    sigma = torch.full((4,), 0.7, dtype=torch.float64)
    two = GaussianMixture(mixture.weights[:2], mixture.means[:2], mixture.covariances[:2])
    chosen = torch.tensor([[True, True, False]]).expand(4, 3)
    exact = two.score(x, sigma) - mixture.score(x, sigma)
    torch.testing.assert_close(
        Guide(mixture).gradient(x, chosen, sigma).gradient, exact, rtol=1e-9, atol=1e-10
    )
    away = Guide(mixture, GuideConfig(target="not_class")).gradient(x, torch.full((4,), 2), sigma).gradient
    torch.testing.assert_close(away, exact, rtol=1e-9, atol=1e-10)


CONTRACT = Contract((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 6, 3)
SETTINGS = {
    "raw": GuideConfig(discount=0.5),
    "normalised": GuideConfig(input="normalised"),
    "resized": GuideConfig(input="normalised", size=-1, antialias=False, alpha=0.2, regulariser="fkl"),
    "weighted": GuideConfig(class_weights=(1.0, 1.5, 0.5, 2.0, -1.0)),
    "copies": GuideConfig(copies=3, noise=0.3, flip=True, shift=2),
    "probability": GuideConfig(copies=3, noise=0.3, flip=True, shift=1, average="probability"),
    "micro": GuideConfig(copies=2, noise=0.1, micro_batch=2),
}


def guide_of(name: str, **changes) -> tuple[Guide, Tensor]:
    """A guide with the settings `name`, and grey images where it repeats their channel."""
    config = replace(SETTINGS[name], **changes)
    if config.input == "raw":
        return Guide(Rows().eval(), config), images()
    net = Rows(3, 6 if config.size else 4).eval()
    net.contract = CONTRACT
    return Guide(net, config), images(channels=1)


@pytest.mark.parametrize("name", SETTINGS)
def test_against_finite_differences(name) -> None:
    guide, x = guide_of(name, compensate=False, class_weights=())
    gradient, step = guide.gradient(x, CLASSES).gradient, 1e-5
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ahead, behind = (guide.gradient(x + s * direction, CLASSES).value for s in (step, -step))
    slope = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", SETTINGS)
def test_differentiable_sends_back_the_same_gradient(name) -> None:
    guide, x = guide_of(name)
    graded = guide.gradient(x, CLASSES)
    x.requires_grad_()
    value = guide.differentiable(2 * x, CLASSES)
    torch.testing.assert_close(value, guide.gradient(2 * x, CLASSES).value, rtol=1e-12, atol=1e-12)
    (through,) = torch.autograd.grad(guide.differentiable(x, CLASSES).sum(), x)
    torch.testing.assert_close(through, graded.gradient, rtol=1e-11, atol=1e-12)


def test_through_a_denoiser(net) -> None:
    guide, x = Guide(net), images().requires_grad_()
    (through,) = torch.autograd.grad(guide.differentiable(x.sin(), CLASSES).sum(), x)
    expected = guide.gradient(x.sin(), CLASSES).gradient * x.cos()
    torch.testing.assert_close(through, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_is_the_same_alone_or_in_a_batch(name) -> None:
    guide, x = guide_of(name)
    together = guide.gradient(x, CLASSES)
    for row in range(len(x)):
        alone = guide.gradient(x[row : row + 1], CLASSES[row : row + 1])
        for part, whole in zip(alone, together, strict=True):
            assert torch.equal(part[0], whole[row])


def test_draws_of_every_image_stay_with_it() -> None:
    guide = Guide(Rows().eval(), GuideConfig(copies=4, noise=0.5, flip=True, shift=1))
    x = images()
    together = guide.gradient(x, CLASSES, draws=ImageDraws(7, [10, 11, 12])).gradient
    alone = guide.gradient(x[1:2], CLASSES[1:2], draws=ImageDraws(7, [11])).gradient
    assert torch.equal(alone[0], together[1])
    shared = guide.gradient(x, CLASSES, draws=Draws(7, 1)).gradient
    assert not torch.equal(shared[1], together[1])
    with pytest.raises(UserError, match="of 1 row or of 3"):
        guide.gradient(x, CLASSES, draws=Draws(7, 2))


def test_perturbed_copies_are_what_they_say() -> None:
    """Against a loop over the copies with the same draws."""
    guide, x = Guide(Rows().eval(), GuideConfig(copies=6, noise=0.2, flip=True, shift=2)), images()
    draws = ImageDraws(3, [0, 1, 2])
    noise, flips, shifts = draws.normal(6, 2, 4, 4), draws.integers(2, 6), draws.integers(5, 6, 2) - 2
    plain, values = Guide(Rows().eval()), torch.zeros(3, dtype=torch.float64)
    for copy in range(6):
        moved = x + (0.2 * noise[:, copy]).double()
        for row in range(3):
            image = moved[row].flip(-1) if flips[row, copy] else moved[row]
            down, right = shifts[row, copy].tolist()
            padded = F.pad(image[None], (2, 2, 2, 2), mode="replicate")[0]
            moved[row] = padded[:, 2 - down : 6 - down, 2 - right : 6 - right]
        values += plain.gradient(moved, CLASSES).value / 6
    graded = guide.gradient(x, CLASSES, draws=ImageDraws(3, [0, 1, 2]))
    torch.testing.assert_close(graded.value, values, rtol=1e-12, atol=1e-12)


def test_the_average_of_probabilities_is_that_of_exp() -> None:
    x, config = images(), GuideConfig(copies=3, noise=0.3, average="probability")
    noise = (Draws(2, 1).normal(3, 2, 4, 4)[0] * 0.3).double()
    plain = Guide(Rows().eval())
    values = torch.stack([plain.gradient(x + n, CLASSES).value for n in noise])
    graded = Guide(Rows().eval(), config).gradient(x, CLASSES, draws=Draws(2, 1))
    torch.testing.assert_close(graded.value, values.exp().mean(0).log(), rtol=1e-12, atol=1e-12)


def test_micro_batches_bound_what_the_classifier_sees() -> None:
    net, x = Rows().eval(), images(5)
    labels = torch.arange(5)
    whole = Guide(net).gradient(x, labels)
    net.seen.clear()
    parts = Guide(net, GuideConfig(micro_batch=2)).gradient(x, labels)
    assert net.seen == [2, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_second_derivative_raises(net) -> None:
    x = images().requires_grad_()
    value = Guide(net).differentiable(x, CLASSES)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()


def test_nothing_is_left_behind(net) -> None:
    x = images().requires_grad_()
    with torch.no_grad():
        graded = Guide(net).gradient(x, CLASSES)
    assert not any(part.requires_grad for part in graded)
    assert x.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_float32_whatever_autocast_says() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, K)).eval()
    guide, x = Guide(net), images().float()
    plain = guide.gradient(x, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        cast = guide.gradient(x, CLASSES)
        through = guide.differentiable(x.requires_grad_(), CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    assert torch.equal(through, plain.value)
    half = guide.gradient(x.detach().half(), CLASSES)
    assert half.gradient.dtype == torch.float16
    assert half.value.dtype == half.logits.dtype == torch.float32


class Breaks(nn.Module):
    """Rows whose first pixel is above 10 have no finite logits."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return flat * torch.where(flat[:, :1] > 10, math.nan, 1.0)


def test_rows_without_a_finite_gradient_are_skipped_and_counted() -> None:
    guide, x = Guide(Breaks().eval()), torch.zeros(3, 1, 2, 2)
    labels = torch.tensor([0, 1, 2])
    whole = guide.gradient(x, labels)
    assert guide.skipped == 0
    x[1, 0, 0, 0] = 11
    graded = guide.gradient(x, labels)
    assert guide.skipped == 1
    assert torch.equal(graded.gradient[1], torch.zeros(1, 2, 2))
    assert torch.equal(graded.gradient[::2], whole.gradient[::2])
    x.requires_grad_()
    guide.differentiable(x, labels).sum().backward()
    assert guide.skipped == 2
    assert torch.equal(x.grad, graded.gradient)


def test_class_weights_multiply_the_gradient_alone(net) -> None:
    x, weights = images(), (1.0, 1.5, 0.5, 2.0, 0.0)
    plain, weighted = Guide(net).gradient(x, CLASSES), Guide(net, GuideConfig(class_weights=weights))
    factor = torch.tensor([1.0, 2.0, 0.0]).view(3, 1, 1, 1)
    assert torch.equal(weighted.gradient(x, CLASSES).gradient, plain.gradient * factor)
    assert torch.equal(weighted.gradient(x, CLASSES).value, plain.value)
    soft = weighted.gradient(x, SETS).gradient / Guide(net).gradient(x, SETS).gradient
    torch.testing.assert_close(soft[:, 0, 0, 0], torch.tensor([1.25, 2.0, 1.25]).double())


# -- what the classifier is fed ------------------------------------------------------------------------------


class Linear(nn.Module):
    """One weight a pixel and class."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, K)
        self.fed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.fed = x
        return self.layer(x.flatten(1))


def test_normalised_is_what_the_weights_were_trained_on() -> None:
    net = Linear().eval()
    x = torch.rand(2, 3, 2, 2) * 2 - 1
    guide = Guide(net, GuideConfig(input="normalised", mean=CONTRACT.mean, std=CONTRACT.std))
    guide.logits(x)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CONTRACT.mean, CONTRACT.std))
    torch.testing.assert_close(net.fed, ((x + 1) / 2 - mean) / std)
    Guide(net).logits(x)
    assert torch.equal(net.fed, x)


def test_compensation_lets_a_scale_keep_its_meaning() -> None:
    """Of a linear joint energy the gradient is the weights: raw and compensated agree where std is one."""
    net, x = Linear().eval(), torch.rand(2, 3, 2, 2)
    y, joint = torch.tensor([1, 2]), GuideConfig(tau2=0.0)
    fed = replace(joint, input="normalised", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    raw = Guide(net, joint).gradient(x, y).gradient
    torch.testing.assert_close(Guide(net, fed).gradient(x, y).gradient, raw)
    bare = Guide(net, replace(fed, compensate=False)).gradient(x, y).gradient
    torch.testing.assert_close(bare, 2.5 * raw)


def test_grey_images_are_repeated_and_resized_and_latents_decoded() -> None:
    net = Linear().eval()
    net.contract = Contract(size=2, channels=3)
    grey = torch.rand(2, 1, 4, 4)
    Guide(net, GuideConfig(size=-1)).logits(grey)
    torch.testing.assert_close(
        net.fed, F.interpolate(grey, (2, 2), mode="bilinear", antialias=True).expand(2, 3, 2, 2)
    )
    guide = Guide(net, GuideConfig(size=2), decode=lambda z: z.repeat(1, 1, 2, 2).tanh())
    latent = torch.rand(2, 1, 2, 2)
    graded = guide.gradient(latent, torch.tensor([0, 1]))
    assert torch.equal(graded.logits, guide.logits(latent))
    decoded = F.interpolate(latent.repeat(1, 1, 2, 2).tanh(), (2, 2), mode="bilinear", antialias=True)
    torch.testing.assert_close(net.fed, decoded.expand(2, 3, 2, 2))


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoothing": 1.5}, "smoothing must lie"),
        ({"alpha": 1.0, "regulariser": "fkl", "smoothing": 0.0}, "smoothing must be above 0"),
        ({"likelihood": "sigmoid", "alpha": 1.0}, "sigmoid"),
        ({"target": "none", "tilt": 0.1}, "target 'none' is the entropy alone"),
        ({"mean": (0.5,), "std": (0.5,)}, "input 'normalised'"),
        ({"input": "normalised", "mean": (0.5,), "std": (0.0,)}, "std above 0"),
        ({"copies": 2}, "copies without noise"),
        ({"copies": 0}, "copies must be at least 1"),
        ({"size": -2}, "size must be"),
        ({"tau1": math.inf}, "must be finite"),
        ({"class_weights": (math.nan,)}, "class_weights must be finite"),
        ({"input": "normalised"}, "does not say its mean and std"),
        ({"size": -1}, "does not say its own size"),
    ],
)
def test_settings_out_of_range(net, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        Guide(net, GuideConfig(**changes))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "needs a class"),
        (torch.tensor([0, 1, 5]), "classes are 0 to 4"),
        (torch.tensor([0, -1, 2]), "classes are 0 to 4"),
        (torch.tensor([0, 1]), "2 targets for 3 images"),
        (torch.zeros(3, 4), r"target is \(B,\) int64"),
        (torch.zeros(3, K, dtype=torch.int32), r"target is \(B,\) int64"),
        (torch.zeros(3, K).bool(), "leaves no class"),
        (torch.zeros(3, K), "leaves no class"),
    ],
)
def test_targets_that_are_none(net, target, message) -> None:
    for act in (Guide(net).gradient, Guide(net).differentiable):
        with pytest.raises(UserError, match=message):
            act(images(), target)


def test_targets_against_the_settings(net) -> None:
    away = Guide(net, GuideConfig(target="not_class"))
    with pytest.raises(UserError, match="not float labels"):
        away.gradient(images(), SOFT)
    with pytest.raises(UserError, match="leaves no class"):
        away.gradient(images(), torch.ones(3, K).bool())
    with pytest.raises(UserError, match="class_weights has 2 entries"):
        Guide(net, GuideConfig(class_weights=(1.0, 2.0))).gradient(images(), CLASSES)


def test_classifiers_that_cannot_guide(mixture) -> None:
    with pytest.raises(UserError, match="training mode"):
        Guide(Rows())
    net = Rows().eval()
    guide = Guide(net)
    net.train()
    with pytest.raises(UserError, match="training mode"):
        guide.gradient(images(), CLASSES)
    with pytest.raises(UserError, match="must return logits"):
        Guide(nn.Conv2d(2, 2, 1).double().eval()).gradient(images(), CLASSES)
    with pytest.raises(UserError, match="not str"):
        Guide("resnet50")
    with pytest.raises(UserError, match="fed noisy x as it comes"):
        Guide(mixture, GuideConfig(size=8))
    with pytest.raises(UserError, match="takes 3 channels, not 2"):
        Guide(Rows().eval(), GuideConfig(channels=3)).gradient(images(), CLASSES)


def test_a_classifier_without_a_gradient() -> None:
    class Cut(Rows):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(UserError, match="has no gradient"):
        Guide(Cut().eval()).gradient(images(), CLASSES)


def test_the_number_of_classes_is_learnt_where_it_is_not_said() -> None:
    guide = Guide(Linear().eval())
    with pytest.raises(UserError, match="once it has seen an image"):
        _ = guide.num_classes
    with pytest.raises(UserError, match="classes are 0 to 4"):
        guide.gradient(torch.zeros(1, 3, 2, 2), torch.tensor([9]))
    assert guide.num_classes == K


def test_the_settings_are_filled_from_text() -> None:
    values = {"discount": 0.5, "class_weights": [1.0, 2.0], "target": "not_class", "input": "normalised"}
    config = filled(GuideConfig, values, "guide", "--set")
    assert (config.second_tau, config.class_weights) == (0.5, (1.0, 2.0))
    with pytest.raises(UserError, match=r"guide\.smoothing must lie"):
        filled(GuideConfig, {"smoothing": 2.0}, "guide", "--set")
    classifier = filled(ClassifierConfig, {"name": "torchvision:resnet50", "softplus": 3.0}, "guide", "--set")
    assert classifier.softplus == 3.0


def test_the_settings_import_no_torch() -> None:
    code = "import sys, cdm_plugins_guidance.guide_configs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
