"""``python -m tests.simulation``: runs seeds in every universe and counts the rare paths that they took.

Exits with 0 if no invariant broke and no rare path is left out.
"""

from __future__ import annotations

import argparse
import sys

from tests.simulation.planting import plant
from tests.simulation.plants import PLANTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many; default 10,000")
    parser.add_argument("--first", type=int, default=0, help="the first one; default 0")
    parser.add_argument("--universe", action="append", help="which ones, by default all")
    parser.add_argument("--jobs", type=int, help="processes; by default one a core")
    parser.add_argument("--plant", choices=list(PLANTS), help="a bug to plant; then 0 says that it was found")
    given = parser.parse_args()
    if given.plant:
        return _find(given.plant, range(given.first, given.first + given.seeds))

    from tests.simulation.runner import quiet, sweep

    quiet()
    swept = sweep(range(given.first, given.first + given.seeds), tuple(given.universe or ()), jobs=given.jobs)
    for (universe, path), count in sorted(swept.seen.items()):
        print(f"{count:8} {universe}: {path}")
    for path in swept.never:
        print(f"   never {path}")
    rate = swept.universes / swept.seconds
    print(f"{swept.universes:,} universes, {swept.events:,} events, {swept.seconds:.1f} s, {rate:,.0f} a second")
    for finding in swept.findings:
        print(f"\n{finding}", file=sys.stderr)
    return 1 if swept.findings or swept.never else 0


def _find(name: str, seeds: range) -> int:
    bug = PLANTS[name]
    plant(bug)
    from tests.simulation.runner import quiet, sweep

    quiet()
    swept = sweep(seeds, (bug.universe,), jobs=1)
    for finding in swept.findings:
        print(f"{name!r} was found by seed {finding.seed}: {finding.error}")
    if not swept.findings:
        print(f"{name!r} was not found in {swept.universes:,} universes {bug.universe!r}", file=sys.stderr)
    return 0 if swept.findings else 1


if __name__ == "__main__":
    sys.exit(main())
