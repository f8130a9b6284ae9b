"""What a :class:`~actors.pools.assignment.PoolCore` remembers of a request and of a replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from actors.members.supervision import Restarts, Supervisor
from actors.requests import Lane

__all__ = ("ReplicaEntry", "RequestEntry", "Reroute", "State")

Reroute = Literal["continue", "restart", "never"]
State = Literal["starting", "ready", "draining", "stopping", "waiting", "dead"]


class RequestEntry:
    """One request that was submitted and has not left."""

    __slots__ = (
        "alone",
        "arrival",
        "delivered",
        "epoch",
        "failed",
        "hungry",
        "id",
        "lane",
        "losses",
        "out",
        "prefix",
        "priority",
        "replica",
        "reroute",
        "resumable",
        "running",
    )

    def __init__(
        self,
        id_: str,
        arrival: int,
        lane: Lane,
        priority: int,
        prefix: Sequence[int],
        resumable: bool,
        reroute: Reroute,
    ) -> None:
        self.id = id_
        self.arrival = arrival
        self.lane: Lane = lane
        self.priority = priority
        self.prefix = prefix
        self.resumable = resumable
        self.reroute: Reroute = reroute
        self.epoch = -1
        self.running = False
        self.failed = False
        #: where it runs; None once that is lost, though its stream may not be read to the end
        self.replica: ReplicaEntry | None = None
        #: tokens, and whether any delta, of the answer as it now stands
        self.delivered = 0
        self.out = False
        #: whether its consumer waits for a delta
        self.hungry = False
        self.losses = 0
        #: whether it was the only one at the last loss
        self.alone = False


class ReplicaEntry:
    """One place for an engine."""

    __slots__ = (
        "cause",
        "foreign",
        "generation",
        "number",
        "place_kept",
        "progressed",
        "requests",
        "restart",
        "restart_at",
        "restarts",
        "silent",
        "state",
        "suspect",
        "tokens",
    )

    def __init__(self, number: int, supervisor: Supervisor) -> None:
        self.number = number
        self.generation = 1
        self.state: State = "starting"
        self.requests: dict[str, RequestEntry] = {}
        #: whether the one request that it has is a suspect
        self.suspect = False
        #: requests of others, as it reported last
        self.foreign = 0
        #: that it had generated, as it reported last
        self.tokens = 0
        self.progressed = False
        #: seconds without a delta or a token though somebody waited for one, from the first tick that saw it
        self.silent: float | None = None
        self.restart = True
        #: whether the last StopReplica was for a restart, so that its place was not given back
        self.place_kept = True
        self.restart_at = 0.0
        self.restarts = Restarts(supervisor)
        self.cause = ""

    @property
    def load(self) -> int:
        return len(self.requests) + self.foreign
