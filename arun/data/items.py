"""Items: an (async) iterable that a dataset starts with, and whether it can be iterated over once more."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from arun.errors import MisuseError
from arun.guards import close_unused, shown, spelling

__all__ = ("ItemSource", "Items")

ItemSource: TypeAlias = "Iterable[Any] | AsyncIterable[Any] | Callable[[], Any]"


class Items:
    """What ``from_iterable()`` was given.

    :ivar on_demand: whether it minds when it is asked: a block that is asked for early would count as done.
    :param given: an (async) iterable of rows, record batches or tables, or a function of no arguments that returns one,
        which is called for each run. An iterator, such as a generator, can be run once.
    """

    __slots__ = ("_given", "_used", "name", "on_demand")

    def __init__(self, given: ItemSource) -> None:
        self._given = given
        self._used = False
        self.name: str = getattr(given, "__name__", type(given).__name__)
        self.on_demand: bool = getattr(given, "on_demand", False)
        if not callable(given):
            self._refuse_other(given)

    @property
    def whole(self) -> bool:
        """Whether iterating computes nothing that could be computed elsewhere: not so a cache that is to be filled."""
        return getattr(self._given, "whole", True)

    def open(self) -> Iterator[Any] | AsyncIterator[Any]:
        """Begin to iterate.

        :raises MisuseError: it is an iterator, and was iterated over before.
        """
        given: Any = self._given
        if callable(given):
            given = given()
            self._refuse_other(given)
        elif isinstance(given, Iterator | AsyncIterator):
            if self._used:
                raise MisuseError(
                    f"{self.name} is an iterator and was read by an earlier run, so nothing is left of it; give "
                    f"from_iterable() the function that makes it, from_iterable({self.name}), or a list"
                )
            self._used = True
        return aiter(given) if isinstance(given, AsyncIterable) else iter(given)

    def _refuse_other(self, given: Any) -> None:
        if isinstance(given, AsyncIterable | Iterable) and not isinstance(given, str | bytes | Mapping):
            return
        message = (
            f"from_iterable() was given {shown(given)}; it takes an (async) iterable of rows or record batches, or a "
            f"function that returns one. {spelling(given) or ''}".rstrip(". ")
        )
        close_unused(given)
        raise MisuseError(message)
