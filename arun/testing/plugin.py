"""pytest plugin: in tests the guard-rails are strict, unless the program says otherwise.

The ini option ``arun_check`` sets another level for a whole suite, the fixture ``arun_check`` for one test::

    def test_an_application_that_changes_values_in_place(arun_check):
        arun_check("error")
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from arun.errors import MisuseError
from arun.guards import Level, set_default_level

__all__ = ("arun_check", "pytest_addoption", "pytest_configure", "pytest_unconfigure")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "arun_check",
        "check level of arun's guard-rails where a program gives none: off, warn, error, strict",
        default="strict",
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        set_default_level(config.getini("arun_check"))
    except MisuseError as exc:
        raise pytest.UsageError(f"ini option arun_check: {exc}") from None


def pytest_unconfigure() -> None:
    set_default_level(None)


@pytest.fixture
def arun_check() -> Iterator[Callable[[Level], None]]:
    """Sets the default check level until the test ends."""
    replaced: list[Level | None] = []

    def use(level: Level) -> None:
        replaced.append(set_default_level(level))

    yield use
    if replaced:
        set_default_level(replaced[0])
