"""leanserve.logs: two loggers, two streams, and the application's own configuration on top."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from leanserve import logs
from leanserve.errors import SettingsError
from leanserve.settings import LogSettings

LIFE = logging.getLogger("leanserve")
ACCESS = logging.getLogger("leanserve.access")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    kept = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in (LIFE, ACCESS)]
    yield
    for logger, handlers, level, propagate in kept:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate
        logger.disabled = False


def test_streams_and_format(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings())
    LIFE.info("hello %s", "world")
    LIFE.debug("not shown")
    ACCESS.info("GET / 200")
    out, err = capsys.readouterr()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4} \[\d+\] INFO hello world\n", err)
    assert out.endswith("INFO GET / 200\n")


def test_configuring_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(access_log=False))
    ACCESS.info("hidden")
    logs.configure(LogSettings(log_level="debug"))
    LIFE.debug("once")
    ACCESS.info("shown")
    out, err = capsys.readouterr()
    assert err.count("once") == 1
    assert out.count("shown") == 1
    assert "hidden" not in out


def test_handlers_of_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    own = logging.StreamHandler(io.StringIO())
    LIFE.addHandler(own)
    logs.configure(LogSettings(use_colors=True))
    LIFE.warning("both")
    assert own.stream.getvalue() == "both\n"
    assert "\x1b[33mWARNING\x1b[0m both" in capsys.readouterr().err


def test_trace_level(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(log_level="trace"))
    LIFE.log(logs.TRACE, "fine")
    assert "TRACE fine" in capsys.readouterr().err


_DICT = {
    "version": 1,
    "formatters": {"plain": {"format": "mine:%(message)s"}},
    "handlers": {"h": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stdout"}},
    "loggers": {"leanserve": {"handlers": ["h"], "level": "INFO", "propagate": False}},
}
_YAML = """
version: 1
formatters: {plain: {format: 'mine:%(message)s'}}
handlers: {h: {class: logging.StreamHandler, formatter: plain, stream: 'ext://sys.stdout'}}
loggers: {leanserve: {handlers: [h], level: INFO, propagate: no}}
"""
_INI = """
[loggers]
keys=root,leanserve
[handlers]
keys=h
[formatters]
keys=plain
[logger_root]
handlers=
[logger_leanserve]
qualname=leanserve
handlers=h
propagate=0
[handler_h]
class=StreamHandler
args=(sys.stdout,)
formatter=plain
[formatter_plain]
format=mine:%(message)s
"""


@pytest.mark.parametrize(
    ("name", "text"), [("l.json", json.dumps(_DICT)), ("l.yaml", _YAML), ("l.yml", _YAML), ("l.ini", _INI)]
)
def test_config_files(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    # in a process of its own: dictConfig and fileConfig change the loggers of the whole process
    code = (
        "import logging; from leanserve import logs; from leanserve.settings import LogSettings;"
        f"logging.getLogger('other'); logs.configure(LogSettings(log_config={str(path)!r}));"
        "logging.getLogger('leanserve').info('here'); assert not logging.getLogger('other').disabled;"
        "logging.getLogger('leanserve.access').info('access')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "mine:here\n" in done.stdout
    assert "access" in done.stdout


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.json", None, "cannot read log_config .*No such file"),
        ("l.ini", None, "cannot read log_config .*No such file"),
        ("l.json", "{", "cannot be used"),
        ("l.json", "[]", "must hold a mapping"),
        ("l.json", "{}", "cannot be used"),
        ("l.yaml", "a: [", "is not YAML"),
        ("l.ini", "nothing", "cannot be used"),
        ("l.json", '{"version": 1, "handlers": {"h": {"class": "no.Such"}}}', "handler 'h'.*No module"),
    ],
)
def test_bad_config_is_one_line(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        logs.configure(LogSettings(log_config=str(path)))


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(log_format="json", use_colors=True))
    LIFE.info("hello %s", "wor\n\x1b\x7f\x9bld")
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        LIFE.exception("failed")
    ACCESS.info('{"whole": "line"}')
    out, err = capsys.readouterr()
    assert out == '{"whole": "line"}\n'
    assert re.fullmatch(r"[\x20-\x7e\n]*", err)
    first, second = (json.loads(line) for line in err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info", "pid": os.getpid(), "logger": "leanserve", "message": "hello wor\n\x1b\x7f\x9bld",
    }  # fmt: skip
    assert second["message"] == "failed"
    assert second["traceback"].endswith("ZeroDivisionError: division by zero")


def test_forms_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(log_format="json", access_log_format="text"))
    ACCESS.info("the line")
    assert re.fullmatch(r"\S+ \S+ \S+ \[\d+\] INFO the line\n", capsys.readouterr().out)
    logs.configure(LogSettings(access_log_format="%(h)s"))
    ACCESS.info("the line")
    LIFE.info("text")
    out, err = capsys.readouterr()
    assert out == "the line\n"
    assert err.endswith(" INFO text\n")


def test_a_level_above_info_silences_access_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """As in uvicorn: they are of level info."""
    logs.configure(LogSettings(log_level="warning"))
    ACCESS.info("hidden")
    logs.configure(LogSettings(log_level="trace"))
    ACCESS.info("shown")
    ACCESS.debug("hidden")
    out, _ = capsys.readouterr()
    assert "shown" in out
    assert "hidden" not in out


def test_a_level_that_changes(capsys: pytest.CaptureFixture[str]) -> None:
    old = LogSettings(access_log=False)
    logs.configure(old)
    handlers = LIFE.handlers[:]
    new = LogSettings(log_level="debug")
    logs.adjust(old, new)
    LIFE.debug("now shown")
    ACCESS.info("GET / 200")
    logs.adjust(new, LogSettings(log_level="error"))
    LIFE.warning("not shown")
    ACCESS.info("GET /again 200")
    out, err = capsys.readouterr()
    assert "now shown" in err
    assert "not shown" not in err
    assert "GET / 200" in out
    assert "again" not in out
    assert LIFE.handlers == handlers
