"""Reading the configuration again while the server runs: all of it is good, or nothing changes."""

from __future__ import annotations

import logging
from collections.abc import Callable

from leanserve import logs
from leanserve.errors import SettingsError
from leanserve.inplace import compare
from leanserve.settings import Settings, uses_tls
from leanserve.supervisor.crew import Crew

__all__ = ["reconfigure"]

logger = logging.getLogger("leanserve")


def reconfigure(
    settings: Settings, reread: Callable[[], Settings] | None, crew: Crew
) -> tuple[Settings, str]:
    """Read again, and put into effect what can be: here, in all workers, and in those that come.

    Workers read the certificates again in any case: the same files may hold others.

    Args:
        settings: those that hold now.
        reread: the new ones, checked; None: they are the same, and only files have changed.
        crew: the workers.

    Returns:
        The settings that hold from now on, and what was done, in words.

    Raises:
        ValueError: something of it cannot be used, and nothing has changed; the text says what.
    """
    try:
        change = compare(settings, settings if reread is None else reread())
    except (SettingsError, OSError) as error:
        raise ValueError(f"the configuration stays as it was: {error}") from error
    crew.reconfigure(change.settings, change.in_place)
    logs.adjust(settings.log, change.settings.log)
    parts = [f"changed {', '.join(change.in_place)}" if change.in_place else "no setting changed in place"]
    if uses_tls(change.settings.tls):
        parts.append("certificates are read again")
    logger.info("configuration: %s", "; ".join(parts))
    rest = {"a reload of the workers": change.with_workers, "a restart": change.with_restart}
    for needs, names in rest.items():
        if names:
            parts.append(f"needs {needs}: {', '.join(names)}")
            logger.warning("configuration: %s", parts[-1])
    return change.settings, "; ".join(parts)
