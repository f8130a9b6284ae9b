"""Jobs with a checkpoint, killed at drawn moments until they are done."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.data import killed_jobs

NAME = "checkpoints"
HELP = "jobs from file to file, killed -9 again and again; the output must be exact"


def run(seconds: float, seed: int) -> int:
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            try:
                killed_jobs.main(Path(folder), seed, 10)
            except AssertionError as exc:
                print(exc)
                return 1
            seed += 10
    return 0
