"""Policies: how a fan-out runs its subtasks. What they ask for is carried out by :mod:`arun.fanout` and
:mod:`arun.attempts`.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, Literal

import anyio
import msgspec
from anyio.lowlevel import current_token

from arun.errors import MisuseError

__all__ = ("Capacity", "Policy", "Rate", "Retry", "refuse_no_policy")


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """Run a failed subtask again, with exponential back-off and full jitter.

    The wait after attempt ``n`` is drawn from 0 to ``min(maximum, initial * factor ** (n - 1))`` seconds (Brooker,
    "Exponential Backoff And Jitter", 2015). A MisuseError is never retried: the program is wrong, not the world.

    :ivar attempts: most attempts in all, at least 1.
    :ivar on: error types that are worth another attempt, or a function that tells.
    :ivar jitter: False always waits the whole time.
    """

    attempts: int = 3
    on: type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool] = Exception
    initial: float = 0.1
    maximum: float = 10.0
    factor: float = 2.0
    jitter: bool = True

    def __post_init__(self) -> None:
        if not _number(self.attempts) >= 1:
            raise ValueError(f"Retry(attempts={self.attempts!r}): the first attempt counts, so it is at least 1")
        if not callable(self.on) and not isinstance(self.on, tuple):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise TypeError(
                f"Retry(on={self.on!r}): it takes a type of errors, a tuple of such types, or a function that is given "
                "the error and tells whether it is worth another attempt"
            )
        if self.initial < 0 or self.maximum < 0 or self.factor < 1:
            raise ValueError(
                f"Retry(initial={self.initial}, maximum={self.maximum}, factor={self.factor}): "
                "waits are at least 0 seconds and the factor at least 1"
            )

    def applies(self, error: Exception) -> bool:
        """Whether ``error`` is worth another attempt."""
        if isinstance(error, MisuseError):
            return False
        if isinstance(self.on, (type, tuple)):
            return isinstance(error, self.on)
        return self.on(error)

    def wait(self, attempt: int) -> float:
        """Seconds to wait after failed attempt number ``attempt`` (1 is the first)."""
        # 64 doublings exceed any maximum; more would overflow a float.
        longest = min(self.maximum, self.initial * self.factor ** min(attempt - 1, 64))
        return random.uniform(0, longest) if self.jitter else longest


class Rate:
    """Most requests and tokens a minute; the same object in several policies is one budget.

    A token bucket: it starts full, refills continuously and holds at most one minute's worth (as hosted models' own
    limits do); ``burst`` makes it smaller, which spreads the work more evenly. Waiting is first come, first served,
    also between event loops.

    :param per_minute: requests a minute.
    :param tokens_per_minute: tokens a minute; needs ``tokens``.
    :param tokens: estimates a subtask's tokens; given what the source yielded.
    :param key: names the budget that a subtask draws on, for example its model; by default all share one.
    :param burst: share of a minute's budget that may be used at once, above 0 and at most 1.
    """

    def __init__(
        self,
        *,
        per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        tokens: Callable[[Any], float] | None = None,
        key: Callable[[Any], str] | None = None,
        burst: float = 1.0,
    ) -> None:
        if per_minute is None and tokens_per_minute is None:
            raise ValueError("Rate() limits nothing; give per_minute, tokens_per_minute or both")
        if (tokens_per_minute is None) != (tokens is None):
            raise ValueError("Rate(tokens_per_minute=...) and tokens=<function that estimates them> go together")
        if not 0 < burst <= 1:
            raise ValueError(f"Rate(burst={burst}): it is a share of a minute's budget, above 0 and at most 1")
        for limit in (per_minute, tokens_per_minute):
            if limit is not None and not _number(limit) > 0:
                raise ValueError(f"Rate: {limit!r} a minute never lets anything through; it takes a number above 0")
        self._limits = (per_minute, tokens_per_minute)
        self._tokens = tokens
        self._key = key
        self._burst = burst
        self._full_at: dict[tuple[str, int], float] = {}
        self._lock = threading.Lock()
        #: the event loop that asked last, and what its clock lacks of the process's
        self._token: object = None
        self._offset = 0.0

    def __repr__(self) -> str:
        return f"Rate(per_minute={self._limits[0]}, tokens_per_minute={self._limits[1]})"

    async def acquire(self, spec: Any) -> None:
        """Wait until a subtask may start.

        :raises MisuseError: if it needs more tokens than the bucket ever holds.
        """
        with self._lock:
            wait = self.reserve(spec, self._now())
        await anyio.sleep(wait)

    def _now(self) -> float:
        """The event loop's time, on a clock that all of them share: each begins to count where it likes."""
        now, token = anyio.current_time(), current_token()
        if token != self._token:
            self._token, self._offset = token, time.monotonic() - now
        return now + self._offset

    def reserve(self, spec: Any, now: float) -> float:
        """Draw a subtask's share at time ``now`` and return the seconds that it has to wait.

        Virtual scheduling (GCRA): each bucket is one number, the time at which it will be full again.
        """
        key = self._key(spec) if self._key is not None else ""
        costs = (1.0, self._tokens(spec) if self._tokens is not None else 0.0)
        wait = 0.0
        for number, (limit, cost) in enumerate(zip(self._limits, costs, strict=True)):
            if limit is None or not cost:
                continue
            capacity = max(limit * self._burst, 1.0)
            if cost > capacity:
                raise MisuseError(f"a subtask of {cost:g} tokens can never start: {self!r} holds at most {capacity:g}")
            seconds = 60.0 / limit
            full_at = max(self._full_at.get((key, number), now), now) + cost * seconds
            self._full_at[key, number] = full_at
            wait = max(wait, full_at - now - capacity * seconds)
        return wait


class Capacity:
    """A budget of ``n`` that everything below a parallel action shares: ``Policy(capacity=Capacity(8))``.

    Only leaf actions hold a share of it, and only while they run, so a parent can't keep its own children out.
    It serves one event loop at a time.
    """

    def __init__(self, n: int) -> None:
        if not _number(n) >= 1:
            raise ValueError(f"Capacity({n!r}): nothing could ever run; it takes a number of shares, at least 1")
        self.n = n
        self._in_use = 0
        self._waiting: dict[anyio.Event, None] = {}
        #: the event loop on which it is in use
        self._token: object = None

    def __repr__(self) -> str:
        return f"Capacity({self.n}), {self._in_use} in use, {len(self._waiting)} waiting"

    async def acquire(self, who: str) -> None:
        """Wait for a share, first come, first served.

        :raises MisuseError: if a caller of this action holds one already, which could wait for itself for ever; while
            another event loop uses it.
        """
        if self in _held.get():
            raise MisuseError(
                f"deadlock: {who} waits for a share of {self!r}, and an action that called it already holds one; "
                "give what is called inside an action a Capacity of its own"
            )
        token = current_token()
        if not self._in_use:
            self._token = token
        elif token != self._token:
            raise MisuseError(
                f"{who} asks for a share of {self!r}, which is in use on another event loop, and neither could tell "
                "the other that a share is free; give each event loop a Capacity of its own"
            )
        if self._in_use < self.n and not self._waiting:
            self._in_use += 1
        else:
            turn = anyio.Event()
            self._waiting[turn] = None
            try:
                await turn.wait()
            except BaseException:
                if turn in self._waiting:
                    del self._waiting[turn]
                else:
                    self._release()
                raise
        _held.set(_held.get() | {self})

    def release(self) -> None:
        """Give the share back. In the same context as the acquire."""
        _held.set(_held.get() - {self})
        self._release()

    def _release(self) -> None:
        if self._waiting:
            turn = next(iter(self._waiting))
            del self._waiting[turn]
            turn.set()  # the share is handed over, so `in use` stays
        else:
            self._in_use -= 1


_held: ContextVar[frozenset[Capacity]] = ContextVar("arun_held_capacity", default=frozenset())


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a parallel action or of :func:`arun.fan_out`.

    :ivar limit: most subtasks in flight (started or waiting to be taken by the reducer), at least 1.
    :ivar order: "completed": results as subtasks end; "submitted": in the order in which they were yielded.
    :ivar on_error: "fail": the first failure cancels the rest and is raised; "skip": failed subtasks are left out;
        "collect": the reducer gets an ``Outcome`` for every subtask.
    :ivar retry: when a failed subtask runs again.
    :ivar timeout: seconds that one attempt of a subtask may take.
    :ivar idle_timeout: seconds that one attempt may go without yielding an item or a State.
    :ivar deadline: seconds for all subtasks together; what has not ended by then is cancelled, and the reducer
        finishes with what it has.
    :ivar rate: how many subtasks and tokens may start a minute.
    :ivar capacity: a budget shared by everything below.
    """

    limit: int = 100
    order: Literal["completed", "submitted"] = "completed"
    on_error: Literal["fail", "skip", "collect"] = "fail"
    retry: Retry | None = None
    timeout: float | None = None
    idle_timeout: float | None = None
    deadline: float | None = None
    rate: Rate | None = None
    capacity: Capacity | None = None

    def __post_init__(self) -> None:
        if not _number(self.limit) >= 1:
            raise ValueError(f"Policy(limit={self.limit!r}): the limit is the number of subtasks in flight, at least 1")
        if self.order not in {"completed", "submitted"}:
            raise ValueError(f"Policy(order={self.order!r}): takes 'completed' or 'submitted'")
        if self.on_error not in {"fail", "skip", "collect"}:
            raise ValueError(f"Policy(on_error={self.on_error!r}): takes 'fail', 'skip' or 'collect'")
        for name in ("timeout", "idle_timeout", "deadline"):
            seconds = getattr(self, name)
            if seconds is not None and not _number(seconds) > 0:
                raise ValueError(f"Policy({name}={seconds!r}): it is a number of seconds above 0")
        for name, kind, example in _PARTS:
            part = getattr(self, name)
            if part is not None and not isinstance(part, kind):
                raise TypeError(f"Policy({name}={part!r}): it takes a {kind.__name__}, for example {example}")

    @property
    def plain(self) -> bool:
        """Whether a subtask runs once and as it is: no retry, timeouts or rate."""
        return self.retry is None and self.timeout is None and self.idle_timeout is None and self.rate is None


#: Parts of a Policy that have a type of their own, and how to make one.
_PARTS: Final = (
    ("retry", Retry, "Retry(attempts=3)"),
    ("rate", Rate, "Rate(per_minute=60)"),
    ("capacity", Capacity, "Capacity(8)"),
)


def refuse_no_policy(given: object, where: str) -> None:
    """:raises MisuseError: for what is no Policy, saying where it was given."""
    if not isinstance(given, Policy):
        raise MisuseError(f"{where} is {given!r:.80}; it takes a Policy, for example Policy(limit=8)")


def _number(value: Any) -> float:
    """A number as it is, anything else as NaN, which is neither above nor below any."""
    try:
        return float(value + 0.0)
    except TypeError:
        return math.nan
