"""What an all-to-all operation may use."""

from __future__ import annotations

import msgspec

from arun.errors import MisuseError

__all__ = ("Limits",)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What an all-to-all operation may use.

    :ivar memory: bytes that it keeps before it spills. DuckDB's resident memory was seen at twice that; some tens of
        MiB for each of its threads are the least that it can sort or join with.
    :ivar threads: of DuckDB; None for as many as there are cores.
    :ivar folder: where a folder for what is spilled is made, and removed again; None for the system's temporary folder.
    """

    memory: int = 2**30
    threads: int | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.memory < 2**20:
            raise MisuseError(
                f"a memory limit of {self.memory} bytes is too small to sort or join with; at least 1 MiB"
            )
        if self.threads is not None and self.threads < 1:
            raise MisuseError(f"Limits(threads={self.threads}): at least 1, or None for one a core")
