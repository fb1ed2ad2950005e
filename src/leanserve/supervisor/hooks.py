"""What the operator's own code is told of the server and its workers, in the supervisor's process."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

from leanserve.errors import SettingsError

__all__ = ["NAMES", "Hooks"]

logger = logging.getLogger("leanserve")

#: The functions that are called when they are there, each with its facts as keywords.
NAMES = {
    "supervisor_started": (),
    "worker_spawned": ("pid", "slot"),
    "worker_ready": ("pid", "slot"),
    "worker_exited": ("pid", "slot", "cause"),
    "supervisor_stopping": (),
}


class Hooks:
    """Calls them. What one raises is logged, and harms nothing; while one runs the supervisor does nothing
    else.

    Args:
        name: a module, or ``module:attribute``; None for no hooks.
        directory: is looked in before the Python path, as for the application.

    Raises:
        SettingsError: there is no such module or attribute, or it has none of the functions.
    """

    def __init__(self, name: str | None, directory: str) -> None:
        self._target: Any = None if name is None else _load(name, os.path.abspath(directory))

    def call(self, name: str, **facts: Any) -> None:
        """Something has happened; `name` is one of :data:`NAMES`."""
        function = getattr(self._target, name, None)
        if function is not None:
            try:
                function(**facts)
            except Exception:  # the operator's own code, like an application
                logger.exception("the hook %s failed", name)


def _load(name: str, directory: str) -> Any:
    module, colon, attribute = name.partition(":")
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        target: Any = importlib.import_module(module)
        for part in attribute.split(".") if colon else ():
            target = getattr(target, part)
    except Exception as error:  # it may fail in any way while it is imported
        raise SettingsError(f"hooks {name!r} cannot be imported: {error!r}") from error
    if not any(hasattr(target, each) for each in NAMES):
        raise SettingsError(f"hooks {name!r} has none of the functions {', '.join(NAMES)}")
    return target
