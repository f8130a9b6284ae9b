"""arun's own loggers."""

from __future__ import annotations

from arun.logs import get_logger


def test_a_logger_answers_only_for_methods_of_a_logger():
    assert callable(get_logger("arun.test").info)
    for name in ("__dict__", "__wrapped__", "__array__"):
        assert not hasattr(get_logger("arun.test"), name)
