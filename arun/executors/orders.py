"""Subtasks in other processes, from the parent's side: what a worker is told, and how its answers become events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, get_args

import anyio

from arun.actions import Action, FunctionAction
from arun.channel import Stream
from arun.codec import decode
from arun.context import ApplicationContext
from arun.errors import ChannelLost, MisuseError, RemoteError
from arun.events import Event
from arun.executors.failures import raise_failure
from arun.executors.local import function_of
from arun.executors.messages import Answer, Beat, Emitted, Failure, Order, Reference, Success
from arun.executors.pool import Pool, Worker
from arun.executors.references import encode_values
from arun.parallel import RunnableGraph
from arun.signatures import Parameters
from arun.state import State

__all__ = ("order_of", "run_order")

_EVENTS: Final = {kind.__name__: kind for kind in get_args(Event)}


def order_of(
    action: Action,
    reference: Reference,
    state: State,
    inputs: Mapping[str, Any],
    context: ApplicationContext,
    code: tuple[str, ...] = (),
    attach: Mapping[str, tuple[str, str]] = {},
) -> Order:
    """What a worker is told to run.

    :param code: where it gets the code that ``reference`` and the values need.
    :param attach: the resources that it finds by itself; of these it is told those that the action takes.
    :raises MisuseError: a value can't cross; names it.
    """
    name = action.display_name
    keys = _keys(action)
    whole = state.scoped(None)
    readable = whole if keys is None else {key: whole[key] for key in keys if key in whole}
    run_inputs, attached = context.inputs, dict(attach)
    if not (action.takes_any_input or _wants_context(action)):
        required, optional = action.input_names
        run_inputs = {key: value for key, value in run_inputs.items() if key in required or key in optional}
        attached = {key: value for key, value in attach.items() if key in required or key in optional}
    return Order(
        reference,
        encode_values(readable, lambda key: f"state[{key!r}], which action {name!r} may read,"),
        encode_values(inputs, lambda key: f"the input {key!r} of action {name!r}"),
        encode_values(run_inputs, lambda key: f"the input {key!r} of action {name!r}"),
        list(context.resources),
        context.app_id,
        context.partition_key,
        context.sequence_id,
        context.action_name,
        context.path,
        context.attempt,
        context.run.listening,
        bool(context.beats),
        context.checks,
        code,
        attached,
    )


async def run_order(pool: Pool, order: Order, state: State, context: ApplicationContext) -> tuple[Any, State]:
    """Run an order on a worker of the pool; its events go to ``context.run``.

    :returns: ``(result, changes)``, see :meth:`arun.executors.local.Executor.run`.
    :raises WorkerDied: the worker ended meanwhile.
    """
    worker = await pool.take()
    try:
        success = await _follow(pool, worker, order, context)
    finally:
        pool.give_back(worker)
    result = decode(success.result)["result"]
    changes = state.scoped(None).merge(decode(success.written))
    return result, changes.wipe(delete=success.deleted) if success.deleted else changes


async def _follow(pool: Pool, worker: Worker, order: Order, context: ApplicationContext) -> Success:
    """Run an order on a worker; on the way out the worker is free again, or dead."""
    stream: Stream[Answer] | None = None
    final: Success | Failure | None = None
    try:
        stream = worker.open(order)
        async for answer in stream:
            if isinstance(answer, Emitted):
                await context.run.emit(
                    _EVENTS[answer.kind],
                    action=answer.action,
                    path=answer.path,
                    attempt=answer.attempt,
                    **decode(answer.fields),
                )
            elif isinstance(answer, Beat):
                for beat in context.beats:
                    beat()
            else:
                final = answer
    except ChannelLost as exc:
        if pool.ended:
            raise MisuseError(f"the {pool.owner} was closed while {context.label} ran in it") from exc
        with anyio.CancelScope(shield=True):
            raise await worker.death(f"while it ran {context.label}", pool.grace) from exc
    except BaseException:
        if stream is not None:
            await _settle(worker, stream, pool.grace)  # noqa: ASYNC102 - it shields, and has a deadline
        raise
    if isinstance(final, Failure):
        raise_failure(final, worker.pid)
    if not isinstance(final, Success):
        raise RemoteError("WorkerLost", f"worker process {worker.pid} gave no result of {context.label}")
    return final


async def _settle(worker: Worker, stream: Stream[Answer], grace: float) -> None:
    """Wait until a subtask has cleaned up, whoever cancels that: asyncio's own cancellation goes through shields."""
    deadline = anyio.current_time() + grace
    cancelled: BaseException | None = None
    settled = False
    while not settled:
        try:
            with anyio.CancelScope(shield=True):
                await worker.settle(stream, deadline)
            settled = True
        except anyio.get_cancelled_exc_class() as exc:  # noqa: ASYNC103 - raised below
            cancelled = exc
    if cancelled is not None:
        raise cancelled


def _keys(action: Action) -> frozenset[str] | None:
    """The keys of the State that an action may read, or its conditions; None where that can be any."""
    if action.takes_any_input:  # there is a parallel action in it, whose subtasks read what they declare
        return None
    keys = action.scope.readable
    if isinstance(action, RunnableGraph):
        for transition in action.graph.transitions:
            needed = transition.condition.needed_keys
            if needed is None:
                return None
            keys |= needed
        for part in action.parts:
            more = _keys(part)
            if more is None:
                return None
            keys |= more
    return keys


def _wants_context(action: Action) -> bool:
    if any(_wants_context(part) for part in action.parts):
        return True
    function = action.function if isinstance(action, FunctionAction) else function_of(action)
    return function is not None and Parameters.of(function).context_name is not None
