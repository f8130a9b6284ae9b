"""Engines and actors as steps of a dataset: real pools and actors, with an engine that needs no model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from actors.actor import actor
from actors.engine import EngineSpec
from actors.local_cluster import LocalCluster
from actors.members.supervision import Backoff, Supervisor
from actors.pool import EnginePool
from arun import MisuseError, Runtime
from arun.data import Dataset, from_rows, read_jsonl
from arun.errors import CheckpointError, RequestError
from tests.data.mortal import Mortal

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]
Row = dict[str, Any]


@contextlib.asynccontextmanager
async def open_pool(*, runner: Any = "generate", replicas: int = 1, **options: Any) -> AsyncIterator[EnginePool]:
    spec = EngineSpec(model="echo", engine="echo", runner=runner, engine_args=options)
    async with (
        Runtime(),
        LocalCluster(isolation="task", cpus=8) as cluster,
        EnginePool(cluster, spec, replicas=replicas) as pool,
    ):
        yield pool


def prompts(*texts: str) -> Dataset:
    return from_rows([{"id": number, "prompt": text} for number, text in enumerate(texts)])


async def test_each_row_gets_its_answer_and_what_it_took() -> None:
    async with open_pool(replicas=2) as pool:
        rows = await prompts("to be or not", "a b").generate(pool, max_tokens=2).take()
    assert rows == [
        {
            "id": 0,
            "prompt": "to be or not",
            "answer": "to be",
            "answer_finish_reason": "length",
            "answer_prompt_tokens": 4,
            "answer_completion_tokens": 2,
        },
        {
            "id": 1,
            "prompt": "a b",
            "answer": "a b",
            "answer_finish_reason": "stop",
            "answer_prompt_tokens": 2,
            "answer_completion_tokens": 2,
        },
    ]


async def test_a_prompt_that_can_not_be_computed_is_the_row_s_error() -> None:
    rows = from_rows([{"n": 0, "of": {"text": "x"}}, {"n": 1, "of": None}])

    def prompt(row: Row) -> str:
        return str(row["of"]["text"])

    async with open_pool() as pool:
        good, bad = await rows.generate(pool, prompt=prompt, rows={"on_error": "collect"}).take()
        assert (good["answer"], good["error"]) == ("x", None)
        assert bad["error"].startswith("TypeError: ")
        with pytest.raises(TypeError) as caught:
            await rows.generate(pool, prompt=prompt).take()
    assert any(note.startswith("in generate(answer), row 1 of what") for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_token": 3}, "no sampling parameter 'max_token'; did you mean 'max_tokens'"),
        ({"max_tokens": 0}, r"Expected `int` >= 1 - at `\$\.max_tokens`"),
        ({"lane": "slow"}, "lane='slow': it must be 'interactive' or 'batch'"),
        ({"chat_template": "x"}, "only chat messages have a template"),
    ],
    ids=str,
)
async def test_options_that_no_row_could_have_are_refused_where_they_are_said(options: Any, told: str) -> None:
    async with open_pool() as pool:
        with pytest.raises(RequestError, match=told):  # not by each row, which on_error="skip" would leave out
            prompts("x").generate(pool, rows={"on_error": "skip"}, **options)
        prompts("x").chat(pool, chat_template="x", max_tokens=3, priority=1)


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (lambda rows: rows.generate(None), r"None has no complete\(\); give an EnginePool"),
        (lambda rows: rows.embed("pool"), r"a str, 'pool' has no embed\(\); give an EnginePool"),
        (lambda rows: rows.map_actor(None, Adder, "add"), "was given None; it takes a LocalCluster"),
        (lambda rows: rows.map_actor(SimpleNamespace(spawn=print), 3, "x"), "was given an int, 3; it takes an actor's"),
    ],
)
async def test_what_is_no_engine_or_actor_is_refused_where_it_is_said(step: Any, told: str) -> None:
    with pytest.raises(MisuseError, match=told):
        step(prompts("x"))


async def test_a_prompt_may_be_computed_and_a_chat_may_be_text() -> None:
    async with open_pool() as pool:
        dataset = prompts("x").generate(pool, prompt=lambda row: f"{row['prompt']} y", output="said", max_tokens=8)
        assert (await dataset.take())[0]["said"] == "x y"
        chat = prompts("hello you").chat(pool, messages="prompt", max_tokens=8)
        assert (await chat.take())[0]["answer"] == "hello you"
        messages = from_rows([{"messages": [{"role": "user", "content": "hello you"}]}])
        assert (await messages.chat(pool, max_tokens=8).take())[0]["answer"] == "hello you"


async def test_a_refused_prompt_is_a_failed_row_by_policy() -> None:
    async with open_pool(fail_on="poison") as pool:
        dataset = prompts("good", "poison", "fine")
        rows = await dataset.generate(pool, rows={"on_error": "collect"}).take()
        assert [row["answer"] for row in rows] == ["good", None, "fine"]
        assert "poison" in rows[1]["error"]
        assert await dataset.generate(pool, rows={"on_error": "skip"}).map_batches(lambda batch: batch).count() == 2
        with pytest.raises(RequestError) as caught:
            await dataset.generate(pool).collect()
        assert any("in generate(answer), row 1" in note for note in caught.value.__notes__)


async def test_a_prompt_column_that_is_not_there_is_told() -> None:
    async with open_pool() as pool:
        with pytest.raises(
            MisuseError, match="there is no column 'question' with the prompt; the columns are id, prompt"
        ):
            await prompts("x").generate(pool, prompt="question").collect()


async def test_rows_that_begin_alike_are_asked_together_and_come_in_order() -> None:
    asked: list[str] = []

    class Noting:
        batch_limit = 1

        async def complete(self, prompt: str, **options: Any) -> Any:
            asked.append(prompt)
            usage = SimpleNamespace(prompt_tokens=1, completion_tokens=1)
            return SimpleNamespace(text=prompt, finish_reason="stop", usage=usage)

    texts = [f"system {i % 3} question {i}" for i in range(9)]
    table = await prompts(*texts).generate(Noting()).collect()
    assert asked == sorted(texts)
    assert table["answer"].to_pylist() == texts
    asked.clear()
    await prompts(*texts).generate(Noting(), by_prefix=False).collect()
    assert asked == texts


async def test_a_chat_may_begin_with_what_the_system_says() -> None:
    class Noting:
        async def complete(self, prompt: Any, **options: Any) -> Any:
            usage = SimpleNamespace(prompt_tokens=1, completion_tokens=1)
            return SimpleNamespace(text=json.dumps(prompt), finish_reason="stop", usage=usage)

    (row,) = await prompts("hello").chat(Noting(), messages="prompt", system="be kind").take()
    assert json.loads(row["answer"]) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
    ]


async def test_the_fields_of_an_answer_become_columns() -> None:
    class Verdict(msgspec.Struct):
        good: bool
        score: int

    class Judge:
        async def complete(self, prompt: str, *, structured_outputs: type, lane: str) -> Any:
            assert structured_outputs is Verdict
            usage = SimpleNamespace(prompt_tokens=1, completion_tokens=1)
            text = json.dumps({"good": True, "score": len(prompt)}) if prompt != "bad" else "{"
            return SimpleNamespace(text=text, finish_reason="stop", usage=usage)

    judged = prompts("abc", "bad").generate(Judge(), fields=Verdict, rows={"on_error": "collect"})
    first, second = await judged.take()
    assert (first["good"], first["score"], first["error"]) == (True, 3, None)
    assert second["good"] is None
    assert "truncated" in second["error"]


async def test_a_pool_answers_in_fields() -> None:
    class Verdict(msgspec.Struct):
        good: bool
        score: int

    async with open_pool() as pool:
        rows = prompts('{"good": true, "score": 3}').generate(pool, fields=Verdict, max_tokens=64)
        (row,) = await rows.take()
    assert (row["good"], row["score"], row["answer_finish_reason"]) == (True, 3, "stop")


async def test_each_row_gets_its_vector() -> None:
    async with open_pool(runner="pooling") as pool:
        table = await prompts("a b", "c").embed(pool, prompt="prompt").collect()
    assert [len(vector) for vector in table["embedding"].to_pylist()] == [16, 16]
    assert str(table.schema.field("embedding").type.value_type) == "float"
    assert table["embedding_prompt_tokens"].to_pylist() == [2, 1]


async def test_a_replica_that_dies_costs_no_row() -> None:
    async with open_pool(replicas=2, die_after=200) as pool:
        table = await prompts(*[f"w{i} x y z" for i in range(120)]).generate(pool, max_tokens=4).collect()
    assert table["answer"].to_pylist() == [f"w{i} x y z" for i in range(120)]


@actor(concurrency=2)
class Adder:
    def __init__(self, by: int) -> None:
        self.by = by

    async def add(self, row: dict[str, int]) -> dict[str, int]:
        return {"n": row["n"] + self.by}


async def test_rows_go_to_actors_that_live_as_long_as_the_run() -> None:
    async with Runtime(), LocalCluster(isolation="task", cpus=8) as cluster:
        dataset = from_rows([{"n": i} for i in range(20)]).map_actor(cluster, Adder, "add", 5, replicas=3, in_flight=2)
        assert (await dataset.collect())["n"].to_pylist() == list(range(5, 25))
        assert cluster.list() == []
        assert "map_actor(Adder.add)" in dataset.explain()
        (step,) = dataset.stats().stages[0].steps
        assert step.peak_in_flight == 6
        with pytest.raises(MisuseError, match="has no method 'sub'"):
            from_rows([]).map_actor(cluster, Adder, "sub")


AT_ONCE = Supervisor(intensity=20, backoff=Backoff(first=0.0))


@pytest.mark.parametrize("restarts", [None, AT_ONCE])
async def test_a_row_whose_actor_was_killed_is_asked_again(tmp_path: Path, restarts: Supervisor | None) -> None:
    async with Runtime(), LocalCluster(cpus=8) as cluster:
        rows = from_rows([{"n": i} for i in range(12)])
        added = rows.map_actor(cluster, Mortal, "add", str(tmp_path), replicas=3, in_flight=2, restarts=restarts)
        assert (await added.collect())["n"].to_pylist() == list(range(1, 13))
        assert added.stats().stages[0].steps[0].retried >= 2
        assert cluster.list() == []


async def test_a_row_that_kills_actors_fails_by_policy(tmp_path: Path) -> None:
    async with Runtime(), LocalCluster(cpus=8) as cluster:
        rows = from_rows([{"n": n} for n in (0, 100, 1)])
        options: Any = {"rows": {"on_error": "collect"}, "replicas": 1}
        added = rows.map_actor(cluster, Mortal, "add", str(tmp_path), restarts=AT_ONCE, **options)
        first, second, third = await added.take()
        assert (first["n"], third["n"], third["error"]) == (1, 2, None)
        assert "killed by signal 9" in second["error"]
        told = await rows.map_actor(cluster, Mortal, "add", str(tmp_path), **options).take()
        assert "every actor Mortal has died for good: " in told[2]["error"]


async def test_a_checkpoint_of_another_prompt_or_other_options_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt":"a b c"}\n')

    def job(pool: EnginePool, **asked: Any) -> Dataset:
        return read_jsonl(tmp_path / "in.jsonl").chat(pool, messages="prompt", **asked).write_jsonl(tmp_path / "out")

    async with open_pool() as pool:
        for _ in range(2):
            await job(pool, system="Be brief.", max_tokens=2).arun(checkpoint=tmp_path / "job")
        for other in ({"system": "Be long.", "max_tokens": 2}, {"system": "Be brief.", "max_tokens": 3}):
            with pytest.raises(CheckpointError, match=r"options of chat\(answer\) have changed"):
                await job(pool, **other).arun(checkpoint=tmp_path / "job")
