"""Speed as a ratio: ours and what it replaces take turns in one process, and the median of their ratios
counts.

    pytest bench --benchmark-enable --benchmark-only [--save-ratios FILE | --check-ratios FILE]

Absolute times of a shared machine mean nothing, so a stored baseline is one of ratios (ours / baseline). Even
those differ from process to process where memory bounds them, so several runs of `--save-ratios` add up in
one file, which keeps the median and the worst; `--check-ratios` fails above the worst by more than a fifth.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import about, cores

from cdm_core.memory import keep_freed_memory

ALLOWED = 1.2  # times the worst stored ratio
ROUND = 4e-3  # seconds that a round of the faster variant lasts at least
ROUNDS = 15

_found: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ratios")
    group.addoption("--save-ratios", type=Path, help="Write every ratio to this JSON file.")
    group.addoption("--check-ratios", type=Path, help="Fail where a ratio is worse than in this JSON file.")


@pytest.fixture(autouse=True)
def _every_core() -> None:
    keep_freed_memory()  # else page faults are most of what is timed, and more of the baseline's
    torch.set_num_threads(cores())
    torch.manual_seed(0)


@pytest.fixture
def side_by_side(
    benchmark: Any, request: pytest.FixtureRequest
) -> Callable[[Callable[[], Any], Callable[[], Any]], float]:
    """`side_by_side(ours, baseline)`: both timed, in turns; returns and records ours / baseline.

    pytest-benchmark times ours; the baseline runs in the untimed set-up of every round.
    """

    def measure(ours: Callable[[], Any], baseline: Callable[[], Any]) -> float:
        ours(), baseline()  # the first call builds, allocates, plans
        inner = max(1, round(ROUND / _seconds(ours, 1)))
        mine, theirs = [], []

        def timed() -> None:
            mine.append(_seconds(ours, inner))

        benchmark.pedantic(timed, setup=lambda: theirs.append(_seconds(baseline, inner)), rounds=ROUNDS)
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        name = request.node.name.removeprefix("test_")
        _found[name] = {
            "ratio": round(ratio, 4),
            "microseconds": round(1e6 * statistics.median(mine), 1),
            "baseline microseconds": round(1e6 * statistics.median(theirs), 1),
        }
        benchmark.extra_info.update(_found[name])
        stored = request.config.getoption("--check-ratios")
        if stored:
            before = json.loads(stored.read_text())["rows"].get(name)
            assert before, f"{name} is not in {stored}: run `make bench`"
            assert ratio <= ALLOWED * before["worst"], (
                f"{name}: {ratio:.3f} of the baseline's time, at worst {before['worst']:.3f} before"
            )
        return ratio

    return measure


def _seconds(function: Callable[[], Any], inner: int) -> float:
    """Seconds a call, over `inner` calls."""
    start = time.perf_counter()
    for _ in range(inner):
        function()
    return (time.perf_counter() - start) / inner


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--save-ratios")
    if target and _found:
        target.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(target.read_text())["rows"] if target.exists() else {}
        rows = {name: _added(before.get(name), row) for name, row in sorted(_found.items())}
        target.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")


def _added(before: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the stored file with one more run in it."""
    ratios = sorted([*(before["runs"] if before else []), row["ratio"]])
    median = statistics.median(ratios)
    summary = {
        "speed-up": round(1 / median, 2),
        "ratio": round(median, 4),
        "worst": ratios[-1],
        "runs": ratios,
    }
    return summary | {name: value for name, value in row.items() if name != "ratio"}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _found:
        terminalreporter.section("times as fast as the baseline")
        width = max(map(len, _found))
        for name, row in sorted(_found.items()):
            terminalreporter.write_line(f"{name:{width}}  {1 / row['ratio']:6.2f}")
