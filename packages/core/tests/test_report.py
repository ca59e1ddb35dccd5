"""The report: self-contained, escaped, complete where the run allows, and honest where it does not."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cdm_core import UserError, figures, metrics
from cdm_core.checkpoints import RunFolder
from cdm_core.data import DataInfo
from cdm_core.data.base import Data, TensorSplit
from cdm_core.data.configs import GaussianMixtureConfig
from cdm_core.data.mixture import load
from cdm_core.files import to_json, write_bytes
from cdm_core.manager import Registry
from cdm_core.report import write_report
from cdm_core.runs import Run

VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


class Exact(nn.Module):
    """The exact model of a mixture, with everything that a report can show."""

    sigma_range = (0.01, 10.0)

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.mixture, self.num_classes, self.null_label = data.mixture, 4, 4

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        return self.mixture.denoise(x, sigma, y)

    def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        return self.mixture.log_density(x, y, sigma)

    def likelihood_diagnostics(self, x0: Tensor, draws: Any) -> dict[str, float]:
        return {"log_normaliser": 0.0123}

    def report_figures(self, run: Run) -> Iterable[tuple[str, bytes, str]]:
        yield "Levels <by> hand", figures.curves({"train": [(0, 1.0), (1, 2.0)]}, "error"), "A & B"


class Constant(nn.Module):
    """Denoises to a constant image; has no density."""

    sigma_range = (0.01, 10.0)

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)

    def report_figures(self, run: Run) -> Iterable[tuple[str, bytes, str]]:
        raise RuntimeError("no <figure> today")


def run_of(model: nn.Module, data: Data, path: Path) -> Run:
    """A run whose folder holds what `train` would have left."""
    folder = RunFolder(path)
    folder.write_text("config.toml", 'recipe = "<script>alert(1)</script>"\n')
    for step in (1, 2, 3):
        folder.log(step, {"loss": 1 / step, "lr": 1e-3, "seconds": 60.0 * step})
    folder.log(3, {"loss": 0.5}, "valid")
    registry = Registry.of({})
    return Run(model, data.info, data=data, registry=registry, path=path, step=3, name="the model 'a<b'")


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = GaussianMixtureConfig(components=4, std=0.2, train_points=400, valid_points=40, test_points=200)
    data = load(config)
    return run_of(Exact(data), data, tmp_path_factory.mktemp("points") / "it's here")


def grey_run(path: Path) -> Run:
    pixels = torch.randint(256, (90, 1, 6, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    info = DataInfo("noise", (1, 6, 6))
    splits = {name: lambda: TensorSplit(pixels, None) for name in ("train", "valid", "test")}
    return run_of(Constant(), Data(info, splits), path)


def test_report_is_one_safe_page(points: Run) -> None:
    path = write_report(points).path
    assert points.path is not None
    assert path == points.path / "report.html"
    html = path.read_text()
    page = Page(html)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    loads = [a.get("src") or a.get("href") for _, a in page.tags if "src" in a or "href" in a]
    assert loads
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in loads)
    assert "url(" not in html
    assert "<script>alert(1)</script>" in page.text  # as text: escaped
    assert "Levels <by> hand. A & B" in [a.get("alt") for _, a in page.tags]
    assert (
        f"'{str(points.path).replace(chr(39), chr(39) + chr(34) + chr(39) + chr(34) + chr(39))}'" in page.text
    )


def test_report_shows_the_figures_of_evaluate(points: Run) -> None:
    page = Page(write_report(points).path.read_text())
    assert points.path is not None
    kept = metrics.read(points.path / metrics.FILE)
    assert kept is not None
    nll, found = kept.values["core/nll"], kept.values["core/baselines"]
    for value in (nll["nats_per_dim"], found["truth_nats_per_dim"], found["gaussian_nats_per_dim"]):
        assert f"{value:.3f}" in page.text
    assert "0.0123" in page.text
    assert "3.0 min" in page.text
    # The loss, samples, the histogram, the confusion of classes, the model's own figure.
    assert len(page.pictures()) == 5


def test_report_takes_evaluation_json_only_of_its_own_checkpoint(points: Run, tmp_path: Path) -> None:
    assert points.path is not None
    path = points.path / metrics.FILE
    write_report(points)
    own = metrics.read(path)
    assert own is not None
    edited = {**own.to_dict(), "values": {**own.values, "core/accuracy": {**own.values["core/accuracy"]}}}
    edited["values"]["core/accuracy"]["accuracy"] = 0.1234
    write_bytes(path, to_json(edited).encode())
    assert "12.3%" in write_report(points, tmp_path / "a.html").path.read_text()
    write_bytes(path, to_json({**edited, "step": 2}).encode())
    assert "12.3%" not in write_report(points, tmp_path / "b.html").path.read_text()
    assert metrics.read(path) == own


def test_report_of_a_run_without_density_or_classes(tmp_path: Path) -> None:
    page = Page(write_report(grey_run(tmp_path / "run")).path.read_text())
    assert "Left out: core/nll" in page.text
    assert "Likelihood" not in page.text
    assert "Classification" not in page.text
    assert "report_figures failed: RuntimeError('no <figure> today')" in page.text
    loss, grid, pairs = page.pictures()
    assert loss.width > 600
    # A grid of 10 by 10 constant images of value 0, the middle of the grey scale; 6 pixels enlarged 8 times.
    assert grid.size == (502, 502)
    assert (np.asarray(grid)[2:50, 2:50] == 128).all()
    assert pairs.size == (12 * 50 + 2, 2 * 50 + 2)


def test_report_needs_a_run_folder(tmp_path: Path) -> None:
    run = grey_run(tmp_path / "run")
    run.path = None
    with pytest.raises(UserError, match="not a run folder"):
        write_report(run)


# -- figures -------------------------------------------------------------------------------------------------


def test_curves_average_what_no_picture_could_show() -> None:
    points = [(float(i), float(i % 2)) for i in range(4001)]
    shown = figures._averaged(points)
    assert len(shown) <= figures.MAX_LINE_POINTS
    assert shown[-1][0] == 4000
    assert all(abs(value - 0.5) < 0.2 for _, value in shown[:-1])
    assert figures._averaged(points[:10]) == points[:10]


def test_histogram_survives_what_models_say() -> None:
    odd = {"held-out images": [1.0, float("inf"), 2.0], "training images": [1.5]}
    image = Image.open(io.BytesIO(figures.histogram(odd, {"Gaussian": 3.0}, "bits/dim")))
    colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 20


def test_figures_leave_matplotlib_as_it_was() -> None:
    script = (
        "import matplotlib; before = dict(matplotlib.rcParams)\n"
        "from cdm_core import figures; figures.curves({'train': [(0, 1.0)]}, 'loss')\n"
        "import matplotlib.pyplot; assert matplotlib.pyplot.get_fignums() == []\n"
        "assert dict(matplotlib.rcParams) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_words_of_numbers() -> None:
    from cdm_core.report import _duration, _number

    assert [_number(v) for v in (1437.0, 0.123456, -2.5)] == ["1,437", "0.1235", "-2.5"]
    assert [_duration(v) for v in (59.6, 90.0, 7200.0)] == ["60 s", "1.5 min", "2.0 h"]
    assert re.fullmatch(r"nan", _number(float("nan")))
