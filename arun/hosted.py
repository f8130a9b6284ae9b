"""Hosted generators: those that keep cancel scopes open across their yields.

Such a generator gets a task of its own, in which nothing else ever runs, so that a cancellation that one of its scopes
delivers while it is suspended can mean only the generator: it is thrown in at the ``yield``, and the scope catches it
(trio#638; PEP 789). That task has one cancel scope around the generator, entered before its first step and left after
its last, and shielded, so that from outside it can only be told to end.

There, ``with move_on_after(...): yield`` and ``async with create_task_group(): yield`` do what they say. It costs two
task switches an item.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import Context, copy_context
from typing import Any

import anyio

from arun.errors import MisuseError
from arun.guards import Owner
from arun.hosting import GRACE, close_with_scopes, in_context, let_go, refuse

__all__ = ("drive_hosted",)


async def drive_hosted(
    generator: AsyncIterator[Any],
    receive: Callable[[Any], Awaitable[None] | None],
    context: Context | None = None,
    owner: Owner | None = None,
) -> None:
    """As :func:`arun.hosting.drive`, with the generator in a task of its own."""
    handover = _Handover()
    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(_host, generator, handover, context or copy_context(), owner, name="arun host")
        try:
            while await handover.filled():
                try:
                    pending = receive(handover.items[0])
                    if pending is not None:
                        await pending
                except MisuseError as exc:  # of this very item: the generator is told where it yielded it
                    handover.refusal = exc
                handover.taken()
        except Exception as exc:  # noqa: BLE001 - raised below: the group would wrap it
            failure = exc
        finally:
            handover.leave()
    if failure is None:
        failure = handover.error
    if failure is not None:
        raise failure


class _Left(Exception):
    """The consumer has gone."""


class _Handover:
    """Items on their way from the host's task to the consumer's: one, unless a scope's expiry makes it more."""

    def __init__(self) -> None:
        self.items: deque[Any] = deque()
        #: the generator's error, or that of its clean-up
        self.error: Exception | None = None
        #: what is wrong with the item that was taken last
        self.refusal: MisuseError | None = None
        #: around the generator, in the host's task
        self.scope = anyio.CancelScope(shield=True)
        #: whether the generator runs, rather than being suspended at a yield
        self.stepping = True
        self._left = False
        self._ended = False
        self._filled = anyio.Event()
        self._empty = anyio.Event()

    async def filled(self) -> bool:
        """Wait for an item; False once there will be no more."""
        while not self.items:
            if self._ended:
                return False
            self._filled = anyio.Event()
            await self._filled.wait()
        return True

    def taken(self) -> None:
        """The consumer is done with the first item."""
        self.items.popleft()
        if not self.items:
            self._empty.set()

    def leave(self) -> None:
        """The consumer takes no more items."""
        self._left = True
        if self.stepping:
            self.scope.cancel()
        self._empty.set()

    async def put(self, item: Any) -> None:
        """Offer an item and wait until the consumer is done with it."""
        self.items.append(item)
        self._filled.set()
        self._empty = anyio.Event()
        if not self._left:
            await self._empty.wait()
        if self._left:
            raise _Left
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            raise refusal

    def end(self) -> None:
        """No more items will come."""
        self._ended = True
        self._filled.set()


async def _host(generator: Any, handover: _Handover, context: Context, owner: Owner | None) -> None:
    with handover.scope:
        try:
            await _step_through(generator, handover, context, owner)
        except Exception as exc:  # noqa: BLE001 - travels in-band to the consumer's task
            handover.error = exc
        finally:
            handover.end()


async def _step_through(generator: Any, handover: _Handover, context: Context, owner: Owner | None) -> None:
    thrown: BaseException | None = None
    failure: BaseException | None = None
    try:
        while True:
            handover.stepping = True
            item = await in_context(context, _step(generator, thrown), None, owner)
            handover.stepping = False
            thrown = None
            try:
                await handover.put(item)
            except _Left:
                return
            except BaseException as exc:  # noqa: ASYNC103, BLE001 - thrown on into the generator
                thrown = exc
    except StopAsyncIteration:
        pass
    except BaseException as exc:
        failure = exc
        raise
    finally:
        handover.scope.deadline = anyio.current_time() + GRACE
        try:
            await in_context(context, close_with_scopes(generator), None, owner)  # noqa: ASYNC102 - the host's scope is shielded
        finally:
            if owner is not None and owner.generators is not None:
                await let_go(owner, context, failure)  # noqa: ASYNC102 - the host's scope is shielded


async def _step(generator: Any, thrown: BaseException | None) -> Any:
    if thrown is None:
        return await generator.__anext__()
    if isinstance(thrown, MisuseError):
        return await refuse(generator, thrown)
    return await generator.athrow(thrown)
