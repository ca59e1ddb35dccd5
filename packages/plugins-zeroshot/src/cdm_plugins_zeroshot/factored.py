"""Denoisers in two halves: what every class shares, computed once an image, and what each class adds.

A diffusion classifier asks a denoiser about one noisy image once a class (Li et al. 2023, section 3), and a
part of the network often sees no class. `encode` is that part, `decode` the rest, and

    decode(encode(x, sigma), sigma, y) = denoise(x, sigma, y)

to rounding. A decoder's batch is a flat list of (image, class): `features.rows(image)` are its features.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cdm_core.adapters import Wrapper


class Features(tuple[Tensor, ...]):
    """What `encode` made of P noisy images: tensors whose first dimension is P."""

    __slots__ = ()

    def rows(self, index: Tensor) -> Features:
        """The features of the images index (R,) int64, each as often as it is named."""
        return Features(tensor[index] for tensor in self)


@runtime_checkable
class Factored(Protocol):
    """A denoiser in two halves. Everything else (`denoise`, `sigmas`, `num_classes`, ...) is as it was."""

    @property
    def shared_share(self) -> float:
        """Share of one pass, in operations, that `encode` does; in [0, 1)."""
        ...

    def encode(self, x: Tensor, sigma: Tensor) -> Features:
        """What no class changes; x (P, C, H, W) noisy images and sigma (P,), VE units."""
        ...

    def decode(self, features: Features, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x0 | x, sigma, y] (R, C, H, W) float32 or better; features of R rows, sigma (R,), y (R,)."""
        ...


class Unfactored(Wrapper):
    """Any denoiser as a `Factored` that shares nothing: every class is a whole pass."""

    shared_share = 0.0

    def encode(self, x: Tensor, sigma: Tensor) -> Features:
        """The noisy images themselves."""
        return Features((x,))

    def decode(self, features: Features, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """The model's E[x0 | x, sigma, y]."""
        return self.model.denoise(features[0], sigma, y)


def factored(model: Any) -> Factored:
    """`model` in two halves for inference, with its weights as they are now.

    A model that can be taken apart has a method `factored() -> Factored`. It must be of its own class: one
    that a wrapper merely passes through would go round the wrapper's `denoise`.
    """
    if callable(getattr(type(model), "factored", None)):
        return model.factored()
    return Unfactored(model)


def measured_share(model: Factored, x: Tensor, sigma: Tensor, y: Tensor | None) -> float:
    """Floating-point operations of `encode` over those of a whole pass; x (1, C, H, W), sigma (1,), y (1,).

    Convolutions and matrix products count, as `torch.utils.flop_counter` has them; nothing else does.
    """
    with torch.no_grad():
        with FlopCounterMode(display=False) as shared:
            features = model.encode(x, sigma)
        with FlopCounterMode(display=False) as own:
            model.decode(features, sigma, y)
    total = shared.get_total_flops() + own.get_total_flops()
    return shared.get_total_flops() / total if total else 0.0


def passes(shared_share: float, encoded: int, decoded: int) -> float:
    """Cost of `encoded` calls of `encode` and `decoded` of `decode`, in whole passes of the network."""
    return shared_share * encoded + (1 - shared_share) * decoded
