"""``arun batch`` as a user runs it: a process of its own, that is killed and goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from arun.cli.batch import BatchOptions, prepare
from arun.errors import DataError


def chat(custom_id: str, content: str, **options: Any) -> dict[str, Any]:
    body = {"model": "echo", "messages": [{"role": "user", "content": content}], **options}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, *requests: dict[str, Any]) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(request) + b"\n" for request in requests))
    return path


def results(path: Path) -> dict[str, dict[str, Any]]:
    """By custom_id; none is there twice."""
    lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


class Batch:
    """A running ``arun batch``."""

    def __init__(self, folder: Path, *arguments: str, model: str = "echo") -> None:
        self.out = folder / "out.jsonl"
        command = [sys.executable, "-m", "arun.cli", "batch", str(folder / "in.jsonl"), "-o", str(self.out)]
        self.process = subprocess.Popen(
            [*command, "--model", model, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit status and stderr."""
        told, errors = self.process.communicate()
        assert told == ""
        return self.process.returncode, errors

    def until_lines(self, count: int) -> None:
        """Wait until it has written so many results, or ends."""
        while not self.out.exists() or self.out.read_bytes().count(b"\n") < count:
            try:
                self.process.wait(0.02)
                return
            except subprocess.TimeoutExpired:
                pass


def test_chats_and_completions_are_answered_and_errors_are_told_line_by_line(tmp_path: Path) -> None:
    completion = {"model": "echo", "prompt": ["one two", "three"]}
    write(
        tmp_path / "in.jsonl",
        chat("a", "to be or not", max_tokens=2),
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": completion},
        chat("c", "x", model="gpt"),
        chat("d", "x", temprature=1),
        chat("e", "x", stream=True),
    )
    status, errors = Batch(tmp_path).end()
    assert status == 1
    assert "arun: 3 of 5 requests failed; their lines in" in errors
    found = results(tmp_path / "out.jsonl")
    answer = ChatCompletion.model_validate(found["a"]["response"]["body"])
    assert answer.choices[0].message.content == "to be"
    assert [choice["text"] for choice in found["b"]["response"]["body"]["choices"]] == ["one two", "three"]
    assert found["a"]["error"] is None
    assert found["c"]["response"]["status_code"] == 404
    assert found["c"]["error"] == {
        "code": "model_not_found",
        "message": "there is no model 'gpt' here; there are 'echo'",
    }
    assert "unknown field `temprature`" in found["d"]["error"]["message"]
    assert found["e"]["error"]["code"] == "stream"

    again = (tmp_path / "out.jsonl").read_bytes()
    status, errors = Batch(tmp_path).end()
    assert status == 1
    assert "5 requests, 5 have results from before" in errors
    assert (tmp_path / "out.jsonl").read_bytes() == again


def test_embeddings_are_answered(tmp_path: Path) -> None:
    body = {"model": "vectors", "input": ["one two", "three"]}
    write(tmp_path / "in.jsonl", {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body})
    assert Batch(tmp_path, "--name", "vectors").end()[0] == 0
    answer = CreateEmbeddingResponse.model_validate(results(tmp_path / "out.jsonl")["a"]["response"]["body"])
    assert [len(each.embedding) for each in answer.data] == [16, 16]


def test_a_batch_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """By Ctrl-C, then by ``kill -9`` in the middle of a write."""
    requests = [chat(str(n), "word " * (n % 5 + 1), max_tokens=n // 4 + 1, ignore_eos=True) for n in range(120)]
    write(tmp_path / "in.jsonl", *requests)
    before = b""
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        batch = Batch(tmp_path, "--engine-args", '{"token_seconds": 0.05}')
        batch.until_lines(before.count(b"\n") + 20)
        batch.process.send_signal(number)
        assert batch.end()[0] == status
        assert batch.out.read_bytes().startswith(before)
        before = batch.out.read_bytes()
    assert 40 <= before.count(b"\n") < 120
    batch.out.write_bytes(before + b'{"id":"batch_req_1","custom_id":"11')
    status, errors = Batch(tmp_path).end()
    assert status == 0
    assert f"120 requests, {before.count(bytes([10]))} have results from before" in errors
    assert batch.out.read_bytes().startswith(before)
    assert set(results(batch.out)) == {str(n) for n in range(120)}


def test_failures_of_engines_are_tried_again_and_those_of_requests_are_not(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", chat("a", "fine"), chat("b", "poison"), chat("c", "x", nope=1))
    status, _ = Batch(tmp_path, "--engine-args", '{"die_on": "poison"}').end()
    assert status == 1
    found = results(tmp_path / "out.jsonl")
    assert {name: line["response"]["status_code"] for name, line in found.items()} == {"a": 200, "b": 422, "c": 400}
    status, _ = Batch(tmp_path).end()
    assert status == 1
    again = results(tmp_path / "out.jsonl")
    assert {name: line["response"]["status_code"] for name, line in again.items()} == {"a": 200, "b": 200, "c": 400}
    assert (again["a"], again["c"]) == (found["a"], found["c"])


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([b'{"custom_id":"a"'], r"in\.jsonl:1: this is no request of a batch: Input data was truncated"),
        ([b'{"custom_id":"a","url":"/v1/completions"}'], r"in\.jsonl:1: .* missing required field `body`"),
        (
            [b'{"custom_id":"a","url":"/v1/files","body":{}}'],
            r"in\.jsonl:1: POST /v1/files can't be asked for; POST to",
        ),
        (
            [b'{"custom_id":"a","url":"/v1/completions","body":{}}'] * 2,
            r"in\.jsonl:2: the custom_id 'a' is that of line 1",
        ),
        (
            [
                b'{"custom_id":"a","url":"/v1/completions","body":{}}',
                b'{"custom_id":"b","url":"/v1/embeddings","body":{}}',
            ],
            r"in\.jsonl: line 1 for answers and line 2 for embeddings; an engine gives one or the other, so split",
        ),
    ],
)
def test_an_input_that_makes_no_sense_is_refused_before_anything_starts(
    tmp_path: Path, lines: list[bytes], why: str
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    options = BatchOptions(input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl", model="echo", name="echo")
    with pytest.raises(DataError, match=why):
        prepare(options)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (b"my thesis\n", r"out\.jsonl:1: this is no result of a batch; name another file with --output"),
        (
            b'{"id":"x","custom_id":"z","response":null,"error":null}\n',
            r"out\.jsonl:1: this is of 'z', which is not in the input; name another file",
        ),
    ],
)
def test_an_output_of_something_else_is_left_alone(tmp_path: Path, there: bytes, why: str) -> None:
    write(tmp_path / "in.jsonl", chat("a", "x"))
    (tmp_path / "out.jsonl").write_bytes(there)
    status, errors = Batch(tmp_path).end()
    assert status == 2
    assert (tmp_path / "out.jsonl").read_bytes() == there
    options = BatchOptions(input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl", model="echo", name="echo")
    with pytest.raises(DataError, match=why):
        prepare(options)
    assert errors.startswith("arun: ")


def test_an_output_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", chat("a", "x"))
    options = BatchOptions(input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl", model="echo", name="echo")
    todo = prepare(options)
    assert todo.output > 0
    with pytest.raises(DataError, match=r"out\.jsonl is being written by another process; wait for it"):
        prepare(options)


@pytest.mark.engine
def test_a_real_engine_answers_a_batch(tmp_path: Path) -> None:
    requests = [chat(str(n), f"Say {n}.", model="tiny", max_tokens=4, temperature=0) for n in range(5)]
    write(tmp_path / "in.jsonl", *requests, chat("long", "word " * 3000, model="tiny"))
    status, errors = Batch(tmp_path, "--local", "--max-model-len", "256", model="tiny").end()
    assert status == 1, errors
    found = results(tmp_path / "out.jsonl")
    assert len(found) == 6
    for n in range(5):
        answer = ChatCompletion.model_validate(found[str(n)]["response"]["body"])
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
    assert found["long"]["response"]["status_code"] == 400
