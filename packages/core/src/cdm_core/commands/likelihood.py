"""`cdm-run likelihood RUN`: log-density of the images of a split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cdm_core.commands.common import Session, device_option, json_option, seed_option
from cdm_core.commands.run_options import (
    compile_option,
    data_option,
    number,
    open_run,
    progress,
    run_argument,
    show_json,
    split_option,
    table,
    weights_option,
    write_rows,
)
from cdm_core.errors import UserError

if TYPE_CHECKING:
    from cdm_core.runs import Likelihood, Run


@click.command()
@run_argument
@split_option
@click.option("--draws", default=1, show_default=True, help="Dequantisation draws to average over.")
@seed_option()
@click.option("--limit", type=click.IntRange(min=1), help="Only the first images; all by default.")
@click.option(
    "--labels",
    type=click.Choice(["auto", "none", "data"]),
    default="auto",
    show_default=True,
    help="Condition on each image's class (data), or on none.",
)
@click.option("--out", type=click.Path(path_type=Path), help="File for every image's value, .csv or .json.")
@click.option("--check", is_flag=True, help="Also: is the density a density? The model's own diagnostics.")
@data_option
@weights_option
@compile_option
@device_option
@json_option
@click.pass_obj
def likelihood(
    session: Session,
    path: Path,
    split: str,
    draws: int,
    seed: int,
    limit: int | None,
    labels: Literal["auto", "none", "data"],
    out: Path | None,
    check: bool,
    data: str | None,
    weights: str,
    compiled: bool,
    device: str,
    as_json: bool,
) -> None:
    """Score images: nats, bits/dim, with standard errors over images."""
    if out is not None and out.suffix not in (".csv", ".json"):
        raise UserError(f"--out {out}: the name must end in .csv or .json")
    run = open_run(session, path, device, weights, data, compiled=compiled)
    with progress("scoring", quiet=as_json) as update:
        scores = run.likelihood(split, draws=draws, seed=seed, labels=labels, limit=limit, callback=update)
    diagnostics = run.diagnostics(split, seed=seed) if check else None
    if out is not None:
        _write(out, run, scores)
    if as_json:
        show_json(_as_dict(run, scores, diagnostics))
    else:
        click.echo(_as_text(run, scores, out))
        if check:
            click.echo(_check_text(run, diagnostics))


def _as_dict(run: Run, scores: Likelihood, diagnostics: dict[str, float] | None) -> dict[str, Any]:
    head = {"run": str(run.path), "step": run.step, "split": scores.split, "draws": scores.draws}
    found = {} if diagnostics is None else {"check": diagnostics}
    return head | {"seed": scores.seed, "labels": scores.labels} | scores.summary() | found


def _as_text(run: Run, scores: Likelihood, out: Path | None) -> str:
    figures = scores.summary()
    given = ", given their classes" if scores.labels == "data" else ""
    rows = [
        (name, f"{figures[key]:.4f}", f"± {figures[key + '_se']:.4f}")
        for name, key in (
            ("log-density, nats", "nats"),
            ("nats/dim", "nats_per_dim"),
            ("bits/dim", "bits_per_dim"),
        )
    ]
    title = f"{len(scores.nats)} images of the {scores.split} split{given}; mean ± standard error"
    return "\n".join([title, table(rows), *([f"wrote {out}"] if out else [])])


def _check_text(run: Run, diagnostics: dict[str, float] | None) -> str:
    if diagnostics is None:
        return f"{run.name} offers no likelihood diagnostics"
    return "diagnostics\n" + table([(name, number(value)) for name, value in diagnostics.items()])


def _write(out: Path, run: Run, scores: Likelihood) -> None:
    classes = run.split(scores.split).labels
    names = ["image", "nats", "bits_per_dim", *([] if classes is None else ["label"])]
    columns = [range(len(scores.nats)), scores.nats.tolist(), scores.bits_per_dim.tolist()]
    if classes is not None:
        columns.append(classes[: len(scores.nats)].tolist())
    write_rows(out, names, zip(*columns, strict=True))
