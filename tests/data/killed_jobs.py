"""Jobs with a checkpoint that are killed, again and again, at moments that a seed has drawn; run as a program.

Each universe draws a plan, a source, a sink and its moments. An attempt is a process of its own, which kills itself
with SIGKILL when the moment has come: at its n-th call of a step, its n-th operation on a file, or before or after it
commits its n-th part. When an attempt survives, the output must be exact, and no attempt may have computed what was
finished before it.

    python -m tests.data.killed_jobs FOLDER SEED UNIVERSES
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from arun.data import Dataset, RunOptions, read
from arun.data.checkpoint.journal import _Done, _read
from arun.data.files import FileSink, jsonl_sink, jsonl_source, parquet_sink, parquet_source

__all__ = ("main",)

Row = dict[str, Any]
ROWS = 150


class Moment:
    """When an attempt kills itself."""

    def __init__(self, kind: str, number: int) -> None:
        self._kind, self._left = kind, number

    def come(self, kind: str) -> None:
        if kind == self._kind:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


class Universe:
    """One job, and all attempts at it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        draw = self.random
        self.kind = draw.choice(["jsonl", "parquet"])
        self.sink = draw.choice(["folder", "file", "overwrite"])
        self.part_bytes = draw.choice([3_000, 20_000, 100_000])
        self.steps = draw.sample(["later", "plain", "some", "odd", "batches"], draw.randint(1, 4))
        self.ordered = draw.random() < 0.5
        self.size = draw.choice([7, 40, 1000])  # of fragments, in rows
        self.block_rows = draw.choice([1, 5, 8192])
        table = pa.table({"n": range(ROWS), "i": [0] * ROWS})
        if self.kind == "parquet":
            pq.write_table(table, folder / "in.parquet", row_group_size=self.size)
        else:
            (folder / "in.jsonl").write_text("".join(f'{{"n":{n},"i":0}}\n' for n in range(ROWS)))
        if self.sink == "overwrite":
            (folder / "out").mkdir()
            (folder / "out" / "old.jsonl").write_text('{"n":-1,"i":-1}\n')

    def expected(self) -> Counter[tuple[int, int]]:
        rows = [(n, 0) for n in range(ROWS)]
        for step in self.steps:
            if step == "some":
                rows = [(n, i * 4 + k) for n, i in rows for k in range(n % 4)]
            elif step == "odd":
                rows = [(n, i) for n, i in rows if n % 3]
        return Counter(rows)

    def written(self) -> Counter[tuple[int, int]]:
        paths = [self.folder / "out.parquet"] if self.sink == "file" else sorted((self.folder / "out").glob("*.jsonl"))
        found: Counter[tuple[int, int]] = Counter()
        for path in paths:
            rows = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else _lines(path)
            found.update((row["n"], row["i"]) for row in rows)
        return found

    def finished(self) -> set[int]:
        """The rows of the source that the journal holds, as their numbers."""
        job = self.folder / "job"
        spans = [
            span for path in job.glob("*.done") for span in msgspec.json.decode(path.read_bytes(), type=_Done).finished
        ]
        for path in job.glob("*.arrows"):
            spans += [span for _, entry, _ in _read(path) for span in entry.finished]
        if self.kind == "parquet":
            return {fragment * self.size + offset for fragment, start, end in spans for offset in range(start, end)}
        starts = self._starts()
        return {starts[fragment] + offset for fragment, start, end in spans for offset in range(start, end)}

    def _starts(self) -> list[int]:
        """Of each range of lines, the number of its first."""
        data = (self.folder / "in.jsonl").read_bytes()
        return [data[: max(0, start - 1)].count(b"\n") + (start > 0) for start in range(0, len(data), self.size * 10)]

    def calls(self) -> set[int]:
        """The rows that the last attempt has computed."""
        path = self.folder / "calls"
        calls = {int(line) for line in path.read_text().split()} if path.exists() else set[int]()
        path.unlink(missing_ok=True)
        return calls

    def plan(self, moment: Moment) -> Dataset:
        calls = os.open(self.folder / "calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def call(row: Row) -> Row:
            moment.come("call")
            os.write(calls, b"%d\n" % row["n"])
            return row

        async def later(row: Row) -> Row:
            for _ in range(row["n"] % 5):
                await asyncio.sleep(0)
            return call(row)

        def some(row: Row) -> Iterator[Row]:
            call(row)
            for k in range(row["n"] % 4):
                yield {"n": row["n"], "i": row["i"] * 4 + k}

        def odd(row: Row) -> bool:
            return call(row)["n"] % 3 > 0

        steps: dict[str, Callable[[Dataset], Dataset]] = {
            "later": lambda rows: rows.map(later, concurrency=8, ordered=self.ordered),
            "plain": lambda rows: rows.map(call),
            "some": lambda rows: rows.flat_map(some),
            "odd": lambda rows: rows.filter(odd),
            "batches": lambda rows: rows.map_batches(lambda batch: batch, keeps_rows=True),
        }
        if self.kind == "parquet":
            rows = read(parquet_source(self.folder / "in.parquet"))
        else:
            rows = read(jsonl_source(self.folder / "in.jsonl", fragment_bytes=self.size * 10))
        for step in self.steps:
            rows = steps[step](rows)
        return rows.write(self._sink(moment))

    def _sink(self, moment: Moment) -> FileSink:
        if self.sink == "file":
            sink = parquet_sink(self.folder / "out.parquet")
        else:
            mode: Any = "overwrite" if self.sink == "overwrite" else "error"
            sink = jsonl_sink(self.folder / "out", part_bytes=self.part_bytes, mode=mode)
        begin = sink.part

        def part(name: str) -> Any:
            writer = begin(name)
            commit = writer.commit

            def killed() -> Any:
                moment.come("commit")
                committed = commit()
                moment.come("commit")
                return committed

            writer.commit = killed  # type: ignore[method-assign]  # dies around the real one
            return writer

        sink.part = part  # type: ignore[method-assign]  # dies around the real one
        return sink


def attempt(universe: Universe, moment: Moment) -> bool:
    """Run the job in a process of its own; whether it survived."""
    child = os.fork()
    if not child:
        sys.addaudithook(lambda event, _: moment.come("file") if event in _FILES else None)
        options = RunOptions(block_rows=universe.block_rows)
        try:
            asyncio.run(universe.plan(moment).arun(options, checkpoint=universe.folder / "job"))
        except BaseException:  # noqa: BLE001 - the parent must not run on as this child
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # there is one
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "an attempt failed"
    return os.WIFEXITED(status)


_FILES = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir"}


def main(folder: Path, seed: int, universes: int) -> None:
    killed = 0
    for number in range(seed, seed + universes):
        here = folder / str(number)
        here.mkdir(parents=True)
        universe = Universe(here, number)
        what = f"seed {number}: {universe.kind} {universe.steps} {universe.sink}"
        for _ in range(50):
            before = universe.finished()
            kind = universe.random.choice(["call", "call", "file", "commit"])
            most = {"call": 150, "file": 60, "commit": 8}[kind]
            survived = attempt(universe, Moment(kind, universe.random.randint(1, most)))
            again = universe.calls() & before
            assert not again, f"{what}: computed again although finished: {sorted(again)}"
            if survived:
                break
            killed += 1
        else:
            raise AssertionError(f"{what}: never survived")
        assert universe.written() == universe.expected(), what
        shutil.rmtree(here)
    print(killed)


def _lines(path: Path) -> list[Row]:
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
