"""`cdm-run joint counterfactual` and `probe`: what the shared network can do beside samples and classes.

Tables on stdout, progress on stderr, everything in a folder of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cdm_core.commands.common import Session, device_option, json_option, pick_device, seed_option
from cdm_core.commands.run_options import (
    data_option,
    number,
    open_run,
    out_option,
    run_argument,
    run_folder,
    show_json,
    split_option,
    table,
    telling,
    weights_option,
    write_rows,
)

if TYPE_CHECKING:
    from cdm_plugins_joint.counterfactual import Counterfactuals, Target
    from cdm_plugins_joint.probe import Score

F = TypeVar("F", bound=Callable[..., Any])


def _common(function: F) -> F:
    """Where the run is, its weights and data, and how to answer."""
    for option in reversed([seed_option(), data_option, weights_option, device_option, json_option]):
        function = option(function)
    return function


# -- counterfactual ------------------------------------------------------------------------------------------


class _Target(click.ParamType):
    """`next`, `second` or the number of a class."""

    name = "target"

    def convert(self, value: Any, param: Any, ctx: Any) -> Target:
        """`3` as 3."""
        if isinstance(value, int) or value in ("next", "second"):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither next, second nor the number of a class", param, ctx)


@click.command("counterfactual")
@run_argument
@click.option(
    "--target",
    type=_Target(),
    metavar="Y",
    default="next",
    show_default=True,
    help="Class to change to: a number, next (the one after an image's own), second (the head's second "
    "choice). Of attributes the number of the one to turn over.",
)
@click.option(
    "--start",
    type=float,
    default=0.25,
    show_default=True,
    help="Share of the noise levels that an image is noised to: less keeps more of it.",
)
@click.option("--steps", type=int, help="Steps back from there; the run's own number, or all, by default.")
@click.option("--num", default=100, show_default=True, help="Images.")
@click.option(
    "--judge",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Run of a classifier that was trained apart: its answers too, and distances in its features.",
)
@click.option("--adapter", metavar="NAME", help="The guide; the run's own, or representations, by default.")
@click.option("--recipe", metavar="NAME", help="Steer as this recipe does: sampler, settings, guide.")
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="One of those: adapter.scale=100."
)
@click.option("--columns", type=click.IntRange(min=1), default=10, show_default=True, help="Of the picture.")
@split_option
@_common
@out_option("counterfactual")
@click.pass_obj
def counterfactual(
    session: Session,
    path: Path,
    target: Target,
    judge: Path | None,
    adapter: str | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    columns: int,
    split: str,
    seed: int,
    data: str | None,
    weights: str,
    device: str,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Change images to another class, and measure what that took.

    Noises each image, samples from there, steered; beside it the same unsteered, and samples from pure noise.
    Writes counterfactual.png (input, noised, output), .csv (every image) and .json.

    \b
    cdm-run joint counterfactual RUN --target 3 --judge OTHER --start 0.3
    """
    from cdm_core.files import to_json, write_bytes
    from cdm_plugins_joint import counterfactual as making

    name = (f"adapter.name={adapter}",) if adapter else ()
    where = pick_device(device)
    run = open_run(session, path, where, weights, data, recipe=recipe, overrides=(*name, *overrides))
    run = making.steerable(run)
    referee = open_run(session, judge, where) if judge else None
    with telling(as_json) as tell:
        found = making.counterfactuals(
            run, referee, split=split, target=target, seed=seed, progress=tell, **options
        )
    folder, rows = run_folder(path, out, "counterfactual"), found.rows()
    told = {
        "run": str(path),
        "step": run.step,
        "judge": judge and str(judge),
        "split": split,
        "target": target,
        "seed": seed,
        "start": options["start"],
        "sigma": found.sigma,
        "sampling": _sampling(run),
        "ways": found.summary(),
    }
    write_bytes(folder / "counterfactual.png", making.picture(found, run, columns))
    write_rows(folder / "counterfactual.csv", list(rows[0]), [list(row.values()) for row in rows])
    write_bytes(folder / "counterfactual.json", to_json({**told, "images": rows}).encode())
    if as_json:
        show_json({**told, "images": rows, "out": str(folder)})
    else:
        click.echo(f"{len(rows)} images of {split}, noised to sigma {found.sigma:.3g}, seed {seed}")
        click.echo(_ways_table(found))
        click.echo(f"wrote {folder / 'counterfactual.png'}, .csv and .json")


def _sampling(run: Any) -> dict[str, Any]:
    """How `run` is steered, as plain values."""
    from cdm_core.config import plain

    own = run.sampling
    chosen = {"sampler": own.sampler, "adapter": own.adapter}
    return {"sample": plain(own.sample)} | {
        kind: None
        if selection is None
        else {"name": selection.name, **({} if selection.config is None else plain(selection.config))}
        for kind, selection in chosen.items()
    }


def _ways_table(found: Counterfactuals) -> str:
    means = found.summary()
    judges = [name.removesuffix("_hit") for name in found.before if name.endswith("_hit")]
    head = ["", *(f"{who}: target" for who in judges), *(f"{who}: flipped" for who in judges)]
    rows = [[*head, "pixel RMSE", "feature distance"]]
    for way, values in means.items():
        rates = [_percent(values[f"{who}_{kind}"]) for kind in ("rate", "flip_rate") for who in judges]
        rows.append([way, *rates, number(values["rmse"]), number(values["feature_distance"])])
    return table(rows)


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.1f}%"


# -- probe ---------------------------------------------------------------------------------------------------


@click.command("probe")
@run_argument
@click.option(
    "--levels", default=6, show_default=True, help="Noise levels beside clean images, evenly spaced."
)
@click.option("--train", default=2000, show_default=True, help="Training images that probes are fitted to.")
@click.option("--num", default=1000, show_default=True, help="Held-out images that they are scored on.")
@click.option("--l2", default=1e-3, show_default=True, help="Half of it times |W|^2 is added to the loss.")
@split_option
@_common
@out_option("probe")
@click.pass_obj
def probe(
    session: Session,
    path: Path,
    split: str,
    seed: int,
    data: str | None,
    weights: str,
    device: str,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Linear probes of the frozen features, by noise level and map.

    Beside them the head's own accuracy. Writes probe.json, probe.csv and probe.png.
    """
    from dataclasses import asdict

    from cdm_core.files import to_json, write_bytes
    from cdm_plugins_joint import probe as probing

    run = open_run(session, path, pick_device(device), weights, data)
    with telling(as_json) as tell:
        scores = probing.probe(run, split=split, seed=seed, progress=tell, **options)
    rows: list[dict[str, Any]] = [asdict(score) for score in scores]
    told = {"run": str(path), "step": run.step, "split": split, "seed": seed, **options, "scores": rows}
    folder = run_folder(path, out, "probe")
    write_bytes(folder / "probe.json", to_json(told).encode())
    write_rows(folder / "probe.csv", list(rows[0]), [list(row.values()) for row in rows])
    write_bytes(folder / "probe.png", probing.picture(scores))
    if as_json:
        show_json({**told, "out": str(folder)})
    else:
        click.echo(f"{split} split, seed {seed}; accuracy by noise std in data units, 0: clean")
        click.echo(_probe_table(scores))
        click.echo(f"wrote {folder / 'probe.json'}, .csv and .png")


def _probe_table(scores: Sequence[Score]) -> str:
    by_map: dict[str, dict[float, Score]] = {}
    for score in scores:
        by_map.setdefault(score.map, {})[score.sigma] = score
    sigmas = list(next(iter(by_map.values())))
    lines = [(name, *(_percent(row[sigma].accuracy) for sigma in sigmas)) for name, row in by_map.items()]
    return table([("", *(f"{sigma:.3g}" for sigma in sigmas)), *lines])
