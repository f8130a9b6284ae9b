"""``python -m tests.faults [--cluster ray] [--engine vllm] [--first N] [--rounds N]``: rounds, judged by their history.

Exits with 0 if everything was as promised. Says of each round what it was, and of a failure, where its history is.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import structlog

from tests.faults.checker import problems
from tests.faults.engines import FOLDER
from tests.faults.history import engine_records, owner_records
from tests.faults.rounds import Setting, run_rounds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--cluster", choices=("local", "ray"), default="local")
    parser.add_argument("--engine", choices=("echo", "vllm"), default="echo")
    parser.add_argument("--first", type=int, default=0, help="seed of the first round; default 0")
    parser.add_argument("--rounds", type=int, default=10, help="how many, all at one pool; default 10")
    parser.add_argument("--faults", type=int, default=3, help="of each round; default 3")
    parser.add_argument("--folder", type=Path, help="where the history goes, by default into a new folder")
    given = parser.parse_args()
    folder: Path = given.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    setting = Setting(cluster=given.cluster, engine=given.engine, faults=given.faults)
    seeds = range(given.first, given.first + given.rounds)
    # What is left over must be this run's.
    temporary = folder / "tmp"
    temporary.mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    os.environ[FOLDER] = str(folder)  # in every process that comes of this one, see nemesis.marked()
    with open(folder / "log", "w") as log:
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
            logger_factory=structlog.PrintLoggerFactory(log),
        )
        asyncio.run(run_rounds(setting, seeds, folder, lambda line: print(line, flush=True)))
    found = problems(owner_records(folder), engine_records(folder), setting.promise)
    for problem in found:
        print(f"problem: {problem}")
    if found:
        print(f"problem: {len(found)} in all; the history is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
