"""``kill -9`` at any moment: every row is in the output once, and what was finished is not computed again."""

from __future__ import annotations

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
