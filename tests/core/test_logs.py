"""arun logs through structlog, which it leaves alone until there is something to write."""

from __future__ import annotations

import subprocess
import sys

import pytest

from arun.logs import get_logger

_RUN = """
import sys
import arun.logs

log = arun.logs.get_logger("test")
log.info("thing.happened", number=1)
print("structlog" in sys.modules)
log.warning("thing.broke", number=2)
"""


def test_what_nobody_has_asked_for_is_dropped_without_importing_structlog() -> None:
    ran = subprocess.run([sys.executable, "-c", _RUN], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
    assert "thing.happened" not in ran.stderr
    assert "thing.broke" in ran.stderr
    assert "number=2" in ran.stderr.replace("\x1b[0m", "").replace("\x1b[36m", "").replace("\x1b[35m", "")


_FAIL = """
import arun.logs, arun.telemetry, sys

if "configured" in sys.argv:
    arun.telemetry.configure_logging()

def fail(key):
    1 / 0

try:
    fail("a secret key")
except ZeroDivisionError:
    arun.logs.get_logger("test").exception("thing.failed", number=3)
"""


@pytest.mark.parametrize("how", ["left alone", "configured"])
def test_a_logged_traceback_shows_no_local_variables(how: str) -> None:
    ran = subprocess.run([sys.executable, "-c", _FAIL, how], capture_output=True, text=True, check=True)
    assert "thing.failed" in ran.stderr
    assert "in fail" in ran.stderr
    assert "secret" not in ran.stderr.replace('fail("a secret key")', "")


def test_a_logger_answers_only_for_methods_of_a_logger() -> None:
    assert callable(get_logger("test").info)
    for name in ("__dict__", "__wrapped__", "__array__"):
        assert not hasattr(get_logger("test"), name)
