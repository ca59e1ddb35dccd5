"""Samples as files: grids, arrays, single images; points in d dimensions as scatter plots.

Pixels are enlarged by whole factors, so that an 8x8 digit stays sharp.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdm_core.errors import UserError
from cdm_core.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from cdm_core.data import DataInfo

Pixels = NDArray[np.uint8]

CELL = 32  # pixels: images smaller than this are enlarged by the least whole factor that reaches it
GAP = 2  # pixels between images
FORMATS = ("grid", "npz", "png")


def is_points(info: DataInfo) -> bool:
    """Whether the data are points in d dimensions, shape (d, 1, 1), rather than images."""
    return tuple(info.shape[1:]) == (1, 1)


def to_pixels(x0: Tensor, info: DataInfo) -> Pixels:
    """Model units in [-1, 1], (N, C, H, W), to display pixels (N, H, W, C) uint8, rounded."""
    return info.to_uint8(x0).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_data(grey: Tensor, info: DataInfo) -> Pixels:
    """The data's own integers (N, C, H, W) uint8 to display pixels (N, H, W, C) uint8."""
    if info.levels is None:
        return to_pixels(grey, info)
    shown = (grey.double() * 255 / (info.levels - 1)).round()
    return shown.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def tile(pixels: Pixels, columns: int | None = None, *, cell: int = CELL, gap: int = GAP) -> Pixels:
    """Images side by side, row by row.

    pixels (N, H, W, C) uint8, C 1 or 3 (other counts: the first channel); columns: images a row (None: about
    square). Returns (rows, columns, 3) uint8 on a white ground, enlarged to cells of at least `cell` pixels.
    """
    count, height, width, channels = pixels.shape
    if count == 0:
        raise UserError("no images to draw: ask for at least one")
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    factor = max(1, math.ceil(cell / min(height, width)))
    colour = pixels if channels == 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    colour = colour.repeat(factor, axis=1).repeat(factor, axis=2)
    high, wide = height * factor + gap, width * factor + gap
    canvas = np.full((rows * high + gap, columns * wide + gap, 3), 255, np.uint8)
    for index, image in enumerate(colour):
        row, column = divmod(index, columns)
        canvas[gap + row * high :, gap + column * wide :][: high - gap, : wide - gap] = image
    return canvas


def png(canvas: Pixels) -> bytes:
    """Encode (H, W, C) uint8, C 1 or 3, as PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(canvas[..., 0] if canvas.shape[-1] == 1 else canvas).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def scatter(points: Tensor, reference: Tensor | None = None) -> bytes:
    """PNG of points (N, d, 1, 1) in their first two coordinates, over true points where given."""
    from cdm_core import figures

    return figures.scatter(points.flatten(1), None if reference is None else reference.flatten(1))


def picture(x0: Tensor, info: DataInfo, columns: int | None = None, *, cell: int = CELL) -> bytes:
    """PNG of samples x0 (N, C, H, W) in model units: a grid of images, or a scatter plot of points."""
    return scatter(x0.cpu()) if is_points(info) else png(tile(to_pixels(x0, info), columns, cell=cell))


def save_grid(path: Path, x0: Tensor, info: DataInfo, columns: int | None = None) -> Path:
    """Write `picture` to `path`."""
    return write_bytes(path, picture(x0, info, columns))


def save_npz(
    path: Path, x0: Tensor, info: DataInfo, labels: Tensor | None, settings: Mapping[str, Any]
) -> Path:
    """Write `samples` (images (N, H, W, C) uint8, points (N, d) float32), `labels`, `settings` (JSON)."""
    points = is_points(info)
    samples = x0.flatten(1).float().cpu().numpy() if points else to_pixels(x0, info)
    arrays = {"samples": samples, "settings": np.array(json.dumps(dict(settings)))}
    if labels is not None:
        arrays["labels"] = labels.cpu().numpy()
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **arrays)
    return write_bytes(path, stream.getvalue())


def save_singles(folder: Path, x0: Tensor, info: DataInfo) -> list[Path]:
    """Write every image, at its own size, to `folder/00000.png`, `00001.png`, ..."""
    if is_points(info):
        raise UserError(f"data set {info.name!r} holds points, not images: use the formats grid and npz")
    pixels = to_pixels(x0, info)
    if pixels.shape[-1] not in (1, 3):
        raise UserError(f"images of {pixels.shape[-1]} channels cannot be PNG files: use the format npz")
    return [write_bytes(folder / f"{index:05d}.png", png(image)) for index, image in enumerate(pixels)]
