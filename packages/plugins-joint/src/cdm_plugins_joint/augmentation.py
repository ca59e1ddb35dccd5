"""What is done to images that a classifier is shown, each image by chances of its own.

The operations are those of `torchvision.transforms.v2`, which defines them on [0, 1] and draws one number for
a whole batch from torch's own generator; here they are formulas over a batch, with a number an image and all
chances from `Draws`. The released code ran them on [-1, 1], where each that fires wipes out whatever is
darker than mid-grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_core.random import Draws
from cdm_plugins_joint.configs import AugmentationConfig

GREY = (0.2989, 0.587, 0.114)  # luma of red, green and blue
RATIO = (3 / 4, 4 / 3)  # of the width of a crop to its height


class Chances(NamedTuple):
    """Chances of the images `rows` of a batch, None: all; numbers (M,) each."""

    draws: Draws
    rows: Tensor | None

    def uniform(self, low: float, high: float) -> Tensor:
        """Evenly in [low, high)."""
        u = self.draws.uniform()
        return low + (high - low) * (u if self.rows is None else u[self.rows])

    def coin(self, share: float) -> Tensor:
        """True with that probability."""
        return self.uniform(0, 1) < share

    def factor(self, coin: Tensor, low: float, high: float) -> Tensor:
        """Evenly in [low, high) where `coin` says so, else 1."""
        return torch.where(coin, self.uniform(low, high), 1)


def augmented(
    x: Tensor, q: Tensor, config: AugmentationConfig, draws: Draws, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Images x (M, C, H, W) in [-1, 1] changed as `config` says, and their labels.

    q (M, K): shares of classes, or attributes in [0, 1], negative where unknown. rows (M,) int64: which of
    the rows of `draws` the images are, None: all of them.
    """
    chances = Chances(draws, rows)
    with torch.autocast(x.device.type, enabled=False):
        image = _changed((x.float() + 1) / 2, config, chances)
        if config.mixup:
            image, q = mixed(image, q, config, chances)
        return (2 * image - 1).to(x.dtype), q


def _changed(image: Tensor, config: AugmentationConfig, chances: Chances) -> Tensor:
    """All but the mixing, on images in [0, 1]."""
    if config.jitter and image.shape[1] == 3:
        coin, by = chances.coin(config.jitter), config.jitter_by
        for colour in (brightness, contrast, saturation):
            image = colour(image, chances.factor(coin, 1 - by, 1 + by))
        image = hue(image, torch.where(coin, chances.uniform(-by, by), 0))
    if config.crop or config.rotate or config.flip:
        image = moved(image, _movement(image, config, chances))
    changes: list[tuple[Callable[[Tensor, Tensor], Tensor], float, tuple[float, float]]] = [
        (contrast, config.contrast, config.contrast_by),
        (sharpness, config.sharpness, config.sharpness_by),
        (brightness, config.brightness, config.brightness_by),
    ]
    for change, share, bounds in changes:
        if share:
            image = change(image, chances.factor(chances.coin(share), *bounds))
    return image


# -- colours: image (B, C, H, W) in [0, 1], factor (B,) >= 0; a factor of 1 changes nothing ------------------


def _rows(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _blend(image: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor image + (1 - factor) other, in [0, 1]; the very image where the factor is 1."""
    f = _rows(factor)
    return torch.where(f == 1, image, (f * image + (1 - f) * other).clamp(0, 1))


def grey(image: Tensor) -> Tensor:
    """(B, 1, H, W)."""
    if image.shape[1] == 1:
        return image
    return (image * image.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def brightness(image: Tensor, factor: Tensor) -> Tensor:
    """Times the factor."""
    return _blend(image, torch.zeros_like(image), factor)


def contrast(image: Tensor, factor: Tensor) -> Tensor:
    """Away from the image's mean grey, by the factor."""
    return _blend(image, grey(image).mean((2, 3), keepdim=True), factor)


def saturation(image: Tensor, factor: Tensor) -> Tensor:
    """Away from each pixel's grey, by the factor."""
    return _blend(image, grey(image), factor)


def sharpness(image: Tensor, factor: Tensor) -> Tensor:
    """Away from the image smoothed by 3x3, by the factor; its edge stays as it is."""
    if min(image.shape[2:]) <= 2:
        return image
    kernel = image.new_ones(1, 1, 3, 3)
    kernel[..., 1, 1] = 5
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, 3, 3)
    smooth = image.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(image, kernel, groups=image.shape[1])
    return _blend(image, smooth, factor)


def hue(image: Tensor, shift: Tensor) -> Tensor:
    """The hue of colour images turned by `shift` (B,), as a share of the circle; value and chroma stay."""
    value, least = image.amax(1), image.amin(1)
    chroma = value - least
    red, green, blue = image.unbind(1)
    over = 1 / chroma.where(chroma > 0, 1)
    sextant = torch.where(
        value == red,
        (green - blue) * over,
        torch.where(value == green, (blue - red) * over + 2, (red - green) * over + 4),
    )
    turned = sextant + 6 * shift[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = (n + turned) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.where(_rows(shift) == 0, image, torch.stack(channels, dim=1))


# -- places --------------------------------------------------------------------------------------------------


def _movement(image: Tensor, config: AugmentationConfig, chances: Chances) -> Tensor:
    """Where each output pixel comes from: (B, 2, 3), from output to input, both in [-1, 1] x [-1, 1]."""
    height, width = image.shape[2:]
    matrix = torch.eye(3, dtype=image.dtype, device=image.device).repeat(len(image), 1, 1)
    if config.crop:
        matrix = matrix @ _crop(config, chances, height, width)
    if config.rotate:
        by = math.radians(config.rotate_by)
        angle = torch.where(chances.coin(config.rotate), chances.uniform(-by, by), 0)
        matrix = matrix @ rotation(angle, height, width)
    if config.flip:
        sign = torch.where(chances.coin(config.flip), -1.0, 1.0).to(image.dtype)
        mirror = torch.stack([sign, torch.ones_like(sign), torch.ones_like(sign)], dim=1)
        matrix = matrix * mirror[:, None, :]
    return matrix[:, :2]


def _crop(config: AugmentationConfig, chances: Chances, height: int, width: int) -> Tensor:
    """A part of the image of a random area and shape, anywhere in it; (B, 3, 3)."""
    coin, area = chances.coin(config.crop), chances.uniform(*config.crop_area)
    ratio = chances.uniform(*(math.log(r) for r in RATIO)).exp() * (height / width)
    sides = [
        torch.where(coin, side, 1).clamp(max=1) for side in ((area * ratio).sqrt(), (area / ratio).sqrt())
    ]
    matrix = area.new_zeros(len(area), 3, 3)
    for axis, side in enumerate(sides):
        matrix[:, axis, axis], matrix[:, axis, 2] = side, chances.uniform(-1, 1) * (1 - side)
    matrix[:, 2, 2] = 1
    return matrix


def rotation(angle: Tensor, height: int, width: int) -> Tensor:
    """Counter-clockwise by `angle` (B,), radians, about the middle; (B, 3, 3), from output to input."""
    cosine, sine = angle.cos(), angle.sin()
    matrix = angle.new_zeros(len(angle), 3, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = cosine, -sine * (height / width)
    matrix[:, 1, 0], matrix[:, 1, 1] = sine * (width / height), cosine
    matrix[:, 2, 2] = 1
    return matrix


def moved(image: Tensor, matrix: Tensor) -> Tensor:
    """image (B, C, H, W) read at the places that `matrix` (B, 2, 3) says, bilinearly; black outside."""
    grid = F.affine_grid(matrix, list(image.shape), align_corners=False)
    there = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    still = torch.eye(3, dtype=matrix.dtype, device=matrix.device)[:2]
    return torch.where(_rows((matrix == still).all(2).all(1)), image, there)


# -- two images ----------------------------------------------------------------------------------------------


def mixed(image: Tensor, q: Tensor, config: AugmentationConfig, chances: Chances) -> tuple[Tensor, Tensor]:
    """MixUp (Zhang et al. 2018) of neighbours 2 i and 2 i + 1, in shares drawn evenly, labels alike.

    Neighbours are in the same part of a batch, however evenly it is split.
    """
    count = len(image)
    share = chances.factor(chances.coin(config.mixup), 0, 1).to(image.dtype)
    other = torch.arange(count, device=image.device).bitwise_xor(1)
    other = torch.where(other < count, other, other - 1)
    part = share[:, None]
    both = part * q + (1 - part) * q[other]
    unknown = ((q < 0) & (part > 0)) | ((q[other] < 0) & (part < 1))
    return _rows(share) * image + (1 - _rows(share)) * image[other], torch.where(unknown, -1, both)
