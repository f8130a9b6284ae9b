"""Keys: what makes a subtask the same one after its process was killed and another has begun.

By content, never by position: the action (its qualified name, ``version``, and settings that can be seen from outside),
the values that it declares to read, and its arguments. So items may be reordered, inserted and removed in between.
What can't be written down can't be compared either; it is refused, with what to do, before it could be mixed up.
"""

from __future__ import annotations

import dis
import enum
import re
import types
import weakref
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from arun.actions import Action, FunctionAction
from arun.codec import canonical, digest
from arun.context import ApplicationContext
from arun.errors import CodecError, MisuseError
from arun.graph import Graph
from arun.state import State

__all__ = ("Identity", "Keys", "graph_hash", "identity_of")


class Identity(msgspec.Struct, frozen=True):
    """What of an action counts, besides its reads and arguments.

    :ivar key: its digest.
    :ivar opaque: what may count but can't be written down (clients, locks, lists that grow): two actions of one key are
        the same only if these are.
    """

    key: bytes
    opaque: tuple[Any, ...]


# Looked at once, before the action has run: a counter in it must not make it another action.
_identities: Final[weakref.WeakKeyDictionary[Action, Identity]] = weakref.WeakKeyDictionary()


def identity_of(action: Action) -> Identity:
    """The identity of an action."""
    found = _identities.get(action)
    if found is None:
        opaque: list[Any] = []
        found = Identity(digest(repr(_identity(action, opaque)).encode()), tuple(opaque))
        _identities[action] = found
    return found


class Keys:
    """Content keys of the subtasks of one parallel action, or of the steps of one sub-graph."""

    __slots__ = ("_digests", "_first", "_owner")

    def __init__(self, owner: str) -> None:
        self._owner = owner
        # Siblings mostly share the values that are large, such as the list that all items come from.
        self._digests: dict[str, tuple[Any, bytes]] = {}
        self._first: dict[bytes, Identity] = {}

    def of(
        self, action: Action, state: State, inputs: Mapping[str, Any], context: ApplicationContext, *more: bytes
    ) -> bytes:
        """The key of running ``action`` on ``state`` with ``inputs``; ``more`` counts, too.

        :raises MisuseError: if something that counts can't be written down, or has the key of another sibling that it
            is not the same as.
        """
        identity = identity_of(action)
        parts = [identity.key, *more]
        for key in sorted({*action.reads, *action.writes}):
            if key in state:
                parts += (key.encode(), self._read(action, key, state[key]))
        parts.append(b"")
        for name, value in sorted(_arguments(action, inputs, context).items()):
            parts += (name.encode(), self._argument(action, name, value, context.resources))
        content = digest(*parts)
        if identity.opaque:
            self._refuse_other(content, action, identity)
        return content

    def _refuse_other(self, content: bytes, action: Action, identity: Identity) -> None:
        first = self._first.setdefault(content, identity)
        if first is not identity and not all(map(_same, first.opaque, identity.opaque)):
            kinds = ", ".join(type(one).__name__ for one in identity.opaque)
            raise MisuseError(
                f"two subtasks of {self._owner!r} run {action.display_name!r} on the same values and with other "
                f"objects ({kinds}), so that a resumed run couldn't tell them apart; give them names: .with_name(...), "
                "or keys: SubGraphTask(..., key=...)"
            )

    def _read(self, action: Action, key: str, value: Any) -> bytes:
        kind = type(value)
        if kind is str or kind is int:
            return canonical(value)
        before = self._digests.get(key)
        if before is not None and before[0] is value:
            return before[1]
        try:
            key_of_value = digest(canonical(value))
        except CodecError as exc:
            raise MisuseError(
                f"{self._owner!r} can't tell its subtasks apart: {action.display_name!r} reads "
                f"state[{key!r}]{''.join(exc.path)} of type {exc.kind or kind.__name__}, which can't be stored: "
                f"{exc.why or exc}; or give keys: SubGraphTask(..., key=...)"
            ) from exc
        self._digests[key] = (value, key_of_value)
        return key_of_value

    def _argument(self, action: Action, name: str, value: Any, resources: Mapping[str, Any]) -> bytes:
        try:
            return canonical(value)
        except CodecError as exc:
            for resource, injected in resources.items():
                if injected is value:
                    return b"resource " + resource.encode()
            if isinstance(value, Action):
                return identity_of(value).key
            raise MisuseError(
                f"{self._owner!r} can't tell its subtasks apart: the argument {name!r} of {action.display_name!r} is "
                f"of type {exc.kind or type(value).__name__}, which can't be stored: {exc.why or exc}; or inject it "
                f"with with_resources({name}=...), or give keys: SubGraphTask(..., key=...)"
            ) from exc


def graph_hash(graph: Graph, entrypoint: str) -> str:
    """Changes with the names, reads, writes and transitions of a graph, and not with the code of its actions."""
    return digest(repr(_shape(graph, entrypoint)).encode()).hex()


def _shape(graph: Graph, entrypoint: str) -> list[Any]:
    actions = [
        [
            name,
            sorted(action.reads),
            sorted(action.writes),
            _shape(inner, getattr(action, "entrypoint", "")) if isinstance(inner, Graph) else None,
        ]
        for name, action in sorted(graph.actions.items())
        for inner in [getattr(action, "graph", None)]
    ]
    arrows = [[arrow.from_, arrow.to, _no_address(arrow.condition.name)] for arrow in graph.transitions]
    return [entrypoint, actions, arrows]


def _no_address(name: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", name)


def _arguments(action: Action, inputs: Mapping[str, Any], context: ApplicationContext) -> dict[str, Any]:
    """What the action may be given besides the State, without resources, which count by the parameter's name."""
    if isinstance(action, FunctionAction) and not action.parameters.open:
        sources = (action.bound, inputs, context.inputs)
        return {
            name: source[name]
            for name in action.parameters.names
            for source in [next((source for source in sources if name in source), None)]
            if source is not None
        }
    return {**context.inputs, **inputs, **action.bound}


# Attributes of actions that are told from elsewhere, or say nothing of what it does.
_ELSEWHERE: Final = frozenset({
    "_bound", "_parameters", "allowed_writes", "blocking", "function", "graph", "kind", "name", "reads", "scope",
    "tags", "writes",
})  # fmt: skip


def _identity(action: Action, opaque: list[Any]) -> list[Any]:
    graph = getattr(action, "graph", None)
    if isinstance(graph, Graph):
        inner = [
            [name, _identity(one, opaque), _setting(dict(one.bound), opaque)] for name, one in graph.actions.items()
        ]
        shape = _shape(graph, getattr(action, "entrypoint", ""))
        return ["graph", shape, inner, sorted(getattr(action, "halt_after", ()))]
    if isinstance(action, FunctionAction):
        what = _function(action.function, opaque)
    else:
        attributes = {name: value for name, value in vars(action).items() if name not in _ELSEWHERE}
        what = [_name(type(action)), [[name, _setting(attributes[name], opaque)] for name in sorted(attributes)]]
    return [what, action.display_name, action.version]


def _function(function: Any, opaque: list[Any], depth: int = 0) -> list[Any]:
    """A function by its name and what it closes over: two of one factory are two functions."""
    inner = getattr(function, "func", None)  # a partial
    if inner is not None:
        return [_function(inner, opaque, depth), _setting([function.args, function.keywords], opaque)]
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return [_name(type(function)), _setting(getattr(function, "__dict__", None), opaque)]
    cells: list[Any] = []
    rebound = _rebound(function.__code__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name in rebound:
            continue
        try:
            value = cell.cell_contents
        except ValueError:  # not set yet
            continue
        if isinstance(value, types.FunctionType) and depth < 4:
            cells.append([name, _function(value, opaque, depth + 1)])
        else:
            cells.append([name, _setting(value, opaque)])
    defaults = [_setting(value, opaque) for value in function.__defaults__ or ()]
    return [_name(function), cells, defaults, [*(function.__kwdefaults__ or {})]]


def _rebound(code: types.CodeType) -> set[str]:
    """Names of the enclosing function that this one sets: its counters, not its settings."""
    return {str(step.argval) for step in dis.get_instructions(code) if step.opname in {"STORE_DEREF", "DELETE_DEREF"}}


def _setting(value: Any, opaque: list[Any]) -> Any:
    """What counts of a value that an action holds on to."""
    if value is None or type(value) in {bool, int, float, str, bytes}:
        return repr(value)
    if isinstance(value, enum.Enum):
        return [_name(type(value)), value.name]
    if type(value) in {tuple, frozenset}:
        settings = [_setting(inner, opaque) for inner in value]
        return settings if type(value) is tuple else sorted(settings, key=repr)
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return _name(value)
    if isinstance(value, Action):
        return _identity(value, opaque)
    opaque.append(value)
    return _name(type(value))


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{getattr(thing, '__qualname__', '?')}"


def _same(ours: Any, theirs: Any) -> bool:
    if ours is theirs:
        return True
    if type(ours) is not type(theirs):
        return False
    try:
        return canonical(ours) == canonical(theirs)
    except CodecError:
        return False
