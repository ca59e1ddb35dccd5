"""Sampling with moved representations (Deja, Trzcinski & Tomczak 2023, arXiv 2301.13622).

The U-Net's encoder makes of x_t the maps z = (z_1, ..., z_n, z_mid), skips and middle; the head says
p(y | z) from all of them, the decoder what x0 is. At every step the maps are moved towards the class y and
decoded, while the x_t that eps is inverted with stays where it is:

    z' = z + w d log p(y | z) / dz  (through the head),    z' = z + w d log p(y | x0(z)) / dz  (the decoder)

The sign. Through the head the released code has w = -scale: it ascends the cross-entropy. For a network that
predicts eps that is right, and "mending" it breaks it. What is inverted is x0 = (x_t - sigma_t eps(z')) /
alpha_t, so that x0 moves by -(sigma_t / alpha_t) d eps; wherever the posterior variance of x0 is below
sigma^2, eps grows with x, and maps that have more of the class give an eps that has more of it: moved along
the gradient, x0 loses the class, moved against it, it gains it. A network that predicts x0 wants the other
sign, and none is right for v, nor for eps where the posterior of x0 is wide, between two classes say.

Through the decoder x0(z') has been differentiated itself, and ascent is right whatever is predicted (the
follow-up, Skiers & Deja 2025, arXiv 2411.08224); it costs a pass of decoder and encoder more, there and back.

Through the head the derivative is total, through the later maps that an earlier one makes, as in the released
code, although what is decoded takes every map for itself. Through the decoder it is partial.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_core.adapters import Clipped, Wrapper
from cdm_core.compiled import CompiledModel
from cdm_core.errors import UserError
from cdm_core.samplers import Conditional, Prediction, Step, predicted
from cdm_kernels import softmax_gradient
from cdm_plugins_joint.adapter_configs import RepresentationConfig


def guided(config: RepresentationConfig, model: Any) -> GuidedRepresentations:
    """`model`, which has representations, steered as `config` says; `UserError` where it cannot be."""
    return GuidedRepresentations(config, model)


class GuidedRepresentations(Wrapper):
    """A denoiser whose representations are moved towards the classes y; without y, the model itself, bitwise.

    y (B,) int64 classes, (B, K) float soft labels; where the head has attributes (`multi_label`): (B,) the
    one that each image shall have, (B, K) targets in [0, 1], a negative one: free. The denoiser is not told.
    """

    capabilities = frozenset({"denoise"})
    null_label = None

    def __init__(self, config: RepresentationConfig, model: Any) -> None:
        super().__init__(model)
        try:
            config.check()
        except ValueError as error:
            raise UserError(f"adapter: {error}") from error
        self.config = config
        self.network, self.clipped = _network(model)
        self.num_classes: int = self.network.classes
        self.towards = _direction(config, self.network.predicts)

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """Guided E[x0 | x, sigma, y]; x (B, C, H, W), sigma (B,), VE units."""
        return self.predict(x, sigma, y).x0

    def predict(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Prediction:
        """As `denoise`, with the network's learned variance where it has one."""
        weight = self.weight(sigma)
        if y is None or not bool(weight.any()):
            return predicted(self.model, x, sigma)
        return self._steered(x, sigma, y, weight)

    def predict_step(self, x: Tensor, step: Step, y: Tensor | None = None) -> Prediction:
        """`predict` for a step of a sampler: its level is a number, so that nothing waits for the device."""
        inside = self.config.sigma_min <= step.level <= self.config.sigma_max
        if y is None or not self.config.scale or not inside:
            return Conditional(self.model).predict(x, step)
        sigma = x.new_full((len(x),), step.level)
        return self._steered(x, sigma, y, self.weight(sigma))

    def _steered(self, x: Tensor, sigma: Tensor, y: Tensor, weight: Tensor) -> Prediction:
        z = self.moved(x, sigma, y, weight)
        with torch.no_grad():
            prediction = self.network.decode_representations(z, x, sigma)
        return prediction._replace(x0=prediction.x0.clamp(-1, 1)) if self.clipped else prediction

    def weight(self, sigma: Tensor) -> Tensor:
        """w of every row, (B,)."""
        settings = self.config
        weight = settings.scale * self.towards * torch.ones_like(sigma)
        if settings.schedule != "constant":
            alpha = self.network.scale(sigma)
            weight = weight * (alpha if settings.schedule == "sqrt-signal" else alpha * sigma)
        inside = (sigma >= settings.sigma_min) & (sigma <= settings.sigma_max)
        return weight.where(inside, 0)

    def moved(self, x: Tensor, sigma: Tensor, y: Tensor, weight: Tensor) -> Any:
        """The representations of x, moved, without a graph; x (B, C, H, W), sigma and weight (B,)."""
        with torch.enable_grad():
            z = self.network.representations(x.detach().requires_grad_(), sigma)
        if self.config.through == "decoder":
            z = _detached(z)
        for _ in range(self.config.moves):
            gradients = self._gradients(z, x.detach(), sigma, y)
            steps = zip(maps_of(z), gradients, strict=True)
            z = _with_maps(z, [h.detach() + rows_like(weight, h) * g.to(h.dtype) for h, g in steps])
            z = _detached(z)
        return z

    def _gradients(self, z: Any, x: Tensor, sigma: Tensor, y: Tensor) -> list[Tensor]:
        """d log p(y | .) in every map of z, whose maps take part in a graph, sized as the settings say."""
        with torch.enable_grad():
            logits = self._logits(z, x, sigma)
        cotangent = log_likelihood(logits.detach(), y, self.network.multi_label)[1].to(logits.dtype)
        maps = maps_of(z)
        found = torch.autograd.grad(logits, maps, cotangent, allow_unused=True, materialize_grads=True)
        if self.config.normalise == "rms":
            found = _of_unit_rms(found)
        return [g * share for g, share in zip(found, self._shares(maps), strict=True)]

    def _logits(self, z: Any, x: Tensor, sigma: Tensor) -> Tensor:
        """What is to be raised, as logits (B, K) with a graph into the maps of z."""
        clean = torch.zeros_like(sigma)
        if self.config.through == "head":
            return self.network.head(z, clean if self.config.head_level == "clean" else sigma)
        x0 = self.network.decode_representations(z, x, sigma).x0
        return self.network.class_logits(x0, clean)

    def _shares(self, maps: Sequence[Tensor]) -> list[float]:
        """Of `scale`, for every map, by its resolution."""
        if not self.config.resolutions:
            return [1.0] * len(maps)
        sizes = sorted({h.shape[2] for h in maps}, reverse=True)
        if len(sizes) != len(self.config.resolutions):
            raise UserError(
                f"adapter.resolutions has {len(self.config.resolutions)} entries, and the network's maps are "
                f"of {len(sizes)} resolutions: {', '.join(map(str, sizes))} pixels a side"
            )
        return [self.config.resolutions[sizes.index(h.shape[2])] for h in maps]


# ---- Targets


def log_likelihood(logits: Tensor, y: Tensor, multi_label: bool) -> tuple[Tensor, Tensor]:
    """log p(y | logits) (B,) in nats and its gradient in the logits (B, K), in closed form.

    y as `GuidedRepresentations` takes it.
    """
    if not multi_label:
        return softmax_gradient(logits, y)
    f = logits.to(torch.promote_types(logits.dtype, torch.float32))
    q = torch.full_like(f, -1).scatter(1, y[:, None], 1.0) if y.ndim == 1 else y.to(f.dtype)
    wanted = q >= 0
    value = (q * f - F.softplus(f)).where(wanted, 0).sum(1)
    return value, (q - f.sigmoid()).where(wanted, 0)


# ---- Maps


def maps_of(z: Any) -> list[Tensor]:
    """Every map of representations, skips first, the middle last."""
    return [*z.skips, z.middle]


def _with_maps(z: Any, maps: Sequence[Tensor]) -> Any:
    return z._replace(skips=tuple(maps[:-1]), middle=maps[-1])


def _detached(z: Any) -> Any:
    """The same values, each map a leaf of its own."""
    return _with_maps(z, [h.detach().requires_grad_() for h in maps_of(z)])


def rows_like(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1) in the dtype of `like`."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _of_unit_rms(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each row, over all tensors together, divided by its RMS; rows of zeros stay zero."""
    squares = sum(g.square().flatten(1).sum(1) for g in gradients)
    assert isinstance(squares, Tensor)
    rms = (squares / sum(g[0].numel() for g in gradients)).sqrt()
    inverse = torch.where(rms > 0, 1 / rms, 0)
    return tuple(g * rows_like(inverse, g) for g in gradients)


# ---- Checks


def _network(model: Any) -> tuple[Any, bool]:
    """What has the representations beneath the wrappers, and whether its predictions are to be clamped.

    What is decoded goes past a wrapper's `denoise`: one whose work cannot be done here is refused.
    """
    clipped = False
    while isinstance(model, Wrapper):
        if not isinstance(model, Clipped | CompiledModel):
            raise UserError(
                f"moved representations go past the {type(model).__name__} around the model: "
                "leave that out (guidance = 0)"
            )
        clipped |= isinstance(model, Clipped)
        model = model.model
    return model, clipped


def _direction(config: RepresentationConfig, predicts: str) -> float:
    """1: along the gradient of log p, -1: against it."""
    if config.through == "decoder":
        return 1.0
    if config.sign == "auto":
        if predicts == "v":
            raise UserError(
                "a network that predicts v has no right sign through the head: use --adapter "
                "representations-safe, or say adapter.sign"
            )
        return -1.0 if predicts == "eps" else 1.0
    return -1.0 if config.sign == "official" else 1.0
