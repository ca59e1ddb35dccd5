"""`cdm-run convert`: a foreign checkpoint as one safetensors file that `sample` and the others take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cdm_core.commands.common import Session, json_option
from cdm_core.errors import UserError

if TYPE_CHECKING:
    from cdm_core.formats import Foreign
    from cdm_core.manager import Registry


@click.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="DST", type=click.Path(path_type=Path), help="DST.safetensors")
@click.option("--format", "name", metavar="NAME", help="Format of SRC  [default: whichever knows the file].")
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="What the file does not say, e.g. model.path=uniform or data.shape=[3,64,64].",
)
@click.option("--force", is_flag=True, help="Overwrite DST.")
@json_option
@click.pass_obj
def convert(
    session: Session,
    src: Path,
    out: Path,
    name: str | None,
    overrides: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Turn the foreign checkpoint SRC into safetensors, with all that builds its model here."""
    _check_paths(src, out, force)
    from cdm_core import formats
    from cdm_core.commands.run_options import show_json

    registry = session.registry
    full, foreign = read(src, registry, name, overrides, session.plugins)
    model = formats.build(foreign, registry, str(src))
    formats.save_converted(foreign, out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if as_json:
        summary = {"out": str(out), "format": full, "model": foreign.model.name, "parameters": parameters}
        show_json({**summary, "data": foreign.info.to_dict(), "note": foreign.note})
        return
    shape = "x".join(map(str, foreign.info.shape))
    click.echo(f"{out}: {foreign.model.name} for {shape} data, {parameters:,} parameters, read as {full}")
    if foreign.note:
        click.echo(foreign.note)


def read(
    src: Path, registry: Registry, name: str | None, overrides: tuple[str, ...], prefer: tuple[str, ...]
) -> tuple[str, Foreign]:
    """The full name of the format that knows `src` (or of the one named) and what it read.

    Raises UserError, with what every format said of the file, when none does.
    """
    known = registry.components("checkpoint format")
    if name is not None:
        full, record = registry.find("checkpoint format", name, prefer)
        known = {full: record}
    reasons: dict[str, str] = {}
    for full, record in known.items():
        try:
            foreign = record.load()(src, overrides)
        except UserError as error:
            reasons[full] = str(error)
            continue
        if foreign is not None:
            return full, foreign
    if reasons:
        # Formats that share a reader fail alike: say it once.
        raise UserError("; ".join(dict.fromkeys(reasons.values())))
    tried = ", ".join(known) or "no plugin that reads checkpoints is installed"
    raise UserError(f"{src} is in no known checkpoint format (known: {tried})")


def _check_paths(src: Path, out: Path, force: bool) -> None:
    if not src.exists():
        raise UserError(f"{src}: there is no such file or folder")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the name must end in .safetensors")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder")
    if out.exists() and out.samefile(src):
        raise UserError(f"--out {out} is the file to convert: write elsewhere")
    if out.exists() and not force:
        raise UserError(f"--out {out} exists: choose another name, or overwrite it with --force")
