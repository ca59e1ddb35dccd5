"""The guided denoiser: where a classifier looks, and how its gradient moves the sample.

Off-the-shelf guidance (EluCD, Ma et al. 2024, arXiv 2310.11311), classifier guidance (ADM-G, Dhariwal and
Nichol 2021), universal guidance, FreeDoM, DPS, MPGD: all of them a look, a rule and a strength.

Notation, in the currency x = x0 + sigma n: D the prediction; a step from level t to level s; alpha =
1 / sqrt(1 + level^2) and x_VP = alpha x, the variance-preserving state of published formulas; w the strength
(`strengths`); g the gradient of the guide's log-ratio in what it looks at, g_x in x: g_x = alpha g_VP.

look        g is in           g_x
x0          D, detached       J g, where J = alpha I (jacobian vp), I (ve) or alpha^2 I (gaussian)
x0-through  x, through D      g
x_t         x                 g
rms         x / max(1, RMS)   g / max(1, RMS), the RMS held fixed

Rule score: D + w sigma^2 g_x. That is eps - w sqrt(1 - abar) g_VP (DDIM, DPM-Solver), and v or flow moved
    alike: here all are one formula. With look x_t and the exact noisy classifier it is E[x0 | x, y].
Rule mean: mu_VP + w (Sigma + gamma sigma2_max sin(pi t / N)) g_VP, at the last step too (EluCD section 4;
    ADM-G algorithm 1); with look x0 and jacobian vp, g_VP is the gradient in x0 itself. An ancestral step's
    mean is (1 - (s/t)^2) D + (s/t)^2 x, and mu_VP = alpha_s mu: D moves by that over alpha_s (1 - (s/t)^2).
    Under another sampler it is, to first order in the step, rule score.
Rule shift: D + w g (MPGD; TFG's mu).
Rule nudge: x + w RMS(x) g before the step, at an unchanged level (EluCD on EDM).

What samples p(x0) p(y | x0): score and mean with look x_t, w = 1 and the exact classifier; the two with look
x0-through where the log-ratio is linear in x0 and the data are one Gaussian; and the two with look x0 and
jacobian gaussian where those data are N(0, I). All else steers, and has no distribution that it would sample.

Gradients smoothed over steps (EMA, Adam) have state by nature and are not offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdm_core.adapters import Wrapper
from cdm_core.errors import UserError
from cdm_core.samplers import Conditional, Prediction, Step
from cdm_plugins_guidance.apply_configs import GuidedConfig, TermConfig
from cdm_plugins_guidance.strengths import beta, level_weight, sine, weight


class GuidedDenoiser(Wrapper):
    """`model` steered towards the classes y by `guides`, one a term of `config`; their moves are added up.

    Samplers ask `predict_step` and `begin_step` (`cdm_core.samplers.Conditional`); `denoise` serves the rules
    that need no step. y None: the model itself, bitwise. y (B,) int64, or whatever else the guides take for a
    target. Clipping and classifier-free guidance come first: wrap a model that has them. Nothing is kept
    from one step to the next, but for `peak` official, which is so defined.
    """

    capabilities = frozenset({"denoise"})
    null_label = None  # the guides have none; without it, classifier-free guidance outside asks for y = None

    def __init__(self, config: GuidedConfig, model: Any, guides: Sequence[Any]) -> None:
        """guides: `Guide`s, one a term, of one number of classes. Raises `UserError` on a mismatch."""
        super().__init__(model)
        _check_guides(config, guides)
        self.terms = tuple(zip(config.terms, guides, strict=True))
        self.num_classes: int = guides[0].num_classes
        own = getattr(model, "num_classes", None)
        if config.condition and own != self.num_classes:
            raise UserError(
                f"condition = true: the denoiser knows {own or 'no'} classes, the guide {self.num_classes}; "
                "set condition = false"
            )
        self.conditional = own == self.num_classes if config.condition is None else config.condition
        self._peaks = [Peak() for _ in self.terms]

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """Guided E[x0 | x, sigma, y]; x (B, C, H, W), sigma (B,).

        `UserError` where the settings need to know the step.
        """
        model = Conditional(self.model, self._label(y))
        rows = sigma.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        terms = [term for term in self.terms if _wanted(term, y) and term[0].scale != 0]
        moves = [_without_step(*term, rows) for term in terms]
        return self._guided(lambda x: Prediction(model(x, sigma)), x, sigma, y, moves).x0

    def predict_step(self, x: Tensor, step: Step, y: Tensor | None = None) -> Prediction:
        """Guided prediction for a step; the learned variance is the model's own."""
        if step.number == 0 and not step.correction:
            for peak in self._peaks:  # another walk
                peak.largest = 0.0
        model = Conditional(self.model, self._label(y))
        terms = zip(self.terms, self._peaks, strict=True)
        moves = [m for term, peak in terms if _wanted(term, y) and (m := _for_step(*term, step, peak))]
        sigma = x.new_full((len(x),), step.level)
        return self._guided(lambda x: model.predict(x, step), x, sigma, y, moves)

    def begin_step(self, x: Tensor, step: Step, y: Tensor | None = None) -> Tensor:
        """The state that a step sets out from: the model's own, and every nudge from there."""
        x = Conditional(self.model, self._label(y)).begin(x, step)
        nudged = x
        for config, guide in self.terms:
            asked = config.rule == "nudge" and _wanted((config, guide), y)
            amount = weight(config, step) if asked else 0.0
            if amount != 0:
                view = View(x, None, x.new_full((len(x),), step.level), step.level, y)
                nudged = nudged + amount * _rms(x) * _steady(config, _seen(config, guide, view).g)
        return nudged

    def _label(self, y: Tensor | None) -> Tensor | None:
        """What of y goes to the model."""
        if y is None or not self.conditional:
            return None
        if y.dim() != 1:
            raise UserError("soft labels and sets of classes are for the guide alone: set condition = false")
        return y

    def _guided(
        self,
        predict: Callable[[Tensor], Prediction],
        x: Tensor,
        sigma: Tensor,
        y: Tensor | None,
        moves: Sequence[Move],
    ) -> Prediction:
        through = any(move.config.look == "x0-through" for move in moves)
        prediction, pull = _differentiable(predict, x) if through else (predict(x), None)
        x0 = prediction.x0
        for config, guide, level, amount, step, peak in moves:
            g, to_x = _seen(config, guide, View(x, prediction.x0, sigma, level, y, pull))
            g = amount * _steady(config, g)
            if step is not None and peak is not None:
                g = _spread(config, step, prediction.variance, peak) * g
            x0 = x0 + (g if config.rule == "shift" else to_x * g)
        return prediction._replace(x0=x0)


# ---- How it moves the prediction


class Move(NamedTuple):
    """A term at work at a level: D moves by amount g_x, rule shift: amount g, rule mean: amount Sigma g_x."""

    config: TermConfig
    guide: Any
    level: Any  # float, or (B, 1, ..., 1) where every row has its own
    amount: Any  # likewise
    step: Step | None = None  # whose variance is Sigma; rule mean alone
    peak: Peak | None = None  # likewise


def _wanted(term: tuple[TermConfig, Any], y: Tensor | None) -> bool:
    """Whether a term has a say: without labels only one that asks for none (`guide.target` none)."""
    return y is not None or not getattr(term[1], "needs_label", True)


def _for_step(config: TermConfig, guide: Any, step: Step, peak: Peak) -> Move | None:
    """A term's part in the prediction of a step; None where it has none."""
    amount = weight(config, step)
    if config.rule == "nudge" or amount == 0:
        return None
    if config.rule == "score":
        amount *= step.level**2
    elif config.rule == "mean":
        if step.correction:
            raise UserError(
                "rule 'mean' moves the mean of an ancestral step, and Heun's second half has none: use rule "
                "'score', or halves = 'first'"
            )
        alpha, alpha_next = ((1 + level**2) ** -0.5 for level in (step.sigma, step.next))
        amount /= alpha * alpha_next * (1 - (step.next / step.sigma) ** 2)
    if config.rule == "mean":
        return Move(config, guide, step.level, amount, step, peak)
    return Move(config, guide, step.level, amount)


def _without_step(config: TermConfig, guide: Any, level: Tensor) -> Move:
    """A term's part in a prediction of which the level (B, 1, ..., 1) alone is known."""
    if config.rule in ("mean", "nudge"):
        raise UserError(
            f"rule {config.rule!r} of guidance needs the step: call a sampler of cdm_core.samplers with "
            "Conditional(model, y), not `denoise` by itself"
        )
    amount = level_weight(config, level)
    return Move(config, guide, level, amount * level**2 if config.rule == "score" else amount)


# ---- Where a guide looks


class View(NamedTuple):
    """What there is to look at: x (B, ...) at sigma (B,), x0 predicted from it, and the target y.

    level: sigma as a float or (B, 1, ..., 1); pull: dx0/dx transposed, times a cotangent.
    """

    x: Tensor
    x0: Tensor | None
    sigma: Tensor
    level: Any
    y: Any
    pull: Callable[[Tensor], Tensor] | None = None


class Seen(NamedTuple):
    """A gradient g (B, ...), and to_x with g_x = to_x g."""

    g: Tensor
    to_x: Any = 1.0


def _seen(config: TermConfig, guide: Any, view: View) -> Seen:
    if config.look == "x_t":
        return Seen(guide.gradient(view.x, view.y, view.sigma).gradient)
    if config.look == "rms":
        inverse = 1 / _rms(view.x).clamp(min=1)
        return Seen(guide.gradient(view.x * inverse, view.y).gradient, inverse)
    g = guide.gradient(view.x0, view.y).gradient
    if config.look == "x0-through":
        assert view.pull is not None
        return Seen(view.pull(g))
    power = {"ve": 0, "vp": 1, "gaussian": 2}[config.jacobian]
    return Seen(g, (1 + view.level**2) ** (-power / 2))


def _differentiable(
    predict: Callable[[Tensor], Prediction], x: Tensor
) -> tuple[Prediction, Callable[[Tensor], Tensor]]:
    """The prediction, detached, and its transposed Jacobian as a function of a cotangent."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        kept = predict(leaf)
    if not kept.x0.requires_grad:
        raise UserError(
            "look 'x0-through' differentiates through the denoiser, and this one cuts its graph: "
            "use look 'x0'"
        )

    def pull(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(kept.x0, leaf, cotangent.to(kept.x0.dtype), retain_graph=True)[0]

    return Prediction(kept.x0.detach(), None if kept.variance is None else kept.variance.detach()), pull


# ---- Sizes


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each row, (B, 1, ..., 1)."""
    return x.square().mean(tuple(range(1, x.dim())), keepdim=True).sqrt()


def _steady(config: TermConfig, g: Tensor) -> Tensor:
    """g normalised and clipped, row by row."""
    if config.normalise != "none":
        entries = g[0].numel() if config.normalise == "l2" else 1
        g = g / (_rms(g) * entries**0.5).clamp(min=config.eps)
    if config.clip < float("inf"):
        g = g * (config.clip / _rms(g).clamp(min=config.eps)).clamp(max=1)
    return g


# ---- The variance that rule mean multiplies with


class Peak:
    """sigma2_max as the released code has it, for parity alone: the one thing kept from step to step.

    The largest variance of the first sample's corner pixel at the guided steps so far.
    """

    def __init__(self) -> None:
        self.largest = 0.0

    def reach(self, step: Step, variance: Tensor | float) -> float:
        """The peak at `step`."""
        corner = variance.flatten()[0].item() if isinstance(variance, Tensor) else variance
        self.largest = max(self.largest, corner)
        return self.largest


def _spread(config: TermConfig, step: Step, learned: Tensor | None, peak: Peak) -> Tensor | float:
    """Sigma + gamma sigma2_max sin(pi t / N) >= 0 in VP units; (B, ...) where the variance is learned."""
    base = _base(config, step, learned)
    if config.gamma == 0:
        return base
    largest = peak.reach(step, base) if config.peak == "official" else beta(_step(step, 0))
    total = base + config.gamma * largest * sine(step.number, step.total)
    return total.clamp(min=0) if isinstance(total, Tensor) else max(total, 0.0)


def _base(config: TermConfig, step: Step, learned: Tensor | None) -> Tensor | float:
    """Sigma of a step: its variance as the settings want it."""
    small, large = _small(step), beta(step)
    if config.variance == "one":
        return 1.0
    if config.variance == "small" or (config.variance == "auto" and learned is None):
        return small
    if step.next == 0:  # its own beta~ is 0: large, and the least that is learned, is that of the step before
        small = _small(_step(step, step.number - 1)) if step.number else large
    if config.variance == "large" or learned is None:
        return large if step.next else small
    return small * (learned * math.log(large / small)).exp()


def _step(step: Step, number: int) -> Step:
    """Another step of the same walk."""
    return step._replace(number=number, sigma=step.grid[number], next=step.grid[number + 1])


def _small(step: Step) -> float:
    """beta~ of a step, in VP units."""
    return step.small / (1 + step.next**2)


# ---- Checks


def _check_guides(config: GuidedConfig, guides: Sequence[Any]) -> None:
    if len(guides) != len(config.terms):
        raise UserError(f"guidance has {len(config.terms)} terms and {len(guides)} guides: one a term")
    classes = {guide.num_classes for guide in guides}
    if len(classes) != 1:
        raise UserError(f"guides of one sample must know the same classes, not {sorted(classes)}")
    for term, guide in zip(config.terms, guides, strict=True):
        if term.look == "x_t" and not guide.noise_aware:
            raise UserError(
                "look 'x_t' needs a classifier that knows the noise level; for one of clean images use "
                "look 'x0', or 'rms'"
            )
