"""A joint model of which everything is known: a Gaussian mixture, and images around a few patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.data import Data, DataInfo
from cdm_core.data.base import TensorSplit
from cdm_core.manager import load_registry
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws
from cdm_core.runs import Run
from cdm_core.sampler_configs import DDPMConfig
from cdm_core.samplers import Prediction
from cdm_core.settings import SampleConfig, Sampling, Selection
from cdm_plugins_joint.adapter_configs import RepresentationConfig

PATH = schedules.linear(100, 1e-3, 0.2)


class Maps(NamedTuple):
    skips: tuple[Tensor, ...]
    middle: Tensor


class ExactJoint(nn.Module):
    """A mixture that looks like a joint network: its one representation is the noisy image itself.

    predicts: what is decoded from a moved image z, while x stays: x0 = D(z), or, from eps = (z - D(z)) /
    sigma, x0 = x - (z - D(z)). The head knows the exact posterior, of the components or, with `groups` (K, A)
    in {0, 1}, of the A groups that they are in: classes, or, with `multi_label`, attributes.
    """

    capabilities = frozenset({"denoise", "class_logits", "representations"})
    num_classes = None
    level_names = ("image",)

    def __init__(
        self,
        mixture: GaussianMixture,
        predicts: str = "eps",
        groups: Tensor | None = None,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        self.mixture, self.predicts, self.multi_label = mixture, predicts, multi_label
        self.groups = torch.eye(mixture.components) if groups is None else groups
        self.classes = self.groups.shape[1]
        self.offset = nn.Parameter(torch.zeros(()))  # so that checkpoints hold something

    @property
    def sigmas(self) -> Tensor:
        return PATH.ve_sigmas

    @property
    def sigma_range(self) -> tuple[float, float]:
        return float(self.sigmas[0]), float(self.sigmas[-1])

    @property
    def means(self) -> Tensor:
        return self.mixture.means

    def scale(self, sigma: Tensor) -> Tensor:
        return PATH.scale(sigma)

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        return self.mixture.denoise(x, sigma, y)

    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        posterior = self.mixture.class_logits(x, sigma)
        within = self.groups.T.to(x.dtype)
        inside, outside = ((posterior[:, None] + part.log()).logsumexp(2) for part in (within, 1 - within))
        return inside - outside if self.multi_label else inside

    def representations(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Maps:
        return Maps((), 1 * x)

    def head(self, z: Maps, sigma: Tensor) -> Tensor:
        return self.class_logits(z.middle, sigma)

    def decode_representations(self, z: Maps, x: Tensor, sigma: Tensor, y: Any = None) -> Prediction:
        x0 = self.mixture.denoise(z.middle, sigma)
        return Prediction(x0 if self.predicts == "x0" else x - (z.middle - x0))

    def pooled(self, z: Maps) -> list[Tensor]:
        return [z.middle.flatten(1)]

    def features(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        return x.flatten(1)


KINDS = torch.eye(3).repeat(2, 1)  # of the six patterns below: which class each is of
HALVES = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])  # of the four: bright above, bright below


def patterns(std: float = 0.1) -> GaussianMixture:
    """4x4 pixels: the class is which of three pixels above is bright; those below are all bright, or none."""
    above, below = -0.5 * torch.ones(6, 4), torch.full((6, 12), 0.6)
    above[torch.arange(6), torch.arange(6) % 3] = 0.5
    below[3:] *= -1
    return GaussianMixture(
        torch.ones(6), torch.cat([above, below], 1), std**2 * torch.eye(16).expand(6, 16, 16)
    )


def halves(std: float = 0.15) -> GaussianMixture:
    """4x4 pixels, the two halves bright or not."""
    means = (1.2 * HALVES - 0.6).repeat_interleave(8, dim=1)
    return GaussianMixture(torch.ones(4), means, std**2 * torch.eye(16).expand(4, 16, 16))


def exact_of(multi_label: bool = False) -> ExactJoint:
    """The model of `patterns` and their classes, or of `halves` and their attributes."""
    if multi_label:
        return ExactJoint(halves(), groups=HALVES, multi_label=True)
    return ExactJoint(patterns(), groups=KINDS)


def data_of(model: ExactJoint) -> Data:
    """Its samples as grey images, 120 a split."""
    names = ("above", "below") if model.multi_label else ("first", "second", "third")
    info = DataInfo("patterns", (1, 4, 4), len(names), names)

    def split(seed: int) -> TensorSplit:
        points, component = model.mixture.sample(120, Draws(seed, 120))
        labels = model.groups[component]
        labels = labels.long() if model.multi_label else labels.argmax(1)
        return TensorSplit(info.to_pixels(points.view(-1, 1, 4, 4)), labels)

    splits = ("train", "valid", "test")
    return Data(info, {name: (lambda seed=seed: split(seed)) for seed, name in enumerate(splits)})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: threads would cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def exact() -> Callable[..., ExactJoint]:
    """`exact(mixture, predicts="eps")`."""
    return ExactJoint


@pytest.fixture
def exact_run() -> Callable[..., Run]:
    """`exact_run(batch_size=64, multi_label=False, scale=1.0, ...)`: of the patterns, steered by itself."""

    def make(*, batch_size: int = 64, multi_label: bool = False, **settings: Any) -> Run:
        model = exact_of(multi_label)
        data = data_of(model)
        config = RepresentationConfig(**{"scale": 1.0, **settings})
        sampling = Sampling(
            Selection("core/ddpm", DDPMConfig()),
            SampleConfig(steps=40, batch_size=batch_size),
            Selection("joint/representations", config),
        )
        return Run(model, data.info, data=data, registry=load_registry(), sampling=sampling)

    return make
