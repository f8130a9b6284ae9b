"""Explaining a plan: what was asked for, what the rules made of it, and the stages that run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from arun.data.checkpoint.job import obstacle
from arun.data.logical import Node, OneToOne, Plan, Write
from arun.data.physical import PhysicalPlan, Stage, inline
from arun.data.segments import segments

__all__ = ("as_mermaid", "as_text")


def as_text(logical: Plan, optimised: Plan, physical: PhysicalPlan) -> str:
    """Three plans, roots first, what they read below them, indented where it is more than one."""
    return "\n".join((
        "logical:",
        *_tree(logical.roots),
        "optimised:",
        *_tree(optimised.roots),
        "physical:",
        *_stages(physical),
        *_checkpoint(optimised),
    ))


def as_mermaid(physical: PhysicalPlan) -> str:
    """The stages as a mermaid flowchart: an arrow is a queue, a dashed one spills to disk."""
    lines = ["flowchart LR"]
    for stage in physical.stages:
        lines.append(f'    s{stage.number}["{_quoted(stage.name)}"]')
        lines.extend(
            f"    s{below.number} {'-.->' if below.apart else '-->'} s{stage.number}" for below in _read_by(stage)
        )
    for number, (root, sink) in enumerate(zip(physical.roots, physical.sinks, strict=True)):
        if sink is not None:
            lines.append(f'    w{number}["{_quoted(sink.label)}"]')
            lines.append(f"    s{root.number} {'-.->' if root.apart else '-->'} w{number}")
    return "\n".join(lines)


def _checkpoint(plan: Plan) -> Iterator[str]:
    if any(isinstance(root, Write) for root in plan.roots):
        why = obstacle(plan)
        yield f"checkpoint: {'possible' if why is None else f'refused, {why}'}"


def _tree(roots: Sequence[Node]) -> Iterator[str]:
    numbers: dict[int, int] = {}
    todo: list[tuple[Node, int]] = [(root, 1) for root in reversed(roots)]
    while todo:
        node, depth = todo.pop()
        indent = "  " * depth
        if node.id in numbers:
            yield f"{indent}[{numbers[node.id]}] again, shared"
            continue
        numbers[node.id] = len(numbers)
        joined = " (in one stage with what is below)" if inline(node) else ""
        yield f"{indent}[{numbers[node.id]}] {node.label}{joined}"
        deeper = depth if len(node.inputs) == 1 else depth + 1
        todo.extend((below, deeper) for below in reversed(node.inputs))


def _stages(plan: PhysicalPlan) -> Iterator[str]:
    for stage in plan.stages:
        inputs = ", ".join(f"[{below.number}]" for below in _read_by(stage))
        tee = ""
        if stage.readers > 1:
            tee = f"; {stage.readers} readers" + (", which may be apart: spills to disk" if stage.apart else "")
        yield f"  [{stage.number}] {stage.name}{f' <- {inputs}' if inputs else ''}{tee}"
        if isinstance(stage.top, OneToOne):
            parts = segments(stage.top.steps)
            if len(parts) > 1 or parts[0].kind != "plain":
                yield from (f"        {part.label}" for part in parts)
    for root, sink in zip(plan.roots, plan.sinks, strict=True):
        yield f"  result <- [{root.number}]" if sink is None else f"  {sink.label} <- [{root.number}]"


def _read_by(stage: Stage) -> list[Stage]:
    return list(stage.inputs.values())


def _quoted(text: str) -> str:
    return text.replace('"', "'")
