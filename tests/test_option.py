"""leanserve.option: the check of a value, and reading it from text."""

from __future__ import annotations

import dataclasses
import pickle
import ssl
from dataclasses import field
from typing import Any

import pytest

from leanserve.errors import SettingsError
from leanserve.option import Frozen, accepts_none, check_value, kind_of, parse_value
from leanserve.settings import Settings, options

FIELDS: dict[str, dataclasses.Field[Any]] = {item.name: item for _, item, _ in options()}


@pytest.mark.parametrize(
    ("name", "kind", "none"),
    [
        ("port", "int", False),
        ("fd", "int", True),
        ("drain_timeout", "float", False),
        ("access_log", "bool", False),
        ("use_colors", "bool", True),
        ("bind", "tuple", False),
        ("workers", "int", False),
        ("log_config", "str", True),
        ("ssl_context_factory", "str", True),
    ],
)
def test_kind(name: str, kind: str, none: bool) -> None:
    assert kind_of(FIELDS[name]) == kind
    assert accepts_none(FIELDS[name]) is none


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "0", 0),
        ("port", "65535", 65535),
        ("uds_mode", "600", 0o600),
        ("uds_mode", "0o640", 0o640),
        ("header_bytes", "64k", 65536),
        ("ws_max_size", "16M", 16 << 20),
        ("ws_max_size", "1 GiB", 1 << 30),
        ("drain_timeout", "2.5", 2.5),
        ("drain_timeout", "inf", float("inf")),
        ("lifespan_shutdown_timeout", "none", None),
        ("workers", "auto", "auto"),
        ("workers", "4", 4),
        ("ssl_cert_reqs", "2", "required"),
        ("ssl_cert_reqs", "optional", "optional"),
        ("bind", "[::1]:80", ("[::1]:80",)),
        ("host", "none", "none"),
    ],
)
def test_text_is_read(name: str, text: str, value: object) -> None:
    read = parse_value(FIELDS[name], text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("port", "http", "port must be a number, not 'http'"),
        ("port", "65536", "port must be at most 65535, not 65536"),
        ("port", "-1", "port must be at least 0, not -1"),
        ("port", "1k", "port must be a number, not '1k'"),
        ("uds_mode", "888", "uds_mode must be a number, not '888'"),
        ("drain_timeout", "fast", "drain_timeout must be a number of seconds, not 'fast'"),
        ("drain_timeout", "nan", "drain_timeout must be a number, not nan"),
        ("ws_max_size", "many", "ws_max_size must be a number of bytes, not 'many'"),
        ("workers", "all", "workers must be a number or auto, not 'all'"),
        ("workers", "0", "workers must be at least 1, not 0"),
        ("loop", "zuvloop", "loop must be one of auto, uvloop, asyncio, not 'zuvloop'"),
        ("ssl_cert_reqs", "3", "ssl_cert_reqs must be one of none, optional, required, not '3'"),
    ],
)
def test_text_is_refused_with_one_clear_line(name: str, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_value(FIELDS[name], text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "80"),
        ("port", 80.0),
        ("port", True),
        ("port", None),
        ("access_log", 1),
        ("bind", "127.0.0.1:80"),
        ("bind", [80]),
        ("workers", "many"),
        ("workers", False),
        ("drain_timeout", float("nan")),
        ("host", b"::"),
    ],
)
def test_values_of_the_wrong_type_are_refused(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=name):
        check_value(FIELDS[name], value)


def test_values_are_normalised() -> None:
    assert check_value(FIELDS["bind"], ["a:1", "b:2"]) == ("a:1", "b:2")
    assert check_value(FIELDS["ssl_cert_reqs"], int(ssl.CERT_OPTIONAL)) == "optional"
    assert check_value(FIELDS["ssl_context_factory"], ssl.create_default_context)
    assert check_value(FIELDS["log_config"], {"version": 1}) == {"version": 1}


class Point(Frozen):
    """Two fields with defaults, one without."""

    name: str
    x: int = 0
    parts: list[str] = field(default_factory=list)


def test_a_frozen_record_is_a_dataclass_with_keywords() -> None:
    point = Point(name="a", x=1)
    assert repr(point) == "Point(name='a', x=1, parts=[])"
    assert point == Point(name="a", x=1)
    assert point != Point(name="a")
    assert point != ("a", 1, [])
    assert dataclasses.replace(point, x=2) == Point(name="a", x=2)
    assert Point(name="a").parts is not Point(name="b").parts
    assert pickle.loads(pickle.dumps(point)) == point
    assert hash(Settings()) == hash(Settings())
    assert hash(Settings()) != hash(Settings.build(port=1))


def test_a_frozen_record_refuses_change_and_wrong_names() -> None:
    point = Point(name="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del point.x
    with pytest.raises(TypeError, match="Point needs name"):
        Point()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Point has no y"):
        Point(name="a", y=1)  # type: ignore[call-arg]
