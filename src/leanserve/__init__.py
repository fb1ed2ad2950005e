"""leanserve: a lean production ASGI server for HTTP/1.1 and WebSocket, made for model serving."""

from __future__ import annotations

from leanserve.errors import (
    AppProtocolError,
    BootFailed,
    ClientDisconnected,
    LeanserveError,
    SettingsError,
)

TYPE_CHECKING = False  # type checkers take it for typing's, which would be most of this import
if TYPE_CHECKING:
    from leanserve.server import Server
    from leanserve.settings import Settings
    from leanserve.starting import extend_start

__version__ = "0.1.0"

__all__ = [
    "AppProtocolError",
    "BootFailed",
    "ClientDisconnected",
    "LeanserveError",
    "Server",
    "Settings",
    "SettingsError",
    "__version__",
    "extend_start",
]

_LAZY = {
    "Server": "leanserve.server", "Settings": "leanserve.settings", "extend_start": "leanserve.starting",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Load what costs time only when it is asked for: ``import leanserve`` stays small."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
