"""leanserve.inplace: what a change of settings takes."""

from __future__ import annotations

import pytest

from leanserve.inplace import IN_PLACE, compare
from leanserve.settings import Settings, options


def test_every_name_is_one_of_a_setting() -> None:
    assert {item.name for _, item, _ in options()} >= IN_PLACE


def test_nothing_has_changed() -> None:
    change = compare(Settings(), Settings())
    assert (change.in_place, change.with_workers, change.with_restart) == ({}, (), ())


@pytest.mark.parametrize(
    ("flat", "in_place", "with_workers", "with_restart"),
    [
        ({"log_level": "debug"}, {"log_level": "debug"}, (), ()),
        ({"server_header": False, "max_body_size": 5}, {"max_body_size": 5}, ("server_header",), ()),
        ({"workers": 3, "hang_limit": 5}, {"hang_limit": 5}, (), ("workers",)),
        ({"bind": ("127.0.0.1:1",)}, {}, (), ("bind",)),
        ({"max_concurrent_requests": 4, "max_queue": 4, "fair_by": "client"}, {}, (),
         ("max_concurrent_requests", "max_queue", "fair_by")),
    ],
)  # fmt: skip
def test_kinds(
    flat: dict[str, object], in_place: dict[str, object], with_workers: object, with_restart: object
) -> None:
    new = Settings.build(**flat)
    change = compare(Settings(), new)
    assert (change.in_place, change.with_workers, change.with_restart) == (
        in_place, with_workers, with_restart,
    )  # fmt: skip
    # The second time there is nothing new but what a restart brings.
    again = compare(change.settings, new)
    assert (again.in_place, again.with_workers, again.with_restart) == ({}, (), with_restart)


@pytest.mark.parametrize(
    ("old", "new", "in_place", "with_workers", "with_restart"),
    [
        ({"ssl_certfile": "a"}, {"ssl_certfile": "b"}, {"ssl_certfile": "b"}, (), ()),
        ({"ssl_certfile": "a"}, {"ssl_certfile": "b", "ssl_ciphers": "x"}, {},
         ("ssl_certfile", "ssl_ciphers"), ()),
        ({"ssl_certfile": "a", "ssl_ca_certs": "c", "ssl_cert_reqs": "required"}, {"ssl_certfile": "a"}, {},
         ("ssl_ca_certs", "ssl_cert_reqs"), ()),
        ({}, {"ssl_certfile": "b"}, {}, (), ("ssl_certfile",)),
        ({"ssl_certfile": "a", "ssl_keyfile": "k"}, {}, {}, (), ("ssl_certfile", "ssl_keyfile")),
    ],
)  # fmt: skip
def test_tls(
    old: dict[str, object], new: dict[str, object],
    in_place: object, with_workers: object, with_restart: object,
) -> None:
    change = compare(Settings.build(**old), Settings.build(**new))
    assert (change.in_place, change.with_workers, change.with_restart) == (
        in_place, with_workers, with_restart,
    )  # fmt: skip
    kept = Settings.build(**old) if with_restart else Settings.build(**new)
    assert change.settings.tls == kept.tls
