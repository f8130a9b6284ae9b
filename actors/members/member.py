"""Member: one actor of a cluster through all its generations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from actors.actor import ActorHandle
from actors.finish import finish
from actors.members.generation import Generation, Vigil
from actors.members.link import Link
from actors.members.lives import ActorHealth, ActorInfo, ActorRestarted, ActorStarted, ActorStopped, Chronicle, GaveUp
from actors.members.supervision import Restart
from arun.errors import ChannelLost
from arun.logs import get_logger
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors.bundles import Group
    from actors.interface import ActorSpec
    from actors.members.body import Body
    from actors.members.supervision import GiveUp, RestartPolicy
    from actors.members.team import Team
    from actors.on_ray.detached import Attachment

__all__ = ("Member",)

log = get_logger("actors.member")


class Member:
    """One actor in the roster.

    :ivar tried: set when it is known whether its first generation comes up.
    :ivar started: whether it did.
    :param launch: makes a body for the next generation.
    :param team: starts it again when it dies; None: nobody does.
    :param grace: seconds that ``on_stop`` gets when a generation is stopped for another's sake.
    """

    def __init__(
        self,
        spec: ActorSpec,
        launch: Callable[[ActorSpec], Body],
        *,
        group: Group | None,
        policy: RestartPolicy,
        team: Team | Attachment | None,
        grace: float,
        silence: float,
    ) -> None:
        self.spec = spec
        self.group = group
        self.policy: RestartPolicy = policy
        self.team = team
        self.link = Link(spec.name, spec.interface)
        self.handle = ActorHandle(self.link)
        self.chronicle = Chronicle()
        self.tried = anyio.Event()
        self.started = False
        self._launch = launch
        self._grace = grace
        self._vigil = Vigil(silence, spec.interface.options.hung_after)
        self._generation: Generation | None = None
        self._attempt: Background[bool] | None = None
        self._stopping: Background[None] | None = None

    @property
    def is_down(self) -> bool:
        """Whether no generation is up and another may follow."""
        return self.link.line is None and self.link.gone is None

    @property
    def died_abnormally(self) -> bool:
        return self._generation is None or self._generation.abnormal

    async def start(self) -> None:
        """Start the first generation.

        :raises ActorDied: it ended before it was ready.
        :raises Exception: what the constructor or ``on_start`` raised.
        """
        await self._begin()
        self.started = True
        self.tried.set()
        if self.team is not None:
            self.team.members.append(self)
        self.chronicle.add(ActorStarted(actor=self.spec.name, generation=1, pid=self.link.latest.pid))  # type: ignore[union-attr]  # begun

    async def restart(self, at: float, restarts: int) -> bool:
        """Start the next generation; returns whether it is ready, or not wanted any more.

        :param at: when, on anyio's clock.
        :param restarts: how many there were within the supervisor's period, for the log.
        """
        self._attempt = Runtime.current().start(self._restart, at, restarts, name=f"restart of actor {self.spec.name}")
        await self._attempt.ended()
        return self.link.gone is not None or bool(self._attempt.result())

    async def halt(self, how: str) -> None:
        """Stop the present generation in good order; another may follow."""
        generation = self._generation
        if generation is not None and self.link.line is generation:
            self.link.down()
            await generation.stop(self._grace, how)
            self.chronicle.add(self.link.died(how, generation))

    def give_up(self, verdict: Restart | GiveUp) -> None:
        """No generation follows the dead one."""
        if self.link.gone is not None or isinstance(verdict, Restart):
            return
        how = "died" if self._generation is None or self._generation.how is None else self._generation.how
        number = 0 if self._generation is None else self._generation.number
        log.warning("actor.given_up", actor=self.spec.name, generation=number, reason=verdict.reason)
        self.link.end(f"{how}; it is not started again: {verdict.reason}")
        self.chronicle.add(GaveUp(actor=self.spec.name, generation=number, reason=verdict.reason))

    async def stop(self, grace: float) -> None:
        """End the actor. Every caller waits for the same end, and cancelling one does not cut that short."""
        if self._stopping is None:
            self._stopping = Runtime.current().start(self._stop, grace, name=f"stop of actor {self.spec.name}")
        await finish(self._stopping)

    async def health(self) -> ActorHealth:
        """How it fares."""
        generation = self._generation
        number = 0 if generation is None else generation.number
        if self.link.gone is not None:
            return ActorHealth(state="dead", generation=number)
        if generation is None or generation.how is not None:
            return ActorHealth(state="restarting", generation=number)
        return await generation.health()

    def info(self) -> ActorInfo:
        generation = self._generation
        return ActorInfo(
            name=self.spec.name,
            actor_class=self.spec.interface.class_name,
            pid=None if generation is None else generation.pid,
            address="" if generation is None else generation.body.address,
            alive=generation is not None and generation.how is None,
            generation=1 if generation is None else generation.number,
        )

    async def _begin(self) -> None:
        number = 1
        if self._generation is not None:
            number += self._generation.number
            await self._generation.stop(self._grace, "was stopped")  # lets go of what is left of it
        generation = Generation(self.spec.name, number, self._launch(self.spec), vigil=self._vigil, on_end=self._ended)
        self._generation = generation
        self.link.begun(generation)
        try:
            await generation.start()
        except ChannelLost as lost:
            how = generation.how
            await generation.stop(self._grace, "was stopped")  # noqa: ASYNC102 - finish() lets no cancellation cut it short
            if how is None:
                raise
            raise self.link.died(how, generation) from lost
        except BaseException as exc:
            await generation.stop(self._grace, f"could not be started: {exc!r}")  # noqa: ASYNC102 - as above
            raise
        self.link.up(generation)
        log.debug(
            "actor.started",
            actor=self.spec.name,
            generation=number,
            pid=generation.pid,
            address=generation.body.address,
        )

    async def _restart(self, at: float, restarts: int) -> bool:
        await anyio.sleep_until(at)
        try:
            await self._begin()
        except Exception as exc:  # noqa: BLE001  # whatever it is, it counts as a death
            log.warning("actor.restart_failed", actor=self.spec.name, error=repr(exc))
            how = f"could not be started again: {exc!r}"
            self.chronicle.add(self.link.died(how, self._generation))
            return False
        assert self._generation is not None  # begun
        pid, number = self._generation.pid, self._generation.number
        log.warning("actor.restarted", actor=self.spec.name, generation=number, pid=pid, restarts=restarts)
        self.chronicle.add(ActorRestarted(actor=self.spec.name, generation=number, pid=pid))
        return True

    def _ended(self, generation: Generation) -> None:
        if self.link.line is not generation:  # it was never up; whoever starts it hears of it
            return
        assert generation.how is not None  # it has ended
        self.link.down()
        log.warning(
            "actor.died", actor=self.spec.name, generation=generation.number, pid=generation.pid, how=generation.how
        )
        self.chronicle.add(self.link.died(generation.how, generation))
        if self.team is not None:
            self.team.died(self)
            return
        self.link.end(generation.how)
        self.chronicle.add(
            GaveUp(actor=self.spec.name, generation=generation.number, reason="its restart policy is 'temporary'")
        )

    async def _stop(self, grace: float) -> None:
        first = self.link.gone is None
        if first:
            self.link.end("was stopped")
        self.tried.set()
        if self._attempt is not None:
            self._attempt.cancel()
            await self._attempt.ended()
        if self._generation is not None:
            await self._generation.stop(grace, "was stopped")
        if self.team is not None and self in self.team.members:
            self.team.members.remove(self)
        if first:
            number = 0 if self._generation is None else self._generation.number
            self.chronicle.add(ActorStopped(actor=self.spec.name, generation=number))
