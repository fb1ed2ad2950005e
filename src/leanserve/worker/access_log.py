"""The access line: one per exchange, at its completion, as text, as JSON or by gunicorn's atoms.

No control byte reaches it, no line break, and nothing but ASCII: a target is percent-encoded as its client
should have done it, and in the value of a header such a byte, a quote or a backslash becomes ``\\xNN``. So a
peer can neither end the quoted part of a line nor write to somebody's terminal.
"""

from __future__ import annotations

import binascii
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

from leanserve.asgi.messages import ExchangeRecord
from leanserve.settings import ACCESS_ATOM, LogSettings

__all__ = ["AccessLog"]

logger = logging.getLogger("leanserve.access")

# One value of a header may have 64 KiB (header_bytes), and its line is read by somebody.
_VALUE_BYTES = 1024

_NOT_IN_TARGET = re.compile(r'[^\x21-\x7e]|"')
_NOT_IN_VALUE = re.compile(r'[^\x20-\x7e]|["\\]')
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_Getter = Callable[[ExchangeRecord, dict[str, Any]], Any]


class AccessLog:
    """Writes the lines of one worker.

    Args:
        settings: the form of a line, and the field that has the id of a request.
    """

    def __init__(self, settings: LogSettings) -> None:
        self._worker = os.getpid()
        self._id_field = (settings.request_id_header or "").lower().encode("ascii")
        form = settings.access_form
        self._line: _Getter
        if form == "text":
            self._line = _text_line
        elif form == "json":
            import json

            encode = json.JSONEncoder().encode
            self._line = lambda record, fields: encode({"time": _iso_time(time.time()), **fields})
        else:
            self._line = _compile(form, self._worker)

    def write(self, record: ExchangeRecord) -> None:
        """Log `record`; formatters of the operator's own find its fields in ``extra``."""
        if logger.isEnabledFor(logging.INFO):
            fields = self._fields(record)
            # Not logger.info(): who called it is always this function, and finding that out takes as long as
            # the rest of the line.
            made = logger.makeRecord(
                logger.name, logging.INFO, __file__, 0, self._line(record, fields), (), None, "write", fields
            )
            logger.handle(made)

    def _fields(self, record: ExchangeRecord) -> dict[str, Any]:
        first = record.first_byte_s
        request_id = traceparent = None
        for name, value in record.request_headers:
            if name == self._id_field:
                request_id = value if request_id is None else request_id + b", " + value
            if name == b"traceparent":
                traceparent = value if traceparent is None else traceparent + b", " + value
        return {
            "client": "-" if record.client is None else _clean(f"{record.client[0]}:{record.client[1]}"),
            "method": _clean(record.method),
            "path": _NOT_IN_TARGET.sub(_percent, record.path),
            "query": _NOT_IN_TARGET.sub(_percent, record.query),
            "version": record.version,
            "status": record.status,
            "duration_ms": round(record.duration_s * 1000, 3),
            "ttfb_ms": None if first is None else round(first * 1000, 3),
            "request_bytes": record.received_bytes,
            "response_bytes": record.sent_bytes,
            "worker": self._worker,
            "request_id": None if request_id is None else _value(request_id),
            "traceparent": None if traceparent is None else _value(traceparent),
            "cause": record.cause,
        }


def _text_line(_record: ExchangeRecord, fields: dict[str, Any]) -> str:
    """What every request has first, then what only some have, then the cause of an early end."""
    duration, first = f"{fields['duration_ms']:.1f}", fields["ttfb_ms"]
    line = f'{fields["client"]} "{_request_line(fields)}" {fields["status"]} {fields["response_bytes"]} '
    line += f"{duration}ms"
    if first is not None and (shown := f"{first:.1f}") != duration:
        line += f" first={shown}ms"
    if fields["request_bytes"]:
        line += f" in={fields['request_bytes']}"
    if fields["request_id"] is not None:
        line += f' id="{fields["request_id"]}"'
    if fields["traceparent"] is not None:
        line += f' traceparent="{fields["traceparent"]}"'
    return f"{line} {fields['cause']}" if fields["cause"] else line


def _request_line(fields: dict[str, Any]) -> str:
    target = f"{fields['path']}?{fields['query']}" if fields["query"] else fields["path"]
    return f"{fields['method']} {target} HTTP/{fields['version']}"


def _percent(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in _byte_or_utf8(found[0]))


def _byte_or_utf8(character: str) -> bytes:
    # Peers' bytes come as latin-1; anything beyond can only be the operator's own.
    return character.encode("latin-1" if character <= "\xff" else "utf-8", "replace")


def _clean(text: str) -> str:
    return _NOT_IN_VALUE.sub(lambda found: "".join(f"\\x{it:02x}" for it in _byte_or_utf8(found[0])), text)


def _header(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> str | None:
    """All values of a header as one list (RFC 9110 section 5.3), None without it."""
    values = [value for name, value in headers if name == wanted]
    if not values:
        return None
    return _value(b", ".join(values))


def _value(value: bytes) -> str:
    cut = value[:_VALUE_BYTES].decode("latin-1")
    return _clean(cut if len(value) <= _VALUE_BYTES else cut + "...")


def _iso_time(now: float) -> str:
    """UTC with milliseconds."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"


# Atoms: the letters are gunicorn's, the words are the fields of the JSON.


def _compile(form: str, worker: int) -> _Getter:
    """The function that makes a line by a format such as ``%(h)s %(s)s``; the settings have checked it."""
    letters = {**_LETTERS, "p": lambda record, fields: f"<{worker}>"}
    getters = []
    for found in ACCESS_ATOM.finditer(form):
        name = found[1]
        if name is None:
            continue  # %%
        getters.append(_variable(name) if name[0] == "{" else letters.get(name) or _field(name))
    template = ACCESS_ATOM.sub(lambda found: "%s" if found[1] else "%%", form)
    return lambda record, fields: template % tuple(get(record, fields) for get in getters)


def _field(name: str) -> _Getter:
    return lambda record, fields: "-" if fields[name] is None or fields[name] == "" else fields[name]


def _variable(name: str) -> _Getter:
    """``{name}i``, ``{name}o`` or ``{name}e``: of the request, of the response, of the environment."""
    inner, kind = name[1:-2], name[-1]
    if kind == "e":
        value = _clean(os.environ.get(inner) or "-")
        return lambda record, fields: value
    wanted = inner.lower().encode("ascii")
    if kind == "i":
        return lambda record, fields: _header(record.request_headers, wanted) or "-"
    return lambda record, fields: _header(record.response_headers, wanted) or "-"


def _user(record: ExchangeRecord) -> str:
    """RFC 7617 section 2: "Basic" and base64 of user-id ":" password."""
    for name, value in record.request_headers:
        if name == b"authorization" and value[:6].lower() == b"basic ":
            try:
                user, colon, _ = binascii.a2b_base64(value[6:].strip(), strict_mode=True).partition(b":")
            except binascii.Error:
                return "-"
            return _clean(user[:_VALUE_BYTES].decode("latin-1")) or "-" if colon else "-"
    return "-"


def _clf_time(record: ExchangeRecord) -> str:
    """When the request came, in local time, as in the Common Log Format; months are not those of a locale."""
    then = time.localtime(time.time() - record.duration_s)
    return time.strftime(f"[%d/{_MONTHS[then.tm_mon - 1]}/%Y:%H:%M:%S %z]", then)


_LETTERS: dict[str, _Getter] = {
    "h": lambda record, fields: "-" if record.client is None else _clean(record.client[0]),
    "l": lambda record, fields: "-",
    "u": lambda record, fields: _user(record),
    "t": lambda record, fields: _clf_time(record),
    "r": lambda record, fields: _request_line(fields),
    "m": lambda record, fields: fields["method"],
    "U": lambda record, fields: fields["path"],
    "q": lambda record, fields: fields["query"],
    "H": lambda record, fields: f"HTTP/{record.version}",
    "s": lambda record, fields: record.status,
    "B": lambda record, fields: record.sent_bytes,
    "b": lambda record, fields: record.sent_bytes or "-",
    "f": lambda record, fields: _header(record.request_headers, b"referer") or "-",
    "a": lambda record, fields: _header(record.request_headers, b"user-agent") or "-",
    "T": lambda record, fields: int(record.duration_s),
    "M": lambda record, fields: int(record.duration_s * 1000),
    "D": lambda record, fields: int(record.duration_s * 1_000_000),
    "L": lambda record, fields: f"{record.duration_s:.6f}",
}
