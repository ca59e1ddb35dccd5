"""The command line `cdm-run`: finds commands by name and imports only the one that is run."""

from __future__ import annotations

import errno
import importlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import click

from cdm_core import __version__
from cdm_core.commands import COMMANDS
from cdm_core.commands.common import Session
from cdm_core.errors import UserError
from cdm_core.memory import keep_freed_memory


def _load(target: str) -> click.Command:
    module, _, attribute = target.partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


def _session(context: click.Context) -> Session:
    """The session of an invocation; made here since click looks commands up before it runs the callback."""
    root = context.find_root()
    if root.obj is None:
        root.obj = Session(tuple(root.params.get("plugin") or ()), bool(root.params.get("no_plugins")))
    session: Session = root.obj
    context.obj = session
    return session


class PluginGroup(click.Group):
    """`cdm-run PLUGIN ...`: the commands that one plugin registered, each imported when invoked."""

    def __init__(self, name: str, records: dict[str, Any]) -> None:
        super().__init__(
            name=name,
            help=f"Commands of the plugin {name!r}.",
            invoke_without_command=True,
            callback=_show_help,
        )
        self._records = records

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._records)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        record = self._records.get(cmd_name)
        return _checked(record.load(), cmd_name) if record else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _section(formatter, "Commands", [(name, r.summary) for name, r in sorted(self._records.items())])


class Root(click.Group):
    """The group `cdm-run`: core's commands, then a group for each plugin that registers commands.

    A plugin's command is also found by its bare name where that is unique or `--plugin` picks it.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *self._plugin_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        session = _session(ctx)
        if cmd_name in COMMANDS:
            return _load(COMMANDS[cmd_name][0])
        groups = self._plugin_commands(ctx)
        if cmd_name in groups:
            return PluginGroup(cmd_name, groups[cmd_name])
        if not any(cmd_name in records for records in groups.values()):
            return None
        full, record = session.registry.find("command", cmd_name, session.plugins)
        return _checked(record.load(), full)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        groups = self._plugin_commands(ctx) if args[0] not in COMMANDS else {}
        known = {*COMMANDS, *groups, *(name for records in groups.values() for name in records)}
        if args[0] not in known:
            from cdm_core.manager import did_you_mean

            raise UserError(f"unknown command {args[0]!r}{did_you_mean(args[0], known)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        super().invoke(ctx)  # what a command returns is no exit code, as click would take it to be in `main`

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _section(formatter, "Commands", [(name, line) for name, (_, line) in COMMANDS.items()])
        groups = self._plugin_commands(ctx).items()
        rows = [(plugin, ", ".join(records)) for plugin, records in groups if records]
        _section(formatter, "Commands of plugins (cdm-run PLUGIN --help says more)", rows)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> NoReturn:
        """Run and exit: 0, or 2 with one line on stderr for what the caller can mend, or 130 on Ctrl-C."""
        try:
            sys.exit(super().main(args, *rest, **{**options, "standalone_mode": False}) or 0)
        except UserError as error:
            _fail(str(error))
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "cdm-run"
            _fail(f"{error.format_message().rstrip('.')} (see `{path} --help`)")
        except click.ClickException as error:
            _fail(error.format_message())
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted", code=130)
        except OSError as error:
            if error.errno not in _MENDABLE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror}{_MENDABLE[error.errno]}")

    def _plugin_commands(self, ctx: click.Context) -> dict[str, dict[str, Any]]:
        """Plugin -> name -> command record."""
        groups: dict[str, dict[str, Any]] = {}
        for full, record in _session(ctx).registry.components("command").items():
            plugin, _, name = full.partition("/")
            groups.setdefault(plugin, {})[name] = record
        return groups


# What the caller can mend about a file -> what to do.
_MENDABLE: dict[int | None, str] = {
    errno.ENOSPC: ": free some space or write elsewhere",
    errno.EDQUOT: ": free some space or write elsewhere",
    errno.EROFS: ": write elsewhere",
    errno.EACCES: ": change its permissions or write elsewhere",
    errno.EPERM: ": change its permissions or write elsewhere",
    errno.ENOENT: "",
    errno.EEXIST: "",
    errno.ENOTDIR: "",
    errno.EISDIR: "",
    errno.ENOTEMPTY: "",
    errno.ENAMETOOLONG: "",
}


def _fail(message: str, code: int = 2) -> NoReturn:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _section(formatter: click.HelpFormatter, title: str, rows: Iterable[tuple[str, str]]) -> None:
    rows = list(rows)
    if rows:
        with formatter.section(title):
            formatter.write_dl(rows)


def _checked(command: object, name: str) -> click.Command:
    if not isinstance(command, click.Command):
        raise UserError(f"command {name!r}: its target is {command!r:.80}, not a click.Command")
    return command


@click.pass_context
def _show_help(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@click.group(cls=Root, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--plugin",
    metavar="NAME",
    multiple=True,
    is_eager=True,  # so that `--help` after it knows
    help="Take bare names from this plugin first; may be given several times.",
)
@click.option("--no-plugins", is_flag=True, is_eager=True, help="Leave every plugin but core's own out.")
@click.version_option(__version__, prog_name="cdm-run")
@click.pass_context
def cli(context: click.Context, plugin: tuple[str, ...], no_plugins: bool) -> None:
    """Train, sample and score generative models; each method is a plugin.

    \b
    cdm-run plugins                          what is installed
    cdm-run --plugin NAME train --out RUN    train NAME's default recipe
    cdm-run report RUN                       look at it
    """
    _session(context)
    context.invoke(_show_help)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"Warning: {message}\n"


def main() -> NoReturn:
    """The console script."""
    # A user of the command line wants the sentence, not the line of source that uttered it.
    warnings.formatwarning = _format_warning
    keep_freed_memory()
    cli.main()
