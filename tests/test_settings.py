"""leanserve.settings: one home, one rule per setting, and a reference page that is never stale."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leanserve.errors import SettingsError
from leanserve.option import check_value
from leanserve.settings import Settings, options

ROOT = Path(__file__).parent.parent


def test_every_default_passes_its_own_check() -> None:
    for _, item, _ in options():
        assert check_value(item, item.default) == item.default, item.name


def test_a_group_stays_small_and_names_are_unique() -> None:
    names: list[str] = []
    for group in dataclasses.fields(Settings):
        fields = dataclasses.fields(getattr(Settings(), group.name))
        assert len(fields) <= 9, group.name
        names += [item.name for item in fields]
    aliases = [alias for _, _, facts in options() for alias in facts.aliases]
    assert len(set(names + aliases)) == len(names + aliases)


def test_every_setting_says_what_it_does() -> None:
    for group, item, facts in options():
        assert group.__doc__
        assert facts.help[0].isupper() or facts.help.startswith(("NAME", "HOST", "APP")), item.name
        assert facts.help.endswith("."), item.name
        if item.name.endswith("_timeout"):
            assert facts.unit == "seconds", item.name


def test_flat_names_find_their_group() -> None:
    settings = Settings.build(port=0, workers=4, timeout_keep_alive=9, header=["a: b"])
    assert settings.listen.port == 0
    assert settings.pool.workers == 4
    assert settings.timeouts.keep_alive_timeout == 9
    assert settings.http.header == ("a: b",)
    assert settings.replace(port=1).pool.workers == 4
    assert settings.listen.port == 0


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"ports": 1}, "unknown setting 'ports'"),
        ({"port": "1"}, "port must be int"),
        ({"header": ("no colon",)}, "NAME:VALUE"),
        ({"header": ("a: b\r\nc: d",)}, "NAME:VALUE"),
        ({"header": ("sp ace: b",)}, "NAME:VALUE"),
        ({"ssl_keyfile": "k"}, "ssl_keyfile needs ssl_certfile"),
        ({"ssl_cert_reqs": "2", "ssl_certfile": "c"}, "needs ssl_ca_certs"),
        ({"limit_concurrency": 0}, "max_concurrent_requests must be at least 1"),
        ({"max_concurrent_requests": 1 << 20}, "must be at most 32768"),
        ({"max_queue": 1}, "max_queue needs max_concurrent_requests"),
        ({"max_concurrent_requests": 1, "fair_by": "client"}, "fair_by needs max_queue"),
        ({"max_concurrent_requests": 1, "max_queue": 1, "fair_by": "a header"}, "fair_by must be"),
        ({"max_concurrent_requests": 1, "max_queue": 1, "fair_by": ""}, "fair_by must be"),
        ({"limit_exempt": ("health",)}, "limit_exempt must be a path"),
    ],
)
def test_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.build(**flat)


def test_own_tls_context_needs_no_files() -> None:
    assert Settings.build(ssl_context_factory="tls:make", ssl_cert_reqs=2).tls.ssl_cert_reqs == "required"


def test_reference_page_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_settings.py"), "--check"],
        capture_output=True, text=True, timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_reference_page_check_can_fail(tmp_path: Path) -> None:
    stale = tmp_path / "settings.md"
    stale.write_text("old")
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_settings.py"), "--check", str(stale)],
        capture_output=True, text=True, timeout=50,
    )
    assert done.returncode == 1
    assert "make_settings.py" in done.stderr
