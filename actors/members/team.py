"""Team: the actors under one supervisor, and the starting again of those that die.

The decisions are :mod:`actors.members.supervision`'s; this carries them out, one death at a time.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import anyio

from actors.members.supervision import GiveUp, Restart, Restarts, Supervisor, swept
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from actors.members.member import Member

__all__ = ("Team",)


class Team:
    """The actors under one :class:`~actors.members.supervision.Supervisor`, in order of start."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.members: list[Member] = []
        self._restarts = Restarts(supervisor)
        self._dead: deque[Member] = deque()
        self._work: Background[None] | None = None

    def died(self, member: Member) -> None:
        """A member that was up has died: start it again, or give up. Returns at once."""
        self._dead.append(member)
        if self._work is None or self._work.done:
            self._work = Runtime.current().start(self._recover_all, name=f"restart of actor {member.spec.name}")

    async def settled(self) -> None:
        """Wait until nothing is being started again."""
        while self._work is not None and not self._work.done:
            await self._work.ended()

    async def _recover_all(self) -> None:
        while self._dead:
            member = self._dead.popleft()
            if member.is_down:  # else it was started again with one that it relies on
                await self._recover(member)

    async def _recover(self, member: Member) -> None:
        verdict = self._verdict(member)
        if isinstance(verdict, GiveUp):
            await self._give_up(member, verdict)
            return
        todo = deque(swept(self.supervisor.strategy, self.members, member))
        for other in reversed(tuple(todo)):
            if other is not member:
                await other.halt(f"was stopped, to be started again with actor {member.spec.name!r}")
        while todo:
            current = todo[0]
            if current.is_down:
                if current.policy == "temporary":
                    current.give_up(self._verdict(current))
                elif not await current.restart(verdict.at, self._restarts.recent(anyio.current_time())):
                    retry = self._verdict(current)
                    if isinstance(retry, GiveUp):
                        await self._give_up(current, retry)
                        return
                    verdict = retry
                    continue
            todo.popleft()

    def _verdict(self, member: Member) -> Restart | GiveUp:
        return self._restarts.died(anyio.current_time(), abnormal=member.died_abnormally, policy=member.policy)

    async def _give_up(self, member: Member, verdict: GiveUp) -> None:
        if verdict.exhausted:  # those that rely on it can't go on either
            for other in reversed(swept(self.supervisor.strategy, self.members, member)):
                if other is not member:
                    reason = f"it relies on actor {member.spec.name!r}, which is not started again"
                    await other.halt(f"was stopped: {reason}")
                    other.give_up(GiveUp(reason, verdict.restarts))
        member.give_up(verdict)
