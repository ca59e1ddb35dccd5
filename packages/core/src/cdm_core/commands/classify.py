"""`cdm-run classify RUN`: predicted classes, of a split or of a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cdm_core.commands.common import Session, device_option, json_option, seed_option
from cdm_core.commands.run_options import (
    data_option,
    open_run,
    run_argument,
    show_json,
    split_option,
    table,
    weights_option,
    write_rows,
)
from cdm_core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from cdm_core.runs import Run


@click.command()
@run_argument
@click.option(
    "--input", "folder", type=click.Path(path_type=Path), help="Folder of images, instead of a split."
)
@split_option
@click.option(
    "--sigma",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Std of noise to add first, in data units.",
)
@seed_option()
@click.option("--out", type=click.Path(path_type=Path), help="File for every prediction, .csv or .json.")
@data_option
@weights_option
@device_option
@json_option
@click.pass_obj
def classify(
    session: Session,
    path: Path,
    folder: Path | None,
    split: str,
    sigma: float,
    seed: int,
    out: Path | None,
    data: str | None,
    weights: str,
    device: str,
    as_json: bool,
) -> None:
    """Classify images, and report the accuracy where their classes are known."""
    if out is not None and out.suffix not in (".csv", ".json"):
        raise UserError(f"--out {out}: the name must end in .csv or .json")
    run = open_run(session, path, device, weights, data)
    if folder is not None:
        names, x0, labels = *read_folder(run, folder, seed), None
    else:
        x0, labels = run.examples(split, seed=seed)
        names = [f"{split}/{index}" for index in range(len(x0))]
    probabilities = run.classify(x0, sigma=sigma, seed=seed).double().softmax(1)
    rows = _rows(run, names, probabilities, labels)
    summary = _summary(probabilities, labels)
    if out is not None:
        write_rows(out, list(rows[0]), [list(row.values()) for row in rows])
    if as_json:
        show_json({"run": str(path), "sigma": sigma, **summary, "images": rows})
    else:
        click.echo(_as_text(rows, summary, out))


def read_folder(run: Run, folder: Path, seed: int) -> tuple[list[str], Tensor]:
    """Names and model inputs of the images in a folder, cropped and resized to the data's shape."""
    import torch
    from PIL import Image, ImageOps

    from cdm_core.data.folder import SUFFIXES, decode
    from cdm_core.images import is_points
    from cdm_core.random import fold
    from cdm_core.runs import ImageDraws

    channels, height, width = run.info.shape
    if is_points(run.info) or run.info.levels is None:
        raise UserError(f"--input: data set {run.info.name!r} does not hold images with grey levels")
    if not folder.is_dir():
        raise UserError(f"--input {folder} is not a folder")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"--input {folder} holds no images ({', '.join(sorted(SUFFIXES))})")

    def fit(image: Image.Image) -> Image.Image:
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)

    shown = torch.stack([decode(file, channels, fit) for file in files])
    pixels = (shown.double() * (run.info.levels - 1) / 255).round().to(torch.uint8)
    draws = ImageDraws(fold(seed, "dequantise", "input", 0), range(len(files)))
    return [file.name for file in files], run.info.to_model(pixels, draws)


def _rows(run: Run, names: list[str], probabilities: Tensor, labels: Tensor | None) -> list[dict[str, Any]]:
    classes = run.info.class_names or [str(index) for index in range(probabilities.shape[1])]
    best, predicted = probabilities.max(1)
    rows: list[dict[str, Any]] = [
        {"image": name, "predicted": int(y), "name": classes[int(y)], "probability": float(p)}
        for name, y, p in zip(names, predicted, best, strict=True)
    ]
    for row, label in zip(rows, [] if labels is None else labels.tolist(), strict=labels is not None):
        row["label"] = label
    return rows


def _summary(probabilities: Tensor, labels: Tensor | None) -> dict[str, float]:
    from cdm_core.metrics import wilson

    if labels is None:
        return {"n": len(probabilities)}
    right = int((probabilities.argmax(1) == labels).sum())
    low, high = wilson(right, len(labels))
    return {"n": len(labels), "accuracy": right / len(labels), "low": low, "high": high}


def _as_text(rows: list[dict[str, Any]], summary: dict[str, float], out: Path | None) -> str:
    shown = (
        [] if "accuracy" in summary else [(r["image"], r["name"], f"{r['probability']:.3f}") for r in rows]
    )
    lines = [table([("image", "class", "probability"), *shown])] if shown else []
    if "accuracy" in summary:
        share, low, high = (f"{100 * summary[key]:.2f}%" for key in ("accuracy", "low", "high"))
        lines.append(f"accuracy {share} of {summary['n']} images (95% interval {low} to {high})")
    return "\n".join([*lines, *([f"wrote {out}"] if out else [])])
