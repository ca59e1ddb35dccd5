"""The encoder alone against the whole U-Net on digits, at about the same seconds of training, in turn.

    python bench/digits_variants.py [--out bench/results/digits_variants.json]

Held-out bits/dim of both: as the classifier claims them in one pass, and as its sampler guarantees them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import about

import cdm_core
from cdm_core.config import resolve
from cdm_core.manager import load_registry
from cdm_core.training import train

VARIANTS = {
    "encoder": (1600, []),
    "U-Net": (520, ["model.decoder=true"]),
    "U-Net, 32 groups": (520, ["model.decoder=true", "model.norm_groups=32"]),
}


def measure(name: str, steps: int, changes: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train the digits recipe with `changes`; seconds, and both figures with their standard errors."""
    registry = load_registry()
    changes = [*changes, f"train.steps={steps}", "train.validate_every=9999", "train.checkpoint_every=9999"]
    config = resolve(registry, plugins=("cdm",), recipe="cdm/default", overrides=changes)
    run_folder = train(config, folder, registry=registry, device="cpu", quiet=True)
    seconds = max(line.get("seconds", 0.0) for line in run_folder.metrics())
    found = cdm_core.load_run(folder, device="cpu").evaluate("test", ["core/nll", "core/bound"])
    figures = {
        f"{words}{suffix}": found[metric][f"bits_per_dim{suffix}"]
        for metric, words in (("core/nll", "one_pass"), ("core/bound", "guaranteed"))
        for suffix in ("", "_se")
    }
    return {"variant": name, "steps": steps, "seconds": seconds, **figures}


def main() -> None:
    """Measure every variant and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/digits_variants.json")
    options = parser.parse_args()
    rows = []
    for name in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, *VARIANTS[name], Path(folder) / "run"))
        print(rows[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
