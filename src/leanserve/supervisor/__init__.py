"""The parent: no event loop, no application, no protocol."""
