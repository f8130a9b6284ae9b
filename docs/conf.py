"""Sphinx: MyST pages, the furo theme, and a reference that is made from the docstrings of the modules that exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# msgspec reads a Struct's signature off its annotations, some of which name what only type checkers import.
context = importlib.import_module("arun.context")
for name, module in (("Executor", "arun.executors"), ("Ledger", "arun.ledger"), ("Threads", "arun.threads")):
    setattr(context, name, getattr(importlib.import_module(module), name))

# The modules that a user imports from, page by page, in reading order. One that is not there yet is left out.
REFERENCE = {
    "reference/arun": [
        "arun",
        "arun.events",
        "arun.fanout",
        "arun.outcome_stream",
        "arun.timed",
        "arun.executors",
        "arun.reducers",
        "arun.channel",
        "arun.data",
        "arun.store",
        "arun.codec",
        "arun.telemetry",
        "arun.web",
        "arun.web.openai",
        "arun.testing",
        "arun.runtime",
        "arun.errors",
    ],
    "reference/actors": [
        "actors",
        "actors.engine",
        "actors.fitting",
        "actors.echo_engine",
        "actors.remote_engine",
        "actors.models",
    ],
}

project = "arun"
author = "The arun authors"
copyright = "The arun authors, Apache-2.0"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"arun {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_preserve_defaults = True

# Names of other packages: no inventory is fetched, so that the docs build without a network.
nitpick_ignore_regex = [
    (r"py:obj", r"(.*\.)?[A-Z](_co|_contra)?"),  # type variables, which autodoc writes under "Bases:"
    (r"py:.*", r"(anyio|asyncio|collections|context(lib|vars)|msgspec|pyarrow|ray|structlog|trio|typing|vllm)\b.*"),
]


def add_modules(app: Sphinx, page: str, source: list[str]) -> None:
    """Append the reference of every module of the page that can be found."""
    for module in REFERENCE.get(page, []):
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # of its parent
            found = False
        if found:
            package = module.split(".")[0]
            # What the package itself exports is documented there, once.
            shown = importlib.import_module(package).__all__ if module != package else ()
            options = f"   :exclude-members: {', '.join(shown)}\n" if shown else ""
            source[0] += f"\n\n## {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n{options}```\n"


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Find a name where it is documented, not where it is defined.

    A reference that somebody wrote, in a page or a docstring, must lead somewhere (``-n -W``); a type in a signature
    links where it can.
    """
    if node.get("refdomain") != "py":
        return None
    name = re.sub(r"\(\)$", "", node["reftarget"]).split(".")[-1]
    objects: dict[str, Any] = env.domains.python_domain.objects
    found = min((full for full in objects if full.split(".")[-1] == name), key=len, default=None)
    if found is not None:
        entry = objects[found]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, found)
    return None if "refwarn" in node else content


def leave_out(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Leave out what a class has only to say what to write instead (:mod:`arun.burr`)."""
    return True if type(member).__module__ == "arun.burr" else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", leave_out)
    app.connect("source-read", add_modules)
    app.connect("missing-reference", resolve)
