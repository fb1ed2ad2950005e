"""Until when a certificate is valid: as the library that made it says."""

from __future__ import annotations

import base64
import datetime

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from leanserve.transport.certificate import expiry_of


def issue(until: datetime.datetime) -> str:
    chain = trustme.CA().issue_cert("localhost", "127.0.0.1", not_after=until).cert_chain_pems
    return chain[0].bytes().decode()


@pytest.mark.parametrize(
    "until",
    [
        datetime.datetime(2030, 2, 28, 23, 59, 59, tzinfo=datetime.UTC),  # UTCTime
        datetime.datetime(2049, 12, 31, 23, 59, 59, tzinfo=datetime.UTC),
        datetime.datetime(2051, 1, 1, 0, 0, 1, tzinfo=datetime.UTC),  # GeneralizedTime
    ],
)
def test_not_after(until: datetime.datetime) -> None:
    pem = issue(until)
    assert expiry_of(pem) == until.timestamp()
    assert expiry_of("a key before it\n" + pem + issue(until.replace(year=2040))) == until.timestamp()


@pytest.mark.parametrize("text", ["", "nothing", "-----END CERTIFICATE----------BEGIN CERTIFICATE-----"])
def test_no_certificate(text: str) -> None:
    with pytest.raises(ValueError, match="no certificate"):
        expiry_of(text)


def wrap(der: bytes) -> str:
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"


def test_one_that_is_cut_short_anywhere() -> None:
    whole = base64.b64decode("".join(issue(datetime.datetime(2030, 1, 1)).splitlines()[1:-1]))
    assert expiry_of(wrap(whole)) > 0
    for size in range(len(whole)):
        with pytest.raises(ValueError):
            expiry_of(wrap(whole[:size]))


@given(st.binary(max_size=80))
def test_anything_else_is_an_error_and_no_date(der: bytes) -> None:
    with pytest.raises(ValueError):
        expiry_of(wrap(der))
