"""The commands on a trained run: words, files, JSON, and one line with exit code 2 for what is wrong."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from cdm_core import UserError, images, load_run
from cdm_core.checkpoints import RunFolder, safetensors_bytes
from cdm_core.cli import cli
from cdm_core.commands.classify import read_folder
from cdm_core.config import resolve, to_toml
from cdm_core.data.configs import GaussianMixtureConfig
from cdm_core.data.mixture import load
from cdm_core.formats import Foreign, save_converted
from cdm_core.manager import load_registry
from cdm_core.settings import Selection
from cdm_core.testing.plugins import FakePlugin, installed

ORACLE = FakePlugin(
    "oracle",
    """
    @dataclass(frozen=True)
    class Settings:
        conditional: bool = True

    @hookimpl
    def register_models():
        has = ("denoise", "log_density")
        return [Model("exact", "The truth", f"{__name__}:exact", Settings, provides=has),
                Model("flat", "A constant image", f"{__name__}:flat", provides=has)]

    @hookimpl
    def register_objectives():
        return [Objective("none", "Nothing to learn", "builtins:print")]

    @hookimpl
    def register_recipes():
        rest = {"objective": {"name": "oracle/none"}, "sampler": {"name": "core/ddpm"},
                "sample": {"steps": 5}}
        data = {"name": "core/gaussian-mixture", "components": 4, "std": 0.2,
                "train_points": 400, "valid_points": 20, "test_points": 150}
        exact = {"model": {"name": "oracle/exact"}, "data": data, **rest}
        flat = {"model": {"name": "oracle/flat"}, "data": {"name": "core/digits"}, **rest}
        return [Recipe("default", "The truth", exact), Recipe("digits", "Flat", flat)]

    def exact(config, info):
        import torch
        from cdm_core.data.configs import GaussianMixtureConfig
        from cdm_core.data.mixture import build

        class Exact(torch.nn.Module):
            sigma_range = (0.01, 10.0)

            def __init__(self):
                super().__init__()
                self.mixture = build(GaussianMixtureConfig(components=4, std=0.2))
                self.num_classes = 4 if config.conditional else None
                self.null_label = 4

            def denoise(self, x, sigma, y=None):
                return self.mixture.denoise(x, sigma, y)

            def log_density(self, x, y=None, sigma=None):
                return self.mixture.log_density(x, y, sigma)

            def likelihood_diagnostics(self, x0, draws):
                assert draws.normal(2).shape == (len(x0), 2)
                return {"log_normaliser": 0.0, "images": float(len(x0))}

        return Exact()

    def flat(config, info):
        import torch

        class Flat(torch.nn.Module):
            sigma_range = (0.01, 10.0)

            def __init__(self):
                super().__init__()
                self.level = torch.nn.Parameter(torch.zeros(()))

            def denoise(self, x, sigma, y=None):
                return torch.zeros_like(x) + self.level + 0.1 * torch.tanh(x)

            def log_density(self, x, y=None, sigma=None):
                return -(x - self.level).square().flatten(1).sum(1)

        return Flat()
    """,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the fake plugin and two runs: `points`, exact and conditional, and `digits`."""
    folder = tmp_path_factory.mktemp("runs")
    with installed(folder, ORACLE):
        registry = load_registry()
        for name, recipe in (("points", "default"), ("digits", "digits")):
            config = resolve(registry, plugins=["oracle"], recipe=recipe, config_file=None, overrides=[])
            run = RunFolder(folder / name)
            run.write_text("config.toml", to_toml(config))
            _, record = registry.find("model", config.model.name)
            state = safetensors_bytes(record.load()(config.model.config, None).state_dict())
            files = {"ema.safetensors": state, "model.safetensors": state}
            run.save(10, files, config="", seconds=1.0, valid={})
        yield folder


@pytest.fixture
def invoke(root: Path) -> Callable[..., Result]:
    def run(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(cli, [str(word) for word in words])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return run


Invoke = Callable[..., Result]


def test_sample_writes_what_it_says(invoke: Invoke, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--num", 6, "--seed", 3, "--steps", 4, "--sampler", "heun", "--out", out]
    found = json.loads(
        invoke("sample", root / "digits", *options, "--format", "grid,npz,png", "--json").stdout
    )
    assert (found["sampler"], found["steps"], found["seed"], found["step"]) == ("core/heun", 4, 3, 10)
    assert sorted(found["files"]) == sorted(str(path) for path in out.rglob("*") if path.is_file())
    with np.load(out / "samples.npz", allow_pickle=False) as kept:
        assert kept["samples"].shape == (6, 8, 8, 1)
        for index, image in enumerate(kept["samples"]):
            single = np.asarray(Image.open(out / "images" / f"{index:05d}.png"))
            assert (single == image[..., 0]).all()
        assert json.loads(str(kept["settings"]))["num"] == 6


def test_sample_by_default_goes_into_the_run(invoke: Invoke, root: Path) -> None:
    output = invoke("sample", root / "points", "--num", 5, "--seed", 7, "--label", "2,0").stdout
    folder = root / "points" / "samples" / "ddpm-5-seed7"
    assert output == f"wrote {folder / 'grid.png'}\nwrote {folder / 'samples.npz'}\n"
    with np.load(folder / "samples.npz") as kept:
        assert kept["labels"].tolist() == [2, 0, 2, 0, 2]
        x0 = torch.from_numpy(kept["samples"])
    mixture = load(GaussianMixtureConfig(components=4, std=0.2)).mixture
    assert mixture is not None
    assert mixture.class_logits(x0[..., None, None], 0.0).argmax(1).tolist() == [2, 0, 2, 0, 2]


def test_sample_through_an_adapter_and_as_a_recipe_says(invoke: Invoke, root: Path, tmp_path: Path) -> None:
    def settings(*words: object) -> Any:
        given = ["--num", 2, "--out", tmp_path / "out", "--json", *words]
        return json.loads(invoke("sample", root / "points", *given).stdout)

    assert settings()["adapter"] is None
    guided = settings("--adapter", "cfg", "--set", "adapter.weight=0", "--set", "sample.steps=3")
    assert (guided["adapter"], guided["steps"]) == ({"name": "core/cfg", "weight": 0.0}, 3)
    assert settings("--recipe", "oracle/default", "--set", "sampler=heun")["sampler"] == "core/heun"
    out = invoke("sample", root / "points", "--set", "train.lr=1", code=2).output
    assert out.strip().endswith("--set train: sampling has the tables sampler, sample, adapter only")


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(invoke: Invoke, root: Path, tmp_path: Path) -> None:
    options = ["--num", "5", "--seed", "1", "--format", "npz", "--device", "cpu"]
    invoke("sample", root / "digits", *options, "--out", tmp_path / "one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    # After `--`, as torchrun would take --num for an abbreviation of its own options.
    words = ["-m", "--", "cdm_core", "sample", str(root / "digits"), *options, "--out", str(tmp_path / "two")]
    done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    one, two = (np.load(tmp_path / name / "samples.npz")["samples"] for name in ("one", "two"))
    assert (one == two).all()


def test_likelihood_agrees_with_its_own_file(invoke: Invoke, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    found = json.loads(invoke("likelihood", root / "points", "--json", "--check", "--out", file).stdout)
    assert (found["split"], found["n"], found["labels"]) == ("test", 150, "none")
    assert found["check"] == {"log_normaliser": 0.0, "images": 150.0}
    rows = list(csv.DictReader(file.open()))
    assert np.mean([float(row["nats"]) for row in rows]) == pytest.approx(found["nats"])
    assert {row["label"] for row in rows} == {"0", "1", "2", "3"}
    text = invoke("likelihood", root / "points", "--split", "valid", "--labels", "data").stdout
    assert "20 images of the valid split, given their classes" in text
    invoke("likelihood", root / "points", "--limit", 3, "--out", tmp_path / "scores.json")
    assert len(json.loads((tmp_path / "scores.json").read_text())) == 3
    none = invoke("likelihood", root / "digits", "--check", "--limit", 5).stdout
    assert "offers no likelihood diagnostics" in none


def test_evaluate_keeps_its_figures(invoke: Invoke, root: Path) -> None:
    found = json.loads(invoke("evaluate", root / "points", "--json").stdout)
    assert set(found["values"]) == {
        "core/accuracy",
        "core/baselines",
        "core/bound",
        "core/nearest-neighbour",
        "core/nll",
        "core/sliced-wasserstein",
    }
    kept = json.loads((root / "points" / "evaluation.json").read_text())
    assert kept == {key: value for key, value in found.items() if key != "run"}
    nll = found["values"]["core/nll"]
    assert nll["bits_per_dim"] == pytest.approx(
        found["values"]["core/baselines"]["truth_bits_per_dim"], abs=1e-6
    )
    text = invoke("evaluate", root / "points", "--metric", "nll", "--metric", "accuracy").stdout
    assert f"bits_per_dim     {nll['bits_per_dim']:.4g}\n" in text
    assert "core/baselines" not in text
    skipped = invoke("evaluate", root / "digits").stdout
    assert "skipped core/accuracy: " in skipped


def test_classify_split(invoke: Invoke, root: Path, tmp_path: Path) -> None:
    found = json.loads(invoke("classify", root / "points", "--json", "--out", tmp_path / "y.csv").stdout)
    assert found["accuracy"] > 0.9
    assert found["low"] < found["accuracy"] <= found["high"]
    rows = list(csv.DictReader((tmp_path / "y.csv").open()))
    assert np.mean([row["predicted"] == row["label"] for row in rows]) == pytest.approx(found["accuracy"])
    assert "accuracy" in invoke("classify", root / "points").stdout


def test_classify_reads_a_folder_as_the_data_are(root: Path, tmp_path: Path) -> None:
    run = load_run(root / "digits", device="cpu")
    pixels, _ = run.split("test").__getitems__([0, 1, 2])
    for index, image in enumerate(images.from_data(pixels, run.info)):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{index}.png")
    names, x0 = read_folder(run, tmp_path, seed=0)
    assert names == ["0.png", "1.png", "2.png"]
    assert torch.equal(run.info.to_pixels(x0), pixels)
    (tmp_path / "3.png").write_text("no image")
    with pytest.raises(UserError, match=r"3\.png.*damaged"):
        read_folder(run, tmp_path, seed=0)


def test_converted_file(invoke: Invoke, root: Path, tmp_path: Path) -> None:
    info = load(GaussianMixtureConfig(components=4)).info
    _, record = load_registry().find("model", "oracle/exact")
    config = record.config(conditional=True)
    state = record.load()(config, info).state_dict()
    path = tmp_path / "model.safetensors"
    save_converted(Foreign(state, Selection("oracle/exact", config), info), path)
    invoke("sample", path, "--num", 2, "--steps", 3)
    assert (tmp_path / "model" / "samples" / "ddim-3-seed0" / "grid.png").is_file()
    refused = invoke("likelihood", path, code=2)
    assert "name them with --data" in refused.stderr
    wrong = invoke("likelihood", path, "--data", "digits", code=2)
    assert "grey levels" in wrong.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "digits", "--steps", "0"], "steps 0 is out of range"),
        (["sample", "digits", "--num", "0"], "at least 1"),
        (["sample", "digits", "--sampler", "huen"], "did you mean core/heun"),
        (["sample", "digits", "--label", "1"], "unconditional"),
        (["sample", "points", "--label", "9"], "label 9 is out of range: the classes are 0 to 3"),
        (["sample", "points", "--label", "x"], "give class numbers"),
        (["sample", "digits", "--format", "gif"], "choose of grid, npz, png"),
        (["sample", "points", "--format", "png"], "points, not images"),
        (["sample", "absent"], "is not a run: it does not exist"),
        (["likelihood", "digits", "--draws", "0"], "0 draws"),
        (["likelihood", "digits", "--labels", "data"], "unconditional"),
        (["likelihood", "digits", "--data", "digits"], "names its own data"),
        (["likelihood", "digits", "--out", "scores.txt"], ".csv or .json"),
        (["evaluate", "digits", "--metric", "fid"], "unknown metric 'fid'"),
        (["classify", "digits"], "unconditional"),
        (["classify", "points", "--input", "."], "does not hold images"),
        (["report", "absent"], "is not a run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    invoke: Invoke, root: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(root)
    result = invoke(*words, code=2)
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert result.stdout == ""
