"""`cdm-run recipes`: the named configurations that plugins offer."""

from __future__ import annotations

import json

import click

from cdm_core import config
from cdm_core.commands.common import Session, json_option


@click.command()
@click.argument("name", required=False)
@json_option
@click.pass_obj
def recipes(session: Session, name: str | None, as_json: bool) -> None:
    """List the recipes, or print the recipe NAME as the complete TOML that `train --config` takes."""
    registry = session.registry
    if name is not None:
        chosen = config.resolve(registry, plugins=session.plugins, recipe=name)
        text = json.dumps(config.to_dict(chosen), indent=2) if as_json else config.to_toml(chosen)
        click.echo(text.rstrip("\n"))
        return
    found = registry.components("recipe")
    if as_json:
        rows = [{"name": full, "summary": record.summary} for full, record in found.items()]
        click.echo(json.dumps(rows, indent=2))
        return
    if not found:
        click.echo("No plugin with recipes is installed.")
    width = max(map(len, found), default=0)
    for full, record in found.items():
        click.echo(f"{full:{width}}  {record.summary}")
