"""Backends: where a plan runs, if not here. A package offers one by an entry point of ``arun.data.backends``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from arun.errors import MisuseError

if TYPE_CHECKING:
    from arun.data.logical import Plan
    from arun.data.options import RunOptions
    from arun.data.running import Report

__all__ = ("Backend", "backend_of")


class Backend(Protocol):
    """Something else than the local executor that runs plans."""

    def explain(self, plan: Plan) -> Sequence[str]:
        """What it would run, line by line; a node that it can't run, and why. Runs nothing."""
        ...

    async def run(self, plan: Plan, options: RunOptions) -> Sequence[Report]:
        """Run a plan; one Report for each of its roots.

        :raises MisuseError: it can't run one of its nodes; raised before anything runs.
        """
        ...


def backend_of(engine: str | Backend) -> Backend | None:
    """The backend of a name; None for "local".

    :raises MisuseError: no installed package offers it.
    """
    if not isinstance(engine, str):
        return engine
    if engine == "local":
        return None
    offered = entry_points(group="arun.data.backends")
    if engine not in offered.names:
        raise MisuseError(f"there is no engine {engine!r}; there are {', '.join(['local', *sorted(offered.names)])}")
    made: Any = offered[engine].load()
    return made()  # type: ignore[no-any-return]  # by the entry point's contract
