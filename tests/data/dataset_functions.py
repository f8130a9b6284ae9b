"""Functions that worker processes import."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa

Row = dict[str, Any]


def with_pid(row: Row) -> Row:
    return {**row, "pid": os.getpid()}


def odd(row: Row) -> bool:
    return bool(row["n"] % 2)


def fifth_fails(row: Row) -> Row:
    if row["n"] == 5:
        raise ValueError("five")
    return row


def batch_pid(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.append_column("pid", pa.array([os.getpid()] * batch.num_rows))
