"""``python -m leanserve``, and the command ``leanserve``."""

from __future__ import annotations

from leanserve.forking import Collector

__all__ = ["main"]


def main() -> None:
    """Import the command line, and run it."""
    Collector.begin_imports()
    from leanserve import cli

    cli.main()


if __name__ == "__main__":
    main()
