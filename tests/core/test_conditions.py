"""when, expr, default and their operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from arun import ApplicationBuilder, Condition, MisuseError, State, action, default, expr, when

pytestmark = pytest.mark.anyio

STATE = State({"n": 3, "kind": "a", "xs": [1, 2], "none": None, "a__b": 7})


@pytest.mark.parametrize(
    ("expected", "holds"),
    [
        ({"n": 3}, True),
        ({"n": 4}, False),
        ({"n": 3, "kind": "b"}, False),
        ({"n__eq": 3}, True),
        ({"n__ne": 3}, False),
        ({"n__lt": 3}, False),
        ({"n__lte": 3}, True),
        ({"n__gt": 2}, True),
        ({"n__gte": 4}, False),
        ({"kind__in": ("a", "b")}, True),
        ({"kind__notin": ("a", "b")}, False),
        ({"xs__contains": 2}, True),
        ({"none__is": None}, True),
        ({"none__isnot": None}, False),
        ({"a__b": 7}, True),
        ({"a__b__gt": 6}, True),
    ],
)
async def test_when_compares_as_its_suffix_says(expected: dict[str, Any], holds: bool) -> None:
    assert await when(**expected).holds(STATE) is holds


def test_when_without_conditions_is_refused() -> None:
    with pytest.raises(MisuseError, match="use default for always"):
        when()


@pytest.mark.parametrize(
    ("source", "holds"),
    [
        ("n > 2", True),
        ("n > 2 and kind in ('b', 'c')", False),
        ("not n == 3 or kind == 'a'", True),
        ("len(xs) + n - 1 == 4", True),
        ("xs[0] == 1 and xs[-1:] == [2]", True),
        ("none is None", True),
        ("(1 if n else 0) == 1", True),
        ("{'a': 1}[kind] == 1 and n in {3}", True),
        ("2 < n < 4", True),
        ("max(xs) // 2 * 1.0 % 2 == 1", True),
    ],
)
async def test_expr_evaluates_over_the_state(source: str, holds: bool) -> None:
    assert await expr(source).holds(STATE) is holds


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("__import__('os')", "may call only"),
        ("n.__class__", "Attribute at column 1 is not allowed"),
        ("[x for x in xs]", "ListComp"),
        ("lambda: 1", "Lambda"),
        ("n := 3", "no Python expression"),
        ("(n := 3)", "NamedExpr"),
        ("2 ** n", "Pow"),
        ("f'{n}'", "JoinedStr"),
        ("kind.lower() == 'a'", r"calls kind.lower\(\); .*pass a function as the condition instead"),
        ("xs[0](1)", "may call only"),
        ("sorted(xs, key=abs)", "may call only"),
        ("n >", "no Python expression"),
        ("n = 3", "no Python expression"),
        ("", "no Python expression"),
        ("n\0", "no Python expression"),
        ("(" * 500 + "n" + ")" * 500, "no Python expression"),
        ("open", None),
    ],
)
async def test_expr_refuses_what_is_no_plain_expression(source: str, message: str | None) -> None:
    if message is None:  # a name is a key and never a builtin
        with pytest.raises(KeyError, match="no key 'open'"):
            await expr(source).holds(STATE)
    else:
        with pytest.raises(MisuseError, match=message):
            expr(source)


def test_expr_takes_a_text_only() -> None:
    wrong: Any = lambda state: state["n"] > 3  # noqa: E731
    with pytest.raises(MisuseError, match="it takes the text of an expression; a function is a condition itself"):
        expr(wrong)


async def test_expr_knows_the_keys_that_it_reads() -> None:
    assert sorted(expr("len(xs) > n and n").keys) == ["n", "xs"]


async def test_conditions_combine() -> None:
    yes, no = when(n=3), expr("n > 3")
    assert await (~no & yes & default).holds(STATE)
    assert not await (~(no | yes)).holds(STATE)
    assert not await (yes & ~default).holds(STATE)
    assert (yes & no).keys == ("n", "n")
    assert repr(~yes | no) == "<Condition (~(n=3)) | (n > 3)>"


async def test_plain_and_async_predicates_are_conditions_too() -> None:
    async def later(state: State) -> bool:
        return bool(state["n"] == 3)

    assert await Condition.lmda(lambda state: state["n"] == 3, ["n"]).holds(STATE)
    assert await Condition(["n"], later).holds(STATE)
    assert await (when(n=3) & later).holds(STATE)  # type: ignore[operator]
    assert await (default & (lambda state: state["xs"])).holds(STATE)  # type: ignore[operator]
    with pytest.raises(MisuseError, match=r"write when\(...\) or expr\('n > 3'\)"):
        when(n=3) | "n > 3"  # type: ignore[operator]


@pytest.mark.parametrize(
    "combine", [lambda: when(n=3) and when(n=4), lambda: when(n=3) or when(n=4), lambda: not when(n=3)]
)
def test_words_do_not_combine_conditions(combine: Callable[[], object]) -> None:
    with pytest.raises(
        MisuseError, match=r"<Condition n=3> is true or false of a State only: combine .* with &, \| and ~"
    ):
        combine()


def test_a_condition_of_the_wrong_kind_is_refused_where_it_is_made() -> None:
    with pytest.raises(MisuseError, match=r"keys='n'\): a list of keys is meant: \['n'\]"):
        Condition.lmda(lambda state: state["n"] > 3, "n")
    with pytest.raises(MisuseError, match="it takes a function of a State"):
        Condition(["n"], True)  # type: ignore[arg-type]


async def test_the_second_of_a_pair_is_not_evaluated_without_need() -> None:
    missing = when(missing=1)
    assert not await (when(n=4) & missing).holds(STATE)
    assert await (when(n=3) | missing).holds(STATE)


@pytest.mark.parametrize("condition", [when(missing=1), ~when(missing=1), expr("missing > 1")])
async def test_an_error_names_the_condition_and_its_transition(condition: Condition) -> None:
    @action(reads=[], writes=["n"])
    async def step(state: State) -> State:
        return state.update(n=1)

    builder = ApplicationBuilder().with_actions(step, last=step).with_entrypoint("step")
    app = builder.with_transitions(("step", "last", condition)).build()
    with pytest.raises(KeyError, match="state has no key 'missing'") as caught:
        await app.arun()
    assert caught.value.__notes__ == [f"in the condition {condition.name} of the transition 'step' -> 'last'"]


async def test_burrs_names_for_conditions_work() -> None:
    assert Condition.default is default
    assert await Condition.when(n=3).holds(STATE)
    assert await Condition.expr("n == 3").holds(STATE)
    assert await Condition.safe_expr("n == 3").holds(STATE)
