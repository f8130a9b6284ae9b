"""Progress of a run: a table in a terminal, log events elsewhere, or whatever a function makes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import anyio

from arun.data.execution.statistics import Statistics
from arun.logs import get_logger

__all__ = ("Watcher", "watch")

log = get_logger("arun.data")

#: Takes what a run has done so far; in the event loop, so it must not block.
Watcher = Callable[[Statistics], object]

_SECONDS: Final = 0.25
#: Seconds between two log events.
_SECONDS_LOGGED: Final = 10.0


async def watch(statistics: Callable[[], Statistics], progress: Watcher | bool) -> None:
    """Show what a run does until this is cancelled, and then once more.

    :param progress: what to show it by; True: a table in a terminal, log events elsewhere.
    """
    seconds = _SECONDS
    end: Callable[[], object] = _nothing
    if callable(progress):
        show = progress
    elif sys.stderr.isatty():
        show, end = _table()
    else:
        show, seconds = _log, _SECONDS_LOGGED
    try:
        while True:
            await anyio.sleep(seconds)
            _shown(show, statistics())
    finally:
        _shown(show, statistics())
        end()


def _shown(show: Watcher, statistics: Statistics) -> None:
    try:
        show(statistics)
    except Exception as exc:  # noqa: BLE001 - whoever watches must not end the run
        log.warning("progress.failed", error=repr(exc))


def _log(statistics: Statistics) -> None:
    for stage in statistics.stages:
        log.info(
            "data.progress",
            stage=stage.name,
            rows=stage.rows,
            bytes=stage.size,
            failed=sum(step.failed for step in stage.steps),
            seconds=round(statistics.seconds, 1),
        )


def _table() -> tuple[Watcher, Callable[[], object]]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    live = Live(console=Console(stderr=True), auto_refresh=False, transient=False)
    live.start()

    def show(statistics: Statistics) -> None:
        table: Any = Table("stage", "rows", "rows/s", "MB", "at work", "failed", title=f"{statistics.seconds:.1f} s")
        for stage in statistics.stages:
            speed = stage.rows / statistics.seconds if statistics.seconds else 0.0
            table.add_row(
                stage.name,
                f"{stage.rows:,}",
                f"{speed:,.0f}",
                f"{stage.size / 1e6:,.1f}",
                str(sum(step.in_flight for step in stage.steps)),
                str(sum(step.failed for step in stage.steps)),
            )
        live.update(table, refresh=True)

    return show, live.stop


def _nothing() -> None:
    """Nothing was begun that would have to end."""
