"""What the commands on a trained run share: their options, progress bars and tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cdm_core.errors import UserError

if TYPE_CHECKING:
    from cdm_core.commands.common import Session
    from cdm_core.runs import Run

F = TypeVar("F", bound=Callable[..., Any])
SPLITS = ("train", "valid", "test")


def run_argument(function: F) -> F:
    """`RUN`, passed as `path: Path`."""
    return click.argument("path", metavar="RUN", type=click.Path(path_type=Path))(function)


def weights_option(function: F) -> F:
    """`--weights ema|model`, passed as `weights: str`."""
    return click.option(
        "--weights",
        type=click.Choice(["ema", "model"]),
        default="ema",
        show_default=True,
        help="Averaged weights, or the plain ones.",
    )(function)


def data_option(function: F) -> F:
    """`--data NAME`, passed as `data: str | None`."""
    return click.option(
        "--data", metavar="NAME", help="Data set of a converted file (a run folder names its own)."
    )(function)


def split_option(function: F) -> F:
    """`--split train|valid|test`, passed as `split: str`."""
    return click.option(
        "--split", type=click.Choice(SPLITS), default="test", show_default=True, help="Which images."
    )(function)


def compile_option(function: F) -> F:
    """`--compile`, passed as `compiled: bool`."""
    return click.option(
        "--compile", "compiled", is_flag=True, help="Compile the model first: pays for many images."
    )(function)


def open_run(
    session: Session,
    path: Path,
    device: str,
    weights: str = "ema",
    data: str | None = None,
    *,
    compiled: bool = False,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """`load_run` with the session's plugins."""
    from cdm_core.runs import load_run

    return load_run(
        path,
        device=device,
        weights=weights,  # type: ignore[arg-type]
        data=data,
        registry=session.registry,
        compile=compiled,
        plugins=session.plugins,
        recipe=recipe,
        overrides=overrides,
    )


@contextmanager
def progress(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal; yields `update(done, total)`."""
    from tqdm import tqdm

    # disable=None: silent where stderr is no terminal.
    with tqdm(desc=label, leave=False, disable=True if quiet else None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def telling(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A line and, in a terminal, a bar on stderr for everything that takes time.

    Yields `update(what, done, total)`.
    """
    with ExitStack() as stack:
        bars: dict[str, Callable[[int, int], None]] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in bars:
                stack.close()
                bars.clear()
                if not quiet:
                    click.echo(name, err=True)
                bars[name] = stack.enter_context(progress(name, quiet=quiet))
            bars[name](done, total)

        yield update


def out_option(name: str) -> Callable[[F], F]:
    """`--out PATH`, passed as `out: Path | None`; `name` as `run_folder` takes it."""
    return click.option("--out", type=click.Path(path_type=Path), help=f"Folder; default RUN/{name}.")


def run_folder(path: Path, out: Path | None, name: str) -> Path:
    """`out`, or the folder `name` of a run, or beside a converted file."""
    return out or (path if path.is_dir() else path.with_suffix("")) / name


def show_json(value: Any) -> None:
    """Print JSON; what is not finite becomes null."""
    from cdm_core.files import to_json

    click.echo(to_json(value), nl=False)


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(indent + line.rstrip() for line in lines)


def number(value: float) -> str:
    """Four significant decimals for figures, none for counts."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def write_rows(path: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table: CSV, or a JSON list of objects where `path` ends in `.json`."""
    from cdm_core.files import to_json, write_bytes

    if path.suffix == ".json":
        write_bytes(path, to_json([dict(zip(names, row, strict=True)) for row in rows]).encode())
    elif path.suffix == ".csv":
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([names, *rows])
        write_bytes(path, stream.getvalue().encode())
    else:
        raise UserError(f"--out {path}: the name must end in .csv or .json")
