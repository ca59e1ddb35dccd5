"""`cdm-run plugins`: what is installed, and what is wrong with it."""

from __future__ import annotations

import json

import click

from cdm_core.commands.common import Session, json_option
from cdm_core.manager import PluginInfo


@click.command()
@json_option
@click.pass_obj
def plugins(session: Session, as_json: bool) -> None:
    """List the plugins with their version, status and components; failed ones with their error."""
    found = session.registry.plugins
    if as_json:
        click.echo(json.dumps([plugin.to_dict() for plugin in found], indent=2))
        return
    for plugin in found:
        _show(plugin)
    failed = sum(plugin.status == "failed" for plugin in found)
    if failed:
        click.echo(
            f"Warning: {failed} of {len(found)} plugins failed; CDM_RUN_STRICT=1 shows the traceback, "
            "--no-plugins leaves all of them out",
            err=True,
        )


def _show(plugin: PluginInfo) -> None:
    click.echo(f"{plugin.name}  {plugin.distribution} {plugin.version}  {plugin.status}")
    if plugin.error:
        click.echo(f"  error: {plugin.error}")
    for kind, names in plugin.components.items():
        click.echo(f"  {kind}: {', '.join(name.partition('/')[2] for name in names)}")
