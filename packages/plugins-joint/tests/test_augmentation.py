"""The classifier's augmentation: torchvision's operations, in the range that they are defined on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from cdm_core.random import Draws
from cdm_core.testing.conformance import normal
from cdm_plugins_joint import augmentation
from cdm_plugins_joint.augmentation import augmented, moved, rotation
from cdm_plugins_joint.configs import AugmentationConfig

EVERYTHING = AugmentationConfig(
    jitter=0.5, crop=0.5, rotate=0.5, flip=0.5, contrast=0.5, sharpness=0.5, brightness=0.5, mixup=0.5
)


def images(count: int = 6, channels: int = 3, side: int = 8) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def labels(count: int, classes: int = 4) -> Tensor:
    return F.one_hot(torch.arange(count) % classes, classes).float()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness"])
def test_colours_change_as_torchvision_changes_them(name: str, channels: int) -> None:
    x, factors = images(channels=channels), torch.tensor([0.0, 0.4, 0.9, 1.0, 1.3, 2.0])
    found = getattr(augmentation, name)(x, factors)
    adjust = getattr(v2, f"adjust_{name}")
    expected = torch.stack([adjust(one, float(f)) for one, f in zip(x, factors, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[3], x[3])


def test_hues_turn_as_torchvision_turns_them() -> None:
    x, shifts = images(), torch.tensor([-0.5, -0.1, 0.0, 0.05, 0.1, 0.4])
    x[4, :, 0, 0] = 0.5  # grey has no hue
    expected = torch.stack([v2.adjust_hue(one, float(s)) for one, s in zip(x, shifts, strict=True)])
    torch.testing.assert_close(augmentation.hue(x, shifts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12)])
def test_rotation_is_torchvisions(shape: tuple[int, int]) -> None:
    x = images()[:3, :, :, :] if shape == (8, 8) else F.interpolate(images()[:3], shape)
    degrees = [-30.0, 10.0, 0.0]
    angle = torch.tensor([math.radians(d) for d in degrees])
    found = moved(x, rotation(angle, *shape)[:, :2])
    expected = [v2.rotate(one, d, InterpolationMode.BILINEAR) for one, d in zip(x, degrees, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[2], x[2])


def test_flips_are_exact() -> None:
    x, q = 2 * images() - 1, labels(6)
    found, _ = augmented(x, q, AugmentationConfig(flip=1.0), Draws(0, 6))
    torch.testing.assert_close(found, x.flip(-1), rtol=1e-5, atol=1e-5)


def test_crops_are_parts_of_the_image() -> None:
    """A ramp stays a ramp, of a smaller slope, within what it spanned; a part of area 1/2 is about that."""
    ramp = torch.linspace(-1, 1, 32).expand(64, 1, 32, 32)
    config = AugmentationConfig(crop=1.0, crop_area=(0.5, 0.5))
    found, _ = augmented(ramp, labels(64), config, Draws(0, 64))
    inner = found[..., 2:-2, 2:-2]
    slope = inner.diff(dim=3)
    torch.testing.assert_close(slope, slope.mean((2, 3), keepdim=True).expand_as(slope), rtol=0, atol=1e-4)
    sides = slope.mean((1, 2, 3)) / (2 / 31)
    assert float(sides.min()) >= math.sqrt(0.5 * 3 / 4) - 1e-3
    assert float(sides.max()) <= math.sqrt(0.5 * 4 / 3) + 1e-3
    assert float(sides.std()) > 0.05
    assert bool((inner.abs() <= 1).all())
    assert float(inner.mean((1, 2, 3)).std()) > 0.05  # they are taken here and there


def test_nothing_below_mid_grey_is_wiped_out() -> None:
    """Released bug: operations on [0, 1] were run on [-1, 1], and clipped all below 0 away.

    A dark image whose factors are near 1 stays dark; all that comes out is in range.
    """
    dark = torch.full((32, 3, 8, 8), -0.6) + 0.2 * (images(32) - 0.5)
    mild = AugmentationConfig(
        jitter=1.0,
        contrast=1.0,
        contrast_by=(0.9, 1.1),
        sharpness=1.0,
        sharpness_by=(0.9, 1.1),
        brightness=1.0,
        brightness_by=(0.9, 1.1),
    )
    found, _ = augmented(dark, labels(32), mild, Draws(0, 32))
    assert float((found - dark).abs().max()) < 0.3
    wild, _ = augmented(2 * images(64) - 1, labels(64), EVERYTHING, Draws(1, 64))
    assert float(wild.min()) >= -1
    assert float(wild.max()) <= 1
    assert float(wild.min(dim=0).values.max()) < 0  # no pixel is bright in every image


def test_labels_are_mixed_as_images_are() -> None:
    """Released bug: images were mixed, and the labels not."""
    means = torch.linspace(-1, 1, 8)
    x, q = means[:, None, None, None].expand(8, 1, 4, 4), torch.eye(8)
    found, shares = augmented(x, q, AugmentationConfig(mixup=1.0), Draws(0, 8))
    torch.testing.assert_close(found.mean((1, 2, 3)), shares @ means, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shares.sum(1), torch.ones(8))
    assert float(shares.max(1).values.min()) < 0.9  # something was mixed
    assert all(set(row.nonzero()[:, 0].tolist()) <= {i, i ^ 1} for i, row in enumerate(shares))


def test_what_is_unknown_of_one_is_unknown_of_the_mixture() -> None:
    q = torch.tensor([[1.0, -1.0], [0.0, 1.0], [1.0, 0.0]])
    _, found = augmented(normal(3, 1, 4, 4).clamp(-1, 1), q, AugmentationConfig(mixup=1.0), Draws(0, 3))
    assert bool((found[:2, 1] == -1).all())
    assert bool((found[:2, 0] > 0).all())
    assert torch.equal(found[2], q[2])  # the last of an odd number has nobody to be mixed with


def test_no_augmentation_is_none() -> None:
    x, q = 2 * images() - 1, labels(6)
    found, same = augmented(x, q, AugmentationConfig(), Draws(0, 6))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)
    assert same is q


@pytest.mark.parametrize("cut", [2, 4])
def test_an_image_does_not_depend_on_how_a_batch_is_split(cut: int) -> None:
    x, q = 2 * images() - 1, labels(6)
    whole = augmented(x, q, EVERYTHING, Draws(0, 6))
    parts: list[Any] = [
        augmented(x[a:b], q[a:b], EVERYTHING, Draws(0, 6, a, b)) for a, b in ((0, cut), (cut, 6))
    ]
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i], rtol=1e-6, atol=1e-6)


def test_some_rows_get_what_they_would_among_all() -> None:
    config = AugmentationConfig(crop=0.5, rotate=0.5, brightness=0.5)
    x, q, rows = 2 * images() - 1, labels(6), torch.tensor([1, 4])
    whole, _ = augmented(x, q, config, Draws(0, 6))
    some, _ = augmented(x[rows], q[rows], config, Draws(0, 6), rows)
    torch.testing.assert_close(some, whole[rows])


def test_half_precision_is_not_used() -> None:
    x, q = 2 * images() - 1, labels(6)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = augmented(x, q, EVERYTHING, Draws(0, 6))
    assert torch.equal(found, augmented(x, q, EVERYTHING, Draws(0, 6))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": 1.5}, "flip is a share"),
        ({"crop_area": (0.0, 1.0)}, "crop_area must lie in"),
        ({"contrast_by": (2.0, 1.0)}, "contrast_by must be two numbers"),
    ],
)
def test_settings_out_of_range_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**changes).check()
