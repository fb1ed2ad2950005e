"""The application: its types, finding it by name, and making one ASGI 3 callable of whatever it is."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from types import FrameType, TracebackType
from typing import Any, Protocol

from leanserve.errors import BootFailed, SettingsError
from leanserve.settings import LoadSettings

__all__ = [
    "ASGI2App",
    "ASGI3App",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "detect_interface",
    "load_app",
    "parse_app_string",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]


class Receive(Protocol):
    """``await receive()``: the next event for the application."""

    def __call__(self) -> Awaitable[Message]: ...


class Send(Protocol):
    """``await send(message)``: an event from the application."""

    def __call__(self, message: Message, /) -> Awaitable[None]: ...


class ASGI3App(Protocol):
    """An ASGI 3 application: one call per connection scope."""

    def __call__(self, scope: Scope, receive: Receive, send: Send, /) -> Awaitable[None]: ...


class ASGI2App(Protocol):
    """An ASGI 2 application: the scope first, what that returns takes receive and send."""

    def __call__(self, scope: Scope, /) -> Callable[[Receive, Send], Awaitable[None]]: ...


# Named and not imported: the adapter stands above this layer (it needs threads) and is optional weight.
_WSGI_ADAPTER = ("leanserve.compat.wsgi", "WsgiAdapter")


def load_app(app: str | Any, settings: LoadSettings) -> ASGI3App:
    """The ASGI 3 callable that `app` stands for: ``module:attribute``, or the object itself.

    Raises:
        SettingsError: `app` is not of the form ``module:attribute``.
        BootFailed: it cannot be imported, found, built by its factory, or called. The message is one line;
            the application's own exception, where there is one, is its ``__cause__``.
    """
    name = app if isinstance(app, str) else _name_of(app)
    found = _import(app, settings.app_dir) if isinstance(app, str) else app
    if settings.factory:
        found = _build(name, found)
    if not callable(found):
        raise BootFailed(
            f"{name} is {_a(found)}, which cannot be called: name the application object (or its --factory)"
        )
    interface = settings.interface if settings.interface != "auto" else detect_interface(found, name)
    if interface == "wsgi":
        module, attribute = _WSGI_ADAPTER
        adapter = getattr(importlib.import_module(module), attribute)
        return adapter(found, threads=settings.wsgi_threads)  # type: ignore[no-any-return]  # a name, as above
    return _Asgi2(found) if interface == "asgi2" else found


def parse_app_string(app: str) -> tuple[str, str]:
    """Split ``package.module:attribute.path``.

    Raises:
        SettingsError: it has not this form; the message says what to write.
    """
    module, colon, attribute = app.partition(":")
    if _dotted(module) and _dotted(attribute):
        return module, attribute
    stem = module.removesuffix(".py").replace(os.sep, ".").strip(".")
    hint = f"{stem if _dotted(stem) else 'main'}:{attribute if _dotted(attribute) else 'app'}"
    problem = "is not" if colon else "has no ':', it should be"
    raise SettingsError(f"APP {app!r} {problem} MODULE:ATTRIBUTE; write for example {hint}")


def _dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _import(app: str, app_dir: str) -> Any:
    module_name, attribute = parse_app_string(app)
    directory = os.path.abspath(app_dir)
    if sys.path[0] != directory:
        sys.path.insert(0, directory)
    importlib.invalidate_caches()  # a file written since the last look, in a notebook or a test
    found = _run_foreign(lambda: importlib.import_module(module_name), module_name, directory)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise BootFailed(f"{app}: {_no_attribute(found, part, module_name)}") from None
    return found


def _no_attribute(owner: Any, part: str, module_name: str) -> str:
    import difflib  # for this message only

    where = f"module {module_name}" if inspect.ismodule(owner) else _a(owner)
    close = difflib.get_close_matches(part, dir(owner), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "is the name after the ':' right?"
    return f"{where} has no attribute {part!r}; {hint}"


def _run_foreign(call: Callable[[], Any], what: str, directory: str = "") -> Any:
    """Call the application's code; whatever it raises becomes a BootFailed that names the line."""
    try:
        return call()
    except (Exception, SystemExit) as error:  # around the app: it may raise anything
        # The module itself (or a package above it) is missing: not the fault of an import inside it.
        if isinstance(error, ModuleNotFoundError) and directory and (what + ".").startswith(f"{error.name}."):
            raise BootFailed(
                f"cannot import {what}: no module named {error.name!r} in {directory} or on the Python path; "
                "is --app-dir right?"
            ) from None
        verb = "importing" if directory else "calling the factory"
        raise BootFailed(f"{verb} {what} failed: {_describe(error)}") from error


def _describe(error: BaseException) -> str:
    """The exception in one line, with the place that raised it."""
    text = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SyntaxError):  # its text names the file and line already
        return shown
    frame, line = _last_frame(error.__traceback__)
    return f"{shown} ({frame.f_code.co_filename}, line {line})" if frame is not None else shown


def _last_frame(trace: TracebackType | None) -> tuple[FrameType | None, int]:
    found: tuple[FrameType | None, int] = (None, 0)
    for frame, line in traceback.walk_tb(trace):
        if frame.f_globals.get("__name__") != __name__ and not frame.f_code.co_filename.startswith("<frozen"):
            found = (frame, line)
    return found


def _build(name: str, factory: Any) -> Any:
    if not callable(factory):
        raise BootFailed(f"{name} is {_a(factory)}, which is no factory: leave --factory out")
    built = _run_foreign(factory, name)
    if inspect.iscoroutine(built):
        built.close()
        raise BootFailed(f"the factory {name} is a coroutine function: it must be a plain one")
    return built


class _Asgi2:
    """One ASGI 3 call made of the two of ASGI 2."""

    __slots__ = ("_app",)

    def __init__(self, app: ASGI2App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope)(receive, send)


def detect_interface(app: Any, name: str = "the application") -> str:
    """Tell ``asgi3``, ``asgi2`` and ``wsgi`` apart, as ``--interface auto`` does.

    A coroutine function is ASGI 3. Among the rest the number of arguments decides, and it is unambiguous:
    ASGI 3 takes three, ASGI 2 takes one and returns the second callable, and nothing but WSGI takes two
    (environ and start_response: Flask, Django's wsgi.py). Where arguments cannot be counted, a callable that
    is not a coroutine function is ASGI 2, the reading that the ASGI reference implementation has.

    Raises:
        BootFailed: it takes no argument (a factory), or more than three.
    """
    # The hints that asgiref defines for callables that hide what they are.
    if getattr(app, "_asgi_single_callable", False):
        return "asgi3"
    if getattr(app, "_asgi_double_callable", False):
        return "asgi2"
    call = app if inspect.isroutine(app) or inspect.isclass(app) else getattr(app, "__call__", app)  # noqa: B004
    if inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(call):
        if _positional(app) == 0:
            raise BootFailed(f"{name} takes no arguments: an ASGI application takes scope, receive and send")
        return "asgi3"
    count = _positional(app)
    if count == 0:
        raise BootFailed(f"{name} takes no arguments: it looks like a factory, start with --factory")
    if count is not None and count > 3:
        raise BootFailed(f"{name} takes {count} arguments: an ASGI application takes scope, receive and send")
    return {1: "asgi2", 2: "wsgi", 3: "asgi3", None: "asgi2"}[count]


def _positional(app: Any) -> int | None:
    """How many positional arguments a call needs; None when that cannot be told."""
    try:
        parameters = inspect.signature(app).parameters.values()
    except (ValueError, TypeError):
        return None  # written in C
    kinds = {parameter.kind for parameter in parameters}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(item.kind in by_place and item.default is item.empty for item in parameters)


def _name_of(app: Any) -> str:
    return str(getattr(app, "__qualname__", None) or type(app).__qualname__)


def _a(value: Any) -> str:
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
