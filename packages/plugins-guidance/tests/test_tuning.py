"""Tuning and ablation, where the answer is known: scale and tau2 are 1 for the exact noisy classifier."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from cdm_core.errors import UserError
from cdm_core.runs import Run
from cdm_plugins_guidance import tuning
from cdm_plugins_guidance.adapter_configs import CONFIGS
from cdm_plugins_guidance.compare import GUIDED, UNGUIDED, Row, guide_settings, with_guide
from cdm_plugins_guidance.tuning import (
    COLUMNS,
    Candidate,
    Ledger,
    Search,
    ablate,
    best_of,
    effect,
    parts,
    row_of,
    standard_error,
    tune,
)

Load = Callable[..., Run]
EXACT = ("adapter.name=guide", "adapter.look=x_t")
INF = math.inf


def elucd(network: str) -> tuple[str, ...]:
    """EluCD with a classifier that has ReLUs, all its parts in use."""
    classifier = (f"name={network}", "shape=[2,1,1]", "softplus=3")
    return ("adapter.name=elucd", *(f"adapter.classifier.{setting}" for setting in classifier))


def a_row(rate: float, frechet: float, name: str = "row") -> Row:
    return Row(name, rate, rate / 2, frechet, 0.9, 0.8, 0.01)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(num, seed) of every sampling from here on."""
    calls: list[tuple[int, int]] = []
    original = Run.sample

    def sample(self: Run, num: int, **given: Any) -> Any:
        calls.append((num, given["seed"]))
        return original(self, num, **given)

    monkeypatch.setattr(Run, "sample", sample)
    return calls


# -- the ledger


def test_findings_are_computed_once(tmp_path: Path) -> None:
    path, computed = tmp_path / "a" / "ledger.json", []

    def compute() -> dict[str, float]:
        computed.append(1)
        return {"value": INF}

    first = Ledger(path, {"num": 3, "beta": INF})
    key = {"softplus": INF, "tau2": 0.5}
    assert first.once("table", key, compute) == {"softplus": None, "tau2": 0.5, "value": None}
    again = Ledger(path, {"num": 3, "beta": INF})
    assert again.once("table", key, compute)["value"] is None
    assert again.find("table", {"softplus": 3.0, "tau2": 0.5}) is None
    assert again.find("other", key) is None
    assert len(computed) == 1
    again.write(best=[1])
    assert json.loads(path.read_text())["best"] == [1]


def test_a_ledger_of_other_settings_or_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    Ledger(path, {"num": 3, "seed": 0, "split": "valid"}).write()
    with pytest.raises(
        UserError, match="was found with another num, split: delete it, or give another --out"
    ):
        Ledger(path, {"num": 4, "seed": 0})
    for damaged in ("{", "[]", '{"settings": 3}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            Ledger(path, {})


@pytest.mark.parametrize("table", [3, {"a": 1}, [3], [{"tau2": 0.5}]])
def test_a_table_that_is_damaged_is_one_line(tmp_path: Path, table: object) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps({"settings": {}, "rows": table}))
    with pytest.raises(UserError, match=r"ledger.json is damaged \(.*rows.*\): delete it, or give another"):
        Ledger(path, {}).find("rows", {"softplus": 3.0, "tau2": 0.5})


def test_the_settings_name_the_step_of_every_guide(load: Load, runs: Path) -> None:
    """A guide that was trained further is another."""
    run = load("ring", "adapter.name=guide", f"adapter.classifier.name=run:{runs / 'known'}")
    found = tuning.settings_of(run, load("judge"), num=3)
    assert found["guide_steps"] == {str((runs / "known").resolve()): 10}
    assert (found["step"], found["judge_step"], found["num"]) == (10, 10, 3)
    config = guide_settings(load("ring", *EXACT))
    assert tuning.guide_steps(config) == {}
    converted = replace(config.classifier, name=f"run:{runs / 'a.safetensors'}")
    assert set(tuning.guide_steps(replace(config, classifier=converted)).values()) == {None}


def test_a_row_comes_back_from_json(tmp_path: Path) -> None:
    for row in (a_row(0.5, INF), Row("x", None, None, 1.0, 0.0, 1.0)):
        ledger = Ledger(tmp_path / f"{row.name}.json", {})
        assert row_of(ledger.once("rows", {"seed": 1}, lambda row=row: asdict(row))) == row


# -- candidates


@pytest.mark.parametrize("adapter", ["elucd", "elucd-edm", "guide"])
@pytest.mark.parametrize(
    "candidate", [Candidate(INF, 1.0, 2.5), Candidate(3.0, 0.5, 1e-05), Candidate(7.5, 0.0, -1.0)]
)
def test_flags_give_the_candidate(load: Load, adapter: str, candidate: Candidate) -> None:
    """Beside the run's own settings, whatever they are: `sample` with them samples what `tune` did."""
    config = guide_settings(load("ring", f"adapter.name={adapter}"))
    flags = [flag.removeprefix("--set ") for flag in candidate.flags(config)]
    again = guide_settings(load("ring", f"adapter.name={adapter}", *flags))
    assert again == candidate.put(config)
    assert Candidate.of(again) == candidate
    assert Candidate.of(config).flags(config) == []


def test_the_best_has_the_rate_and_then_the_least_distance() -> None:
    tried = [Candidate(INF, 1.0, s) for s in (1.0, 2.0, 3.0, 4.0)]
    rows = [a_row(0.5, 0.1), a_row(0.9, 0.4), a_row(0.95, 0.3), a_row(1.0, INF)]
    assert best_of(tried, rows, 0.9) == (tried[2], True)
    assert best_of(tried, rows, 0.5) == (tried[0], True)
    assert best_of(tried[:3], rows[:3], 0.99) == (tried[2], False)
    assert best_of(tried[:2], [a_row(0.7, 0.2), a_row(0.7, 0.1)], 0.9) == (tried[1], False)


def test_the_search_goes_around_the_run_s_own() -> None:
    found = Search().around(Candidate.of(CONFIGS["elucd"]()))
    assert (found.softplus, found.tau2, found.scale) == (
        (3.0, INF, 5.0),
        (0.5, 0.0, 1.0),
        (0.5, 1.0, 2.0, 4.0),
    )
    given = Search(softplus=(2.0, 2.0), tau2=(0.3,), scale=(7.0,)).around(Candidate(INF, 1.0, 0.0))
    assert (given.softplus, given.tau2, given.scale) == ((2.0,), (0.3,), (7.0,))
    with pytest.raises(UserError, match="own scale of guidance is 0"):
        Search().around(Candidate(INF, 1.0, 0.0))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"softplus": (0.0,)}, "--softplus must be above 0"),
        ({"tau2": (-1.0,)}, "--tau2 must be finite and at least 0"),
        ({"scale": (1.0, 0.0)}, "--scale must be finite and not 0"),
        ({"scale": (INF,)}, "--scale must be finite and not 0"),
        ({"keep": 0}, "--keep must be at least 1"),
        ({"rate": 1.5}, r"--rate in \[0, 1\]"),
        ({"num": 2}, "--num 2: a judge needs 5"),
    ],
)
def test_a_search_out_of_range_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Search(**given).check()


# -- tune


def test_tuning_finds_the_scale_that_samples_the_classes(
    load: Load, tmp_path: Path, draws: list[tuple[int, int]]
) -> None:
    """Guided exactly at scale 1: weaker misses the class, stronger leaves the distribution.

    A second call goes on: it samples the new scale alone.
    """
    run, judge, path = load("ring", *EXACT, "adapter.scale=6"), load("judge"), tmp_path / "tune.json"
    search = Search(
        softplus=(INF,), tau2=(0.0, 1.0, 3.0), scale=(0.1, 1.0), keep=1, rate=0.85, num=400, levels=4
    )
    found = tune(run, judge, search, path, seed=5)
    own, weak, exact = found.candidates
    assert own[0] == Candidate(INF, 1.0, 6.0)
    assert found.best == exact[0] == Candidate(INF, 1.0, 1.0)  # of tau2 the calibrated one, then the scale
    assert (found.reached, found.flags) == (True, ("--set adapter.scale=1.0",))
    assert weak[1].target_rate is not None
    assert weak[1].target_rate < 0.6
    assert own[1].frechet > 2 * exact[1].frechet
    assert [row.name for row in found.confirmed] == [str(own[0]), str(exact[0])]
    assert draws == [(400, 5)] * 3 + [(400, 6)] * 2

    kept = json.loads(path.read_text())
    errors = {entry["tau2"]: entry["integral_ece"] for entry in kept["proxies"]}
    assert errors[1.0] < errors[3.0] < errors[0.0]
    assert kept["best"] == {"softplus": None, "tau2": 1.0, "scale": 1.0}

    draws.clear()
    again = tune(run, judge, replace(search, scale=(0.1, 1.0, 2.0)), path, seed=5)
    assert [pair for pair in again.candidates if pair[0].scale != 2.0] == list(found.candidates)
    assert draws == [(400, 5)]
    with pytest.raises(UserError, match="was found with another num, seed"):
        tune(run, judge, replace(search, num=100), path, seed=6)


def test_figures_that_are_none_are_one_line(load: Load, tmp_path: Path) -> None:
    """The file was damaged, or the logits not finite; never a comparison of nothing with a number."""
    run, judge, path = load("ring", *EXACT), load("judge"), tmp_path / "tune.json"
    search = Search(softplus=(INF,), tau2=(1.0,), scale=(1.0,), num=8, levels=1, predicted=20)
    tune(run, judge, search, path)
    whole = json.loads(path.read_text())

    def damaged(table: str, **figures: object) -> None:
        entries = [{**entry, **figures} for entry in whole[table]]
        path.write_text(json.dumps({**whole, table: entries}))

    damaged("proxies", integral_ece=None)
    with pytest.raises(UserError, match="integral_ece of softplus inf, tau2 1 is no number"):
        tune(run, judge, search, path)
    damaged("candidates", precision=None)
    with pytest.raises(UserError, match=r"is damaged \(one of its candidates lacks figures\)"):
        tune(run, judge, search, path)
    for entry in whole["candidates"]:
        del entry["recall"]
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"is damaged \(one of its candidates lacks 'recall'\)"):
        tune(run, judge, search, path)


def test_no_candidate_with_the_rate_is_said(load: Load, tmp_path: Path) -> None:
    run = load("ring", *EXACT)
    search = Search(softplus=(INF,), tau2=(1.0,), scale=(0.1, 0.2), rate=1.0, num=60, levels=2)
    found = tune(run, load("judge"), search, tmp_path / "tune.json")
    assert not found.reached
    rates = {candidate: row.target_rate for candidate, row in found.candidates}
    assert found.best == max(rates, key=lambda candidate: rates[candidate] or 0)
    assert json.loads((tmp_path / "tune.json").read_text())["reached"] is False


def test_a_softplus_that_cannot_be_had_is_left_out_unless_asked_for(
    load: Load, runs: Path, tmp_path: Path
) -> None:
    """A run's classifier is used as it is: betas that are tried by default fall away, with the reason."""
    run = load("ring", *EXACT, f"adapter.classifier.name=run:{runs / 'known'}")
    search = Search(tau2=(1.0,), scale=(1.0,), num=20, levels=2, predicted=50)
    found = tune(run, load("judge"), search, tmp_path / "a.json")
    assert set(found.left_out) == {"3", "5"}
    assert "used as it is" in found.left_out["3"]
    with pytest.raises(UserError, match="used as it is"):
        tune(run, load("judge"), replace(search, softplus=(3.0,)), tmp_path / "b.json")


def test_softplus_is_searched_where_there_are_relus(load: Load, network_name: str, tmp_path: Path) -> None:
    run = load("ring", *elucd(network_name))
    search = Search(softplus=(INF, 0.5), tau2=(0.5,), scale=(1.0,), num=40, levels=3, keep=2)
    found = tune(run, load("judge"), search, tmp_path / "tune.json")
    tried = {candidate.softplus: row for candidate, row in found.candidates}
    assert next(iter(tried)) == 3.0  # the run's own
    assert set(tried) == {3.0, 0.5, INF}
    assert len({row.frechet for row in tried.values()}) == 3


# -- ablate


def test_the_parts_of_a_guide() -> None:
    whole = CONFIGS["elucd"]()
    without, absent = parts(whole)
    assert absent == {}
    assert {
        name: (c.look, c.classifier.softplus, c.guide.second_tau, c.gamma) for name, c in without.items()
    } == {
        "look": ("rms", 3.0, 0.5, 0.3),
        "softplus": ("x0", INF, 0.5, 0.3),
        "tau2": ("x0", 3.0, 1.0, 0.3),
        "sine": ("x0", 3.0, 0.5, 0.0),
    }
    for config in without.values():
        config.check()
    without, absent = parts(CONFIGS["elucd-edm"]())
    assert without["sine"].sine == 0
    assert absent == {"look": "the guide looks at rms already"}
    without, absent = parts(CONFIGS["guide"](schedule="sine"))
    assert without["sine"].schedule == "constant"
    assert set(absent) == {"softplus", "tau2"}
    assert set(parts(CONFIGS["guide"]())[1]) == {"softplus", "tau2", "sine"}


def test_effects_are_paired_by_seed() -> None:
    whole, less = [a_row(0.9, 1.0), a_row(0.7, 2.0)], [a_row(0.6, 1.5), a_row(0.3, 3.5)]
    found = effect("without look", less, whole)
    assert set(found.mean) == set(COLUMNS)
    assert found.mean["target_rate"] == pytest.approx(0.45)
    assert found.error["target_rate"] == pytest.approx(stdev([0.6, 0.3]) / math.sqrt(2))
    assert found.delta["frechet"] == pytest.approx(1.0)
    assert found.delta_error["frechet"] == pytest.approx(stdev([0.5, 1.5]) / math.sqrt(2))
    assert found.delta_error["precision"] == 0
    assert effect("x", less[:1], whole[:1]).error["frechet"] is None
    assert standard_error([1.0, INF]) is None


def test_the_ablation_of_elucd(
    load: Load, network_name: str, tmp_path: Path, draws: list[tuple[int, int]]
) -> None:
    """Every way on every seed, from the same noise; more seeds sample the new ones only."""
    run, judge, path = load("ring", *elucd(network_name)), load("judge"), tmp_path / "ablate.json"
    effects, absent = ablate(run, judge, path, num=200, seeds=2)
    names = [GUIDED, UNGUIDED, "without look", "without softplus", "without tau2", "without sine"]
    assert [e.name for e in effects] == names
    assert absent == {}
    by_name = {e.name: e for e in effects}
    assert set(by_name[GUIDED].delta.values()) == {0.0}
    assert by_name[UNGUIDED].mean["target_rate"] == pytest.approx(0.25, abs=0.1)
    assert by_name[UNGUIDED].delta["target_rate"] < -0.3
    assert all(e.delta["frechet"] != 0 for e in effects[1:])
    assert draws == [(200, 0)] * 6 + [(200, 1)] * 6

    config = guide_settings(run)
    kept = {(row["name"], row["seed"]): row for row in json.loads(path.read_text())["rows"]}
    direct = tuning.Judge(judge, "test", 200).row(
        "", with_guide(run, replace(config, gamma=0.0)).sample(200, seed=1), None
    )
    assert kept["without sine", 1]["frechet"] == pytest.approx(direct.frechet)

    draws.clear()
    more, _ = ablate(run, judge, path, num=200, seeds=3)
    assert draws == [(200, 2)] * 6
    assert more[1].error["frechet"] != effects[1].error["frechet"]


def test_parts_that_are_off_already_are_told(load: Load, tmp_path: Path) -> None:
    effects, absent = ablate(load("ring", *EXACT), load("judge"), tmp_path / "a.json", num=20, seeds=1)
    assert [e.name for e in effects] == [GUIDED, UNGUIDED]
    assert absent["look"] == "the guide looks at x_t already"
    assert set(absent) == {"look", "softplus", "tau2", "sine"}
    with pytest.raises(UserError, match="--seeds 0"):
        ablate(load("ring", *EXACT), load("judge"), tmp_path / "b.json", seeds=0)
