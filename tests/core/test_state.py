"""State against a plain dict."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arun import MisuseError, State

KEYS = st.sampled_from([f"k{i}" for i in range(90)])
OPERATION = st.one_of(
    st.tuples(st.just("update"), st.dictionaries(KEYS, st.integers(), max_size=40)),
    st.tuples(st.just("wipe"), st.lists(KEYS, max_size=10)),
    st.tuples(st.just("keep"), st.lists(KEYS, max_size=60)),
    st.tuples(st.just("increment"), st.dictionaries(KEYS, st.integers(), max_size=3)),
    st.tuples(st.just("merge"), st.dictionaries(KEYS, st.integers(), max_size=70)),
    st.tuples(st.just("commit"), st.none()),
)


def apply(state: State, model: dict[str, Any], name: str, argument: Any) -> tuple[State, dict[str, Any]]:
    match name:
        case "update":
            return state.update(**argument), model | argument
        case "wipe":
            return state.wipe(delete=argument), {k: v for k, v in model.items() if k not in argument}
        case "keep":
            return state.wipe(keep=argument), {k: v for k, v in model.items() if k in argument}
        case "increment":
            return state.increment(**argument), model | {k: model.get(k, 0) + by for k, by in argument.items()}
        case "merge":
            return state.merge(State(argument)), model | argument
        case _:
            return state.scoped(None), model


@given(st.dictionaries(KEYS, st.integers()), st.lists(OPERATION, max_size=25))
def test_a_state_is_a_dict_that_never_changes(initial: dict[str, int], operations: list[tuple[str, Any]]) -> None:
    state, model = State(initial), dict(initial)
    committed = dict(model)
    state = state.scoped(None)
    seen: list[tuple[State, dict[str, Any]]] = []
    for name, argument in operations:
        seen.append((state, dict(model)))
        state, model = apply(state, model, name, argument)
        if name == "commit":
            committed = dict(model)
        assert state == model
        assert dict(state) == state.get_all() == model
        assert len(state) == len(model)
        assert all((key in state) == (key in model) for key in ("k0", "k1", "k89"))
        assert state.get("k3", "none") == model.get("k3", "none")
        delta = state.delta
        assert {k: v for k, v in committed.items() if k not in delta.deleted} | delta.written == model
    assert all(earlier == then for earlier, then in seen)


def test_lists_grow_without_touching_those_of_earlier_states() -> None:
    first = State().append(log="a")
    second = first.append(log="b").extend(log=["c", "d"], other=(1, 2))
    assert first["log"] == ["a"]
    assert second == {"log": ["a", "b", "c", "d"], "other": [1, 2]}


def test_appending_to_what_is_no_list_is_an_error_naming_the_field() -> None:
    with pytest.raises(ValueError, match=r"append\(n=...\): state\['n'\] is non-appendable, it holds a int"):
        State({"n": 1}).append(n=2)
    with pytest.raises(ValueError, match="non-extendable"):
        State({"n": "text"}).extend(n=[2])


def test_increment_takes_floats_and_missing_fields() -> None:
    assert State({"n": 1}).increment(n=0.5, m=2) == {"n": 1.5, "m": 2}


def test_values_are_shared_and_the_mapping_given_is_copied() -> None:
    given, payload = {"big": [1]}, object()
    state = State(given).update(payload=payload)
    given["more"] = [2]
    assert state["payload"] is payload
    assert state.update(x=1)["big"] is given["big"]
    assert "more" not in state


def test_wipe_takes_delete_or_keep_or_nothing() -> None:
    state = State({"a": 1, "b": 2, "c": 3})
    assert state.wipe(delete=["a", "unknown"]) == {"b": 2, "c": 3}
    assert state.wipe(keep=["a"]) == {"a": 1}
    assert state.wipe() == {}
    with pytest.raises(ValueError, match="either delete or keep"):
        state.wipe(delete=["a"], keep=["b"])


@pytest.mark.parametrize("what", ["delete", "keep"])
def test_wipe_takes_no_text_for_a_list_of_keys(what: Any) -> None:
    with pytest.raises(MisuseError, match=rf"a list of keys is meant: wipe\({what}=\['ab'\]\)"):
        State({"a": 1, "ab": 2}).wipe(**{what: "ab"})


def test_a_field_may_be_called_self() -> None:
    state = State().update(self=1).append(me=2).increment(self=1)
    assert state.extend(self_too=[3]) == {"self": 2, "me": [2], "self_too": [3]}
    assert State().append(self=1).extend(self=[2]) == {"self": [1, 2]}


def test_a_deleted_key_can_be_written_again() -> None:
    state = State({"a": 1}).scoped(None).wipe(delete=["a"])
    assert "a" not in state
    assert state.delta.deleted == {"a"}
    assert state.update(a=2).delta.written == {"a": 2}
    assert not state.update(a=2).delta.deleted
    assert state.append(a="x") == {"a": ["x"]}


def test_subset_leaves_out_what_is_missing_or_refuses_it() -> None:
    state = State({"a": 1, "b": 2})
    assert state.subset("a", "c") == {"a": 1}
    with pytest.raises(KeyError, match="no key 'c'; it has: a, b"):
        state.subset("a", "c", ignore_missing=False)


def test_a_missing_key_names_those_that_there_are() -> None:
    with pytest.raises(KeyError, match="no key 'x'; it has: none"):
        State()["x"]


def test_a_state_can_be_copied_and_pickled_but_not_hashed() -> None:
    state = State({"a": [1]}).update(b=2)
    assert pickle.loads(pickle.dumps(state)) == state == copy.copy(state) == copy.deepcopy(state)
    assert repr(state) == "State({'a': [1], 'b': 2})"
    with pytest.raises(TypeError):
        hash(state)


@pytest.mark.parametrize("fields", [1, 63, 64, 65, 129, 1000])
def test_folding_the_overlay_changes_nothing_that_is_seen(fields: int) -> None:
    state = State({"first": 0, "gone": 0}).scoped(None).wipe(delete=["gone"])
    for i in range(fields):
        state = state.update(**{f"k{i}": i})
    assert list(state) == ["first", *(f"k{i}" for i in range(fields))]
    assert len(state.delta.written) == fields
    assert state.delta.deleted == {"gone"}
    assert "gone" not in state


def test_only_a_number_is_incremented() -> None:
    with pytest.raises(ValueError, match=r"increment\(s=1\): state\['s'\] is non-integer, it holds a str"):
        State({"s": "a"}).increment(s=1)
    with pytest.raises(ValueError, match=r"increment\(n='1'\): it is given a str; increment\(\) needs numbers"):
        State({"n": 1}).increment(n="1")  # type: ignore[arg-type]
