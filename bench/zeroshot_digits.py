"""Exact Bayes by a CDM, and the Monte-Carlo classifier flat and raced, over seeds: accuracy, cost, intervals.

    python bench/zeroshot_digits.py --runs runs/cdm-{seed} runs/net-{seed} [--seeds 0 1 2]
    python bench/zeroshot_digits.py --runs runs/mnist-cdm runs/mnist-net --limit 1000 \\
        --out bench/results/zeroshot-mnist.json

The first run of a pair is a class-conditional model with densities, the second one of `zeroshot/context-unet`
(or any denoiser with labels). Runs are trained before; those of different seeds should have different
splits, `--set seed=S --set data.split_seed=S`, and for digits data.test_seed=S where the test images are to
differ as well. What is chosen, one noise level for exact Bayes (one pass a class) and its offsets, is chosen
on the validation split, and never on the test split.

Per seed: Wilson's interval and McNemar's test of the race against the flat estimator, on the same images;
over seeds the mean with Student's interval. Answers are kept in the runs' folders: a stopped call goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import about
from scipy.stats import t as student

from cdm_core.config import to_dict
from cdm_core.memory import keep_freed_memory
from cdm_core.metrics import wilson
from cdm_core.runs import Run, RunFolder, load_run
from cdm_plugins_zeroshot import evaluation
from cdm_plugins_zeroshot.answers import Desk, HeldOut, Images, Outcome, conclude, of_split
from cdm_plugins_zeroshot.methods import Method, choose

Rows = dict[str, dict[str, Any]]
BAYES, FLAT, RACE = "exact Bayes", "flat", "race"


class Bench:
    """One run: its answers, test images and held-out ones."""

    def __init__(self, path: Path, options: argparse.Namespace, limit: int | None) -> None:
        self.run: Run = load_run(path, device=options.device)
        self.desk = Desk(self.run, path / "zeroshot")
        self.test = of_split(self.run, "test", limit=limit)
        self.valid = of_split(self.run, "valid", limit=options.calibrate)
        self.path = path

    @property
    def data(self) -> dict[str, Any]:
        """Which images it was trained on."""
        assert self.run.config is not None
        found: dict[str, Any] = to_dict(self.run.config)["data"]
        return found

    def rows(self, method: Method, images: Images, label: str) -> list[dict[str, Any]]:
        """Answers, from the folder or found now."""
        print(f"{self.path.name}: {label}, {len(images)} images", flush=True)
        self.desk.answer(method, images)
        found = self.desk.rows(method, images)
        assert found is not None
        return found

    def outcome(self, method: Method, label: str, *, calibrated: bool) -> Outcome:
        """What a method says of the test images; calibrated: with held-out ones' offsets and temperature."""
        known = None
        if calibrated:
            known = HeldOut(self.rows(method, self.valid, f"{label}, held out"), self.valid.labels)
        return conclude(method, self.rows(method, self.test, label), known)


# -- exact Bayes ---------------------------------------------------------------------------------------------


def chosen_level(bench: Bench, sigmas: Sequence[float], base: Method) -> tuple[Method, dict[str, float]]:
    """Exact Bayes at the one level that explains held-out labels best, and every level's log-loss there.

    Two-fold: the offsets of each half are judged on the other.
    """
    labels, losses, methods = bench.valid.labels, {}, {}
    assert labels is not None
    half = np.arange(len(labels)) % 2 == 0
    for sigma in sigmas:
        method = replace(base, bayes=replace(base.bayes, sigmas=(sigma,)))
        rows = np.array(bench.rows(method, bench.valid, f"exact Bayes at {sigma:g}, held out"), dtype=object)
        total = 0.0
        for fold in (half, ~half):
            found = conclude(method, list(rows[fold]), HeldOut(list(rows[~fold]), labels[~fold]))
            assert found.probabilities is not None
            total -= float(np.log(found.probabilities[np.arange(int(fold.sum())), labels[fold]]).sum())
        losses[f"{sigma:g}"], methods[f"{sigma:g}"] = total / len(labels), method
    return methods[min(losses, key=losses.__getitem__)], losses


# -- one seed ------------------------------------------------------------------------------------------------


def seed_rows(cdm: Bench, net: Bench, options: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """A row a classifier, and what was chosen and compared."""
    base = choose("bayes", options.set)
    bayes, losses = chosen_level(cdm, options.sigmas, base)
    flat = choose(FLAT, options.set, pairs=options.pairs)
    race = choose(RACE, options.set, pairs=options.pairs)
    outcomes = {
        BAYES: cdm.outcome(bayes, BAYES, calibrated=True),
        FLAT: net.outcome(flat, FLAT, calibrated=False),
        RACE: net.outcome(race, RACE, calibrated=False),
    }
    benches = {BAYES: cdm, FLAT: net, RACE: net}
    rows = {name: row_of(outcome, benches[name]) for name, outcome in outcomes.items()}
    labels = net.test.labels
    assert labels is not None
    (test,) = evaluation.contrast({name: outcomes[name] for name in (FLAT, RACE)}, labels)
    whole = options.pairs * len(outcomes[FLAT].scores[0])  # passes, had nothing been shared
    found = {
        "level": bayes.bayes.sigmas[0],
        "held-out log-loss by level": losses,
        "race against flat": test.to_dict(),
        "race's share of flat's passes": rows[RACE]["passes"] / rows[FLAT]["passes"],
        "race's share of whole passes": rows[RACE]["passes"] / whole,
    }
    return rows, found


def row_of(outcome: Outcome, bench: Bench) -> dict[str, Any]:
    """The figures of a method on the test images of its run."""
    labels = bench.test.labels
    assert labels is not None
    line = evaluation.line(outcome, labels)
    return {
        "images": line.n,
        "right": round(line.accuracy * line.n),
        "accuracy": line.accuracy,
        "low": line.low,
        "high": line.high,
        "passes": line.evaluations,
        "class evaluations": line.class_evaluations,
        "seconds": line.seconds,
        "undecided": line.undecided,
        "training seconds": training_seconds(bench),
        **({"log-loss": line.calibration.nll, "ECE": line.calibration.ece} if line.calibration else {}),
    }


def training_seconds(bench: Bench) -> float:
    """That its training took, as its log has it."""
    lines = RunFolder(bench.path).metrics()
    return max((line.get("seconds", 0.0) for line in lines), default=0.0)


# -- all of them ---------------------------------------------------------------------------------------------


def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracy with Student's 95% interval over seeds, Wilson's over all images, mean cost."""
    shares = np.array([row["accuracy"] for row in rows])
    right, images = (sum(row[name] for row in rows) for name in ("right", "images"))
    reach = math.nan
    if len(shares) > 1:
        reach = float(student.ppf(0.975, len(shares) - 1) * shares.std(ddof=1) / math.sqrt(len(shares)))
    low, high = wilson(right, images)
    return {
        "seeds": len(rows),
        "images": images,
        "accuracy": float(shares.mean()),
        "reach": None if math.isnan(reach) else reach,
        "pooled low": low,
        "pooled high": high,
        "passes": float(np.mean([row["passes"] for row in rows])),
        "seconds": float(np.mean([row["seconds"] for row in rows])),
    }


def markdown(summary: Rows, details: Sequence[dict[str, Any]]) -> str:
    """The table for a README."""
    lines = ["| | accuracy | 95% over all images | passes of the network an image | s an image |"]
    lines.append("|---|---|---|---|---|")
    for name, row in summary.items():
        spread = f" ± {100 * row['reach']:.2f}" if row["reach"] is not None else ""
        lines.append(
            f"| {name} | {100 * row['accuracy']:.2f}%{spread} | {100 * row['pooled low']:.2f} to "
            f"{100 * row['pooled high']:.2f} | {row['passes']:.1f} | {row['seconds']:.3g} |"
        )
    tests = ", ".join(f"{detail['race against flat']['p']:.2g}" for detail in details)
    ratios = ("race's share of flat's passes", "race's share of whole passes")
    of_flat, of_whole = (100 * float(np.mean([detail[key] for detail in details])) for key in ratios)
    lines += ["", f"Race against flat, McNemar's p by seed: {tests}."]
    lines.append(
        f"The race takes {of_flat:.1f}% of the flat estimator's passes, {of_whole:.1f}% of whole ones."
    )
    return "\n".join(lines)


def main() -> None:
    """Measure every seed and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs=2, required=True, metavar=("CDM", "NET"), help="{seed} is filled in.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="One is all without {seed}.")
    parser.add_argument("--pairs", type=int, default=100, help="(Level, noise) pairs, N.")
    parser.add_argument("--limit", type=int, help="Test images of the Monte-Carlo classifiers; default all.")
    parser.add_argument("--limit-bayes", type=int, help="Test images of exact Bayes; default all.")
    parser.add_argument("--calibrate", type=int, default=500, help="Held-out images at most.")
    parser.add_argument(
        "--sigmas", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3], help="Levels to choose one of."
    )
    parser.add_argument(
        "--set", action="append", default=[], help="estimator.design=grid, bayes.draws=4, ..."
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/zeroshot-digits.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    seeds = options.seeds if any("{seed}" in run for run in options.runs) else options.seeds[:1]
    by_seed, details, splits = [], [], []
    for seed in seeds:
        cdm, net = (Path(run.format(seed=seed)) for run in options.runs)
        benches = Bench(cdm, options, options.limit_bayes), Bench(net, options, options.limit)
        rows, found = seed_rows(*benches, options)
        by_seed.append(rows)
        details.append({"seed": seed, **found})
        splits.append([bench.data for bench in benches])
        summary = {name: over_seeds([rows[name] for rows in by_seed]) for name in by_seed[0]}
        result = {
            "about": about(),
            "pairs": options.pairs,
            "data": splits,
            "splits differ": len({json.dumps(one, sort_keys=True) for one in splits}) == len(splits),
            "summary": summary,
            "seeds": [
                {**detail, "rows": rows} for detail, rows in zip(details, by_seed, strict=True)
            ],  # written as they come
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(summary, details))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
