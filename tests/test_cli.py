"""leanserve.cli: the words that uvicorn users type, and one clear line for every mistake."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.main import main as uvicorn_command

from leanserve import __version__, cli, command
from leanserve.command import build_command
from leanserve.errors import SettingsError
from leanserve.option import kind_of
from leanserve.settings import Settings, options


def parse(*args: str, **environment: str) -> Settings:
    with build_command().make_context("leanserve", list(args)) as context:
        given = dict(context.params)
    given.pop("app")
    return cli.settings_from(given, environment)


def run(*args: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LEANSERVE_")}
    return subprocess.run(
        [sys.executable, "-m", "leanserve", *args],
        capture_output=True, text=True, timeout=50, cwd=cwd, env={**clean, **environment},
    )


def test_a_start_command_of_uvicorn() -> None:
    settings = parse(
        "main:app", "--host", "0.0.0.0", "--port", "80", "--workers", "4", "--loop", "auto", "--http", "auto",
        "--ws", "auto", "--ws-max-size", "1000", "--ws-ping-interval", "20.0", "--lifespan", "on",
        "--interface", "asgi3", "--no-access-log", "--proxy-headers", "--forwarded-allow-ips", "*",
        "--root-path", "/api", "--limit-concurrency", "100", "--backlog", "100", "--limit-max-requests", "10",
        "--timeout-keep-alive", "5", "--timeout-graceful-shutdown", "10", "--no-server-header",
        "--no-date-header", "--header", "X-A:b", "--header", "X-C: d", "--app-dir", "src", "--factory",
        "--h11-max-incomplete-event-size", "16384", "--log-level", "warning", "--use-colors",
        "--ws-per-message-deflate", "true", "--reload-dir", "a", "--reload-dir=b",
    )  # fmt: skip
    assert (settings.listen.host, settings.listen.port, settings.listen.backlog) == ("0.0.0.0", 80, 100)
    assert settings.pool.workers == 4
    assert settings.load.factory
    assert (settings.load.lifespan, settings.load.root_path, settings.load.app_dir) == ("on", "/api", "src")
    assert settings.http.header == ("X-A:b", "X-C: d")
    assert (settings.http.server_header, settings.http.date_header) == (False, False)
    assert settings.http.header_bytes == 16384
    assert (settings.timeouts.keep_alive_timeout, settings.drain.drain_timeout) == (5.0, 10.0)
    log = settings.log
    assert (log.log_level, log.access_log, log.use_colors) == ("warning", False, True)
    assert settings.websocket.ws_per_message_deflate
    assert settings.reload.reload_dir == ("a", "b")


def test_every_option_of_uvicorn_is_known_or_explained() -> None:
    ours = {name for parameter in build_command().params for name in parameter.opts}
    theirs = {name for parameter in uvicorn_command.params for name in parameter.opts if name[:2] == "--"}
    assert len(theirs) > 40
    assert theirs - ours - set(command._FOREIGN) == set()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--http", "httptools"], "--http httptools has no meaning here: there is one HTTP implementation"),
        (["--http2"], "--http2 has no meaning here: HTTP/2 is not spoken"),
        (["--ws=websockets"], "--ws websockets has no meaning here"),
        (["--ws-max-queue", "32"], "use --receive-high-water"),
        (["--reset-contextvars"], "leave it out"),
        (["--timeout-worker-healthcheck", "5"], "judged by its exit"),
        (["--ssl-version", "2"], "use --ssl-min-version"),
        (["--loop", "zuvloop"], "loop must be one of auto, uvloop, asyncio"),
        (["--port", "http"], "port must be a number"),
    ],
)
def test_options_without_meaning_say_what_to_use(args: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(*args)


def test_values_that_say_what_we_do_anyway_are_taken() -> None:
    assert parse("--http", "h11", "--ws", "wsproto", "--ssl-version=17", "--loop", "auto") == Settings()


@pytest.mark.parametrize("name", [item.name for _, item, _ in options() if kind_of(item) == "bool"])
def test_switches(name: str) -> None:
    dashed = name.replace("_", "-")

    def value(*args: str) -> Any:
        settings = parse(*args)
        groups = [getattr(settings, group) for group in Settings.__dataclass_fields__]
        return next(getattr(group, name) for group in groups if hasattr(group, name))

    assert value(f"--{dashed}") is True
    assert value(f"--no-{dashed}") is False
    for text in ("false", "0", "No"):
        assert value(f"--{dashed}", text) is False
        assert value(f"--{dashed}={text}") is False
    for text in ("true", "1", "on"):
        assert value(f"--{dashed}", text) is True
        assert value(f"--{dashed}={text}", "m:app") is True


def test_a_switch_does_not_swallow_the_app() -> None:
    with build_command().make_context("leanserve", ["--reload", "main:app"]) as context:
        assert context.params["app"] == "main:app"
    with build_command().make_context("leanserve", ["--reload", "--", "true:app"]) as context:
        assert context.params["app"] == "true:app"


_SAMPLE = {"bool": "yes", "str": "/text", "tuple": "a,b"}
_SPECIAL = {
    "ssl_ca_certs", "ssl_keyfile", "ssl_keyfile_password", "ssl_ciphers", "ssl_cert_reqs", "header",
    "disconnect_policy",
    "max_queue", "fair_by", "worker_env", "limit_exempt", "access_log_format", "request_id_header",
}  # fmt: skip


@pytest.mark.parametrize("name", [item.name for _, item, _ in options() if item.name not in _SPECIAL])
def test_every_setting_has_its_environment_variable(name: str) -> None:
    item, facts = next((item, facts) for _, item, facts in options() if item.name == name)
    number = 1024 if facts.unit == "bytes" else max(3, int(facts.minimum or 0))
    some = min(2.5, facts.maximum or 2.5)
    text = {"bytes": "1k"}.get(facts.unit, {**_SAMPLE, "int": str(number), "float": str(some)}[kind_of(item)])
    if kind_of(item) == "str" and facts.choices:
        text = facts.choices[-1]
    changed = parse(**{f"LEANSERVE_{name.upper()}": text})
    read = {"bool": True, "int": number, "float": some, "str": text, "tuple": ("a", "b")}
    expected: Any = read[kind_of(item)]
    assert changed == Settings.build(**{name: expected})


def test_precedence() -> None:
    assert parse(WEB_CONCURRENCY="3").pool.workers == 3
    assert parse(WEB_CONCURRENCY="3", LEANSERVE_WORKERS="4").pool.workers == 4
    assert parse("--workers", "5", WEB_CONCURRENCY="3", LEANSERVE_WORKERS="4").pool.workers == 5
    assert parse(FORWARDED_ALLOW_IPS="10.0.0.0/8").proxy.forwarded_allow_ips == "10.0.0.0/8"
    assert parse(LEANSERVE_TIMEOUT_KEEP_ALIVE="9").timeouts.keep_alive_timeout == 9
    assert parse("--bind", "a:1", LEANSERVE_BIND="b:2").listen.bind == ("a:1",)
    assert parse(LEANSERVE_WORKER_ENV="A=1,2;3\nB=4").pool.worker_env == ("A=1,2;3", "B=4")
    assert parse("--no-reload", LEANSERVE_RELOAD="1").reload.reload is False
    assert parse(LEANSERVE_PORT="").listen.port == 8000
    assert parse("--lifespan-shutdown-timeout", "none").load.lifespan_shutdown_timeout is None


def test_admission() -> None:
    limited = parse("--limit-concurrency", "7", LEANSERVE_MAX_QUEUE="3", LEANSERVE_FAIR_BY="x-api-key")
    admission = limited.admission
    assert (admission.max_concurrent_requests, admission.max_queue, admission.fair_by) == (7, 3, "x-api-key")
    assert parse(LEANSERVE_LIMIT_EXEMPT="/a,/b").admission.limit_exempt == ("/a", "/b")
    assert parse("--limit-exempt", "").admission.limit_exempt == ("",)
    assert parse("--queue-timeout", "none").admission.queue_timeout is None


def test_repeated_options_in_the_environment() -> None:
    assert parse(LEANSERVE_BIND="a:1, [::1]:2\nunix:/s").listen.bind == ("a:1", "[::1]:2", "unix:/s")
    assert parse(LEANSERVE_HEADER="A: b, c\nD: e").http.header == ("A: b, c", "D: e")
    with pytest.raises(SettingsError, match="LEANSERVE_RELOAD must be true or false, not 'maybe'"):
        parse(LEANSERVE_RELOAD="maybe")


def test_help_states_groups_defaults_and_units_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from leanserve import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'asyncio', 'ssl', 'uvloop', 'anyio', 'h11', 'wsproto', 'leanserve.demo'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    for title in {str(group.__doc__) for group, _, _ in options()}:
        assert f"\n{title}:\n" in done.stdout
    flat = re.sub(r"\s+", " ", done.stdout)
    assert "Idle time between two requests of a connection. [default: 75 seconds]" in flat
    assert "--h11-max-incomplete-event-size BYTES" in flat


def test_the_parent_has_no_event_loop_and_no_application() -> None:
    code = (
        "import sys; from leanserve import cli\n"
        "try: cli.main(['wsgiref.nosuch:app', '--port', '0'])\n"
        "except SystemExit as end: assert end.code == 3\n"
        "heavy = {'asyncio', 'ssl', 'uvloop', 'anyio', 'h11', 'wsproto', 'wsgiref'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    done = run("--version")
    assert done.stdout.startswith(f"leanserve {__version__} on ")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--nope"], 2, r"No such option:? '?--nope"),
        (["--prt", "1"], 2, "--port"),
        (["--port"], 2, "requires an argument"),
        (["a:b", "c:d"], 2, "unexpected extra argument"),
        (["--port", "x"], 2, "port must be a number, not 'x'"),
        (["main"], 2, "APP 'main' has no ':', it should be MODULE:ATTRIBUTE; write for example main:app"),
        (["--env-file", "/nonexistent"], 2, "cannot read env_file /nonexistent: No such file"),
        (["--log-config", "/nonexistent"], 2, "cannot read log_config /nonexistent: No such file"),
        (["--ssl-certfile", "/nonexistent"], 2, "/nonexistent"),
        (["--ssl-keyfile", "key"], 2, "ssl_keyfile needs ssl_certfile"),
        (["--bind", "nonsense"], 2, "bind 'nonsense'"),
    ],
)
def test_wrong_settings_are_one_line(args: list[str], code: int, message: str) -> None:
    done = run(*args)
    assert done.returncode == code
    assert re.search(message, done.stderr)
    assert re.fullmatch(r"leanserve: [^\n]+\n", done.stderr), done.stderr
    assert done.stdout == ""


def test_bad_certificate_and_unfitting_key(tmp_path: Path) -> None:
    authority = trustme.CA()
    one, two = authority.issue_cert("one.example"), authority.issue_cert("two.example")
    one.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    two.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "garbage.pem").write_text("not a certificate")
    for args in (["cert.pem", "--ssl-keyfile", "key.pem"], ["garbage.pem"], ["cert.pem"]):
        done = run("--port", "0", "--ssl-certfile", *args, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert re.fullmatch(r"leanserve: .*cert.*\n", done.stderr), done.stderr


def test_a_traceback_only_for_debug() -> None:
    assert "Traceback" in run("main", "--log-level", "debug").stderr
    assert "Traceback" not in run("main").stderr


def test_port_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("--port", str(port))
    assert done.returncode == 3
    line = rf"leanserve: cannot listen on 127.0.0.1:{port}: .*taken.*\n"
    assert re.fullmatch(line, done.stderr), done.stderr


@pytest.mark.skipif(os.name != "posix", reason="there is no limit to set")
def test_too_few_descriptors() -> None:
    command = [sys.executable, "-m", "leanserve", "--port", "0", "--workers", "60"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *command], capture_output=True, text=True, timeout=50,
        check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert re.fullmatch("leanserve: Too many open files: .* raise the limit .*\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("app", "source", "message"),
    [
        ("lsx_none:app", None, "no module named 'lsx_none'"),
        ("lsx_app:ap", "app = 1", "has no attribute 'ap'; did you mean app"),
        ("lsx_app:app", "app = 1", "is an int, which cannot be called"),
        ("lsx_app:app", "\n1/0", r"ZeroDivisionError: division by zero \(.*lsx_app.py, line 2\)"),
        ("lsx_app:create", "def create(): ...", "start with --factory"),
    ],
)
def test_an_application_that_cannot_boot(tmp_path: Path, app: str, source: str | None, message: str) -> None:
    if source is not None:
        (tmp_path / "lsx_app.py").write_text(source)
    done = run(app, "--port", "0", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_env_file_sets_options_and_the_environment_of_the_app(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("LEANSERVE_PORT=0\nMODEL='lsx model'\n")
    (tmp_path / "lsx_env.py").write_text("import os\nraise RuntimeError(os.environ['MODEL'])\n")
    done = run("lsx_env:app", "--env-file", ".env", cwd=tmp_path)
    assert done.returncode == 3
    assert "RuntimeError: lsx model" in done.stderr


# What is plain


def by_click(words: list[str]) -> dict[str, Any] | None:
    """What click makes of them, without what is not there; None where it refuses or answers itself."""
    try:
        with build_command().make_context("leanserve", words, resilient_parsing=False) as context:
            return {name: value for name, value in context.params.items() if value not in (None, ())}
    except (click.ClickException, click.exceptions.Exit, SettingsError):
        return None


@pytest.mark.parametrize(
    "line",
    [
        "main:app --port 8001 --workers 2 --no-access-log --log-level error --loop uvloop",
        "--host=:: main:app --reload --reload-dir a --reload-dir=b",
        "main:app --config=c.toml --header X:1 --header=Y:2=3",
        "",
    ],
)
def test_a_plain_line_is_recognised(line: str) -> None:
    found = cli.recognise(line.split())
    assert found is not None
    assert found == by_click(line.split())


@pytest.mark.parametrize(
    "line",
    [
        *("--help", "-h", "--version", "config", "ctl status", "top", "main", "main:app other:app", "--"),
        *("main:app --port", "main:app --port --workers 2", "main:app --port=-1", "main:app --por 80"),
        *("main:app --reload=true", "main:app --reload false", "main:app --port 1 --port 2"),
        *("main:app -- a:b", "main:app --http h11", "main:app --no-port 3", "main:app --reload --no-reload"),
    ],
)
def test_what_is_not_plain_is_for_click(line: str) -> None:
    assert cli.recognise(line.split()) is None


_WORDS = st.sampled_from(
    [
        *("main:app", "a:b=c", "main", "true", "false", "config", "--", "-", "", "-h", "--help", "80", "-1"),
        *("--reload", "--no-reload", "--reload=true", "--no-port", "--ws-per-message-deflate", "::1"),
        *("--port", "--port=80", "--port=", "--host", "--host=a:b", "--header", "--header=X: 1", "--header="),
        *("--config", "--config=none", "--timeout-keep-alive", "--keep_alive_timeout=3", "--http=h11"),
    ]
)


@settings(max_examples=600, deadline=None)
@given(st.lists(_WORDS, max_size=6))
def test_recognised_lines_are_as_click_reads_them(words: list[str]) -> None:
    found = cli.recognise(words)
    if found is not None:
        assert found == by_click(words)


def test_a_plain_start_does_without_click() -> None:
    code = (
        "import sys; from leanserve import cli, server\n"
        "def run(app, settings, reread): print(app, settings.listen.port, 'click' in sys.modules)\n"
        "server.run_supervised = run\n"
        "cli.main(['main:app', '--port', '8123'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.stdout.strip(), done.returncode) == ("main:app 8123 False", 0), done.stderr
