"""Stores: where runs are kept, so that a killed one goes on where it was.

>>> app = builder.with_identifiers(app_id="nightly").with_store(SQLiteStore("runs.db")).build()
>>> await app.arun()
"""

from __future__ import annotations

from arun.journal import History, Lease, Opened, Step, Store
from arun.store.memory import MemoryStore
from arun.store.sqlite import SQLiteStore

__all__ = ("History", "Lease", "MemoryStore", "Opened", "SQLiteStore", "Step", "Store")
