"""State: what an application knows, immutable and cheap to update.

A State is a shared, never mutated ``base`` dict under a small ``overlay`` of newer values. An update
copies the overlay only, so its cost does not grow with the fields that it leaves alone; the overlay is
folded into a new base once it holds ``_FOLD_AT`` keys, which spreads the cost of that copy over as many updates.
Beside it a State keeps its ``delta``: what was written since the last commit, which is all that a store has to
write and all that the checks of declared writes have to look at. Of a list that was only appended to, it knows which
list that began with, so that a store need not write that one again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from numbers import Number
from operator import is_
from types import CoroutineType
from typing import Any, Final

import msgspec

from arun.errors import CodecError, MisuseError

__all__ = ("Scope", "State", "StateDelta")

_FOLD_AT: Final = 64
_DELETED: Final = msgspec.UNSET
_NOTHING: Final[dict[str, Any]] = {}


class StateDelta(msgspec.Struct, frozen=True):
    """What was written between two commits of a State.

    :ivar written: new values by key.
    :ivar deleted: keys that were removed.
    """

    written: dict[str, Any]
    deleted: frozenset[str]


class Scope(msgspec.Struct, frozen=True):
    """Which keys an action may read: those it declares in ``reads`` and ``writes``."""

    action: str
    readable: frozenset[str]


class State(Mapping[str, Any]):
    """An immutable mapping from names to values; every operation returns a new State.

    Values are shared, never copied: change them through the State's operations and not in place.

    :param initial_values: first values; the mapping itself is copied, its values are not.

    >>> state = State({"n": 1}).update(n=2, log=[])
    >>> state["n"], state.append(log="x")["log"]
    (2, ['x'])
    """

    __slots__ = ("_base", "_changed", "_extended", "_overlay", "_scope", "action")

    #: Name of the action whose result this State is; None for any other State.
    action: str | None

    def __init__(self, initial_values: Mapping[str, Any] | None = None) -> None:
        self._base: dict[str, Any] = _NOTHING
        self._overlay: dict[str, Any] = dict(initial_values) if initial_values else _NOTHING
        self._changed: dict[str, Any] = self._overlay
        #: the lists that those in the delta began with, by key, where nothing but append() and extend() has made them
        self._extended: dict[str, list[Any]] = _NOTHING
        self._scope: Scope | None = None
        self.action = None
        if len(self._overlay) > _FOLD_AT:
            self._base, self._overlay = self._overlay, _NOTHING

    # -- operations ------------------------------------------------------------------------------

    def update(self, /, **values: Any) -> State:
        """Set fields.

        :raises MisuseError: for a coroutine, which was not awaited.
        """
        for key, value in values.items():
            if type(value) is CoroutineType:
                raise _not_awaited("update", key, value)
        return self._with(values)

    def append(self, /, **values: Any) -> State:
        """Append one value to each named list field; a missing field counts as empty.

        :raises ValueError: if a field holds something else than a list.
        :raises MisuseError: for a coroutine, which was not awaited.
        """
        lists = self._lists(values, "append")
        return self._with({key: [*lists[key], value] for key, value in values.items()}, lists)

    def extend(self, /, **values: Iterable[Any]) -> State:
        """Append all of several values to each named list field; a missing field counts as empty.

        :raises ValueError: if a field holds something else than a list.
        :raises MisuseError: for a coroutine, which was not awaited.
        """
        lists = self._lists(values, "extend")
        return self._with({key: [*lists[key], *more] for key, more in values.items()}, lists)

    def increment(self, /, **values: float) -> State:
        """Add to each named number field; a missing field counts as 0.

        :raises ValueError: if a field holds something else than a number, or is to be incremented by something else.
        """
        sums: dict[str, Any] = {}
        for key, by in values.items():
            value = self._get(key, 0)
            try:
                sums[key] = value + by
            except TypeError:
                wrong = f"state[{key!r}] is non-integer, it holds a {type(value).__name__}"
                if isinstance(value, Number):
                    wrong = f"it is given a {type(by).__name__}"
                raise ValueError(f"increment({key}={by!r}): {wrong}; increment() needs numbers") from None
        return self._with(sums)

    def wipe(self, delete: Collection[str] | None = None, keep: Collection[str] | None = None) -> State:
        """Remove the keys in ``delete``, or all but those in ``keep``, or, given neither, all.

        In an action, a key that it declares and the State does not have counts as removed, too, so that the first visit
        is as good as the others.

        :raises ValueError: if both are given.
        :raises MisuseError: for a text, where a list of keys is meant.
        """
        for what, keys in (("delete", delete), ("keep", keep)):
            if isinstance(keys, str):
                raise MisuseError(f"wipe({what}={keys!r}): a list of keys is meant: wipe({what}=[{keys!r}])")
        if delete is not None and keep is not None:
            raise ValueError("wipe() takes either delete or keep, not both")
        declared = self._scope.readable if self._scope is not None else frozenset[str]()
        if delete is None:
            delete = [key for key in dict.fromkeys((*self._keys(), *declared)) if key not in (keep or ())]
        return self._with(dict.fromkeys((key for key in delete if key in declared or self._has(key)), _DELETED))

    def merge(self, other: Mapping[str, Any]) -> State:
        """Set all fields of another State or mapping; where both have a key, the other's value wins."""
        return self._with(dict(other))

    def subset(self, *keys: str, ignore_missing: bool = True) -> State:
        """A State of the named fields only.

        :param ignore_missing: if False, a key that is not there is a KeyError.
        """
        return State({key: self[key] for key in keys if not ignore_missing or self._has(key)})

    def get_all(self) -> dict[str, Any]:
        """All fields as a new dict."""
        return {key: self._get(key, None) for key in self}

    def serialize(self) -> bytes:
        """All fields as bytes; :meth:`deserialize` gives them back exactly, types included (see :mod:`arun.codec`).

        :raises CodecError: for a value of a type that is not known, naming field and type; see :func:`arun.register`.
        """
        from arun.codec import encode  # which knows States

        return encode(self)

    @staticmethod
    def deserialize(data: bytes | bytearray | memoryview) -> State:
        """The State that :meth:`serialize` was called on. Bytes from anywhere may be given: nothing in them is run.

        :raises CodecError: for bytes that are no State, or hold a type that is not registered here.
        """
        from arun.codec import decode

        if not isinstance(data, (bytes, bytearray, memoryview)):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise CodecError(
                f"State.deserialize() takes the bytes that serialize() gave, not a {type(data).__name__}; "
                "State(fields) makes a State of a dict"
            )
        state = decode(data)
        if not isinstance(state, State):
            raise CodecError(f"these {len(data)} bytes hold a {type(state).__name__} and no State")
        return state

    @property
    def delta(self) -> StateDelta:
        """What was written since the last commit (an action's result: what that action wrote)."""
        changed = self._changed
        return StateDelta(
            {key: value for key, value in changed.items() if value is not _DELETED},
            frozenset(key for key, value in changed.items() if value is _DELETED),
        )

    # -- Mapping -----------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        scope = self._scope
        if scope is not None and key not in scope.readable and key not in self._changed:
            self._refuse(key)
        value = self._overlay.get(key, _MISSING)
        if value is _MISSING:
            value = self._base.get(key, _MISSING)
        if value is _MISSING or value is _DELETED:
            known = ", ".join(sorted(map(str, self))) or "none"
            raise KeyError(f"state has no key {key!r}; it has: {known}")
        return value

    def __contains__(self, key: object) -> bool:
        scope = self._scope
        if scope is not None and key not in scope.readable and key not in self._changed:
            return False
        return self._has(key)

    def __iter__(self) -> Iterator[str]:
        scope = self._scope
        if scope is None:
            return iter(self._keys())
        return iter([key for key in self._keys() if key in scope.readable or key in self._changed])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"State({self.get_all()!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (State, (self.get_all(),))

    __hash__ = None  # type: ignore[assignment]  # values may be unhashable, as in a dict

    # -- for the runtime -----------------------------------------------------------------------------

    def scoped(self, scope: Scope | None) -> State:
        """This State with an empty delta, readable only as ``scope`` allows."""
        return self._new(self._base, self._overlay, _NOTHING, scope, None)

    def committed(self, changes: State, action: str | None = None) -> State:
        """This State plus the delta of ``changes``, as the new committed State (its own delta is empty)."""
        base, overlay = self._base, self._overlay | changes._changed
        if len(overlay) > _FOLD_AT:
            base, overlay = _folded(base, overlay), _NOTHING
        return self._new(base, overlay, _NOTHING, None, action)

    def absorb(self, changes: State) -> State:
        """This State with the delta of ``changes`` written to it, as if it had written it itself."""
        return self._with(changes._changed, changes._extended)

    def patched(self, delta: StateDelta) -> State:
        """This State with a delta written to it, as if it had written it itself."""
        return self._with({**delta.written, **dict.fromkeys(delta.deleted, _DELETED)})

    def appended_to(self, earlier: State) -> dict[str, int]:
        """The lists of the delta that are those of ``earlier`` with more behind, by key: how many items those had."""
        return {
            key: len(began)
            for key, began in self._extended.items()
            if began is earlier._raw(key) and _begins_with(self._changed[key], began)  # and was not, say, sorted since
        }

    def finished(self, changes: State, action: str) -> State:
        """As :meth:`absorb`, all of it readable, with ``action`` as the one that made it."""
        state = self._with(changes._changed)
        state._scope = None
        state.action = action
        return state

    def changed_from(self, earlier: State | None) -> dict[str, Any]:
        """The fields of this State's delta whose values are other objects than in ``earlier``'s delta."""
        before = earlier._changed if earlier is not None else _NOTHING
        return {
            key: value
            for key, value in self._changed.items()
            if value is not _DELETED and before.get(key, _MISSING) is not value
        }

    def written_keys(self) -> AbstractSet[str]:
        """The keys of the delta, deleted ones included."""
        return self._changed.keys()

    def differing_keys(self, earlier: State) -> list[str]:
        """The keys of the delta whose values are other objects than in ``earlier``, or that it has and this has not."""
        return [
            key
            for key, value in self._changed.items()
            if value is not earlier._raw(key) and not (value is _DELETED and not earlier._has(key))
        ]

    # -- private -----------------------------------------------------------------------------------------

    @staticmethod
    def _new(
        base: dict[str, Any],
        overlay: dict[str, Any],
        changed: dict[str, Any],
        scope: Scope | None,
        action: str | None,
    ) -> State:
        state = _blank(State)
        state._base = base
        state._overlay = overlay
        state._changed = changed
        state._extended = _NOTHING
        state._scope = scope
        state.action = action
        return state

    def _with(self, values: dict[str, Any], extended: dict[str, list[Any]] = _NOTHING) -> State:
        base, overlay = self._base, self._overlay | values
        if len(overlay) > _FOLD_AT:
            base, overlay = _folded(base, overlay), _NOTHING
        state = _blank(State)
        state._base = base
        state._overlay = overlay
        state._changed = self._changed | values if self._changed else values
        state._extended = self._extending(values, extended) if extended or self._extended else _NOTHING
        state._scope = self._scope
        state.action = None
        return state

    def _has(self, key: object) -> bool:
        value = self._overlay.get(key, _MISSING)  # type: ignore[call-overload]  # any object may be asked for
        if value is _MISSING:
            return key in self._base
        return value is not _DELETED

    def _get(self, key: str, default: Any) -> Any:
        return self[key] if self._has(key) else default

    def _raw(self, key: str) -> Any:
        value = self._overlay.get(key, _MISSING)
        return self._base.get(key, _MISSING) if value is _MISSING else value

    def _lists(self, more: Mapping[str, Any], operation: str) -> dict[str, list[Any]]:
        """The lists that are to have more behind."""
        lists: dict[str, list[Any]] = {}
        for key, added in more.items():
            if type(added) is CoroutineType:
                raise _not_awaited(operation, key, added)
            value = lists[key] = self._get(key, [])
            if not isinstance(value, list):
                raise ValueError(
                    f"{operation}({key}=...): state[{key!r}] is non-{operation}able, it holds a "
                    f"{type(value).__name__}; {operation}() needs a list"
                )
        return lists

    def _extending(self, values: dict[str, Any], extended: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """``_extended`` after ``values`` are written, those in ``extended`` being the lists there with more behind."""
        began = {key: value for key, value in self._extended.items() if key in extended or key not in values}
        return began | {key: value for key, value in extended.items() if key not in self._changed}

    def _keys(self) -> list[str]:
        if not self._base:
            return [key for key, value in self._overlay.items() if value is not _DELETED]
        return [key for key, value in (self._base | self._overlay).items() if value is not _DELETED]

    def _refuse(self, key: str) -> None:
        assert self._scope is not None
        action, readable = self._scope.action, ", ".join(sorted(self._scope.readable)) or "nothing"
        raise MisuseError(
            f"action {action!r} reads state[{key!r}], which it does not declare (it declares: {readable}); "
            f"add {key!r} to its reads"
        )


def _not_awaited(operation: str, key: str, coroutine: CoroutineType[Any, Any, Any]) -> MisuseError:
    coroutine.close()
    return MisuseError(
        f"{operation}({key}=...) was given a coroutine (an async def that was called and not awaited), "
        f"{coroutine!r:.80}; await it: {operation}({key}=await {coroutine.__name__}(...))"
    )


def _begins_with(items: list[Any], began: list[Any]) -> bool:
    return len(items) >= len(began) and all(map(is_, items, began))


def _folded(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (base | overlay).items() if value is not _DELETED}


_MISSING: Final = object()
_blank: Final = object.__new__  # a State without __init__; found faster than State.__new__
