"""leanserve.configfile and leanserve.sources: what a file may say, who wins over it, and what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leanserve import cli
from leanserve.configfile import find_config, read_config
from leanserve.errors import SettingsError
from leanserve.settings import Settings, options
from leanserve.sources import resolve, show


def values_of(folder: Path, text: str, name: str = "leanserve.toml") -> Any:
    (folder / name).write_text(text)
    return read_config(str(folder / name)).values


def run(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LEANSERVE_")}
    return subprocess.run(
        [sys.executable, "-m", "leanserve", *args],
        capture_output=True, text=True, timeout=50, cwd=cwd, env={**clean, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("port = 80", "port", 80),
        ("keep_alive_timeout = 5", "keep_alive_timeout", 5),
        ("keep-alive-timeout = 5.5", "keep_alive_timeout", 5.5),
        ("timeout_keep_alive = 5", "keep_alive_timeout", 5),
        ("timeout-keep-alive = '5'", "keep_alive_timeout", 5.0),
        ("max_body_size = '64k'", "max_body_size", 65536),
        ("max_body_size = 'none'", "max_body_size", None),
        ("reload = true", "reload", True),
        ("use_colors = 'none'", "use_colors", None),
        ("bind = ['a:1', 'b:2']", "bind", ("a:1", "b:2")),
        ("bind = 'a:1'", "bind", ("a:1",)),
        ("bind = []", "bind", ()),
        ("uds_mode = '600'", "uds_mode", 0o600),
        ("workers = 'auto'", "workers", "auto"),
        ("ssl_cert_reqs = '1'", "ssl_cert_reqs", "optional"),
        ("ssl_cert_reqs = 1", "ssl_cert_reqs", "optional"),
        ("log_config = 'l.ini'", "log_config", "l.ini"),
        ("ssl_context_factory = 'a:b'", "ssl_context_factory", "a:b"),
    ],
)
def test_values(tmp_path: Path, line: str, name: str, value: Any) -> None:
    found = values_of(tmp_path, line)
    assert dict(found) == {name: value}
    assert type(found[name]) is type(value)


def test_a_logging_configuration_as_a_table(tmp_path: Path) -> None:
    found = values_of(tmp_path, "[log_config]\nversion = 1\n[log_config.loggers.a]\nlevel = 'INFO'\n")
    assert found["log_config"] == {"version": 1, "loggers": {"a": {"level": "INFO"}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prt = 1", "'prt' is no setting; did you mean port?"),
        ("zzzzzz = 1", "'zzzzzz' is no setting; leanserve config names them all"),
        ('"a\\nb" = 1', r"'a\nb' is no setting"),
        ("[http]\nheader_count = 1", "'http' is no setting; settings stand in the table itself"),
        ("port = '80x'", "port: port must be a number, not '80x'"),
        ("port = 1.5", "port: port must be int, not 1.5"),
        ("port = 70000", "port: port must be at most 65535"),
        ("workers = true", "workers: workers must be int | str, not True"),
        ("reload = 'yes'", "reload: write true or false, without quotes"),
        ("reload = 1", "reload: reload must be bool, not 1"),
        ("host = 5", "host: host must be str, not 5"),
        ("bind = [1]", "bind: bind must hold text only"),
        ("loop = 'zuvloop'", "loop: loop must be one of auto, uvloop, asyncio"),
        ("uds_mode = 660", 'uds_mode: write the digits in quotes, as in uds_mode = "660"'),
        ("log_config = 5", "log_config: write a string"),
        ("ssl_context_factory = 5", "ssl_context_factory: write a string"),
        ("[port]", "port: port must be int, not {}"),
        ("app = 5", 'app: write app = "module:attribute", not 5'),
        ("app = ''", "app: write app"),
        ("keep_alive_timeout = 1\ntimeout_keep_alive = 2", "keep_alive_timeout is given already"),
        ("body-timeout = 1\nbody_timeout = 2", "body_timeout is given already"),
        ("port = ", "is not TOML: Invalid value (at "),
        ("port = 1\nport = 2", "is not TOML"),
    ],
)
def test_mistakes_are_one_line_with_file_and_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        values_of(tmp_path, text)
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "leanserve.toml"))
    assert line.isprintable()
    assert message in line


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read config .*No such file"):
        read_config(str(tmp_path / "none.toml"))
    with pytest.raises(SettingsError, match=r"cannot read config .*directory"):
        read_config(str(tmp_path))
    (tmp_path / "l.toml").write_bytes(b"app = '\xff'")
    with pytest.raises(SettingsError, match="is not UTF-8"):
        read_config(str(tmp_path / "l.toml"))


def test_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    project, own = tmp_path / "pyproject.toml", tmp_path / "leanserve.toml"

    def port(named: str | None = None) -> int | None:
        found = find_config(named)
        return None if found is None else found.values["port"]

    assert port() is None
    project.write_text("[project]\nname = 'leanserve-user'\n[tool.ruff]\nbroken here")  # not about us
    assert port() is None
    with pytest.raises(SettingsError, match=r"pyproject\.toml is not TOML"):
        port("pyproject.toml")
    for text in (
        "[tool.leanserve]\nport = 1", "[ tool . 'leanserve' ]\nport = 1", "[tool]\nleanserve = {port = 1}",
        "tool.leanserve.port = 1", '["tool".leanserve]\nport = 1', "tool = {leanserve = {port = 1}}",
    ):  # fmt: skip
        project.write_text(text)
        assert port() == 1, text
    own.write_text("port = 2")
    assert (port(), port("pyproject.toml"), port("none"), port("")) == (2, 1, None, 2)
    project.write_text("[tool.other]")
    with pytest.raises(SettingsError, match=r"pyproject\.toml has no table \[tool.leanserve\]"):
        port("pyproject.toml")
    own.unlink()
    (tmp_path / "below").mkdir()
    project.write_text("[tool.leanserve]\nport = 1")
    monkeypatch.chdir(tmp_path / "below")
    assert port() is None


def test_precedence(tmp_path: Path) -> None:
    (tmp_path / "l.toml").write_text("app = 'file:app'\nworkers = 2\nbind = ['f:1', 'f:2']\nreload = true")
    file = read_config(str(tmp_path / "l.toml"))
    source = f"file {file.name}"

    found = resolve(None, {}, {}, file, default_app="d:d")
    assert (found.app, found.settings.pool.workers) == ("file:app", 2)
    assert found.settings.listen.bind == ("f:1", "f:2")
    assert {name: it for name, it in found.sources.items() if it != "default"} == dict.fromkeys(
        ("app", "workers", "bind", "reload"), source
    )
    environment = {"LEANSERVE_APP": "env:app", "WEB_CONCURRENCY": "3", "LEANSERVE_RELOAD": "no"}
    found = resolve(None, {}, environment, file)
    assert (found.app, found.settings.pool.workers, found.settings.reload.reload) == ("env:app", 3, False)
    assert found.sources["workers"] == "environment WEB_CONCURRENCY"
    assert found.sources["bind"] == source
    found = resolve("c:app", {"workers": "4", "bind": ("c:1",)}, environment, file)
    assert (found.app, found.settings.pool.workers, found.settings.listen.bind) == ("c:app", 4, ("c:1",))
    assert (found.sources["app"], found.sources["bind"]) == ("command line", "command line")
    assert set(found.sources) == {"app", *(item.name for _, item, _ in options())}
    assert resolve(None, {}, {}, default_app="d:d").app == "d:d"
    assert resolve(None, {}, {}).settings == Settings()


def test_what_config_prints_can_be_the_file(tmp_path: Path) -> None:
    """Every value of the table is what TOML takes for it, and comes back as it was."""
    flat: dict[str, Any] = {"bind": ["a:1", 'b"\\\n\x7f'], "uds_mode": 0o600, "reload": True, "max_queue": 3}
    flat |= {"max_concurrent_requests": 7, "root_path": "/ü\x9b"}
    resolved = resolve(None, {}, {})
    resolved = type(resolved)(app="m:a", settings=Settings.build(**flat), sources=resolved.sources)
    text = show(resolved)
    assert all(line.isprintable() and line.isascii() for line in text.split("\n"))
    lines = [line.removesuffix("default").split(None, 1) for line in text.splitlines()]
    body = "\n".join(f"{name} = {value}" for name, value in lines)
    assert Settings.build(**values_of(tmp_path, body)) == resolved.settings


def test_secrets_are_printed_nowhere(tmp_path: Path) -> None:
    text = "ssl_certfile = 'c.pem'\nssl_keyfile_password = 's3cret'\n"
    (tmp_path / "leanserve.toml").write_text(text)
    for more in ([], ["--json"]):
        done = run("config", *more, cwd=tmp_path)
        assert done.returncode == 0
        assert "***" in done.stdout
        assert "s3cret" not in done.stdout + done.stderr
    for wrong in ("ssl_keyfile_password = 31337", "ssl_keyfile_password = ['31337']"):
        (tmp_path / "leanserve.toml").write_text(wrong)
        done = run("config", cwd=tmp_path)
        assert done.returncode == 2
        assert "31337" not in done.stdout + done.stderr


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "leanserve.toml").write_text("app = 'm:a'\nenv_file = '.env'\nport = 1\nbacklog = 7")
    (tmp_path / ".env").write_text("LEANSERVE_PORT=2\n")
    done = run("config", "--json", "--workers", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["app"] == {"value": "m:a", "source": "file leanserve.toml"}
    assert found["port"] == {"value": 2, "source": "environment LEANSERVE_PORT"}
    assert found["workers"] == {"value": 3, "source": "command line"}
    assert found["backlog"] == {"value": 7, "source": "file leanserve.toml"}
    assert found["host"] == {"value": "127.0.0.1", "source": "default"}
    done = run("config", "x:y", "--config", "none", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["app"] == {"value": "x:y", "source": "command line"}
    assert found["port"] == {"value": 8000, "source": "default"}
    (tmp_path / "other.toml").write_text("port = 5")
    table = run("config", cwd=tmp_path, LEANSERVE_CONFIG="other.toml").stdout
    assert [line.split() for line in table.splitlines() if line.startswith("port ")] == [
        ["port", "5", "file", "other.toml"]
    ]
    done = run("config", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: leanserve config ")
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--port", "1", "config"], "config has to be the first word"),
        (["--json"], "--json"),
        (["config", "a:b", "c:d"], "unexpected extra argument"),
        (["config", "--max-queue", "3"], "max_queue needs max_concurrent_requests"),
        (["config", "--config", "/nonexistent"], "cannot read config /nonexistent: No such file"),
        (["--config", "/nonexistent"], "cannot read config /nonexistent: No such file"),
    ],
)
def test_mistakes_of_the_command(tmp_path: Path, args: list[str], message: str) -> None:
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_the_server_takes_the_file_and_a_module_called_config(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("raise RuntimeError('this is config.py')\n")
    done = run("config:app", "--port", "0", cwd=tmp_path)
    assert done.returncode == 3
    assert "this is config.py" in done.stderr
    (tmp_path / "leanserve.toml").write_text("app = 'config:app'\nport = 0\n")
    done = run(cwd=tmp_path)
    assert done.returncode == 3
    assert "this is config.py" in done.stderr
    (tmp_path / "leanserve.toml").write_text("app = 'config'\n")
    assert "APP 'config' has no ':'" in run(cwd=tmp_path).stderr


def test_toml_is_read_only_when_there_is_a_file(tmp_path: Path) -> None:
    code = "import sys; from leanserve import cli\ntry: cli.main(['config'])\nexcept SystemExit: pass\n"
    code += "sys.stderr.write(str('tomllib' in sys.modules))"
    cases = ((None, "False"), ("[project]\nname = 'leanserve'", "False"), ("[tool.leanserve]", "True"))
    for text, expected in cases:
        if text is not None:
            (tmp_path / "pyproject.toml").write_text(text)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, cwd=tmp_path
        )
        assert done.stderr == expected


def test_no_setting_is_called_as_a_word_of_the_command_line() -> None:
    names = {name for _, item, facts in options() for name in (item.name, *facts.aliases)}
    assert not names & {"app", "config", "json"}
    assert cli.CONFIG == "config"
