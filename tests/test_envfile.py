"""leanserve.envfile: what a line says is what the application gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanserve.envfile import load_env_file, parse_env_lines
from leanserve.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("# comment\n\n  # another", {}),
        ("A=1", {"A": "1"}),
        ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
        ("export A = 1", {"A": "1"}),
        ("A=", {"A": ""}),
        ("A=1 # why", {"A": "1"}),
        ("A=http://x/#y", {"A": "http://x/#y"}),
        ("A=b=c", {"A": "b=c"}),
        ("A=' b # c '", {"A": " b # c "}),
        ('A="$HOME" # kept', {"A": "$HOME"}),
        ("A=1\nA=2", {"A": "2"}),
        ("export=1", {"export": "1"}),
    ],
)
def test_lines(text: str, found: dict[str, str]) -> None:
    assert parse_env_lines(text) == found


@pytest.mark.parametrize("line", ["A", "1A=2", "A B=2", "=2", "A='b", 'A="b" c', "A-B=1"])
def test_wrong_lines_are_named(line: str) -> None:
    with pytest.raises(SettingsError, match=r"^f:2: "):
        parse_env_lines("OK=1\n" + line, name="f")


def test_the_environment_wins(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("A=file\nB=file\n")
    environment = {"A": "set"}
    load_env_file(str(path), environment)
    assert environment == {"A": "set", "B": "file"}


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        load_env_file(str(tmp_path / "none"), {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load_env_file(str(tmp_path / "binary"), {})
