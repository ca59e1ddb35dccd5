"""What the classifier knows of noise: p(t | x), its confusion, and the denoising error by level.

Figures 4 and 9 of Yadin et al. 2024, on held-out images, for the report and for `cdm-run cdm levels RUN`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from cdm_core.commands.common import device_option, json_option
from cdm_core.random import Draws, fold
from cdm_plugins_cdm.diagnostics import by_noise, confusion, level_errors, level_logits

if TYPE_CHECKING:
    from torch import Tensor

    from cdm_core.runs import Run

CURVE_LEVELS = 24


def held_out(run: Run, split: str, seed: int, most: int = 512) -> tuple[Tensor, Draws]:
    """Up to `most` images of the split in model units (N, C, H, W), and the draws of what follows."""
    x0, _ = run.examples(split, range(min(most, len(run.split(split)))), seed=seed)
    return x0.to(run.device), Draws(fold(seed, "levels"), len(x0), device=run.device)


def analyse(run: Run, split: str = "test", seed: int = 0) -> dict[str, Any]:
    """Confusion (K, K), and the eps-MSE by level with its standard error, all in order of rising noise."""
    x0, draws = held_out(run, split, seed)
    order = torch.tensor(by_noise(run.model))
    inner = order[1:-1]
    spread = torch.logspace(0, torch.log10(torch.tensor(float(len(inner)))).item(), CURVE_LEVELS)
    levels = inner[spread.round().long().clamp(1, len(inner)).unique() - 1]
    error, deviation = level_errors(run.model, x0, draws, levels)
    matrix = confusion(level_logits(run.model, x0, draws)).cpu()[order][:, order]
    return {
        "confusion": matrix,
        "sigma": (run.model.path.sigma / run.model.path.alpha)[levels.cpu()],
        "eps_mse": error.cpu(),
        "eps_mse_error": deviation.cpu(),
    }


def summary(found: dict[str, Any]) -> dict[str, float]:
    """The figures of `analyse` as numbers: accuracy, distance in levels, error at the ends of the curve."""
    matrix = found["confusion"]
    index = torch.arange(len(matrix), dtype=matrix.dtype)
    distance = (matrix * (index[:, None] - index).abs()).sum(1).mean()
    return {
        "levels": len(matrix),
        "level_accuracy": matrix.diagonal().mean().item(),
        "level_distance": distance.item(),
        "eps_mse_least_noise": found["eps_mse"][0].item(),
        "eps_mse_most_noise": found["eps_mse"][-1].item(),
    }


def figures(found: dict[str, Any]) -> Iterable[tuple[str, bytes, str]]:
    """(title, PNG, caption) of the confusion matrix and of the denoising curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    pool = max(1, len(found["confusion"]) // 128)
    coarse = torch.nn.functional.avg_pool2d(found["confusion"][None, None], pool)[0, 0]
    image = axes.imshow(coarse.clamp(min=1e-6).log10(), origin="lower", cmap="magma", vmin=-5)
    axes.set(xlabel="estimated level", ylabel="true level", xticks=[], yticks=[])
    figure.colorbar(image, label="log10 of the mean posterior")
    yield (
        "Noise-level posterior",
        _png(figure),
        "Mean p(t | x) by true level, from clean (bottom left) to pure noise.",
    )

    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(found["sigma"], found["eps_mse"], found["eps_mse_error"], marker="o", ms=3, lw=1.2)
    axes.set(
        xscale="log", xlabel="noise std / signal scale", ylabel="mean squared error of the noise estimate"
    )
    axes.spines[["top", "right"]].set_visible(False)
    yield "Denoising error by level", _png(figure), "On held-out images; bars are one standard error."


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


@click.command("levels")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["test", "valid", "train"]), default="test", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of noise and dequantisation.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the pictures [default: RUN/levels].")
@device_option
@json_option
def command(run: Path, split: str, seed: int, out: Path | None, device: str, as_json: bool) -> None:
    """Noise-level estimation: accuracy, confusion, denoising error by level."""
    from cdm_core.runs import load_run

    found = analyse(load_run(run, device=device), split, seed)
    out = out or run / "levels"
    out.mkdir(parents=True, exist_ok=True)
    for title, png, _ in figures(found):
        (out / f"{title.lower().replace(' ', '-')}.png").write_bytes(png)
    values = summary(found)
    if as_json:
        click.echo(json.dumps(values))
        return
    for name, value in values.items():
        click.echo(f"{name:22} {value:.4g}")
    click.echo(f"pictures in {out}")
