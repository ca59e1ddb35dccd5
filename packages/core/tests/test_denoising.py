"""The losses of networks on discrete levels: against distributions of PyTorch, and each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdm_core import samplers, schedules
from cdm_core.denoisers import DiscreteDenoiser, Output
from cdm_core.denoising import DenoisingObjective, drop_labels, log_grey_level, moments
from cdm_core.denoising_configs import DenoisingConfig
from cdm_core.errors import UserError
from cdm_core.random import Draws

PATH = schedules.cosine(30)
ROWS = 30


class Linear(nn.Module):
    """A prediction that is linear in x_t, with an offset a class."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, outputs, 1)
        self.label_emb = nn.Embedding(5, outputs)
        self.seen: list[Tensor | None] = []

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.seen.append(y)
        out = self.mix(x_t) * (1 + t.to(x_t.dtype).view(-1, 1, 1, 1) / 30)
        return out if y is None else out + self.label_emb(y)[:, :, None, None]


class Model(DiscreteDenoiser, Linear):
    def __init__(self, predicts: Any = "eps", learned: bool = False, **process: Any) -> None:
        torch.manual_seed(0)
        super().__init__(2 * (1 + learned))
        self.double()
        self.set_process(PATH, predicts=predicts, learned_variance=learned, **process)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, x_t, t, eps: grey levels as 8-bit images have them, every t once."""
    torch.manual_seed(1)
    x0 = torch.randint(256, (ROWS, 2, 3, 3)).double() / 127.5 - 1
    eps, t = torch.randn_like(x0), torch.arange(ROWS)
    return x0, Model().path.noised(x0, t, eps), t, eps


def step(t: int) -> samplers.Step:
    """From level t to t - 1, as a sampler takes it."""
    sigmas = [0.0, *Model().path.ve_sigma.tolist()]
    return samplers.Step(0, 1, sigmas[t + 1], sigmas[t])


def test_the_moments_are_those_of_the_ancestral_sampler() -> None:
    share, small, large = moments(Model().path)
    for t in range(1, ROWS):
        assert math.isclose(share[t], 1 - (step(t).next / step(t).sigma) ** 2, rel_tol=1e-9)
        assert math.isclose(small[t].exp(), step(t).small, rel_tol=1e-9)
        assert math.isclose(large[t].exp(), step(t).large, rel_tol=1e-9)
    alpha, sigma = Model().path.alpha, Model().path.sigma
    assert share[0] == 1
    assert math.isclose(large[0].exp(), sigma[0] ** 2, rel_tol=1e-9)  # beta_1
    beta = 1 - (alpha[1] / alpha[0]) ** 2
    assert math.isclose(small[0].exp(), beta * sigma[0] ** 2 / sigma[1] ** 2, rel_tol=1e-9)  # beta~_2


@pytest.mark.parametrize("kind", ["learned", "small", "large"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_bound_is_a_divergence_of_normal_distributions(kind: Any, predicts: Any) -> None:
    """In the path's own scale, from the published coefficients (Ho et al. 2020, eq. 6 and 7)."""
    model = Model(predicts, kind == "learned")
    x0, x_t, t, _ = batch()
    fixed = "large" if kind == "learned" else kind
    out = model.output(x_t, t)
    bits = DenoisingObjective(DenoisingConfig(fixed_variance=fixed)).bound(model, out, x0, x_t, t)
    signal = model.path.alpha**2
    before = torch.cat([torch.ones(1).double(), signal[:-1]])
    beta = (1 - signal / before)[1:].view(-1, 1, 1, 1)
    posterior = ((1 - before) / (1 - signal))[1:].view(-1, 1, 1, 1) * beta
    of_x0 = (before.sqrt() / (1 - signal))[1:].view(-1, 1, 1, 1) * beta
    offset = ((signal / before).sqrt() * (1 - before) / (1 - signal))[1:].view(-1, 1, 1, 1) * x_t[1:]
    guess = model.to_x0(out.value, x_t, t)[1:]
    if out.variance is None:
        variance = posterior if kind == "small" else beta
    else:
        variance = beta ** out.variance[1:] * posterior ** (1 - out.variance[1:])
    true = torch.distributions.Normal(of_x0 * x0[1:] + offset, posterior.sqrt())
    ours = torch.distributions.Normal(of_x0 * guess + offset, variance.sqrt())
    nats = torch.distributions.kl_divergence(true, ours).flatten(1).mean(1)
    torch.testing.assert_close(bits[1:], nats / math.log(2), rtol=1e-6, atol=1e-9)


def test_the_last_step_is_the_probability_of_the_grey_level() -> None:
    model = Model(learned=True)
    x0, x_t, t, _ = batch()
    out = model.output(x_t[:1], t[:1])
    bits = DenoisingObjective(DenoisingConfig()).bound(model, out, x0[:1], x_t[:1], t[:1])
    _, small, large = (row[0] for row in moments(model.path))
    assert out.variance is not None
    log_std = (out.variance * large + (1 - out.variance) * small) / 2
    expected = log_grey_level(x0[:1], model.to_x0(out.value, x_t[:1], t[:1]), log_std)
    torch.testing.assert_close(bits, -expected.flatten(1).mean(1) / math.log(2))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_grey_levels_have_the_masses_of_their_cells(levels: int) -> None:
    x0 = (torch.arange(levels).double() / (levels - 1) * 2 - 1)[None]
    mean, log_std = (
        torch.tensor([[-1.2], [0.13], [0.9]]).double(),
        torch.tensor([[-3.0], [-1.0], [0.5]]).double(),
    )
    mass = log_grey_level(x0.expand(3, -1), mean.expand(3, levels), log_std.expand(3, levels), levels).exp()
    torch.testing.assert_close(mass.sum(1), torch.ones(3).double(), rtol=0, atol=1e-9 * levels)
    normal, half = torch.distributions.Normal(mean, log_std.exp()), 1 / (levels - 1)
    edges = normal.cdf(torch.cat([x0 - half, x0[:, -1:] + half], 1))
    edges[:, 0], edges[:, -1] = 0, 1
    torch.testing.assert_close(mass, edges.diff(), rtol=0, atol=5e-4)  # an approximate distribution function
    far = log_grey_level(torch.tensor(0.0), torch.tensor(9.0), torch.tensor(-9.0))
    assert math.isclose(far, math.log(1e-12), rel_tol=1e-6)  # never -inf


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_squared_error_is_of_what_the_network_predicts(predicts: Any) -> None:
    model = Model(predicts)
    x0, x_t, t, eps = batch()
    terms = DenoisingObjective(DenoisingConfig()).loss(model, x0, x_t, t, eps, None)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in (model.path.alpha, model.path.sigma))
    target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[predicts]
    torch.testing.assert_close(terms["loss"], (model(x_t, t) - target).square().mean())
    assert terms.keys() == {"loss", "mse"}


@pytest.mark.parametrize("weight", ["min-snr", "p2"])
def test_a_weight_means_the_same_whatever_is_predicted(weight: Any) -> None:
    """Networks that say the same of x0 have the same loss."""
    x0, x_t, t, eps = batch()
    objective = DenoisingObjective(DenoisingConfig(weight=weight, min_snr_gamma=3.0, p2_gamma=0.7, p2_k=2.0))
    base = Model("eps")
    guess = base.to_x0(base(x_t, t), x_t, t)
    snr = (base.path.alpha / base.path.sigma) ** 2
    of_x0 = snr.clamp(max=3) if weight == "min-snr" else snr / (2 + snr) ** 0.7
    expected = (of_x0 * (guess - x0).square().flatten(1).mean(1)).mean()
    for predicts in ("eps", "x0", "v"):
        model = Model(predicts)
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in (model.path.alpha, model.path.sigma))
        noise = (x_t - alpha * guess) / sigma
        value = {"eps": noise, "x0": guess, "v": alpha * noise - sigma * guess}[predicts]
        model.output = lambda *args, v=value: Output(v, None)  # type: ignore[method-assign]
        torch.testing.assert_close(objective.loss(model, x0, x_t, t, eps, None)["loss"], expected)


def test_without_a_weight_every_level_counts_alike() -> None:
    weights = DenoisingObjective(DenoisingConfig()).weights(Model(), torch.arange(ROWS))
    assert torch.equal(weights, torch.ones(ROWS).double())


def test_the_bound_trains_the_variance_alone() -> None:
    model = Model(learned=True)
    x0, x_t, t, eps = batch()
    gradients = []
    for weight in (0.0, 0.01):
        model.zero_grad()
        DenoisingObjective(DenoisingConfig(vlb_weight=weight)).loss(model, x0, x_t, t, eps, None)[
            "loss"
        ].backward()
        gradients.append(model.mix.weight.grad.clone())
    torch.testing.assert_close(gradients[0][:2], gradients[1][:2])
    assert not gradients[0][2:].any()
    assert bool(gradients[1][2:].all())


def test_the_hybrid_is_the_sum_of_its_parts() -> None:
    model, rows = Model(learned=True), batch()
    x0, x_t, t, eps = rows
    hybrid = DenoisingObjective(DenoisingConfig(vlb_weight=0.02)).loss(model, x0, x_t, t, eps, None)
    alone = DenoisingObjective(DenoisingConfig(loss="kl")).loss(model, x0, x_t, t, eps, None)
    assert alone.keys() == {"loss", "vlb"}
    torch.testing.assert_close(alone["loss"], alone["vlb"])
    torch.testing.assert_close(hybrid["vlb"], alone["vlb"])
    torch.testing.assert_close(hybrid["loss"], hybrid["mse"] + 0.02 * alone["vlb"])


def test_the_bound_alone_trains_the_mean_too() -> None:
    model = Model()
    x0, x_t, t, eps = batch()
    DenoisingObjective(DenoisingConfig(loss="kl")).loss(model, x0, x_t, t, eps, None)["loss"].backward()
    assert bool(model.mix.weight.grad.all())


def test_labels_are_dropped_in_training_only() -> None:
    objective = DenoisingObjective(DenoisingConfig(label_dropout=0.5))
    model = Model(num_classes=4, null_label=4)
    x0 = torch.zeros(200, 2, 3, 3).double()
    y = torch.arange(200) % 4
    objective(model, x0, y, Draws(0, 200))
    seen = model.seen[-1]
    assert seen is not None
    assert 0.4 < float((seen == 4).double().mean()) < 0.6
    assert torch.equal(seen[seen < 4], y[seen < 4])
    objective(model.eval(), x0, y, Draws(0, 200))
    assert torch.equal(model.seen[-1], y)


def test_labels_without_a_substitute_are_kept() -> None:
    y = torch.arange(4)
    assert torch.equal(drop_labels(Model(num_classes=4), y, Draws(0, 4), 0.9), y)
    assert drop_labels(Model(), y, Draws(0, 4), 0.9) is None
    with pytest.raises(UserError, match="trained on labelled data"):
        drop_labels(Model(num_classes=4), None, Draws(0, 4), 0.9)


def test_every_level_is_drawn() -> None:
    objective = DenoisingObjective(DenoisingConfig())
    _, x_t, t, eps, _ = objective.prepare(Model(), torch.zeros(2000, 2, 3, 3), None, Draws(0, 2000))
    assert torch.equal(t.unique(), torch.arange(ROWS))
    torch.testing.assert_close(x_t, Model().path.noised(torch.zeros_like(eps), t, eps))


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="trains networks on discrete levels, not a Conv2d"):
        DenoisingObjective(DenoisingConfig())(nn.Conv2d(2, 2, 1), torch.zeros(2, 2, 3, 3), None, Draws(0, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_snr_gamma": 0.0},
        {"p2_k": 0.0},
        {"p2_gamma": -1.0},
        {"vlb_weight": -1.0},
        {"grey_levels": 1},
        {"label_dropout": 1.0},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    DenoisingConfig().check()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DenoisingConfig(**wrong).check()
