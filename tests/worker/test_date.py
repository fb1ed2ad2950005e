"""The date header, beside the one of the standard library."""

from __future__ import annotations

from email.utils import formatdate

from hypothesis import given
from hypothesis import strategies as st

from leanserve.worker.date import format_date


def test_the_example_of_the_rfc() -> None:
    assert format_date(784111777) == b"Sun, 06 Nov 1994 08:49:37 GMT"


@given(st.integers(0, 253402300799))
def test_any_second_up_to_the_year_9999(seconds: int) -> None:
    assert format_date(seconds) == formatdate(seconds, usegmt=True).encode("ascii")
