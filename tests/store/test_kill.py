"""kill -9, again and again, at random moments, until the program gets to its end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("killed_program.py")
ITEMS, ROUNDS, LIMIT = 30, 3, 6 * 3


def start(folder: Path, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(PROGRAM), str(folder / "s.db"), str(folder / "log"), str(seed)],
        env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed % 2**32)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.timeout(180)
def test_a_chain_of_kills_ends_with_the_right_state_and_repeats_only_what_was_in_flight(tmp_path: Path) -> None:
    chain_of_kills(tmp_path, seed=1, most=8)


def chain_of_kills(folder: Path, seed: int, most: int = 20) -> None:
    """Kill the program at so many moments, let it get to its end, and judge what it printed and what it logged."""
    rng = random.Random(seed)
    kills = life = 0
    total = ITEMS * (1 + 4 + 1)  # subtasks of the three rounds
    while True:
        life += 1
        before = len(lines(folder))
        with start(folder, seed * 1000 + life) as process:
            # At least one more subtask gets done in each life, so that the chain has an end.
            enough = before + rng.randrange(1, total * 2 // 3 // most)
            while process.poll() is None and len(lines(folder)) < enough:
                time.sleep(0.001)
            if process.poll() is None and kills < most:
                time.sleep(rng.uniform(0, 0.006))
                process.kill()
                process.communicate()
                kills += 1
                continue
            out, err = process.communicate()
        assert process.returncode == 0, err
        break
    assert kills  # fewer than asked for where it was faster than whoever kills it
    rounds = eval(out)  # printed by a program of ours
    expected = [str(number // 3) for number in range(ITEMS)]
    for number, outs in enumerate(rounds):
        assert sorted(item for item, _ in outs) == sorted(expected), "each subtask is reduced once"
        for item, seen in outs:
            assert seen == ({f"{item}/{n}" for n in range(4)} if number % 2 else {number})
    done = Counter(tuple(json.loads(line)) for line in lines(folder))
    once = Counter({(r, item): 1 for r in (0, 2) for item in expected})
    assert len(once) < len(done)
    # Run again was at most what was in flight at a kill, and only that: nothing that had been recorded.
    again = sum(done.values()) - total
    assert 0 <= again <= kills * LIMIT
