"""The commands: words, files, JSON, and one line with exit code 2 for what is wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cdm_core.checkpoints import RunFolder, safetensors_bytes
from cdm_core.cli import cli
from cdm_core.config import resolve, to_toml
from cdm_core.manager import load_registry
from cdm_core.testing.plugins import FakePlugin, installed

HERE = Path(__file__).parent
ORACLE = FakePlugin(
    "oracle",
    f"""
    import importlib.util

    HAS = ("denoise", "class_logits", "representations")

    def known():
        spec = importlib.util.spec_from_file_location("joint_oracle", {str(HERE / "conftest.py")!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @hookimpl
    def register_models():
        return [Model("exact", "The truth", f"{{__name__}}:exact", None, HAS)]

    @hookimpl
    def register_objectives():
        return [Objective("none", "Nothing to learn", "builtins:print")]

    @hookimpl
    def register_datasets():
        return [Dataset("patterns", "Three patterns", f"{{__name__}}:patterns")]

    @hookimpl
    def register_recipes():
        guide = {{"name": "joint/representations-safe", "scale": 3.0}}
        values = {{"model": {{"name": "oracle/exact"}}, "data": {{"name": "oracle/patterns"}},
                  "objective": {{"name": "oracle/none"}}, "sampler": {{"name": "core/ddpm"}},
                  "sample": {{"steps": 40}}}}
        steered = values | {{"adapter": guide}}
        return [Recipe("plain", "Unsteered", values), Recipe("steered", "Steered", steered)]

    def exact(config, info):
        return known().exact_of()

    def patterns(config):
        module = known()
        return module.data_of(module.exact_of())
    """,
)
Invoke = Callable[..., Result]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of the exact model: `steered` by its recipe, `plain`, and a `judge`."""
    folder = tmp_path_factory.mktemp("runs")
    with installed(folder / "plugin", ORACLE):
        registry = load_registry()
        for name, recipe in {"steered": "steered", "plain": "plain", "judge": "plain"}.items():
            config = resolve(registry, recipe=f"oracle/{recipe}")
            run = RunFolder(folder / name)
            run.write_text("config.toml", to_toml(config))
            _, record = registry.find("model", config.model.name)
            state = safetensors_bytes(record.load()(None, None).state_dict())
            run.save(
                10, {"ema.safetensors": state, "model.safetensors": state}, config="", seconds=1.0, valid={}
            )
        yield folder


@pytest.fixture
def invoke(runs: Path) -> Invoke:
    """`cdm-run joint ...` in this process; the exit code is checked."""

    def run(*words: object, code: int = 0, group: str = "joint") -> Result:
        result = CliRunner().invoke(cli, [group, *(str(word) for word in words)])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return run


def error(result: Result) -> str:
    """The one line of an error."""
    (line,) = result.stderr.strip().splitlines()
    return line


def test_counterfactual(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ["--num", 12, "--judge", runs / "judge", "--start", 0.6, "--seed", 3]
    found = json.loads(invoke("counterfactual", runs / "steered", *given, "--out", tmp_path, "--json").stdout)
    assert found.pop("out") == str(tmp_path)
    assert found == json.loads((tmp_path / "counterfactual.json").read_text())
    assert found["sampling"]["adapter"]["name"] == "joint/representations-safe"
    assert list(found["ways"]) == ["counterfactual", "and back", "resampled", "sampled"]
    assert found["ways"]["counterfactual"]["judge_rate"] > 0.7
    with (tmp_path / "counterfactual.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert float(rows[5]["counterfactual_rmse"]) == found["images"][5]["counterfactual_rmse"]
    assert (tmp_path / "counterfactual.png").read_bytes().startswith(b"\x89PNG")


def test_counterfactual_as_text(invoke: Invoke, runs: Path) -> None:
    text = invoke("counterfactual", runs / "steered", "--num", 4, "--target", 1, "--start", 0.5)
    first, head, *lines, last = text.stdout.splitlines()
    assert first.startswith("4 images of test, noised to sigma ")
    assert head.split() == ["head:", "target", "head:", "flipped", "pixel", "RMSE", "feature", "distance"]
    assert [line.split("  ")[1].strip() for line in lines] == [
        "counterfactual",
        "and back",
        "resampled",
        "sampled",
    ]
    folder = runs / "steered" / "counterfactual"
    assert last == f"wrote {folder / 'counterfactual.png'}, .csv and .json"
    assert "resampled" in text.stderr


def test_counterfactual_of_a_run_that_says_nothing(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    """The plugin's own guide, with its settings open."""
    given = ["--num", 3, "--out", tmp_path, "--json", "--adapter", "representations-safe"]
    found = json.loads(invoke("counterfactual", runs / "plain", *given, "--set", "adapter.scale=2").stdout)
    assert found["sampling"]["adapter"]["scale"] == 2.0
    found = json.loads(
        invoke("counterfactual", runs / "plain", "--num", 3, "--out", tmp_path, "--json").stdout
    )
    assert found["sampling"]["adapter"]["name"] == "joint/representations"


def test_probe(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ["--train", 60, "--num", 60, "--levels", 2]
    found = json.loads(invoke("probe", runs / "plain", *given, "--out", tmp_path, "--json").stdout)
    assert found.pop("out") == str(tmp_path)
    assert found == json.loads((tmp_path / "probe.json").read_text())
    assert [score["map"] for score in found["scores"][:3]] == ["image", "all maps", "head"]
    text = invoke("probe", runs / "plain", *given)
    first, head, *lines, last = text.stdout.splitlines()
    assert first == "test split, seed 0; accuracy by noise std in data units, 0: clean"
    assert head.split()[0] == "0"
    assert [line.split()[0] for line in lines] == ["image", "all", "head"]
    assert last == f"wrote {runs / 'plain' / 'probe' / 'probe.json'}, .csv and .png"


def test_evaluate_has_the_heads_figures(invoke: Invoke, runs: Path) -> None:
    found = json.loads(
        invoke(runs / "plain", "--metric", "joint/classifier", "--json", group="evaluate").stdout
    )
    assert found["values"]["joint/classifier"]["accuracy_t0.00"] == 1.0


def test_sample_takes_the_class_as_a_label(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ["--num", 6, "--label", 2, "--out", tmp_path, "--json"]
    assert json.loads(invoke(runs / "steered", *given, group="sample").stdout)["num"] == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "9"], "--target 9 is out of range: the classes are 0 to 2"),
        (["--start", "0"], "--start 0: a share of the noise levels is wanted, above 0 and at most 1"),
        (["--num", "0"], "--num 0: ask for at least 1 image"),
        (["--steps", "99"], "--steps 99: from --start 0.25 there are 1 to 25"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(invoke: Invoke, runs: Path, words: list[str], said: str) -> None:
    assert said in error(invoke("counterfactual", runs / "steered", *words, code=2))


def test_a_head_is_not_its_own_judge(invoke: Invoke, runs: Path) -> None:
    result = invoke("counterfactual", runs / "steered", "--judge", runs / "steered", code=2)
    assert "the head cannot be its own independent judge" in error(result)
