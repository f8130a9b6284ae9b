"""Runs seeds in every universe, side by side, and tells of a finding as a program that replays it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import NamedTuple

import structlog

from tests.simulation import channel, connection, ledger, pool
from tests.simulation.world import Violation, World

__all__ = ("UNIVERSES", "Finding", "Swept", "play", "quiet", "replay", "sweep")


class Universe(NamedTuple):
    play: Callable[[World], None]
    #: rare paths, each of which some seed must take
    paths: tuple[str, ...]
    #: plays every so many seeds: one on an event loop takes as long as several of plain cores
    every: int = 1


UNIVERSES: dict[str, Universe] = {
    "channel": Universe(channel.play, channel.PATHS),
    "connection": Universe(connection.play, connection.PATHS, every=2),
    "pool": Universe(pool.play, pool.PATHS),
    "ledger": Universe(ledger.play, ledger.PATHS, every=4),
}

_CHUNK = 100


class Finding(NamedTuple):
    """A seed that broke an invariant, or raised."""

    universe: str
    seed: int
    tick: int
    events: int
    #: hash of the event log
    log: str
    error: str

    def __str__(self) -> str:
        return (
            f"universe {self.universe!r}, seed {self.seed}: event {self.events}, tick {self.tick}: {self.error}\n"
            "Run this where the Makefile is, with the same sources, to see every event of it:\n\n"
            "    from tests.simulation import replay\n"
            f"    replay({self.universe!r}, seed={self.seed}, log={self.log!r})\n"
        )


class Swept(NamedTuple):
    """What came out of a range of seeds."""

    universes: int
    events: int
    seconds: float
    #: seeds that took each rare path
    seen: Counter[tuple[str, str]]
    findings: list[Finding]

    @property
    def never(self) -> list[str]:
        """Rare paths that no seed took."""
        return [
            f"{name}: {path}"
            for name in sorted({name for name, _ in self.seen})
            for path in UNIVERSES[name].paths
            if not self.seen[name, path]
        ]


def quiet() -> None:
    """Have arun log nothing in this process: what it warns of is what these universes are made of."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def play(universe: str, seed: int) -> tuple[World, BaseException | None]:
    """Run one universe."""
    world = World(universe, seed)
    try:
        UNIVERSES[universe].play(world)
    except Exception as exc:  # noqa: BLE001 - a core that raises what it should not is a finding as well
        return world, exc
    return world, None


def replay(universe: str, seed: int, log: str | None = None, *, show: int = 60) -> World:
    """Run one seed again, print its last events, and raise what it found.

    :param log: the hash that its event log had; another one is an error, as then it is another universe.
    :param show: events to print.
    """
    world, error = play(universe, seed)
    for tick, what, *details in world.log[-show:]:
        print(f"{tick:6} {what:10} {' '.join(map(str, details))}")
    if log is not None and world.digest() != log:
        raise RuntimeError(
            f"seed {seed} of universe {universe!r} has the event log {world.digest()}, not {log}: "
            "arun, this harness or Python is not the one that it was found with"
        )
    if error is not None:
        raise error
    return world


def sweep(
    seeds: range, universes: tuple[str, ...] = (), *, jobs: int | None = None, stop: Callable[[], bool] | None = None
) -> Swept:
    """Run a range of seeds in each universe.

    :param universes: by default all.
    :param jobs: processes; by default one a core.
    :param stop: asked now and then whether to end here.
    :return: what they did; the first finding ends it.
    """
    names = universes or tuple(UNIVERSES)
    jobs = jobs or os.cpu_count() or 1
    began = time.monotonic()
    total = Swept(0, 0, 0.0, Counter(), [])
    for part in _parts(seeds, names, jobs):
        total.seen.update(part.seen)
        total = total._replace(
            universes=total.universes + part.universes,
            events=total.events + part.events,
            findings=total.findings + part.findings,
        )
        if total.findings or (stop is not None and stop()):
            break
    return total._replace(seconds=time.monotonic() - began)


def _parts(seeds: range, names: tuple[str, ...], jobs: int) -> Iterator[Swept]:
    chunks = (seeds[start : start + _CHUNK] for start in range(0, len(seeds), _CHUNK))
    if jobs == 1:
        for chunk in chunks:
            yield _sweep_here(chunk, names)
        return
    # Spawned: a fork would take along whatever threads the caller has.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), quiet) as processes:
        running: set[Future[Swept]] = set()
        try:
            for chunk in chunks:
                running.add(processes.submit(_sweep_here, chunk, names))
                if len(running) > 2 * jobs:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()


def _sweep_here(seeds: range, names: tuple[str, ...]) -> Swept:
    began = time.monotonic()
    seen: Counter[tuple[str, str]] = Counter()
    events = universes = 0
    findings: list[Finding] = []
    for seed in seeds:
        for name in names:
            if seed % UNIVERSES[name].every:
                continue
            world, error = play(name, seed)
            universes += 1
            events += len(world.log)
            for path in world.seen:
                seen[name, path] += 1
            if error is not None:
                findings.append(Finding(name, seed, world.now, len(world.log), world.digest(), _told(error)))
        if findings:
            break
    return Swept(universes, events, time.monotonic() - began, seen, findings)


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, Violation) else f"{type(error).__qualname__}: {error}"
