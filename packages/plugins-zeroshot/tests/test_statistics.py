"""Tests and intervals against closed forms, and the published table of the re-implementation for MNIST."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from cdm_core.errors import UserError
from cdm_plugins_zeroshot import statistics
from cdm_plugins_zeroshot.statistics import fit_error, mcnemar, paired_bootstrap

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 3), (5, 5), (12, 4), (900, 1000)])
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    both = np.ones(20, dtype=bool)
    first = np.concatenate([both, np.ones(only_first, bool), np.zeros(only_second, bool), ~both])
    second = np.concatenate([both, np.zeros(only_first, bool), np.ones(only_second, bool), ~both])
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (only_first, only_second)
    different = only_first + only_second
    wanted = binomtest(only_first, different).pvalue if different else 1.0
    assert found.p == pytest.approx(wanted)


def test_the_bootstrap_of_a_mean_has_its_standard_error() -> None:
    first = RNG.normal(size=4000)
    second = first + 0.1 + 0.5 * RNG.normal(size=4000)  # paired: far surer than two means of std 1
    found = paired_bootstrap(first, second)
    error = (second - first).std(ddof=1) / math.sqrt(4000)
    assert found.mean == pytest.approx((second - first).mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert found.low < 0.1 < found.high


def test_the_bootstrap_depends_on_its_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = RNG.normal(size=(2, 50))
    assert paired_bootstrap(first, second, seed=1) == paired_bootstrap(first, second, seed=1)
    assert paired_bootstrap(first, second, seed=1) != paired_bootstrap(first, second, seed=2)
    whole = paired_bootstrap(first, second, seed=1)
    monkeypatch.setattr(statistics, "CHUNK", 50)  # one resample at a time
    assert paired_bootstrap(first, second, seed=1) == whole


def test_error_of_the_published_table() -> None:
    """Accuracies of 98.27, 98.98 and 99.23% at 20, 50 and 100 pairs: 0.54% + 23.9% / N to 0.02 points."""
    found = fit_error([20, 50, 100], [1.73, 1.02, 0.77])
    assert found.asymptote == pytest.approx(0.54, abs=0.005)
    assert found.slope == pytest.approx(23.9, abs=0.05)
    assert found.residual < 0.02
    assert found.at(200) == pytest.approx(0.655, abs=0.005)
    assert found.at(found.pairs_for(0.6)) == pytest.approx(0.6)
    assert found.pairs_for(0.5) == math.inf


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="same images on both sides, not 2 and 3"):
        mcnemar(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(UserError, match="not 0 and 0"):
        paired_bootstrap(np.zeros(0), np.zeros(0))
    for pairs, errors in (([5, 5], [1.0, 1.0]), ([1, 2], [1.0]), ([0, 2], [1.0, 1.0])):
        with pytest.raises(UserError, match="two or more numbers of pairs above 0"):
            fit_error(pairs, errors)
