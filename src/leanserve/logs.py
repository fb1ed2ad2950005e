"""Logging, through the standard library: loggers ``leanserve`` (life cycle, errors) and ``leanserve.access``.

Only the command line and ``Server.serve`` call :func:`configure`; a server inside somebody's program leaves
logging alone.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from leanserve.errors import SettingsError
from leanserve.settings import LogSettings

__all__ = ["TRACE", "adjust", "configure"]

#: Below DEBUG: every protocol event (uvicorn users know the level).
TRACE = 5

_FORMAT = "%(asctime)s [%(process)d] %(levelname)s %(message)s"
_COLOURS = {
    TRACE: 34,
    logging.DEBUG: 36,
    logging.INFO: 32,
    logging.WARNING: 33,
    logging.ERROR: 31,
    logging.CRITICAL: 91,
}


class _Formatter(logging.Formatter):
    """Time with its zone offset, process id, level; the level in colour where that is wanted."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__(_FORMAT, "%Y-%m-%d %H:%M:%S %z")
        self._colours = colours

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = record.levelname
        if self._colours:
            record.levelname = f"\x1b[{_COLOURS.get(record.levelno, 37)}m{level}\x1b[0m"
        try:
            return super().formatMessage(record)
        finally:
            record.levelname = level  # other handlers get the record too


class _JsonFormatter(logging.Formatter):
    """One JSON object per line, all ASCII: a traceback is a string in it."""

    def format(self, record: logging.LogRecord) -> str:
        import json

        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return json.dumps(fields).replace("\x7f", "\\u007f")


class _Handler(logging.StreamHandler[TextIO]):
    """Our own handler: so that a second configure() replaces it and leaves the handlers of others alone."""


def configure(settings: LogSettings) -> None:
    """Set up the two loggers; calling it again replaces the former set-up.

    Life cycle and errors go to stderr, access lines to stdout, so that either can be redirected. A
    ``log_config`` is applied last and may replace all of it.

    Raises:
        SettingsError: the log_config file cannot be read, or its content is not a logging configuration.
    """
    logging.addLevelName(TRACE, "TRACE")
    level = logging.getLevelName(settings.log_level.upper())
    as_json = _JsonFormatter() if settings.log_format == "json" else None
    _attach(logging.getLogger("leanserve"), level, sys.stderr, as_json or _text(sys.stderr, settings))
    access = logging.getLogger("leanserve.access")
    # JSON and formats of the operator's own are the whole line
    whole = logging.Formatter("%(message)s") if settings.access_form != "text" else None
    _attach(access, max(level, logging.INFO), sys.stdout, whole or _text(sys.stdout, settings))
    access.disabled = not settings.access_log
    if settings.log_config is not None:
        _apply(settings.log_config)


def adjust(old: LogSettings, new: LogSettings) -> None:
    """Put a new level, and whether there are access lines, into effect; handlers and forms stay."""
    access = logging.getLogger("leanserve.access")
    if new.log_level != old.log_level:
        level = logging.getLevelName(new.log_level.upper())
        logging.getLogger("leanserve").setLevel(level)
        access.setLevel(max(level, logging.INFO))
    if new.access_log != old.access_log:
        access.disabled = not new.access_log


def _text(stream: TextIO, settings: LogSettings) -> logging.Formatter:
    terminal = stream.isatty() and "NO_COLOR" not in os.environ  # https://no-color.org
    return _Formatter(colours=terminal if settings.use_colors is None else settings.use_colors)


def _attach(logger: logging.Logger, level: int, stream: TextIO, formatter: logging.Formatter) -> None:
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
        logger.removeHandler(handler)
    handler = _Handler(stream)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.disabled = False
    logger.propagate = False  # the root logger belongs to the application


def _apply(config: str | Mapping[str, Any]) -> None:
    import logging.config  # with its socket servers and queues: for those who configure only

    name = config if isinstance(config, str) else "mapping"
    try:
        if isinstance(config, str) and not config.endswith((".json", ".yaml", ".yml")):
            _check_readable(config)
            logging.config.fileConfig(config, disable_existing_loggers=False)
        else:
            content = _read(config) if isinstance(config, str) else config
            if not isinstance(content, Mapping):
                raise SettingsError(f"log_config {name}: the file must hold a mapping with a 'version'")
            # the standard library would silence our loggers by default, because they exist already
            logging.config.dictConfig({"disable_existing_loggers": False, **content})
    except (ValueError, TypeError, AttributeError, ImportError, KeyError, RuntimeError, OSError) as error:
        if isinstance(error, SettingsError):
            raise
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise SettingsError(f"log_config {name} cannot be used: {error}{cause}") from error


def _check_readable(path: str) -> None:
    # fileConfig reads a missing file as an empty one, and then fails with a KeyError about its sections
    try:
        open(path, "rb").close()
    except OSError as error:
        raise SettingsError(f"cannot read log_config {path}: {error.strerror}") from None


def _read(path: str) -> Any:
    _check_readable(path)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if path.endswith(".json"):
        import json

        return json.loads(text)
    try:
        yaml = importlib.import_module("yaml")  # not a dependency of ours
    except ImportError:
        raise SettingsError(f"log_config {path} needs pyyaml: install it, or write .json") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"log_config {path} is not YAML: {' '.join(str(error).split())}") from None
