"""Paths: which files are meant, in which order, and what a user is told when there are none."""

from __future__ import annotations

import traceback
from pathlib import Path

import fsspec
import pyarrow.fs
import pytest

from arun.data import read_parquet
from arun.data.files.paths import Listing, locate
from arun.errors import DataError, MisuseError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def found(folder: Path, paths: object) -> list[str]:
    return [str(Path(file.path).relative_to(folder)) for file in Listing(paths, (".txt",)).files]  # type: ignore[arg-type]  # a str, a Path or a list


def test_a_folder_stands_for_its_files_of_that_format_sorted(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a/z.txt", "c.txt.gz", "notes.md", "_SUCCESS", ".arun-1-b.txt", "_old/d.txt")
    assert found(tmp_path, tmp_path) == ["a/z.txt", "b.txt", "c.txt.gz"]


def test_a_glob_takes_any_suffix_and_no_hidden_files(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a.md", ".c.txt", "deep/d.txt", "deep/er/e.txt")
    assert found(tmp_path, f"{tmp_path}/*") == ["a.md", "b.txt"]
    assert found(tmp_path, f"{tmp_path}/**/*.txt") == ["b.txt", "deep/d.txt", "deep/er/e.txt"]
    assert found(tmp_path, f"{tmp_path}/d*/d.txt") == ["deep/d.txt"]
    assert found(tmp_path, f"{tmp_path}/[ab].*") == ["a.md", "b.txt"]


def test_a_hidden_file_is_found_by_a_glob_that_says_so(tmp_path: Path) -> None:
    make(tmp_path, "_a.txt", "b.txt")
    assert found(tmp_path, f"{tmp_path}/_*.txt") == ["_a.txt"]


def test_a_list_keeps_its_order(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.txt", "more/c.txt")
    assert found(tmp_path, [tmp_path / "b.txt", str(tmp_path / "more"), tmp_path / "a.txt"]) == [
        "b.txt",
        "more/c.txt",
        "a.txt",
    ]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    make(tmp_path, "a[1].txt", "a1.txt")
    assert found(tmp_path, tmp_path / "a[1].txt") == ["a[1].txt"]


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    with pytest.raises(DataError, match=r"a\.txt is named twice, by '.*\*' and by '.*a\.txt'"):
        found(tmp_path, [f"{tmp_path}/*", f"{tmp_path}/a.txt"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("prompt.txt", r"'.*prompt\.txt' does not exist; in '.*' there is prompts\.txt"),
        ("no/such.txt", r"'.*such\.txt' does not exist; there is no folder '.*/no'"),
        ("*.csv", r"'.*\*\.csv' matches no file; in '.*' there is "),
        ("other", r"the folder '.*' has no \.txt file; it has 1 other files, such as a\.md"),
        ("empty", r"the folder '.*' has no \.txt file; it is empty"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(tmp_path: Path, path: str, message: str) -> None:
    make(tmp_path, "prompts.txt", "other/a.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        found(tmp_path, tmp_path / path)


def test_no_paths_at_all_are_refused() -> None:
    with pytest.raises(DataError, match=r"no path is given; name a file, a folder or a glob with \.txt files"):
        _ = Listing([], (".txt",)).files


def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(DataError, match=r"the path is empty; name a file or a folder, which may be '\.'"):
        _ = Listing("", (".txt",)).files
    with pytest.raises(MisuseError, match="None is no path; give a file, a folder, a glob, a URL, or a list of these"):
        Listing(None, (".txt",))  # type: ignore[arg-type]  # a mistake


def test_a_kind_of_url_that_nobody_knows_is_refused() -> None:
    with pytest.raises(DataError, match=r"nope://x: Protocol not known: nope"):
        _ = Listing("nope://x", (".txt",)).files


def test_urls_go_through_fsspec() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/paths/b.txt": b"", "/paths/a.txt": b"hello", "/paths/deep/c.txt": b""})
    try:
        assert [file.path for file in Listing("memory://paths", (".txt",)).files] == [
            "/paths/a.txt",
            "/paths/b.txt",
            "/paths/deep/c.txt",
        ]
        (file,) = Listing("memory://paths/a*.txt", (".txt",)).files
        with file.open() as opened:
            assert opened.read() == b"hello"
    finally:
        memory.rm("/paths", recursive=True)


def test_buckets_go_through_pyarrow_with_the_options_of_their_urls() -> None:
    filesystem, path = locate("gs://anonymous@bucket/deep/a*.parquet")
    assert (filesystem.type_name, path) == ("gcs", "bucket/deep/a*.parquet")


def test_a_file_system_of_either_kind_can_be_given(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    for filesystem in (pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()),):
        assert [file.path for file in Listing("a.txt", (".txt",), filesystem).files] == ["a.txt"]
    local = fsspec.filesystem("dir", path=str(tmp_path), target_protocol="file")
    assert [file.size for file in Listing("a.txt", (".txt",), local).files] == [1]


def test_a_key_changes_with_the_file(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    before = Listing(tmp_path, (".txt",)).files[0].key
    assert Listing(tmp_path, (".txt",)).files[0].key == before
    (tmp_path / "a.txt").write_text("xy")
    assert Listing(tmp_path, (".txt",)).files[0].key != before


def test_the_key_in_a_url_is_shown_nowhere() -> None:
    url = "s3://KEY:SECRET@bucket/in.parquet?endpoint_override=127.0.0.1:9&scheme=http"
    copy = read_parquet(url).write_parquet(url.replace("in.parquet", "out/"))
    assert "s3://***@bucket/out/" in repr(copy)
    for shown in (repr(copy), copy.explain(), copy.explain(format="mermaid")):
        assert "SECRET" not in shown


@pytest.mark.parametrize("url", ["nonsense://KEY:SECRET@host/in.parquet", "s3://KEY:SECRET@[bucket/in.parquet"])
def test_nor_is_it_by_the_error_of_a_wrong_one(url: str) -> None:
    with pytest.raises(DataError, match=r"^\w+://\*\*\*@") as caught:
        locate(url)
    assert "SECRET" not in "".join(traceback.format_exception(caught.type, caught.value, None))
