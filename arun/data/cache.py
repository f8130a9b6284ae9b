"""Cache: the blocks of a dataset, kept for the runs after the first.

The first run fills it as it goes, at the speed of its fastest reader; others share what is there already and go on
together. It is whole once a run has come to its end; a filling that all readers have left before that is forgotten.
Blocks and files go with the last dataset that reads them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import anyio
import pyarrow as pa

from arun.data.shared import Blocks, Turns
from arun.data.spill import SpillingQueue

__all__ = ("Cache",)


class Cache:
    """Blocks that are computed once: called for an iteration of them.

    :param open: begins a run of what is cached.
    :param memory: bytes to keep in memory; the rest is on disk. 0: everything is.
    :param folder: for files; None for the system's temporary folder.
    :param name: of what is cached, for people.
    """

    def __init__(self, open: Callable[[], Blocks], *, memory: int, folder: str | None, name: str) -> None:
        self.__name__ = f"cache of {name}"
        self._open = open
        self._memory = memory
        self._folder = folder
        self._filling: _Filling | None = None

    @property
    def whole(self) -> bool:
        """Whether all blocks are there."""
        return self._filling is not None and self._filling.whole

    async def __call__(self) -> AsyncGenerator[pa.RecordBatch, None]:
        filling = self._filling
        if filling is None:
            filling = self._filling = _Filling(self._open, self._memory, self._folder)
        filling.readers += 1
        reader = filling.queue.reader()
        try:
            while True:
                while not reader.ready:
                    await filling.turns.take_one()
                block = await anext(reader, None)
                if block is None:
                    return
                yield block
        except Exception:
            if self._filling is filling and not filling.whole:  # what failed is not for the runs to come
                self._filling = None
            raise
        finally:
            filling.readers -= 1
            with anyio.CancelScope(shield=True):
                await reader.aclose()
                if not filling.readers and not filling.whole:
                    if self._filling is filling:
                        self._filling = None
                    await filling.turns.aclose()
                    filling.queue.release()


class _Filling:
    """A run that fills a cache, and what it has given."""

    def __init__(self, open: Callable[[], Blocks], memory: int, folder: str | None) -> None:
        self.queue = SpillingQueue(memory=memory, folder=folder, keep=True)
        self.turns = Turns(open, self._take)
        self.readers = 0
        self.whole = False

    async def _take(self, block: pa.RecordBatch | None) -> None:
        if block is None:
            self.whole = True
            self.queue.end()
        else:
            await self.queue.put(block)
