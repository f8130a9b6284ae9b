"""Collectors: what an action's generator yields, sorted into Items, Partials and the result."""

from __future__ import annotations

from collections.abc import Callable
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, Final

from arun.context import ApplicationContext
from arun.errors import MisuseError
from arun.events import Item, Partial
from arun.guards import Repeats, close_unused, shown, spelling
from arun.signatures import where
from arun.state import State

__all__ = ("Collector", "ItemsOnly")


class Collector:
    """Takes what a generator yields: States are kept (and sent as Partials), everything else is sent as an Item.

    :param function: the generator function, for errors.
    """

    __slots__ = ("_function", "_repeats", "context", "name", "result", "state")

    def __init__(self, name: str, context: ApplicationContext, function: Callable[..., Any]) -> None:
        self.name = name
        self.context = context
        self._function = function
        self.state: State | None = None
        self.result: Any = None
        checks = context.checks
        self._repeats = (Repeats(checks), Repeats(checks)) if checks is not None and checks.strict else None

    async def take(self, yielded: Any) -> None:
        """:raises MisuseError: for something that can't be an item."""
        for beat in self.context.beats:
            beat()
        item, state = yielded, None
        if isinstance(yielded, State):
            item, state = None, yielded
        elif _is_burr_pair(yielded):
            item, state = yielded
            if state is not None:  # (result, State), as a function returns it: the result is no item
                self.result, item = item, None
        elif type(item) in _NO_ITEMS:
            raise _no_item(where(self._function), item)
        if self._repeats is not None:
            self._refuse_repeated(item, state)
        listening = self.context.run.listening
        if item is not None and listening:
            await self.context.emit(Item, values=[item])
        if state is not None:
            before, self.state = self.state, state
            if listening:
                await self.context.emit(Partial, changed=state.changed_from(before))

    def performed(self) -> tuple[Any, State]:
        """What the generator came to, after its end."""
        if self.state is None:
            raise MisuseError(
                f"action {self.name!r} ended without yielding a State; a generator's last State is its result: "
                f"yield state.update(...) ({where(self._function)})"
            )
        return self.result, self.state

    def _refuse_repeated(self, item: Any, state: State | None) -> None:
        assert self._repeats is not None
        items, states = self._repeats
        at = where(self._function)

        def tell(name: str) -> tuple[str, str, int]:
            what = f"state[{name!r}]" if name else f"the same {type(item).__name__}"
            return (
                (
                    f"{at} yielded {what} a second time, changed in place meanwhile; whoever kept the first "
                    "sees only the last: yield a copy, for example list(answers)"
                ),
                "",
                0,
            )

        misuse = items.check({"": item}, tell) if item is not None else None
        if misuse is None and state is not None:
            misuse = states.check(state.delta.written, tell)
        if misuse is not None:
            raise misuse


#: What is never meant as an item: it was not awaited, or not iterated over.
_NO_ITEMS: Final = frozenset({CoroutineType, AsyncGeneratorType, GeneratorType})


def _no_item(where: str, item: Any) -> MisuseError:
    message = f"{where} yielded {shown(item)}; {spelling(item)}"
    close_unused(item)
    return MisuseError(message)


class ItemsOnly:
    """Takes what a class action's generator yields: the last is the result, the others are items.

    As in Burr; so each item is sent when the next one comes.
    """

    __slots__ = ("_began", "context", "result")

    def __init__(self, context: ApplicationContext) -> None:
        self.context = context
        self.result: Any = None
        self._began = False

    async def take(self, item: Any) -> None:
        if type(item) in _NO_ITEMS:
            raise _no_item(f"action {self.context.label}", item)
        before, self.result = self.result, item
        for beat in self.context.beats:
            beat()
        if self._began and self.context.run.listening:
            await self.context.emit(Item, values=[before])
        self._began = True


def _is_burr_pair(yielded: Any) -> bool:
    if not isinstance(yielded, tuple) or len(yielded) != 2:
        return False
    item, state = yielded
    return isinstance(state, State) or (state is None and isinstance(item, dict))
