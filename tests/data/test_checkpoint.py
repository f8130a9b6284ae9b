"""Checkpoints: a job that ended early goes on, and computes only what had not reached its sink."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arun import ThreadExecutor
from arun.data import Dataset, RunOptions, from_iterable, from_rows, read
from arun.data.block import origin_of
from arun.data.checkpoint.progress import Progress, merged, ranges_of
from arun.data.files import batch_sink, jsonl_sink, jsonl_source, parquet_sink, parquet_source
from arun.data.source import Fragment
from arun.errors import CheckpointError, DataError, MisuseError
from tests.data.reading import rows

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]
Row = dict[str, Any]


class Stop(Exception):
    """Stands for whatever ends a job early."""


class Work:
    """A step that counts, and fails at the rows that it is told to fail at."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.stop: set[int] = set()

    def plain(self, row: Row) -> Row:
        if row["n"] in self.stop:
            raise Stop
        self.done.append(row["n"])
        return {"n": row["n"], "square": row["n"] ** 2}

    async def later(self, row: Row) -> Row:
        await anyio.lowlevel.checkpoint()
        return self.plain(row)

    def odd(self, row: Row) -> bool:
        self.plain(row)
        return row["n"] % 2 == 1

    def some(self, row: Row) -> Iterator[Row]:
        self.plain(row)
        for i in range(row["n"] % 4):
            yield {"n": row["n"], "i": i}


class Job:
    """Lines of numbers, and where things are."""

    def __init__(self, folder: Path, lines: int = 100) -> None:
        self.input, self.out, self.checkpoint = folder / "in.jsonl", folder / "out", folder / "job"
        self.input.write_text("".join(f'{{"n":{n}}}\n' for n in range(lines)))

    def read(self) -> Dataset:
        return read(jsonl_source(self.input, fragment_bytes=64))

    async def run(self, make: Callable[[Dataset], Dataset], sink: Any = None, **options: Any) -> Any:
        written = make(self.read()).write(sink or jsonl_sink(self.out, part_bytes=200))
        return await written.arun(RunOptions(**options), checkpoint=self.checkpoint)

    def written(self) -> list[Row]:
        return rows(jsonl_source(self.out, sample_bytes=None))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize("function", ["plain", "later"])
async def test_a_job_that_failed_goes_on_and_computes_only_the_rest(job: Job, function: str) -> None:
    work = Work()
    for stop in ({50}, {80}, set[int]()):
        before = set(work.done)
        work.stop = stop
        try:
            await job.run(lambda rows: rows.map(getattr(work, function)))
        except Stop:
            assert len(work.done) > len(before)
    assert job.written() == [{"n": n, "square": n * n} for n in range(100)]
    assert len(work.done) < 130


async def test_what_has_reached_the_sink_is_not_computed_again(job: Job) -> None:
    work = Work()
    work.stop = {60}
    with pytest.raises(Stop):
        await job.run(lambda rows: rows.map(work.plain), block_rows=4)
    first = list(work.done)
    assert len(first) > 40
    work.done.clear()
    work.stop = set()
    await job.run(lambda rows: rows.map(work.plain), block_rows=4)
    assert len(set(first) & set(work.done)) <= 4  # the block in which it failed
    assert job.written() == [{"n": n, "square": n * n} for n in range(100)]


async def test_fragments_that_are_finished_are_not_read_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    source = type(jsonl_source(job.input))
    original = source.read

    def noted(self: Any, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        opened.append(fragment.key.partition(" bytes ")[2])
        return original(self, fragment, skip=skip)

    monkeypatch.setattr(source, "read", noted)
    work = Work()
    work.stop = {60}
    with pytest.raises(Stop):
        await job.run(lambda rows: rows.map(work.plain), block_rows=1)
    first, work.stop = opened.copy(), set()
    opened.clear()
    await job.run(lambda rows: rows.map(work.plain), block_rows=1)
    assert first[0] == "0-64"
    assert opened[0] in first[-2:]  # that the one before has ended is known with the next block only
    assert len(job.written()) == 100


async def test_rows_that_were_filtered_out_are_finished_too(job: Job) -> None:
    work = Work()
    work.stop = {70}
    with pytest.raises(Stop):
        await job.run(lambda rows: rows.filter(work.odd), block_rows=1)
    work.done.clear()
    work.stop = set()
    await job.run(lambda rows: rows.filter(work.odd), block_rows=1)
    assert min(work.done) > 50
    assert job.written() == [{"n": n} for n in range(1, 100, 2)]


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_row_that_becomes_several_is_finished_with_the_last_of_them(job: Job, ordered: bool) -> None:
    work = Work()
    failed: set[tuple[int, int]] = set()

    async def part(row: Row) -> Row:
        for _ in range(row["i"]):
            await anyio.lowlevel.checkpoint()
        if row["i"] == 2 and row["n"] % 10 == 3 and (row["n"], row["i"]) not in failed:
            failed.add((row["n"], row["i"]))
            raise Stop
        return {**row, "part": True}

    def plan(rows: Dataset) -> Dataset:
        return rows.flat_map(work.some).map(part, concurrency=5, ordered=ordered)

    for _ in range(20):
        try:
            await job.run(plan, block_rows=3)
            break
        except Stop:
            pass
    found = job.written()
    expected = [{"n": n, "i": i, "part": True} for n in range(100) for i in range(n % 4)]
    assert (found if ordered else sorted(found, key=lambda row: (row["n"], row["i"]))) == expected


async def test_pieces_of_a_block_never_part_the_rows_that_one_became(job: Job) -> None:
    work = Work()

    def slow(row: Row) -> Row:
        if row["n"] == 50 and row["i"] == 1 and not work.stop:
            work.stop.add(-1)
            raise Stop
        return row

    def plan(rows: Dataset) -> Dataset:
        return rows.flat_map(work.some, fuse=False).map(slow)

    with pytest.raises(Stop):
        await job.run(plan, block_rows=1)
    await job.run(plan, block_rows=1)
    assert job.written() == [{"n": n, "i": i} for n in range(100) for i in range(n % 4)]


async def test_batches_that_keep_their_rows_can_be_gone_on_with(job: Job) -> None:
    calls: list[int] = []

    def batch(given: pa.RecordBatch) -> pa.RecordBatch:
        calls.append(given.num_rows)
        if len(calls) == 5:
            raise Stop
        return given.append_column("double", pc.multiply(given["n"], 2))

    def plan(rows: Dataset) -> Dataset:
        return rows.filter(lambda row: row["n"] % 3 > 0).map_batches(batch, batch_size=7, keeps_rows=True)

    with pytest.raises(Stop):
        await job.run(plan)
    await job.run(plan)
    assert job.written() == [{"n": n, "double": 2 * n} for n in range(100) if n % 3]
    assert sum(calls) <= 66 + 7 * 2


async def test_functions_in_an_executor_are_gone_on_with(job: Job) -> None:
    failed: list[int] = []

    def parts(row: Row) -> list[Row]:
        if row["n"] == 77 and not failed:
            failed.append(1)
            raise Stop
        return [{"n": row["n"], "i": i} for i in range(row["n"] % 4)]

    def plan(rows: Dataset) -> Dataset:
        return rows.flat_map(parts, executor=ThreadExecutor(2)).map(lambda row: {**row, "done": True}, fuse=False)

    with pytest.raises(Stop):
        await job.run(plan, block_rows=8)
    assert list(job.out.glob("*.jsonl"))
    await job.run(plan, block_rows=8)
    assert job.written() == [{"n": n, "i": i, "done": True} for n in range(100) for i in range(n % 4)]


async def test_a_job_that_is_complete_does_nothing_more(job: Job) -> None:
    work = Work()
    report = await job.run(lambda rows: rows.map(work.plain))
    assert report.rows == 100
    assert len(report.parts) > 5
    again = await job.run(lambda rows: rows.map(work.plain))
    assert (again.rows, again.parts) == (report.rows, report.parts)
    assert len(work.done) == 100


@pytest.mark.parametrize("mode", ["error", "overwrite", "append"])
async def test_a_job_goes_on_beside_what_was_there(tmp_path: Path, mode: str) -> None:
    job, work = Job(tmp_path), Work()
    if mode != "error":
        await from_rows([{"n": -1, "square": 1}]).write(jsonl_sink(job.out)).arun()
    for stop in ({30}, {60}, set[int]()):
        work.stop = stop
        try:
            sink = jsonl_sink(job.out, mode=mode, part_bytes=100)  # type: ignore[arg-type]  # it is one of them
            await job.run(lambda rows: rows.map(work.plain), sink, block_rows=5)
        except Stop:
            assert (job.out / "_SUCCESS").exists() is False
            if mode == "overwrite":
                assert job.written() == [{"n": -1, "square": 1}]
    there = [{"n": -1, "square": 1}] if mode == "append" else []
    assert sorted(job.written(), key=lambda row: row["n"]) == there + [{"n": n, "square": n * n} for n in range(100)]
    assert [path.name for path in job.out.iterdir() if path.name.startswith(".")] == []


async def test_a_single_file_appears_at_the_end(tmp_path: Path) -> None:
    job, work = Job(tmp_path), Work()
    out = tmp_path / "out.parquet"
    work.stop = {60}
    with pytest.raises(Stop):
        await job.run(lambda rows: rows.map(work.plain), parquet_sink(out))
    assert not out.exists()
    work.stop = set()
    await job.run(lambda rows: rows.map(work.plain), parquet_sink(out))
    assert [row["n"] for row in rows(parquet_source(out))] == [*range(100)]
    await job.run(lambda rows: rows.map(work.plain), parquet_sink(out))


async def test_a_condition_on_the_source_is_part_of_the_job(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(100)}), tmp_path / "in.parquet", row_group_size=10)
    work = Work()

    async def run() -> None:
        rows = read(parquet_source(tmp_path / "in.parquet")).filter(pc.field("n") >= 35).map(work.plain)
        await rows.write(jsonl_sink(tmp_path / "out")).arun(RunOptions(block_rows=1), checkpoint=tmp_path / "job")

    work.stop = {77}
    with pytest.raises(Stop):
        await run()
    work.stop = set()
    await run()
    assert work.done[:42] == [*range(35, 77)]
    assert [row["n"] for row in rows(jsonl_source(tmp_path / "out"))] == [*range(35, 100)]


async def test_types_that_differ_from_run_to_run_are_one_in_the_end(job: Job) -> None:
    failed: list[int] = []

    def value(row: Row) -> Row:
        if row["n"] == 50 and not failed:
            failed.append(1)
            raise Stop
        return {"n": row["n"], "v": row["n"] + 0.5 if row["n"] >= 50 else (None if row["n"] < 10 else row["n"])}

    out = job.out.with_name("out.parquet")
    with pytest.raises(Stop):
        await job.run(lambda rows: rows.map(value), parquet_sink(out), block_rows=1)
    await job.run(lambda rows: rows.map(value), parquet_sink(out), block_rows=1)
    assert [row["v"] for row in rows(parquet_source(out))][8:12] == [None, None, 10.0, 11.0]


async def test_a_torn_end_of_the_journal_is_a_block_that_never_was(tmp_path: Path) -> None:
    job, work = Job(tmp_path, 20), Work()
    work.stop = {10}
    sink = jsonl_sink(job.out)
    with pytest.raises(Stop):
        await job.run(lambda rows: rows.map(work.plain), sink, block_rows=1)
    (segment,) = job.checkpoint.glob("*.arrows")
    size = segment.stat().st_size
    shutil.copytree(job.checkpoint, tmp_path / "saved")
    work.stop = set()
    for cut in (0, 1, 100, size // 2, size - 300, size - 20, size - 9):
        shutil.rmtree(job.checkpoint)
        shutil.rmtree(job.out)
        shutil.copytree(tmp_path / "saved", job.checkpoint)
        segment.write_bytes(segment.read_bytes()[:cut])
        await job.run(lambda rows: rows.map(work.plain), sink, block_rows=1)
        assert job.written() == [{"n": n, "square": n * n} for n in range(20)]


def other(row: Row) -> Row:
    return {"n": row["n"] + 1}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda job: job.input.write_text('{"n":5}\n'), r"its input is no longer '.*in\.jsonl .*', now '.*in\.jsonl "),
        (lambda job: job.out.rename(job.out.with_name("b")), None),
        ("steps", r"its steps were map\(first\), map\(first\), and are map\(other\), map\(other\)"),
        ("code", r"the code or the options of map\(first\) have changed"),
        ("sink", r"that wrote jsonl .*, and not parquet "),
    ],
)
async def test_another_job_is_refused(job: Job, change: Any, why: str | None) -> None:
    def first(row: Row) -> Row:
        return {"n": row["n"]}

    await job.run(lambda rows: rows.map(first))
    function: Any = first
    sink = None
    if callable(change):
        change(job)
    elif change == "steps":
        function = other
    elif change == "code":

        def first(row: Row) -> Row:  # type: ignore[no-redef]  # edited
            return {"n": row["n"] + 1}

        function = first
    else:
        sink = parquet_sink(job.out.with_name("p"))
    if why is None:
        await job.run(lambda rows: rows.map(function), sink)
        return
    with pytest.raises(CheckpointError, match=rf"job is a checkpoint of another job: {why}"):
        await job.run(lambda rows: rows.map(function), sink)


async def test_a_folder_with_other_things_is_refused(job: Job) -> None:
    job.checkpoint.mkdir()
    (job.checkpoint / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex and is no checkpoint; name a folder of its own"):
        await job.run(lambda rows: rows)


async def test_two_runs_at_once_are_refused(job: Job) -> None:
    entered = anyio.Event()

    async def wait(row: Row) -> Row:
        entered.set()
        await anyio.sleep_forever()
        return row

    async with anyio.create_task_group() as group:
        group.start_soon(job.run, lambda rows: rows.map(wait))
        await entered.wait()
        with pytest.raises(CheckpointError, match="is in use by another process; wait for it"):
            await job.run(lambda rows: rows.map(wait))
        group.cancel_scope.cancel()


class Nowhere:
    name = "nowhere"
    part_bytes = None


def same(given: Any) -> Any:
    return given


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda rows: rows, "nothing is written; end the plan with a sink"),
        (
            lambda rows: rows.write(Nowhere()),
            "write nowhere can't be gone on with after a kill; sinks that write files",
        ),
        (lambda rows: rows.limit(5).map(same), r"limit\(5\) counts rows, which another run would count anew"),
        (lambda rows: rows.map_batches(same), r"map_batches\(same\) may give any rows .* say keeps_rows=True"),
        (
            lambda rows: rows.flat_map(same).map_batches(same, batch_size=2, keeps_rows=True),
            r"map_batches\(same\) may part the rows that flat_map\(same\) makes of one",
        ),
        (lambda rows: rows.union(rows), "union has several inputs; checkpoint each by itself"),
        (lambda rows: rows.zip(rows), "zip has several inputs"),
        (lambda rows: rows.sort("n"), r"sort\(n\) needs all rows at once; checkpoint what comes before it"),
        (lambda rows: from_rows([{"n": 1}]), "read rows: another run could not tell that it is the same rows"),
        (lambda rows: from_iterable([{"n": 1}]), "iterate over list: nothing is known of rows before they come"),
    ],
)
async def test_plans_that_can_not_be_gone_on_with_are_refused_by_step(job: Job, make: Any, why: str) -> None:
    plan = make(job.read())
    written = plan if why.startswith(("nothing", "write")) else plan.write(jsonl_sink(job.out))
    with pytest.raises(MisuseError, match=why):
        await written.arun(checkpoint=job.checkpoint)
    assert not job.checkpoint.exists()


async def test_explain_tells_whether_a_checkpoint_is_possible(job: Job) -> None:
    sink = jsonl_sink(job.out)
    assert job.read().map(same).write(sink).explain().endswith("checkpoint: possible")
    assert "checkpoint: refused, limit(5) counts rows" in job.read().limit(5).write(sink).explain()
    assert "checkpoint" not in job.read().map(same).explain()


async def test_batches_of_openai_can_be_gone_on_with(tmp_path: Path) -> None:
    job, work = Job(tmp_path), Work()

    def answer(row: Row) -> Row:
        return {"custom_id": str(row["n"]), "body": msgspec.json.encode(work.plain(row)).decode()}

    for stop in ({50}, set[int]()):
        work.stop = stop
        try:
            await job.run(lambda rows: rows.map(answer), batch_sink(tmp_path / "out.jsonl"))
        except Stop:
            pass
    lines = [msgspec.json.decode(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert [line["response"]["body"]["square"] for line in lines] == [n * n for n in range(100)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(1, 6)), max_size=12), st.data())
def test_progress_is_a_set_of_rows(spans: list[tuple[int, int, int]], data: st.DataObject) -> None:
    fragments = [Fragment(key=str(number), rows=40 if number % 2 else None) for number in range(4)]
    progress, model = Progress(fragments), set[tuple[int, int]]()
    for fragment, start, length in spans:
        progress.finish([(fragment, start, start + length)])
        model |= {(fragment, offset) for offset in range(start, start + length)}
    fragment, start, length = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 12)))
    gaps = progress.left(fragment, start, length)
    left = [(fragment, offset) for first, end in gaps for offset in range(first, end)]
    assert left == [(fragment, o) for o in range(start, start + length) if (fragment, o) not in model]
    for number, _, skip in progress.unfinished():
        assert all((number, offset) in model for offset in range(skip))
        assert (number, skip) not in model
    origins = [origin_of(*one) for one in model]
    assert merged(ranges_of(origins)) == merged((f, s, s + n) for f, s, n in spans)


async def test_a_single_file_is_there_when_no_row_is_left(tmp_path: Path) -> None:
    job = Job(tmp_path)
    sink = jsonl_sink(tmp_path / "none.jsonl")
    for _ in range(2):
        report = await job.run(lambda rows: rows.filter(lambda row: False), sink)
        assert (report.rows, len(report.parts)) == (0, 1)
    assert (tmp_path / "none.jsonl").read_bytes() == b""


async def test_a_source_without_rows_makes_a_part_with_its_columns(tmp_path: Path) -> None:
    schema = pa.schema([("n", pa.int64())])
    pq.write_table(schema.empty_table(), tmp_path / "in.parquet")
    written = read(parquet_source(tmp_path / "in.parquet")).write_parquet(tmp_path / "out")
    (part,) = (await written.arun(checkpoint=tmp_path / "job")).parts
    assert pq.read_table(part.path).schema == schema


async def test_a_job_that_a_full_disk_has_ended_can_be_gone_on_with_at_once(job: Job) -> None:
    def large(row: Row) -> Row:
        return {"n": row["n"], "text": "x" * 10_000}

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            await job.run(lambda rows: rows.map(large), jsonl_sink(job.out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (await job.run(lambda rows: rows.map(large), jsonl_sink(job.out))).rows == 100
    assert sorted(row["n"] for row in job.written()) == list(range(100))


@pytest.mark.parametrize("mode", ["error", "overwrite"])
async def test_output_that_is_gone_is_told_instead_of_being_left_out(job: Job, mode: Any) -> None:
    def sink() -> Any:
        return jsonl_sink(job.out, part_bytes=200, mode=mode)

    jsonl_sink(job.out).begin()
    if mode == "overwrite":  # then what is new is hidden till the end
        (job.out / "old.jsonl").write_text("{}")
    work = Work()
    work.stop = {99}
    with pytest.raises(Stop):
        await job.run(lambda rows: rows.map(work.plain), sink())
    shutil.copytree(job.out, job.out.with_name("elsewhere"))
    shutil.rmtree(job.out)
    work.stop.clear()
    with pytest.raises(CheckpointError, match=r"says that .*part-00000.* is written, and it is gone; bring"):
        await job.run(lambda rows: rows.map(work.plain), sink())
    shutil.copytree(job.out.with_name("elsewhere"), job.out, dirs_exist_ok=True)
    assert (await job.run(lambda rows: rows.map(work.plain), sink())).rows == 100
    assert sorted(row["n"] for row in job.written()) == list(range(100))


async def test_a_checkpoint_that_is_broken_is_named(job: Job) -> None:
    await job.run(lambda rows: rows)
    for name in ("complete", "00000.done", "job.json"):
        (job.checkpoint / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=f"{name} is broken .*; remove the checkpoint and its output"):
            await job.run(lambda rows: rows)


async def test_rows_without_columns_are_not_lost_silently(job: Job) -> None:
    job.input.write_text("{}\n{}\n")
    with pytest.raises(DataError, match="the rows have no columns"):
        await job.run(lambda rows: rows)
