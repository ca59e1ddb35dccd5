"""Core runtime of cdm-run: it knows no method; plugins teach it one each.

run = cdm_core.load_run("runs/digits")
images = run.sample(64, seed=0)
nats = run.log_density(images)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdm_core.errors import UserError
from cdm_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from cdm_core.runs import Run, load_run

__version__ = "0.1.0"
__all__ = ["Run", "UserError", "__version__", "hookimpl", "load_run"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `cdm-run --help` never imports torch.
    if name in ("Run", "load_run"):
        from cdm_core import runs

        return getattr(runs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
