"""Paths: from what a user names (files, folders, globs, lists, URLs) to files, in an order that is always the same.

A folder stands for the files below it that have one of the format's suffixes, but for hidden ones (``.name``,
``_name``). A glob, as in a shell with ``**``, and a file may have any suffix. Files of one folder or glob come sorted
by path, those of a list in its order. Folders below what was named, such as ``year=2024``, are columns: see
:mod:`arun.data.files.partitions`.

``s3://`` and ``gs://`` go through pyarrow's own file systems, other URLs through fsspec. ``filesystem=`` takes those of
either.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Final, TypeAlias

import fsspec
import fsspec.utils
import msgspec
import pyarrow.fs

from arun.errors import DataError, MisuseError

__all__ = ("File", "Listing", "Paths", "locate", "public")

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_NATIVE: Final = {"s3", "gs", "gcs"}
_SECRET: Final = re.compile(r"://[^/@\s]*@")
_LOCAL: Final = pyarrow.fs.LocalFileSystem()
_Type: Final = pyarrow.fs.FileType


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was found.

    :ivar path: in its file system.
    :ivar size: bytes.
    :ivar changed: nanoseconds since 1970, where the file system tells.
    :ivar folders: names of those between what was named and the file; see :mod:`arun.data.files.partitions`.
    """

    filesystem: Any
    path: str
    size: int | None
    changed: int | None
    folders: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What it is called, and how it looked: the same as long as it is the same file."""
        return f"{self.path} {self.size} {self.changed}"

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    def open(self) -> Any:
        """Open it for reading at any place."""
        return self.filesystem.open_input_file(self.path)

    def stream(self) -> Any:
        """Open it for reading from its beginning, decompressed as its suffix says."""
        return self.filesystem.open_input_stream(self.path, compression="detect")

    @property
    def is_compressed(self) -> bool:
        return self.path.endswith(_COMPRESSED)


_COMPRESSED: Final = (".gz", ".bz2", ".lz4", ".zst", ".br")


class Listing:
    """The files that a user has named. They are looked for once, when they are first needed.

    :param paths: a file, a folder, a glob, a URL of one, or several of them.
    :param suffixes: of the format, such as ``.parquet``; a compressed file's has another behind it.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """

    def __init__(self, paths: Paths, suffixes: tuple[str, ...], filesystem: Any = None) -> None:
        if not isinstance(paths, str | os.PathLike | Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"{paths!r} is no path; give a file, a folder, a glob, a URL, or a list of these")
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        self._given = [os.fspath(path) for path in given]
        self._suffixes = suffixes
        self._filesystem = filesystem

    def __str__(self) -> str:
        more = len(self._given) - 1
        return f"{public(self._given[0]) if self._given else 'nothing'}{f' and {more} more' if more > 0 else ''}"

    @cached_property
    def files(self) -> tuple[File, ...]:
        """The files.

        :raises DataError: a path stands for none, or a file is named twice.
        """
        if not self._given:
            raise DataError(f"no path is given; name a file, a folder or a glob with {self._kinds()} files")
        found: dict[tuple[str, str], str] = {}
        files: list[File] = []
        for named in self._given:
            filesystem, path = locate(named, self._filesystem)
            given = public(named)
            root, infos = self._expand(filesystem, path, given)
            for info in infos:
                place = (filesystem.type_name, info.path)
                if place in found:
                    raise DataError(f"{info.path} is named twice, by {found[place]!r} and by {given!r}")
                found[place] = given
                folders = tuple(info.path[len(root) :].strip("/").split("/")[:-1])
                file = File(
                    filesystem=filesystem, path=info.path, size=info.size, changed=info.mtime_ns, folders=folders
                )
                files.append(file)
        return tuple(files)

    def _expand(self, filesystem: Any, path: str, given: str) -> tuple[str, Iterable[Any]]:
        """The files that a path stands for, and the folder below which their own folders mean something."""
        info = filesystem.get_file_info(path)
        if info.type == _Type.File:
            return path.rpartition("/")[0], [info]
        if info.type == _Type.Directory:
            return path, self._in_folder(filesystem, path, given)
        if re.search(r"[*?[]", path):
            return _plain(path), _matching(filesystem, path, given)
        raise DataError(f"{given!r} does not exist{_hint(filesystem, path)}")

    def _in_folder(self, filesystem: Any, path: str, given: str) -> list[Any]:
        infos = list(_files(filesystem, path))
        kept = [info for info in infos if self._is_ours(info.path)]
        if not kept:
            names = [os.path.basename(info.path) for info in infos[:3]]
            has = f"has {len(infos)} other files, such as {', '.join(names)}" if infos else "is empty"
            raise DataError(f"the folder {given!r} has no {self._kinds()} file; it {has}")
        return kept

    def _is_ours(self, path: str) -> bool:
        stem, ending = os.path.splitext(path)
        return path.endswith(self._suffixes) or (ending in _COMPRESSED and stem.endswith(self._suffixes))

    def _kinds(self) -> str:
        return " or ".join(self._suffixes)


def locate(given: str, filesystem: Any = None) -> tuple[Any, str]:
    """The file system of pyarrow, and the path in it, that a path or URL means.

    :raises DataError: the URL's kind is not known, or needs a package that is not there.
    """
    if not given:
        raise DataError("the path is empty; name a file or a folder, which may be '.'")
    if filesystem is not None:
        wrapped = filesystem
        if not isinstance(filesystem, pyarrow.fs.FileSystem):
            wrapped = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
        return wrapped, given.partition("://")[2] or given
    scheme, separator, rest = given.partition("://")
    if not separator:
        return _LOCAL, os.path.abspath(os.path.expanduser(given))
    if scheme == "file":
        return _LOCAL, os.path.abspath(rest)
    try:
        if scheme in _NATIVE:
            path, _, options = rest.partition("?")
            bucket, slash, key = path.partition("/")
            # The path is kept out of it, as globs are no URIs.
            native, bucket = pyarrow.fs.FileSystem.from_uri(f"{scheme}://{bucket}?{options}")
            return native, f"{bucket}{slash}{key}".rstrip("/")
        remote, path = fsspec.url_to_fs(given)
    except (ImportError, ValueError, OSError) as exc:
        raise DataError(f"{public(given)}: {public(str(exc))}") from None  # whose message may have the secret
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(remote)), path


def public(text: str) -> str:
    """A URL, or a text with one, without its key or password: what names, plans and errors show."""
    return _SECRET.sub("://***@", text)


def _files(filesystem: Any, folder: str, *, recursive: bool = True, hidden: bool = False) -> Iterator[Any]:
    """The files below a folder, sorted by path."""
    selector = pyarrow.fs.FileSelector(folder, recursive=recursive)
    skip = len(folder.rstrip("/")) + 1
    for info in sorted(filesystem.get_file_info(selector), key=lambda info: info.path):
        names = info.path[skip:].split("/")
        if info.type == _Type.File and (hidden or not any(name.startswith((".", "_")) for name in names)):
            yield info


def _matching(filesystem: Any, pattern: str, given: str) -> list[Any]:
    folder = _plain(pattern)
    rest = pattern[len(folder.rstrip("/")) :]
    matches = re.compile(fsspec.utils.glob_translate(pattern)).match
    found: list[Any] = []
    if filesystem.get_file_info(folder).type == _Type.Directory:
        recursive = "/" in rest[1:] or "**" in rest
        infos = _files(filesystem, folder, recursive=recursive, hidden=re.search(r"/[._]", rest) is not None)
        found = [info for info in infos if matches(info.path)]
    if not found:
        raise DataError(f"{given!r} matches no file{_hint(filesystem, pattern)}")
    return found


def _plain(pattern: str) -> str:
    """The folder that a glob looks into."""
    return re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0] or "/"


def _hint(filesystem: Any, path: str) -> str:
    """What is there instead, as the rest of a sentence."""
    folder, _, wanted = path.rpartition("/")
    if filesystem.get_file_info(folder or "/").type != _Type.Directory:
        return f"; there is no folder {folder!r}"
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(folder or "/"))
    names = [info.base_name for info in infos if not info.base_name.startswith(".")]
    near = difflib.get_close_matches(wanted, names, n=3) or sorted(names)[:3]
    return f"; in {folder!r} there is {', '.join(near) or 'nothing'}"
