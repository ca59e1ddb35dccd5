"""The pictures of reports, as PNG bytes: one style, axes labelled with units, Agg backend."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

# Okabe & Ito's colours: colour-blind readers tell them apart. Every figure has a white ground.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8F98"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9AA0A6",
    "axes.labelcolor": "#30343A",
    "axes.grid": True,
    "grid.color": "#E8EAED",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#5F6368",
    "ytick.color": "#5F6368",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
MAX_LINE_POINTS = 400  # a curve of more points is averaged over windows: the picture has no more pixels


@contextmanager
def _axes(target: io.BytesIO, width: float = 6.4, height: float = 3.4) -> Iterator[Axes]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: no global state, no backend of the caller's touched.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.add_subplot()
        figure.savefig(target, format="png")


def _drawn(draw: Callable[[Axes], None], **size: float) -> bytes:
    stream = io.BytesIO()
    with _axes(stream, **size) as axes:
        draw(axes)
    return stream.getvalue()


def scatter(points: Tensor, reference: Tensor | None = None) -> bytes:
    """Points (N, d) in their first two coordinates (d = 1: against their index), over reference points."""

    def plane(rows: Tensor) -> tuple[Any, Any]:
        values = rows.cpu().numpy()
        return (values[:, 0], values[:, 1]) if values.shape[1] > 1 else (values[:, 0], np.arange(len(values)))

    def draw(axes: Axes) -> None:
        if reference is not None:
            axes.scatter(*plane(reference), s=6, color=GREY, alpha=0.5, linewidths=0, label="held-out data")
        axes.scatter(*plane(points), s=6, color=BLUE, alpha=0.7, linewidths=0, label="samples")
        axes.set_xlabel("$x_1$ (model units)")
        axes.set_ylabel("$x_2$ (model units)" if points.shape[1] > 1 else "index")
        if points.shape[1] > 1:
            axes.set_aspect("equal", adjustable="datalim")
        if reference is not None:
            axes.legend(markerscale=2)

    return _drawn(draw, width=4.6, height=4.4)


Series = Sequence[tuple[float, float]]


def _averaged(points: Series) -> Series:
    window = -(-len(points) // MAX_LINE_POINTS)
    if window <= 1:
        return points
    chunks = [points[start : start + window] for start in range(0, len(points), window)]
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def curves(series: Mapping[str, Series], ylabel: str) -> bytes:
    """Training curves by split: (step, value) pairs; averaged over windows where there are very many."""
    from matplotlib.ticker import MaxNLocator

    colours = {"train": BLUE, "valid": ORANGE}

    def draw(axes: Axes) -> None:
        for name, points in series.items():
            steps, values = zip(*_averaged(points), strict=True)
            marker = "o" if len(steps) < 30 and name != "train" else None
            axes.plot(
                steps, values, label=name, color=colours.get(name, GREEN), marker=marker, markersize=3.5
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half step
        axes.set_ylabel(ylabel)
        if _spans_decades([value for points in series.values() for _, value in points]):
            axes.set_yscale("log")
        axes.legend()

    return _drawn(draw)


def _spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 30


def histogram(values: Mapping[str, Any], lines: Mapping[str, float], xlabel: str) -> bytes:
    """Overlaid histograms of per-image values, as shares, with vertical lines at `lines`.

    The range covers 99% of the values; the few beyond it are counted in the outermost bins.
    """
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}
    arrays = {name: array[np.isfinite(array)] for name, array in arrays.items()}
    everything = np.concatenate(list(arrays.values()))
    low, high = np.quantile(everything, [0.005, 0.995])
    low, high = min([low, *lines.values()]), max([high, *lines.values()])
    pad = 0.04 * (high - low) or 1.0
    bins = np.linspace(low - pad, high + pad, 48).tolist()

    def draw(axes: Axes) -> None:
        for (name, array), colour in zip(arrays.items(), (BLUE, ORANGE, GREEN), strict=False):
            weights = np.full(len(array), 100 / len(array))
            clipped = np.clip(array, bins[0], bins[-1])
            axes.hist(clipped, bins, weights=weights, alpha=0.5, color=colour, label=name)
            axes.axvline(float(array.mean()), color=colour)
        for (name, value), style in zip(lines.items(), ("--", ":", "-."), strict=False):
            axes.axvline(value, color="#30343A", linestyle=style, label=f"{name}, mean")
        axes.set_xlabel(xlabel)
        axes.set_ylabel("images (%)")
        axes.legend(fontsize=9)

    return _drawn(draw)


def confusion(counts: Any, names: Sequence[str]) -> bytes:
    """Confusion matrix (K, K) of counts, rows the true class, as row percentages."""
    table = np.asarray(counts, dtype=np.float64)
    shares = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)

    def draw(axes: Axes) -> None:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axes.grid(False)
        axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.figure.colorbar(image, ax=axes, label="share of the true class (%)")
        if len(names) <= 20:
            _annotate(axes, shares)

    return _drawn(draw, width=5.6, height=4.6)


def _annotate(axes: Axes, shares: Any) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            colour = "white" if share > 55 else "#30343A"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=colour)
