"""`cdm-run zeroshot classify`, `evaluate`, `ablate` and `ood`: a denoiser's opinion of what it sees.

Every answer is kept in a folder of the run as it is found: the same command goes on where it was stopped, and
another one that needs the same answers does not ask again. Tables on stdout, progress on stderr.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cdm_core.commands.common import Session, device_option, json_option, pick_device, seed_option
from cdm_core.commands.run_options import (
    data_option,
    number,
    open_run,
    progress,
    run_argument,
    run_folder,
    show_json,
    split_option,
    table,
    weights_option,
    write_rows,
)
from cdm_core.errors import UserError
from cdm_plugins_zeroshot.methods import NAMES, Method, choose, default_name
from cdm_plugins_zeroshot.zeroshot_configs import ClassifierConfig

if TYPE_CHECKING:
    from cdm_core.processes import Place
    from cdm_core.runs import Run
    from cdm_plugins_zeroshot.answers import Desk, Images, Outcome
    from cdm_plugins_zeroshot.calibration import Integers
    from cdm_plugins_zeroshot.evaluation import Contrast, Line
    from cdm_plugins_zeroshot.ood import Detection

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
HELD_OUT = 500  # images of the validation split that exact Bayes is centred on


def _common(function: F) -> F:
    """What all of them take: the run, which images, the estimator's settings, where answers are kept."""
    options = [
        run_argument,
        split_option,
        click.option("--limit", type=click.IntRange(min=1), help="Only the first images; all by default."),
        click.option(
            "--pairs",
            type=click.IntRange(min=1),
            help="(Level, noise) pairs an image, at most  [default: as the run has it, or 100]",
        ),
        click.option(
            "--set",
            "overrides",
            metavar="KEY=VALUE",
            multiple=True,
            help="estimator.design=grid, elimination.alpha=1e-4, bayes.sigmas=[0,0.2], ...",
        ),
        click.option("--recipe", metavar="NAME", help="Settings of this recipe instead of the run's own."),
        seed_option(),
        click.option(
            "--store", type=click.Path(path_type=Path), help="Folder of answers; default RUN/zeroshot."
        ),
        data_option,
        weights_option,
        device_option,
        json_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _calibrate_option(default: str) -> Callable[[F], F]:
    """`--calibrate N`, passed as `calibrate: int | None`."""
    return click.option(
        "--calibrate",
        type=click.IntRange(min=0),
        metavar="N",
        help=f"Images of the validation split that make scores into probabilities  [default: {default}]",
    )


def _shard_option(function: F) -> F:
    """`--shard I/N`, passed as `shard: str | None`."""
    return click.option("--shard", metavar="I/N", help="Answer only this part of the images, 1/N to N/N.")(
        function
    )


def _methods_option(function: F) -> F:
    """`--method NAME`, several times, passed as `names: tuple[str, ...]`."""
    return click.option(
        "--method",
        "names",
        type=click.Choice(NAMES),
        multiple=True,
        help="May be given several times  [default: the run's own, or race; bayes where it has densities]",
    )(function)


def _open(
    session: Session,
    path: Path,
    store: Path | None,
    shard: str | None,
    data: str | None,
    weights: str,
    device: str,
    recipe: str | None,
) -> tuple[Desk, Place]:
    """The run with its folder of answers, and which process this is."""
    from cdm_core.processes import Place
    from cdm_plugins_zeroshot import pictures
    from cdm_plugins_zeroshot.answers import Desk
    from cdm_plugins_zeroshot.results import Shard

    place = Place.from_environment()
    if shard is not None and place.world > 1:
        raise UserError("--shard: the launcher has given every process its part already")
    part = Shard.of(place) if shard is None else Shard.parse(shard)
    latents = data is not None and _takes_latents(session, path)  # whose shape no data set has
    named = None if latents else data
    run = open_run(session, path, place.device(pick_device(device)), weights, named, recipe=recipe)
    if latents:
        pictures.attach(run, str(data))
    return Desk(run, run_folder(path, store, "zeroshot"), part), place


def _takes_latents(session: Session, path: Path) -> bool:
    from cdm_core.formats import read_metadata
    from cdm_plugins_zeroshot.pictures import of_latents

    return path.is_file() and of_latents(read_metadata(path, session.registry).info)


def _own(run: Run) -> ClassifierConfig | None:
    """How a run is to be classified, where it or the recipe says so: by its adapter's settings."""
    adapter = run.sampling.adapter
    return adapter.config if adapter and isinstance(adapter.config, ClassifierConfig) else None


def _ask(desk: Desk, method: Method, images: Images, label: str, *, quiet: bool, null: bool = False) -> None:
    if not quiet:
        click.echo(label, err=True)
    with progress(label, quiet=quiet) as update:
        desk.answer(method, images, null=null, progress=update)


def _wait(place: Place) -> bool:
    """Wait for the other processes of a launcher; whether this is the one that goes on."""
    if place.world > 1:
        from datetime import timedelta

        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timedelta(days=30))  # races end when they end
        try:
            dist.barrier()
        finally:
            dist.destroy_process_group()
    return place.main


def _held_out_images(desk: Desk, method: Method, calibrate: int | None, seed: int) -> Images | None:
    """Of the validation split, as many as are asked for, or as the method cannot do without."""
    from cdm_plugins_zeroshot.answers import of_split

    wanted = (HELD_OUT if method.needs_held_out else 0) if calibrate is None else calibrate
    if wanted == 0:
        if method.needs_held_out:
            raise UserError(
                "--calibrate 0: exact Bayes is centred on held-out images, or say --set bayes.centre=none"
            )
        return None
    return of_split(desk.run, "valid", limit=wanted, seed=seed)


def _outcome(desk: Desk, method: Method, images: Images, held_out: Images | None) -> Outcome | None:
    """What the method says of all images; None as long as other shards have some to answer."""
    from cdm_plugins_zeroshot.answers import HeldOut, conclude

    rows, known = desk.rows(method, images), None
    if held_out is not None:
        answers = desk.rows(method, held_out)
        if answers is None:
            return None
        known = HeldOut(answers, held_out.labels)
    return None if rows is None else conclude(method, rows, known)


def _partly(desk: Desk, images: Images) -> str:
    mine = desk.shard.share(len(images))
    return (
        f"shard {desk.shard.index} of {desk.shard.count}: "
        f"its {len(mine)} of {len(images)} images are answered; "
        "the same command tells more when all shards are done"
    )


# -- classify ------------------------------------------------------------------------------------------------


@click.command("classify")
@_common
@_calibrate_option(f"0; {HELD_OUT} with --method bayes")
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    help="Folder of images, or .npz as `sample` writes it, instead of a split. Of a model of latents: a "
    "folder, whose subfolders may be the classes.",
)
@click.option("--method", "name", type=click.Choice(NAMES), help="How  [default: as the run has it, or race]")
@click.option("--stages", metavar="DATA", help="Published stages of --method stages: cifar10, imagenet, ...")
@_shard_option
@click.option("--out", type=click.Path(path_type=Path), help="File for every answer, .csv or .json.")
@click.pass_obj
def classify(
    session: Session,
    path: Path,
    source: Path | None,
    split: str,
    limit: int | None,
    name: str | None,
    stages: str | None,
    pairs: int | None,
    overrides: tuple[str, ...],
    calibrate: int | None,
    seed: int,
    store: Path | None,
    shard: str | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Classify images by asking for every class how well it explains them.

    The same command goes on where it was stopped. Several processes, or machines with one folder, share the
    work:

    \b
    cdm-run zeroshot classify RUN --method race --out answers.csv
    torchrun --nproc-per-node 8 -m -- cdm_core zeroshot classify RUN
    cdm-run zeroshot classify RUN --shard 3/8
    """
    if out is not None and out.suffix not in (".csv", ".json"):
        raise UserError(f"--out {out}: the name must end in .csv or .json")
    from cdm_plugins_zeroshot.answers import of_path, of_split

    desk, place = _open(session, path, store, shard, **options)
    own = _own(desk.run)
    name = name or default_name(own)
    method = choose(name, overrides, pairs=pairs, stages=stages, seed=seed, base=own)
    images = (
        of_split(desk.run, split, limit=limit, seed=seed)
        if source is None
        else of_path(desk.run, source, limit=limit, seed=seed)
    )
    desk.check(method)
    held_out = _held_out_images(desk, method, calibrate, seed)
    quiet = as_json or not place.main
    if held_out is not None:
        _ask(desk, method, held_out, "held-out images", quiet=quiet)
    _ask(desk, method, images, "images", quiet=quiet)
    if not _wait(place):
        return
    outcome = _outcome(desk, method, images, held_out)
    if outcome is None:
        show_json({"complete": False, "shard": desk.shard.index}) if as_json else click.echo(
            _partly(desk, images)
        )
        return
    rows = _answers(desk.run, images, outcome)
    if out is not None:
        kept = [row if out.suffix == ".json" else _flat(row) for row in rows]
        write_rows(out, list(kept[0]), [list(row.values()) for row in kept])
    summary = _summary(outcome, images)
    if as_json:
        settings = {"method": name, "settings": method.settings(), "seed": seed}
        show_json({"run": str(path), **settings, "complete": True, **summary, "images": rows})
    else:
        click.echo(_classify_text(rows, summary, out))


def _answers(run: Run, images: Images, outcome: Outcome) -> list[dict[str, Any]]:
    """One dictionary an image; keys are the same for all of them."""
    classes = run.info.class_names or tuple(str(index) for index in range(outcome.scores.shape[1]))
    rows = []
    for i, image in enumerate(images.names):
        y, raw = int(outcome.predicted[i]), outcome.rows[i]
        row: dict[str, Any] = {"image": image, "predicted": y, "name": classes[y]}
        if images.labels is not None:
            row["label"] = int(images.labels[i])
        if outcome.probabilities is not None:
            row["probability"] = float(outcome.probabilities[i, y])
        if outcome.right is not None:
            row["right"] = float(outcome.right[i])
        if not outcome.method.exact:
            row |= {key: raw[key] for key in ("margin", "margin_low", "margin_high", "undecided", "pairs")}
        row["class_evaluations"] = int(outcome.class_evaluations[i])
        row["evaluations"] = float(outcome.evaluations[i])
        row["scores"] = outcome.scores[i].tolist()
        if not outcome.method.exact:
            row |= {key: raw[key] for key in ("errors", "gaps", "gap_errors", "seen", "eliminated_at")}
        rows.append(row)
    return rows


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not isinstance(value, list)}


def _summary(outcome: Outcome, images: Images) -> dict[str, Any]:
    """Figures of the whole: those of `Line` where classes are known."""
    from cdm_plugins_zeroshot.evaluation import line

    if images.labels is not None:
        return line(outcome, images.labels).to_dict()
    means = ("class_evaluations", "evaluations", "seconds", "undecided")
    return {"n": len(images), **{key: float(getattr(outcome, key).mean()) for key in means}}


def _classify_text(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], out: Path | None) -> str:
    lines = []
    if "accuracy" in summary:
        share, low, high = (f"{100 * summary[key]:.2f}%" for key in ("accuracy", "low", "high"))
        lines.append(f"accuracy {share} of {summary['n']} images (95% interval {low} to {high})")
    else:
        sure = [f"{row['probability']:.3f}" if "probability" in row else "-" for row in rows]
        shown = [(row["image"], row["name"], p) for row, p in zip(rows, sure, strict=True)]
        lines.append(table([("image", "class", "probability"), *shown]))
    lines.append(
        f"an image: {number(summary['class_evaluations'])} class evaluations, "
        f"{number(summary['evaluations'])} passes of the network, {number(summary['seconds'])} s; "
        f"undecided {100 * summary['undecided']:.1f}%"
    )
    return "\n".join([*lines, *([f"wrote {out}"] if out else [])])


# -- evaluate ------------------------------------------------------------------------------------------------


def _chosen(
    desk: Desk, names: Sequence[str], overrides: Sequence[str], pairs: int | None, seed: int
) -> dict[str, Method]:
    """The methods asked for, or the default ones that the run allows; UserError where there are none."""
    own = _own(desk.run)
    asked = names or (default_name(own), "bayes")
    wanted = {name: choose(name, overrides, pairs=pairs, seed=seed, base=own) for name in asked}
    if names:
        for method in wanted.values():
            desk.check(method)
        return wanted
    reasons = {name: desk.allows(method) for name, method in wanted.items()}
    allowed = {name: method for name, method in wanted.items() if reasons[name] is None}
    if not allowed:
        raise UserError("; ".join(reason for reason in reasons.values() if reason))
    return allowed


def _labelled(desk: Desk, split: str, limit: int | None, seed: int) -> tuple[Images, Integers]:
    from cdm_plugins_zeroshot.answers import of_split

    images = of_split(desk.run, split, limit=limit, seed=seed)
    if images.labels is None:
        raise UserError(f"data set {desk.run.info.name!r} has no labels to compare with")
    return images, images.labels


@click.command("evaluate")
@_common
@_calibrate_option(str(HELD_OUT))
@_methods_option
@click.pass_obj
def evaluate(
    session: Session,
    path: Path,
    names: tuple[str, ...],
    split: str,
    limit: int | None,
    pairs: int | None,
    overrides: tuple[str, ...],
    calibrate: int | None,
    seed: int,
    store: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Accuracy, calibration and cost of methods side by side, and McNemar's test between them.

    Writes evaluation.json and, with probabilities, reliability.png into the folder of answers.
    """
    from cdm_core.files import to_json, write_bytes
    from cdm_plugins_zeroshot import calibration, evaluation

    calibrate = HELD_OUT if calibrate is None else calibrate
    desk, place = _open(session, path, store, None, **options)
    images, labels = _labelled(desk, split, limit, seed)
    methods = _chosen(desk, names, overrides, pairs, seed)
    outcomes = _all(desk, place, methods, images, calibrate, seed, quiet=as_json)
    if outcomes is None:
        return
    lines = {name: evaluation.line(outcome, labels) for name, outcome in outcomes.items()}
    contrasts = evaluation.contrast(outcomes, labels, seed=seed)
    found = {
        "run": str(path),
        "step": desk.run.step,
        "split": split,
        "seed": seed,
        "calibrated_on": calibrate,
        "methods": {name: {**methods[name].settings(), **line.to_dict()} for name, line in lines.items()},
        "contrasts": [contrast.to_dict() for contrast in contrasts],
    }
    write_bytes(desk.folder / "evaluation.json", to_json(found).encode())
    curves = {name: line.calibration for name, line in lines.items() if line.calibration is not None}
    if curves:
        write_bytes(desk.folder / "reliability.png", calibration.diagram(curves))
    if as_json:
        show_json({**found, "out": str(desk.folder)})
        return
    click.echo(f"{split} split, {len(images)} images, seed {seed}; calibrated on {calibrate} held-out images")
    click.echo(_lines_text(lines))
    if contrasts:
        click.echo(_contrasts_text(contrasts))
    click.echo(f"wrote {desk.folder / 'evaluation.json'}")


def _all(
    desk: Desk,
    place: Place,
    methods: Mapping[str, Method],
    images: Images,
    calibrate: int | None,
    seed: int,
    *,
    quiet: bool,
) -> dict[str, Outcome] | None:
    """What every method says of the images; None in all processes of a launcher but the one that goes on."""
    held_out = {name: _held_out_images(desk, method, calibrate, seed) for name, method in methods.items()}
    quiet = quiet or not place.main
    for name, method in methods.items():
        known = held_out[name]
        if known is not None:
            _ask(desk, method, known, f"{name}, held-out images", quiet=quiet)
        _ask(desk, method, images, name, quiet=quiet)
    if not _wait(place):
        return None
    outcomes = {name: _outcome(desk, method, images, held_out[name]) for name, method in methods.items()}
    return {name: _there(outcome, desk) for name, outcome in outcomes.items()}


def _there(found: T | None, desk: Desk) -> T:
    """What was found; UserError where other processes have written elsewhere."""
    if found is None:
        raise UserError(f"{desk.folder} lacks answers of other processes: they must all see the same --store")
    return found


def _lines_text(lines: Mapping[str, Line]) -> str:
    head = ("", "accuracy", "95% interval", "class evaluations", "passes", "s/image", "undecided")
    calibrated = ("log-loss", "Brier", "ECE", "its floor")
    with_calibration = any(line.calibration is not None for line in lines.values())
    rows = [
        (
            name,
            f"{100 * line.accuracy:.2f}%",
            f"{100 * line.low:.2f} to {100 * line.high:.2f}",
            *(number(value) for value in (line.class_evaluations, line.evaluations, line.seconds)),
            f"{100 * line.undecided:.1f}%",
            *(_calibration_cells(line) if with_calibration else ()),
        )
        for name, line in lines.items()
    ]
    more = [
        f"{name}: ECE of the probability to be right by what the race cost {number(line.ece_by_cost)}"
        for name, line in lines.items()
        if line.ece_by_cost is not None
    ]
    for name, line in lines.items():
        if line.error_fit is not None:
            share, slope = 100 * line.error_fit.asymptote, 100 * line.error_fit.slope
            more.append(f"{name}: error(N) = {share:.2f}% + {slope:.1f}% / N pairs")
    return "\n".join([table([head + (calibrated if with_calibration else ()), *rows]), *more])


def _calibration_cells(line: Line) -> tuple[str, ...]:
    if line.calibration is None:
        return ("-",) * 4
    found = line.calibration
    return tuple(number(value) for value in (found.nll, found.brier, found.ece, found.floor))


def _contrasts_text(contrasts: Sequence[Contrast]) -> str:
    lines = []
    for found in contrasts:
        gain = " to ".join(f"{100 * value:+.2f}" for value in (found.gain.low, found.gain.high))
        lines.append(
            f"{found.second} against {found.first}: {100 * found.gain.mean:+.2f} points ({gain}); "
            f"only one right: {found.test.only_second} and {found.test.only_first} images, "
            f"p = {number(found.test.p)} (McNemar)"
        )
    return "\n".join(lines)


# -- ablate --------------------------------------------------------------------------------------------------


@click.command("ablate")
@_common
@_calibrate_option(f"0; {HELD_OUT} for exact Bayes")
@click.option("--technique", "only", metavar="NAME", multiple=True, help="Only those whose name holds this.")
@click.pass_obj
def ablate(
    session: Session,
    path: Path,
    only: tuple[str, ...],
    split: str,
    limit: int | None,
    pairs: int | None,
    overrides: tuple[str, ...],
    calibrate: int | None,
    seed: int,
    store: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """What each technique costs and what it is worth, against independent levels and no class given up.

    Writes ablate.json into the folder of answers.
    """
    from cdm_core.files import to_json, write_bytes
    from cdm_plugins_zeroshot import evaluation

    desk, place = _open(session, path, store, None, **options)
    images, labels = _labelled(desk, split, limit, seed)
    stages = choose("stages", overrides, pairs=pairs, seed=seed, base=_own(desk.run))
    methods = evaluation.techniques(stages)
    bayes = choose("bayes", overrides, seed=seed)
    if desk.allows(bayes) is None:
        methods["exact Bayes"] = bayes
    methods = _narrowed(methods, only)
    outcomes = _all(desk, place, methods, images, calibrate, seed, quiet=as_json)
    if outcomes is None:
        return
    lines = {name: evaluation.line(outcome, labels) for name, outcome in outcomes.items()}
    base = next(iter(outcomes))
    against = {
        name: evaluation.contrast({base: outcomes[base], name: outcome}, labels, seed=seed)[0]
        for name, outcome in outcomes.items()
        if name != base
    }
    found = {
        "run": str(path),
        "step": desk.run.step,
        "split": split,
        "seed": seed,
        "techniques": {
            name: {
                **methods[name].settings(),
                **line.to_dict(),
                "cheaper": lines[base].class_evaluations / line.evaluations,
                **({"against_first": against[name].to_dict()} if name in against else {}),
            }
            for name, line in lines.items()
        },
    }
    write_bytes(desk.folder / "ablate.json", to_json(found).encode())
    if as_json:
        show_json({**found, "out": str(desk.folder)})
        return
    click.echo(f"{split} split, {len(images)} images, seed {seed}")
    click.echo(_ablation_text(lines, against))
    click.echo(f"wrote {desk.folder / 'ablate.json'}")


def _narrowed(methods: dict[str, Method], only: Sequence[str]) -> dict[str, Method]:
    """The first, and those whose names hold one of the words; all without any words."""
    for word in only:
        if not any(word in name for name in methods):
            raise UserError(f"--technique {word!r} is in no name: choose of {', '.join(methods)}")
    first = next(iter(methods))
    return {n: m for n, m in methods.items() if not only or n == first or any(word in n for word in only)}


def _ablation_text(lines: Mapping[str, Line], against: Mapping[str, Contrast]) -> str:
    base = next(iter(lines))
    head = (
        "",
        "accuracy",
        "95% interval",
        "class evaluations",
        "passes",
        "cheaper",
        "s/image",
        "McNemar's p",
    )
    rows = []
    for name, line in lines.items():
        rows.append(
            (
                name,
                f"{100 * line.accuracy:.2f}%",
                f"{100 * line.low:.2f} to {100 * line.high:.2f}",
                number(line.class_evaluations),
                number(line.evaluations),
                f"{lines[base].class_evaluations / line.evaluations:.2f}x",
                number(line.seconds),
                number(against[name].test.p) if name in against else "-",
            )
        )
    return table([head, *rows])


# -- ood -----------------------------------------------------------------------------------------------------


@click.command("ood")
@_common
@click.option("--against", metavar="DATA", help="A data set whose images do not belong, by name.")
@click.option("--input", "source", type=click.Path(path_type=Path), help="Or a folder of them, or an .npz.")
@click.option(
    "--score",
    "names",
    type=click.Choice(["gap", "bound", "density", "corrected"]),
    multiple=True,
    help="May be given several times  [default: all but bound that the run allows]",
)
@click.pass_obj
def ood(
    session: Session,
    path: Path,
    against: str | None,
    source: Path | None,
    names: tuple[str, ...],
    split: str,
    limit: int | None,
    pairs: int | None,
    overrides: tuple[str, ...],
    seed: int,
    store: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """How well a run tells its own images from others: AUROC and the false positives at 95%.

    Writes ood.json into the folder of answers.
    """
    from cdm_core.files import to_json, write_bytes
    from cdm_plugins_zeroshot import ood as detecting
    from cdm_plugins_zeroshot.answers import of_path, of_split

    if (against is None) == (source is None):
        raise UserError("name images that do not belong: --against DATA, or --input FOLDER, one of them")
    desk, place = _open(session, path, store, None, **options)
    inside = of_split(desk.run, split, limit=limit, seed=seed)
    if source is not None:
        outside = of_path(desk.run, source, limit=limit, seed=seed)
    else:
        outside = of_split(detecting.on_data(desk.run, str(against)), split, limit=limit, seed=seed)
    flat = choose("flat", overrides, pairs=pairs, seed=seed, base=_own(desk.run))
    chosen = _scores_of(desk, names, flat, choose("bayes", overrides, seed=seed))
    sides = {"own": inside, "other": outside}
    for (name, method), (label, images) in product(chosen.items(), sides.items()):
        null = detecting.needs_null(name)
        _ask(desk, method, images, f"{name}, {label} images", quiet=as_json or not place.main, null=null)
    if not _wait(place):
        return
    found = {name: _detected(desk, name, method, list(sides.values())) for name, method in chosen.items()}
    counts = {"own": len(inside), "other": len(outside)}
    values = {
        "run": str(path),
        "step": desk.run.step,
        "split": split,
        "against": against or str(source),
        "seed": seed,
        **counts,
        "scores": {name: {**chosen[name].settings(), **one._asdict()} for name, one in found.items()},
    }
    write_bytes(desk.folder / "ood.json", to_json(values).encode())
    if as_json:
        show_json({**values, "out": str(desk.folder)})
        return
    click.echo(f"{split} split, {counts['own']} images, against {counts['other']} of {against or source}")
    click.echo(_ood_text(found))
    click.echo(f"wrote {desk.folder / 'ood.json'}")


def _detected(desk: Desk, name: str, method: Method, sides: Sequence[Images]) -> Detection:
    """How well a score tells the images of the first side from those of the second."""
    from cdm_plugins_zeroshot import ood as detecting

    null = detecting.needs_null(name)
    answers = [_there(desk.rows(method, images, null=null), desk) for images in sides]
    inside, outside = (
        detecting.score_of(name, desk, method, images, rows)
        for images, rows in zip(sides, answers, strict=True)
    )
    return detecting.detection(inside, outside)


def _ood_text(found: Mapping[str, Detection]) -> str:
    rows = [
        (name, f"{one.auroc:.4f}", f"± {number(one.auroc_se)}", f"{100 * one.fpr95:.2f}%")
        for name, one in found.items()
    ]
    return table([("", "AUROC", "standard error", "false positives at 95%"), *rows])


def _scores_of(desk: Desk, names: Sequence[str], flat: Method, bayes: Method) -> dict[str, Method]:
    """The methods of the scores asked for, or of all but `bound` that the run allows."""
    from cdm_plugins_zeroshot import ood as detecting

    methods = {name: detecting.method_of(name, flat, bayes) for name in names or detecting.SCORES}
    reasons = {name: detecting.allows(desk, name, method) for name, method in methods.items()}
    if not names:
        methods = {n: m for n, m in methods.items() if reasons[n] is None and n != "bound"}
        if not methods:
            raise UserError("; ".join(dict.fromkeys(reason for reason in reasons.values() if reason)))
        return methods
    wrong = [reason for reason in reasons.values() if reason]
    if wrong:
        raise UserError(wrong[0])
    return methods
