"""``python -m leanserve``."""

from __future__ import annotations

from leanserve.cli import main

if __name__ == "__main__":
    main()
