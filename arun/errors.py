"""Every error that arun raises, each named after the condition that it reports.

``ArunError`` is the root. Errors that a peer may raise across a channel are registered in
:mod:`arun.channel` by name; nothing is ever imported by a name that came over a wire.
"""

from __future__ import annotations

__all__ = (
    "AbandonedGenerator",
    "AbandonedWork",
    "ActorDied",
    "ActorNotFound",
    "AlreadyFinishedError",
    "ApplicationBusyError",
    "ArunError",
    "ChannelLost",
    "CheckpointError",
    "CodecError",
    "DataError",
    "EngineDead",
    "EngineError",
    "GraphChangedError",
    "MailboxFull",
    "MisuseError",
    "MisuseWarning",
    "MissingExtraError",
    "ModelNotFound",
    "PayloadError",
    "PlacementError",
    "PoolBusy",
    "PortInUse",
    "ProtocolError",
    "RemoteError",
    "ReplicaLost",
    "RequestError",
    "RequestQuarantined",
    "RunConflictError",
    "StoreError",
    "StreamRefused",
    "SubtaskFailed",
    "SubtaskSkipped",
    "WorkerDied",
)


class ArunError(Exception):
    """Root of all errors raised by arun and actors."""


class MisuseError(ArunError):
    """The program uses arun in a way that cannot work; the message names the line and the fix."""


class MisuseWarning(UserWarning):
    """A MisuseError at check level "warn": the program goes on, at its own risk."""


class ApplicationBusyError(MisuseError):
    """Two runs of one Application at once. Use ``app.session()`` for a fresh one per run."""


class SubtaskFailed(ArunError):
    """Raised by awaiting the handle of a subtask that failed; the cause is its error."""


class SubtaskSkipped(ArunError):
    """Raised by awaiting the handle of a subtask that was skipped or cancelled."""


class AbandonedWork(ArunError, ResourceWarning):
    """A warning: work that did not end when it was cancelled was left behind; the message names its line.

    :ivar label: the action and the branches that lead to it, where that is known.
    :ivar line: where it was, as ``function at file:line``.
    """

    def __init__(self, message: str, *, label: str = "", line: str = "") -> None:
        super().__init__(message)
        self.label = label
        self.line = line


class WorkerDied(ArunError):
    """A worker process of a :class:`~arun.ProcessExecutor` ended while it ran a subtask.

    :ivar pid: of the process.
    :ivar signal: what killed it, None where it exited by itself.
    """

    def __init__(self, message: str, *, pid: int | None = None, signal: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid
        self.signal = signal


class CodecError(ArunError):
    """A value can't be encoded, or bytes can't be decoded, by :mod:`arun.codec`.

    :ivar path: where in the value it is, outermost first; empty where that isn't known.
    :ivar kind: name of the type that can't be encoded.
    :ivar why: what to do about it.
    """

    def __init__(self, message: str, path: tuple[str, ...] = (), kind: str = "", why: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.kind = kind
        self.why = why


class DataError(ArunError):
    """Data can't be read or written: nothing is there, a line is broken, types don't agree; the message says where."""


class StoreError(ArunError):
    """A store can't be used: its file is of another version, or no store, or the disk is full."""


class CheckpointError(ArunError):
    """A checkpoint can't be gone on with: it is of another job, its input has changed, or another process uses it."""


class RunConflictError(ArunError):
    """Somebody else runs this application: another process, or another Application of the same ``app_id``."""


class GraphChangedError(ArunError):
    """The store knows this ``app_id`` from another graph than the one it is to go on with."""


class AlreadyFinishedError(ArunError):
    """The run of this ``app_id`` has ended already.

    :ivar state: all fields of the State that it ended with.
    """

    def __init__(self, message: str, state: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.state = state or {}


class AbandonedGenerator(ArunError, ResourceWarning):
    """A warning: an action dropped an async generator without closing it, which arun then did; names its line."""


class MissingExtraError(ArunError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, what: str, extra: str, package: str) -> None:
        super().__init__(
            f"{what} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'arun-runtime[{extra}]'"
        )
        self.extra = extra


class ProtocolError(ArunError):
    """A peer sent bytes that are no valid frame; that connection is closed."""


class ChannelLost(ArunError, ConnectionError):
    """The connection to a peer ended while streams were open on it."""


class RemoteError(ArunError):
    """An error of a type that this process does not know, raised by a peer.

    :ivar kind: qualified name of the error's type in the peer.
    :ivar remote_traceback: the peer's formatted traceback, or an empty string.
    """

    def __init__(self, kind: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind
        self.remote_traceback = remote_traceback


class ActorDied(ArunError):
    """An actor's process ended while calls to it were in flight, or is not there any more; says which actor and why.

    ``cluster.monitor(actor)`` also gives it as an event.

    :ivar actor: its name.
    :ivar reason: how it ended, as a phrase that continues "the actor".
    :ivar generation: which of its lives ended, from 1; every restart begins another.
    """

    def __init__(self, message: str, *, actor: str = "", reason: str = "", generation: int = 0) -> None:
        super().__init__(message)
        self.actor = actor
        self.reason = reason
        self.generation = generation


class MailboxFull(ArunError):
    """An actor has as many messages waiting as its mailbox holds; this one was not taken and may be sent again."""


class ActorNotFound(ArunError, LookupError):
    """No actor of the cluster has that name; the message lists the names there are."""


class PlacementError(ArunError):
    """A placement cannot be held by the cluster; the message has both sides' numbers."""


class PortInUse(ArunError, OSError):
    """A port that was asked for is taken by another process."""


class EngineError(ArunError):
    """Root of the errors of inference engines.

    :ivar request_id: of the request that failed, where it was one.
    """

    request_id: str | None = None


class RequestError(EngineError, ValueError):
    """The engine refused this one request (for example a prompt that is too long)."""


class EngineDead(EngineError):
    """The engine itself failed: every request on it has failed with it."""


class PoolBusy(EngineError):
    """A pool has as many waiting requests as it takes; the message has the numbers. Try again later."""


class ReplicaLost(EngineError):
    """The replica that answered a request was lost, and another one could not have gone on with the answer."""


class RequestQuarantined(EngineError):
    """Replica after replica was lost while it ran this request, so it is not tried again."""


class ModelNotFound(EngineError):
    """The model is neither a folder with a model nor a name that can be loaded here."""


class PayloadError(ArunError, TypeError):
    """A value cannot be sent over a channel, or what arrived is not of the declared type."""


class StreamRefused(ArunError):
    """The peer already serves as many streams of this connection as it announced."""
