"""Doors for other interfaces than ASGI, and for those who come from another server."""
