"""A guide's settings found by searching, and what each of its parts is worth.

`tune` searches over beta of the Softplus, tau2 and the scale, in two stages. The first is cheap: on some
hundred predicted x0 of held-out images, the calibration of softmax(tau2 f) for every (beta, tau2), of which
those of least integral ECE go on (of equals, that of the larger margin). The scale has no part in it. The
second samples some hundred images for every one of these at every scale, all from the same noise, and asks a
classifier that had no part in the sampling (`compare.Judge`). Best is the least Fréchet distance among those
whose target rate is at least the wanted one. The least of many noisy figures is too good to be true: the best
is sampled again, as the run's own settings are, from noise that chose nothing.

`ablate` takes one part out at a time: the look at x0, Softplus, tau2, the sine. Differences are of samples
from the same noise, standard errors over seeds.

Both keep what they find in a JSON file as they find it, and go on from there when asked again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cdm_core.errors import UserError
from cdm_core.files import to_json, write_bytes
from cdm_core.runs import Run, RunFolder
from cdm_plugins_guidance.adapter_configs import GuidedConfig
from cdm_plugins_guidance.calibration import calibrate, smoothed_guide
from cdm_plugins_guidance.compare import (
    GUIDED,
    UNGUIDED,
    Judge,
    Progress,
    Row,
    check_judge,
    check_num,
    guide_settings,
    sampled,
    sampling_of,
    unguided,
    with_guide,
)

PUBLISHED = (math.inf, 3.0, 5.0)  # beta: ReLU, EluCD's on DDPM, on EDM
COLUMNS = ("target_rate", "confidence", "frechet", "precision", "recall")


class Ledger:
    """Findings in a JSON file, by table and key; what is there is not computed again.

    settings: what they all depend on. UserError where the file is of other settings, or damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = self._read() if path.is_file() else {"settings": _json(settings)}
        self._compare(self.content["settings"], _json(settings))

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(content["settings"], dict):
                raise ValueError("its settings are none")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(error) from error
        return content

    def damaged(self, what: object) -> UserError:
        """The error to raise over something that the file should not hold."""
        return UserError(f"{self.path} is damaged ({what}): delete it, or give another --out")

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if different:
            raise UserError(
                f"{self.path} was found with another {', '.join(different)}: delete it, or give another --out"
            )

    def find(self, table: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The entry of a table that has all of `key`; None where there is none."""
        entries = self.content.get(table, [])
        wanted = _json(key)
        if not isinstance(entries, list):
            raise self.damaged(f"its {table} are no list")
        if not all(isinstance(entry, dict) and wanted.keys() <= entry.keys() for entry in entries):
            raise self.damaged(f"one of its {table} lacks {', '.join(wanted)}")
        return next((e for e in entries if all(e[name] == wanted[name] for name in wanted)), None)

    def once(
        self, table: str, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The entry of a table with `key`, computed and written down where there is none yet."""
        entry = self.find(table, key)
        if entry is None:
            entry = _json({**key, **compute()})
            self.content.setdefault(table, []).append(entry)
            self.write()
        return entry

    def write(self, **conclusions: Any) -> None:
        """Write the file, with conclusions beside the tables."""
        self.content |= _json(conclusions)
        write_bytes(self.path, to_json(self.content).encode())


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they will be read: what is not finite is null."""
    plain: dict[str, Any] = json.loads(to_json(dict(values)))
    return plain


def row_of(entry: Mapping[str, Any]) -> Row:
    """The `Row` that an entry holds."""
    values = {field.name: entry[field.name] for field in fields(Row)}
    return Row(**values | {"frechet": math.inf if values["frechet"] is None else values["frechet"]})


def settings_of(run: Run, judge: Run, **given: Any) -> dict[str, Any]:
    """What figures of samples depend on. given: also which weights and data the run was opened with."""
    places = {name: str(r.path and r.path.resolve()) for name, r in (("run", run), ("judge", judge))}
    steps = {"step": run.step, "judge_step": judge.step, "guide_steps": guide_steps(guide_settings(run))}
    return {**places, **steps, "sampling": sampling_of(run), **given}


def guide_steps(config: GuidedConfig) -> dict[str, int | None]:
    """Steps that the guides which are runs (`run:PATH`) have been trained for; None of converted files."""
    names = [term.classifier.name for term in (config, *config.others)]
    paths = [Path(name.removeprefix("run:")).resolve() for name in names if name.startswith("run:")]
    newest = {str(path): RunFolder(path).latest() if path.is_dir() else None for path in paths}
    return {path: None if found is None else found.step for path, found in newest.items()}


@dataclass(frozen=True)
class _Bench:
    """Samples `num` images and has them judged, each way of sampling once."""

    ledger: Ledger
    court: Judge
    num: int
    progress: Progress | None

    def row(
        self,
        table: str,
        key: Mapping[str, Any],
        run: Run,
        seed: int,
        *,
        name: str,
        title: str,
        labels: Any = None,
    ) -> Row:
        """The row `name` with `key` in a table; title: what progress calls it."""

        def compute() -> dict[str, Any]:
            row, _ = sampled(self.court, title, run, self.num, seed, labels=labels, progress=self.progress)
            return asdict(replace(row, name=name))

        entry = self.ledger.once(table, key, compute)
        try:
            found = row_of(entry)
        except KeyError as error:
            raise self.ledger.damaged(f"one of its {table} lacks {error}") from error
        if not all(isinstance(getattr(found, column), int | float) for column in COLUMNS):
            raise self.ledger.damaged(f"one of its {table} lacks figures")
        return found


# -- tune ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """The settings that `tune` searches over."""

    softplus: float  # beta; inf: ReLU
    tau2: float
    scale: float

    @classmethod
    def of(cls, config: GuidedConfig) -> Candidate:
        """Those of a guide as it is."""
        return cls(config.classifier.softplus, config.guide.second_tau, config.scale)

    def put(self, config: GuidedConfig) -> GuidedConfig:
        """A guide's settings with these in their place."""
        classifier = replace(config.classifier, softplus=self.softplus)
        guide = config.guide
        if guide.second_tau != self.tau2:
            guide = replace(guide, tau2=self.tau2, discount=None)
        return replace(config, scale=self.scale, classifier=classifier, guide=guide)

    def flags(self, config: GuidedConfig) -> list[str]:
        """`--set KEY=VALUE` of all that differs from a guide's settings."""
        new = self.put(config)
        pairs = [
            ("scale", config.scale, new.scale),
            ("classifier.softplus", config.classifier.softplus, new.classifier.softplus),
            ("guide.tau2", config.guide.tau2, new.guide.tau2),
            ("guide.discount", config.guide.discount, new.guide.discount),
        ]
        return [
            f"--set adapter.{key}={'none' if value is None else repr(value)}"
            for key, old, value in pairs
            if old != value
        ]

    def __str__(self) -> str:
        return f"softplus {self.softplus:g}, tau2 {self.tau2:g}, scale {self.scale:g}"


@dataclass(frozen=True)
class Search:
    """What `tune` looks through. Empty: `softplus`, ReLU, 3, 5 and the run's own; `tau2`, 0, 1/2, 1 and the
    run's own; `scale`, the run's own times 1/2, 1, 2 and 4.
    """

    softplus: tuple[float, ...] = ()
    tau2: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    keep: int = 3  # pairs (softplus, tau2) that the first stage lets through
    rate: float = 0.9  # wanted share of samples that the judge takes for the class asked for
    num: int = 256  # images sampled for a candidate
    predicted: int = 256  # held-out images of the first stage,
    levels: int = 6  # each predicted at so many noise levels
    bins: int = 15

    def check(self) -> None:
        """Raise `UserError` on a value out of range."""
        if any(not beta > 0 for beta in self.softplus):
            raise UserError("--softplus must be above 0 (inf: ReLU)")
        if any(not 0 <= tau < math.inf for tau in self.tau2):
            raise UserError("--tau2 must be finite and at least 0")
        if any(not math.isfinite(scale) or scale == 0 for scale in self.scale):
            raise UserError("--scale must be finite and not 0")
        if self.keep < 1 or not 0 <= self.rate <= 1:
            raise UserError(
                f"--keep must be at least 1 and --rate in [0, 1], not {self.keep} and {self.rate}"
            )
        check_num(self.num)

    def around(self, own: Candidate) -> Search:
        """With what is empty filled."""
        if own.scale == 0 and not self.scale:
            raise UserError("the run's own scale of guidance is 0: say which --scale to try")
        return replace(
            self,
            softplus=_distinct(self.softplus or (own.softplus, *PUBLISHED)),
            tau2=_distinct(self.tau2 or (own.tau2, 0.0, 0.5, 1.0)),
            scale=_distinct(self.scale or tuple(own.scale * factor for factor in (0.5, 1.0, 2.0, 4.0))),
        )


@dataclass(frozen=True)
class Tuned:
    """What `tune` found. reached: the best has the wanted rate, else it is the one of the highest rate.

    candidates: the run's own settings first. flags: what to add to the flags that gave those. confirmed: rows
    of the run's own settings and, where it is another, of the best, from other noise. left_out: betas of
    Softplus, as text, that cannot be had, and why.
    """

    candidates: tuple[tuple[Candidate, Row], ...]
    best: Candidate
    reached: bool
    flags: tuple[str, ...]
    confirmed: tuple[Row, ...]
    left_out: Mapping[str, str]


def tune(
    run: Run,
    judge: Run,
    search: Search,
    path: Path,
    *,
    split: str = "valid",
    seed: int = 0,
    weights: str = "ema",
    data: str | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Search for the settings of the run's first guide, keeping everything in the JSON file `path`.

    split: the images that the first stage predicts and the judge compares with; not those of a later report.
    Image i of every candidate comes from the same noise (seed, i). A second call samples what is new only.
    weights, data: what the run was opened with (`load_run`): findings of others are not gone on from.
    """
    check_judge(run, judge)
    search.check()
    config = guide_settings(run)
    own, asked = Candidate.of(config), search.softplus
    search = search.around(own)
    stated = {key: getattr(search, key) for key in ("num", "predicted", "levels", "bins")}
    opened = {"weights": weights, "data": data}
    ledger = Ledger(path, settings_of(run, judge, split=split, seed=seed, **opened, **stated))
    betas, left_out = _possible(run, search.softplus, must=asked)
    pairs = _proxies(run, replace(search, softplus=betas), ledger, split, seed, progress)
    bench = _Bench(ledger, Judge(judge, split, search.num), search.num, progress)

    def row(table: str, candidate: Candidate, seed: int, title: str) -> Row:
        other = with_guide(run, candidate.put(config))
        return bench.row(table, asdict(candidate), other, seed, name=str(candidate), title=title)

    tried = [Candidate(*pair, scale) for pair, scale in product(pairs[: search.keep], search.scale)]
    tried = list(dict.fromkeys([own, *tried]))
    rows = [
        row("candidates", candidate, seed, f"candidate {number} of {len(tried)}: {candidate}")
        for number, candidate in enumerate(tried, 1)
    ]
    best, reached = best_of(tried, rows, search.rate)
    again = [row("confirmed", c, seed + 1, f"again: {c}") for c in dict.fromkeys([own, best])]
    flags = tuple(best.flags(config))
    conclusion = {"best": asdict(best), "rate": search.rate, "reached": reached, "flags": flags}
    ledger.write(**conclusion, left_out=left_out)
    return Tuned(tuple(zip(tried, rows, strict=True)), best, reached, flags, tuple(again), left_out)


def _possible(
    run: Run, betas: Sequence[float], must: Sequence[float]
) -> tuple[tuple[float, ...], dict[str, str]]:
    """Those of `betas` that the guide's classifier can have, and why not the others; error if in `must`."""
    possible, left_out = [], {}
    for beta in betas:
        try:
            smoothed_guide(run, beta)
            possible.append(beta)
        except UserError as error:
            if beta in must or beta == guide_settings(run).classifier.softplus:
                raise
            left_out[f"{beta:g}"] = str(error)
    return tuple(possible), left_out


def _proxies(
    run: Run, search: Search, ledger: Ledger, split: str, seed: int, progress: Progress | None
) -> list[tuple[float, float]]:
    """The first stage: (softplus, tau2) in order of rising integral ECE."""
    pairs = list(product(search.softplus, search.tau2))
    missing = [p for p in pairs if ledger.find("proxies", {"softplus": p[0], "tau2": p[1]}) is None]
    look = guide_settings(run).look
    if missing:
        curves = calibrate(
            run,
            looks=["x0" if look == "x0-through" else look],
            softplus=_distinct([beta for beta, _ in missing]),
            taus=_distinct([tau for _, tau in missing]),
            split=split,
            num=search.predicted,
            levels=search.levels,
            bins=search.bins,
            seed=seed,
            progress=progress,
        )
        for curve in curves:
            figures = {key: curve.mean(key) for key in ("accuracy", "confidence", "margin", "floor")}
            figures["integral_ece"] = curve.integral_ece
            ledger.once("proxies", {"softplus": curve.softplus, "tau2": curve.tau}, partial(dict, figures))
    order = {pair: _rank(ledger, *pair) for pair in pairs}
    return sorted(pairs, key=order.__getitem__)


def _rank(ledger: Ledger, softplus: float, tau2: float) -> tuple[float, float]:
    """What a pair of the first stage is sorted by; UserError where it is no number."""
    entry = ledger.find("proxies", {"softplus": softplus, "tau2": tau2}) or {}
    figures = entry.get("integral_ece"), entry.get("margin")
    for name, value in zip(("integral_ece", "margin"), figures, strict=True):
        if not isinstance(value, int | float):
            raise UserError(
                f"{ledger.path}: {name} of softplus {softplus:g}, tau2 {tau2:g} is no number: the guide's "
                "logits are not finite there, or the file is damaged; leave the pair out, or delete the file"
            )
    return entry["integral_ece"], -entry["margin"]


def best_of(candidates: Sequence[Candidate], rows: Sequence[Row], rate: float) -> tuple[Candidate, bool]:
    """The least Fréchet distance of those with the rate, True; without any, the highest rate, False."""
    pairs = list(zip(candidates, rows, strict=True))
    able = [pair for pair in pairs if (pair[1].target_rate or 0.0) >= rate and math.isfinite(pair[1].frechet)]
    if able:
        return min(able, key=lambda pair: pair[1].frechet)[0], True
    return max(pairs, key=lambda pair: (pair[1].target_rate or 0.0, -pair[1].frechet))[0], False


def _distinct(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(dict.fromkeys(values))


# -- ablate --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """One way of sampling over all seeds, by column; errors are standard errors, None of a single seed.

    delta: its mean minus that of the whole guide, seed by seed.
    """

    name: str
    mean: Mapping[str, float]
    error: Mapping[str, float | None]
    delta: Mapping[str, float]
    delta_error: Mapping[str, float | None]


def parts(config: GuidedConfig) -> tuple[dict[str, GuidedConfig], dict[str, str]]:
    """A guide without one of its parts each, by the part's name; and why a part cannot be taken out."""
    without: dict[str, GuidedConfig] = {}
    absent: dict[str, str] = {}
    if config.look in ("x0", "x0-through"):
        without["look"] = replace(config, look="rms")
    else:
        absent["look"] = f"the guide looks at {config.look} already"
    if config.classifier.softplus < math.inf:
        without["softplus"] = replace(config, classifier=replace(config.classifier, softplus=math.inf))
    else:
        absent["softplus"] = "the classifier has its ReLUs already"
    if config.guide.second_tau != 1:
        without["tau2"] = replace(config, guide=replace(config.guide, tau2=1.0, discount=None))
    else:
        absent["tau2"] = "tau2 is 1 already"
    if config.gamma:
        without["sine"] = replace(config, gamma=0.0)
    elif config.schedule == "linear-sine" and config.sine:
        without["sine"] = replace(config, sine=0.0)
    elif config.schedule == "sine":
        without["sine"] = replace(config, schedule="constant")
    else:
        absent["sine"] = "there is no sine already"
    return without, absent


def ablate(
    run: Run,
    judge: Run,
    path: Path,
    *,
    split: str = "test",
    num: int = 256,
    seeds: int = 3,
    seed: int = 0,
    weights: str = "ema",
    data: str | None = None,
    progress: Progress | None = None,
) -> tuple[list[Effect], dict[str, str]]:
    """The run unguided, guided, and without each part of its first guide, on `seeds` seeds from `seed` on.

    Returns the effects and the parts that there is nothing of to take out, with the reason. Everything is
    kept in the JSON file `path`; a second call samples what is new only. weights, data: as in `tune`.
    """
    check_judge(run, judge)
    check_num(num)
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: ask for at least 1")
    without, absent = parts(guide_settings(run))
    ledger = Ledger(path, settings_of(run, judge, split=split, num=num, weights=weights, data=data))
    bench = _Bench(ledger, Judge(judge, split, num), num, progress)
    ways: list[tuple[str, Run, Any]] = [(GUIDED, run, None), (UNGUIDED, *unguided(run))]
    ways += [(f"without {part}", with_guide(run, config), None) for part, config in without.items()]
    rows: dict[str, list[Row]] = {name: [] for name, _, _ in ways}
    for one in range(seed, seed + seeds):
        for name, source, labels in ways:
            key, title = {"name": name, "seed": one}, f"{name}, seed {one}"
            rows[name].append(bench.row("rows", key, source, one, name=name, title=title, labels=labels))
    effects = [effect(name, of, rows[GUIDED]) for name, of in rows.items()]
    ledger.write(seeds=[seed, seeds], effects=[asdict(e) for e in effects], absent=absent)
    return effects, absent


def effect(name: str, rows: Sequence[Row], whole: Sequence[Row]) -> Effect:
    """Means over seeds, and differences from the whole guide's rows of the same seeds."""
    values = {column: [getattr(row, column) for row in rows] for column in COLUMNS}
    deltas = {
        column: [value - getattr(row, column) for value, row in zip(values[column], whole, strict=True)]
        for column in COLUMNS
    }
    return Effect(
        name,
        {column: mean(numbers) for column, numbers in values.items()},
        {column: standard_error(numbers) for column, numbers in values.items()},
        {column: mean(numbers) for column, numbers in deltas.items()},
        {column: standard_error(numbers) for column, numbers in deltas.items()},
    )


def standard_error(numbers: Sequence[float]) -> float | None:
    """Of the mean of independent numbers; None of a single one, or where one is not finite."""
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return None
    return stdev(numbers) / math.sqrt(len(numbers))
