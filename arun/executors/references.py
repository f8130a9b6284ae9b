"""Actions as what a worker process can find by itself: names of modules and what they define.

A function action crosses as the name by which its module has it, plus what ``bind`` and ``with_name`` made of it; a
class action as its class and its attributes; a RunnableGraph as its parts. Code never crosses here: an executor that
has a way for it gives a :data:`Pack`, and gets what has no such name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from inspect import isfunction
from types import ModuleType
from typing import Any, Final, TypeAlias, cast

from arun.actions import Action, FunctionAction
from arun.codec import decode, encode
from arun.conditions import Condition, default, expr, when
from arun.errors import ArunError, MisuseError
from arun.executors.messages import ByName, ConditionOrder, GraphOrder, Instance, Reference
from arun.graph import Graph, Transition
from arun.parallel import RunnableGraph
from arun.signatures import where

__all__ = ("MAIN", "Find", "Pack", "action_of", "dig", "encode_values", "main_source", "name_of_function", "refer_to")

#: Takes what other processes can't import, after a name of it for errors, and gives what its worker finds it by instead
#: of module and qualified name. It is given what the main module defines, too.
Pack: TypeAlias = Callable[[str, object], tuple[str, str]]
#: The other side of that: what a worker has under a module's and a qualified name.
Find: TypeAlias = Callable[[str, str], Any]

#: Name under which a worker has the parent's main module, as with :mod:`multiprocessing`.
MAIN: Final = "__mp_main__"
_INSTEAD: Final = "or run it here: executor=None, or a ThreadExecutor for plain functions"


def refer_to(action: Action, pack: Pack | None = None) -> Reference:
    """How a worker finds an action.

    :param pack: for what can't be imported there; by default that is refused.
    :raises MisuseError: it can't; the message names the action and says what to do.
    """
    if isinstance(action, FunctionAction):
        return _refer_to_function(action, pack)
    if type(action) is RunnableGraph:
        return _refer_to_graph(action, pack)
    return _refer_to_instance(action, pack)


def action_of(reference: Reference, find: Find) -> Action:
    """The action that a reference means, in the worker."""
    match reference:
        case ByName():
            found: Action = find(reference.module, reference.qualname)
            changes: dict[str, Any] = {"_bound": decode(reference.bound), "name": reference.name}
            return found._copy(**changes)
        case Instance():
            cls = find(reference.module, reference.qualname)
            instance: Action = object.__new__(cls)
            vars(instance).update(decode(reference.values))
            vars(instance).update({name: action_of(inner, find) for name, inner in reference.actions.items()})
            vars(instance).update({name: find(*place) for name, place in reference.functions.items()})
            return instance
        case GraphOrder():
            graph = Graph(
                {name: action_of(inner, find) for name, inner in reference.actions.items()},
                [Transition(a, b, _condition_of(condition, find)) for a, b, condition in reference.transitions],
            )
            runnable = RunnableGraph(graph, reference.entrypoint, reference.halt_after)
            return runnable._copy(name=reference.name, _bound=decode(reference.bound))


def name_of_function(action: FunctionAction, *, by_value: bool) -> tuple[str, str]:
    """The module that has a function action, and its name there.

    :param by_value: the workers do not import the main module.
    :raises MisuseError: no module has it.
    """
    name, function = action.display_name, cast("Any", action.function)
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        raise MisuseError(
            f"action {name!r} is made of {function!r}, which has no name in a module, so a worker process can't import "
            f"it; make it of a function at the top level of a module, {_INSTEAD}"
        )
    _refuse_unimportable(f"action {name!r} ({where(function)})", module, qualname, by_value=by_value)
    found = dig(sys.modules.get(module), qualname)
    if not _same(found, action):  # `ask = action(...)(function)` has it under another name
        for other, value in vars(sys.modules.get(module) or ModuleType("")).items():
            if _same(value, action):
                return _portable(module), other
        raise MisuseError(
            f"action {name!r} ({where(function)}) is not what module {module!r} has as {qualname!r}, so a worker "
            f"process can't import it; decorate it at the top level of the module, {_INSTEAD}"
        )
    return _portable(module), qualname


def encode_values(values: Mapping[str, Any], what: Callable[[str], str]) -> bytes:
    """Encode a dict.

    :param what: names a value by its key, for the error.
    :raises MisuseError: one of them can't cross; says which.
    """
    try:
        return encode(dict(values))
    except (ArunError, TypeError, ValueError) as exc:
        for key, value in values.items():
            try:
                encode(value)
            except (ArunError, TypeError, ValueError) as cause:
                raise MisuseError(f"{what(key)} can't cross to a worker process: {cause}") from cause
        raise MisuseError(f"{what(next(iter(values), ''))} can't cross to a worker process: {exc}") from exc


def main_source() -> tuple[str | None, bool]:
    """Where a worker finds this program's main module: (name or path, whether it is a name); None if nowhere."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name is not None:
        return spec.name, True
    return getattr(main, "__file__", None), False


def dig(module: ModuleType | None, qualname: str) -> Any:
    """What a module has under a qualified name; None where it has nothing."""
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


# -- references ----------------------------------------------------------------------------------------------


def _refer_to_function(action: FunctionAction, pack: Pack | None) -> ByName:
    def name() -> tuple[str, str]:
        return name_of_function(action, by_value=pack is not None)

    what = f"action {action.display_name!r}"
    module, qualname = _place(name, what, lambda: action._copy(name=None, _bound={}), pack)
    return ByName(module, qualname, action.name, _bound(action))


def _refer_to_instance(action: Action, pack: Pack | None) -> Instance:
    cls = type(action)
    name = f"action {action.display_name!r}"
    module, qualname = _place(lambda: _name_of_class(name, cls, by_value=pack is not None), name, lambda: cls, pack)
    values = {key: value for key, value in vars(action).items() if key != "scope"}
    actions = {key: refer_to(value, pack) for key, value in values.items() if isinstance(value, Action)}
    functions = {key: _refer_to_attribute(name, value, pack) for key, value in values.items() if isfunction(value)}
    values = {key: value for key, value in values.items() if key not in actions and key not in functions}
    encoded = encode_values(values, lambda key: f"the attribute {key} of {name}")
    return Instance(module, qualname, encoded, actions, functions)


def _refer_to_attribute(name: str, function: Any, pack: Pack | None) -> tuple[str, str]:
    what = f"the function of {name} ({where(function)})"

    def place() -> tuple[str, str]:
        module, qualname = function.__module__, function.__qualname__
        _refuse_unimportable(what, module, qualname, by_value=pack is not None)
        if dig(sys.modules.get(module), qualname) is not function:
            raise MisuseError(
                f"{what} is not what module {module!r} has as {qualname!r}, so a worker process can't import it; "
                f"{_INSTEAD}"
            )
        return _portable(module), qualname

    return _place(place, what, lambda: function, pack)


def _refer_to_graph(action: RunnableGraph, pack: Pack | None) -> GraphOrder:
    graph = action.graph
    return GraphOrder(
        {name: refer_to(part, pack) for name, part in graph.actions.items()},
        [(t.from_, t.to, _refer_to_condition(t, pack)) for t in graph.transitions],
        action.entrypoint,
        sorted(action.halt_after),
        action.name,
        _bound(action),
    )


def _refer_to_condition(transition: Transition, pack: Pack | None) -> ConditionOrder:
    what = f"the condition of the transition {transition.from_!r} -> {transition.to!r}"

    def refer(condition: Condition) -> ConditionOrder:
        kind, *rest = condition.recipe
        if kind in {"not", "and", "or"}:
            return ConditionOrder(kind, b"", [refer(operand) for operand in rest])
        if kind in {"when", "expr"}:
            return ConditionOrder(kind, encode_values({"value": rest[0]}, lambda _: what), [])
        if kind == "default":
            return ConditionOrder(kind, b"", [])
        function: Any = condition.resolver
        by_value = pack is not None
        place = _place(lambda: _name_of_predicate(what, function, by_value=by_value), what, lambda: function, pack)
        return ConditionOrder("function", encode([*place, condition.name, list(condition.keys)]), [])

    return refer(transition.condition)


def _condition_of(order: ConditionOrder, find: Find) -> Condition:
    operands = [_condition_of(operand, find) for operand in order.operands]
    match order.kind:
        case "default":
            return default
        case "when":
            return when(**decode(order.value)["value"])
        case "expr":
            return expr(decode(order.value)["value"])
        case "not":
            return ~operands[0]
        case "and":
            return operands[0] & operands[1]
        case "or":
            return operands[0] | operands[1]
        case _:
            module, qualname, shown, keys = decode(order.value)
            return Condition(keys, find(module, qualname), shown)


def _bound(action: Action) -> bytes:
    return encode_values(action.bound, lambda key: f"{key!r}, which is bound to action {action.display_name!r},")


# -- names ---------------------------------------------------------------------------------------------------


def _place(
    name: Callable[[], tuple[str, str]], what: str, code: Callable[[], object], pack: Pack | None
) -> tuple[str, str]:
    try:
        return name()
    except MisuseError:
        if pack is None:
            raise
        return pack(what, code())


def _same(found: Any, action: FunctionAction) -> bool:
    return (
        isinstance(found, FunctionAction)
        and found.function is action.function
        and (found.reads, found.writes, found.blocking) == (action.reads, action.writes, action.blocking)
    )


def _name_of_class(name: str, cls: type[Action], *, by_value: bool) -> tuple[str, str]:
    _refuse_unimportable(f"{name} of class {cls.__name__}", cls.__module__, cls.__qualname__, by_value=by_value)
    if dig(sys.modules.get(cls.__module__), cls.__qualname__) is not cls:
        raise MisuseError(
            f"{name}: module {cls.__module__!r} has another {cls.__qualname__} than its class, so a worker process "
            f"can't import it; {_INSTEAD}"
        )
    return _portable(cls.__module__), cls.__qualname__


def _name_of_predicate(what: str, function: Any, *, by_value: bool) -> tuple[str, str]:
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        raise MisuseError(f"{what} is {function!r}, which a worker process can't import; use when(...) or expr(...)")
    _refuse_unimportable(f"{what} ({where(function)})", module, qualname, by_value=by_value)
    return _portable(module), qualname


def _refuse_unimportable(what: str, module: str, qualname: str, *, by_value: bool) -> None:
    """:param by_value: the workers do not import the main module."""
    if "<lambda>" in qualname or "<locals>" in qualname:
        outer = qualname.rpartition(".<locals>")[0]
        inside = f"inside {outer}()" if outer else "as a lambda"
        raise MisuseError(
            f"{what} is defined {inside}, so a worker process can't import it; move it to the top level of its module "
            f"and bind() what it closes over, {_INSTEAD}"
        )
    if module == "__main__" and (by_value or main_source()[0] is None):
        raise MisuseError(
            f"{what} is defined in a session that has no file, so a worker process can't import it; move it into a "
            f"module, {_INSTEAD}"
        )


def _portable(module: str) -> str:
    return MAIN if module == "__main__" else module
