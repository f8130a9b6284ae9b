"""Deterministic simulation: arun's own cores in seeded universes on a virtual clock; see docs/how-to/simulation.md.

``python -m tests.simulation`` runs seeds, and :func:`replay` runs one of them again, bit for bit. Nothing of arun is
imported before one of them is called, so that bugs can be planted in it first.
"""

from __future__ import annotations

from typing import Any

__all__ = ("replay",)


def replay(universe: str, seed: int, log: str | None = None, *, show: int = 60) -> Any:
    """See :func:`tests.simulation.runner.replay`."""
    from tests.simulation import runner

    return runner.replay(universe, seed, log, show=show)
