"""Actions as what a worker process can find by itself: names of modules and what they define.

Code never crosses. A function action crosses as the name by which its module has it, plus what ``bind`` and
``with_name`` made of it; a class action as its class and its attributes; a RunnableGraph as its parts.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Final, cast

from arun.actions import Action, FunctionAction
from arun.codec import decode, encode
from arun.conditions import Condition, default, expr, when
from arun.errors import ArunError, MisuseError
from arun.executors.messages import ByName, ConditionOrder, GraphOrder, Instance, Reference
from arun.graph import Graph, Transition
from arun.parallel import RunnableGraph
from arun.signatures import where

__all__ = ("MAIN", "action_of", "encode_values", "main_source", "refer_to")

#: Name under which a worker has the parent's main module, as with :mod:`multiprocessing`.
MAIN: Final = "__mp_main__"
_INSTEAD: Final = "or run it here: executor=None, or a ThreadExecutor for plain functions"


def refer_to(action: Action) -> Reference:
    """How a worker finds an action.

    :raises MisuseError: it can't; the message names the action and says what to do.
    """
    if isinstance(action, FunctionAction):
        return _refer_to_function(action)
    if type(action) is RunnableGraph:
        return _refer_to_graph(action)
    return _refer_to_instance(action)


def action_of(reference: Reference, module: Callable[[str], ModuleType] = importlib.import_module) -> Action:
    """The action that a reference means, in the worker.

    :param module: gives a module by its name.
    """
    match reference:
        case ByName():
            found = _dig(module(reference.module), reference.qualname)
            changes: dict[str, Any] = {"_bound": decode(reference.bound), "name": reference.name}
            return cast("Action", found)._copy(**changes)
        case Instance():
            cls = _dig(module(reference.module), reference.qualname)
            instance: Action = object.__new__(cls)
            vars(instance).update(decode(reference.values))
            vars(instance).update({name: action_of(inner, module) for name, inner in reference.actions.items()})
            return instance
        case GraphOrder():
            graph = Graph(
                {name: action_of(inner, module) for name, inner in reference.actions.items()},
                [Transition(a, b, _condition_of(condition, module)) for a, b, condition in reference.transitions],
            )
            runnable = RunnableGraph(graph, reference.entrypoint, reference.halt_after)
            return runnable._copy(name=reference.name, _bound=decode(reference.bound))


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


# -- references ----------------------------------------------------------------------------------------------


def _refer_to_function(action: FunctionAction) -> ByName:
    function: Any = action.function
    name = action.display_name
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        raise MisuseError(
            f"action {name!r} is made of {function!r}, which has no name in a module, so a worker process can't import "
            f"it; make it of a function at the top level of a module, {_INSTEAD}"
        )
    _refuse_unimportable(f"action {name!r} ({where(function)})", module, qualname)
    found = _dig(sys.modules.get(module), qualname)
    if not _same(found, action):  # `ask = action(...)(function)` has it under another name
        for other, value in vars(sys.modules.get(module) or ModuleType("")).items():
            if _same(value, action):
                qualname = other
                break
        else:
            raise MisuseError(
                f"action {name!r} ({where(function)}) is not what module {module!r} has as {qualname!r}, so a worker "
                f"process can't import it; decorate it at the top level of the module, {_INSTEAD}"
            )
    return ByName(_portable(module), qualname, action.name, _bound(action))


def _same(found: Any, action: FunctionAction) -> bool:
    return (
        isinstance(found, FunctionAction)
        and found.function is action.function
        and (found.reads, found.writes, found.blocking) == (action.reads, action.writes, action.blocking)
    )


def _refer_to_instance(action: Action) -> Instance:
    cls = type(action)
    name = f"action {action.display_name!r}"
    _refuse_unimportable(f"{name} of class {cls.__name__}", cls.__module__, cls.__qualname__)
    if _dig(sys.modules.get(cls.__module__), cls.__qualname__) is not cls:
        raise MisuseError(
            f"{name}: module {cls.__module__!r} has another {cls.__qualname__} than its class, so a worker process "
            f"can't import it; {_INSTEAD}"
        )
    values = {key: value for key, value in vars(action).items() if key != "scope"}
    actions = {key: refer_to(value) for key, value in values.items() if isinstance(value, Action)}
    values = {key: value for key, value in values.items() if key not in actions}
    return Instance(
        _portable(cls.__module__),
        cls.__qualname__,
        encode_values(values, lambda key: f"the attribute {key} of {name}"),
        actions,
    )


def _refer_to_graph(action: RunnableGraph) -> GraphOrder:
    graph = action.graph
    return GraphOrder(
        {name: refer_to(part) for name, part in graph.actions.items()},
        [(t.from_, t.to, _refer_to_condition(t)) for t in graph.transitions],
        action.entrypoint,
        sorted(action.halt_after),
        action.name,
        _bound(action),
    )


def _refer_to_condition(transition: Transition) -> ConditionOrder:
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
        module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(qualname, str):
            raise MisuseError(
                f"{what} is {function!r}, which a worker process can't import; use when(...) or expr(...)"
            )
        _refuse_unimportable(f"{what} ({where(function)})", module, qualname)
        found = [_portable(module), qualname, condition.name, list(condition.keys)]
        return ConditionOrder("function", encode(found), [])

    return refer(transition.condition)


def _condition_of(order: ConditionOrder, module: Callable[[str], ModuleType]) -> Condition:
    operands = [_condition_of(operand, module) for operand in order.operands]
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
            name, qualname, shown, keys = decode(order.value)
            return Condition(keys, _dig(module(name), qualname), shown)


def _bound(action: Action) -> bytes:
    return encode_values(action.bound, lambda key: f"{key!r}, which is bound to action {action.display_name!r},")


def _refuse_unimportable(what: str, module: str, qualname: str) -> None:
    if "<lambda>" in qualname or "<locals>" in qualname:
        outer = qualname.rpartition(".<locals>")[0]
        inside = f"inside {outer}()" if outer else "as a lambda"
        raise MisuseError(
            f"{what} is defined {inside}, so a worker process can't import it; move it to the top level of its module "
            f"and bind() what it closes over, {_INSTEAD}"
        )
    if module == "__main__" and main_source()[0] is None:
        raise MisuseError(
            f"{what} is defined in a session that has no file, so a worker process can't import it; move it into a "
            f"module, {_INSTEAD}"
        )


def _portable(module: str) -> str:
    return MAIN if module == "__main__" else module


def _dig(module: ModuleType | None, qualname: str) -> Any:
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found
