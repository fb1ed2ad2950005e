"""The environment of one worker: its number, and what ``worker_env`` says for its slot.

It is set in the worker, before the application is imported, and is the same for all workers that a slot ever
has: a GPU that was chosen by it stays that slot's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from leanserve.errors import SettingsError

__all__ = ["SLOT_VARIABLE", "environment_of", "parse_worker_env"]

#: Holds the slot, counted from 0: an index. (What people read counts from 1: "worker 1" is slot 0.)
SLOT_VARIABLE = "LEANSERVE_WORKER"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_worker_env(lines: Sequence[str]) -> dict[str, list[str]]:
    """The values by name of lines such as ``NAME=a;b;c``, one value per slot.

    Raises:
        SettingsError: a line has not this form, or a name stands twice or is not the operator's to set.
    """
    found: dict[str, list[str]] = {}
    for line in lines:
        name, equals, values = line.partition("=")
        if not equals or not _NAME.fullmatch(name) or "\0" in values:
            raise SettingsError(f"worker_env must be NAME=A;B;C, a value per worker, not {line!r}")
        if name == SLOT_VARIABLE:
            raise SettingsError(f"worker_env: {name} is the number of the worker, and not to be set")
        if name in found:
            raise SettingsError(f"worker_env: {name} is given twice; write all its values in one")
        found[name] = values.split(";")
    return found


def environment_of(lines: Sequence[str], slot: int) -> dict[str, str]:
    """What is set for a worker in this slot; slots beyond the end of a list begin it again."""
    found = {name: values[slot % len(values)] for name, values in parse_worker_env(lines).items()}
    return {**found, SLOT_VARIABLE: str(slot)}
