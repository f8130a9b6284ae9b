"""What all tests share: both event loops, the order of the run, and how long a test may take."""

from __future__ import annotations

import gc
import os
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

# Neither Ray nor vLLM reports usage from a test run, nor do the processes that they start.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("DO_NOT_TRACK", "1")

# `make soak` runs the same properties with the other profile.
settings.register_profile(
    "brief", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile(
    "soak", settings.get_profile("brief"), max_examples=3000, suppress_health_check=list(HealthCheck), database=None
)
settings.load_profile("brief")

# The slower a kind of test, the later it runs, so that a plain mistake shows within seconds. Seconds are for one test,
# its fixtures included: the first engine test of a module starts the engine that the others share.
_KINDS = (("engine", 300), ("ray", 120))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True, scope="module")
def older_objects_are_left_alone() -> None:
    """Garbage collections look at what this module makes, not at the half a million objects of those before it.

    Many tests collect, to see that nothing is left over; without this they take most of the run's time.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    gc.unfreeze()  # hypothesis may be imported for the summary, and asks who refers to what


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Asked here, not by `importorskip` in the modules: importing vLLM takes five seconds of every collecting process.
    for kind, package in (("engine", "vllm"), ("ray", "ray")):
        if item.get_closest_marker(kind) is not None and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((len(_KINDS) - i for i, (kind, _) in enumerate(_KINDS) if item.get_closest_marker(kind)), 0)

    for item in items:
        if item.get_closest_marker("timeout") is None:
            for kind, seconds in _KINDS:
                if item.get_closest_marker(kind) is not None:
                    item.add_marker(pytest.mark.timeout(seconds))
                    break
    items.sort(key=rank)
