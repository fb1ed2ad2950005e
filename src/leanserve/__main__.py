"""``python -m leanserve``, and the command ``leanserve``."""

from __future__ import annotations

import gc

__all__ = ["main"]


def main() -> None:
    """Import the command line, and run it."""
    # Imports make next to no garbage; to look for it took a tenth of their time. What they leave stays, and
    # need not be looked at again, here or in any worker.
    gc.disable()
    from leanserve import cli

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
