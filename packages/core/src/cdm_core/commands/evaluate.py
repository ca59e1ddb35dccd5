"""`cdm-run evaluate RUN`: every metric that the run allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cdm_core.commands.common import Session, device_option, json_option, seed_option
from cdm_core.commands.run_options import (
    data_option,
    number,
    open_run,
    run_argument,
    show_json,
    split_option,
    table,
    weights_option,
)

if TYPE_CHECKING:
    from cdm_core.metrics import Evaluation


@click.command()
@run_argument
@click.option("--metric", metavar="NAME", multiple=True, help="Only this one; may be given several times.")
@split_option
@seed_option()
@data_option
@weights_option
@device_option
@json_option
@click.pass_obj
def evaluate(
    session: Session,
    path: Path,
    metric: tuple[str, ...],
    split: str,
    seed: int,
    data: str | None,
    weights: str,
    device: str,
    as_json: bool,
) -> None:
    """Compute every metric that a run allows; `evaluation.json` in the run keeps them for the report."""
    from cdm_core import metrics
    from cdm_core.files import to_json, write_bytes

    run = open_run(session, path, device, weights, data)

    def tell(name: str) -> None:
        if not as_json:
            click.echo(f"computing {name}", err=True)

    found = metrics.evaluate(run, split=split, names=metric or None, seed=seed, progress=tell)
    if path.is_dir() and not metric and weights == "ema":
        write_bytes(path / metrics.FILE, to_json(found.to_dict()).encode())
    if as_json:
        show_json({"run": str(path), **found.to_dict()})
    else:
        click.echo(as_text(found))


def as_text(found: Evaluation) -> str:
    """The figures as a table, and what was left out."""
    rows = [
        (name, key, number(value)) for name, figures in found.values.items() for key, value in figures.items()
    ]
    shown = [
        (name if i == 0 or rows[i - 1][0] != name else "", *rest) for i, (name, *rest) in enumerate(rows)
    ]
    title = f"{found.split} split, seed {found.seed}" + ("" if found.step is None else f", step {found.step}")
    skipped = [f"skipped {name}: {reason}" for name, reason in found.skipped.items()]
    return "\n".join([title, *([table(shown)] if shown else []), *skipped])
