"""Files on file systems that are not the machine's own: fsspec's in memory, and a web server."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.compute as pc
import pytest

from arun.data import from_rows, read_csv, read_ipc, read_jsonl, read_parquet
from arun.errors import DataError

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]

ROWS = [{"id": n, "lang": ["en", "de"][n % 2], "s": f"row {n}"} for n in range(20)]
READERS: dict[str, Any] = {"parquet": read_parquet, "jsonl": read_jsonl, "csv": read_csv, "ipc": read_ipc}


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder in memory, as a URL."""
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


@pytest.mark.parametrize("kind", READERS)
async def test_parts_are_written_read_and_replaced_in_memory(memory: str, kind: str) -> None:
    written = getattr(from_rows(ROWS), f"write_{kind}")
    report = await written(f"{memory}/deep").arun()
    assert (await READERS[kind](f"{memory}/deep").collect()).to_pylist() == ROWS
    assert fsspec.filesystem("memory").size(report.parts[0].path) == report.parts[0].size
    with pytest.raises(DataError, match="has files already"):
        await written(f"{memory}/deep").arun()
    await written(f"{memory}/deep", mode="overwrite", part_bytes=1).arun()
    assert await READERS[kind](f"{memory}/deep/*").count() == len(ROWS)


async def test_folders_in_memory_are_columns(memory: str) -> None:
    await from_rows(ROWS).write_parquet(memory, partition_by="lang").arun()
    german = read_parquet(memory).filter(pc.field("lang") == "de").sort("id")
    assert (await german.select(*ROWS[0]).collect()).to_pylist() == ROWS[1::2]


class Web(SimpleHTTPRequestHandler):
    """Serves files, and ranges of them if it says so."""

    ranges = True

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (self.ranges and asked):
            super().do_GET()
            return
        whole = Path(self.translate_path(self.path)).read_bytes()
        part = whole[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(whole)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


class PlainWeb(Web):
    ranges = False


@pytest.fixture(params=[Web, PlainWeb])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[type[Web], str]]:
    """A web server for the files of ``tmp_path``."""
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield request.param, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
    client = fsspec.filesystem("http")  # the one that was used; its connections are not to be open in other tests
    type(client).close_session(client.loop, client._session)
    type(client).clear_instance_cache()


async def test_files_of_a_web_server_are_read(web: tuple[type[Web], str], tmp_path: Path) -> None:
    server, url = web
    rows = from_rows(ROWS)
    for name in ("x.jsonl", "x.jsonl.gz"):
        await rows.write_jsonl(tmp_path / name).arun()
        assert (await read_jsonl(f"{url}/{name}").collect()).to_pylist() == ROWS
    await rows.write_csv(tmp_path / "x.csv").arun()
    assert (await read_csv(f"{url}/x.csv").collect()).to_pylist() == ROWS
    await rows.write_parquet(tmp_path / "x.parquet").arun()
    found = read_parquet([f"{url}/x.parquet"]).filter(pc.field("id") > 17)
    if server.ranges:
        assert (await found.collect()).to_pylist() == ROWS[18:]
    else:
        with pytest.raises(ValueError, match="support range requests"):
            await found.collect()
    with pytest.raises(DataError, match=r"no\.parquet' does not exist"):
        await read_parquet(f"{url}/no.parquet").collect()
