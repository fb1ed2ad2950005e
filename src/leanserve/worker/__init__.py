"""One process, one event loop."""
