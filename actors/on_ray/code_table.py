"""Code for Ray's workers: what no module has for them travels through Ray's own table of functions.

An order names the code that it needs by its hash; a worker that has not got it yet looks it up once. So code is sent
once for all workers, fetched once by each, and ends with the job, however that ends: the head node removes what is
below a job's name. Values never travel this way.

    parent    pickle -> sha256 -> table[job:executor:sha256]           order(code=[job:executor:sha256, ...])
    worker    table[job:executor:sha256] -> same sha256? -> unpickle   kept while it is among the latest 256
"""

from __future__ import annotations

import hashlib
import importlib
import uuid
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread

from actors.on_ray.pickling import dumps_code, importable, loads_code
from actors.on_ray.ray_host import import_ray
from arun.errors import MisuseError
from arun.executors.references import dig
from arun.registry import Registered, register, registered

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

__all__ = ("CodeTable", "Library", "Luggage")

_CODE: Final = "@code"
"""Stands where a reference names a module: what follows is a hash."""

_NAMESPACE: Final = b"fun"
"""Ray's namespace of functions, in which the head node tidies up after each job."""

_KEPT: Final = 256
"""How many pieces of code a table and a worker keep for later."""

_MOST_BYTES: Final = 64 * 2**20


class Luggage:
    """The code that goes with one order.

    :ivar blobs: pickled, by hash.
    """

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def pack(self, what: str, code: object) -> tuple[str, str]:
        """A :data:`arun.executors.references.Pack`.

        :raises MisuseError: it can't be pickled, or takes more than 64 MiB.
        """
        return _CODE, self.add(dumps_code(code, what), what)

    def add(self, blob: bytes, what: str) -> str:
        """Add what is pickled already; returns its hash."""
        if len(blob) > _MOST_BYTES:
            raise MisuseError(
                f"{what} takes {len(blob)} bytes with all that it closes over; at most {_MOST_BYTES} are sent. Give it "
                "what is large as a value, in the State, or let it load that itself"
            )
        digest = hashlib.sha256(blob).hexdigest()
        self.blobs[digest] = blob
        return digest


class CodeTable:
    """The parent's side of the table: what of it is there for this executor, which no other one of the job shares.

    What nobody has needed lately is removed, so that closures that are new each time do not fill the head node.
    """

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex
        self._users: OrderedDict[str, int] = OrderedDict()
        self._writing = anyio.Lock()
        self._types: dict[str, tuple[Registered, bytes]] = {}

    def pack_types(self, luggage: Luggage) -> None:
        """Add the registered classes that the workers can't import; the codec needs them there."""
        for entry in registered():
            if not importable(entry.cls):
                known = self._types.get(entry.name)
                if known is None or known[0] is not entry:
                    known = self._types[entry.name] = (entry, _dumps_type(entry))
                luggage.add(known[1], f"the registered class {entry.name}")

    async def check_in(self, luggage: Luggage) -> tuple[str, ...]:
        """Put code there that is not there yet; :meth:`check_out` the result when the order is through."""
        below = f"{_job_prefix()}{self._name}:"
        keys = {below + digest: blob for digest, blob in luggage.blobs.items()}
        async with self._writing:
            for key, blob in keys.items():
                if key not in self._users:
                    await anyio.to_thread.run_sync(_write, key, blob)
                    self._users[key] = 0
            for key in keys:
                self._users[key] += 1
                self._users.move_to_end(key)
            idle = [key for key, users in self._users.items() if not users]
            for key in idle[: max(0, len(self._users) - _KEPT)]:
                await anyio.to_thread.run_sync(_remove, key)
                del self._users[key]
        return tuple(keys)

    def check_out(self, keys: Iterable[str]) -> None:
        """An order needs this code no more."""
        for key in keys:
            if key in self._users:  # else the table was closed meanwhile
                self._users[key] -= 1

    async def aclose(self) -> None:
        """Remove all of it."""
        async with self._writing:
            while self._users:
                await anyio.to_thread.run_sync(_remove, self._users.popitem()[0])


class Library:
    """The worker's side of the table: the code that it has fetched."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, Any] = OrderedDict()

    async def fetch(self, keys: Collection[str]) -> None:
        """Get the code that an order needs, as far as it is not here yet.

        :raises MisuseError: it is not in the table, or not what its hash says.
        """
        for key in keys:
            digest = key.rpartition(":")[2]
            if digest not in self._found:
                blob = await anyio.to_thread.run_sync(_read, key)
                if blob is None or hashlib.sha256(blob).hexdigest() != digest:
                    raise MisuseError(f"Ray's table of functions has no code under {key!r}, which this subtask needs")
                self._found[digest] = loads_code(blob)
            self._found.move_to_end(digest)
        while len(self._found) > max(_KEPT, len(keys)):
            self._found.popitem(last=False)

    def find(self, module: str, qualname: str) -> Any:
        """A :data:`arun.executors.references.Find`.

        :raises MisuseError: this worker can't import the module.
        """
        if module == _CODE:
            return self._found[qualname]
        try:
            return dig(importlib.import_module(module), qualname)
        except ModuleNotFoundError as exc:
            raise MisuseError(
                f"a Ray worker can't import {module!r}, where {qualname} is: {exc}. Give Ray's workers your modules, "
                "for example with RayCluster.connect(runtime_env={'working_dir': '.'})"
            ) from exc


def _job_prefix() -> str:
    job: str = import_ray().get_runtime_context().get_job_id()
    return f"RemoteFunction:{job}:"  # the head node removes what begins so when the job ends


def _write(key: str, blob: bytes) -> None:
    import_ray().experimental.internal_kv._internal_kv_put(key, blob, namespace=_NAMESPACE)


def _read(key: str) -> bytes | None:
    found: bytes | None = import_ray().experimental.internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return found


def _remove(key: str) -> None:
    import_ray().experimental.internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


# -- registered classes --------------------------------------------------------------------------------------


def _dumps_type(entry: Registered) -> bytes:
    forms = (entry.take, entry.build) if entry.given else (None, None)
    try:
        return dumps_code(_Type(entry.cls, entry.name, *forms), f"the registered class {entry.name}")
    except MisuseError as exc:  # only a subtask that is given one need fail
        return dumps_code(_Type(None, entry.name, None, _Refusal(str(exc))), entry.name)


class _Type:
    """Registers a class when it is unpickled."""

    def __init__(
        self, cls: type | None, name: str, take: Callable[[Any], Any] | None, build: Callable[[Any], Any] | None
    ) -> None:
        self._arguments = cls, name, take, build

    def __reduce__(self) -> Any:
        return _register, self._arguments


def _register(
    cls: type | None, name: str, take: Callable[[Any], Any] | None, build: Callable[[Any], Any] | None
) -> str:
    stand_in: Any = cls or type(name, (), {})
    register(stand_in, name=name, encode=take or (build and _Refusal(name)), decode=build)
    return name


class _Refusal:
    """Reads no value of a class that could not be sent here."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __call__(self, value: object) -> Any:
        raise MisuseError(self._why)
