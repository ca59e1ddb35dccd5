"""Is training in bfloat16 as good? The digits recipe in float32 and under bfloat16, seed by seed, in turns.

    python bench/precision.py [--seeds 3] [--steps 1600] [--out bench/results/precision.json]

Held-out bits/dim: as the classifier claims them in one pass, and as its sampler guarantees them. Both
precisions of a seed start from the same weights and see the same images, levels and noise, so their
difference is precision's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from digits_variants import measure
from machine import about

PRECISIONS = {"float32": "no", "bfloat16": "bf16"}


def main() -> None:
    """Train every pair and write rows, differences and their standard errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/precision.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for name, precision in PRECISIONS.items():
            with tempfile.TemporaryDirectory() as folder:
                changes = [f"train.precision={precision}", f"seed={seed}"]
                found = measure(name, options.steps, changes, Path(folder) / "run")
            rows.append({"seed": seed, **found})
            print(rows[-1], flush=True)
    differences = {}
    for figure in ("one_pass", "guaranteed"):
        by = {name: [row[figure] for row in rows if row["variant"] == name] for name in PRECISIONS}
        gaps = [b - a for a, b in zip(by["float32"], by["bfloat16"], strict=True)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
        differences[figure] = {"bfloat16 - float32": statistics.mean(gaps), "standard error": error}
    result = {"about": about(), "rows": rows, "differences": differences}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(differences, indent=1))


if __name__ == "__main__":
    main()
