"""Actions: what an application does. Any callable that makes sense becomes one, by one normaliser.

=================================  ===========================================================================
what is decorated                  how it runs
=================================  ===========================================================================
async generator function           items are streamed; the last State that it yields is the result
coroutine function                 inline; returns a State or ``(result, State)``
plain function                     in a worker thread, so that it can't stall the loop; ``blocking=False``: inline
plain generator function           stepped on one worker thread; items are streamed as they come
=================================  ===========================================================================

Burr's streaming form (``yield {...}, None`` and last ``yield {...}, state``) and its class actions work too.
"""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Self, cast

from arun.calls import Performed, call, in_thread, performed, state_of
from arun.collectors import ItemsOnly
from arun.context import ApplicationContext, current_context
from arun.errors import MisuseError
from arun.events import ActionFinished, ActionStarted
from arun.guards import Watched, check_function, check_methods, close_unused
from arun.policies import Capacity
from arun.signatures import Kind, Parameters, describe, kind_of, name_of, refuse_no_lists, refuse_unknown, where
from arun.state import Scope, State

__all__ = (
    "Action",
    "FunctionAction",
    "Input",
    "Result",
    "SingleStepAction",
    "action",
    "as_action",
    "perform",
    "take_step",
    "within",
)

_NO_INPUTS: Mapping[str, Any] = {}


class Action:
    """A node of a graph. Immutable: ``bind`` and ``with_name`` return changed copies.

    Subclass it as in Burr, with ``run(state, **inputs)`` that returns a result and ``update(result, state)`` that
    returns the new State. ``run`` may be any of the four kinds of function above; of what a generator yields, the last
    is the result and the others are streamed, each when the next one comes.
    """

    name: str | None = None
    reads: Sequence[str] = ()
    writes: Sequence[str] = ()
    tags: Sequence[str] = ()
    #: give it a new value where results of the code before must not be taken from a store
    version: str | int | None = None
    #: whether it does work itself, and not only through actions below it
    leaf: bool = True
    #: whether it runs where its parent does, whatever the executor: its subtasks are what an executor is given
    stays_here: bool = False
    #: whether its async generator gets a task of its own, so that it may yield inside task groups and cancel scopes
    hosted: bool = False
    _bound: Mapping[str, Any] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_no_lists(cls.__qualname__, reads=cls.reads, writes=cls.writes, tags=cls.tags)
        check_methods(cls, hosted=cls.hosted)

    # -- what users override ---------------------------------------------------------------------------

    def run(self, state: State, **inputs: Any) -> Any:
        """Compute the result from the State and the inputs."""
        hint = "; rename its stream_run() to run(): what that yields is streamed" if hasattr(self, "stream_run") else ""
        raise MisuseError(f"{type(self).__qualname__} defines neither run() nor execute(){hint}")

    def update(self, result: Any, state: State) -> State:
        """The new State, given what ``run`` returned."""
        raise MisuseError(f"{type(self).__qualname__} defines run() but not update(result, state)")

    @property
    def inputs(self) -> Sequence[str] | tuple[Sequence[str], Sequence[str]]:
        """Names of the inputs that it takes besides the State: required, or (required, optional).

        Override it as in Burr where ``run`` takes ``**inputs``: those named here are handed over.
        """
        parameters = Parameters.of(self.run)
        return parameters.unbound(self._bound)

    @property
    def input_names(self) -> tuple[frozenset[str], frozenset[str]]:
        """``inputs`` as (required, optional), however it was written."""
        inputs = self.inputs
        if isinstance(inputs, tuple) and len(inputs) == 2 and not isinstance(inputs[0], str):
            required, optional = inputs
            return frozenset(required), frozenset(optional)
        return frozenset(cast("Sequence[str]", inputs)), frozenset()

    @property
    def takes_any_input(self) -> bool:
        """Whether the names of its inputs are known only while it runs, as with subtasks."""
        return False

    # -- what users call --------------------------------------------------------------------------------

    def bind(self, **inputs: Any) -> Self:
        """A copy with some inputs fixed.

        :raises MisuseError: for a name that the action does not take.
        """
        self._check_bind(inputs)
        return self._copy(_bound={**self._bound, **inputs})

    def with_name(self, name: str) -> Self:
        """A copy of another name."""
        return self._copy(name=name)

    # -- for the runtime ----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        kind = type(self).__qualname__
        return f"<{kind}>" if self.display_name == kind else f"<{kind} {self.display_name!r}>"

    @property
    def display_name(self) -> str:
        """The name, or that of the class where none was given."""
        return self.name or type(self).__name__

    @functools.cached_property
    def scope(self) -> Scope:
        """What the action may read."""
        return Scope(self.display_name, frozenset(self.reads) | frozenset(self.writes))

    @functools.cached_property
    def allowed_writes(self) -> frozenset[str]:
        """What it may write."""
        return frozenset(self.writes)

    @property
    def parts(self) -> Iterable[Action]:
        """The actions that it consists of, where it consists of some."""
        return ()

    @property
    def required_writes(self) -> frozenset[str]:
        """What the State must have after it."""
        return self.allowed_writes

    @property
    def bound(self) -> Mapping[str, Any]:
        """The inputs that ``bind`` fixed."""
        return self._bound

    async def execute(self, state: State, inputs: Mapping[str, Any], context: ApplicationContext) -> Performed:
        """Run once: ``(result, new State)``. Items and partial States go to ``context`` as events."""
        kwargs = self._arguments(self.run, inputs, context)
        result = await call(self.run, kind_of(self.run), state, kwargs, ItemsOnly(context), hosted=self.hosted)
        new_state: Any = self.update(result, state)
        if inspect.isawaitable(new_state):
            new_state = await new_state
        if not isinstance(new_state, State):
            raise MisuseError(f"{self.display_name}.update() returned {describe(new_state)}; it returns the new State")
        return result, new_state

    def _arguments(
        self, function: Callable[..., Any], inputs: Mapping[str, Any], context: ApplicationContext
    ) -> dict[str, Any]:
        parameters = Parameters.of(function)
        if parameters.open:
            parameters = parameters.joined(*self.input_names)
        return parameters.resolve(self.display_name, self._bound, inputs, context)

    def _copy(self, **changes: Any) -> Self:
        copy = object.__new__(type(self))
        fields = vars(copy)
        fields.update(vars(self))
        fields.pop("scope", None)  # cached, and has the old name
        fields.update(changes)
        return copy

    def _check_bind(self, inputs: Mapping[str, Any]) -> None:
        if not self.takes_any_input:
            required, optional = self.input_names
            refuse_unknown(self.display_name, inputs, sorted(required | optional | set(self._bound)))


class SingleStepAction(Action):
    """A class action that computes result and State in one go, in ``run_and_update``."""

    @abstractmethod
    def run_and_update(self, state: State, **inputs: Any) -> Any:
        """Return ``(result, State)`` or a State; any of the four kinds of function."""

    @property
    def inputs(self) -> tuple[Sequence[str], Sequence[str]]:
        return Parameters.of(self.run_and_update).unbound(self._bound)

    async def execute(self, state: State, inputs: Mapping[str, Any], context: ApplicationContext) -> Performed:
        kwargs = self._arguments(self.run_and_update, inputs, context)
        function = self.run_and_update
        return await state_of(
            function, kind_of(function), self.display_name, state, kwargs, context, hosted=self.hosted
        )


class FunctionAction(Action):
    """What ``@action`` makes of a function. Calling it calls the function itself."""

    def __init__(
        self,
        function: Callable[..., Any],
        reads: Sequence[str],
        writes: Sequence[str],
        tags: Sequence[str] = (),
        *,
        blocking: bool = True,
        version: str | int | None = None,
        hosted: bool = False,
    ) -> None:
        self.function = function
        self.name = name_of(function)
        self.reads = list(reads)
        self.writes = list(writes)
        self.tags = list(tags)
        self.kind: Kind = kind_of(function)
        self.blocking = blocking
        self.version = version
        self.hosted = hosted
        self._parameters = Parameters.of(function)
        if not self._parameters.takes_state:
            raise MisuseError(
                f"@action on {where(function)}: it takes no argument; an action's first parameter is the State: "
                f"def {self.name}(state: State, ...)"
            )
        if self._parameters.of_method:
            raise MisuseError(
                f"@action on {where(function)}, a method, whose first parameter would be given the State; decorate the "
                f"bound method, action(reads=[...], writes=[...])(self.{self.name}), or write a class action"
            )
        if hosted and self.kind != "async generator":
            raise MisuseError(
                f"@action(hosted=True) on {where(function)}, which is a {self.kind}: hosting keeps scopes open across "
                "the yields of an async generator; leave it out"
            )
        check_function(function, hosted=hosted)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **{**self._bound, **kwargs})

    def __repr__(self) -> str:
        return f"<Action {self.name} ({self.kind} {where(self.function)})>"

    @property
    def inputs(self) -> tuple[Sequence[str], Sequence[str]]:
        return self._parameters.unbound(self._bound)

    @property
    def parameters(self) -> Parameters:
        """What it takes besides the State."""
        return self._parameters

    async def execute(self, state: State, inputs: Mapping[str, Any], context: ApplicationContext) -> Performed:
        parameters = self._parameters
        kwargs = parameters.resolve(self.display_name, self._bound, inputs, context) if parameters.any else {}
        if self.kind == "coroutine":
            returned = await self.function(state, **kwargs)
            if isinstance(returned, State):
                return None, returned
            return performed(returned, self.display_name, self.function)
        if self.kind == "function" and not self.blocking and (context.threads is None or not context.threads.always):
            return performed(self.function(state, **kwargs), self.display_name, self.function)
        if self.kind == "function":
            return performed(await in_thread(self.function, state, kwargs, context), self.display_name, self.function)
        return await state_of(self.function, self.kind, self.display_name, state, kwargs, context, hosted=self.hosted)

    def _check_bind(self, inputs: Mapping[str, Any]) -> None:
        parameters = self._parameters
        if not parameters.open:
            for name in inputs:
                if name not in parameters.names:
                    refuse_unknown(self.display_name, inputs, parameters.names)


def action(
    reads: Sequence[str],
    writes: Sequence[str],
    tags: Sequence[str] = (),
    *,
    blocking: bool = True,
    version: str | int | None = None,
    hosted: bool = False,
) -> Callable[[Callable[..., Any]], FunctionAction]:
    """Make an :class:`Action` of a function.

    :param reads: keys of the State that it may read.
    :param writes: keys that it must leave written; it may read them too.
    :param tags: ``halt_before`` and ``halt_after`` take ``"@tag:name"``.
    :param blocking: for plain functions: True runs it in a worker thread, False inline, for functions that neither
        wait nor compute for long.
    :param version: of its code, where a store is used: a resumed run takes nothing from the store that another version
        has computed.
    :param hosted: for async generators: True gives each a task of its own, so that it may yield inside task groups,
        timeouts and cancel scopes. It costs two task switches an item.
    :raises MisuseError: on anything that is no function (a class, a call's result), and on an async generator that
        yields inside a scope and is not hosted, at the decorator.

    >>> @action(reads=["n"], writes=["n"])
    ... async def add(state: State, by: int = 1) -> State:
    ...     return state.update(n=state["n"] + by)
    """
    refuse_no_lists("@action", reads=reads, writes=writes, tags=tags)

    def decorate(function: Callable[..., Any]) -> FunctionAction:
        if isinstance(function, Action):
            raise MisuseError(
                f"@action on {function!r}, which is an action already; bind() and with_name() make others of it, and "
                "@action on its .function one that declares something else"
            )
        return FunctionAction(function, reads, writes, tags, blocking=blocking, version=version, hosted=hosted)

    return decorate


def as_action(candidate: object, *, where: str) -> Action:
    """The Action that ``candidate`` is, or a MisuseError that says what to write at ``where`` instead."""
    if isinstance(candidate, Action):
        return candidate
    if isinstance(candidate, type) and issubclass(candidate, Action):
        raise MisuseError(f"{where}: {candidate.__name__} is a class; pass an instance: {candidate.__name__}()")
    hint = (
        "decorate the function with @action(reads=[...], writes=[...])"
        if callable(candidate)
        else "pass an Action, or of a Graph a RunnableGraph(graph, entrypoint)"
    )
    close_unused(candidate)
    raise MisuseError(f"{where}: {describe(candidate)} is not an action; {hint}")


async def perform(
    what: Action, state: State, inputs: Mapping[str, Any], context: ApplicationContext
) -> tuple[Any, State]:
    """Run an action on ``state``: ``(result, changes)``, where the delta of ``changes`` is what the action wrote.

    :raises MisuseError: if the action read or wrote an undeclared key, or left a declared one unwritten.
    """
    checks = context.checks
    watched = Watched(_readable(what, state)) if checks is not None and checks.strict else None
    current_context.set(context)  # in the contextvars of this step or subtask, where no other code runs after it
    if context.capacities and what.leaf:
        result, changes = await within(
            context.capacities, what, functools.partial(what.execute, state.scoped(what.scope), inputs, context)
        )
    else:
        result, changes = await what.execute(state.scoped(what.scope), inputs, context)
    if watched is not None:
        for key in watched.changed():
            raise MisuseError(
                f"state[{key!r}] was changed in place while action {what.display_name!r} ran; siblings and earlier "
                f"States share that object: return state.append({key}=...) or state.update({key}=<a new object>)"
            )
    written, required = changes.written_keys(), what.required_writes
    if not written <= what.allowed_writes:
        # What merge() and the like wrote back as it was is no change.
        extra = [key for key in changes.differing_keys(state) if key not in what.allowed_writes]
        if extra:
            raise MisuseError(_undeclared(what, extra, changes))
    if not required <= written:
        missing = next((key for key in sorted(required) if key not in written and key not in state), None)
        if missing is not None:
            raise MisuseError(
                f"action {what.display_name!r} declares writes={list(what.writes)} but did not write {missing!r}; "
                f"it wrote: {', '.join(written) or 'nothing'}"
            )
    return result, changes


def _undeclared(what: Action, extra: Sequence[str], changes: State) -> str:
    keys, writes = ", ".join(map(repr, extra)), list(what.writes)
    if changes.delta.deleted.issuperset(extra):
        return (
            f"action {what.display_name!r} removed {keys}, which it does not declare (writes={writes}); add it to "
            "writes, or remove less: state.wipe(delete=[...])"
        )
    return (
        f"action {what.display_name!r} wrote {keys}, which it does not declare (writes={writes}); add it to writes, or "
        "return the State without it"
    )


def _readable(what: Action, state: State) -> dict[str, Any]:
    readable = what.scope.readable
    return {key: value for key, value in state.get_all().items() if key in readable}


async def within(
    capacities: tuple[Capacity, ...], what: Action, execute: Callable[[], Coroutine[Any, Any, Performed]]
) -> Performed:
    """Run an action while holding one unit of each capacity, also of one that several policies above it name."""
    held: list[Capacity] = []
    try:
        for capacity in dict.fromkeys(capacities):  # outermost first: two actions never wait for each other's
            await capacity.acquire(f"action {what.display_name!r}")
            held.append(capacity)
        return await execute()
    finally:
        for capacity in reversed(held):
            capacity.release()


def take_step(
    what: Action,
    state: State,
    context: ApplicationContext,
    commit: Callable[[State], Awaitable[None]] | None = None,
) -> Coroutine[Any, Any, Performed]:
    """As :func:`perform`, for a step of a graph: tells its start and its end to whoever listens.

    :param commit: awaited with what the action wrote before its end is told.
    """
    if commit is None and not context.run.listening:
        return perform(what, state, _NO_INPUTS, context)
    return _told_step(what, state, context, commit)


async def _told_step(
    what: Action,
    state: State,
    context: ApplicationContext,
    commit: Callable[[State], Awaitable[None]] | None,
) -> Performed:
    listening = context.run.listening
    if listening:
        await context.emit(ActionStarted)
    result, changes = await perform(what, state, _NO_INPUTS, context)
    if commit is not None:
        await commit(changes)
    if listening:
        await context.emit(ActionFinished, written=changes.delta.written)
    return result, changes


class Input(Action):
    """Copies runtime inputs into the State: ``Input("prompt")``."""

    def __init__(self, *fields: str) -> None:
        self.reads = []
        self.writes = list(fields)
        self.name = "input"

    @property
    def inputs(self) -> Sequence[str]:
        return self.writes

    async def execute(self, state: State, inputs: Mapping[str, Any], context: ApplicationContext) -> Performed:
        values = Parameters(tuple(self.writes), frozenset(self.writes)).resolve(
            self.display_name, self._bound, inputs, context
        )
        return values, self.update(values, state)

    def run(self, state: State, **inputs: Any) -> dict[str, Any]:
        return inputs

    def update(self, result: Mapping[str, Any], state: State) -> State:
        return state.update(**result)


class Result(Action):
    """Ends a graph: its result is the named fields of the State: ``Result("answer")``."""

    def __init__(self, *fields: str) -> None:
        self.reads = list(fields)
        self.writes = []
        self.name = "result"

    async def execute(self, state: State, inputs: Mapping[str, Any], context: ApplicationContext) -> Performed:
        return self.run(state), state

    def run(self, state: State, **inputs: Any) -> dict[str, Any]:
        return {key: state[key] for key in self.reads}

    def update(self, result: Mapping[str, Any], state: State) -> State:
        return state
