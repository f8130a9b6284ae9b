"""Every property test of the suite, with many times the examples and a new seed each round."""

from __future__ import annotations

import subprocess
import sys
import time

NAME = "properties"
HELP = "the suite's property tests (hypothesis), thousands of examples each"


def run(seconds: float, seed: int) -> int:
    end = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < end:
        chosen = ["-m", "hypothesis and not ray and not engine", "--hypothesis-profile=soak", "--timeout=0"]
        pytest = [sys.executable, "-m", "pytest", "-q", "-n", "auto", *chosen, f"--hypothesis-seed={seed + rounds}"]
        try:
            done = subprocess.run(pytest, timeout=end - time.monotonic())
        except subprocess.TimeoutExpired:
            break
        if done.returncode != 0:
            return done.returncode
        rounds += 1
    print(f"  {rounds} rounds", flush=True)
    return 0
