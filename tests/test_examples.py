"""Every example runs, and the README shows what runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_quickstart_prints_partial_reductions_before_its_end(tmp_path: Path) -> None:
    printed = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "quickstart.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    partials = [line for line in printed if line.startswith("{'greetings'")]
    assert [partial.count("Hello") for partial in partials] == [1, 2, 3]
    assert printed.index(partials[0]) < printed.index("RunFinished")
    assert printed[-1] == "['Hello, Rio!', 'Hello, Oslo!', 'Hello, Kyoto!']"


def test_the_readme_shows_the_quickstart_which_fits_on_a_screen() -> None:
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    assert quickstart in (ROOT / "README.md").read_text()
    assert len(quickstart.splitlines()) < 30
