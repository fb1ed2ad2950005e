"""The access line: one record per exchange, at its completion."""

from __future__ import annotations

import logging

from leanserve.asgi.messages import ExchangeRecord

__all__ = ["write_access"]

logger = logging.getLogger("leanserve.access")


def write_access(record: ExchangeRecord) -> None:
    """Log `record`; formatters of the operator's own find its fields in ``extra``.

    No control byte reaches a log: the path is the raw one, still percent-encoded, and the parser let no
    control byte into it.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    client = "-" if record.client is None else f"{record.client[0]}:{record.client[1]}"
    target = f"{record.path}?{record.query}" if record.query else record.path
    target = target.replace('"', "%22")  # a raw one is legal, and would end the quoted part of the line
    logger.info(
        '%s "%s %s HTTP/%s" %d %d %.1fms%s',
        client, record.method, target, record.version, record.status, record.sent_bytes,
        record.duration_s * 1000, f" {record.cause}" if record.cause else "",
        extra={
            "client": client,
            "method": record.method,
            "path": record.path,
            "query": record.query,
            "status": record.status,
            "duration_ms": round(record.duration_s * 1000, 3),
            "ttfb_ms": None if record.first_byte_s is None else round(record.first_byte_s * 1000, 3),
            "request_bytes": record.received_bytes,
            "response_bytes": record.sent_bytes,
            "cause": record.cause,
        },
    )  # fmt: skip
