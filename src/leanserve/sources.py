"""Where the value of each setting comes from: command line, environment, file, default, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from leanserve.configfile import ConfigFile
from leanserve.errors import SettingsError
from leanserve.option import Frozen, Option, kind_of, parse_value
from leanserve.settings import Settings, options

__all__ = ["FALSE", "TRUE", "Resolved", "resolve", "show"]

TRUE = ("1", "true", "t", "yes", "y", "on")
FALSE = ("0", "false", "f", "no", "n", "off")

COMMAND_LINE, DEFAULT = "command line", "default"


class Resolved(Frozen):
    """The outcome.

    Attributes:
        app: what is served, ``module:attribute``.
        settings: all of them.
        sources: by name ("app" too): "command line", "environment NAME", "file NAME" or "default".
    """

    app: str
    settings: Settings
    sources: Mapping[str, str]


def resolve(
    app: str | None,
    given: Mapping[str, Any],
    environment: Mapping[str, str],
    file: ConfigFile | None = None,
    *,
    default_app: str = "",
) -> Resolved:
    """Take each value from the first place that has one.

    Args:
        app: of the command line.
        given: per setting a text, a bool, or a tuple of texts; None, () or nothing when it is not there.
        environment: ``LEANSERVE_<NAME>`` and the few foreign names that settings declare.
        file: what a file says, checked.
        default_app: served when nobody names an application.

    Raises:
        SettingsError: a text cannot be read, or a value is refused.
    """
    flat: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for _, item, facts in options():
        value, source = given.get(item.name), COMMAND_LINE
        if value is None or value == ():
            value, source = _from_environment(item, facts, environment)
        if value is not None:
            texts = value if isinstance(value, tuple) else (value,)
            parsed = [parse_value(item, text) if isinstance(text, str) else text for text in texts]
            flat[item.name] = sum(parsed, ()) if kind_of(item) == "tuple" else parsed[0]
        elif file is not None and item.name in file.values:
            flat[item.name], source = file.values[item.name], f"file {file.name}"
        sources[item.name] = source
    name, sources["app"] = _find_app(app, environment, file)
    return Resolved(app=name or default_app, settings=Settings.build(**flat), sources=sources)


def _find_app(
    app: str | None, environment: Mapping[str, str], file: ConfigFile | None
) -> tuple[str | None, str]:
    if app:
        return app, COMMAND_LINE
    if environment.get("LEANSERVE_APP"):
        return environment["LEANSERVE_APP"], "environment LEANSERVE_APP"
    if file is not None and file.app is not None:
        return file.app, f"file {file.name}"
    return None, DEFAULT


def _from_environment(item: Field[Any], facts: Option, environment: Mapping[str, str]) -> tuple[Any, str]:
    """The text (or texts, or switch) of the first variable that is set and not empty, and its name."""
    ours = [f"LEANSERVE_{name.upper()}" for name in (item.name, *facts.aliases)]
    for name in (*ours, *facts.environment):
        text: Any = environment.get(name, "")
        if not text:
            continue
        if kind_of(item) == "bool":
            if text.lower() not in (*TRUE, *FALSE):
                raise SettingsError(f"{name} must be true or false, not {text!r}")
            text = text.lower() in TRUE
        elif kind_of(item) == "tuple":
            for separator in facts.separators:
                text = text.replace(separator, "\0")
            text = tuple(part.strip() for part in text.split("\0") if part.strip())
        return text, f"environment {name}"
    return None, DEFAULT


def show(resolved: Resolved, *, as_json: bool = False) -> str:
    """A table of name, value (as a settings file has it) and source, or a JSON object; without secrets."""
    import json

    shown: dict[str, Any] = {"app": resolved.app}
    for group in fields(Settings):
        values = getattr(resolved.settings, group.name)
        for item in fields(values):
            shown[item.name] = _presentable(item.metadata["option"], getattr(values, item.name))
    if as_json:
        table = {name: {"value": value, "source": resolved.sources[name]} for name, value in shown.items()}
        return json.dumps(table, indent=2, default=str)  # a log_config in TOML may hold dates
    rows = [
        (
            name,
            json.dumps("none" if value is None else value, default=str).replace("\x7f", "\\u007f"),
            resolved.sources[name],
        )
        for name, value in shown.items()
    ]
    widths = [max(len(row[place]) for row in rows if len(row[place]) < 40) for place in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {value:{widths[1]}}  {source}" for name, value, source in rows)


def _presentable(facts: Option, value: Any) -> Any:
    if facts.secret and value is not None:
        return "***"
    return f"{value:o}" if facts.unit == "octal" else value
