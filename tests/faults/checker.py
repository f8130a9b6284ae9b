"""Checker: whether a history keeps what a pool promises, told record by record and not only by how it ended."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from actors.members.supervision import Supervisor
from tests.faults.history import (
    Asked,
    Began,
    Ended,
    EngineRecord,
    Given,
    Left,
    OwnerRecord,
    Sent,
    State,
    Struck,
    Submitted,
)

__all__ = ("HANGS", "Promise", "problems")

HANGS = ("process stopped", "core stopped")
"""Faults that nobody is told of: only the watchdog finds them."""


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """What the pool was opened with.

    :ivar watchdog: seconds.
    :ivar patience: seconds that a consumer waits at most, restarts of all replicas included.
    :ivar slack: seconds by which a busy machine may be late.
    :ivar to_the_end: False where the owner was killed: then nobody ends what it had asked for.
    """

    watchdog: float
    patience: float
    restarts: Supervisor
    quarantine: int = 2
    slack: float = 5.0
    to_the_end: bool = True


def problems(
    owner: Sequence[OwnerRecord], engines: Mapping[int, Sequence[EngineRecord]], promise: Promise
) -> list[str]:
    """Everything in a history that must not be.

    :param engines: what each engine process wrote, by its pid.
    """
    starts, told = _starts(engines)
    requests: dict[str, _Request] = {}
    for record in owner:
        match record:
            case Submitted():
                if record.request in requests:
                    told.append(f"{record.request} was submitted twice")
                requests[record.request] = _Request(record, starts.get(record.request, {}))
            case Asked() | Given() | Ended():
                if record.request in requests:
                    told += requests[record.request].took(record, promise)
                else:
                    told.append(f"{record.request} was never submitted: {record}")
            case Left() if record.what:
                told.append(f"left over: {', '.join(record.what)}")
            case _:
                pass
    strikes = [record for record in owner if isinstance(record, Struck)]
    states = [record for record in owner if isinstance(record, State)]
    for request in requests.values():
        told += request.judged(strikes, states, promise)
    told += [f"{name} was begun by an engine and never submitted" for name in starts if name not in requests]
    return [
        *told,
        *_over_budget(states, promise.restarts),
        *_without_need(strikes, states),
        *_hung(owner, states, promise),
    ]


class _Start:
    """One epoch of a request, as its engine wrote it down."""

    def __init__(self, pid: int, began: Began) -> None:
        self.pid, self.began = pid, began
        self.sent: list[int] = []


class _Request:
    """One request, as its consumer saw it, beside what the engines wrote down."""

    def __init__(self, submitted: Submitted, starts: Mapping[int, _Start]) -> None:
        self.submitted, self.starts = submitted, starts
        self.name = submitted.request
        self.epoch = 0
        #: of the answer as it now stands, and of them those of the present epoch
        self.tokens: list[int] = []
        self.tokens_of_epoch = 0
        #: what had been given when each epoch after the first began
        self.before: dict[int, list[int]] = {}
        self.asked: float | None = None
        self.last: Given | None = None
        self.ended: Ended | None = None

    def took(self, record: Asked | Given | Ended, promise: Promise) -> Iterator[str]:
        """Its next record."""
        if self.ended is not None:
            yield f"{self.name} had ended as {self.ended.how}, and then: {record}"
            return
        if isinstance(record, Asked):
            self.asked = record.time
            return
        if self.asked is not None and record.time - self.asked > promise.patience:
            waited = record.time - self.asked
            yield f"{self.name} waited {waited:.1f} s for a delta, {promise.patience:g} are allowed"
        self.asked = None
        if isinstance(record, Ended):
            self.ended = record
            return
        if self.last is not None and self.last.usage is not None:
            yield f"{self.name} was complete, and then: {record}"
        self.last = record
        yield from self._given(record)

    def _given(self, record: Given) -> Iterator[str]:
        if record.epoch < self.epoch:
            yield f"{self.name}: a delta of epoch {record.epoch} after one of {self.epoch}"
            return
        if record.epoch > self.epoch or record.attempt is not None:
            self.epoch, self.tokens_of_epoch = record.epoch, 0
            if record.attempt is not None:
                self.tokens = []
                if self.submitted.resumable or self.submitted.reroute != "restart":
                    yield f"{self.name} began anew, and nobody had asked for that"
            self.before[record.epoch] = list(self.tokens)
        start = self.starts.get(record.epoch)
        count = self.tokens_of_epoch
        sent = [] if start is None else start.sent[count : count + len(record.token_ids)]
        if record.token_ids != sent:
            yield f"{self.name}: got {record.token_ids} behind token {count} of epoch {record.epoch}, sent was {sent}"
        self.tokens += record.token_ids
        self.tokens_of_epoch += len(record.token_ids)

    def judged(self, strikes: Sequence[Struck], states: Sequence[State], promise: Promise) -> Iterator[str]:
        """What is wrong with it as a whole."""
        yield from self._resumed()
        yield from self._lost(strikes)
        if self.ended is None:
            if promise.to_the_end:
                yield f"{self.name} never ended"
            return
        # Not what the engines began: to one that dies it may be on its way.
        struck = len({strike.pid for strike in strikes if self.submitted.time <= strike.time <= self.ended.time})
        match self.ended.how:
            case "left":
                pass
            case "finished":
                yield from self._complete()
            case "ReplicaLost" if self.submitted.reroute == "never" and struck:
                pass
            case "ReplicaLost" if not self.submitted.resumable and self.tokens:
                if self.submitted.reroute == "restart":
                    yield f"{self.name} failed with its replica, and was to begin anew"
            case "RequestQuarantined" if struck >= promise.quarantine:
                pass
            case "EngineDead" if _nobody_serves(states, self.ended.time):
                pass
            case how:
                yield f"{self.name} ended as {how}, after faults of {struck} replicas: {self.ended.message}"

    def _complete(self) -> Iterator[str]:
        tokens, wanted = self.tokens, self.submitted
        if len(tokens) != wanted.tokens:
            yield f"{self.name} is complete with {len(tokens)} tokens of {wanted.tokens}"
        if wanted.answer is not None and tokens != wanted.answer:
            yield f"{self.name} is complete with {tokens}, must be {wanted.answer}"
        if self.last is None or self.last.usage != len(tokens) or self.last.finish is None:
            yield f"{self.name} is complete with {len(tokens)} tokens, and its last delta was {self.last}"

    def _resumed(self) -> Iterator[str]:
        """Each epoch must go on behind all that was given before it."""
        for epoch, start in self.starts.items():
            later = [each for each in self.before if each >= epoch]
            given = [] if epoch == 0 else self.before[min(later)] if later else self.tokens
            if start.began.resume != given and (self.submitted.resumable or start.began.resume):
                yield f"{self.name}: epoch {epoch} began behind {start.began.resume}, given were {given}"
            elif given and not self.submitted.resumable and self.submitted.reroute != "restart":
                yield f"{self.name}: epoch {epoch} began after {given} were given, and can't go on behind them"

    def _lost(self, strikes: Sequence[Struck]) -> Iterator[str]:
        """Only a replica that something was done to may have lost it."""
        again = sorted(self.starts)[1:]
        if again and self.submitted.reroute == "never":
            yield f"{self.name} was started again, and never wanted that"
        for epoch, following in zip(sorted(self.starts), again, strict=False):
            pid, at = self.starts[epoch].pid, self.starts[following].began.time
            if not any(strike.pid == pid and strike.time <= at for strike in strikes):
                yield f"{self.name} was taken from process {pid}, to which nothing was done"
        if self.ended is not None and self.ended.how in {"ReplicaLost", "RequestQuarantined"} and self.starts:
            pid = self.starts[max(self.starts)].pid
            if not any(strike.pid == pid for strike in strikes):
                yield f"{self.name} ended as {self.ended.how}, and nothing was done to process {pid}"


def _starts(engines: Mapping[int, Sequence[EngineRecord]]) -> tuple[dict[str, dict[int, _Start]], list[str]]:
    """What engines began, by request and epoch."""
    starts: dict[str, dict[int, _Start]] = defaultdict(dict)
    told: list[str] = []
    for pid, records in engines.items():
        for record in records:
            of_request = starts[record.request]
            if isinstance(record, Began):
                if record.epoch in of_request:
                    told.append(f"{record.request}: its epoch {record.epoch} was begun twice")
                of_request[record.epoch] = _Start(pid, record)
            elif isinstance(record, Sent):
                of_request[record.epoch].sent += record.token_ids
    return dict(starts), told


def _nobody_serves(states: Iterable[State], at: float) -> bool:
    latest = {state.replica: state.state for state in states if state.time <= at}
    return all(state in {"dead", "stopped", "restarting"} for state in latest.values())


def _over_budget(states: Iterable[State], supervisor: Supervisor) -> Iterator[str]:
    restarts: dict[int, list[float]] = defaultdict(list)
    served: set[int] = set()
    for state in states:
        if state.state == "ready":
            served.add(state.replica)
        elif state.state == "loading model" and state.replica in served:
            times = restarts[state.replica]
            times.append(state.time)
            recent = [time for time in times if state.time - time < supervisor.period - 1]  # they count from the deaths
            if len(recent) > supervisor.intensity:
                yield f"replica {state.replica} was restarted {len(recent)} times of {supervisor.intensity}"


def _without_need(strikes: Sequence[Struck], states: Iterable[State]) -> Iterator[str]:
    """A replica that only lost its connection is connected to again."""
    served = dict[int, float]()
    for state in states:
        if state.state == "ready":
            served[state.replica] = state.time
        elif state.state == "restarting" and state.replica in served:
            began = served.pop(state.replica)
            faults = {
                strike.fault
                for strike in strikes
                if strike.replica == state.replica and began <= strike.time <= state.time
            }
            if faults <= {"connection cut"}:
                yield f"replica {state.replica} was restarted after {faults or 'nothing'}"


def _hung(owner: Sequence[OwnerRecord], states: Sequence[State], promise: Promise) -> Iterator[str]:
    """What hangs while somebody waits for it must be found by the watchdog."""
    allowed = promise.watchdog * 1.25 + promise.slack
    end = math.inf if promise.to_the_end else owner[-1].time
    for strike in owner:
        if isinstance(strike, Struck) and strike.fault in HANGS and strike.busy:
            seen = [each.time for each in states if each.replica == strike.replica and each.time >= strike.time]
            took = min(seen, default=end) - strike.time
            if took > allowed:
                yield f"replica {strike.replica}: {strike.fault}, found after {took:.1f} s, {allowed:.1f} s are allowed"
