"""How much memory a fan-out takes. Every figure comes from a fresh interpreter, which runs this module."""

from __future__ import annotations

import asyncio
import gc
import itertools
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from .harness import Check, Options, Row

__all__ = ("ROWS", "resident", "start_of_peak")


def memory(options: Options) -> Row:
    """Peak memory above the import baseline, limit 100, a streaming reducer."""
    many = options.n(1_000_000)
    few = 10_000
    at_few, at_many, burr = _peak("arun", few), _peak("arun", many), _peak("burr", few)
    return Row(
        f"peak memory, {many:,} subtasks (floor: {few:,}; Burr: {few:,})",
        "MB",
        at_many,
        at_few,
        burr,
        [
            Check("< 30 MB", at_many / 1e6, 30, "MB"),
            Check(f"flat: at most 1 MB above {few:,}", (at_many - at_few) / 1e6, 1, "MB"),
        ],
    )


ROWS = {"memory": memory}


def _peak(who: str, n: int) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.memory", who, str(n)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def _run(who: str, n: int) -> float:
    """Run ``n`` subtasks in this process: bytes of its peak above what it had with everything imported."""
    if who == "arun":
        from .fanout import map_states

        app: Any = map_states(lambda: itertools.repeat(0.0, n))
    else:
        from .peer import map_states as burr_map_states

        app = burr_map_states([0.0] * n)[0]

    async def main() -> None:
        _, _, state = await app.arun(halt_after=["leaves"])
        assert state["total"] == n

    gc.collect()
    before = start_of_peak()
    asyncio.run(main())
    return resident("VmHWM") - before


def start_of_peak() -> float:
    """Forget the peak so far, where the kernel can (that of exec, and of imports), and return where it starts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return resident("VmHWM")
    return resident("VmRSS")


def resident(field: str) -> float:
    """Bytes of this process: ``VmHWM`` at its peak, ``VmRSS`` now."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux; macOS counts bytes here
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return next(float(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field + ":"))


if __name__ == "__main__":
    print(_run(sys.argv[1], int(sys.argv[2])))
