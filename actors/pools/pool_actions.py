"""What a :class:`~actors.pools.assignment.PoolCore` tells its shell to do."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

__all__ = ("Action", "Fail", "FailReason", "Start", "StartReplica", "StopReplica")

FailReason = Literal["replica_lost", "quarantined", "no_replica"]


class Start(msgspec.Struct, frozen=True):
    """Send a request to a replica.

    :ivar resume_from: tokens of the answer that were delivered already; the replica continues after them.
    :ivar again: deltas were delivered, and the answer begins anew all the same: tell the consumer first.
    """

    request: str
    replica: int
    generation: int
    epoch: int
    resume_from: int = 0
    again: bool = False


class Fail(msgspec.Struct, frozen=True):
    """Let a request fail; its consumer is told, and then it leaves.

    :ivar reason: ``"replica_lost"``: it can't be continued, or does not want to be. ``"quarantined"``: it is the reason
        why replicas were lost. ``"no_replica"``: none will serve any more.
    :ivar losses: replicas that were lost while they ran it.
    """

    request: str
    reason: FailReason
    losses: int


class StartReplica(msgspec.Struct, frozen=True):
    """Start an engine; answered by ``replica_ready`` or ``replica_lost``."""

    replica: int
    generation: int


class StopReplica(msgspec.Struct, frozen=True):
    """End an engine, whatever state it is in, its streams included; answered by ``replica_stopped``.

    Where none is left, in a place that waits for a restart or was given up, only the place is given back.

    :ivar restart: whether it is to be started again if its budget allows; else its place is to be given back, too.
    :ivar cause: why it was lost; empty where it is only not needed any more.
    """

    replica: int
    generation: int
    restart: bool
    cause: str = ""


Action: TypeAlias = Start | Fail | StartReplica | StopReplica
