"""``python -m tests.benchmarks [names...] [--quick]``: one table, with what it was measured on."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import arun

from . import channel, data, fanout, inference, memory, pool, steps
from .harness import Options, Row, table

ROWS = {**steps.ROWS, **fanout.ROWS, **memory.ROWS, **channel.ROWS, **pool.ROWS, **data.ROWS, **inference.ROWS}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which rows, by default all: {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="3 rounds of a tenth of the work, not 7 of all of it")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(ROWS)):
        parser.error(f"no such row: {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    options = Options(rounds=3, shrink=10) if given.quick else Options(rounds=7, shrink=1)

    print(_machine(), flush=True)
    rows: list[Row] = []
    for name in given.names or ROWS:
        if sys.stderr.isatty():
            print(f"\r\033[K{name} ...", end="", file=sys.stderr, flush=True)
        measured = ROWS[name](options)
        rows += measured if isinstance(measured, list) else [measured]
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(f"\n{table(rows)}\n")
    print(
        "Medians of interleaved rounds in one run, guard-rails on. us: CPU time, save in a thread; ms: by the watch.\n"
        f"Compare ratios, which are medians of the rounds' own, not times. Load now: {os.getloadavg()[0]:.1f}."
    )


def _machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("anyio", "msgspec", "apache-burr"))
    return (
        f"arun {arun.__version__}, {platform.python_implementation()} {platform.python_version()}, {packages}\n"
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, asyncio; "
        f"load average before: {os.getloadavg()[0]:.1f}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
