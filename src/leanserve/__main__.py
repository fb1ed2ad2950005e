"""``python -m leanserve``, and the command ``leanserve``."""

from __future__ import annotations

import gc

__all__ = ["main"]


def main() -> None:
    """Import the command line, and run it."""
    # Imports make next to no garbage; to look for it took a tenth of their time. cli.py ends this.
    gc.disable()
    from leanserve import cli

    cli.main()


if __name__ == "__main__":
    main()
