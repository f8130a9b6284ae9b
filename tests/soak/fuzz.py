"""Mutated frames against the session core, for as long as is given; every core makes its own."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.fuzz.frames import Failure, block, resident

NAME = "fuzz"
HELP = "mutated frames against the session core and its reader"


def run(seconds: float, seed: int) -> int:
    """Fuzz on all cores; prints what happened, and of a failure the program that replays it.

    :returns: 0, or 1 after a failure.
    """
    cores = os.cpu_count() or 1
    counts: Counter[str] = Counter()
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        for found, failure, grown in pool.map(_fuzz, [seconds] * cores, range(seed, seed + cores)):
            counts += found
            if failure is not None:
                print(failure, file=sys.stderr)
                return 1
            if grown > 2 * 2**20:
                print(f"the memory of a process has grown by {grown / 1e6:.1f} MB", file=sys.stderr)
                return 1
    print(", ".join(f"{count:,} {name}" for name, count in counts.most_common()))
    return 0


def _fuzz(seconds: float, seed: int) -> tuple[Counter[str], str | None, int]:
    counts: Counter[str] = Counter()
    warm, end = 0, time.monotonic() + seconds
    for number in itertools.count():
        try:
            block(seed, number, counts)
        except Failure as exc:
            return counts, str(exc), 0
        if number == 100:
            gc.collect()
            warm = resident()
        if time.monotonic() >= end:
            break
    gc.collect()
    return counts, None, resident() - warm if warm else 0


if __name__ == "__main__":
    sys.exit(run(float(sys.argv[1]), int(sys.argv[2])))
