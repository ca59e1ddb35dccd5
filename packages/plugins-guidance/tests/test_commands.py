"""The commands: words, files, JSON, and one line with exit code 2 for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cdm_core.cli import cli

EXACT = ("--adapter", "guide", "--set", "adapter.look=x_t")
Invoke = Callable[..., Result]


@pytest.fixture
def invoke(runs: Path) -> Invoke:
    """`cdm-run guidance ...` in this process; the exit code is checked."""

    def run(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(cli, ["guidance", *(str(word) for word in words)])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return run


def error(result: Result) -> str:
    """The one line of an error."""
    (line,) = result.stderr.strip().splitlines()
    return line


def test_compare(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--judge", runs / "judge", "--num", 20, "--seed", 3, *EXACT]
    found = json.loads(invoke("compare", runs / "ring", *given, "--out", out, "--json").stdout)
    assert [row["name"] for row in found["rows"]] == ["training images", "unguided", "guided"]
    assert found.pop("out") == str(out)
    assert found == json.loads((out / "compare.json").read_text())
    assert (found["num"], found["seed"], found["split"], found["judge_step"]) == (20, 3, "test", 10)

    text = invoke("compare", runs / "ring", *given, "--conditional", runs / "known")
    head, columns, *lines, last = text.stdout.splitlines()
    assert head == "test split, 20 samples each, seed 3"
    assert columns.split() == ["target", "rate", "confidence", "Fréchet", "precision", "recall", "s/image"]
    assert [line.split()[0] for line in lines] == ["training", "unguided", "guided", "class-conditional"]
    assert last == f"wrote {runs / 'ring' / 'compare' / 'compare.json'} and pictures beside it"
    assert text.stderr.split() == ["unguided", "guided", "class-conditional"]


def test_calibrate(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ["--num", 200, "--levels", 3, "--look", "x_t", "--look", "x0", "--tau", "1,3", *EXACT]
    found = json.loads(invoke("calibrate", runs / "line", *given, "--out", tmp_path, "--json").stdout)
    assert found.pop("out") == str(tmp_path)
    assert found == json.loads((tmp_path / "calibration.json").read_text())
    assert [(c["look"], c["softplus"], c["tau"]) for c in found["curves"]] == [
        ("x_t", None, 1.0),
        ("x_t", None, 3.0),
        ("x0", None, 1.0),
        ("x0", None, 3.0),
    ]
    calibrated, overconfident = (c["integral_ece"] for c in found["curves"][:2])
    assert calibrated < overconfident
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")

    text = invoke("calibrate", runs / "line", "--num", 50, "--levels", 2, *EXACT).stdout.splitlines()
    assert text[0] == "test split, 2 levels, 15 bins, seed 0; over the levels:"
    assert text[1].split() == ["accuracy", "confidence", "integral", "ECE", "its", "floor"]
    assert [line.split(",")[0].strip() for line in text[2:4]] == ["x0", "rms"]
    assert (runs / "line" / "calibration" / "calibration.json").is_file()


def test_tune_gives_flags_that_sample_takes(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ["--judge", runs / "judge", "--softplus", "inf", "--tau2", "1", "--num", 100, "--levels", 2]
    search = [*EXACT, "--set", "adapter.scale=8", "--scale", "0.5,1", "--rate", 0.5, "--out", tmp_path]
    text = invoke("tune", runs / "ring", *given, *search)
    lines = text.stdout.splitlines()
    assert lines[0] == "tried, the run's own settings first:"
    assert [line.split()[:3] for line in lines[2:5]] == [["ReLU", "1", s] for s in ("8", "0.5", "1")]
    assert lines[-2] == f"wrote {tmp_path / 'tune.json'}"
    assert "calibration" in text.stderr
    assert "candidate 1 of 3: softplus inf, tau2 1, scale 8" in text.stderr

    again = invoke("tune", runs / "ring", *given, *search, "--json")
    found = json.loads(again.stdout)
    assert again.stderr == ""
    assert lines[-1] == "best: " + " ".join(found["flags"])
    assert found["best"]["softplus"] is None
    flags = [word for flag in found["flags"] for word in flag.split(" ")]
    assert flags[:6] == [*EXACT, "--set", "adapter.scale=8"]
    drawn = CliRunner().invoke(cli, ["sample", str(runs / "ring"), "--num", "2", *flags, "--json"])
    assert json.loads(drawn.stdout)["adapter"]["scale"] == found["best"]["scale"]


def test_tune_says_what_it_leaves_out_and_misses(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    named = [*EXACT, "--set", f"adapter.classifier.name=run:{runs / 'known'}"]
    given = [
        "--judge",
        runs / "judge",
        "--tau2",
        "1",
        "--scale",
        "0.1",
        "--rate",
        1,
        "--num",
        20,
        "--levels",
        1,
    ]
    text = invoke("tune", runs / "ring", *given, *named, "--out", tmp_path)
    assert "left out softplus 3: classifier" in text.stderr
    assert "no candidate has a target rate of 1: the best is the one of the highest" in text.stdout


def test_ablate(invoke: Invoke, runs: Path, tmp_path: Path, network_name: str) -> None:
    classifier = [f"name={network_name}", "shape=[2,1,1]", "softplus=3"]
    settings = ["adapter.gamma=0", *(f"adapter.classifier.{one}" for one in classifier)]
    elucd = ["--adapter", "elucd", *(word for one in settings for word in ("--set", one))]
    given = ["--judge", runs / "judge", "--num", 30, "--seeds", 2, *elucd, "--out", tmp_path]
    found = json.loads(invoke("ablate", runs / "ring", *given, "--json").stdout)
    names = [effect["name"] for effect in found["effects"]]
    assert names[:4] == ["guided", "unguided", "without look", "without softplus"]
    assert found["absent"]["sine"] == "there is no sine already"
    kept = json.loads((tmp_path / "ablate.json").read_text())
    assert kept["effects"] == found["effects"]
    assert kept["seeds"] == [0, 2]

    text = invoke("ablate", runs / "ring", *given).stdout.splitlines()
    assert text[0] == "test split, 30 samples each, 2 seeds from 0; +- standard error over seeds"
    assert "+-" in text[2]
    assert text[2 + len(names)] == "less the whole guide, seed by seed:"
    assert "not taken out: sine, since there is no sine already" in text
    assert text[-1] == f"wrote {tmp_path / 'ablate.json'}"


@pytest.mark.parametrize("command", ["compare", "tune", "ablate"])
def test_without_a_judge_there_is_no_verdict(invoke: Invoke, runs: Path, command: str) -> None:
    line = error(invoke(command, runs / "ring", *EXACT, code=2))
    assert line.startswith("Error: a guide cannot judge itself: give --judge RUN")
    line = error(invoke(command, runs / "ring", *EXACT, "--judge", runs / "ring", code=2))
    assert "has a part in the sampling, and a guide cannot judge itself" in line
    assert "no guide: say --adapter" in error(
        invoke(command, runs / "ring", "--judge", runs / "judge", code=2)
    )
    line = error(invoke(command, runs / "ring", *EXACT, "--judge", runs / "judge", "--num", 1, code=2))
    assert line == "Error: --num 1: a judge needs 5 samples or more"


def test_bad_words_are_explained(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    ring, judge = runs / "ring", ("--judge", runs / "judge")
    cases = [
        (("calibrate", ring, *EXACT, "--softplus", "3,x"), "'3,x' is no list of numbers, as in 0.5,1,2"),
        (("calibrate", ring, *EXACT, "--tau", "nan"), "holds a nan"),
        (("calibrate", ring, *EXACT, "--softplus", "0"), "softplus must be above 0"),
        (("calibrate", ring), "is sampled through no guide: say --adapter NAME"),
        (("calibrate", tmp_path / "none", *EXACT), "is not a run: it does not exist"),
        (("tune", ring, *EXACT, *judge, "--keep", 0), "--keep must be at least 1"),
        (("tune", ring, *EXACT, *judge, "--scale", "0"), "--scale must be finite and not 0"),
        (("ablate", ring, *EXACT, *judge, "--seeds", 0), "--seeds 0: ask for at least 1"),
        (("compare", ring, *EXACT, *judge, "--conditional", ring), "is an unconditional run"),
        (("compare", ring, *EXACT, "--set", "adapter.nome=1", *judge), "unknown key 'adapter.nome' in --set"),
        (("compare", ring, "--set", "adapter.nome=1", *judge), "adapter.name is missing: say --set adapter"),
    ]
    for words, says in cases:
        assert says in error(invoke(*words, code=2)), words


@pytest.mark.parametrize(
    ("command", "few"),
    [
        ("tune", ["--softplus", "inf", "--tau2", "1", "--scale", "1", "--levels", "1"]),
        ("ablate", ["--seeds", 1]),
    ],
)
def test_findings_of_other_weights_are_not_gone_on_from(
    invoke: Invoke, runs: Path, tmp_path: Path, command: str, few: list[object]
) -> None:
    given = [command, runs / "ring", *EXACT, "--judge", runs / "judge", *few, "--num", 8, "--out", tmp_path]
    invoke(*given)
    line = error(invoke(*given, "--weights", "model", code=2))
    assert line.endswith("was found with another weights: delete it, or give another --out")


def test_gradients_that_are_not_finite_are_told(
    invoke: Invoke, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdm_plugins_guidance.guide.Guide.skipped", property(lambda guide: next(count)))
    count = iter([0, 7])
    given = ["--judge", runs / "judge", "--num", 8, *EXACT, "--out", tmp_path]
    text = invoke("compare", runs / "ring", *given)
    says = "guided: 7 gradients of the guide, one an image and step, were not finite and moved nothing"
    assert text.stderr.splitlines()[-1] == says
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [row["skipped"] for row in rows] == [None, None, 7]


def test_a_file_of_other_settings_is_kept(invoke: Invoke, runs: Path, tmp_path: Path) -> None:
    given = ["ablate", runs / "ring", *EXACT, "--judge", runs / "judge", "--seeds", 1, "--out", tmp_path]
    invoke(*given, "--num", 8)
    before = (tmp_path / "ablate.json").read_bytes()
    line = error(invoke(*given, "--num", 9, code=2))
    assert line.endswith("was found with another num: delete it, or give another --out")
    assert (tmp_path / "ablate.json").read_bytes() == before
