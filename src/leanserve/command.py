"""The command line as click knows it: every option is made from a field of the settings.

Nothing here knows what they mean. Most starts do without this module, and without click: see cli.recognise.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field
from typing import Any

import click

from leanserve import __version__
from leanserve.errors import SettingsError
from leanserve.option import Option, kind_of
from leanserve.settings import options
from leanserve.sources import FALSE, TRUE

__all__ = ["build_command"]

# Options of uvicorn that are not settings here: values that say what we do anyway, and what to use else.
_FOREIGN: dict[str, tuple[tuple[str, ...], str]] = {
    "--http": (("auto", "h11"), "there is one HTTP implementation, built on h11; leave it out"),
    "--http2": ((), "HTTP/2 is not spoken; put a proxy in front that speaks it"),
    "--ws": (("auto", "wsproto"), "there is one WebSocket implementation, built on wsproto; leave it out"),
    "--ws-max-queue": ((), "messages are bounded in bytes; use --receive-high-water and --ws-max-size"),
    "--reset-contextvars": ((), "every request has its own copy of the context after startup; leave it out"),
    "--timeout-worker-healthcheck": ((), "a worker is judged by its exit, not by a ping; leave it out"),
    "--ssl-version": (("17",), "use --ssl-min-version 1.2 or 1.3"),
}
_FOREIGN_FLAGS = ("--http2", "--reset-contextvars")

EPILOG = """\
Every option is also an environment variable: LEANSERVE_ and its name, as in LEANSERVE_KEEP_ALIVE_TIMEOUT=30;
APP is LEANSERVE_APP. The command line wins, then the environment, then leanserve.toml or [tool.leanserve] of
pyproject.toml in the working directory: workers = 4, app = "main:app". Sizes may be written 64k, 16m or 1g.
"leanserve config" and the same options prints every value and where it comes from. Exit codes: 0 stopped,
2 wrong setting, 3 could not start, 4 workers crash again and again.

leanserve ctl --help and leanserve top --help tell of running servers."""


class _SettingOption(click.Option):
    """An option that is a setting. click hands the text through; leanserve.option reads it."""

    def __init__(self, group: str, item: Field[Any], facts: Option) -> None:
        kind = kind_of(item)
        names = [f"--{name.replace('_', '-')}" for name in (item.name, *facts.aliases)]
        if kind == "bool":
            names = [f"{name}/--no-{name[2:]}" for name in names]
        more: dict[str, Any] = (
            {"type": bool} if kind == "bool" else {"type": str, "metavar": _metavar(kind, facts)}
        )
        super().__init__(
            [item.name, *names], default=None, multiple=kind == "tuple", help=_help(item, facts), **more
        )
        self.group = group


class _Command(click.Command):
    """Groups the help as the settings are grouped, and takes ``--switch true`` as uvicorn does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite ``--switch false`` to ``--no-switch`` and refuse uvicorn's foreign options, then parse."""
        return super().parse_args(ctx, list(_refuse_foreign(_plain_switches(args))))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group of settings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "group", "General"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=34)


def _metavar(kind: str, facts: Option) -> str:
    if facts.choices and kind != "int":
        return f"[{'|'.join(facts.choices)}]"
    word = {"seconds": "SECONDS", "bytes": "BYTES", "octal": "MODE"}.get(facts.unit)
    word = word or {"int": "NUMBER", "float": "NUMBER"}.get(kind, "TEXT")
    return "|".join((word, *facts.choices))


def _help(item: Field[Any], facts: Option) -> str:
    value = item.default
    if value is None or value in ((), ""):
        return facts.help
    if isinstance(value, bool):
        shown = "on" if value else "off"
    elif isinstance(value, tuple):
        shown = " ".join(value)
    elif facts.unit == "octal":
        shown = f"{value:o}"
    else:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
    unit = f" {facts.unit}" if facts.unit in ("seconds", "bytes") else ""
    return f"{facts.help}  [default: {shown}{unit}]"


def _switches() -> set[str]:
    names: set[str] = set()
    for _, item, facts in options():
        if kind_of(item) == "bool":
            names.update(f"--{name.replace('_', '-')}" for name in (item.name, *facts.aliases))
    return names


def _plain_switches(args: Sequence[str]) -> Iterator[str]:
    """uvicorn writes ``--ws-per-message-deflate false``, click wants ``--no-ws-per-message-deflate``."""
    switches, rest = _switches(), list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            yield from (arg, *rest)
            return
        name, equals, value = arg.partition("=")
        if name not in switches:
            yield arg
        elif (equals and value.lower() in FALSE) or (not equals and rest and rest[0].lower() in FALSE):
            yield f"--no-{name[2:]}"
            del rest[: 0 if equals else 1]
        elif (equals and value.lower() in TRUE) or (not equals and rest and rest[0].lower() in TRUE):
            yield name
            del rest[: 0 if equals else 1]
        else:
            yield arg


def _refuse_foreign(args: Iterator[str]) -> Iterator[str]:
    for arg in args:
        name, equals, value = arg.partition("=")
        if name not in _FOREIGN:
            yield arg
            continue
        same, instead = _FOREIGN[name]
        if not equals and name not in _FOREIGN_FLAGS:
            value = next(args, "")
        if value not in same:
            raise SettingsError(f"{name}{f' {value}' if value else ''} has no meaning here: {instead}")


def build_command(run: Callable[..., int] | None = None, word: str = "") -> click.Command:
    """The click command; calling it returns the exit code.

    Args:
        run: what is called with ``app`` and all options by name.
        word: "config" for the command that prints the settings instead of serving.
    """
    parameters: list[click.Parameter] = [click.Argument(["app"], required=False)]
    parameters.append(
        click.Option(
            ["--config"], metavar="FILE",
            help="Settings file; 'none' for none. Without: leanserve.toml or pyproject.toml from here.",
        )
    )  # fmt: skip
    if word:
        parameters.append(click.Option(["--json", "as_json"], is_flag=True, help="Print JSON, and no table."))
    parameters += [
        _SettingOption(str(group.__doc__), item, facts) for group, item, facts in options()
    ]
    version = f"leanserve {__version__} on {platform.python_implementation()} {platform.python_version()}"
    serves = "Serve APP, an ASGI or WSGI application named MODULE:ATTRIBUTE; without it, the built-in demo."
    command = _Command(
        "leanserve",
        params=parameters,
        callback=run,
        help="Print every setting, its value and where that comes from; serve nothing." if word else serves,
        epilog=EPILOG,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110},
    )
    return click.version_option(__version__, message=f"{version} ({platform.system()})")(command)
