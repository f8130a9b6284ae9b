"""Watchdog: names the action that holds the event loop, and the line, while it does so.

One daemon thread a process, started by the first run that is checked, and gone a second after the last one. It takes a
sample of every thread's seat a few times per threshold; the trampoline only counts. Nothing is raised for it, only
logged: how long a step takes depends on the machine, and a busy one must not fail a program that is right.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FrameType
from typing import Final

import msgspec

from arun.frames import innermost_user_frame, line_of
from arun.guards.levels import Checks
from arun.guards.owners import Owner, Seat, enter_run, leave_run
from arun.logs import get_logger

__all__ = ("begin_run", "end_run")

log = get_logger("arun.watchdog")

#: Samples per threshold: a block is told of at most a quarter of it late.
_SAMPLES: Final = 4
#: Seconds without any run after which the thread ends.
_IDLE: Final = 1.0


class _Sample(msgspec.Struct):
    """What one seat looked like, since when."""

    steps: int
    since: float
    told: str = ""


class _Watchdog:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seats: dict[Seat, float] = {}
        self._samples: dict[Seat, _Sample] = {}
        self._awake = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, seat: Seat, blocked_after: float) -> None:
        """Look after a thread, until ``leave``; of several thresholds the lowest holds."""
        with self._lock:
            self._seats[seat] = min(self._seats.get(seat, blocked_after), blocked_after)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="arun watchdog", daemon=True)
                self._thread.start()
            self._awake.set()

    def leave(self, seat: Seat) -> None:
        """The last run on that thread has ended."""
        with self._lock:
            self._seats.pop(seat, None)
            if not self._seats:
                self._awake.clear()

    def _run(self) -> None:
        while True:
            self._awake.wait(_IDLE)
            with self._lock:
                seats = list(self._seats.items())
                if not seats and not self._awake.is_set():
                    self._thread = None
                    return
            for gone in self._samples.keys() - dict(seats).keys():
                self._released(gone, time.perf_counter())
            for seat, threshold in seats:
                self._look(seat, threshold)
            if seats:
                time.sleep(min(_IDLE, *(threshold for _, threshold in seats)) / _SAMPLES)

    def _look(self, seat: Seat, threshold: float) -> None:
        now, owner, steps = time.perf_counter(), seat.owner, seat.steps
        sample = self._samples.get(seat)
        if owner is None or sample is None or sample.steps != steps:
            self._released(seat, now)
            if owner is not None:
                self._samples[seat] = _Sample(steps, now)
        elif not sample.told and now - sample.since >= threshold:
            frame = sys._current_frames().get(seat.thread)
            if frame is not None and seat.steps == steps:  # still the same step
                self._blocked(sample, owner, frame, now)

    def _blocked(self, sample: _Sample, owner: Owner, frame: FrameType, now: float) -> None:
        sample.told = owner.label()
        log.warning(
            "event_loop.blocked",
            action=sample.told,
            where=line_of(innermost_user_frame(frame)),
            milliseconds=round((now - sample.since) * 1e3),
            fix="make the action a plain function, which runs in a thread, or use anyio.to_thread.run_sync",
        )

    def _released(self, seat: Seat, now: float) -> None:
        sample = self._samples.pop(seat, None)
        if sample is not None and sample.told:
            log.warning("event_loop.released", action=sample.told, milliseconds=round((now - sample.since) * 1e3))


_watchdog = _Watchdog()


def _forget_threads() -> None:
    """In a forked child no thread but the caller's lives on, and the lock may have been held by one that does not."""
    global _watchdog
    _watchdog = _Watchdog()


os.register_at_fork(after_in_child=_forget_threads)


def begin_run(checks: Checks) -> Seat:
    """A run that is checked begins on this thread."""
    seat = enter_run()
    if seat.runs == 1 or checks.blocked_after < _watchdog_threshold(seat):
        _watchdog.watch(seat, checks.blocked_after)
    return seat


def end_run(seat: Seat) -> None:
    """It has ended, on the same thread."""
    leave_run(seat)
    if not seat.runs:
        _watchdog.leave(seat)


def _watchdog_threshold(seat: Seat) -> float:
    return _watchdog._seats.get(seat, float("inf"))
