"""Chains of kill -9 over one store, each with a seed of its own: tests/store/test_kill.py, again and again."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.store.test_kill import chain_of_kills

NAME = "kills"
HELP = "kill -9 at random moments over one store, until the program gets to its end"


def run(seconds: float, seed: int) -> int:
    end = time.monotonic() + seconds
    chains = failed = 0
    while time.monotonic() < end and failed < 10:
        with tempfile.TemporaryDirectory() as folder:
            try:
                chain_of_kills(Path(folder), seed + chains)
            except AssertionError as exc:
                failed += 1
                print(f"  --seed {seed + chains}: {exc!r}", flush=True)
        chains += 1
    print(f"  {chains} chains of kills, {failed} of them failed", flush=True)
    return failed
