"""Runs of which everything is known: Gaussian mixtures with their exact denoisers and classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cdm_core.checkpoints import RunFolder, safetensors_bytes
from cdm_core.config import resolve, to_toml
from cdm_core.manager import load_registry
from cdm_core.runs import Run, load_run
from cdm_core.testing.plugins import FakePlugin, installed
from cdm_plugins_guidance.classifiers import ALLOW_TARGETS

ORACLE = FakePlugin(
    "oracle",
    """
    LINE = {"dim": 1, "components": 2, "layout": "explicit", "means": ((-1.0,), (1.0,)), "std": 0.5}
    RING = {"components": 4, "std": 0.35}

    @dataclass(frozen=True)
    class Settings:
        line: bool = False
        conditional: bool = False

    @hookimpl
    def register_models():
        has = ("denoise", "class_logits")
        return [Model("exact", "The truth", f"{__name__}:exact", Settings, provides=has)]

    @hookimpl
    def register_objectives():
        return [Objective("none", "Nothing to learn", "builtins:print")]

    @hookimpl
    def register_recipes():
        def recipe(mixture, line, conditional=False):
            model = {"name": "oracle/exact", "line": line, "conditional": conditional}
            data = {"name": "core/gaussian-mixture", **mixture,
                    "train_points": 50, "valid_points": 2000, "test_points": 8000}
            return {"model": model, "data": data, "objective": {"name": "oracle/none"},
                    "sampler": {"name": "core/ddpm"}, "sample": {"steps": 40, "batch_size": 8000}}

        return [Recipe("line", "Two classes", recipe(LINE, True)),
                Recipe("ring", "Four classes", recipe(RING, False)),
                Recipe("known", "Four classes, told", recipe(RING, False, True))]

    def exact(config, info):
        import torch
        from cdm_core.data.configs import GaussianMixtureConfig
        from cdm_core.data.mixture import build

        class Exact(torch.nn.Module):
            sigma_range = (0.01, 10.0)

            def __init__(self):
                super().__init__()
                self.mixture = build(GaussianMixtureConfig(**(LINE if config.line else RING)))
                self.classes = self.mixture.components
                self.num_classes = self.classes if config.conditional else None

            def denoise(self, x, sigma, y=None):
                return self.mixture.denoise(x, sigma, y)

            def class_logits(self, x, sigma):
                return self.mixture.class_logits(x, sigma)

            def features(self, x):
                return x.flatten(1)

        return Exact()

    def network():
        \"\"\"Of the ring, four logits with one ReLU each.\"\"\"
        import torch

        means = exact(Settings(), None).mixture.means.float()

        class Network(torch.nn.Module):
            num_classes = 4

            def __init__(self):
                super().__init__()
                self.linear, self.relu = torch.nn.Linear(2, 4), torch.nn.ReLU()
                with torch.no_grad():
                    self.linear.weight.copy_(means / 0.35**2)
                    self.linear.bias.zero_()

            def forward(self, x):
                return self.relu(self.linear(x.flatten(1)))

        return Network()
    """,
)
NETWORK = f"{ORACLE.module}:network"  # for adapter.classifier.name; its images are (2, 1, 1)
RUNS = {"line": "line", "ring": "ring", "judge": "ring", "line-judge": "line", "known": "known"}


@pytest.fixture(autouse=True)
def _python_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifiers of these runs are Python targets, which settings may name where that is allowed."""
    monkeypatch.setenv(ALLOW_TARGETS, "1")


@pytest.fixture(scope="session")
def network_name() -> str:
    """The classifier with ReLUs, as `adapter.classifier.name` takes it."""
    return NETWORK


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs of exact models: `line`, `ring`, a judge of each, and `known`, given the classes."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: threads would cost more than they give
    with installed(folder / "plugin", ORACLE):
        registry = load_registry()
        for name, recipe in RUNS.items():
            config = resolve(registry, recipe=f"oracle/{recipe}")
            run = RunFolder(folder / name)
            run.write_text("config.toml", to_toml(config))
            _, record = registry.find("model", config.model.name)
            state = safetensors_bytes(record.load()(config.model.config, None).state_dict())
            files = {"ema.safetensors": state, "model.safetensors": state}
            run.save(10, files, config="", seconds=1.0, valid={})
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def load(runs: Path) -> Callable[..., Run]:
    """`load("ring", "adapter.name=guide", ...)`: a run, its sampling changed so."""
    return lambda name, *overrides: load_run(runs / name, device="cpu", overrides=overrides)
