"""What the tests of the core share."""

from __future__ import annotations

import pytest


@pytest.fixture
def asyncio_only(anyio_backend: str) -> None:
    """For what only asyncio has: cancellation of a task without a scope."""
    if anyio_backend != "asyncio":
        pytest.skip("asyncio's own cancellation")
