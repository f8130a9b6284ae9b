"""Plants a bug: one place of the sources is changed while they are imported, in this process only."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

__all__ = ("Plant", "changed_source", "plant")


class Plant(NamedTuple):
    """A patch: the text ``old``, which must be in the module exactly once, becomes ``new``."""

    name: str
    #: the universe that must find it
    universe: str
    module: str
    old: str
    new: str


def changed_source(bug: Plant) -> str:
    """The module's source with the bug in it.

    :raises LookupError: if the text to change is not there exactly once: the plant must follow the code.
    """
    spec = importlib.machinery.PathFinder.find_spec(bug.module, [str(Path(_root(), *bug.module.split(".")[:-1]))])
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    if source.count(bug.old) != 1:
        raise LookupError(
            f"plant {bug.name!r}: its text is {source.count(bug.old)} times in {bug.module}, must be once; "
            f"the code has changed, let the plant follow it:\n{bug.old}"
        )
    return source.replace(bug.old, bug.new)


def plant(bug: Plant) -> None:
    """Have the module imported with the bug in it. To be called before anything imports it."""
    if bug.module in sys.modules:
        raise RuntimeError(f"{bug.module} is imported already")
    sys.meta_path.insert(0, _Finder(bug, changed_source(bug)))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, bug: Plant, source: str) -> None:
        self._bug = bug
        self._source = source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._bug.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(fullname, spec.origin, self._source)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, source: str) -> None:
        super().__init__(fullname, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        # Not from __pycache__, and not into it.
        code: Any = compile(self._source, self.path, "exec", dont_inherit=True)
        return code


def _root() -> Path:
    return Path(__file__).resolve().parents[2]
