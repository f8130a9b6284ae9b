"""Nemesis: does to the replicas of a pool what happens to processes, at moments that a seed decides."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import msgspec

from tests.faults.engines import FOLDER

if TYPE_CHECKING:
    from actors.cluster import Cluster

__all__ = ("CORE_FAULTS", "FAULTS", "GROUP_FAULTS", "Strike", "cut", "descendants", "drawn", "marked", "strike")

FAULTS = ("actor killed", "process stopped", "connection cut")
CORE_FAULTS = ("core killed", "core stopped")
GROUP_FAULTS = ("group removed",)


class Strike(msgspec.Struct, frozen=True):
    """One fault.

    :ivar after: deltas that all consumers together have been given before it.
    :ivar which: which of the replicas that serve then, by order.
    """

    after: int
    fault: str
    which: int


def drawn(chance: Random, faults: tuple[str, ...], count: int, deltas: int) -> list[Strike]:
    """So many faults within the first so many deltas, some of them at the same moment."""
    moments = [chance.randrange(deltas) for _ in range(count)]
    moments = [chance.choice(moments[:number]) if number and chance.random() < 0.3 else at
               for number, at in enumerate(moments)]  # fmt: skip
    return sorted(
        (Strike(after, chance.choice(faults), chance.randrange(2)) for after in moments), key=lambda each: each.after
    )


def strike(fault: str, pid: int, actor: str, cluster: Cluster) -> None:
    """Do it to one replica.

    :param pid: of its actor's process.
    :param actor: its actor's name.
    """
    match fault:
        case "actor killed":
            _signal(pid, signal.SIGKILL)
        case "process stopped":
            _signal(pid, signal.SIGSTOP)
        case "core killed":
            _signal_core(pid, signal.SIGKILL, otherwise=signal.SIGUSR1)
        case "core stopped":
            _signal_core(pid, signal.SIGSTOP, otherwise=signal.SIGSTOP)
        case "connection cut":
            [address] = [info.address for info in cluster.list() if info.name == actor]
            cut(address)
        case "group removed":
            _remove_group(cluster, actor)
        case _:
            raise ValueError(f"no such fault: {fault}")


def descendants(root: int) -> dict[int, str]:
    """The processes that a process has started, and those that these have: what each runs, by its pid."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    found: dict[int, str] = {}
    for pid in parents:
        ancestor: int | None = parents[pid]
        while ancestor is not None and ancestor != root:
            ancestor = parents.get(ancestor)
        if ancestor == root:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                found[pid] = _command(Path(f"/proc/{pid}"))
    return found


def marked(folder: Path) -> dict[int, str]:
    """Like :func:`descendants` of who set :data:`~tests.faults.engines.FOLDER`, orphans included: they inherit it."""
    mark = f"{FOLDER}={folder}".encode()
    found: dict[int, str] = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes().split(b"\0") and int(environ.parent.name) != os.getpid():
                found[int(environ.parent.name)] = _command(environ.parent)
    return found


def _command(process: Path) -> str:
    return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _signal_core(pid: int, number: signal.Signals, *, otherwise: signal.Signals) -> None:
    """To vLLM's EngineCore; an engine without such a process gets the other signal itself."""
    cores = [child for child, command in descendants(pid).items() if "EngineCore" in command]
    for core in cores:
        _signal(core, number)
    if not cores:
        _signal(pid, otherwise)


def cut(address: str) -> None:
    """Shut this process's sockets to an address down, as a network that fails does: neither end has asked for it."""
    for sock in _sockets():
        with sock, contextlib.suppress(OSError):
            if _written(sock.getpeername()) == address:
                sock.shutdown(socket.SHUT_RDWR)


def _sockets() -> Iterator[socket.socket]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                yield socket.socket(fileno=os.dup(int(name)))


def _written(peer: object) -> str:
    """A peer as :class:`~actors.members.lives.ActorInfo` writes its address."""
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else f"unix:{peer}"


def _remove_group(cluster: Cluster, actor: str) -> None:
    """Remove the placement group of a replica behind the pool's back."""
    import ray

    [native] = [member.group.native for member in cluster._roster._members.values() if member.spec.name == actor]
    ray.util.remove_placement_group(native)
