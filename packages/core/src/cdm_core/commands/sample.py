"""`cdm-run sample RUN`: draw images, in one process or in several (`torchrun`, `accelerate launch`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cdm_core.commands.common import Session, device_option, json_option, pick_device, seed_option
from cdm_core.commands.run_options import (
    compile_option,
    open_run,
    progress,
    run_argument,
    run_folder,
    show_json,
    weights_option,
)
from cdm_core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from cdm_core.runs import Run, SamplePlan


@click.command()
@run_argument
@click.option("--num", default=64, show_default=True, help="How many images.")
@click.option("--sampler", metavar="NAME", help="Sampler; the run's own by default.")
@click.option("--steps", type=int, help="Denoising steps; the run's own number by default.")
@click.option("--grid", metavar="GRID", help="Spacing of the noise levels: t, logsnr, quadratic or rho.")
@click.option(
    "--label", metavar="Y", multiple=True, help="Class, or classes to cycle through: 3, 0,1 or none."
)
@click.option("--adapter", metavar="NAME", help="What to sample through, a guide say; none: the model alone.")
@click.option("--recipe", metavar="NAME", help="Sample as this recipe does: its sampler, settings, adapter.")
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="One of those, e.g. adapter.scale=2."
)
@click.option("--guidance", type=float, metavar="W", help="Weight of classifier-free guidance.")
@seed_option()
@click.option("--batch-size", type=int, help="Images at a time; changes no image.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder; default RUN/samples/SAMPLER-STEPS-seedS."
)
@click.option("--format", "formats", default="grid,npz", show_default=True, help="Of grid, npz and png.")
@weights_option
@compile_option
@device_option
@json_option
@click.pass_obj
def sample(
    session: Session,
    path: Path,
    num: int,
    label: tuple[str, ...],
    adapter: str | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    seed: int,
    out: Path | None,
    formats: str,
    weights: str,
    compiled: bool,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw images from a trained run.

    Image i depends only on the seed and on i: not on the batch size, the number of images or of processes.
    Writes grid.png, samples.npz (samples, labels, settings) and, with png, images/00000.png and on.

    \b
    cdm-run sample RUN --num 100 --label 0,1 --steps 50
    accelerate launch --num_processes 2 -m cdm_core sample RUN --num 50000
    torchrun --nproc-per-node 2 -m -- cdm_core sample RUN --num 50000
    """
    from cdm_core.processes import Place

    place, kinds, labels = Place.from_environment(), _formats(formats), parse_labels(label)
    if adapter:
        overrides = (f"adapter={adapter}" if adapter == "none" else f"adapter.name={adapter}", *overrides)
    run = open_run(
        session,
        path,
        place.device(pick_device(device)),
        weights,
        compiled=compiled,
        recipe=recipe,
        overrides=overrides,
    )
    if num < 1:
        raise UserError(f"--num {num}: ask for at least 1 image")
    plan = run.plan(**options)
    mine = place.share(num)
    with progress("sampling", quiet=as_json or not place.main) as update:
        part = _draw(run, mine, seed=seed, labels=labels, callback=update, **options)
    images = place.gather(part, num)
    if images is None:
        return
    folder = out or _default_folder(path, plan, seed)
    settings = _settings(run, plan, num=num, seed=seed, weights=weights)
    written = _write(folder, kinds, run, images, run.labels_for(range(num), labels), settings)
    if as_json:
        show_json({**settings, "out": str(folder), "files": [str(file) for file in written]})
    else:
        click.echo("\n".join(f"wrote {file}" for file in written))


def parse_labels(words: Sequence[str]) -> list[int] | Literal["none"] | None:
    """`--label 3 --label 0,1` as [3, 0, 1]; `none` alone means no class; nothing given, None."""
    parts = [part.strip() for word in words for part in word.split(",")]
    if not parts:
        return None
    if parts == ["none"]:
        return "none"
    try:
        return [int(part) for part in parts]
    except ValueError as error:
        raise UserError(f"--label {','.join(words)}: give class numbers, as in 3 or 0,1, or none") from error


def _formats(text: str) -> list[str]:
    from cdm_core.images import FORMATS

    kinds = [kind.strip() for kind in text.split(",")]
    unknown = [kind for kind in kinds if kind not in FORMATS]
    if unknown:
        raise UserError(f"--format {unknown[0]!r} is unknown: choose of {', '.join(FORMATS)}")
    return kinds


def _draw(run: Run, indices: range, **options: Any) -> Tensor:
    if len(indices) == 0:  # more processes than images
        import torch

        return torch.zeros(0, *run.info.shape)
    return run.sample(len(indices), first=indices.start, **options)


def _default_folder(path: Path, plan: SamplePlan, seed: int) -> Path:
    name = f"{plan.sampler.name.partition('/')[2]}-{plan.settings.steps}-seed{seed}"
    return run_folder(path, None, "samples") / name


def _settings(run: Run, plan: SamplePlan, **given: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "run": str(run.path),
        "step": run.step,
        "sampler": plan.sampler.name,
        **{name: value for name, value in asdict(plan.settings).items() if name != "batch_size"},
        "adapter": _adapter(run),
        **given,
    }


def _adapter(run: Run) -> dict[str, Any] | None:
    from cdm_core.config import plain

    chosen = run.sampling.adapter
    if chosen is None:
        return None
    return {"name": chosen.name, **(plain(chosen.config) if chosen.config is not None else {})}


def _write(
    folder: Path, kinds: Sequence[str], run: Run, x0: Tensor, labels: Tensor | None, settings: dict[str, Any]
) -> list[Path]:
    from cdm_core import images

    x0, info = run.decoded(x0)
    written = []
    if "grid" in kinds:
        columns = run.classes if labels is not None and 1 < (run.classes or 0) <= 20 else None
        written.append(images.save_grid(folder / "grid.png", x0, info, columns))
    if "npz" in kinds:
        written.append(images.save_npz(folder / "samples.npz", x0, info, labels, settings))
    if "png" in kinds:
        written += images.save_singles(folder / "images", x0, info)
    return written
