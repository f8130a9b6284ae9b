"""Options of a run: how much is in flight, and which rules are applied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from arun.errors import MisuseError

__all__ = ("RunOptions",)


class RunOptions(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """How a dataset is run. None of them changes what comes out.

    :ivar rules: what the plan goes through before it runs, in this order; None: ``arun.data.rules.RULES``.
    :ivar block_rows: most rows that are Python objects at a time in one stage, and of the blocks made of them.
    :ivar queue_blocks: most blocks that wait between two stages, at least 1.
    :ivar queue_bytes: most bytes that wait between two stages; one block may always wait.
    :ivar memory_limit: bytes that an all-to-all operation takes before it spills to disk.
    :ivar progress: True shows what the run does, as a table in a terminal and as log events elsewhere; or a function
        that is given the :class:`Statistics` so far every quarter of a second and at the end. It must not block.
    :ivar spill_folder: where to; None: a folder of its own in the system's temporary folder.
    """

    rules: tuple[Callable[[Any], Any], ...] | None = None
    block_rows: int = 8192
    queue_blocks: int = 4
    queue_bytes: int = 32 << 20
    memory_limit: int = 512 << 20
    progress: Callable[[Any], object] | Literal[True] | None = None
    spill_folder: Path | None = None

    @property
    def folder(self) -> str | None:
        """Where to spill to, as a string."""
        return None if self.spill_folder is None else str(self.spill_folder)

    def __post_init__(self) -> None:
        for name in ("block_rows", "queue_blocks", "queue_bytes", "memory_limit"):
            if getattr(self, name) < 1:
                raise MisuseError(f"RunOptions({name}={getattr(self, name)}): it must be at least 1")
