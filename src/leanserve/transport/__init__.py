"""One accepted connection: when bytes move. Knows no ASGI word."""
