"""`cdm-run report RUN`: one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from cdm_core.commands.common import Session, device_option, json_option, seed_option
from cdm_core.commands.run_options import open_run, run_argument, show_json, table
from cdm_core.errors import UserError


@click.command()
@run_argument
@click.option("--out", type=click.Path(path_type=Path), help="File; default RUN/report.html.")
@seed_option()
@device_option
@json_option
@click.pass_obj
def report(session: Session, path: Path, out: Path | None, seed: int, device: str, as_json: bool) -> None:
    """Write a run's self-contained HTML report: no network, no scripts.

    Shows the figures of `evaluate`, which it computes first where they are missing or of another checkpoint.
    """
    from cdm_core.report import write_report

    if path.is_file():
        raise UserError(f"{path} is a file: reports are of run folders made by `cdm-run train`")
    run = open_run(session, path, device)

    def tell(what: str) -> None:
        if not as_json:
            click.echo(what, err=True)

    written = write_report(run, out, seed=seed, progress=tell)
    if as_json:
        show_json({"report": str(written.path)})
    else:
        click.echo(table(written.figures))
        click.echo(f"wrote {written.path}")
