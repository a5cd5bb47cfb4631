"""`python -m cortexstream`: the command line."""

from __future__ import annotations

from cortexstream.cli import main

if __name__ == "__main__":
    main()
