"""What a model can do, one method a capability; how methods compose.

Everything speaks one currency, the variance-exploding form `x = x0 + sigma * n`, n ~ N(0, I): every Gaussian
path is this one up to a scale of x, and the conversion is made at the model's edge (`cdm_core.schedules`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cdm_core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    Denoise = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Denoiser(Protocol):
    """Capability `denoise`."""

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x0 | x, sigma, y].

        x (B, C, H, W) float32 data units; sigma (B,) float32 noise std in data units, finite and > 0;
        y (B,) int64 class or None (no class). Returns (B, C, H, W) float32. Works under `torch.no_grad`
        (a model that needs autograd inside enables it), not under `inference_mode`.
        """
        ...


@runtime_checkable
class HasLevels(Protocol):
    """A denoiser trained on discrete levels: `denoise` rounds sigma to the nearest of them."""

    @property
    def sigmas(self) -> Tensor:
        """(N,) float64, ascending, > 0, finite: the noise levels, in data units."""
        ...

    def scale(self, sigma: Tensor) -> Tensor:
        """a such that the path's own variable is a * x; (B,) -> (B,). A path starts at noise / a."""
        ...


@runtime_checkable
class ClassLogits(Protocol):
    """Capability `class_logits`."""

    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Unnormalised log p(y | x at level sigma), (B, num_classes) float32; sigma (B,) float32 >= 0."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """Capability `to_images`, of a model that denoises an autoencoder's latents."""

    def to_images(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1], of latents as it denoises them; differentiable."""
        ...


@runtime_checkable
class LogDensity(Protocol):
    """Capability `log_density`."""

    def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        """Log-density in nats of x = x0 + sigma n under the model, (B,) float32; sigma None: of clean x0."""
        ...


@runtime_checkable
class NoiseLevelLogits(Protocol):
    """Capability `noise_level_logits`."""

    def noise_level_logits(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Unnormalised log p(t | x) over the K noise levels, (B, K) float32; x in the path's own scale."""
        ...


METHODS = ("denoise", "class_logits", "log_density", "noise_level_logits", "to_images")


def offered(model: object) -> frozenset[str]:
    """The capabilities that `model` really has.

    A model whose capability depends on how it was configured says so with a `capabilities` attribute
    (a collection of names); otherwise having the method is having the capability.
    """
    declared: Iterable[str] | None = getattr(model, "capabilities", None)
    if declared is not None:
        return frozenset(declared)
    return frozenset(name for name in METHODS if callable(getattr(model, name, None)))


def require(model: object, names: Iterable[str], *, user: str, model_name: str, hint: str = "") -> None:
    """Raise `UserError` unless `model` offers every capability in `names`."""
    missing = [name for name in names if name not in offered(model)]
    if missing:
        wanted = " and ".join(f"`{name}`" for name in missing)
        tail = f"; {hint}" if hint else ""
        raise UserError(f"{user} needs {wanted}, which {model_name} does not provide{tail}")
