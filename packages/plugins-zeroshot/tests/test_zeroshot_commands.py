"""The commands: words, files, JSON, answers taken up again, and a line with exit code 2 for what is wrong."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from cdm_core.checkpoints import RunFolder, safetensors_bytes
from cdm_core.cli import cli
from cdm_core.config import resolve, to_toml
from cdm_core.errors import UserError
from cdm_core.images import save_npz, save_singles
from cdm_core.manager import load_registry
from cdm_core.metrics import wilson
from cdm_core.runs import load_run
from cdm_core.testing.plugins import FakePlugin, installed
from cdm_plugins_zeroshot.answers import fingerprint
from cdm_plugins_zeroshot.methods import choose, default_name
from cdm_plugins_zeroshot.results import Results, Shard, digest
from cdm_plugins_zeroshot.zeroshot_configs import ClassifierConfig, EliminationConfig, EstimatorConfig

ORACLE = FakePlugin(
    "oracle",
    """
    RING = {"components": 4, "std": 0.35}

    @dataclass(frozen=True)
    class Settings:
        conditional: bool = True

    @hookimpl
    def register_models():
        has = ("denoise", "log_density")
        return [Model("ring", "The truth, but for factors", f"{__name__}:ring", Settings, provides=has),
                Model("templates", "Ten digits and noise", f"{__name__}:templates", provides=("denoise",))]

    @hookimpl
    def register_objectives():
        return [Objective("none", "Nothing to learn", "builtins:print")]

    @hookimpl
    def register_recipes():
        rest = {"objective": {"name": "oracle/none"}, "sampler": {"name": "core/ddpm"}}
        data = {"name": "core/gaussian-mixture", **RING,
                "train_points": 50, "valid_points": 400, "test_points": 60}
        ring = {"model": {"name": "oracle/ring"}, "data": data, **rest}
        templates = {"model": {"name": "oracle/templates"}, "data": {"name": "core/digits"}, **rest}
        return [Recipe("ring", "Points", ring), Recipe("templates", "Images", templates),
                Recipe("blind", "Points", {"base": "ring", "model": {"conditional": False}})]

    @hookimpl
    def register_commands():
        return [Command(name, name, f"cdm_plugins_zeroshot.commands:{name}")
                for name in ("classify", "evaluate", "ablate", "ood")]

    def ring(config, info):
        import torch
        from cdm_core.data.configs import GaussianMixtureConfig
        from cdm_core.data.mixture import build

        class Ring(torch.nn.Module):
            null_label = 4

            def __init__(self):
                super().__init__()
                self.mixture = build(GaussianMixtureConfig(**RING))
                self.num_classes = 4 if config.conditional else None

            def denoise(self, x, sigma, y=None):
                free = self.mixture.denoise(x, sigma)
                if y is None:
                    return free
                known = self.mixture.denoise(x, sigma, y.clamp(max=3))
                return torch.where((y == 4)[:, None, None, None], free, known)

            def log_density(self, x, y=None, sigma=None):
                factor = torch.tensor([0.0, 12.0, -12.0, 5.0])
                return self.mixture.log_density(x, y, sigma) + (0 if y is None else factor[y])

        return Ring()

    def templates(config, info):
        import torch

        class Templates(torch.nn.Module):
            num_classes = 10

            def __init__(self):
                super().__init__()
                grey = torch.randint(0, 17, (10, 1, 8, 8), generator=torch.Generator().manual_seed(0))
                self.register_buffer("grey", grey.to(torch.uint8))

            def denoise(self, x, sigma, y=None):
                centre = (self.grey[y].float() + 0.5) * 2 / 17 - 1
                share = 0.01 / (0.01 + sigma[:, None, None, None] ** 2)
                return centre + share * (x - centre)

        return Templates()
    """,
)
Invoke = Callable[..., Result]
SMALL = ("--pairs", 16, "--set", "estimator.levels=50", "--set", "estimator.sigma_max=5", "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs: `ring`, `blind` (without labels) and `templates`; it is on sys.path."""
    folder = tmp_path_factory.mktemp("runs")
    with installed(folder, ORACLE):
        registry = load_registry()
        for name in ("ring", "blind", "templates"):
            config = resolve(registry, recipe=f"oracle/{name}")
            run = RunFolder(folder / name)
            run.write_text("config.toml", to_toml(config))
            _, record = registry.find("model", config.model.name)
            state = safetensors_bytes(record.load()(config.model.config, None).state_dict())
            files = {"ema.safetensors": state, "model.safetensors": state}
            run.save(10, files, config="", seconds=1.0, valid={})
        yield folder


@pytest.fixture
def invoke(runs: Path) -> Invoke:
    """`cdm-run oracle ...` in this process; the exit code is checked."""

    def run(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(cli, ["oracle", *(str(word) for word in words)])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return run


def error(result: Result) -> str:
    """The one line of an error."""
    (line,) = result.stderr.strip().splitlines()
    return line


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "seconds"}


# -- classify ------------------------------------------------------------------------------------------------


def test_classify_writes_what_it_says(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ("classify", runs / "ring", *SMALL, "--calibrate", 30, "--store", tmp_path)
    found = json.loads(invoke(*given, "--out", tmp_path / "a.csv", "--json").stdout)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(rows) == found["n"] == 60
    right = sum(row["predicted"] == row["label"] for row in rows)
    assert found["accuracy"] == right / 60 > 0.85
    assert (found["low"], found["high"]) == wilson(right, 60)
    assert found["evaluations"] == pytest.approx(np.mean([float(row["evaluations"]) for row in rows]))
    assert found["evaluations"] < 4 * 16  # a race gave some classes up
    first = found["images"][0]
    assert (rows[0]["image"], float(rows[0]["probability"])) == ("test/0", first["probability"])
    assert 0 < float(rows[0]["right"]) < 1
    assert np.argmax(first["scores"]) == first["predicted"]
    assert float(rows[0]["margin_low"]) < float(rows[0]["margin"])

    text = invoke(*given, "--out", tmp_path / "a.json")
    assert text.stdout.startswith(f"accuracy {100 * right / 60:.2f}% of 60 images (95% interval ")
    assert text.stdout.splitlines()[-1] == f"wrote {tmp_path / 'a.json'}"
    assert json.loads((tmp_path / "a.json").read_text()) == found["images"]


def test_answers_are_taken_up_again(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    """After a crash in the middle of a line, and by any sharding: bit for bit what one go says."""
    given = ("classify", runs / "ring", *SMALL, "--json", "--store")
    whole = json.loads(invoke(*given, tmp_path / "one").stdout)
    (part,) = (tmp_path / "one").glob("race-*/part-*.jsonl")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:20]) + lines[20][:50])
    again = json.loads(invoke(*given, tmp_path / "one").stdout)
    assert without_times(again) == without_times(whole)
    assert part.read_text().splitlines(keepends=True)[:20] == lines[:20]

    first = invoke(*given[:-2], "--store", tmp_path / "two", "--shard", "2/3").stdout
    assert first == (
        "shard 2 of 3: its 20 of 60 images are answered; "
        "the same command tells more when all shards are done\n"
    )
    assert json.loads(invoke(*given, tmp_path / "two", "--shard", "3/3").stdout) == {
        "complete": False,
        "shard": 3,
    }
    last = json.loads(invoke(*given, tmp_path / "two", "--shard", "1/3").stdout)
    assert without_times(last) == without_times(whole)


KILLED = """
import os, signal, sys
from click.testing import CliRunner
from cdm_core.cli import cli
from cdm_plugins_zeroshot import answers, results
answers.SECONDS = 0.0  # every answer goes to the disk at once
add, left = results.Writer.add, [{count}]

def dies(self, rows):
    add(self, rows)
    left[0] -= 1
    if not left[0]:
        with self.path.open("ab") as file:
            file.write(b'{{"image": 59, "sco')  # in the middle of the next answer
        os.kill(os.getpid(), signal.SIGKILL)

results.Writer.add = dies
CliRunner().invoke(cli, sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_answers(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    """`kill -9` twice, each time in the middle of a line; what is on the disk is not asked again."""
    given = ("classify", runs / "ring", *SMALL, "--json", "--store")
    whole = json.loads(invoke(*given, tmp_path / "one").stdout)
    words = ["oracle", *(str(word) for word in given), str(tmp_path / "two")]
    paths = os.pathsep.join([str(runs), *(path for path in sys.path if path.endswith("src"))])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for count, kept in ((3, 3), (20, 23)):
        code = KILLED.format(count=count)
        ended = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        (part,) = (tmp_path / "two").glob("race-*/part-*.jsonl")
        assert part.read_bytes().count(b"\n") == kept
    again = json.loads(invoke(*given, tmp_path / "two").stdout)
    assert without_times(again) == without_times(whole)


def test_a_shorter_limit_asks_nothing_twice(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ("classify", runs / "ring", *SMALL, "--json", "--store", tmp_path)
    short = json.loads(invoke(*given, "--limit", 7).stdout)
    files = sorted(tmp_path.rglob("part-*"))
    before = [file.read_bytes() for file in files]
    whole = json.loads(invoke(*given).stdout)
    assert whole["images"][:7] == short["images"]
    assert files == sorted(tmp_path.rglob("part-*"))
    assert all(f.read_bytes().startswith(b) for f, b in zip(files, before, strict=True))


def test_two_processes_answer_what_one_answers(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    options = ["--pairs", "8", "--limit", "9", "--device", "cpu", "--json", "--store"]
    one = json.loads(invoke("classify", runs / "ring", *options, tmp_path / "one").stdout)
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
    paths = os.pathsep.join([str(runs), *(path for path in sys.path if path.endswith("src"))])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [
        "-m",
        "--",
        "cdm_core",
        "oracle",
        "classify",
        str(runs / "ring"),
        *options,
        str(tmp_path / "two"),
    ]
    done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert without_times(json.loads(done.stdout)) == without_times(one)
    assert len(list((tmp_path / "two").glob("race-*/part-*-of-00002.jsonl"))) == 2


@pytest.mark.parametrize("method", ["flat", "stages", "halving", "bayes"])
def test_other_methods(invoke: Invoke, runs: Path, tmp_path: Path, method: str) -> None:
    given = ("classify", runs / "ring", "--method", method, *SMALL, "--store", tmp_path, "--json")
    found = json.loads(invoke(*given).stdout)
    # Halving: all four classes get one pair, two of them a second one. Stages would keep five.
    cost = {"flat": 4 * 16, "bayes": 4 * 3, "halving": 4 + 2, "stages": 4 * 16}[method]
    assert found["evaluations"] == found["class_evaluations"] == cost
    assert found["accuracy"] > (0.4 if method == "halving" else 0.85)
    if method == "flat":
        (part,) = tmp_path.glob("flat-*/part-*.jsonl")
        for row in map(json.loads, part.read_text().splitlines()):
            assert [n for n, _ in row["prefixes"]] == [1, 2, 4, 8, 16]
            assert row["prefixes"][-1][1] == row["label"]


def test_published_stages_bring_their_pairs(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ("classify", runs / "ring", "--method", "stages", "--limit", 3, "--store", tmp_path, "--json")
    settings = json.loads(invoke(*given, "--stages", "pets").stdout)["settings"]
    assert settings["estimator"]["pairs"] == 250
    assert (settings["elimination"]["stage_pairs"], settings["elimination"]["stage_keep"]) == (
        [25, 250],
        [5, 1],
    )


def test_images_from_a_folder_and_a_file(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    """Noisy copies of the ten templates are told apart, whichever way they come."""
    run = load_run(runs / "templates", device="cpu")
    grey = run.model.grey
    order = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    x0 = run.info.to_model(grey[order], None if not run.info.dequantise else _draws(len(order)))
    save_npz(tmp_path / "x.npz", x0, run.info, order, {})
    save_singles(tmp_path / "x", x0, run.info)
    given = ("classify", runs / "templates", *SMALL, "--store", tmp_path / "store", "--input")
    found = json.loads(invoke(*given, tmp_path / "x.npz", "--json").stdout)
    assert found["accuracy"] == 1
    assert [image["predicted"] for image in found["images"]] == order.tolist()
    text = invoke(*given, tmp_path / "x").stdout.splitlines()
    assert [line.split() for line in text[1:9]] == [
        [f"{i:05d}.png", str(y), "-"] for i, y in enumerate(order.tolist())
    ]
    assert text[9].startswith("an image: ")


def _draws(count: int) -> Any:
    from cdm_core.random import Draws

    return Draws(0, count)


# -- evaluate, ablate, ood -----------------------------------------------------------------------------------


def test_evaluate_sets_methods_side_by_side(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ("evaluate", runs / "ring", *SMALL, "--store", tmp_path, "--calibrate", 100)
    found = json.loads(
        invoke(*given, "--method", "flat", "--method", "race", "--method", "bayes", "--json").stdout
    )
    assert found.pop("out") == str(tmp_path)
    assert found == json.loads((tmp_path / "evaluation.json").read_text())
    flat, race, bayes = (found["methods"][name] for name in ("flat", "race", "bayes"))
    assert flat["evaluations"] == 64 > race["evaluations"] > bayes["evaluations"] == 12
    assert all(0 < one["calibration"]["nll"] < 0.5 for one in (flat, race, bayes))
    assert 0 <= race["ece_by_cost"] <= 1
    assert flat["ece_by_cost"] is None
    assert set(flat["error_fit"]) == {"asymptote", "slope", "residual"}
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")

    out = tmp_path / "answers.json"
    hits = {}
    for name in ("race", "bayes"):
        options = ("--method", name, "--calibrate", 100, "--store", tmp_path, "--out", out)
        invoke("classify", runs / "ring", *SMALL, *options)
        answers = json.loads(out.read_text())
        hits[name] = np.array([row["predicted"] == row["label"] for row in answers])
        assert hits[name].mean() == found["methods"][name]["accuracy"]
    assert len(list(tmp_path.glob("race-*"))) == 2  # test and validation split: nothing was asked twice
    (pair,) = (c for c in found["contrasts"] if (c["first"], c["second"]) == ("race", "bayes"))
    assert pair["only_first"] == (hits["race"] & ~hits["bayes"]).sum()
    assert pair["gain"]["mean"] == pytest.approx(hits["bayes"].mean() - hits["race"].mean())

    text = invoke(*given).stdout.splitlines()
    assert text[0] == "test split, 60 images, seed 0; calibrated on 100 held-out images"
    assert [line.split()[0] for line in text[2:4]] == ["race", "bayes"]
    assert text[4].startswith("race: ECE of the probability to be right by what the race cost ")
    assert text[5].startswith("bayes against race: ")


def test_factors_spoil_bayes_until_it_is_centred(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = (
        "classify",
        runs / "ring",
        "--method",
        "bayes",
        "--store",
        tmp_path,
        "--json",
        "--set",
        "bayes.sigmas=[0]",
    )
    raw = json.loads(invoke(*given, "--set", "bayes.centre=none").stdout)
    assert raw["accuracy"] < 0.7
    assert "probability" not in raw["images"][0]
    assert json.loads(invoke(*given).stdout)["accuracy"] > 0.9
    assert len(list(tmp_path.glob("bayes-*"))) == 2  # centring changes no raw answer


def test_evaluate_leaves_out_what_a_run_does_not_allow(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ("evaluate", runs / "templates", *SMALL, "--limit", 4, "--calibrate", 0, "--store", tmp_path)
    found = json.loads(invoke(*given, "--json").stdout)
    assert list(found["methods"]) == ["race"]
    assert found["methods"]["race"]["calibration"] is None
    assert not (tmp_path / "reliability.png").exists()
    assert "log-loss" not in invoke(*given).stdout
    line = error(invoke("evaluate", runs / "blind", "--store", tmp_path, code=2))
    assert "this one has no labels" in line


def test_ablate(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ("ablate", runs / "ring", *SMALL, "--limit", 20, "--store", tmp_path)
    found = json.loads(invoke(*given, "--json").stdout)["techniques"]
    names = list(found)
    assert names[0] == "independent levels"
    assert {"vdC, race", "vdC, stages", "vdC, halving", "exact Bayes", "vdC, antithetic noise"} < set(names)
    assert found["independent levels"]["estimator"]["design"] == "iid"
    assert found["independent levels"]["evaluations"] == 64
    assert found["vdC, race"]["cheaper"] == pytest.approx(64 / found["vdC, race"]["evaluations"])
    assert found["exact Bayes"]["against_first"]["first"] == "independent levels"
    assert json.loads((tmp_path / "ablate.json").read_text())["techniques"] == found

    text = invoke(*given, "--technique", "race", "--technique", "Bayes").stdout.splitlines()
    assert [line.strip().split("  ")[0] for line in text[2:5]] == [
        "independent levels",
        "vdC, race",
        "exact Bayes",
    ]
    assert text[5] == f"wrote {tmp_path / 'ablate.json'}"


def test_ood(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    run = load_run(runs / "ring", device="cpu")
    far = torch.full((10, 2, 1, 1), 30.0) + torch.arange(10.0).view(-1, 1, 1, 1)
    save_npz(tmp_path / "far.npz", far, run.info, None, {})
    given = ("ood", runs / "ring", *SMALL, "--store", tmp_path, "--input", tmp_path / "far.npz")
    found = json.loads(invoke(*given, "--score", "density", "--score", "bound", "--json").stdout)
    assert found.pop("out") == str(tmp_path)
    assert found == json.loads((tmp_path / "ood.json").read_text())
    assert (found["own"], found["other"]) == (60, 10)
    assert (found["scores"]["density"]["auroc"], found["scores"]["density"]["fpr95"]) == (1.0, 0.0)
    text = invoke(*given).stdout.splitlines()
    assert text[0] == f"test split, 60 images, against 10 of {tmp_path / 'far.npz'}"
    assert [line.split()[0] for line in text[2:4]] == ["gap", "density"]
    own = invoke(*given[:-2], "--against", "core/gaussian-mixture", "--limit", 5, "--score", "density").stdout
    assert own.startswith("test split, 5 images, against 5 of core/gaussian-mixture")


# -- what is wrong -------------------------------------------------------------------------------------------


def test_bad_words_are_explained(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    ring, npz = runs / "ring", tmp_path / "bad.npz"
    np.savez(npz, samples=np.zeros((3, 5), dtype=np.float32))
    (tmp_path / "no.npz").write_bytes(b"nothing")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("classify", ring, "--out", "a.txt"), "the name must end in .csv or .json"),
        (("classify", ring, "--shard", "3/2"), "--shard '3/2' is no part of a whole"),
        (("classify", ring, "--set", "elimination.rule=race"), "say --method, which chooses the rule"),
        (("classify", ring, "--set", "estimater.pairs=3"), "did you mean estimator?"),
        (("classify", ring, "--set", "estimator.pear=3"), "unknown key 'estimator.pear'"),
        (("classify", ring, "--set", "elimination.alpha=2"), "alpha must lie in [0, 0.5), not 2"),
        (("classify", ring, "--stages", "pets"), "--stages belongs to --method stages, not to race"),
        (("classify", ring, "--method", "stages", "--stages", "pet"), "did you mean pets?"),
        (("classify", ring, "--method", "stages", "--stages", "pets", "--pairs", 9), "give no other"),
        (
            ("classify", ring, "--method", "bayes", "--calibrate", 0),
            "exact Bayes is centred on held-out images",
        ),
        (("classify", runs / "templates", "--input", tmp_path / "none"), "is not a folder"),
        (
            ("classify", ring, "--input", npz),
            "samples are (3, 5) float32, and the run's data are (N, 2) float32",
        ),
        (("classify", ring, "--input", tmp_path / "no.npz"), "is no .npz with an array `samples`"),
        (("classify", runs / "templates", "--method", "bayes"), "needs `log_density`"),
        (("classify", runs / "blind", "--limit", 2), "this one has no labels"),
        (("classify", tmp_path / "none"), "is not a run: it does not exist"),
        (
            ("ablate", ring, "--technique", "magic"),
            "--technique 'magic' is in no name: choose of independent",
        ),
        (("ood", ring), "--against DATA, or --input FOLDER, one of them"),
        (("ood", ring, "--against", "digits"), "the run takes (C, H, W) (2, 1, 1)"),
        (("ood", ring, "--input", npz, "--against", "digits"), "one of them"),
        (("ood", runs / "ring", "--score", "corrected", "--against", "core/gaussian-mixture"), "grey levels"),
        (("ood", runs / "templates", "--against", "digits"), 'trained with "no class" among its labels'),
    ]
    for words, says in cases:
        line = error(invoke(*words, "--store", tmp_path / "store", code=2))
        assert says in line, (words, line)


def test_help_needs_no_torch(runs: Path) -> None:
    code = (
        "import sys; from cdm_plugins_zeroshot import commands; from click.testing import CliRunner; "
        "results = [CliRunner().invoke(getattr(commands, name), ['--help']) "
        "for name in ('classify', 'evaluate', 'ablate', 'ood')]; "
        "assert all(result.exit_code == 0 for result in results), results; assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- the folder of answers -----------------------------------------------------------------------------------


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    results, values = Results(tmp_path, {"a": 1}), torch.rand(5, dtype=torch.float64).tolist()
    results.writer(Shard()).add([{"image": 3, "scores": values}, {"image": 1, "scores": [1e-310]}])
    assert list(results.rows()) == [1, 3]
    assert results.rows()[3]["scores"] == values
    assert results.missing([0, 1, 2, 3]) == [0, 2]
    assert Results(tmp_path, {"a": 1}).rows() == results.rows()


def test_other_settings_and_damage_are_told(tmp_path: Path) -> None:
    results = Results(tmp_path, {"a": 1})
    with pytest.raises(UserError, match="holds answers under other settings"):
        Results(tmp_path, {"a": 2})
    with pytest.raises(UserError, match="no numbers cannot be written down"):
        digest({"a": float("nan")})
    part = tmp_path / "part-00001-of-00001.jsonl"
    part.write_text('{"image": 0}\nrubbish\n{"image": 1}\n')
    with pytest.raises(UserError, match=r"part-00001-of-00001.jsonl, line 2, is no answer"):
        results.rows()


def test_shards_are_parts_of_a_whole() -> None:
    for count in (1, 3, 7):
        parts = [Shard(index, count).share(5) for index in range(1, count + 1)]
        assert [image for part in parts for image in part] == list(range(5))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Shard.parse("2/4") == Shard(2, 4)
    for text in ("2", "0/4", "5/4", "a/b", "-1/2", "1/2/3", ""):
        with pytest.raises(UserError, match="write 2/4 for the second of four"):
            Shard.parse(text)


def test_answers_of_other_weights_are_others(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    model = load_run(runs / "templates", device="cpu").model
    before = fingerprint(model)
    assert fingerprint(load_run(runs / "templates", device="cpu").model) == before
    model.grey[0, 0, 0, 0] += 1
    assert fingerprint(model) != before
    given = ("classify", "--limit", 2, *SMALL, "--json", "--store", tmp_path)
    invoke(*given, runs / "templates")
    copy = tmp_path / "copy"
    shutil.copytree(runs / "templates", copy)
    invoke(*given, copy)
    assert len(list(tmp_path.glob("race-*"))) == 1  # the same weights, wherever they lie


def test_settings_of_a_method_are_those_that_decide() -> None:
    """What another rule would heed, or how many images share a batch, makes no other answers of `flat`."""
    flat = choose("flat", ["elimination.alpha=0.1", "estimator.in_flight=2"]).settings()
    assert flat == choose("flat").settings()
    assert choose("race", ["elimination.alpha=0.1"]).settings() != choose("race").settings()
    assert choose("flat", seed=1).settings() != flat
    assert choose("bayes", ["bayes.centre=none"]).settings() == choose("bayes").settings()


def test_a_runs_own_settings_lie_under_what_is_said() -> None:
    """Of a recipe's adapter: all but its seed, and but for what belongs to another rule or other pairs."""
    own = ClassifierConfig(
        EstimatorConfig(pairs=50, loss="l1", seed=7),
        EliminationConfig(rule="stages", stage_pairs=(10, 50), stage_keep=(3, 1), confidence=0.9),
    )
    assert (default_name(own), default_name(None)) == ("stages", "race")
    stages = choose("stages", base=own, seed=2)
    assert (stages.estimator.pairs, stages.estimator.loss, stages.estimator.seed) == (50, "l1", 2)
    assert (stages.elimination.stage_pairs, stages.elimination.stage_keep) == ((10, 50), (3, 1))
    race = choose("race", ["estimator.loss=l2"], base=own)
    assert (race.elimination.rule, race.elimination.stage_pairs) == ("race", ())
    assert (race.estimator.loss, race.elimination.confidence) == ("l2", 0.9)
    shorter = choose("stages", base=own, pairs=40)
    assert (shorter.elimination.stage_pairs, shorter.elimination.stage_keep) == ((4, 40), (5, 1))
    published = choose("stages", base=own, stages="pets")
    assert published.elimination.stage_pairs == (25, 250)
    assert choose("bayes", base=own).bayes == choose("bayes").bayes
