"""Nemesis: does to the replicas of a pool what happens to processes, at moments that a seed decides."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import msgspec

from tests.actors.programs import command_of, descendants, wait_gone
from tests.faults.engines import FOLDER

if TYPE_CHECKING:
    from actors.cluster import Cluster

__all__ = (
    "CORE_FAULTS",
    "FAULTS",
    "GROUP_FAULTS",
    "Strike",
    "cut",
    "drawn",
    "left_over",
    "marked",
    "shared_memory",
    "strike",
)

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
    # Not before the first: a request that is submitted to a replica that was struck before it is no loss of that fault.
    moments = [max(1, chance.randrange(deltas)) for _ in range(count)]
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


def marked(folder: Path) -> dict[int, str]:
    """The processes that come of who set :data:`~tests.faults.engines.FOLDER`, orphans and guards included."""
    mark = f"{FOLDER}={folder}".encode()
    found: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid, command = int(process.name), command_of(int(process.name))
            inherited = mark in (process / "environ").read_bytes().split(b"\0")
            guards = "/guards.py" in command and f" {folder}/" in command  # guards inherit nothing
            if (inherited or guards) and pid != os.getpid():
                found[pid] = command
    return found


def left_over(folder: Path, seconds: float, *, but: Callable[[], Iterable[int]] = tuple) -> dict[int, str]:
    """What is still marked when all that ends by itself within so many seconds has.

    :param but: those that may live on.
    """
    deadline = time.monotonic() + seconds
    while True:
        may = set(but())
        left = {pid: command for pid, command in marked(folder).items() if pid not in may}
        if not left or time.monotonic() >= deadline:
            return left
        wait_gone(list(left), max(0.0, deadline - time.monotonic()))


def shared_memory(pids: Iterable[int]) -> set[int]:
    """What processes have mapped of /dev/shm, Ray's store aside: inodes, since semaphores are renamed."""
    found: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if "/dev/shm/" in line and "/dev/shm/plasma" not in line:
                    found.add(int(line.split()[4]))
    return found


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
