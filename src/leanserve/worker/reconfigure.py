"""New settings and certificates for a worker that runs. Connections that are open stay open."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from leanserve import logs
from leanserve.asgi.timer import times_all
from leanserve.errors import SettingsError
from leanserve.settings import TlsSettings
from leanserve.transport.certificate import expiry_of, first_in
from leanserve.transport.tls import build_context, hand_over

if TYPE_CHECKING:
    from leanserve.worker.worker import Worker

__all__ = ["reconfigure", "tell_certificate"]

logger = logging.getLogger("leanserve")


def reconfigure(worker: Worker, values: dict[str, Any]) -> None:
    """Put changed settings into effect, and the certificates as they are now. What cannot be used changes
    nothing, and is logged.

    Args:
        worker: it runs.
        values: by name, of those in :data:`leanserve.inplace.IN_PLACE`.
    """
    old = worker.settings
    try:
        new = old.replace(**values)
        newest = build_context(new.tls)
        if worker.tls is not None and newest is not None:
            tell_certificate(worker, new.tls)
            hand_over(worker.tls, newest)
    except SettingsError as error:
        logger.error("the old settings and certificate stay: %s", error)
        return
    worker.settings = new
    worker.keeps_records = new.log.logs_access
    worker.times_requests = times_all(new.request)
    if worker.admission is not None:
        worker.admission.longest_wait_s = new.admission.queue_timeout
    logs.adjust(old.log, new.log)


def tell_certificate(worker: Worker, settings: TlsSettings) -> None:
    """Note the certificate that clients are shown: for the ``tls`` extension, and until when it is valid.

    Raises:
        SettingsError: the file cannot be read.
    """
    path = settings.ssl_certfile
    if path is None:
        return
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            worker.server_cert = first_in(file.read())
    except OSError as error:
        raise SettingsError(f"cannot read ssl_certfile {path}: {error.strerror}") from error
    if worker.lane is not None and worker.server_cert is not None:
        try:
            worker.lane.tell_certificate(int(expiry_of(worker.server_cert)))
        except ValueError as error:
            logger.warning("cannot tell until when %s is valid: %s", path, error)
            worker.lane.tell_certificate(0)
