"""OpenAI batch files: requests in, results out."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow as pa
import pytest

from arun.data.files import batch_sink, batch_source
from arun.errors import DataError
from tests.data.reading import read, rows, write

REQUESTS = (
    '{"custom_id":"a","method":"POST","url":"/v1/chat/completions",'
    '"body":{"model":"m","messages":[{"role":"user","content":"hi"}]}}\n'
    '{"custom_id":7,"method":"POST","url":"/v1/embeddings","body":{"input":["x", "y"]}}\n'
)


def lines(path: Path) -> list[dict[str, object]]:
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def test_requests_are_rows_whose_body_is_json(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(REQUESTS)
    first, second = rows(batch_source(tmp_path / "in.jsonl"))
    assert first["custom_id"] == "a"
    assert msgspec.json.decode(first["body"])["messages"] == [{"role": "user", "content": "hi"}]
    assert second == {"custom_id": "7", "method": "POST", "url": "/v1/embeddings", "body": '{"input":["x", "y"]}'}


def test_results_are_lines_of_the_batch_api(tmp_path: Path) -> None:
    block = pa.record_batch({
        "custom_id": ["a", "b", "c"],
        "body": ['{"x":1.0}', None, '{"error":{"message":"no"}}'],
        "error": [None, "the engine died", None],
        "status_code": [None, None, 400],
        "request_id": ["r1", "r2", "r3"],
    })
    write(batch_sink(tmp_path / "out.jsonl"), block)
    assert lines(tmp_path / "out.jsonl") == [
        {
            "id": "batch_req_r1",
            "custom_id": "a",
            "response": {"status_code": 200, "request_id": "r1", "body": {"x": 1.0}},
            "error": None,
        },
        {
            "id": "batch_req_r2",
            "custom_id": "b",
            "response": None,
            "error": {"code": "error", "message": "the engine died"},
        },
        {
            "id": "batch_req_r3",
            "custom_id": "c",
            "response": {"status_code": 400, "request_id": "r3", "body": {"error": {"message": "no"}}},
            "error": None,
        },
    ]


def test_bodies_and_errors_may_be_structs(tmp_path: Path) -> None:
    block = pa.record_batch({
        "custom_id": ["a", "b"],
        "body": [{"n": 1}, None],
        "error": [None, {"code": "engine_dead", "message": "it died"}],
    })
    write(batch_sink(tmp_path / "out.jsonl"), block)
    first, second = lines(tmp_path / "out.jsonl")
    assert first["response"]["body"] == {"n": 1}  # type: ignore[index]  # the test says so
    assert str(first["id"]).startswith("batch_req_")
    assert second["error"] == {"code": "engine_dead", "message": "it died"}


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"body": ["{}"]}, "have the columns id, custom_id, .*, 'custom_id' at least; rename or select them"),
        ({"custom_id": ["a"], "answer": ["x"]}, "have the columns .*, not 'answer'"),
        ({"custom_id": ["a"], "body": ["hello"]}, "the body of 'a' is no JSON: .*; encode it"),
        ({"custom_id": [None], "body": ["{}"]}, "a row has no custom_id"),
    ],
)
def test_rows_that_are_no_results_are_refused(tmp_path: Path, columns: dict[str, list[object]], why: str) -> None:
    with pytest.raises(DataError, match=why):
        write(batch_sink(tmp_path / "out.jsonl"), pa.record_batch(columns))


def test_a_broken_request_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(REQUESTS + '{"custom_id":\n')
    with pytest.raises(DataError, match=r"in\.jsonl:3: Input data was truncated"):
        read(batch_source(tmp_path / "in.jsonl"))
