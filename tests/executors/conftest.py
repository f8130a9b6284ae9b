"""Executors under test. Worker processes cost a quarter of a second to start, so all tests of a module share them."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # worker processes are told; so they find executor_subjects

from executor_gone import Gone

from arun import LocalExecutor, ProcessExecutor, Runtime, ThreadExecutor
from arun.executors import Executor


@asynccontextmanager
async def _local() -> AsyncIterator[Executor]:
    yield LocalExecutor()


@asynccontextmanager
async def _thread() -> AsyncIterator[Executor]:
    yield ThreadExecutor()


@asynccontextmanager
async def _ray() -> AsyncIterator[Executor]:
    from actors import RayCluster, RayExecutor

    async with RayCluster.connect() as cluster, RayExecutor(cluster, workers=2) as executor:
        yield executor


#: Every executor that the conformance suite runs on; add yours here and in _RUNS.
EXECUTORS: Final[dict[str, Callable[[], AbstractAsyncContextManager[Executor]]]] = {
    "local": _local,
    "thread": _thread,
    "process": lambda: ProcessExecutor(2),
    "ray": _ray,
}


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
async def runtime(anyio_backend: str) -> AsyncIterator[Runtime]:
    async with Runtime() as runtime:
        yield runtime


_ALL: Final = ("function", "generator", "coroutine", "async generator")
#: The kinds of actions that each of them runs.
_RUNS: Final[dict[str, Collection[str]]] = {"local": _ALL, "thread": _ALL[:2], "process": _ALL, "ray": _ALL}
_MARKS: Final = {"ray": (pytest.mark.ray, pytest.mark.timeout(120))}
#: Arguments of tests that stand for a kind: any; one that a cancelled run can stop; one that yields items.
_KINDS: Final[dict[str, Collection[str]]] = {
    "kind": _ALL,
    "stoppable": _ALL[1:],
    "streaming": ("generator", "async generator"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "executor" not in metafunc.fixturenames:
        return
    for argument, kinds in _KINDS.items():
        if argument in metafunc.fixturenames:
            pairs = [
                pytest.param(name, kind, marks=_MARKS.get(name, ()))
                for name in EXECUTORS
                for kind in kinds
                if kind in _RUNS[name]
            ]
            metafunc.parametrize(("executor", argument), pairs, indirect=["executor"], scope="module")
            return
    names = [pytest.param(name, marks=_MARKS.get(name, ())) for name in EXECUTORS]
    metafunc.parametrize("executor", names, indirect=True, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Ray needs asyncio."""

    def is_wanted(item: pytest.Item) -> bool:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        return (params.get("executor"), params.get("anyio_backend")) != ("ray", "trio")

    items[:] = filter(is_wanted, items)


@pytest.fixture(scope="module")
async def executor(request: pytest.FixtureRequest, anyio_backend: str, runtime: Runtime) -> AsyncIterator[Executor]:
    if request.param == "ray" and anyio_backend == "trio":
        pytest.skip("Ray needs asyncio")
    async with EXECUTORS[request.param]() as executor:
        yield executor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a pipe in it by which a subtask says that it has begun."""
    os.mkfifo(tmp_path / "begun")
    return tmp_path


@pytest.fixture
def begun(folder: Path) -> Callable[[], Any]:
    async def wait() -> None:
        await anyio.to_thread.run_sync((folder / "begun").read_text)

    return wait


@pytest.fixture
def gone() -> Iterator[Gone]:
    gone = Gone()
    yield gone
    gone.close()
