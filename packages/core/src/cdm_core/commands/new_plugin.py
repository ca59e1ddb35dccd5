"""`cdm-run new-plugin`: the first hour of a new method."""

from __future__ import annotations

from pathlib import Path

import click

from cdm_core import scaffold
from cdm_core.commands.common import Session
from cdm_core.errors import UserError


@click.command("new-plugin")
@click.argument("name")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.pass_obj
def new_plugin(session: Session, name: str, out: Path) -> None:
    """Write an installable plugin NAME into DIR: a small working method, its test and its recipe."""
    scaffold.check_name(name)
    taken = [plugin for plugin in session.registry.plugins if plugin.name == name]
    if taken:
        raise UserError(
            f"a plugin {name!r} is installed already ({taken[0].distribution}): take another name"
        )
    for path in scaffold.write(name, out):
        click.echo(path)
    click.echo(f"Next: pip install -e {out}; pytest {out}; cdm-run --plugin {name} train --out runs/{name}")
