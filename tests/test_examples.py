"""Every example runs, and the README shows what runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

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
    assert [partial.count("Hello") for partial in partials] == [0, 1, 2, 3]
    assert printed.index(partials[0]) < printed.index("RunFinished")
    assert printed[-1] == "['Hello, Rio!', 'Hello, Oslo!', 'Hello, Kyoto!']"


def test_the_quickstart_of_no_cities_greets_nobody() -> None:
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    without_cities = quickstart.replace('["Kyoto", "Rio", "Oslo"]', "[]")
    assert without_cities != quickstart
    printed = subprocess.run([sys.executable, "-c", without_cities], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


def test_the_readme_shows_the_quickstart_which_fits_on_a_screen() -> None:
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    assert quickstart in (ROOT / "README.md").read_text()
    assert len(quickstart.splitlines()) < 30


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.timeout(290)
def test_the_batch_job_answers_every_prompt_on_engines_of_two_workers_each(tmp_path: Path) -> None:
    command = [str(ROOT / "examples" / "ray_vllm_batch.py"), "prompts.parquet", "answers"]
    options = ["--replicas", "2", "--tensor-parallel", "2", "--cpus", "0.25", "--rows", "40", "--max-tokens", "8"]
    printed = subprocess.run(
        [sys.executable, *command, *options], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "40 answers in" in printed
    assert len([line for line in printed.splitlines() if line.startswith("{'id'")]) == 3
    answers = pq.read_table(tmp_path / "answers").sort_by("id")
    assert answers.column("id").to_pylist() == list(range(40))
    assert set(answers.column("answer_finish_reason").to_pylist()) <= {"length", "stop"}
