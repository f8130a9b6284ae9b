"""Random trees of subtasks against the sequential model of tests/core/test_kernel_model.py, on both event loops."""

from __future__ import annotations

import time
from typing import Any

import anyio
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.core import test_kernel_model as model

NAME = "kernel"
HELP = "random trees of subtasks, run and cancelled, against a sequential model"

_EXAMPLES = 100
_SETTINGS = settings(max_examples=_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def run(seconds: float, first_seed: int) -> int:
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        for backend in ("asyncio", "trio"):
            _check(backend, first_seed + number)
        number += 1
        print(f"  {number * _EXAMPLES * 4:,} trees", flush=True)
    return 0


def _check(backend: str, number: int) -> None:
    @seed(number)
    @_SETTINGS
    @given(tree=model.TREES)
    def runs(tree: Any) -> None:
        anyio.run(
            _inner(model.test_a_random_tree_gives_what_the_model_allows_and_leaves_nothing), tree, backend=backend
        )

    @seed(number)
    @_SETTINGS
    @given(tree=model.TREES, after=st.integers(0, 40))
    def is_cancelled(tree: Any, after: int) -> None:
        inner = _inner(model.test_a_random_tree_cancelled_at_a_random_moment_leaves_nothing)
        anyio.run(inner, tree, after, backend=backend)

    runs()
    is_cancelled()


def _inner(test: Any) -> Any:
    return test.hypothesis.inner_test
