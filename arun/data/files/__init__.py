"""Files: sources and sinks for Parquet, JSON lines, CSV, Arrow IPC and OpenAI batches, on any file system."""

from __future__ import annotations

from arun.data.files.csv import csv_source
from arun.data.files.ipc import ipc_source
from arun.data.files.jsonl import jsonl_source
from arun.data.files.openai_batch import batch_sink, batch_source
from arun.data.files.parquet import parquet_source
from arun.data.files.parts import FileSink, Mode, csv_sink, ipc_sink, jsonl_sink, parquet_sink
from arun.data.files.paths import Paths

__all__ = (
    "FileSink",
    "Mode",
    "Paths",
    "batch_sink",
    "batch_source",
    "csv_sink",
    "csv_source",
    "ipc_sink",
    "ipc_source",
    "jsonl_sink",
    "jsonl_source",
    "parquet_sink",
    "parquet_source",
)
