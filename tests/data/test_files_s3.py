"""Files in an object store: S3's protocol as moto's server speaks it, through pyarrow's own client."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio.to_thread
import pytest
from moto.server import ThreadedMotoServer

from arun.data import Dataset, from_rows, read_csv, read_ipc, read_jsonl, read_parquet
from arun.errors import DataError

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]

Url = Callable[[str], str]

JOB = """
import asyncio, os, sys
from arun.data import read_parquet

async def slow(row):
    await asyncio.sleep(0.001)  # the work
    print(row["n"], flush=True)
    return {"n": row["n"], "pid": os.getpid()}

source, out, checkpoint = sys.argv[1:]
job = read_parquet(source).map(slow, concurrency=8).write_parquet(out, part_bytes=4000)
asyncio.run(job.arun(checkpoint=checkpoint))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def url(server: str) -> Url:
    """The URL of a path in a bucket of its own."""
    bucket = f"b{uuid.uuid4().hex}"
    urllib.request.urlopen(urllib.request.Request(f"http://{server}/{bucket}", method="PUT")).close()
    return lambda path: f"s3://key:secret@{bucket}/{path}?endpoint_override={server}&scheme=http&region=us-east-1"


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (Dataset.write_parquet, read_parquet),
        (Dataset.write_jsonl, read_jsonl),
        (Dataset.write_csv, read_csv),
        (Dataset.write_ipc, read_ipc),
    ],
)
async def test_what_was_written_is_read_as_folder_and_as_glob(
    url: Url, write: Callable[..., Dataset], read: Callable[..., Dataset]
) -> None:
    rows = [{"n": n, "text": "x" * (n % 7 + 1)} for n in range(500)]
    await write(from_rows(rows), url("out/")).arun()
    await write(from_rows(rows), url("out/"), mode="append").arun()
    found = (await read(url("out")).collect()).to_pylist()
    assert sorted(found, key=lambda row: row["n"]) == sorted(rows * 2, key=lambda row: row["n"])
    assert await read(url("out/part-*")).count() == 1000
    with pytest.raises(DataError, match="has files already"):
        await write(from_rows(rows), url("out/")).arun()


async def test_folders_of_a_bucket_are_columns(url: Url) -> None:
    rows = [{"n": n, "year": 2020 + n % 3} for n in range(30)]
    await from_rows(rows).write_parquet(url("out/"), partition_by="year").arun()
    assert await read_parquet(url("out")).filter(lambda row: row["year"] == 2021).count() == 10


async def test_what_failed_leaves_no_part(url: Url) -> None:
    await from_rows([{"n": 1}]).write_parquet(url("in.parquet")).arun()
    failing = read_parquet(url("in.parquet")).map(lambda row: {"n": row["n"] / 0}).write_parquet(url("out/"))
    with pytest.raises(ZeroDivisionError):
        await failing.arun()
    with pytest.raises(DataError, match=r"no \.parquet or .pq file|does not exist"):
        await read_parquet(url("out")).count()


def kill_twice(arguments: list[str]) -> None:
    command, folder = [sys.executable, "-c", JOB, *arguments], Path(__file__).parents[2]
    for rows in (300, 700):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder) as job:
            assert job.stdout is not None  # a pipe
            for _ in range(rows):
                job.stdout.readline()
            os.kill(job.pid, signal.SIGKILL)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)


async def test_a_killed_job_goes_on_exactly(url: Url, tmp_path: Path) -> None:
    await from_rows([{"n": n} for n in range(2000)]).write_parquet(url("in/")).arun()
    await anyio.to_thread.run_sync(kill_twice, [url("in"), url("out/"), str(tmp_path / "job")])
    written = (await read_parquet(url("out")).collect()).to_pydict()
    assert sorted(written["n"]) == list(range(2000))
    assert len(set(written["pid"])) > 1  # what was finished has stayed
