"""Pictures: every pixel where it belongs, rounded, enlarged by whole factors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_core import UserError, images
from cdm_core.data import DataInfo

GREY = DataInfo("grey", (1, 2, 2), levels=17, dequantise=False)
COLOUR = DataInfo("colour", (3, 40, 36))
POINTS = DataInfo("points", (2, 1, 1), levels=None, dequantise=False)


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_tile_puts_every_pixel_in_its_place() -> None:
    pixels = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2, 1)
    canvas = images.tile(pixels, columns=2)
    assert canvas.shape == (2 * 34 + 2, 2 * 34 + 2, 3)  # 2 pixels enlarged 16 times, gaps of 2
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        cell = canvas[2 + 34 * row :, 2 + 34 * column :][:32, :32]
        wanted = pixels[index].repeat(16, 0).repeat(16, 1)
        assert (cell == wanted).all()
    assert (canvas[36:, 36:] == 255).all()  # no fourth image
    assert (canvas[:2] == 255).all()


def test_tile_keeps_large_images_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 36, 3)).astype(np.uint8)
    canvas = images.tile(pixels, columns=5)
    assert (canvas[2:42, 2:38] == pixels[0]).all()
    assert (canvas[2:42, 40:76] == pixels[1]).all()
    with pytest.raises(UserError, match="no images"):
        images.tile(pixels[:0])


def test_pixels_are_rounded_and_clamped() -> None:
    x0 = torch.tensor([-1.3, -0.99, 0.0, 1.01]).view(1, 1, 2, 2)
    shown = images.to_pixels(x0, GREY)[0, :, :, 0]
    assert shown.tolist() == [[0, 0], [128, 255]]  # level 8 of 16: 127.5, rounded
    every = torch.arange(17, dtype=torch.uint8).repeat(4)[:68].view(17, 1, 2, 2)
    back = images.to_pixels(GREY.to_model(every, None), GREY)
    assert (back == images.from_data(every, GREY)).all()


def test_files_hold_what_was_drawn(tmp_path: Path) -> None:
    pixels = torch.randint(256, (3, 3, 40, 36), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x0 = (pixels.float() + 0.5) * 2 / 256 - 1
    shown = pixels.permute(0, 2, 3, 1).numpy()
    labels = torch.tensor([4, 0, 2])
    images.save_npz(tmp_path / "deep" / "samples.npz", x0, COLOUR, labels, {"seed": 3})
    with np.load(tmp_path / "deep" / "samples.npz", allow_pickle=False) as kept:
        assert (kept["samples"] == shown).all()
        assert kept["labels"].tolist() == [4, 0, 2]
        assert json.loads(str(kept["settings"])) == {"seed": 3}
    files = images.save_singles(tmp_path / "images", x0, COLOUR)
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    assert all(
        (np.asarray(Image.open(file)) == wanted).all() for file, wanted in zip(files, shown, strict=True)
    )
    grid = decoded(images.save_grid(tmp_path / "grid.png", x0, COLOUR).read_bytes())
    assert (grid == images.tile(shown)).all()
    assert not list(tmp_path.rglob(".*"))  # nothing half-written is left


def test_points_are_scattered_not_tiled(tmp_path: Path) -> None:
    x0 = torch.randn(50, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    canvas = decoded(images.picture(x0, POINTS))
    blue = (canvas[..., 2].astype(int) - canvas[..., 0] > 60).sum()
    assert blue > 500  # the marks
    assert (canvas[..., :3] == 255).all(-1).mean() > 0.6  # on white
    images.save_npz(tmp_path / "samples.npz", x0, POINTS, None, {})
    with np.load(tmp_path / "samples.npz") as kept:
        assert (kept["samples"] == x0[..., 0, 0].numpy()).all()
        assert "labels" not in kept
    with pytest.raises(UserError, match="points, not images"):
        images.save_singles(tmp_path, x0, POINTS)


def test_writing_over_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "grid.png").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*grid\.png"):
        images.save_grid(tmp_path / "grid.png", torch.zeros(1, 1, 2, 2), GREY)
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]
