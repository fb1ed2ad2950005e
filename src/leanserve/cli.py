"""The command line: a plain one is recognised here, the others and ``--help`` are for click.

Neither costs an event loop, TLS or an application.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from leanserve.configfile import find_config
from leanserve.envfile import load_env_file
from leanserve.errors import BootFailed, LeanserveError, ServerGone, SettingsError
from leanserve.forking import Collector
from leanserve.option import kind_of
from leanserve.settings import Settings, options
from leanserve.sources import Resolved, resolve, show

if TYPE_CHECKING:
    import click

__all__ = ["main", "recognise", "settings_from"]

DEMO = "leanserve.demo:app"
#: As the first word it is no APP (which has a colon), but asks for the settings.
CONFIG = "config"


def settings_from(given: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """The settings alone, without a file; see :func:`leanserve.sources.resolve`."""
    return resolve(None, given, environment).settings


def recognise(arguments: Sequence[str]) -> dict[str, Any] | None:
    """What click would make of a plain command line, or None: then click has to see it.

    Plain is APP with a colon in it, and options of settings with their whole names; each once, but for those
    that may be given several times. click, with the options made for it, takes a tenth of a start.
    """
    known = _known_options()
    given: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        name, equals, text = word.partition("=")
        setting, says = known.get(name, ("", None))
        said: Any = says
        if ":" in word and not word.startswith("-"):
            setting, said = "app", word
        elif says is _TEXT or says is _TEXTS:
            said = text if equals else next(words, "-")
            if said.startswith("-"):
                return None
        elif says is None or equals:
            return None
        if setting in given and says is not _TEXTS:
            return None
        given[setting] = (*given.get(setting, ()), said) if says is _TEXTS else said
    return given


_TEXT, _TEXTS = "text", "texts"


def _known_options() -> dict[str, tuple[str, bool | str]]:
    """By option: the name of its setting, and what it says of it: a bool, or whether a text follows."""
    known: dict[str, tuple[str, bool | str]] = {"--config": ("config", _TEXT)}
    for _, item, facts in options():
        kind = kind_of(item)
        for name in (item.name, *facts.aliases):
            name = name.replace("_", "-")
            if kind == "bool":
                known[f"--{name}"], known[f"--no-{name}"] = (item.name, True), (item.name, False)
            else:
                known[f"--{name}"] = (item.name, _TEXTS if kind == "tuple" else _TEXT)
    return known


def _resolve(app: str | None, given: Mapping[str, Any]) -> Resolved:
    env_file = given.get("env_file") or os.environ.get("LEANSERVE_ENV_FILE")
    if env_file:
        load_env_file(env_file)  # before the environment is read: the file may set LEANSERVE_* too
    file = find_config(given.get("config") or os.environ.get("LEANSERVE_CONFIG"))
    if file is not None and not env_file and file.values.get("env_file"):
        load_env_file(file.values["env_file"])
    return resolve(app, given, os.environ, file, default_app=DEMO)


def _show(app: str | None, as_json: bool, **given: Any) -> int:
    import click

    click.echo(show(_resolve(app, given), as_json=as_json))
    return 0


def _serve(app: str | None = None, **given: Any) -> int:
    if app == CONFIG:
        raise SettingsError("config has to be the first word: leanserve config, then the options")
    resolved = _resolve(app, given)
    import leanserve.supervisor.supervisor  # noqa: F401 - now, while the collector is off
    from leanserve.server import run_supervised

    Collector.end_imports()

    def reread() -> Settings:
        fresh = _resolve(app, given)
        if fresh.app != resolved.app:
            raise SettingsError(f"another application needs a restart: {fresh.app} and not {resolved.app}")
        return fresh.settings

    code: int = run_supervised(resolved.app, resolved.settings, reread)
    return code


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; an error is one line on stderr."""
    arguments = list(sys.argv[1:] if args is None else args)
    code = 0
    try:
        plain = recognise(arguments)
        if plain is None:
            Collector.end_imports()
        code = _ask_click(arguments) if plain is None else _serve(**plain)
    except ServerGone as error:
        code = _complain(str(error), 1)
    except SettingsError as error:
        code = _complain(str(error), 2, arguments)
    except BootFailed as error:
        code = _complain(str(error), 3, arguments)
    except (LeanserveError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            text += ": each worker takes some; raise the limit (ulimit -n, LimitNOFILE=)"
        code = _complain(text, 3, arguments)
    except KeyboardInterrupt:
        code = 130  # ^C before the supervisor took over the signals
    sys.exit(code)


def _ask_click(arguments: Sequence[str]) -> int:
    """The whole way; the exit code."""
    import click

    name, rest = "leanserve", list(arguments)
    if rest[:1] in ([CONFIG], ["ctl"], ["top"]):  # no APP: those have a colon
        name = f"leanserve {rest.pop(0)}"
    try:
        return _command_of(name).main(rest, prog_name=name, standalone_mode=False) or 0
    except click.ClickException as error:
        return _complain(f"{error.format_message()} (see {name} --help)", 2)
    except click.Abort:
        return 130


def _command_of(name: str) -> click.Command:
    if name == "leanserve ctl":
        from leanserve.admin.ctl import build_ctl

        return build_ctl()
    if name == "leanserve top":
        from leanserve.admin.top import build_top

        return build_top()
    from leanserve.command import build_command

    word = name.removeprefix("leanserve").strip()
    return build_command(_show if word else _serve, word)


def _complain(message: str, code: int, arguments: Sequence[str] = ()) -> int:
    """Write the one line; the traceback only for ``--log-level debug``."""
    words = {*arguments, os.environ.get("LEANSERVE_LOG_LEVEL", "")}
    if words & {"debug", "trace", "--log-level=debug", "--log-level=trace"}:
        traceback.print_exc()
    sys.stderr.write(f"leanserve: {message}\n")
    return code
