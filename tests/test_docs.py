"""Every Python fence of README.md and docs/ is a program, and it runs.

A fence that cannot run by itself (it shows a fragment, or needs a GPU) says so in its info string:

    ```python no-run
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```python(?P<info>[^\n`]*)\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
# What Python prints, without failing, about an error that it can raise nowhere: also a warning turned into one.
UNRAISABLE = ("Exception ignored", "was never awaited", "was never retrieved", "was destroyed but it is pending")


class Fence(NamedTuple):
    page: str
    line: int
    info: str
    code: str


def fences(text: str, page: str = "page.md") -> Iterator[Fence]:
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Fence(page, line, match["info"].strip(), match["code"])


def runnable() -> Iterator[Fence]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        if "_build" not in page.parts:
            found = fences(page.read_text(), str(page.relative_to(ROOT)))
            yield from (fence for fence in found if "no-run" not in fence.info.split())


@pytest.mark.parametrize("fence", [pytest.param(fence, id=f"{fence.page}:{fence.line}") for fence in runnable()])
def test_a_fence_runs_without_errors_or_warnings(fence: Fence, tmp_path: Path) -> None:
    # As many empty lines before the code as the page has, so that a traceback names the page's own line.
    program = tmp_path / fence.page.replace("/", "_").replace(".md", ".py")
    program.write_text("\n" * fence.line + fence.code)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, f"{fence.page}:{fence.line} ended with {done.returncode}\n{done.stderr}"
    assert not any(sign in done.stderr for sign in UNRAISABLE), done.stderr


def test_fences_are_found_with_their_line_and_their_info() -> None:
    text = "# Page\n\n```python\na = 1\n```\n\ntext\n\n```python no-run\nb\n```\n\n```bash\nc\n```\n"
    assert list(fences(text)) == [Fence("page.md", 3, "", "a = 1\n"), Fence("page.md", 9, "no-run", "b\n")]
