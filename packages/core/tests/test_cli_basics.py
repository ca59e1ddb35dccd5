"""The command line itself: lazy, one line for what the caller can mend, plugins mounted."""

import errno
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from cdm_core import UserError, cli, hookimpl
from cdm_core.commands import COMMANDS
from cdm_core.commands.common import pick_device
from cdm_core.manager import load_registry
from cdm_core.testing.plugins import BROKEN, GOOD, FakePlugin, installed

COMMANDED = FakePlugin(
    "toy",
    """
    import click

    @click.command()
    @click.option("--times", type=int, default=1)
    @click.pass_obj
    def greet(session, times):
        click.echo("hello " * times + str(session.plugins))

    @click.command()
    def other():
        click.echo("other of toy")

    not_a_command = 3

    @hookimpl
    def register_commands():
        return [
            Command("greet", "Says hello.", __name__ + ":greet"),
            Command("other", "Is in two plugins.", __name__ + ":other"),
            Command("broken", "Is no command.", __name__ + ":not_a_command"),
            Command("train", "Has a name of core's.", __name__ + ":other"),
        ]
    """,
)
SECOND = FakePlugin(
    "second",
    """
    import click

    @click.command()
    def other():
        click.echo("other of second")

    @hookimpl
    def register_commands():
        return [Command("other", "Is in two plugins.", __name__ + ":other")]
    """,
)


def run(*args):
    return CliRunner().invoke(cli.cli, args)


def failing(error):
    """A command that raises `error`."""

    @click.command()
    def command():
        raise error

    return command


def fails(monkeypatch, error):
    monkeypatch.setattr(cli, "_load", lambda target: failing(error))
    return run("doctor")


HEAVY = (
    "[m for m in ('torch', 'triton', 'torchvision', 'accelerate', 'numpy', 'matplotlib') if m in sys.modules]"
)


@pytest.mark.parametrize("args", ["--help", "--version", "plugins --json", "recipes --json", "recipes"])
def test_light_commands_never_import_torch(args):
    code = (
        f"import sys, io, contextlib; from cdm_core import cli; sys.argv = ['cdm-run', *'{args}'.split()]\n"
        "out = io.StringIO()\n"
        "try:\n"
        "    with contextlib.redirect_stdout(out): cli.main()\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        f"print(len(out.getvalue()) > 10, {HEAVY})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("True []", 0), done.stderr


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    assert run().stdout == result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_of_its_own(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert cli._load(COMMANDS[name][0]).name == name


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "Error: unknown command 'trian': did you mean train? (known: "),
        (["plugins", "--jsno"], "Error: No such option"),
        (["new-plugin"], "Error: Missing argument 'NAME' (see `cli new-plugin --help`)"),
        (["--plugin", "croe", "plugins"], "Error: unknown plugin 'croe': did you mean core?"),
        (["recipes", "nothing"], "Error: unknown recipe 'nothing'"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("two\nlines"), 2, "Error: two lines\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/a"),
            2,
            "Error: run/a: No space left on device: ",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/r"), 2, "Error: /r: Read-only file system: "),
        (PermissionError(errno.EACCES, "Permission denied", "/r"), 2, "Error: /r: Permission denied: "),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2, "Error: x: No such file"),
        (click.ClickException("no"), 2, "Error: no\n"),
        (click.Abort(), 130, "Error: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_that_the_caller_can_mend(monkeypatch, error, code, message):
    result = fails(monkeypatch, error)
    assert result.exit_code == code
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_interrupt_is_130_without_traceback(monkeypatch):
    result = fails(monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr.strip() == "Error: interrupted"


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError(errno.EIO, "I/O error"), TypeError("a bug")]
)
def test_bugs_are_not_hidden(monkeypatch, error):
    assert fails(monkeypatch, error).exception is error


def test_what_a_command_returns_is_no_exit_code(monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda target: click.Command("x", callback=lambda: 7))
    assert run("doctor").exit_code == 0
    exits = click.Command("x", callback=click.pass_context(lambda context: context.exit(1)))
    monkeypatch.setattr(cli, "_load", lambda target: exits)
    assert run("doctor").exit_code == 1


def test_real_file_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("new-plugin", "toy", "--out", str(tmp_path / "file" / "toy"))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {tmp_path}")
    assert result.stderr.endswith(": Not a directory\n")


def test_commands_of_plugins(tmp_path):
    with installed(tmp_path, COMMANDED, SECOND):
        assert re.search(r"^  toy +broken, greet, other, train$", run("--help").stdout, re.MULTILINE)
        assert "Says hello." in run("toy").stdout
        assert run("toy", "greet", "--times", "2").stdout == "hello hello ()\n"
        assert run("--plugin", "toy", "greet").stdout == "hello ('toy',)\n"
        assert run("greet").stdout == "hello ()\n"
        assert run("--plugin", "second", "other").stdout == "other of second\n"
        assert run("toy", "train").stdout == "other of toy\n"
        assert "could be second/other or toy/other" in run("other").stderr
        assert run("toy", "nothing").exit_code == 2
        assert "not a click.Command" in run("toy", "broken").stderr
        assert "unknown command 'greet'" in run("--no-plugins", "greet").stderr
        assert "toy greet" not in run("--no-plugins", "--help").stdout


def test_plugins_lists_the_failed_with_their_error(tmp_path):
    with installed(tmp_path, GOOD, *BROKEN):
        result = run("plugins")
        rows = {row["name"]: row for row in json.loads(run("plugins", "--json").stdout)}
    assert result.exit_code == 0
    assert f"{len(BROKEN)} of " in result.stderr
    for broken in BROKEN:
        assert broken.says in result.stdout
        row = rows[broken.name]
        assert (row["status"], row["distribution"], row["version"]) == ("failed", broken.project, "1.2.3")
        assert broken.says in row["error"]
    assert rows["good"]["components"] == {"model": ["good/net"], "objective": ["good/l2", "good/mse"]}
    assert rows["good"]["error"] is None


def test_failed_plugin_asked_for_says_why(tmp_path):
    with installed(tmp_path, BROKEN[0]):
        result = run("--plugin", "import-fails", "recipes")
    assert result.exit_code == 2
    assert "plugin 'import-fails' (fake-import-fails 1.2.3) failed: cannot be imported" in result.stderr


def test_console_script_shows_warnings_in_one_line(tmp_path):
    half = FakePlugin(
        "half", GOOD.source + "\n    @hookimpl\n    def register_metrics():\n        return 3\n"
    )
    with installed(tmp_path, half):
        done = subprocess.run(
            [sys.executable, "-m", "cdm_core", "--plugin", "half", "recipes"],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stderr.startswith(
        "Warning: plugin 'half' (fake-half 1.2.3) failed: register_metrics returned 3"
    )
    assert done.stderr.count("\n") == 1


def test_recipes(monkeypatch):
    from cdm_core.manager import Registry
    from cdm_core.records import Model, Objective, Recipe

    values = {"model": "net", "objective": "loss", "data": "digits", "sampler": "ddim", "seed": 5}
    toy = SimpleNamespace(
        register_models=hookimpl(lambda: [Model("net", "", "torch.nn:Linear")]),
        register_objectives=hookimpl(lambda: [Objective("loss", "", "torch.nn:Linear")]),
        register_recipes=hookimpl(lambda: [Recipe("default", "A toy", values)]),
    )
    registry = Registry.of({"toy": toy})
    monkeypatch.setattr("cdm_core.manager.load_registry", lambda no_plugins: registry)
    assert run("recipes").stdout == "toy/default  A toy\n"
    assert json.loads(run("recipes", "--json").stdout) == [{"name": "toy/default", "summary": "A toy"}]
    assert (
        'recipe = "toy/default"\nseed = 5\n\n[model]\nname = "toy/net"\n' in run("recipes", "default").stdout
    )
    assert json.loads(run("recipes", "default", "--json").stdout)["data"]["valid"] > 0


def test_doctor(tmp_path):
    findings = json.loads(run("--no-plugins", "doctor", "--json").stdout)
    assert {"python", "torch", "cuda", "torchvision", "triton", "cpu threads", "disk"} <= {
        f["name"] for f in findings
    }
    assert all(f["status"] in ("ok", "warn", "fail") for f in findings)
    assert all(f["advice"] for f in findings if f["status"] != "ok")
    with installed(tmp_path, BROKEN[0]):
        result = run("doctor")
    assert result.exit_code == 1
    assert "fail  plugin import-fails: fake-import-fails 1.2.3: cannot be imported" in result.stdout


def test_doctor_says_which_kernels_serve(monkeypatch):
    from cdm_kernels import cpp

    def line() -> str:
        return next(line for line in run("doctor").stdout.splitlines() if "cdm-kernels" in line)

    if cpp.library():
        assert line().startswith("ok ")
        assert f"C++ kernels for {cpp.library().level} from" in line()
    monkeypatch.setattr(cpp, "library", lambda: None)
    monkeypatch.setattr(cpp, "problem", lambda: "no C++ compiler")
    assert line().startswith("warn")
    assert line().endswith(
        "slower: no C++ compiler; install a C++ compiler, then run python -m cdm_kernels.build"
    )
    monkeypatch.setattr(cpp, "problem", lambda: "switched off by CDM_KERNELS_CPP=0")
    assert line().endswith("switched off by CDM_KERNELS_CPP=0; unset it to have them")


def test_pick_device(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (pick_device("auto"), pick_device("cpu")) == ("cpu", "cpu")
    with pytest.raises(UserError, match="no CUDA device here; use --device cpu or auto"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (pick_device("auto"), pick_device("cpu"), pick_device("cuda")) == ("cuda", "cpu", "cuda")


def test_registry_is_cached():
    assert load_registry() is load_registry()
