"""`cdm-run train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cdm_core.commands.common import Session, device_option, json_option

if TYPE_CHECKING:
    from cdm_core.checkpoints import RunFolder
    from cdm_core.manager import Registry
    from cdm_core.settings import RunConfig


@click.command()
@click.option(
    "--recipe", metavar="NAME", help="Start from this recipe; else `default` of the first --plugin."
)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file of settings, over the recipe's; a run's config.toml will do.",
)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="One setting, over all others.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps: train.steps.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the step first: train.compile=auto.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of every draw.")
@device_option
@click.option(
    "--out", metavar="RUN", type=click.Path(path_type=Path), help="Run folder [default: runs/RECIPE]."
)
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and write nothing.")
@json_option
@click.pass_obj
def train(
    session: Session,
    recipe: str | None,
    config_file: Path | None,
    overrides: tuple[str, ...],
    steps: int | None,
    compiled: bool,
    seed: int | None,
    device: str,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a recipe; the same command again resumes.

    \b
    cdm-run --plugin NAME train                       NAME's default recipe, into runs/default
    cdm-run train --recipe R --set train.lr=1e-4      another learning rate
    torchrun --nproc-per-node 2 -m cdm_core train ... several processes, the same numbers
    """
    from cdm_core.config import resolve
    from cdm_core.training import is_main_process
    from cdm_core.training import train as run

    options = {"train.steps": steps, "train.compile": "auto" if compiled else None, "seed": seed}
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    config = resolve(
        session.registry,
        plugins=session.plugins,
        recipe=recipe,
        config_file=config_file,
        overrides=[*overrides, *given],
    )
    if dry_run:
        click.echo(plan(config, session.registry, as_json))
        return
    path = out or Path("runs") / (config.recipe.rpartition("/")[2] or "run")
    folder = run(config, path, registry=session.registry, device=device)
    if is_main_process():
        figures = summary(folder)
        click.echo(json.dumps(figures, indent=2) if as_json else table(figures))


def plan(config: RunConfig, registry: Registry, as_json: bool) -> str:
    """The resolved configuration, and what it makes: parameters, data."""
    from cdm_core.components import build
    from cdm_core.config import to_dict, to_toml

    parts = build(config, registry)
    parameters = sum(p.numel() for p in parts.model.parameters())
    shape = list(parts.data.info.shape)
    if as_json:
        return json.dumps({"config": to_dict(config), "parameters": parameters, "shape": shape}, indent=2)
    size = "x".join(map(str, shape))
    return f"{to_toml(config)}\n# {parameters:,} parameters; data {size}; nothing was written (--dry-run)"


def summary(folder: RunFolder) -> dict[str, Any]:
    """The last figures of a finished run; `train` and `valid` hold lines of metrics.jsonl."""
    last = {line["split"]: line for line in folder.metrics()}
    checkpoint, best = folder.latest(), folder.best()
    return {
        "run": str(folder.path),
        "step": checkpoint.step if checkpoint else 0,
        "seconds": checkpoint.manifest["seconds"] if checkpoint else 0.0,
        "best_step": best.step if best else None,
        **{split: {k: v for k, v in line.items() if k != "split"} for split, line in last.items()},
    }


def table(figures: dict[str, Any]) -> str:
    """`summary` for a person, with what to do next."""
    rows = [("steps", f"{figures['step']}"), ("seconds", f"{figures['seconds']:.1f}")]
    for split in ("train", "valid"):
        shown = {k: v for k, v in figures.get(split, {}).items() if k not in ("step", "seconds", "lr")}
        rows += [(f"{split} {name}", f"{value:.4g}") for name, value in shown.items()]
    if figures["best_step"] is not None:
        rows.append(("best by validation", f"step {figures['best_step']}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:{width}}  {value}" for name, value in rows]
    run = figures["run"]
    following = [f"cdm-run sample {run}", f"cdm-run evaluate {run}", f"cdm-run report {run}"]
    return "\n".join([run, *lines, "Next:", *(f"  {command}" for command in following)])
