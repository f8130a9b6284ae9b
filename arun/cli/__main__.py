"""``python -m arun.cli``: the ``arun`` command."""

from __future__ import annotations

from arun.cli import main

__all__ = ()

main()
