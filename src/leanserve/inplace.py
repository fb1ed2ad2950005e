"""Which settings can change while the server runs, and what it takes.

What the code reads at each use can change in place. What a worker has built something from at its start comes
with its successor. What the supervisor has opened or counted out for all workers stays until a restart.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from leanserve.option import Frozen
from leanserve.settings import Settings, uses_tls

__all__ = ["IN_PLACE", "Change", "compare"]

_CERTIFICATES = frozenset({"ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"})
#: Put into effect by workers and supervisor as they run; connections and WebSockets that are open keep the
#: limits of sizes and times that were handed to them as they began.
IN_PLACE = _CERTIFICATES | frozenset(
    {
        "access_log", "drain_timeout", "first_byte_timeout", "hang_limit", "header_timeout",
        "keep_alive_timeout", "kill_grace", "linger_timeout", "log_level", "max_body_size", "pre_stop_delay",
        "queue_timeout", "receive_high_water", "reload_config_only", "send_high_water", "ws_cancel_grace",
        "ws_close_timeout", "ws_max_fragments", "ws_max_size", "ws_ping_interval", "ws_ping_timeout",
        "body_timeout", "body_min_rate", "send_timeout", "request_timeout", "request_timeout_header",
        "response_start_timeout", "response_gap_timeout", "sse_comment_interval",
    }
)  # fmt: skip
# The supervisor has opened or counted out by these.
_RESTART_GROUPS = frozenset({"listen", "pool", "admin", "reload", "admission"})


class Change(Frozen):
    """From some settings to others.

    Attributes:
        settings: what the server goes on with: the new ones, but for what needs a restart.
        in_place: the changed values by name, secrets too, as JSON can hold them.
        with_workers: names of what comes with new workers only.
        with_restart: names of what stays as it is.
    """

    settings: Settings
    in_place: dict[str, Any]
    with_workers: tuple[str, ...]
    with_restart: tuple[str, ...]


def compare(old: Settings, new: Settings) -> Change:
    """What has changed, and what it takes.

    Raises:
        SettingsError: what is new and what has to stay cannot stand together.
    """
    in_place: dict[str, Any] = {}
    with_workers: list[str] = []
    kept: dict[str, Any] = {}
    for group in dataclasses.fields(Settings):
        before, after = getattr(old, group.name), getattr(new, group.name)
        names = [item.name for item in dataclasses.fields(before)]
        changed = [name for name in names if getattr(before, name) != getattr(after, name)]
        stays = group.name in _RESTART_GROUPS
        if group.name == "tls":
            stays = uses_tls(old.tls) != uses_tls(new.tls)  # the addresses would mean something else
        # A handshake can be handed to another certificate, not to another way of doing it.
        whole = group.name == "tls" and (stays or not _CERTIFICATES.issuperset(changed))
        for name in changed:
            if name in IN_PLACE and not whole:
                in_place[name] = getattr(after, name)
            elif stays:
                kept[name] = getattr(before, name)
            else:
                with_workers.append(name)
    return Change(
        settings=new.replace(**kept),
        in_place=in_place,
        with_workers=tuple(with_workers),
        with_restart=tuple(kept),
    )
