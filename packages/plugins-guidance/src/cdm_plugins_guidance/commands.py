"""`cdm-run guidance compare`, `calibrate`, `tune` and `ablate`: what a guide does, and why.

Tables on stdout, progress on stderr, everything in JSON in a folder of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cdm_core.commands.common import Session, device_option, json_option, pick_device, seed_option
from cdm_core.commands.run_options import (
    SPLITS,
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
)
from cdm_core.errors import UserError

if TYPE_CHECKING:
    from cdm_core.runs import Run
    from cdm_plugins_guidance.calibration import Curve
    from cdm_plugins_guidance.compare import Row
    from cdm_plugins_guidance.tuning import Candidate, Effect, Tuned

F = TypeVar("F", bound=Callable[..., Any])

HEAD = ("target rate", "confidence", "Fréchet", "precision", "recall")


def _sampling_options(function: F) -> F:
    """`--adapter`, `--recipe` and `--set`, as `cdm-run sample` has them, and where the run is and goes."""
    options = [
        run_argument,
        click.option("--adapter", metavar="NAME", help="The guide; the run's own by default."),
        click.option(
            "--recipe", metavar="NAME", help="Sample as this recipe does: sampler, settings, guide."
        ),
        click.option(
            "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="One of those: adapter.scale=2."
        ),
        data_option,
        weights_option,
        device_option,
        json_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _judge_option(function: F) -> F:
    """`--judge RUN`, passed as `judge: Path | None`."""
    return click.option(
        "--judge",
        metavar="RUN",
        type=click.Path(path_type=Path),
        help="Run of a classifier that was trained apart from the guide.",
    )(function)


def _open(
    session: Session,
    path: Path,
    adapter: str | None,
    recipe: str | None,
    overrides: Sequence[str],
    data: str | None,
    weights: str,
    device: str,
) -> Run:
    chosen = (f"adapter.name={adapter}",) if adapter else ()
    where = pick_device(device)
    return open_run(session, path, where, weights, data, recipe=recipe, overrides=(*chosen, *overrides))


def _with_judge(session: Session, path: Path, judge: Path | None, **options: Any) -> tuple[Run, Run]:
    """The run, and the judge's where the run is."""
    if judge is None:
        raise UserError(
            "a guide cannot judge itself: give --judge RUN, a run of a classifier that was trained apart "
            "(train one with another --seed, say)"
        )
    run = _open(session, path, **options)
    return run, open_run(session, judge, str(run.device))


class _Numbers(click.ParamType):
    """Numbers between commas, `inf` among them; a tuple of floats."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """`3,5,inf` as (3.0, 5.0, inf)."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers, as in 0.5,1,2", param, ctx)
        if any(map(math.isnan, numbers)):
            self.fail(f"{value!r} holds a nan", param, ctx)
        return numbers


def _numbers_option(name: str, text: str) -> Callable[[F], F]:
    return click.option(name, type=_Numbers(), metavar="A,B,...", default=(), help=text)


# -- compare -------------------------------------------------------------------------------------------------


@click.command("compare")
@_sampling_options
@_judge_option
@click.option(
    "--conditional",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="A class-conditional run to compare with.",
)
@click.option("--num", default=1000, show_default=True, help="Images sampled each way.")
@split_option
@seed_option()
@out_option("compare")
@click.pass_obj
def compare(
    session: Session,
    path: Path,
    judge: Path | None,
    conditional: Path | None,
    num: int,
    split: str,
    seed: int,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Sample unguided and guided; a classifier trained apart judges both.

    And training images for comparison. Distances are from images of --split; s/image leaves set-up out.
    Writes compare.json and a grid of samples for each way.
    """
    from cdm_plugins_guidance import compare as comparing

    run, referee = _with_judge(session, path, judge, **options)
    rival = open_run(session, conditional, str(run.device)) if conditional else None
    with telling(as_json) as tell:
        rows, samples = comparing.compare(run, referee, rival, split=split, num=num, seed=seed, progress=tell)
    settings: dict[str, Any] = {
        "run": str(path),
        "step": run.step,
        "judge": str(judge),
        "judge_step": referee.step,
        "conditional": conditional and str(conditional),
        "split": split,
        "num": num,
        "seed": seed,
        "sampling": comparing.sampling_of(run),
    }
    folder = comparing.save(run_folder(path, out, "compare"), run, rows, samples, settings)
    if as_json:
        show_json({"rows": comparing.as_dicts(rows), **settings, "out": str(folder)})
    else:
        click.echo(f"{split} split, {num} samples each, seed {seed}")
        click.echo(_table(rows))
        click.echo(f"wrote {folder / 'compare.json'} and pictures beside it")
    _warn_of_skipped(rows)


def _warn_of_skipped(rows: Sequence[Row]) -> None:
    """On stderr, a line for every way of sampling that was not guided throughout."""
    for row in rows:
        if row.skipped:
            click.echo(
                f"{row.name}: {row.skipped} gradients of the guide, one an image and step, were not finite "
                "and moved nothing",
                err=True,
            )


def _cells(row: Row) -> list[str]:
    values = (row.target_rate, row.confidence, row.frechet, row.precision, row.recall)
    return ["-" if value is None else number(value) for value in values]


def _table(rows: Sequence[Row]) -> str:
    seconds = ["-" if row.seconds is None else number(row.seconds) for row in rows]
    lines = [(row.name, *_cells(row), time) for row, time in zip(rows, seconds, strict=True)]
    return table([("", *HEAD, "s/image"), *lines])


# -- calibrate -----------------------------------------------------------------------------------------------


@click.command("calibrate")
@_sampling_options
@click.option(
    "--look",
    "looks",
    type=click.Choice(["x0", "rms", "x_t"]),
    multiple=True,
    default=["x0", "rms"],
    show_default=True,
    help="What the guide sees; may be given several times.",
)
@_numbers_option("--softplus", "Betas, inf for ReLU  [default: the run's own, and inf]")
@click.option(
    "--tau", "taus", type=_Numbers(), metavar="A,B,...", default="1", show_default=True,
    help="Of the posterior softmax(tau f).",
)  # fmt: skip
@click.option("--num", default=1000, show_default=True, help="Held-out images.")
@click.option("--levels", default=12, show_default=True, help="Noise levels, of the run's sampler.")
@click.option("--bins", default=15, show_default=True, help="Bins of confidence, of equal width.")
@split_option
@seed_option()
@out_option("calibration")
@click.pass_obj
def calibrate(
    session: Session,
    path: Path,
    looks: tuple[Any, ...],
    softplus: tuple[float, ...],
    taus: tuple[float, ...],
    num: int,
    levels: int,
    bins: int,
    split: str,
    seed: int,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Expected calibration error of the guide's classifier by noise level.

    Of the run's denoiser and its first guide. Writes calibration.json and calibration.png.
    """
    from cdm_core.files import to_json, write_bytes
    from cdm_plugins_guidance import calibration
    from cdm_plugins_guidance.compare import guide_settings, sampling_of

    run = _open(session, path, **options)
    own = guide_settings(run).classifier.softplus
    given: dict[str, Any] = {"split": split, "num": num, "levels": levels, "bins": bins, "seed": seed}
    with telling(as_json) as tell:
        curves = calibration.calibrate(
            run,
            looks=looks,
            softplus=softplus or tuple(dict.fromkeys([own, math.inf])),
            taus=taus,
            progress=tell,
            **given,
        )
    folder = run_folder(path, out, "calibration")
    found = {"run": str(path), "step": run.step, **given, "sampling": sampling_of(run)}
    found["curves"] = [curve.to_dict() for curve in curves]
    write_bytes(folder / "calibration.json", to_json(found).encode())
    write_bytes(folder / "calibration.png", calibration.picture(curves))
    if as_json:
        show_json({**found, "out": str(folder)})
    else:
        click.echo(
            f"{split} split, {len(curves[0].levels)} levels, {bins} bins, seed {seed}; over the levels:"
        )
        click.echo(_calibration_table(curves))
        click.echo(f"wrote {folder / 'calibration.json'} and calibration.png beside it")


def _calibration_table(curves: Sequence[Curve]) -> str:
    names = ("accuracy", "confidence", "ece", "floor")
    lines = [(curve.name, *(number(curve.mean(name)) for name in names)) for curve in curves]
    return table([("", "accuracy", "confidence", "integral ECE", "its floor"), *lines])


# -- tune ----------------------------------------------------------------------------------------------------


@click.command("tune")
@_sampling_options
@_judge_option
@_numbers_option("--softplus", "Betas, inf for ReLU  [default: inf, 3, 5 and the run's own]")
@_numbers_option("--tau2", "[default: 0, 0.5, 1 and the run's own]")
@_numbers_option("--scale", "[default: the run's own times 0.5, 1, 2 and 4]")
@click.option("--keep", default=3, show_default=True, help="Pairs (softplus, tau2) that are sampled.")
@click.option(
    "--rate", default=0.9, show_default=True, help="Wanted share of samples of the class asked for."
)
@click.option("--num", default=256, show_default=True, help="Images sampled for a candidate.")
@click.option("--predicted", default=256, show_default=True, help="Held-out images of the first stage.")
@click.option("--levels", default=6, show_default=True, help="Noise levels of the first stage.")
@click.option("--bins", default=15, show_default=True, help="Bins of confidence of the first stage.")
@click.option(
    "--split", type=click.Choice(SPLITS), default="valid", show_default=True, help="Images to tune on."
)
@seed_option()
@out_option("tune")
@click.pass_obj
def tune(
    session: Session,
    path: Path,
    judge: Path | None,
    split: str,
    seed: int,
    out: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Search for the guide's softplus, tau2 and scale.

    First the least integral ECE on predicted x0, then the least Fréchet distance of samples of which --judge
    takes the wanted share for the class asked for. Writes tune.json as it goes; the same command goes on.
    """
    from cdm_plugins_guidance import tuning
    from cdm_plugins_guidance.compare import as_dicts

    names = ("softplus", "tau2", "scale", "keep", "rate", "num", "predicted", "levels", "bins")
    search = tuning.Search(**{name: given.pop(name) for name in names})
    run, referee = _with_judge(session, path, judge, **given)
    file = run_folder(path, out, "tune") / "tune.json"
    with telling(as_json) as tell:
        opened = {"weights": given["weights"], "data": given["data"]}
        found = tuning.tune(run, referee, search, file, split=split, seed=seed, **opened, progress=tell)
    flags = [*_given_flags(given["adapter"], given["recipe"], given["overrides"]), *found.flags]
    if as_json:
        values = {"best": vars(found.best), "reached": found.reached, "flags": flags}
        rows = {"confirmed": as_dicts(found.confirmed), "candidates": _candidate_dicts(found)}
        show_json({**values, **rows, "left_out": found.left_out, "out": str(file)})
        return
    for beta, reason in found.left_out.items():
        click.echo(f"left out softplus {beta}: {reason}", err=True)
    click.echo(_tuned_text(found, search.rate))
    click.echo(f"wrote {file}")
    click.echo(f"best: {' '.join(flags) or 'as it is'}")


def _candidate_dicts(found: Tuned) -> list[dict[str, Any]]:
    return [{**vars(candidate), **vars(row)} for candidate, row in found.candidates]


def _given_flags(adapter: str | None, recipe: str | None, overrides: Sequence[str]) -> list[str]:
    """What the command was given, to be given again."""
    import shlex

    chosen = [("--adapter", adapter), ("--recipe", recipe), *(("--set", text) for text in overrides)]
    return [f"{name} {shlex.quote(value)}" for name, value in chosen if value]


def _tuned_text(found: Tuned, rate: float) -> str:
    def cells(candidate: Candidate) -> tuple[str, ...]:
        smooth = "ReLU" if math.isinf(candidate.softplus) else number(candidate.softplus)
        return smooth, number(candidate.tau2), number(candidate.scale)

    head = ("softplus", "tau2", "scale", *HEAD)
    tried = table([head, *((*cells(candidate), *_cells(row)) for candidate, row in found.candidates)])
    again = table([("", *HEAD), *((row.name, *_cells(row)) for row in found.confirmed)])
    lines = ["tried, the run's own settings first:", tried, "again, from other noise:", again]
    if not found.reached:
        lines.append(f"no candidate has a target rate of {rate:g}: the best is the one of the highest")
    return "\n".join(lines)


# -- ablate --------------------------------------------------------------------------------------------------


@click.command("ablate")
@_sampling_options
@_judge_option
@click.option("--num", default=256, show_default=True, help="Images sampled each way, each seed.")
@click.option("--seeds", default=3, show_default=True, help="How many seeds, from --seed on.")
@split_option
@seed_option()
@out_option("ablate")
@click.pass_obj
def ablate(
    session: Session,
    path: Path,
    judge: Path | None,
    num: int,
    seeds: int,
    split: str,
    seed: int,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Take the look at x0, softplus, tau2 and the sine out, one at a time.

    Writes ablate.json as it goes; the same command, with more seeds say, goes on.
    """
    from cdm_plugins_guidance import tuning

    run, referee = _with_judge(session, path, judge, **options)
    file = run_folder(path, out, "ablate") / "ablate.json"
    with telling(as_json) as tell:
        opened = {"weights": options["weights"], "data": options["data"]}
        effects, absent = tuning.ablate(
            run, referee, file, split=split, num=num, seeds=seeds, seed=seed, **opened, progress=tell
        )
    if as_json:
        show_json({"effects": [vars(effect) for effect in effects], "absent": absent, "out": str(file)})
        return
    click.echo(f"{split} split, {num} samples each, {seeds} seeds from {seed}; +- standard error over seeds")
    click.echo(_effects_table(effects, "mean", "error"))
    click.echo("less the whole guide, seed by seed:")
    click.echo(_effects_table(effects[1:], "delta", "delta_error"))
    for part, reason in absent.items():
        click.echo(f"not taken out: {part}, since {reason}")
    click.echo(f"wrote {file}")


def _effects_table(effects: Sequence[Effect], values: str, errors: str) -> str:
    def cells(effect: Effect) -> list[str]:
        mean: Mapping[str, float] = getattr(effect, values)
        error: Mapping[str, float | None] = getattr(effect, errors)
        return [
            number(value) + ("" if error[name] is None else f" +- {error[name]:.2g}")
            for name, value in mean.items()
        ]

    return table([("", *HEAD), *((effect.name, *cells(effect)) for effect in effects)])
