"""``python -m tests.soak [names...] [--seconds S] [--seed N]``: random work under faults, for a long time.

A program is a module of this folder with ``NAME``, ``HELP`` and ``run(seconds, seed) -> int``: it works for about that
many seconds (or until it has done all that it sets out to do), says what it did, and gives 0 if every promise held. A
failure names its seed; the same seed does the same again.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import random
import sys
import time
from pathlib import Path
from types import ModuleType


def main() -> int:
    programs = {module.NAME: module for module in _programs()}
    listed = "\n".join(f"  {name:12} {module.HELP}" for name, module in programs.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=f"Random work under faults.\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="which of them, by default all, one after the other")
    parser.add_argument("--seconds", type=float, default=1800.0, help="for each (default: %(default)g)")
    parser.add_argument("--seed", type=int, help="by default a random one; it is printed")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(programs)):
        parser.error(f"no such program: {', '.join(unknown)}; there are: {', '.join(programs)}")
    seed = random.randrange(10**9) if given.seed is None else given.seed
    failed: list[str] = []
    for name in given.names or programs:
        print(f"{name}: up to {given.seconds:g} s, --seed {seed}", flush=True)
        began = time.monotonic()
        if programs[name].run(given.seconds, seed) != 0:
            failed.append(name)
        print(f"{name}: {'FAILED' if name in failed else 'held'} after {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failed else 0


def _programs() -> list[ModuleType]:
    found = sorted(entry.name for entry in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"{__package__}.{name}") for name in found if not name.startswith("_")]
    return [module for module in modules if hasattr(module, "run")]


if __name__ == "__main__":
    sys.exit(main())
