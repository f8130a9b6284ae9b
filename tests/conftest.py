"""What all tests share: both event loops, what is left over, the order of the run, and how long a test may take."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from types import AsyncGeneratorType
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import HealthCheck, settings

from arun import Runtime

if TYPE_CHECKING:
    from arun.channel import TLSConfig

# Neither Ray nor vLLM reports usage from a test run, nor do the processes that they start.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("DO_NOT_TRACK", "1")

# A shell has what it starts with `&` ignore interrupts, and the programs that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `make soak` runs the same properties with the other profile.
settings.register_profile(
    "brief", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile(
    "soak", settings.get_profile("brief"), max_examples=3000, suppress_health_check=list(HealthCheck), database=None
)
settings.load_profile("brief")

# The slower a kind of test, the later it runs, so that a plain mistake shows within seconds. Seconds are for one test,
# its fixtures included: the first engine test of a module starts the engine that the others share.
_KINDS = (("engine", 300), ("ray", 120), ("long", 300))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def runtime(anyio_backend: str) -> AsyncIterator[Runtime]:
    """An open Runtime, which streams and fan_out() need on trio."""
    async with Runtime() as opened:
        yield opened


@pytest.fixture
async def nothing_left(anyio_backend: str) -> AsyncIterator[None]:
    """No task is left that the test has started, nor an async generator that is suspended."""
    before, known = set(_running()), set(map(id, _suspended()))
    yield
    assert not [name for task, name in _running().items() if task not in before]
    assert not [agen for agen in _suspended() if id(agen) not in known]


def _running() -> dict[int, str]:
    """The names of all tasks by id, less those in which anyio's plugin waits for its test runner."""
    waiting: set[int] = set()
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__name__", "") == "_call_in_runner_task":
                waiting.add(id(task))
    return {info.id: info.name for info in anyio.get_running_tasks() if info.id not in waiting}


def _suspended() -> list[AsyncGeneratorType[Any, Any]]:
    gc.collect()
    generators = [thing for thing in gc.get_objects() if type(thing) is AsyncGeneratorType]
    return [agen for agen in generators if agen.ag_frame is not None and agen.ag_code.co_filename != __file__]


@pytest.fixture
def asyncio_only(anyio_backend: str) -> None:
    """For what only asyncio has: cancellation of a task without a scope."""
    if anyio_backend != "asyncio":
        pytest.skip("asyncio's own cancellation")


@pytest.fixture(autouse=True, scope="module")
def older_objects_are_left_alone() -> None:
    """Garbage collections look at what this module makes, not at the half a million objects of those before it.

    Many tests collect, to see that nothing is left over; without this they take most of the run's time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests of a module that need one."""
    import ray

    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TLSConfig:
    """Of a node: its name is in its certificate, its address is not."""
    import trustme

    from arun.channel import TLSConfig

    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    issued = authority.issue_cert("actors.example")
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    issued.private_key_pem.write_to_path(str(folder / "node.key"))
    (folder / "node.pem").write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    return TLSConfig(
        certificate=str(folder / "node.pem"),
        key=str(folder / "node.key"),
        authority=str(folder / "authority.pem"),
        hostname="actors.example",
    )


@pytest.fixture(autouse=True, scope="module")
def ray_is_left() -> Iterator[None]:
    """No module leaves this process connected to Ray: the next one's cluster would be another one than it asks for."""
    yield
    if "ray" in sys.modules:
        assert not sys.modules["ray"].is_initialized()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    gc.unfreeze()  # hypothesis may be imported for the summary, and asks who refers to what


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Asked here, not by `importorskip` in the modules: importing vLLM takes five seconds of every collecting process.
    for kind, package in (("engine", "vllm"), ("ray", "ray")):
        if item.get_closest_marker(kind) is not None and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks: dict[pytest.Item, int] = {}
    for item in items:
        marked = {mark.name for mark in item.iter_markers()}
        place, seconds = next(((n, seconds) for n, (kind, seconds) in enumerate(_KINDS) if kind in marked), (None, 0))
        ranks[item] = 0 if place is None else len(_KINDS) - place
        if place is not None and "timeout" not in marked:
            item.add_marker(pytest.mark.timeout(seconds))
    items.sort(key=ranks.__getitem__)
