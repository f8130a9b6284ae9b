"""``kill -9`` at any moment: every row is in the output once, and what was finished is not computed again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_jobs_go_on_exactly(tmp_path: Path) -> None:
    """Twelve universes of drawn plans, each killed until an attempt survives; a soak runs thousands."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.data.killed_jobs", str(tmp_path), "0", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert int(ran.stdout) > 5


PROGRAM = """
import asyncio, sys
from pathlib import Path
from arun.data import read_jsonl

def known(row):
    return {"known": row["word"] in {"one", "two", "three", "four", "five"}}

folder = Path(sys.argv[1])
job = read_jsonl(folder / "in.jsonl").map(known).write_jsonl(folder / "out")
print(asyncio.run(job.arun(checkpoint=folder / "job")).rows)
"""


def test_a_function_is_the_same_in_the_next_process_whatever_the_order_of_its_sets(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"word":"two"}\n')
    for seed in ("1", "2", "3"):
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ran.returncode, ran.stdout) == (0, "1\n"), ran.stderr
