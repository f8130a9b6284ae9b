"""Seeds that `make test` does not run, in every simulated universe, until the time is up."""

from __future__ import annotations

import sys
import time

from tests.simulation.runner import sweep

NAME = "simulation"
HELP = "1,000,000 seeds in every simulated universe, or as many as there is time for"

_SEEDS = 1_000_000


def run(seconds: float, seed: int) -> int:
    """Run seeds, a million at most.

    :param seconds: after which no further ones begin.
    :param seed: decides which ones; never those of `make test`.
    :return: 0 if no invariant broke.
    """
    ends = time.monotonic() + seconds
    first = _SEEDS * (1 + seed)
    swept = sweep(range(first, first + _SEEDS), stop=lambda: time.monotonic() >= ends)
    rate = swept.universes / swept.seconds
    print(f"  {swept.universes:,} universes from seed {first:,}, {swept.seconds:.0f} s, {rate:,.0f} a second")
    for finding in swept.findings:
        print(f"\n{finding}", file=sys.stderr)
    return 1 if swept.findings else 0
