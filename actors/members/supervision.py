"""Supervision: whether what died is started again, when, and what goes with it.

A plain core: it holds no clock, does no I/O and draws no random numbers. Clusters and pools pass the time in, in
seconds of any one clock, and do what it says.

    one_for_one over a, b, c        b dies:   start b
    rest_for_one                    b dies:   stop c, then start b, then start c
    one_for_all                     b dies:   stop c, then stop a, then start a, b, c

The budget is a rate, not a lifetime count, as in Erlang/OTP's ``sup_princ``: with a count, an actor that ran for a
year would die of its third fault.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec

from arun.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Backoff", "GiveUp", "Restart", "RestartPolicy", "Restarts", "RestartStrategy", "Supervisor", "swept")

RestartPolicy = Literal["permanent", "transient", "temporary"]
"""When an actor is started again: always, after an abnormal end only, never."""

RestartStrategy = Literal["one_for_one", "rest_for_one", "one_for_all"]
"""Who is started again: the one that died, it and those that were started after it, or all."""

T = TypeVar("T")


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait before a restart: ``first``, then ``factor`` times as long each time, ``cap`` at most.

    It begins anew after a period without a death.

    :ivar first: seconds before the first restart.
    :ivar cap: seconds at most.
    """

    first: float = 0.1
    factor: float = 2.0
    cap: float = 10.0

    def __post_init__(self) -> None:
        if not (0 <= self.first <= self.cap and self.factor >= 1):
            raise MisuseError(f"{self!r}: it must hold that 0 <= first <= cap and factor >= 1")


class Supervisor(msgspec.Struct, frozen=True):
    """What happens when an actor dies. One object given to several actors supervises them together, on one budget.

    :ivar strategy: ``"one_for_one"``; ``"rest_for_one"``: those started after the dead one rely on it, so they are
        stopped, last first, and started again after it; ``"one_for_all"``: so are all others.
    :ivar intensity: most restarts within ``period``; at the next death the supervisor gives up.
    :ivar period: seconds.
    """

    strategy: RestartStrategy = "one_for_one"
    intensity: int = 3
    period: float = 60.0
    backoff: Backoff = Backoff()

    def __post_init__(self) -> None:
        if self.strategy not in {"one_for_one", "rest_for_one", "one_for_all"}:
            raise MisuseError(f"strategy={self.strategy!r}: it must be 'one_for_one', 'rest_for_one' or 'one_for_all'")
        whole = isinstance(self.intensity, int)  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
        if not whole or self.intensity < 0:
            raise MisuseError(
                f"restarts={self.intensity!r} (a Supervisor's intensity): it must be a whole number, at least 0; for "
                "as often as it takes, a large one"
            )
        if not self.period > 0:
            raise MisuseError(f"period={self.period!r}: it must be more than 0 seconds")


class Restart(msgspec.Struct, frozen=True):
    """Start it again.

    :ivar at: when, on the clock of the ``now`` that was passed in.
    :ivar attempt: which restart this is since the last quiet period, from 1.
    """

    at: float
    attempt: int


class GiveUp(msgspec.Struct, frozen=True):
    """Do not start it again.

    :ivar reason: why, as a phrase that continues "it is not started again:".
    :ivar restarts: how many there were within the last period.
    :ivar exhausted: the budget is used up; else the policy asks for no restart.
    """

    reason: str
    restarts: int
    exhausted: bool = False


class Restarts:
    """The restarts of one supervisor: how many there were lately, and what the next death leads to.

    Its memory does not grow beyond ``intensity`` numbers.
    """

    __slots__ = ("_attempt", "_delay", "_last", "_times", "supervisor")

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self._times: deque[float] = deque()
        self._last: float | None = None
        self._attempt = 0
        self._delay = supervisor.backoff.first

    def died(self, now: float, *, abnormal: bool = True, policy: RestartPolicy = "permanent") -> Restart | GiveUp:
        """Say what follows from a death.

        :param now: seconds; never less than in an earlier call.
        :param abnormal: False where it ended by itself and in good order.
        """
        supervisor = self.supervisor
        restarts = self.recent(now)
        if policy == "temporary":
            return GiveUp("its restart policy is 'temporary'", restarts)
        if policy == "transient" and not abnormal:
            return GiveUp("it ended in good order and its restart policy is 'transient'", restarts)
        if restarts >= supervisor.intensity:
            lately = f" in the last {now - self._times[0]:.3g} s" if self._times else ""
            return GiveUp(
                f"it was restarted {restarts} time{'s' * (restarts != 1)}{lately}, and its supervisor allows "
                f"{supervisor.intensity} in {supervisor.period:g} s",
                restarts,
                exhausted=True,
            )
        self._grow_backoff(now)
        self._times.append(now)
        return Restart(now + self._delay, self._attempt)

    def recent(self, now: float) -> int:
        """How many restarts there were within the period that ends now."""
        while self._times and now - self._times[0] >= self.supervisor.period:
            self._times.popleft()
        return len(self._times)

    def _grow_backoff(self, now: float) -> None:
        backoff = self.supervisor.backoff
        if self._last is None or now - self._last >= self.supervisor.period:
            self._attempt, self._delay = 1, backoff.first
        else:
            # Multiplied step by step: a power of a large count would overflow.
            self._attempt, self._delay = self._attempt + 1, min(backoff.cap, self._delay * backoff.factor)
        self._last = now


def swept(strategy: RestartStrategy, order: Sequence[T], dead: T) -> tuple[T, ...]:
    """Those that are started again when one died, in order of start; they are stopped in the reverse.

    :param order: everything under the supervisor, in order of start.
    """
    match strategy:
        case "one_for_one":
            return (dead,)
        case "rest_for_one":
            return tuple(order[order.index(dead) :])
        case "one_for_all":
            return tuple(order)
