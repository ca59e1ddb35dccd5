"""The guided denoiser against the published updates, written out in their own variables. All float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_core import samplers, schedules
from cdm_core.adapter_configs import CFGConfig
from cdm_core.adapters import ClassifierFreeGuidance, Clipped
from cdm_core.capabilities import offered
from cdm_core.errors import UserError
from cdm_core.mixtures import GaussianMixture
from cdm_core.samplers import Conditional, Prediction, Step
from cdm_plugins_guidance.apply import GuidedDenoiser
from cdm_plugins_guidance.apply_configs import METHODS, GuidedConfig, TermConfig
from cdm_plugins_guidance.strengths import linear_sine

SHAPE = (3, 2, 2)
CLASSES = 4
GRID = schedules.grid(schedules.linear(100, 1e-3, 0.2).ve_sigmas, 10)
LEARNED = "learned"


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads would cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Graded(NamedTuple):
    value: Tensor
    gradient: Tensor
    logits: Tensor


class Bowl:
    """A guide that is a curved function of the image, and of the noise level where it is told one."""

    num_classes = CLASSES

    def __init__(self, noise_aware=False, seed=0):
        self.noise_aware = noise_aware
        self.weight = normal(CLASSES, math.prod(SHAPE), seed=seed)
        self.seen = []

    def value(self, x, target, sigma=None):
        level = 0.0 if sigma is None else sigma[:, None]
        logits = torch.tanh(x.flatten(1)) @ self.weight.T / (1 + level)
        return logits.log_softmax(1).gather(1, target[:, None])[:, 0]

    def gradient(self, x, target, sigma=None):
        self.seen.append(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.value(x, target, sigma)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return Graded(value.detach(), gradient, value.detach()[:, None].expand(-1, CLASSES))


class Net:
    """A curved denoiser, with classes and a learned variance where asked."""

    def __init__(self, variance=False, num_classes=None):
        self.num_classes = num_classes
        if variance:
            self.predict = self._predict

    def denoise(self, x, sigma, y=None):
        shift = 0.0 if y is None else 0.1 * y.to(x.dtype).view(-1, 1, 1, 1)
        return torch.sin(x / (1 + sigma.view(-1, 1, 1, 1) ** 2)) + shift

    def _predict(self, x, sigma, y=None):
        return Prediction(self.denoise(x, sigma, y), torch.sigmoid(x))


def guided(model, *terms, guides=None, condition=None):
    config = GuidedConfig(terms=terms, condition=condition)
    config.check()
    return GuidedDenoiser(config, model, guides or [Bowl(term.look == "x_t") for term in terms])


def labels(rows=2):
    return torch.arange(rows) % CLASSES


def state(step, rows=2, seed=3):
    return step.sigma * normal(rows, *SHAPE, seed=seed)


def steps(grid=GRID):
    levels = [*grid.tolist(), 0.0]
    return [Step(i, len(grid), t, s, grid=tuple(levels)) for i, (t, s) in enumerate(pairwise(levels))]


# ---- Off means off


TERMS = {
    "score": TermConfig(),
    "through": TermConfig(look="x0-through"),
    "x_t": TermConfig(look="x_t"),
    "mean": TermConfig(rule="mean", gamma=0.3),
    "official": METHODS["elucd-official"],
    "shift": TermConfig(rule="shift"),
    "nudge": TermConfig(look="rms", rule="nudge", schedule="linear-sine", normalise="rms"),
}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver", "dpm_solver_pp", "euler", "heun"])
@pytest.mark.parametrize("name", TERMS)
def test_no_label_and_no_scale_are_the_unguided_model_bitwise(name, sampler):
    model, walk = Net(variance=True), getattr(samplers, sampler)
    start = state(steps()[0]).float()

    def sample(model, y):
        noise = iter(normal(2 * len(GRID), 2, *SHAPE).float())
        return walk(Conditional(model, y), start, GRID, noise=lambda x: next(noise))

    plain = sample(model, None)
    off = guided(model, replace(TERMS[name], scale=0.0))
    on = guided(model, TERMS[name], guides=[_Float(TERMS[name].look == "x_t")])
    assert torch.equal(sample(off, labels()), plain)
    assert torch.equal(sample(on, None), plain)
    if sampler != "heun" or TERMS[name].rule != "mean":
        assert not torch.equal(sample(on, labels()), plain)


class _Float(Bowl):
    def __init__(self, noise_aware):
        super().__init__(noise_aware)
        self.weight = self.weight.float()


def test_without_a_step_off_means_off_too():
    x, sigma = normal(2, *SHAPE), torch.tensor([0.5, 2.0], dtype=torch.float64)
    for scale, y in ((0.0, labels()), (1.0, None)):
        out = guided(Net(), TermConfig(scale=scale)).denoise(x, sigma, y)
        assert torch.equal(out, Net().denoise(x, sigma))


class Undecided(Bowl):
    """A guide that asks for no label."""

    needs_label = False

    def gradient(self, x, target, sigma=None):
        return super().gradient(x, labels(len(x)), sigma)


def test_a_guide_that_needs_no_label_works_without():
    x, sigma = normal(2, *SHAPE), torch.tensor([0.5, 2.0], dtype=torch.float64)
    plain = Net().denoise(x, sigma)
    assert torch.equal(guided(Net(), TermConfig()).denoise(x, sigma), plain)
    assert not torch.equal(guided(Net(), TermConfig(), guides=[Undecided()]).denoise(x, sigma), plain)


def test_walks_do_not_feel_one_another():
    """Nor where the first step of one is unguided, and the peak is the released code's."""
    config = TermConfig(rule="mean", gamma=0.3, peak="official", start=0.2)
    model = guided(Net(variance=True), config)

    def walk(scale):
        start = scale * state(steps()[0])
        return samplers.ddpm(Conditional(model, labels()), start, GRID, noise=torch.zeros_like)

    first = walk(1.0)
    assert not torch.equal(walk(3.0), first)
    assert torch.equal(walk(1.0), first)


# ---- Rule mean: the published update, in the published variables


def published_mean(x_t, x0, step, before, first, variance, *, scale, gamma, gradient):
    """mu + (Sigma + gamma sigma2_max sin(pi t / T)) s g, in a variance-preserving path's own scale."""
    abar_t, abar_s = (1 / (1 + level**2) for level in (step.sigma, step.next))
    beta = 1 - abar_t / abar_s
    mean = math.sqrt(abar_s) * beta / (1 - abar_t) * x0 + (
        math.sqrt(abar_t / abar_s) * (1 - abar_s) / (1 - abar_t) * x_t
    )
    small = beta * (1 - abar_s) / (1 - abar_t)
    clipped = small
    if step.next == 0:
        abar_b = 1 / (1 + before.sigma**2)
        clipped = (1 - abar_b / abar_t) * (1 - abar_t) / (1 - abar_b)
    if isinstance(variance, Tensor):
        spread = (variance * math.log(beta) + (1 - variance) * math.log(clipped)).exp()
    else:
        large = beta if step.next else clipped
        spread = {"small": small, "large": large, "one": 1.0}[variance]
    peak = 1 - (1 + first.next**2) / (1 + first.sigma**2)
    t = step.total - 1 - step.number
    return mean + (spread + gamma * peak * math.sin(math.pi * t / step.total)) * scale * gradient


@pytest.mark.parametrize("variance", ["small", "large", "one", LEARNED])
@pytest.mark.parametrize("look", ["x0", "x_t", "x0-through"])
def test_the_mean_moves_by_the_published_update(look, variance):
    """Through core's ancestral sampler itself, with its noise off, from one state at every step in turn."""
    config = TermConfig(look=look, rule="mean", scale=1.7, gamma=0.3)
    if variance != LEARNED:
        config = TermConfig(look=look, rule="mean", scale=1.7, gamma=0.3, variance=variance)
    net, guide, y = Net(variance=True), Bowl(look == "x_t"), labels()
    model = guided(net, config, guides=[guide])
    walk, states = steps(), []
    start = state(walk[0])
    samplers.ddpm(
        Conditional(model, y),
        start,
        GRID,
        noise=torch.zeros_like,
        callback=lambda i, n, x, x0: states.append(x),
    )
    states.append(samplers.ddpm(Conditional(model, y), start, GRID, noise=torch.zeros_like))
    for i, step in enumerate(walk):
        alpha, alpha_next = ((1 + level**2) ** -0.5 for level in (step.sigma, step.next))
        x_t = (alpha * states[i]).requires_grad_()
        sigma = x_t.new_full((2,), step.sigma)
        x0 = net.denoise(x_t / alpha, sigma)
        seen, target = {
            "x0": (x0.detach().requires_grad_(), None),
            "x0-through": (x0, None),
            "x_t": (x_t / alpha, sigma),
        }[look]
        (gradient,) = torch.autograd.grad(guide.value(seen, y, target).sum(), seen if look == "x0" else x_t)
        learned = torch.sigmoid(states[i]) if variance == LEARNED else variance
        before = walk[i - 1] if i else None
        expected = published_mean(
            x_t.detach(),
            x0.detach(),
            step,
            before,
            walk[0],
            learned,
            scale=1.7,
            gamma=0.3,
            gradient=gradient,
        )
        torch.testing.assert_close(alpha_next * states[i + 1], expected, rtol=1e-10, atol=1e-10)


def test_the_last_step_is_guided_too_unless_told_not_to():
    net, y, last = Net(variance=True), labels(), steps()[-1]
    x = state(last)
    on, off = (guided(net, TermConfig(rule="mean", last=last_too)) for last_too in (True, False))
    plain = net.denoise(x, x.new_full((2,), last.sigma))
    assert torch.equal(off.predict_step(x, last, y).x0, plain)
    assert not torch.equal(on.predict_step(x, last, y).x0, plain)
    # small is the variance that the last step has: none, and so it is not guided by it
    small = guided(net, TermConfig(rule="mean", variance="small"))
    assert torch.equal(small.predict_step(x, last, y).x0, plain)


def test_a_negative_gamma_never_turns_the_guidance_round():
    net, y = Net(variance=True), labels()
    walk = steps()
    model = guided(net, TermConfig(rule="mean", gamma=-50.0))
    for step in walk[:5]:
        x = state(step)
        out = model.predict_step(x, step, y)
        if step.number:  # the sine of step 0 is small, and its variance outweighs nothing
            assert torch.equal(out.x0, net.denoise(x, x.new_full((2,), step.sigma)))


def test_the_default_peak_is_batch_invariant_and_the_official_is_not():
    net, y = Net(variance=True), labels(3)
    start = state(steps()[0], rows=3)

    def sample(peak, rows):
        model = guided(net, TermConfig(rule="mean", gamma=0.3, scale=5.0, peak=peak))
        noise = iter(normal(len(GRID), 3, *SHAPE, seed=9))
        walk = Conditional(model, y[rows])
        return samplers.ddpm(walk, start[rows], GRID, noise=lambda x: next(noise)[rows])

    for peak, same in (("first", True), ("official", False)):
        together = sample(peak, slice(0, 3))
        alone = torch.cat([sample(peak, slice(i, i + 1)) for i in range(3)])
        torch.testing.assert_close(alone[0], together[0])  # the official peak is the first sample's
        assert torch.allclose(alone[1:], together[1:], rtol=0, atol=1e-10) == same


def test_the_official_peak_is_the_running_maximum_of_the_corner_pixel():
    """Seen in the gradients' factor: a guide of gradient 1 and D = 0 make the shift the factor itself."""

    class Flat:
        num_classes, noise_aware = CLASSES, False

        def gradient(self, x, target, sigma=None):
            return Graded(x[:, 0, 0, 0], torch.ones_like(x), x[:, 0, 0])

    class Zero(Net):
        def _predict(self, x, sigma, y=None):
            return Prediction(torch.zeros_like(x), torch.sigmoid(x))

    model = guided(Zero(variance=True), METHODS["elucd-official"], guides=[Flat()])
    peak = 0.0
    for step in steps()[:-1]:
        x = state(step, seed=step.number)
        small, large = step.small / (1 + step.next**2), step.large / (1 + step.next**2)
        spread = torch.sigmoid(x) * math.log(large / small)
        spread = small * spread.exp()
        peak = max(peak, float(spread[0, 0, 0, 0]))
        t = step.total - 1 - step.number
        expected = spread + 0.3 * peak * math.sin(math.pi * t / step.total)
        alpha_next = (1 + step.next**2) ** -0.5
        found = model.predict_step(x, step, labels()).x0 * alpha_next * (1 - (step.next / step.sigma) ** 2)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# ---- Rules score and shift


@pytest.mark.parametrize("jacobian", ["vp", "ve", "gaussian"])
@pytest.mark.parametrize("look", ["x0", "x0-through", "x_t", "rms"])
def test_the_score_moves_eps_as_published(look, jacobian):
    """eps' = eps - sqrt(1 - abar) s g, g by autograd in the variance-preserving state."""
    net, guide, y, scale = Net(), Bowl(look == "x_t"), labels(), 2.5
    model = guided(net, TermConfig(look=look, jacobian=jacobian, scale=scale), guides=[guide])
    for step in steps():
        alpha = (1 + step.sigma**2) ** -0.5
        noise = math.sqrt(1 - alpha**2)
        x_t = (alpha * state(step)).requires_grad_()
        sigma = x_t.new_full((2,), step.sigma)
        x0 = net.denoise(x_t / alpha, sigma)
        if look == "x0":
            (g,) = torch.autograd.grad(guide.value(x0, y).sum(), x0)
            g = g * {"vp": 1.0, "ve": 1 / alpha, "gaussian": alpha}[jacobian]
        else:
            size = (x_t / alpha).detach().square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1)
            seen = {"x_t": x_t / alpha, "rms": x_t / alpha / size, "x0-through": x0}[look]
            (g,) = torch.autograd.grad(guide.value(seen, y, sigma if look == "x_t" else None).sum(), x_t)
        eps = (x_t - alpha * x0) / noise
        expected = (x_t - noise * (eps - noise * scale * g)) / alpha
        x = x_t.detach() / alpha
        for out in (model.predict_step(x, step, y).x0, model.denoise(x, sigma, y)):
            torch.testing.assert_close(out, expected.detach(), rtol=1e-11, atol=1e-11)


def test_a_shift_is_the_gradient_in_what_was_looked_at():
    net, guide, y = Net(), Bowl(), labels()
    step = steps()[4]
    x = state(step)
    x0 = net.denoise(x, x.new_full((2,), step.sigma))
    expected = x0 + 0.3 * guide.gradient(x0, y).gradient
    model = guided(net, TermConfig(rule="shift", scale=0.3), guides=[guide])
    torch.testing.assert_close(model.predict_step(x, step, y).x0, expected)


def test_rows_may_stand_at_levels_of_their_own():
    x, sigma, y = normal(4, *SHAPE), torch.tensor([0.05, 0.5, 5.0, 50.0]).double(), labels(4)
    for term in (
        TermConfig(schedule="sqrt-noise", sigma_min=0.1, look="x0-through"),
        TermConfig(rule="shift", schedule="sigma2"),
        TermConfig(look="x_t"),
        TermConfig(look="rms", normalise="l2"),
    ):
        model = guided(Net(), term)
        alone = torch.cat([model.denoise(x[[i]], sigma[[i]], y[[i]]) for i in range(4)])
        torch.testing.assert_close(model.denoise(x, sigma, y), alone, rtol=1e-12, atol=1e-12)
        stepped = [model.predict_step(x[[i]], Step(0, 1, float(sigma[i]), 0.0), y[[i]]).x0 for i in range(4)]
        torch.testing.assert_close(torch.cat(stepped), alone, rtol=1e-12, atol=1e-12)


def test_guidance_of_the_first_half_of_heun_leaves_the_second_alone():
    calls = []

    class Watched(Bowl):
        def gradient(self, x, target, sigma=None):
            calls.append(0)
            return super().gradient(x, target, sigma)

    for halves, expected in (("both", 2 * len(GRID) - 1), ("first", len(GRID))):
        calls.clear()
        model = guided(Net(), TermConfig(halves=halves), guides=[Watched()])
        samplers.heun(Conditional(model, labels()), state(steps()[0]), GRID)
        assert len(calls) == expected


def test_a_step_that_is_not_guided_does_not_ask_the_guide():
    guide = Bowl()
    model = guided(Net(), TermConfig(every=3, start=0.3), guides=[guide])
    samplers.ddim(Conditional(model, labels()), state(steps()[0]), GRID)
    assert len(guide.seen) == 3  # steps 3, 6 and 9 of 10


# ---- Rule nudge


def test_a_nudge_is_the_published_one_and_comes_before_the_churn():
    """x_hat = x + sqrt(t_hat^2 - t^2) n + (g / RMS(g)) RMS(x) w_i, seen at x / max(1, RMS(x))."""
    net, guide, y = Net(), Bowl(), labels()
    config = METHODS["elucd-edm"]
    asked = []

    class Watched(Net):
        def denoise(self, x, sigma, y=None):
            asked.append((x, float(sigma[0])))
            return super().denoise(x, sigma, y)

    model = guided(Watched(), config, guides=[guide])
    start, noise = state(steps()[0]), normal(len(GRID), 2, *SHAPE, seed=8)
    given = iter(noise)
    options: Any = {"churn": 3.0, "noise": lambda x: next(given)}
    out = samplers.heun(Conditional(model, y), start, GRID, **options)

    def rms(x):
        return x.square().mean((1, 2, 3), keepdim=True).sqrt()

    x, seen = start, iter(asked)
    for step in steps():
        g = guide.gradient(x / rms(x).clamp(min=1), y).gradient
        w = linear_sine(config, step.number, step.total)
        t_hat = step.sigma * (1 + min(3.0 / step.total, math.sqrt(2) - 1))
        x_hat = x + math.sqrt(t_hat**2 - step.sigma**2) * noise[step.number] + g / rms(g) * rms(x) * w
        at, level = next(seen)
        torch.testing.assert_close(at, x_hat, rtol=1e-12, atol=1e-12)
        assert level == pytest.approx(t_hat)
        slope = (x_hat - net.denoise(x_hat, x.new_full((2,), t_hat))) / t_hat
        x = x_hat + (step.next - t_hat) * slope
        if step.next:
            next(seen)  # Heun's second half: not nudged
            other = (x - net.denoise(x, x.new_full((2,), step.next))) / step.next
            x = x_hat + (step.next - t_hat) * (slope + other) / 2
    torch.testing.assert_close(out, x, rtol=1e-10, atol=1e-10)


def test_a_nudge_does_not_touch_the_prediction():
    step = steps()[3]
    x = state(step)
    model = guided(Net(), TERMS["nudge"])
    assert torch.equal(
        model.predict_step(x, step, labels()).x0, Net().denoise(x, x.new_full((2,), step.sigma))
    )


# ---- Stability


@pytest.mark.parametrize(("normalise", "size"), [("rms", 1.0), ("l2", 1 / math.sqrt(math.prod(SHAPE)))])
def test_normalised_gradients_have_one_size_row_by_row_and_zero_stays_zero(normalise, size):
    class Uneven(Bowl):
        def gradient(self, x, target, sigma=None):
            graded = super().gradient(x, target, sigma)
            return graded._replace(
                gradient=graded.gradient * torch.tensor([0.0, 1e-6, 1e3]).view(-1, 1, 1, 1)
            )

    step = steps()[4]
    x, y = state(step, rows=3), labels(3)
    plain = Net().denoise(x, x.new_full((3,), step.sigma))
    term = TermConfig(rule="shift", normalise=normalise)
    moved = guided(Net(), term, guides=[Uneven()]).predict_step(x, step, y).x0 - plain
    assert torch.equal(moved[0], torch.zeros_like(moved[0]))
    rms = moved.square().mean((1, 2, 3)).sqrt()
    assert rms[1:].tolist() == pytest.approx([size, size])


def test_clipping_shortens_long_gradients_only():
    step = steps()[4]
    x, y = state(step, rows=4), labels(4)
    sigma = x.new_full((4,), step.sigma)
    plain = Net().denoise(x, sigma)
    free = guided(Net(), TermConfig(rule="shift")).predict_step(x, step, y).x0 - plain
    sizes = free.square().mean((1, 2, 3)).sqrt()
    limit = float(sizes.median()) * 1.01
    term = TermConfig(rule="shift", clip=limit)
    moved = guided(Net(), term).predict_step(x, step, y).x0 - plain
    expected = free * (limit / sizes).clamp(max=1).view(-1, 1, 1, 1)
    assert 0 < int((sizes > limit).sum()) < 4
    torch.testing.assert_close(moved, expected)


# ---- Composition


def test_terms_add_up():
    step, y = steps()[4], labels()
    x = state(step)
    terms = [
        TermConfig(scale=0.7),
        TermConfig(look="x0-through", scale=-0.4),
        TermConfig(rule="shift", look="x0-through", scale=0.2, normalise="rms"),
        TermConfig(look="x_t", rule="mean"),
    ]
    guides = [Bowl(term.look == "x_t", seed=i) for i, term in enumerate(terms)]
    net = Net(variance=True)
    plain = net.denoise(x, x.new_full((2,), step.sigma))
    moves = [
        guided(net, term, guides=[guide]).predict_step(x, step, y).x0 - plain
        for term, guide in zip(terms, guides, strict=True)
    ]
    together = guided(net, *terms, guides=guides).predict_step(x, step, y)
    torch.testing.assert_close(together.x0, plain + sum(moves), rtol=1e-11, atol=1e-11)
    assert torch.equal(together.variance, torch.sigmoid(x))

    nudges = [TermConfig(rule="nudge", look="rms", scale=s) for s in (0.1, -0.3)]
    each = [
        guided(net, n, guides=[g]).begin_step(x, step, y) - x for n, g in zip(nudges, guides, strict=False)
    ]
    both = guided(net, *nudges, guides=guides[:2]).begin_step(x, step, y)
    torch.testing.assert_close(both, x + sum(each))


def test_classifier_free_guidance_and_clipping_come_first():
    net, guide, y, step = Net(num_classes=CLASSES), Bowl(), labels(), steps()[4]
    x = state(step)
    sigma = x.new_full((2,), step.sigma)
    inner = Clipped(ClassifierFreeGuidance(CFGConfig(weight=1.5), net))
    x0 = (2.5 * net.denoise(x, sigma, y) - 1.5 * net.denoise(x, sigma)).clamp(-1, 1)
    out = guided(inner, TermConfig(rule="shift", scale=30.0), guides=[guide]).predict_step(x, step, y).x0
    torch.testing.assert_close(out, x0 + 30 * guide.gradient(x0, y).gradient)
    assert float(out.abs().max()) > 1  # what guidance adds is not clipped
    torch.testing.assert_close(guide.seen[0], x0)


def test_guided_denoisers_nest_and_pass_on_what_they_are_told_of_the_step():
    step, y = steps()[2], labels()
    x = state(step)
    first, second = TermConfig(rule="mean", scale=0.5), TermConfig(look="x_t", rule="mean", scale=2.0)
    guides = [Bowl(), Bowl(True, seed=1)]
    net = Net(variance=True)
    inner = guided(net, first, guides=guides[:1])
    nested = guided(inner, second, guides=guides[1:])
    flat = guided(net, first, second, guides=guides)
    torch.testing.assert_close(nested.predict_step(x, step, y), flat.predict_step(x, step, y))


@pytest.mark.parametrize(("condition", "own", "told"), [(None, CLASSES, True), (False, CLASSES, False)])
def test_labels_go_to_a_model_of_the_same_classes_unless_told_not_to(condition, own, told):
    step, y = steps()[4], labels()
    x = state(step)
    net = Net(num_classes=own)
    model = guided(net, TermConfig(scale=0.0), condition=condition)
    sigma = x.new_full((2,), step.sigma)
    assert torch.equal(model.predict_step(x, step, y).x0, net.denoise(x, sigma, y if told else None))
    assert model.num_classes == CLASSES


def test_a_model_of_other_classes_is_not_told_the_label():
    step, y = steps()[4], labels()
    x = state(step)
    for own in (None, CLASSES + 3):
        model = guided(Net(num_classes=own), TermConfig(scale=0.0))
        assert torch.equal(model.predict_step(x, step, y).x0, Net().denoise(x, x.new_full((2,), step.sigma)))
        with pytest.raises(UserError, match="condition = true: the denoiser knows"):
            guided(Net(num_classes=own), TermConfig(), condition=True)


def test_it_offers_a_denoiser_alone_and_passes_the_rest_through():
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 12), torch.eye(12)[None])
    model = guided(mixture, TermConfig())
    assert offered(model) == {"denoise"}
    assert model.dim == 12
    assert model.null_label is None
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


# ---- Nothing waits for the device


class NoNumbersOut(TorchDispatchMode):
    """Raises where a number is read out of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read out of a tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in TERMS if name != "official"])
def test_no_step_reads_a_number_out_of_a_tensor(name):
    model, y = guided(Net(variance=True), TERMS[name]), labels()
    walk = [(step, state(step)) for step in steps()]
    with NoNumbersOut():
        for step, x in walk:
            model.predict_step(model.begin_step(x, step, y), step, y)
    if name in ("score", "shift"):
        with NoNumbersOut():
            model.denoise(x, torch.ones(2, dtype=torch.float64), y)


def test_it_works_under_no_grad_and_leaves_no_graph():
    step, y = steps()[4], labels()
    x = state(step)
    for term in TERMS.values():
        model = guided(Net(variance=True), term)
        with torch.no_grad():
            model.predict_step(x, steps()[0], y)
            prediction = model.predict_step(x, step, y)
        assert not prediction.x0.requires_grad
        assert not prediction.variance.requires_grad
    assert not x.requires_grad


# ---- Errors


def test_what_cannot_work_says_why():
    step, y = steps()[4], labels()
    x = state(step)
    sigma = x.new_full((2,), step.sigma)
    for term in (TERMS["mean"], TERMS["nudge"]):
        with pytest.raises(UserError, match=f"rule '{term.rule}' of guidance needs the step: call a sampler"):
            guided(Net(), term).denoise(x, sigma, y)
    with pytest.raises(UserError, match="2 terms and 1 guides"):
        guided(Net(), TermConfig(), TermConfig(), guides=[Bowl()])
    few = Bowl()
    few.num_classes = 2
    with pytest.raises(UserError, match=r"the same classes, not \[2, 4\]"):
        guided(Net(), TermConfig(), TermConfig(), guides=[Bowl(), few])
    with pytest.raises(UserError, match="look 'x_t' needs a classifier that knows the noise level"):
        guided(Net(), TermConfig(look="x_t"), guides=[Bowl()])
    with pytest.raises(UserError, match="halves = 'first'"):
        samplers.heun(Conditional(guided(Net(), TERMS["mean"]), y), x, GRID)
    soft = torch.full((2, CLASSES), 0.25)
    with pytest.raises(UserError, match="for the guide alone: set condition = false"):
        guided(Net(num_classes=CLASSES), TermConfig()).predict_step(x, step, soft)


def test_a_denoiser_that_cuts_its_graph_is_not_differentiated_silently():
    class Cut(Net):
        def denoise(self, x, sigma, y=None):
            return super().denoise(x, sigma, y).detach()

    step = steps()[4]
    with pytest.raises(UserError, match="cuts its graph: use look 'x0'"):
        guided(Cut(), TERMS["through"]).predict_step(state(step), step, labels())
