"""What the commands share: the session behind `ctx.obj`, and options that mean the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cdm_core.errors import UserError

if TYPE_CHECKING:
    from cdm_core.manager import Registry

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Session:
    """What `cdm-run [--plugin NAME]... [--no-plugins]` was told; commands get it by `@click.pass_obj`."""

    plugins: tuple[str, ...] = ()
    no_plugins: bool = False

    @cached_property
    def registry(self) -> Registry:
        """Every installed plugin, loaded on first use; `UserError` when a `--plugin` is not among them."""
        from cdm_core.manager import load_registry

        registry = load_registry(self.no_plugins)
        for name in self.plugins:
            registry.ask_for(name)
        return registry


def json_option(function: F) -> F:
    """`--json`, passed as `as_json: bool`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")(
        function
    )


def device_option(function: F) -> F:
    """`--device auto|cpu|cuda`, passed as `device: str`; hand it to `pick_device`."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where to compute; auto takes a GPU where there is one.",
    )(function)


def seed_option(default: int | None = 0) -> Callable[[F], F]:
    """`--seed S`, passed as `seed: int` (or None where `default` is None: the configuration's seed)."""
    return click.option(
        "--seed", type=click.IntRange(min=0), default=default, show_default=True, help="Seed of every draw."
    )


def pick_device(name: str) -> str:
    """The torch device behind `auto`, `cpu` or `cuda`; `UserError` when there is no GPU for `cuda`."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    if name == "auto":
        return "cuda" if available else "cpu"
    return name
