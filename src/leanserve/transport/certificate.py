"""Until when a certificate is valid. The standard library tells that of peers only."""

from __future__ import annotations

import calendar
import ssl
import time

__all__ = ["expiry_of", "first_in"]

_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def first_in(text: str) -> str | None:
    """The first certificate in a text, as PEM; None when there is none."""
    begin, end = text.find(_BEGIN), text.find(_END)
    return None if begin < 0 or end < begin else text[begin : end + len(_END)] + "\n"


def expiry_of(pem: str) -> float:
    """The notAfter of the first certificate in a text, in seconds since 1970.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    first = first_in(pem)
    if first is None:
        raise ValueError("there is no certificate")
    der = ssl.PEM_cert_to_DER_cert(first)
    try:
        return _not_after(der)
    except IndexError:
        raise ValueError("the certificate is cut short") from None


def _not_after(der: bytes) -> float:
    """RFC 5280 section 4.1: Certificate { tbsCertificate { [version,] serialNumber, signature, issuer,
    validity { notBefore, notAfter } ... } ... }."""
    _, place, _ = _read(der, 0)  # into Certificate
    _, place, _ = _read(der, place)  # into tbsCertificate
    if der[place] == _VERSION:
        place = _read(der, place)[2]
    for _ in ("serialNumber", "signature", "issuer"):
        place = _read(der, place)[2]
    tag, place, _ = _read(der, place)
    if tag != _SEQUENCE:
        raise ValueError("the certificate has no validity where it should be")
    place = _read(der, place)[2]  # past notBefore
    tag, begin, end = _read(der, place)
    return _read_time(tag, der[begin:end].decode("ascii"))


def _read(der: bytes, place: int) -> tuple[int, int, int]:
    """Tag, begin and end of the contents of one element; X.690 section 8.1.3 has the length."""
    tag, length = der[place], der[place + 1]
    begin = place + 2
    if length & 0x80:
        count = length & 0x7F
        length = int.from_bytes(der[begin : begin + count], "big")
        begin += count
    if begin + length > len(der):
        raise ValueError("the certificate is cut short")
    return tag, begin, begin + length


def _read_time(tag: int, text: str) -> float:
    if tag == _UTC_TIME:
        # RFC 5280 section 4.1.2.5.1: "Where YY is greater than or equal to 50, the year SHALL be interpreted
        # as 19YY; and where YY is less than 50, the year SHALL be interpreted as 20YY."
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("the certificate has no date where it should be")
    return calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ"))
