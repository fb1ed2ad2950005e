"""leanserve.asgi.interfaces: find the application, or say in one line why not."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import flask
import litestar
import pytest
from django.conf import settings as django_settings
from fastapi import FastAPI
from starlette.applications import Starlette

from leanserve.asgi.interfaces import detect_interface, load_app, parse_app_string
from leanserve.compat.wsgi import WsgiAdapter
from leanserve.errors import BootFailed, SettingsError
from leanserve.settings import LoadSettings


async def asgi3(scope: Any, receive: Any, send: Any) -> None:
    await send({"app": "asgi3", "scope": scope})


def asgi3_sync(scope: Any, receive: Any, send: Any) -> Any:
    return asgi3(scope, receive, send)


def asgi2(scope: Any) -> Any:
    async def inner(receive: Any, send: Any) -> None:
        await send({"app": "asgi2", "scope": scope})

    return inner


class Asgi2Class:
    def __init__(self, scope: Any) -> None:
        self.scope = scope

    async def __call__(self, receive: Any, send: Any) -> None:
        await send({"app": "asgi2", "scope": self.scope})


class Asgi3Instance:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"app": "asgi3", "scope": scope})


class Asgi3Awaitable:
    def __init__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope, self.send = scope, send

    def __await__(self) -> Any:
        return self.send({"app": "asgi3", "scope": self.scope}).__await__()


def wsgi(environ: Any, start_response: Any) -> Any:
    return []


class WsgiClass:
    def __init__(self, environ: Any, start_response: Any) -> None: ...


def hidden(*args: Any) -> Any:
    return asgi3(*args)


hidden_single = functools.partial(hidden)
hidden_single._asgi_single_callable = True  # type: ignore[attr-defined]


def test_frameworks_are_recognised() -> None:
    if not django_settings.configured:
        django_settings.configure(ROOT_URLCONF=__name__)
        django.setup()
    from django.core.asgi import get_asgi_application
    from django.core.wsgi import get_wsgi_application

    for app in (FastAPI(), Starlette(), litestar.Litestar([]), get_asgi_application()):
        assert detect_interface(app) == "asgi3", app
    for app in (flask.Flask("f"), get_wsgi_application()):
        assert detect_interface(app) == "wsgi", app


@pytest.mark.parametrize(
    ("app", "interface"),
    [
        (asgi3, "asgi3"),
        (functools.partial(asgi3), "asgi3"),
        (asgi3_sync, "asgi3"),
        (Asgi3Instance(), "asgi3"),
        (Asgi3Instance().__call__, "asgi3"),
        (Asgi3Awaitable, "asgi3"),
        (hidden_single, "asgi3"),
        (hidden, "asgi2"),
        (asgi2, "asgi2"),
        (Asgi2Class, "asgi2"),
        (wsgi, "wsgi"),
        (WsgiClass, "wsgi"),
    ],
)
def test_detection(app: Any, interface: str) -> None:
    assert detect_interface(app) == interface


@pytest.mark.parametrize("app", [asgi3, asgi3_sync, asgi2, Asgi2Class, Asgi3Instance(), Asgi3Awaitable])
def test_all_forms_are_called_as_asgi3(app: Any) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {}

    async def call() -> None:
        await load_app(app, LoadSettings())({"type": "x"}, receive, send)

    asyncio.run(call())
    assert sent[0]["scope"] == {"type": "x"}


def test_stated_interface_is_not_questioned() -> None:
    assert load_app(wsgi, LoadSettings(interface="asgi3")) is wsgi
    assert isinstance(load_app(hidden, LoadSettings(interface="wsgi")), WsgiAdapter)
    assert isinstance(load_app(wsgi, LoadSettings()), WsgiAdapter)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("main", "has no ':'.*for example main:app"),
        ("main.py", "has no ':'.*for example main:app"),
        ("src/main.py:api", "is not MODULE:ATTRIBUTE.*for example src.main:api"),
        ("src/main", "for example src.main:app"),
        ("main:", "for example main:app"),
        (":app", "for example main:app"),
        ("", "for example main:app"),
        ("main:create()", "for example main:app"),
        ("a b:c", "for example main:c"),
    ],
)
def test_malformed_names(text: str, hint: str) -> None:
    with pytest.raises(SettingsError, match=hint):
        parse_app_string(text)


def test_wellformed_names() -> None:
    assert parse_app_string("a.b:c.d") == ("a.b", "c.d")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path, modules = sys.path[:], set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("lsx_"):
            del sys.modules[name]


def load(directory: Path, app: str, source: str | None = None, **settings: Any) -> Any:
    if source is not None:
        (directory / (app.partition(":")[0] + ".py")).write_text(source)
    return load_app(app, LoadSettings(app_dir=str(directory), **settings))


GOOD = "async def app(scope, receive, send): ...\nclass Box: inner = app\n"


def test_app_dir_comes_first(directory: Path) -> None:
    app = load(directory, "lsx_good:Box.inner", GOOD)
    assert app.__name__ == "app"
    assert sys.path[0] == str(directory)


def test_factory(directory: Path) -> None:
    source = GOOD + "def create(): return app\nasync def wrong(): return app\n"
    assert load(directory, "lsx_factory:create", source, factory=True).__name__ == "app"
    with pytest.raises(BootFailed, match="lsx_factory:wrong is a coroutine function"):
        load(directory, "lsx_factory:wrong", factory=True)
    with pytest.raises(BootFailed, match="calling the factory lsx_factory:app failed: TypeError"):
        load(directory, "lsx_factory:app", factory=True)
    with pytest.raises(BootFailed, match="takes no arguments: it looks like a factory, start with --factory"):
        load(directory, "lsx_factory:create")


@pytest.mark.parametrize(
    ("source", "attribute", "message"),
    [
        (None, "app", "cannot import lsx_m: no module named 'lsx_m' in .* is --app-dir right"),
        (GOOD, "ap", "module lsx_m has no attribute 'ap'; did you mean app"),
        (GOOD, "zzz", "has no attribute 'zzz'; is the name after the ':' right"),
        (GOOD, "Box.iner", "a type has no attribute 'iner'; did you mean inner"),
        ("app = 42", "app", "lsx_m:app is an int, which cannot be called"),
        ("app = None", "app", "lsx_m:app is None, which cannot be called"),
        ("import lsx_gone", "app", r"lsx_m failed: ModuleNotFoundError: .*lsx_gone.*lsx_m.py, line 1\)"),
        ("\n1/0", "app", r"importing lsx_m failed: ZeroDivisionError: .* \(.*lsx_m.py, line 2\)$"),
        ("def f(:\n", "app", r"importing lsx_m failed: SyntaxError: .*lsx_m.py, line 1\)"),
        ("raise SystemExit(3)", "app", "importing lsx_m failed: SystemExit: 3"),
        ("raise ValueError('two\\nlines')", "app", "ValueError: two lines"),
        ("def app(a, b, c, d): ...", "app", "takes 4 arguments"),
        ("async def app(): ...", "app", "takes no arguments: an ASGI application takes"),
    ],
)
def test_failures_are_one_line(directory: Path, source: str | None, attribute: str, message: str) -> None:
    with pytest.raises(BootFailed, match=message) as caught:
        load(directory, f"lsx_m:{attribute}", source)
    assert "\n" not in str(caught.value)


def test_the_cause_is_kept_for_debugging(directory: Path) -> None:
    with pytest.raises(BootFailed) as caught:
        load(directory, "lsx_cause:app", "1/0")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_missing_parent_package(directory: Path) -> None:
    with pytest.raises(BootFailed, match=r"cannot import lsx_no\.such\.mod: no module named 'lsx_no'"):
        load(directory, "lsx_no.such.mod:app")


urlpatterns: list[Any] = []
