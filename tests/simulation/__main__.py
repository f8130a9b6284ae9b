"""``python -m tests.simulation``: runs seeds in every universe and counts the rare paths that they took.

Exits with 0 if no invariant broke and no rare path is left out.
"""

from __future__ import annotations

import argparse
import sys

from tests.simulation.plants import PLANTS, find_planted


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many; default 10,000")
    parser.add_argument("--first", type=int, default=0, help="the first one; default 0")
    parser.add_argument("--universe", action="append", help="which ones, by default all")
    parser.add_argument("--jobs", type=int, help="processes; by default one a core")
    parser.add_argument("--plants", nargs="*", metavar="NAME", help="plant bugs, by default each, and look for them")
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.seeds)
    if given.plants is not None:
        if unknown := sorted(set(given.plants) - set(PLANTS)):
            parser.error(f"no such plant: {', '.join(unknown)}; there are: {', '.join(PLANTS)}")
        return _find(given.plants or list(PLANTS), seeds, given.jobs)

    from tests.simulation.runner import quiet, sweep

    quiet()
    swept = sweep(seeds, tuple(given.universe or ()), jobs=given.jobs)
    for (universe, path), count in sorted(swept.seen.items()):
        print(f"{count:8} {universe}: {path}")
    for path in swept.never:
        print(f"   never {path}")
    rate = swept.universes / swept.seconds
    print(f"{swept.universes:,} universes, {swept.events:,} events, {swept.seconds:.1f} s, {rate:,.0f} a second")
    for finding in swept.findings:
        print(f"\n{finding}", file=sys.stderr)
    return 1 if swept.findings or swept.never else 0


def _find(names: list[str], seeds: range, jobs: int | None) -> int:
    missed = 0
    for name, found in find_planted(names, seeds, jobs=jobs):
        missed += found is None
        universe = PLANTS[name].universe
        print(f"{universe:8} {name}: {'NOT FOUND' if found is None else found}", flush=True)
    print(f"{len(names) - missed} of {len(names)} planted bugs were found within {len(seeds):,} seeds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
