"""Moved representations: their gradients, their sign, and what they do to samples, against exact answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core import samplers
from cdm_core.adapter_configs import CFGConfig
from cdm_core.adapters import ClassifierFreeGuidance, Clipped
from cdm_core.compiled import CompiledModel
from cdm_core.errors import UserError
from cdm_core.mixtures import GaussianMixture
from cdm_core.samplers import Conditional, Prediction, Step
from cdm_core.testing import AdapterConformance
from cdm_plugins_joint.adapter import guided, log_likelihood, maps_of
from cdm_plugins_joint.adapter_configs import RepresentationConfig, ThroughDecoderConfig

HEAD, DECODER = RepresentationConfig(scale=1e-3), ThroughDecoderConfig(scale=1e-3)


def ring(std: float = 0.3) -> GaussianMixture:
    """Three classes in two dimensions, 2 from the middle."""
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return GaussianMixture(torch.ones(3), means, std**2 * torch.eye(2).expand(3, 2, 2))


def noisy(sigma: float, rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, 2, 1, 1), sigma (rows,), classes (rows,) that have nothing to do with x; float64."""
    x = sigma * torch.randn(rows, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    return x, torch.full((rows,), sigma, dtype=torch.float64), torch.arange(rows) % 3


# ---- The gradient, by finite differences


class TinyMaps(NamedTuple):
    skips: tuple[Tensor, ...]
    middle: Tensor


class Tiny(nn.Module):
    """A U-Net of two maps, smooth, in float64; the second is made of the first."""

    predicts, classes, multi_label = "eps", 3, False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up, self.out = nn.Conv2d(7, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
        self.linear = nn.Linear(7, 3)
        self.double().requires_grad_(False)

    def scale(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2) ** -0.5

    def after(self, first: Tensor) -> Tensor:
        return torch.tanh(self.second(first))

    def representations(self, x: Tensor, sigma: Tensor, y: Any = None) -> TinyMaps:
        first = torch.tanh(3 * self.first(x * self.scale(sigma)[:, None, None, None]))
        return TinyMaps((first,), self.after(first))

    def head(self, z: TinyMaps, sigma: Tensor) -> Tensor:
        pooled = torch.cat([h.square().mean((2, 3)) for h in (*z.skips, z.middle)], dim=1)
        return 4 * self.linear(pooled) * (1 + sigma[:, None])

    def decode_representations(self, z: TinyMaps, x: Tensor, sigma: Tensor, y: Any = None) -> Prediction:
        joined = torch.cat([z.skips[0], F.interpolate(z.middle, scale_factor=2.0)], dim=1)
        eps = self.out(torch.tanh(self.up(joined)))
        return Prediction(x - sigma[:, None, None, None] * eps)

    def denoise(self, x: Tensor, sigma: Tensor, y: Any = None) -> Tensor:
        return self.decode_representations(self.representations(x, sigma), x, sigma).x0

    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.head(self.representations(x, sigma), sigma)


@pytest.fixture
def tiny() -> Tiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny()


def tiny_batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.tensor([0.7, 2.0], dtype=torch.float64), torch.tensor([2, 0])


def slopes(value: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of the sum of value (B,) in every entry of `at`."""
    found = torch.empty_like(at)
    for i in range(at.numel()):
        ends = []
        for sign in (1, -1):
            moved = at.clone()
            moved.view(-1)[i] += sign * step
            ends.append(value(moved).sum())
        found.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return found


def log_p(logits: Tensor, y: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, y[:, None])[:, 0]


def test_the_heads_gradient_is_total(tiny: Tiny) -> None:
    """Against its gradient by default, as released; a map counts for what later ones make of it."""
    x, sigma, y = tiny_batch()
    z = tiny.representations(x, sigma)
    of_first = slopes(
        lambda h: log_p(tiny.head(TinyMaps((h,), tiny.after(h)), sigma), y), z.skips[0].contiguous()
    )
    of_middle = slopes(lambda h: log_p(tiny.head(TinyMaps(z.skips, h), sigma), y), z.middle.contiguous())
    adapter = guided(replace(HEAD, scale=1.0), tiny)
    moved = adapter.moved(x, sigma, y, adapter.weight(sigma))
    torch.testing.assert_close(moved.skips[0], z.skips[0] - of_first, rtol=0, atol=1e-8)
    torch.testing.assert_close(moved.middle, z.middle - of_middle, rtol=0, atol=1e-8)
    expected = tiny.decode_representations(moved, x, sigma).x0
    torch.testing.assert_close(adapter.denoise(x, sigma, y), expected, rtol=0, atol=0)


def test_a_head_of_clean_images_is_told_so(tiny: Tiny) -> None:
    x, sigma, y = tiny_batch()
    z, clean = tiny.representations(x, sigma), torch.zeros_like(sigma)
    of_middle = slopes(lambda h: log_p(tiny.head(TinyMaps(z.skips, h), clean), y), z.middle.contiguous())
    adapter = guided(replace(HEAD, scale=1.0, head_level="clean", sign="paper"), tiny)
    moved = adapter.moved(x, sigma, y, adapter.weight(sigma))
    torch.testing.assert_close(moved.middle, z.middle + of_middle, rtol=0, atol=1e-8)


def test_the_decoders_gradient_is_that_of_each_map_alone(tiny: Tiny) -> None:
    """Of log p(y | x0), the clean image that is decoded; times sqrt(1 - abar)."""
    x, sigma, y = tiny_batch()
    z, clean = tiny.representations(x, sigma), torch.zeros_like(sigma)

    def value(z: TinyMaps) -> Tensor:
        return log_p(tiny.class_logits(tiny.decode_representations(z, x, sigma).x0, clean), y)

    of_first = slopes(lambda h: value(TinyMaps((h,), z.middle)), z.skips[0].contiguous())
    of_middle = slopes(lambda h: value(TinyMaps(z.skips, h)), z.middle.contiguous())
    size = (sigma / (1 + sigma**2).sqrt())[:, None, None, None]
    adapter = guided(replace(DECODER, scale=2.0), tiny)
    moved = adapter.moved(x, sigma, y, adapter.weight(sigma))
    torch.testing.assert_close(moved.skips[0], z.skips[0] + 2 * size * of_first, rtol=0, atol=1e-8)
    torch.testing.assert_close(moved.middle, z.middle + 2 * size * of_middle, rtol=0, atol=1e-8)


def test_several_moves_go_on_from_one_another(tiny: Tiny) -> None:
    x, sigma, y = tiny_batch()
    once, twice = (guided(replace(DECODER, scale=0.3, moves=n), tiny) for n in (1, 2))
    z = once.moved(x, sigma, y, once.weight(sigma))
    rise = []
    for h in (tiny.representations(x, sigma), z, twice.moved(x, sigma, y, twice.weight(sigma))):
        x0 = tiny.decode_representations(h, x, sigma).x0
        rise.append(log_p(tiny.class_logits(x0, torch.zeros_like(sigma)), y))
    assert bool((rise[0] < rise[1]).all())
    assert bool((rise[1] < rise[2]).all())


def test_resolutions_have_shares_of_the_scale(tiny: Tiny) -> None:
    x, sigma, y = tiny_batch()
    z = tiny.representations(x, sigma)
    whole, fine = (guided(replace(HEAD, scale=1.0, resolutions=r), tiny) for r in ((), (0.5, 0.0)))
    moved, halved = (a.moved(x, sigma, y, a.weight(sigma)) for a in (whole, fine))
    assert torch.equal(halved.middle, z.middle)
    torch.testing.assert_close(halved.skips[0] - z.skips[0], (moved.skips[0] - z.skips[0]) / 2)
    with pytest.raises(UserError, match="3 entries, and the network's maps are of 2 resolutions: 4, 2 pix"):
        guided(replace(HEAD, resolutions=(1.0, 1.0, 1.0)), tiny).denoise(x, sigma, y)


def test_normalised_gradients_have_the_size_of_the_scale(tiny: Tiny) -> None:
    x, sigma, y = tiny_batch()
    adapter = guided(replace(HEAD, scale=0.25, normalise="rms"), tiny)
    z, moved = tiny.representations(x, sigma), adapter.moved(x, sigma, y, adapter.weight(sigma))
    steps = [(a - b).flatten(1) for a, b in zip(maps_of(moved), maps_of(z), strict=True)]
    torch.testing.assert_close(torch.cat(steps, 1).square().mean(1).sqrt(), torch.full_like(sigma, 0.25))


# ---- The sign


def gains(adapter: Any, net: Any, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """Rise of the exact log p(y | x0) by steering, x0 taken for a clean image, (B,)."""
    steered, plain = adapter.denoise(x, sigma, y), net.denoise(x, sigma)
    ends = [log_p(net.mixture.class_logits(x0, torch.zeros_like(sigma)), y) for x0 in (steered, plain)]
    return ends[0] - ends[1]


@pytest.mark.parametrize(
    ("predicts", "right", "wrong"), [("eps", "official", "paper"), ("x0", "paper", "official")]
)
def test_where_noise_outweighs_doubt_each_kind_has_its_sign(
    exact: Any, predicts: str, right: Any, wrong: Any
) -> None:
    """At sigma 4 the posterior variance of x0 is below sigma^2 everywhere: `adapter` argues from that."""
    net, (x, sigma, y) = exact(ring(), predicts), noisy(4.0)
    x = x / 4  # no class is certain
    for sign in ("auto", right):
        assert bool((gains(guided(replace(HEAD, sign=sign), net), net, x, sigma, y) > 0).all())
    assert bool((gains(guided(replace(HEAD, sign=wrong), net), net, x, sigma, y) < 0).all())


@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_through_the_decoder_the_sign_is_right_everywhere(exact: Any, predicts: str) -> None:
    """Half-way between two classes, at noise smaller than their distance, the official one is not."""
    net = exact(ring(0.1), predicts)
    between = net.mixture.means[:2].mean(0).view(1, 2, 1, 1)
    x, sigma, y = between + 0.02 * noisy(1.0)[0], torch.full((12,), 0.9).double(), torch.arange(12) % 2
    assert bool((gains(guided(DECODER, net), net, x, sigma, y) > 0).all())
    official = gains(guided(replace(HEAD, sign="official"), net), net, x, sigma, y)
    assert bool((official < 0).all())


def test_a_v_network_has_no_sign_through_the_head(exact: Any) -> None:
    net = exact(ring(), "v")
    with pytest.raises(UserError, match="predicts v has no right sign through the head"):
        guided(HEAD, net)
    assert guided(replace(HEAD, sign="paper"), net).towards == 1
    assert guided(DECODER, net).towards == 1


# ---- What it steers, and what it leaves alone


@pytest.mark.parametrize(
    "config",
    [
        RepresentationConfig(scale=20.0, sigma_min=1.0),  # below, doubt may outweigh noise
        RepresentationConfig(scale=10.0, sigma_min=1.0, normalise="rms"),
        ThroughDecoderConfig(scale=0.5, sigma_max=5.0),
    ],
)
@pytest.mark.parametrize("predicts", ["eps", "x0"])
@pytest.mark.parametrize("sampler", [samplers.ddpm, samplers.ddim])
def test_samples_are_of_the_class_asked_for(exact: Any, config: Any, sampler: Any, predicts: str) -> None:
    net, rows = exact(ring(), predicts), 150
    y, draw = torch.arange(rows) % 3, torch.Generator().manual_seed(0)
    sigmas = net.sigmas.flip(0)[::2]
    start = torch.randn(rows, 2, 1, 1, generator=draw) * float(sigmas[0])
    rates = []
    for source, label in ((net, None), (guided(config, net), y)):
        noise = torch.Generator().manual_seed(1)
        x0 = sampler(
            Conditional(source, label),
            start,
            sigmas,
            noise=lambda x, g=noise: torch.randn(x.shape, generator=g),
        )
        rates.append(float((net.mixture.class_logits(x0, 0.0).argmax(1) == y).double().mean()))
    assert rates[0] < 0.5
    assert rates[1] > 0.9


def test_without_a_class_or_a_scale_it_is_the_model_bitwise(exact: Any) -> None:
    net, (x, sigma, y) = exact(ring()), noisy(2.0)
    plain = net.denoise(x, sigma)
    assert torch.equal(guided(HEAD, net).denoise(x, sigma), plain)
    assert torch.equal(guided(replace(HEAD, scale=0.0), net).denoise(x, sigma, y), plain)
    assert torch.equal(guided(replace(HEAD, sigma_max=1.0), net).denoise(x, sigma, y), plain)
    mixed = sigma.clone()
    mixed[6:], x = 0.9, x / 2
    some = guided(replace(HEAD, scale=1.0, sigma_max=1.0), net).denoise(x, mixed, y)
    plain = net.denoise(x, mixed)
    torch.testing.assert_close(some[:6], plain[:6])
    assert bool((some[6:] != plain[6:]).flatten(1).any(1).all())


def test_a_step_is_steered_within_the_interval_alone(exact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And outside it, as without a class, costs no look at the representations."""
    net, (x, sigma, y) = exact(ring()), noisy(2.0)
    step, looks = Step(1, 2, 2.0, 1.0), []
    moved = guided(replace(HEAD, sigma_min=1.5), net)
    assert torch.equal(moved.predict_step(x, step, y).x0, moved.predict(x, sigma, y).x0)
    monkeypatch.setattr(type(net), "representations", lambda *_: looks.append(1))
    later = step._replace(sigma=1.4)
    for label, at in ((None, step), (y, later), (y, step._replace(correction=True))):
        plain = net.denoise(x, torch.full_like(sigma, at.level))
        assert torch.equal(moved.predict_step(x, at, label).x0, plain)
    still = guided(replace(HEAD, scale=0.0), net)
    assert torch.equal(still.predict_step(x, step, y).x0, net.denoise(x, sigma))
    assert not looks


def test_schedules_follow_the_path(exact: Any) -> None:
    net = exact(ring())
    level = net.sigmas[[10, 50, 90]].float()
    alpha = net.scale(level)
    for schedule, expected in (("sqrt-signal", alpha), ("sqrt-noise", (1 - alpha**2).sqrt())):
        weight = guided(replace(DECODER, scale=3.0, schedule=schedule), net).weight(level)
        torch.testing.assert_close(weight, 3 * expected, rtol=1e-4, atol=1e-5)


def test_clipped_predictions_stay_clipped(exact: Any) -> None:
    """What is decoded goes past `Clipped.denoise`."""
    net, (x, sigma, y) = exact(ring()), noisy(2.0)
    bare, clipped = guided(HEAD, net).denoise(x, sigma, y), guided(HEAD, Clipped(net)).denoise(x, sigma, y)
    assert bool((bare.abs() > 1).any())
    assert torch.equal(clipped, bare.clamp(-1, 1))


def test_it_works_beneath_a_compiled_model(exact: Any) -> None:
    net, (x, sigma, y) = exact(ring()), noisy(2.0)
    compiled = CompiledModel(net, hint="")
    assert torch.equal(guided(HEAD, compiled).denoise(x, sigma, y), guided(HEAD, net).denoise(x, sigma, y))


def test_it_goes_past_no_other_wrapper(exact: Any) -> None:
    with pytest.raises(UserError, match="go past the ClassifierFreeGuidance around the model"):
        guided(HEAD, ClassifierFreeGuidance(CFGConfig(1.0), exact(ring())))


def test_no_gradient_is_left_on_the_model(tiny: Tiny) -> None:
    tiny.requires_grad_(True)
    x, sigma, y = tiny_batch()
    for config in (HEAD, DECODER):
        with torch.no_grad():
            assert not guided(config, tiny).denoise(x, sigma, y).requires_grad
    assert all(p.grad is None for p in tiny.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale": float("nan")}, "scale and resolutions must be finite"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "need 0 <= sigma_min <= sigma_max, not 2.0 and 1.0"),
        ({"moves": 0}, "moves must be at least 1, not 0"),
        ({"through": "decoder", "sign": "paper"}, "through the decoder there is one right sign"),
    ],
)
def test_settings_out_of_range_are_refused(exact: Any, settings: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RepresentationConfig(**settings).check()
    with pytest.raises(UserError, match=said):
        guided(RepresentationConfig(**settings), exact(ring()))


# ---- Attributes


def logits_and_attributes() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, generator=draw).double(), torch.randint(2, (4, 5), generator=draw).double()


def test_attributes_have_a_binary_likelihood_each() -> None:
    f, q = logits_and_attributes()
    f.requires_grad_()
    value, gradient = log_likelihood(f, q, multi_label=True)
    expected = -F.binary_cross_entropy_with_logits(f, q, reduction="none").sum(1)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), f)[0])


def test_free_attributes_have_no_say() -> None:
    f, q = logits_and_attributes()
    q[:, 1:4] = -1
    value, gradient = log_likelihood(f, q, multi_label=True)
    kept = [0, 4]
    expected, slope = log_likelihood(f[:, kept], q[:, kept], multi_label=True)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, kept], slope)
    assert not gradient[:, 1:4].any()


def test_one_attribute_is_asked_for_by_its_number() -> None:
    f, _ = logits_and_attributes()
    value, gradient = log_likelihood(f, torch.tensor([0, 4, 2, 2]), multi_label=True)
    torch.testing.assert_close(value, F.logsigmoid(f[torch.arange(4), [0, 4, 2, 2]]))
    assert bool(((gradient != 0).sum(1) == 1).all())


def test_classes_have_a_softmax() -> None:
    f, _ = logits_and_attributes()
    f, y = f.requires_grad_(), torch.tensor([0, 4, 2, 2])
    value, gradient = log_likelihood(f.detach(), y, multi_label=False)
    expected = -F.cross_entropy(f, y, reduction="none")
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), f)[0])


# ---- What every adapter keeps to


class TestMovedRepresentations(AdapterConformance):
    component = "joint/representations"

    @pytest.fixture
    def oracle(self, exact: Any, record: Any) -> Any:
        means = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
        covariances = torch.tensor([[0.1, 0.0], [0.0, 0.2]]).expand(3, 2, 2)
        net = exact(GaussianMixture(torch.tensor([0.3, 0.3, 0.4]), means, covariances))
        net.num_classes = 3
        return net


class TestMovedThroughTheDecoder(TestMovedRepresentations):
    component = "joint/representations-safe"
