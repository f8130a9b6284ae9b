"""Running an async command: signals cancel it, so that its clean-up runs; errors are one paragraph."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import typer

from arun.errors import ArunError
from arun.telemetry import configure_logging

__all__ = ("run_command",)

T = TypeVar("T")
_INTERRUPTED = 130


def run_command(command: Callable[[T], Awaitable[None]], options: T) -> None:
    """Run ``command(options)`` to its end.

    SIGINT and SIGTERM cancel it once; its clean-up is awaited. A second SIGINT is Python's own KeyboardInterrupt.

    :raises typer.Exit: with 1 after an ArunError, 130 after a signal.
    """
    configure_logging("warning")
    try:
        interrupted = asyncio.run(_until_signal(command, options))
    except ArunError as exc:
        typer.echo(f"arun: {exc}", err=True)
        raise typer.Exit(1) from exc
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        typer.echo("arun: interrupted; everything that was started has been stopped", err=True)
        raise typer.Exit(_INTERRUPTED)


async def _until_signal(command: Callable[[T], Awaitable[None]], options: T) -> bool:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(command(options))
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        sys.stdout.flush()
        task.cancel()
        loop.remove_signal_handler(signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        await task
    except asyncio.CancelledError:  # noqa: ASYNC103 - after a signal, the cancellation was ours and ends here
        if not interrupted:
            raise
    return interrupted
