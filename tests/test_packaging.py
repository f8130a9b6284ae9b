"""What a package must be beside correct: light to import, layered, declared, and whole when built."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# A module imports from its own floor and below, never from above; what it needs from above it takes as a Protocol.
# A new module gets its floor here.
FLOORS: dict[str, int] = {
    name: floor
    for floor, names in enumerate((
        "burr errors frames logs",
        "codec events guards outcomes policies registry runtime state timed",
        "conditions context handles hooks hosted hosting threads",
        "attempts calls collectors reductions signatures stream",
        "kernel",
        "fanout",
        "actions batch_lines channel data journal outcome_stream reducers",
        "graph sources",
        "keys",
        "ledger",
        "resume subgraphs subtasks",
        "parallel",
        "application executors",
        "builder",
        "store telemetry testing web",
        "cli",
    ))
    for name in names.split()
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {name_of(path): path for package in ("arun", "actors") for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text())


class Import(NamedTuple):
    target: str
    line: int
    lazy: bool
    typing_only: bool


def imports(module: str) -> Iterator[Import]:
    """What a module imports from arun and actors; ``from arun import x`` may mean the module ``arun.x``."""

    def walk(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy, typing_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(inner if inner in PATHS else str(node.module), node.lineno, lazy, typing_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, lazy, True)
            for child in node.orelse:
                yield from walk(child, lazy, typing_only)
        else:
            lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, lazy, typing_only)

    for found in walk(tree_of(module), lazy=False, typing_only=False):
        if found.target.split(".")[0] in {"arun", "actors"}:
            yield found


def room(module: str) -> str:
    """The part of arun that a module belongs to: "channel" for ``arun.channel.codec``, "" for ``arun`` itself."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("arun", "ray vllm torch transformers numpy pyarrow actors"),
        ("arun.data", "ray vllm torch transformers pandas duckdb actors"),
        ("actors", "ray vllm torch transformers numpy pyarrow"),
    ],
)
def test_importing_the_package_leaves_the_heavy_parts_alone(module: str, unwanted: str) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not set(unwanted.split()) & set(loaded)


def test_no_module_imports_ray_vllm_or_torch_before_a_function_needs_it() -> None:
    """Also not the modules that ``import actors`` does not load."""
    heavy = {"ray", "vllm", "torch", "transformers"}
    for name in PATHS:
        for node in tree_of(name).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found = heavy & {target.split(".")[0] for target in names}
            assert not found, (
                f"{name}:{node.lineno} imports {found} when it is loaded; import it in the function that needs it"
            )


def test_every_module_of_arun_has_a_floor() -> None:
    rooms = {room(name) for name in PATHS if name.startswith("arun.") and not name.endswith("__main__")}
    assert rooms <= set(FLOORS), f"give {sorted(rooms - set(FLOORS))} a floor in FLOORS"


def test_imports_inside_arun_go_down() -> None:
    for name in PATHS:
        if name.startswith("arun.") and not name.endswith("__main__"):
            for target, line, _, typing_only in imports(name):
                if target.startswith("arun.") and not typing_only:
                    here, there = room(name), room(target)
                    assert FLOORS.get(there, 0) <= FLOORS.get(here, 99), (
                        f"{name}:{line} imports {target}, which stands above it"
                    )


def test_arun_imports_actors_only_in_functions_of_its_outermost_rooms() -> None:
    for name in PATHS:
        if name.startswith("arun"):
            for target, line, lazy, typing_only in imports(name):
                if target.split(".")[0] == "actors":
                    assert room(name) in {"cli", "web"}, f"{name}:{line}: arun does not know {target}"
                    assert lazy or typing_only, f"{name}:{line}: import {target} in the function that needs it"


def test_actors_does_not_import_the_outermost_rooms_of_arun() -> None:
    for name in PATHS:
        if name.startswith("actors"):
            for target, line, _, _ in imports(name):
                assert room(target) not in {"cli", "web"} or target.startswith("actors"), (
                    f"{name}:{line} imports {target}"
                )


def test_no_modules_import_each_other() -> None:
    graph = {
        name: {i.target for i in imports(name) if i.target != name and not i.lazy and not i.typing_only}
        for name in PATHS
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail("a cycle of imports: " + " <- ".join(exc.args[1]))


@pytest.mark.parametrize("name", [name for name in PATHS if not name.endswith("__main__")])
def test_a_module_declares_what_is_public(name: str) -> None:
    if all(isinstance(node, ast.Expr) for node in tree_of(name).body):  # a docstring only
        return
    module = importlib.import_module(name)
    declared = getattr(module, "__all__", None)
    assert isinstance(declared, tuple), f"{name} has no __all__ = (...)"
    assert len(set(declared)) == len(declared)
    missing = [public for public in declared if not hasattr(module, public)]
    assert not missing, f"{name}.__all__ names {missing}, which it does not have"


@pytest.mark.parametrize("name", PATHS)
def test_a_file_has_one_job(name: str) -> None:
    lines = PATHS[name].read_text().count("\n")
    assert lines <= 600, f"{PATHS[name]} has {lines} lines; split it"


def test_every_suppression_of_a_linter_gives_its_reason() -> None:
    bare = re.compile(r"#\s*(noqa(:\s*[A-Z0-9, ]+)?|type:\s*ignore(\[[\w, -]+\])?|pyright:\s*ignore(\[[\w, ]+\])?)\s*$")
    for path in PATHS.values():
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not bare.search(line), f"{path}:{number}: say why, beside it"


def test_the_version_is_the_one_on_top_of_the_changelog() -> None:
    top = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert top is not None
    assert top[1] == PROJECT["version"]
    try:
        installed = version(PROJECT["name"])
    except PackageNotFoundError:  # run from a checkout that is only on PYTHONPATH
        return
    assert installed == PROJECT["version"]


def test_the_extras_are_those_that_errors_and_docs_name() -> None:
    extras = set(PROJECT["optional-dependencies"])
    assert {"ray", "vllm", "cpu", "data", "web", "postgres", "redis", "otel", "demo", "dev", "docs"} <= extras
    for path in (*PATHS.values(), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for named in re.findall(r"arun-runtime\[([\w,]+)\]", path.read_text()):
            assert set(named.split(",")) <= extras, f"{path} names the extra {named!r}"


def test_a_wheel_holds_both_packages_typed_and_licensed_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        names = built.namelist()
        metadata = built.read(f"arun_runtime-{PROJECT['version']}.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"arun", "actors", f"arun_runtime-{PROJECT['version']}.dist-info"}
    assert {"arun/py.typed", "actors/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata


def test_nothing_committed_names_this_machine_or_a_registry() -> None:
    """A user's own configuration of pip says where packages come from."""
    host = re.compile(r"--(extra-)?index-url|--find-links|https?://[\w.-]*(pypi|pythonhosted|pytorch)\.org")
    for path in (ROOT / "pyproject.toml", ROOT / "Makefile", *(ROOT / ".ci").iterdir()):
        assert not host.search(path.read_text()), path
