"""Metrics against analytic truth: the oracle's own data, copies to be caught, distances in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from cdm_core import UserError, baselines, hookimpl, metrics
from cdm_core.data import DataInfo
from cdm_core.data.base import Data, TensorSplit
from cdm_core.data.configs import DigitsConfig, GaussianMixtureConfig
from cdm_core.data.digits import load as digits
from cdm_core.data.mixture import load as mixture
from cdm_core.manager import Registry
from cdm_core.records import Metric
from cdm_core.runs import Run


class Exact(nn.Module):
    """The exact model of a data set that knows its mixture."""

    sigma_range = (0.01, 10.0)

    def __init__(self, data: Data, num_classes: int | None = None) -> None:
        super().__init__()
        self.mixture, self.num_classes, self.null_label = data.mixture, num_classes, num_classes

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        return self.mixture.denoise(x, sigma, y)

    def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        return self.mixture.log_density(x, y, sigma)


class Replays(nn.Module):
    """A "sampler" that gives back fixed images: `denoise` knows the answer."""

    sigma_range = (0.01, 10.0)
    capabilities = frozenset({"denoise"})

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        return self.images[torch.arange(len(x)) % len(self.images)]


def points(**options: Any) -> Run:
    options = {"components": 3, "train_points": 4000, "valid_points": 10, "test_points": 2000, **options}
    data = mixture(GaussianMixtureConfig(**options))
    return Run(Exact(data, options["components"]), data.info, data=data, registry=Registry.of({}))


def compute(name: str, run: Run) -> dict[str, float]:
    return run.evaluate("test", [name])[f"core/{name}"]


def test_nll_of_one_gaussian_is_its_entropy() -> None:
    found = compute("nll", points(components=1, std=0.3))
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.3))
    assert found["nats"] == pytest.approx(entropy, abs=4 * found["nats_se"])
    assert found["nats_se"] == pytest.approx(
        1 / math.sqrt(2000), rel=0.1
    )  # a chi-square of 2 degrees, halved
    assert found["bits_per_dim"] == pytest.approx(found["nats"] / (2 * math.log(2)), rel=1e-6)
    assert found["n"] == 2000


def test_bound_of_the_exact_denoiser_is_just_above_the_truth() -> None:
    run = points(std=0.2)
    found, truth = compute("bound", run), compute("nll", run)
    # Not the same images (the bound takes the first 1,024), nor without noise of its own.
    error = math.hypot(found["nats_per_dim_se"], truth["nats_per_dim_se"])
    assert found["n"] == 1024
    assert -4 * error < found["nats_per_dim"] - truth["nats_per_dim"] < 0.03 + 4 * error
    assert error < 0.05


def test_baselines_find_the_truth_where_they_can() -> None:
    found = compute("baselines", points(std=0.2))
    truth = found["truth_bits_per_dim"]
    assert found["gaussian_mixture_bits_per_dim"] == pytest.approx(truth, abs=0.03)
    assert found["gaussian_bits_per_dim"] > truth + 0.3  # three separate clusters are no Gaussian
    single = compute("baselines", points(components=1, std=0.3))
    # The ridge widens a variance of 0.09 by 1e-3 or so.
    assert single["gaussian_bits_per_dim"] == pytest.approx(single["truth_bits_per_dim"], abs=0.01)


def test_baselines_reach_the_known_figures_on_digits() -> None:
    data = digits(DigitsConfig())
    run = Run(Exact(data), data.info, data=data, registry=Registry.of({}))
    found = compute("baselines", run)
    assert 2.8 < found["gaussian_bits_per_dim"] < 3.1
    assert 2.5 < found["gaussian_mixture_bits_per_dim"] < 2.8
    assert found["gaussian_mixture_bits_per_dim"] < found["gaussian_bits_per_dim"]


def test_baselines_refuse_what_cannot_be_fitted() -> None:
    with pytest.raises(UserError, match="take too long"):
        baselines.check_size(1000, 3072)
    with pytest.raises(UserError, match="too few"):
        baselines.check_size(19, 4)


def faces(shown: Tensor, train: Tensor, test: Tensor, *, flip: bool = False) -> Run:
    """A run on grey 4x4 images whose samples are `shown`."""
    info = DataInfo("faces", (1, 4, 4), levels=256, flip=flip)
    data = Data(info, {"train": lambda: TensorSplit(train, None), "test": lambda: TensorSplit(test, None)})
    model = Replays((shown.float() + 0.5) * 2 / 256 - 1)
    return Run(model, info, data=data, registry=Registry.of({}))


def grey(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, 4, 4), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("flip", "copied"), [(False, "as they are"), (True, "mirrored")])
def test_nearest_neighbour_catches_copies(flip: bool, copied: str) -> None:
    train, test, new = grey(2500, 0), grey(300, 1), grey(64, 2)
    copies = train[-64:].flip(-1) if copied == "mirrored" else train[-64:]
    caught = compute("nearest-neighbour", faces(copies, train, test, flip=flip))
    assert caught["median_ratio"] == 0
    assert caught["share_closer"] == 1
    fresh = compute("nearest-neighbour", faces(new, train, test, flip=flip))
    assert fresh["median_ratio"] == pytest.approx(1, abs=0.05)
    assert fresh["share_closer"] < 0.1


def test_nearest_gives_distance_and_index() -> None:
    train = grey(3000, 0)
    run = faces(train[:1], train, train)
    queries = metrics.comparable(run, (train[[2047, 2048, 7]].float() + 0.9) * 2 / 256 - 1)
    distance, index = metrics.nearest(run, queries)
    assert index.tolist() == [2047, 2048, 7]
    assert torch.allclose(distance, torch.zeros(3), atol=1e-3)


def test_sliced_distance_of_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, 1, 1, generator=generator)
    shift = torch.tensor([0.3, -0.4, 1.2]).view(3, 1, 1)
    # The projections of a shift v onto random directions have mean square |v|^2 / d.
    wanted = float(shift.norm()) / math.sqrt(3)
    assert metrics.sliced_distance(x, x + shift) == pytest.approx(wanted, rel=0.1)
    assert metrics.sliced_distance(x, x) == 0


def test_sliced_wasserstein_of_the_truth_is_its_floor() -> None:
    found = compute("sliced-wasserstein", points())
    assert found["distance"] < 2 * found["floor"] + 0.02
    biased = points()
    biased.model.denoise = lambda x, sigma, y: biased.model.mixture.denoise(x - 0.3, sigma, y) + 0.3
    assert compute("sliced-wasserstein", biased)["distance"] > 0.2


def test_accuracy_by_bayes_rule() -> None:
    run = points(std=0.7)
    found = compute("accuracy", run)
    x0, y = run.examples("test")
    right = int((run.data.mixture.class_logits(x0, 0.0).argmax(1) == y).sum())  # type: ignore[union-attr]
    assert 0.5 < found["accuracy"] < 0.95  # overlapping classes: not trivial
    assert found["accuracy"] == right / 2000
    interval = binomtest(right, 2000).proportion_ci(method="wilson")
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), rel=1e-5)


@pytest.mark.parametrize("right", [0, 3, 10])
def test_wilson_interval(right: int) -> None:
    interval = binomtest(right, 10).proportion_ci(method="wilson")
    assert metrics.wilson(right, 10) == pytest.approx((interval.low, interval.high), abs=1e-6)


# -- evaluate ------------------------------------------------------------------------------------------------


class Plugin:
    @hookimpl
    def register_metrics(self) -> Iterable[Metric]:
        return [Metric("magic", "Needs what nobody has", "nowhere:nothing", requires=("divination",))]


def test_evaluate_says_what_it_left_out_and_why() -> None:
    train, test = grey(300, 0), grey(80, 1)
    run = faces(grey(64, 2), train, test)
    run.registry = Registry.of({"oracle": Plugin()})
    found = metrics.evaluate(run, names=None)
    assert set(found.values) == {"core/bound", "core/nearest-neighbour", "core/sliced-wasserstein"}
    assert set(found.skipped) == {"core/nll", "core/baselines", "core/accuracy", "oracle/magic"}
    assert "`log_density`" in found.skipped["core/nll"]
    assert "`divination`" in found.skipped["oracle/magic"]
    with pytest.raises(UserError, match="`log_density`"):
        metrics.evaluate(run, names=["nll"])
    with pytest.raises(UserError, match="did you mean core/nll"):
        metrics.evaluate(run, names=["nlll"])


def test_what_evaluate_found_survives_json(tmp_path: Any) -> None:
    from cdm_core.files import to_json, write_bytes

    found = metrics.Evaluation("test", 3, None, {"core/nll": {"nats": 1.5, "nats_se": math.nan}}, {"a": "b"})
    path = write_bytes(tmp_path / metrics.FILE, to_json(found.to_dict()).encode())
    kept = metrics.read(path)
    assert kept is not None
    assert math.isnan(kept.values["core/nll"].pop("nats_se"))
    assert kept == metrics.Evaluation("test", 3, None, {"core/nll": {"nats": 1.5}}, {"a": "b"})
    path.write_text("{")
    assert metrics.read(path) is None
