"""Calibration where it is known: exact posteriors, and posteriors that are wrong by a known amount."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cdm_core.errors import UserError
from cdm_core.runs import Run
from cdm_plugins_guidance.calibration import (
    Curve,
    Level,
    calibrate,
    integral,
    levels_of,
    picture,
    reliability,
)

Load = Callable[..., Run]
REAL = (math.inf,)
POINTS = 8000


def of_probabilities(p: list[float]) -> torch.Tensor:
    """Logits of two classes, the first of probability p."""
    q = torch.tensor(p, dtype=torch.float64)
    return torch.stack([q.log(), (1 - q).log()], 1)


def test_ece_by_hand() -> None:
    """Bins of width 1/10: (0.5, 0.6] holds two, one a hit; (0.8, 0.9] two hits."""
    found = reliability(of_probabilities([0.58, 0.56, 0.12, 0.86]), torch.tensor([0, 1, 1, 0]), bins=10)
    assert found.accuracy == 0.75
    assert found.confidence == pytest.approx((0.58 + 0.56 + 0.88 + 0.86) / 4)
    assert found.ece == pytest.approx((abs(1 - 0.58 - 0.56) + abs(2 - 0.88 - 0.86)) / 4)
    spread = [math.sqrt(sum(c * (1 - c) for c in pair)) for pair in ((0.58, 0.56), (0.88, 0.86))]
    assert found.floor == pytest.approx(math.sqrt(2 / math.pi) * sum(spread) / 4)
    assert found.margin == pytest.approx((0.16 - 0.12 + 0.76 + 0.72) / 4)


def test_a_bin_has_its_upper_edge() -> None:
    """conf = 1/2 falls into (1/4, 1/2], conf = 1 into the last bin."""
    logits = torch.tensor([[0.0, 0.0], [80.0, -80.0]], dtype=torch.float64)
    assert reliability(logits, torch.tensor([0, 0]), bins=2).ece == pytest.approx(0.25)
    # With one bin, errors in opposite directions would cancel; here 1/2 too few and 1 too many.
    assert reliability(logits, torch.tensor([0, 1]), bins=1).ece == pytest.approx(0.25)
    assert reliability(logits, torch.tensor([0, 1]), bins=2).ece == pytest.approx(0.75)


def test_tau_0_keeps_the_guess_and_says_one_in_k() -> None:
    found = reliability(torch.tensor([[0.0, 3.0, 1.0]] * 2), torch.tensor([1, 0]), tau=0.0)
    assert (found.accuracy, found.confidence, found.margin) == (0.5, pytest.approx(1 / 3), 0.0)


def test_the_floor_is_what_a_calibrated_classifier_shows() -> None:
    """Hits drawn with the very probabilities: the mean ECE over many draws is the floor."""
    generator = torch.Generator().manual_seed(0)
    p = 0.5 + 0.5 * torch.rand(400, generator=generator, dtype=torch.float64)
    logits = of_probabilities(p.tolist())
    draws = [(torch.rand(400, generator=generator) >= p).long() for _ in range(200)]
    found = [reliability(logits, y) for y in draws]
    mean = sum(f.ece for f in found) / len(found)
    assert mean == pytest.approx(found[0].floor, rel=0.03)


def test_the_integral_is_the_trapezoid_rule_over_a_length_of_one() -> None:
    assert integral([0, 1, 4], [1.0, 3.0, 0.0]) == pytest.approx((2.0 + 3 * 1.5) / 4)
    assert integral([7], [0.25]) == 0.25
    curve = Curve("x0", math.inf, 1.0, tuple(Level(1, 1, e, 0, 0, n, 1.0) for n, e in ((0, 0.2), (9, 0.4))))
    assert curve.integral_ece == pytest.approx(0.3)
    assert curve.to_dict()["integral_ece"] == pytest.approx(0.3)


def exact_line(sigma: float, tau: float, look: str) -> tuple[float, float]:
    """(accuracy, ECE) of the exact classifier on the line, by quadrature.

    Of x at level sigma the posterior's logit is 2 x / v, v = s^2 + sigma^2, which is right. What is claimed
    is tau times that, or tau times 2 z / s^2 of z, the predicted x0 or x / max(1, RMS). All are larger at
    every x (rms: at high noise), so that no bin has gaps of two signs: ECE is E[claimed - right] whatever
    the bins.
    """
    s2 = 0.25
    v = s2 + sigma**2
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64) * math.sqrt(v + 1)
    density = torch.stack([(-((x - m) ** 2) / (2 * v)).exp() for m in (-1, 1)]).mean(0)
    right = (2 * x / v).abs().sigmoid()
    x0 = (s2 * x + sigma**2 * torch.tanh(x / v)) / v
    logit = {"x_t": 2 * x / v, "x0": 2 * x0 / s2, "rms": 2 * x.clamp(-1, 1) / s2}[look]
    claimed = (tau * logit).abs().sigmoid()
    weight = density / density.sum()
    assert bool((claimed >= right - 1e-12).all())
    return float((weight * right).sum()), float((weight * (claimed - right)).sum())


def curves_of(load: Load, *overrides: str, **given: object) -> list[Curve]:
    run = load("line", "adapter.name=guide", *overrides)
    return calibrate(run, softplus=REAL, num=POINTS, **{"levels": 5, **given})


def test_the_exact_classifier_is_calibrated_at_every_level(load: Load) -> None:
    (curve,) = curves_of(load, looks=["x_t"])
    assert [level.number for level in curve.levels] == [0, 10, 20, 29, 39]
    for level in curve.levels:
        accuracy, _ = exact_line(level.sigma, 1.0, "x_t")
        assert level.accuracy == pytest.approx(accuracy, abs=4 * math.sqrt(0.25 / POINTS))
        assert level.ece < 2 * level.floor + 0.003, level
    assert curve.integral_ece == pytest.approx(curve.mean("floor"), abs=0.004)


@pytest.mark.parametrize(("look", "tau"), [("x_t", 3.0), ("x0", 1.0), ("x0", 3.0)])
def test_an_overconfident_classifier_has_the_ece_of_the_formula(load: Load, look: str, tau: float) -> None:
    """tau = 3 at the noisy state; at the predicted x0 the clean classifier, which knows no noise."""
    (curve,) = curves_of(load, looks=[look], taus=[tau])
    assert curve.name == f"{look}, ReLU, tau {tau:g}"
    for level in curve.levels:
        accuracy, ece = exact_line(level.sigma, tau, look)
        error = math.sqrt(accuracy * (1 - accuracy) / POINTS)
        assert level.ece == pytest.approx(ece, abs=4 * error + 0.003), level


def test_rms_at_high_noise_is_as_wrong_as_the_formula_says(load: Load) -> None:
    (curve,) = curves_of(load, looks=["rms"], levels=1)
    (level,) = curve.levels
    accuracy, ece = exact_line(level.sigma, 1.0, "rms")
    assert (level.number, level.sigma) == (0, pytest.approx(10.0))
    assert ece > 0.4
    assert level.ece == pytest.approx(ece, abs=4 * math.sqrt(accuracy * (1 - accuracy) / POINTS))


def test_an_image_is_seen_alike_whatever_else_is_asked_for(load: Load) -> None:
    few = curves_of(load, looks=["x0"], levels=2)[0].levels
    more = curves_of(load, "sample.batch_size=999", looks=["rms", "x0"], levels=4, taus=[2.0, 1.0])
    again = next(curve for curve in more if (curve.look, curve.tau) == ("x0", 1.0)).levels
    for one, other in ((few[0], again[0]), (few[-1], again[-1])):
        assert vars(one) == pytest.approx(vars(other), abs=1e-6)
    assert curves_of(load, looks=["x0"], levels=2, seed=1)[0].levels[0].ece != few[0].ece


def test_a_denoiser_that_is_told_the_classes_predicts_from_them(load: Load) -> None:
    """As it does when guided; it may know no "no class"."""
    run = load("known", "adapter.name=guide")
    exact, asked = run.model.mixture, []

    def denoise(x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if y is None:
            raise UserError("no class of its own for none")
        asked.append(y)
        return exact.denoise(x, sigma, y)

    run.model.denoise = denoise
    (told,) = calibrate(run, looks=["x0"], softplus=REAL, num=300, levels=1)
    assert torch.equal(torch.cat(asked), run.examples("test", range(300))[1])
    (untold,) = calibrate(load("ring", "adapter.name=guide"), looks=["x0"], softplus=REAL, num=300, levels=1)
    assert told.levels[0].accuracy > untold.levels[0].accuracy + 0.3  # all noise: the label alone tells


def test_softplus_and_relu_differ_and_inf_is_relu(load: Load, network_name: str) -> None:
    run = load(
        "ring",
        "adapter.name=guide",
        f"adapter.classifier.name={network_name}",
        "adapter.classifier.shape=[2,1,1]",
    )
    own, smooth = calibrate(run, looks=["x0"], softplus=[math.inf, 1.0], num=500, levels=3)
    for level in own.levels:
        assert level.accuracy > 0.25
    assert own.integral_ece != smooth.integral_ece
    assert run.sampling.adapter is not None
    assert math.isinf(run.sampling.adapter.config.classifier.softplus)  # the run itself is as it was
    assert picture([own, smooth]).startswith(b"\x89PNG")
    assert own.to_dict()["levels"][0]["number"] == 0


def test_levels_are_steps_of_the_sampler_both_ends_among_them(load: Load) -> None:
    run = load("line")
    sigmas = run.plan().sigmas
    assert levels_of(run, 3) == [(n, float(sigmas[n])) for n in (0, 20, 39)]
    assert levels_of(run, 1) == [(0, float(sigmas[0]))]
    assert len(levels_of(run, 1000)) == 40


@pytest.mark.parametrize(
    ("overrides", "given", "says"),
    [
        ((), {}, "is sampled through no guide: say --adapter NAME"),
        (("adapter.name=cfg",), {}, "sampled through core/cfg, which is no guide"),
        (("adapter.name=guide",), {"levels": 0}, "--levels 0"),
        (("adapter.name=guide",), {"num": 0}, "--num 0"),
        (("adapter.name=guide",), {"bins": 0}, "--bins 0"),
        (("adapter.name=guide",), {"taus": [-1.0]}, "tau must be finite and at least 0"),
        (("adapter.name=guide",), {"looks": ["eps"]}, "look 'eps' is unknown"),
    ],
)
def test_bad_input_is_explained(load: Load, overrides: tuple[str, ...], given: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        calibrate(load("line", *overrides), **{"softplus": REAL, "num": 10, **given})


def test_a_classifier_that_knows_no_noise_or_other_classes_is_refused(
    load: Load, runs: Path, network_name: str
) -> None:
    named = (f"adapter.classifier.name={network_name}", "adapter.classifier.shape=[2,1,1]")
    with pytest.raises(UserError, match="look 'x_t' needs a classifier that knows the noise level"):
        calibrate(load("ring", "adapter.name=guide", *named), looks=["x_t"], softplus=REAL, num=10)
    other = f"adapter.classifier.name=run:{runs / 'line'}"
    with pytest.raises(UserError, match="the guide has 2, 'gaussian-mixture' 4"):
        calibrate(load("ring", "adapter.name=guide", other), softplus=REAL, num=10)
