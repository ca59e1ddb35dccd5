"""The guide: any classifier as a source of gradients (Ma et al. 2023, arXiv 2310.11311).

"Elucidating the design space of classifier-guided diffusion generation" steers an unconditional prediction
by the gradient of a log-ratio of an off-the-shelf classifier's logits f,

    L(x) = tau1 q.f(x) - logsumexp(tau2 f(x)),    dL/df = tau1 q - tau2 softmax(tau2 f),

tau1 = tau2 = 1: log p(y | x); tau2 = 0: the joint energy f_y, log p(x, y) up to a constant. Of every term the
gradient in f is in closed form and seeds one backward pass of the classifier. With p = softmax(f):

    a set S of classes (bool)   tau1 logsumexp_S(f) - logsumexp(tau2 f): log p(y in S | x) at tau1 = tau2 = 1;
                                "anything but y" is the set of all others
    attributes (sigmoid)        sum_i tau1 q_i f_i - log(1 + exp(tau2 f_i))
    no label                    -tau1 H(p)
    regularisers                L - alpha D, D = KL(q|p) (rkl), KL(p|q) (fkl), Jensen-Shannon, or H(p)
    tilt t                      (1 - exp(-t L)) / t, hence the gradient of L times exp(-t L): the published
                                batch weight without its sum over the batch, which would mix the rows

No row depends on any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core.errors import UserError
from cdm_core.random import Draws, fold
from cdm_kernels import softmax_gradient
from cdm_plugins_guidance.guide_configs import NATIVE, OWN, Contract, GuideConfig

__all__ = ["Graded", "Guide"]


class Graded(NamedTuple):
    """value (B,) float32, L in nats; gradient (B, ...) of L in x, like x; logits (B, K) float32.

    The gradient, there to be applied, carries `class_weights` and the compensation for normalised input;
    the value neither.
    """

    value: Tensor
    gradient: Tensor
    logits: Tensor


class Guide:
    """A log-ratio of a classifier's logits, and its gradient in x.

    num_classes: K; noise_aware: the classifier takes the noise level; skipped: rows so far whose gradient was
    not finite and became zero. A float32 classifier works in float32 whatever autocast says.
    """

    def __init__(
        self,
        classifier: nn.Module | Any,
        config: GuideConfig | None = None,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """classifier: an `nn.Module`, images (B, C, H, W) -> logits (B, K), or anything with
        `class_logits(x, sigma)`, then fed x and sigma as they come. It must be in evaluation mode; its
        parameters are frozen here, and stay so. Its attributes `num_classes: int` and
        `contract: guide_configs.Contract` are taken where it has them.
        decode: latents to images in [-1, 1], differentiable. Raises UserError on settings it cannot serve.
        """
        self.classifier: Any = classifier
        self.decode = decode
        self.config = config or GuideConfig()
        try:
            self.config.check()
        except ValueError as error:
            raise UserError(f"guide: {error}") from error
        self.noise_aware = callable(getattr(classifier, "class_logits", None))
        self._input = _Input.of(self.config, getattr(classifier, "contract", None) or Contract())
        if self.noise_aware and (decode or self._input != _Input()):
            raise UserError(
                "a classifier with class_logits(x, sigma) is fed noisy x as it comes: leave out decode, and "
                "use input 'raw' without size and channels"
            )
        self._classes: int | None = getattr(classifier, "num_classes", None)
        self._dtype = _freeze(classifier)
        self._valid: Tensor | None = None
        self._skipped = torch.zeros((), dtype=torch.int64)

    @property
    def num_classes(self) -> int:
        """K, as the classifier says or as its first logits told; UserError before, where it does not say."""
        if self._classes is None:
            raise UserError(
                "how many classes the guide's classifier has is known once it has seen an image: "
                "give it an attribute num_classes"
            )
        return self._classes

    @property
    def needs_label(self) -> bool:
        """Whether it must be told what is wanted: all but `target` none must."""
        return self.config.target != "none"

    @property
    def skipped(self) -> int:
        """Rows so far whose gradient was not finite; waits for the device."""
        return int(self._skipped)

    # -- of x ------------------------------------------------------------------------------------------------

    def logits(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of x (B, ...) in model units, or latents where there is a decoder.

        sigma (B,), the noise std of x in data units, for a noise-aware classifier; None: clean.
        """
        parts = [self._classify(x[rows], _cut(sigma, rows)) for rows in self._slices(len(x))]
        return torch.cat(parts)

    def gradient(
        self, x: Tensor, target: Tensor | None, sigma: Tensor | None = None, *, draws: Draws | None = None
    ) -> Graded:
        """L and its gradient in x: one forward and one backward pass of the classifier, no graph left behind.

        x (B, ...); sigma (B,) as in `logits`. target: (B,) int64 classes, (B, K) float labels q or (B, K)
        bool sets of classes; None only where the settings ask for no label. draws, of the perturbed copies:
        of B rows, or of one that all rows share; None: the same one at every call, from the settings' seed.
        Works under `torch.no_grad`, not under `inference_mode`.
        """
        target = self._wanted(target, x, sigma)
        perturbed = _Perturbation.draw(self.config, x, draws)
        parts = [
            self._graded(x[rows], _cut(target, rows), _cut(sigma, rows), perturbed.rows(rows))
            for rows in self._slices(len(x))
        ]
        value, gradient, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        return Graded(value, gradient, logits)

    def differentiable(
        self, x: Tensor, target: Tensor | None, sigma: Tensor | None = None, *, draws: Draws | None = None
    ) -> Tensor:
        """L (B,) with a graph into x, through which `gradient` goes back: guarded, weighted, and computed
        here already, so that nothing of the classifier is kept. A second derivative raises.
        """
        graded = self.gradient(x, target, sigma, draws=draws)
        return _Linked.apply(x, graded.value, graded.gradient) if x.requires_grad else graded.value

    def _graded(
        self, x: Tensor, target: Tensor | None, sigma: Tensor | None, perturbed: _Perturbation
    ) -> Graded:
        copies = self.config.copies
        with torch.enable_grad():
            leaf = x.detach().to(self._dtype).requires_grad_()
            logits = self._classify(leaf, sigma, perturbed)
        if not logits.requires_grad:
            raise UserError("the guide's classifier cuts its logits off from the images: it has no gradient")
        with torch.no_grad():
            value, cotangent = self._terms(logits.detach(), _repeat(target, copies))
            value = value.view(-1, copies)
            even = self.config.average == "log"
            weight = torch.full_like(value, 1 / copies) if even else value.softmax(1)
            cotangent = (cotangent * weight.view(-1, 1)).to(logits.dtype)
        with torch.autocast(x.device.type, enabled=False):  # a backward pass obeys the autocast around it
            (gradient,) = torch.autograd.grad(logits, leaf, cotangent)
        mean_logits = logits.detach().unflatten(0, (-1, copies)).mean(1)
        return Graded(self._average(value), self._applied(gradient, target).to(x.dtype), mean_logits)

    def _average(self, value: Tensor) -> Tensor:
        """(B, copies) -> (B,)."""
        if self.config.average == "log":
            return value.mean(1)
        return value.logsumexp(1) - math.log(value.shape[1])

    def _classify(
        self, x: Tensor, sigma: Tensor | None = None, perturbed: _Perturbation | None = None
    ) -> Tensor:
        """Logits (B * copies, K), at least float32."""
        if getattr(self.classifier, "training", False):
            raise UserError("the guide's classifier is in training mode: call its eval() first")
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self._dtype)
            x = perturbed.noisy(x) if perturbed else x
            if self.noise_aware:
                x = perturbed.moved(x) if perturbed else x
                level = x.new_zeros(len(x)) if sigma is None else _repeat(sigma, len(x) // len(sigma)).to(x)
                logits = self.classifier.class_logits(x, level)
            else:
                x = self.decode(x) if self.decode else x
                x = perturbed.moved(x) if perturbed else x
                logits = self.classifier(self._input.prepared(x))
        return self._checked(logits, len(x)).to(torch.promote_types(logits.dtype, torch.float32))

    def _checked(self, logits: Any, rows: int) -> Tensor:
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != rows:
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"the guide's classifier must return logits ({rows}, classes), not {what}")
        if self._classes is None:
            self._classes = logits.shape[1]
        if logits.shape[1] != self._classes:
            raise UserError(
                f"the guide's classifier has {self._classes} classes but {logits.shape[1]} logits"
            )
        return logits

    def _slices(self, rows: int) -> Iterator[slice]:
        size = self.config.micro_batch or max(rows, 1)
        return (slice(start, start + size) for start in range(0, max(rows, 1), size))

    def _applied(self, gradient: Tensor, target: Tensor | None) -> Tensor:
        """The gradient as it is applied: weighted, and rows that are not finite made zero and counted."""
        each = (-1, *[1] * (gradient.ndim - 1))
        if self.config.compensate and self._input.mean:
            gradient = gradient * self._input.compensation
        if self.config.class_weights and target is not None:
            gradient = gradient * self._weights(target).to(gradient.dtype).view(each)
        finite = gradient.isfinite().flatten(1).all(1)
        self._skipped = self._skipped.to(gradient.device) + (~finite).sum()
        return gradient.where(finite.view(each), 0)

    def _weights(self, target: Tensor) -> Tensor:
        """The class weight of each row (B,); of labels or sets (B, K) their average."""
        weights = _constants(self.config.class_weights, target.device, torch.float32)
        if target.ndim == 1:
            return weights[target]
        return (target.float() * weights).sum(1) / target.float().sum(1)

    # -- of logits -------------------------------------------------------------------------------------------

    def value(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """L (B,) of logits (B, K), differentiable, at least float32; target as in `gradient`."""
        return self._terms(logits, self._labels(target, logits))[0]

    def cotangent(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """dL/dlogits (B, K) in closed form, at least float32; target as in `gradient`."""
        with torch.no_grad():
            return self._terms(logits, self._labels(target, logits))[1]

    def _terms(self, logits: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """L (B,) and dL/df (B, K); target as `_labels` returns it."""
        settings = self.config
        f = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if target is None:
            entropy, slope = _entropy(f)
            return -settings.tau1 * entropy, -settings.tau1 * slope
        away = settings.target == "not_class"
        ratio = _attributes if settings.likelihood == "sigmoid" else _classes
        value, cotangent = ratio(f, target, settings.tau1, settings.second_tau, away)
        if settings.tilt:
            cotangent = cotangent * torch.exp(-settings.tilt * value)[:, None]
            value = -torch.expm1(-settings.tilt * value) / settings.tilt
        if settings.alpha:
            q = _smoothed(target, f, settings.smoothing, away)
            divergence, slope = _DIVERGENCES[settings.regulariser](f, q)
            value, cotangent = value - settings.alpha * divergence, cotangent - settings.alpha * slope
        return value, cotangent

    # -- targets ---------------------------------------------------------------------------------------------

    def _wanted(self, target: Tensor | None, x: Tensor, sigma: Tensor | None) -> Tensor | None:
        """The target checked against x, and K learnt where the classifier does not say."""
        if self._classes is None and len(x):
            with torch.no_grad():
                self._classify(x[:1], _cut(sigma, slice(1)))
        return self._labels(target, x)

    def _labels(self, target: Tensor | None, like: Tensor) -> Tensor | None:
        """The target, checked once for as long as it stays the same tensor; None where no label is wanted."""
        if self.config.target == "none":
            return None
        if target is None:
            raise UserError("the guide needs a class to steer by: give labels, or use target 'none'")
        if target is not self._valid:  # looking at values on a device waits for it
            self._check(target, like.shape[1] if self._classes is None else self._classes)
            self._valid = target
        if len(target) != len(like):
            raise UserError(f"the guide got {len(target)} targets for {len(like)} images")
        return target.to(like.device)

    def _check(self, target: Tensor, classes: int) -> None:
        weights = len(self.config.class_weights)
        if weights not in (0, classes):
            raise UserError(f"class_weights has {weights} entries, the guide's classifier {classes} classes")
        if target.dtype == torch.int64 and target.ndim == 1:
            if len(target) and not 0 <= int(target.min()) <= int(target.max()) < classes:
                raise UserError(f"the guide's classes are 0 to {classes - 1}, not {target.unique().tolist()}")
            return
        if target.shape[1:] != (classes,) or not (target.is_floating_point() or target.dtype == torch.bool):
            raise UserError(
                f"a guide's target is (B,) int64 classes, (B, {classes}) float labels or (B, {classes}) bool "
                f"sets, not {tuple(target.shape)} {target.dtype}"
            )
        if self.config.likelihood == "sigmoid":
            return
        if target.is_floating_point() and self.config.target == "not_class":
            raise UserError("target 'not_class' takes classes or bool sets of classes, not float labels")
        chosen = ~target if self.config.target == "not_class" else target != 0
        if not bool(chosen.any(1).all()):
            raise UserError("a guide's target leaves no class to steer to in at least one row")


# -- the log-ratio and its gradient in the logits ------------------------------------------------------------


def _classes(f: Tensor, target: Tensor, tau1: float, tau2: float, away: bool) -> tuple[Tensor, Tensor]:
    """Of one class an image: classes (B,), labels q (B, K) or sets (B, K); `away`: of all the others."""
    if target.dtype != torch.bool and not away:
        return softmax_gradient(f, target, tau1, tau2)
    chosen = target if target.dtype == torch.bool else F.one_hot(target, f.shape[1]).bool()
    inside = f.masked_fill(chosen if away else ~chosen, -torch.inf)
    value = tau1 * inside.logsumexp(1) - (tau2 * f).logsumexp(1)
    return value, tau1 * inside.softmax(1) - tau2 * (tau2 * f).softmax(1)


def _attributes(f: Tensor, target: Tensor, tau1: float, tau2: float, away: bool) -> tuple[Tensor, Tensor]:
    """Of attributes that an image has or not; classes (B,) name the one attribute that counts."""
    counted = F.one_hot(target, f.shape[1]) if target.ndim == 1 else torch.ones_like(f)
    q = (counted if target.ndim == 1 else target).to(f.dtype)
    q, counted = (counted - q if away else q), counted.to(f.dtype)
    value = (counted * (tau1 * q * f - F.softplus(tau2 * f))).sum(1)
    return value, counted * (tau1 * q - tau2 * torch.sigmoid(tau2 * f))


def _entropy(f: Tensor, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """H(p) and its gradient in f, -p (log p + H)."""
    log_p = f.log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    return entropy, -p * (log_p + entropy[:, None])


def _rkl(f: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q | p) and p - q."""
    log_p = f.log_softmax(1)
    return (torch.xlogy(q, q) - q * log_p).sum(1), log_p.exp() - q


def _fkl(f: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p | q) and p (log(p / q) - KL)."""
    log_p = f.log_softmax(1)
    return _of_expectation(log_p.exp(), log_p - q.log())


def _js(f: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p | m) / 2 + KL(q | m) / 2, m = (p + q) / 2, and p (r - <r>), r = log(p / m) / 2."""
    log_p, log_q = f.log_softmax(1), q.log()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    half, slope = _of_expectation(log_p.exp(), (log_p - log_m) / 2)
    return half + (q * (log_q - log_m)).sum(1) / 2, slope


def _of_expectation(p: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    mean = (p * r).sum(1)
    return mean, p * (r - mean[:, None])


_DIVERGENCES = {"rkl": _rkl, "fkl": _fkl, "js": _js, "entropy": _entropy}


def _smoothed(target: Tensor, f: Tensor, smoothing: float, away: bool) -> Tensor:
    """The target as label-smoothed distributions (B, K)."""
    classes = f.shape[1]
    q = F.one_hot(target, classes) if target.ndim == 1 else target
    q = q.to(f.dtype)
    q = 1 - q if away else q
    return (1 - smoothing) * q / q.sum(1, keepdim=True) + smoothing / classes


# -- the gradient as a link of a longer chain ----------------------------------------------------------------


class _Linked(torch.autograd.Function):
    """The value (B,), with the gradient (B, ...) in x that came with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, gradient = ctx.saved_tensors
        each = cotangent.view(-1, *[1] * (gradient.ndim - 1)).to(gradient.dtype)
        return _Once.apply(each * gradient, x), None, None


class _Once(torch.autograd.Function):
    """The gradient, which depends on x in a way that was not kept."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError("a guide has no second derivative: differentiate its value once")


# -- what the classifier is fed ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Input:
    """From images in model units to what the classifier was trained on; differentiable."""

    mean: tuple[float, ...] = ()  # empty: model units
    std: tuple[float, ...] = ()
    size: int = NATIVE
    channels: int = 0
    antialias: bool = True

    @classmethod
    def of(cls, config: GuideConfig, contract: Contract) -> _Input:
        """What the settings ask for, the classifier's own where they leave it open."""
        mean, std = (config.mean, config.std) if config.mean else (contract.mean, contract.std)
        if config.input == "normalised" and not mean:
            raise UserError(
                "input 'normalised': the guide's classifier does not say its mean and std: set them"
            )
        if config.size == OWN and not contract.size:
            raise UserError("size -1: the guide's classifier does not say its own size: set one in pixels")
        size = contract.size if config.size == OWN else config.size
        mean, std = (mean, std) if config.input == "normalised" else ((), ())
        antialias = config.antialias if size else True
        return cls(mean, std, size, config.channels or contract.channels, antialias)

    @property
    def compensation(self) -> float:
        """What gradients are multiplied with: 1 over the mean of 1 / (2 std), normalising's contrast."""
        return len(self.std) / sum(1 / (2 * std) for std in self.std) if self.std else 1.0

    def prepared(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in model units as the classifier is fed them."""
        channels = max(self.channels, len(self.mean))
        if channels and x.shape[1] != channels:
            if x.shape[1] != 1:
                raise UserError(f"the guide's classifier takes {channels} channels, not {x.shape[1]}")
            x = x.expand(-1, channels, -1, -1)
        if self.mean:
            mean, std = (_constants(v, x.device, x.dtype).view(-1, 1, 1) for v in (self.mean, self.std))
            x = ((x + 1) / 2 - mean) / std
        if self.size and tuple(x.shape[2:]) != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=self.antialias)
        return x


# -- perturbed copies ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Perturbation:
    """Copies of every image, each with noise, flipped, shifted; all numbers (rows or 1, copies, ...)."""

    copies: int = 1
    noise: Tensor | None = None  # (rows, copies, ...) of x
    flip: Tensor | None = None  # (rows, copies) bool
    shift: Tensor | None = None  # (rows, copies, 2) int64, down and right

    @classmethod
    def draw(cls, config: GuideConfig, x: Tensor, draws: Draws | None) -> _Perturbation:
        if not (config.noise or config.flip or config.shift):
            return cls()
        copies = config.copies
        draws = draws or Draws(fold(config.seed, "guide"), 1)
        noise = config.noise * draws.normal(copies, *x.shape[1:]) if config.noise else None
        flip = draws.integers(2, copies).bool() if config.flip else None
        shift = draws.integers(2 * config.shift + 1, copies, 2) - config.shift if config.shift else None
        numbers = [None if t is None else t.to(x.device) for t in (noise, flip, shift)]
        if any(t is not None and len(t) not in (1, len(x)) for t in numbers):
            raise UserError(f"the guide's draws must be of 1 row or of {len(x)}, one an image")
        return cls(copies, *numbers)

    def rows(self, rows: slice) -> _Perturbation:
        """Those of some of the images; numbers that all rows share stay."""
        numbers = (self.noise, self.flip, self.shift)
        return _Perturbation(self.copies, *(t if t is None or len(t) == 1 else t[rows] for t in numbers))

    def noisy(self, x: Tensor) -> Tensor:
        """Copies of x (B, ...), one after the other, (B * copies, ...)."""
        if self.copies > 1:
            x = x.repeat_interleave(self.copies, 0)
        return x if self.noise is None else x + self._each(self.noise, x).to(x.dtype)

    def moved(self, x: Tensor) -> Tensor:
        """Images (B * copies, C, H, W), flipped and shifted."""
        height, width = (torch.arange(n, device=x.device).expand(len(x), n) for n in x.shape[2:])
        if self.flip is not None:
            width = torch.where(self._each(self.flip, x)[:, None], width.flip(1), width)
        if self.shift is not None:
            down, right = self._each(self.shift, x).unbind(1)
            height = (height - down[:, None]).clamp(0, x.shape[2] - 1)
            x = x.gather(2, height[:, None, :, None].expand_as(x))
            # Column j of the result is column j - right of the flipped image.
            columns = (torch.arange(x.shape[3], device=x.device) - right[:, None]).clamp(0, x.shape[3] - 1)
            width = width.gather(1, columns)
        if self.flip is None and self.shift is None:
            return x
        return x.gather(3, width[:, None, None, :].expand_as(x))

    def _each(self, numbers: Tensor, x: Tensor) -> Tensor:
        """(rows or 1, copies, ...) -> (B * copies, ...)."""
        return numbers.expand(len(x) // self.copies, *numbers.shape[1:]).flatten(0, 1)


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Made once: the copy to a device would wait for it at every call."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)


def _freeze(classifier: Any) -> torch.dtype:
    """Freeze the parameters and return the dtype that they work in; UserError in training mode."""
    if isinstance(classifier, nn.Module):
        if any(module.training for module in classifier.modules()):
            raise UserError("the guide's classifier is in training mode: call its eval() first")
        classifier.requires_grad_(False)
    elif not callable(classifier) and not hasattr(classifier, "class_logits"):
        raise UserError(f"a guide needs a module or class_logits(x, sigma), not {type(classifier).__name__}")
    tensors = (
        tensor
        for method in ("parameters", "buffers")
        if hasattr(classifier, method)
        for tensor in getattr(classifier, method)()
    )
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _cut(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _repeat(tensor: Any, copies: int) -> Any:
    return tensor if tensor is None or copies == 1 else tensor.repeat_interleave(copies, 0)
