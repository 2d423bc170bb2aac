"""`python -m voxelstem` is the command `voxelstem`; torchrun needs this spelling."""

from __future__ import annotations

from voxelstem.cli import main

if __name__ == "__main__":
    main()
