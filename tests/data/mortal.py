"""An actor that dies of rows; in a module of its own, because its processes import no more than it does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from actors.actor import actor


@actor(concurrency=2)
class Mortal:
    """Dies of some rows, once each, or always."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    async def add(self, row: dict[str, int]) -> dict[str, int]:
        if row["n"] in {3, 9} and not (self.folder / str(row["n"])).exists():
            (self.folder / str(row["n"])).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if row["n"] == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"n": row["n"] + 1}
