"""Stores of every kind, opened in the test's own event loop and closed at its end."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from arun import MemoryStore, SQLiteStore

AnyStore: TypeAlias = MemoryStore | SQLiteStore


@pytest.fixture(params=["memory", "sqlite"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], object]:
    """``async with open_store() as store``: within one test, each time the same records."""
    memory = MemoryStore()

    @asynccontextmanager
    async def opened() -> AsyncIterator[AnyStore]:
        store = memory if request.param == "memory" else SQLiteStore(tmp_path / "runs.db")
        async with store:
            yield store

    return opened


@pytest.fixture(autouse=True)
def nothing_left_open() -> object:
    """A file or thread that is let go of only by the garbage collector is a ResourceWarning, and so an error."""
    yield
    gc.collect()
