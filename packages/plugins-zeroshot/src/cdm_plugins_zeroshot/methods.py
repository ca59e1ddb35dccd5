"""The ways to classify by their names, with all their settings; without torch.

`flat` asks every class about every (level, noise) pair; `race`, `stages` and `halving` give classes up on the
way; `bayes` asks a model that knows its densities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cdm_core.config import Merged, fill, parse_overrides, plain
from cdm_core.errors import UserError
from cdm_core.manager import did_you_mean
from cdm_plugins_zeroshot.bayes_configs import ExactBayesConfig
from cdm_plugins_zeroshot.zeroshot_configs import (
    OFFICIAL_STAGES,
    ClassifierConfig,
    EliminationConfig,
    EstimatorConfig,
)

RULES: dict[str, Literal["none", "stages", "halving", "race"]] = {
    "race": "race",
    "flat": "none",
    "stages": "stages",
    "halving": "halving",
}
NAMES = (*RULES, "bayes")
_OF_RULE = {"race": ("n_min", "alpha"), "halving": ("first",), "stages": ("stage_pairs", "stage_keep")}
TABLES = {"estimator": EstimatorConfig, "elimination": EliminationConfig, "bayes": ExactBayesConfig}


@dataclass(frozen=True)
class Method:
    """A name and its settings; those of the other kind mean nothing."""

    name: str
    estimator: EstimatorConfig
    elimination: EliminationConfig
    bayes: ExactBayesConfig

    @property
    def exact(self) -> bool:
        """Whether it asks for densities rather than for noise."""
        return self.name == "bayes"

    @property
    def needs_held_out(self) -> bool:
        """Whether it cannot answer before it has seen held-out images."""
        return self.exact and self.bayes.centre != "none"

    def settings(self) -> dict[str, Any]:
        """All that decides its raw answers, ready for JSON: not how many images share a batch, not what is
        fitted to answers afterwards."""
        if self.exact:
            return {"bayes": _without(plain(self.bayes), ("centre",))}
        others = [key for rule, keys in _OF_RULE.items() if rule != self.elimination.rule for key in keys]
        return {
            "estimator": _without(plain(self.estimator), ("in_flight",)),
            "elimination": _without(plain(self.elimination), others),
        }


def _without(values: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def default_name(base: ClassifierConfig | None) -> str:
    """The method of a run's own settings; `race` without any."""
    return "race" if base is None else next(n for n, rule in RULES.items() if rule == base.elimination.rule)


def choose(
    name: str,
    overrides: Sequence[str] = (),
    *,
    pairs: int | None = None,
    stages: str | None = None,
    seed: int = 0,
    base: ClassifierConfig | None = None,
) -> Method:
    """The method `name` with `estimator.design=grid`, `elimination.alpha=1e-4` or `bayes.draws=4`.

    pairs: of the estimator; stages: a data set of `OFFICIAL_STAGES`, whose pairs and stages are taken; base:
    the settings that the others change, but for the seed and what belongs to another rule. Method `stages`
    without any keeps five classes after a tenth of the pairs, and one at the end, as published for CIFAR-10.
    `UserError` on unknown keys, values out of range, or settings that contradict one another.
    """
    values = _tables(overrides)
    estimator, elimination = values["estimator"], values["elimination"]
    if "rule" in elimination:
        raise UserError("--set elimination.rule: say --method, which chooses the rule")
    if stages is not None:
        _official(name, stages, pairs, estimator, elimination)
    if pairs is not None:
        estimator["pairs"] = pairs
    if base is not None:
        _lay_under(name, base, estimator, elimination)
    for table in ("estimator", "bayes"):
        values[table].setdefault("seed", seed)
    elimination["rule"] = RULES.get(name, "none")
    if name == "stages" and "stage_pairs" not in elimination:
        total = estimator.get("pairs", EstimatorConfig.pairs)
        if isinstance(total, int):
            keep = [5, elimination.get("top_k", 1)]
            elimination |= {"stage_pairs": [max(1, total // 10), total], "stage_keep": keep}
    merged = Merged(values, dict.fromkeys(values, "--set"))
    filled = {table: fill(kind, values[table], table, merged) for table, kind in TABLES.items()}
    return Method(name, **filled)


def _lay_under(
    name: str, base: ClassifierConfig, estimator: dict[str, Any], elimination: dict[str, Any]
) -> None:
    """Add what `base` says to what is said already."""
    others = ["rule", *(key for rule, keys in _OF_RULE.items() if rule != RULES.get(name) for key in keys)]
    if "pairs" in estimator or "stage_pairs" in elimination:
        others += _OF_RULE["stages"]  # those of other pairs
    for values, own in (
        (estimator, _without(plain(base.estimator), ("seed",))),
        (elimination, _without(plain(base.elimination), others)),
    ):
        values |= {key: value for key, value in own.items() if key not in values and value not in ([], ())}


def _tables(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    given = parse_overrides(overrides)
    for table, value in given.items():
        if table not in TABLES or not isinstance(value, Mapping):
            raise UserError(
                f"--set {table}: settings begin with {', '.join(f'{t}.' for t in TABLES)}"
                f"{did_you_mean(table, list(TABLES))}"
            )
    return {table: dict(given.get(table, {})) for table in TABLES}


def _official(
    name: str, stages: str, pairs: int | None, estimator: dict[str, Any], elimination: dict[str, Any]
) -> None:
    if name != "stages":
        raise UserError(f"--stages belongs to --method stages, not to {name}")
    if stages not in OFFICIAL_STAGES:
        raise UserError(f"--stages {stages!r} is unknown{did_you_mean(stages, list(OFFICIAL_STAGES))}")
    if pairs is not None or "pairs" in estimator or {"stage_pairs", "stage_keep"} & set(elimination):
        raise UserError(f"--stages {stages} says how many pairs and when: give no other")
    counts, keep = OFFICIAL_STAGES[stages]
    estimator["pairs"] = counts[-1]
    elimination |= {"stage_pairs": list(counts), "stage_keep": list(keep)}


def varied(method: Method, **changes: Any) -> Method:
    """The method with some of its estimator's settings changed."""
    return replace(method, estimator=replace(method.estimator, **changes))
