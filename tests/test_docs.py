"""What the documents say is so: hook signatures, and the commands that the README shows."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cdm_core import hookspecs
from cdm_core.cli import cli

ROOT = Path(__file__).parents[1]
HOOKS = {
    name: item
    for name, item in vars(hookspecs).items()
    if inspect.isfunction(item) and name.startswith(("register_", "on_"))
}


def test_every_hook_has_its_signature_as_a_heading() -> None:
    text = (ROOT / "packages/core/README.md").read_text()
    written = re.findall(r"^### `(.+)`$\n\n(.+)$", text, flags=re.MULTILINE)
    assert written == [
        (f"{name}{inspect.signature(hook)}", inspect.getdoc(hook)) for name, hook in HOOKS.items()
    ]
    assert len(HOOKS) <= 12


def commands(document: Path) -> list[str]:
    """Every `cdm-run ...` line in the shell blocks of a document, continuation lines joined."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", document.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip().removeprefix("$ ") for line in lines if "cdm-run " in line]


DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
SHOWN = [(str(path.relative_to(ROOT)), line) for path in DOCUMENTS for line in commands(path)]


@pytest.mark.parametrize(("document", "line"), SHOWN)
def test_every_shown_command_parses(document: str, line: str) -> None:
    """The words exist: each command's options and arguments are accepted (nothing is run)."""
    words = shlex.split(line)
    words = words[words.index("cdm-run") + 1 :]
    context = cli.make_context("cdm-run", words, resilient_parsing=True)
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, sub, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert sub is not None, f"{document}: {line}"
        try:
            context = sub.make_context(
                name, rest, parent=context, resilient_parsing=isinstance(sub, click.Group)
            )
        except click.UsageError as error:
            pytest.fail(f"{document}: {line}\n{error.format_message()}")
        command = sub


def test_help_is_one_screen_that_names_every_command() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    for name in (
        "train",
        "sample",
        "likelihood",
        "evaluate",
        "classify",
        "report",
        "plugins",
        "recipes",
        "doctor",
    ):
        assert re.search(rf"^  {name} +\S", result.output, flags=re.MULTILINE), name
    assert len(result.output.splitlines()) < 40
