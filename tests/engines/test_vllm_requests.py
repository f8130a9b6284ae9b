"""Everything that a single request may ask of a vLLM engine; on the tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Literal

import msgspec
import pytest

from actors.engine import Completion
from arun.errors import EngineError, RequestError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="session")]

GREEDY = {"temperature": 0, "ignore_eos": True}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


async def in_flight(pool):
    [info] = await pool.info()
    return info.load.in_flight


async def test_n_answers_to_one_prompt_stream_with_their_index(tiny_pool):
    deltas = [
        delta async for delta in tiny_pool.generate("a b c", n=3, max_tokens=5, ignore_eos=True, temperature=1, seed=3)
    ]
    tokens = {index: [t for delta in deltas if delta.index == index for t in delta.token_ids] for index in range(3)}
    assert [len(each) for each in tokens.values()] == [5, 5, 5]
    assert len(set(map(tuple, tokens.values()))) > 1
    assert [delta.usage is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].usage.completion_tokens == 15
    done = await tiny_pool.complete("a b c", n=3, max_tokens=5, ignore_eos=True, temperature=1, seed=3)
    assert [choice.finish_reason for choice in done.choices] == ["length"] * 3
    assert [len(choice.token_ids) for choice in done.choices] == [5, 5, 5]


async def test_an_answer_that_is_read_at_its_end_is_the_one_that_streams(tiny_pool):
    began = asyncio.get_running_loop().time()
    asked = {"max_tokens": 60, "stop": ["zzz"], "logprobs": 1, "prompt_logprobs": 0, **GREEDY}
    done = await tiny_pool.complete("a b c", **asked)
    taken = asyncio.get_running_loop().time() - began
    deltas = [delta async for delta in tiny_pool.generate("a b c", **asked)]
    streamed = Completion.of("", deltas)
    assert len(deltas) > 10
    assert done.choices == streamed.choices
    assert done.prompt_logprobs == streamed.prompt_logprobs
    assert done.usage.completion_tokens == 60
    assert 0 < done.time_to_first_token < taken


async def test_leaving_n_answers_aborts_them_all(tiny_pool):
    stream = tiny_pool.generate("a b c", n=4, max_tokens=400, ignore_eos=True)
    await anext(stream)
    assert await in_flight(tiny_pool) == 4
    await stream.aclose()
    assert await in_flight(tiny_pool) == 0


async def test_n_answers_cancelled_at_any_moment_of_the_submission_leave_no_request(tiny_pool):
    for steps in range(0, 60, 3):
        task = asyncio.create_task(tiny_pool.complete("a b c " * 20, n=3, max_tokens=300, ignore_eos=True))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert await in_flight(tiny_pool) == 0


async def test_a_stop_token_ends_the_answer_and_is_named(tiny_pool):
    first = (await tiny_pool.complete("The runtime", max_tokens=1, **GREEDY)).token_ids[0]
    done = await tiny_pool.complete("The runtime", max_tokens=9, stop_token_ids=[first], **GREEDY)
    assert (done.finish_reason, done.stop_reason, done.usage.completion_tokens) == ("stop", first, 1)


async def test_the_stop_string_that_ended_the_answer_is_named(tiny_pool):
    whole = (await tiny_pool.complete("The runtime", max_tokens=30, **GREEDY)).text
    stop = whole[8:10]
    done = await tiny_pool.complete("The runtime", max_tokens=30, stop=["no such text", stop], **GREEDY)
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    kept = await tiny_pool.complete("The runtime", max_tokens=30, stop=stop, include_stop_str_in_output=True, **GREEDY)
    assert kept.text == done.text + stop


async def test_logprobs_name_the_chosen_token_first_then_the_most_likely(tiny_pool):
    done = await tiny_pool.complete("The runtime", max_tokens=6, temperature=1, seed=1, ignore_eos=True, logprobs=3)
    assert len(done.logprobs) == 6
    for token, position in zip(done.token_ids, done.logprobs, strict=True):
        assert position[0].token_id == token
        assert {1, 2, 3} <= {each.rank for each in position}
        assert all(each.logprob <= 0 for each in position)
    alone = await tiny_pool.complete("The runtime", max_tokens=2, logprobs=0, **GREEDY)
    assert [[each.token_id for each in position] for position in alone.logprobs] == [[t] for t in alone.token_ids]


async def test_prompt_logprobs_come_for_every_token_of_the_prompt_but_the_first(tiny_pool):
    prompt = [71, 78, 100, 5]
    done = await tiny_pool.complete(prompt, max_tokens=3, prompt_logprobs=1, **GREEDY)
    assert done.prompt_logprobs[0] is None
    assert [position[0].token_id for position in done.prompt_logprobs[1:]] == prompt[1:]
    assert done.logprobs is None
    first, *others = [delta async for delta in tiny_pool.generate(prompt, max_tokens=3, prompt_logprobs=0, **GREEDY)]
    assert len(first.prompt_logprobs) == 4
    assert all(delta.prompt_logprobs is None for delta in others)


class Verdict(msgspec.Struct, forbid_unknown_fields=True):
    fits: bool
    kind: Literal["cpu", "gpu"]


async def test_an_answer_can_be_held_to_a_type(tiny_pool):
    for structured in (Verdict, {"json": Verdict}, {"json": msgspec.json.schema(Verdict)}):
        done = await tiny_pool.complete("Does it fit?", max_tokens=100, structured_outputs=structured)
        assert done.finish_reason == "stop"
        assert isinstance(msgspec.json.decode(done.text, type=Verdict), Verdict)


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        ({"regex": "[ab]{3}c"}, "[ab]{3}c"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "x" | "yy"'}, "x|yy"),
    ],
    ids=["regex", "choice", "grammar"],
)
async def test_an_answer_can_be_held_to_a_form(tiny_pool, structured, pattern):
    done = await tiny_pool.complete("Does it fit?", max_tokens=20, structured_outputs=structured, n=2)
    assert all(re.fullmatch(pattern, choice.text) for choice in done.choices)


@pytest.mark.parametrize(
    "options",
    [
        {"structured_outputs": {"regex": "[a"}},
        {"structured_outputs": {"json": {"type": "nonsense"}}},
        {"logprobs": 500},
        {"allowed_token_ids": [100000]},
        {"logit_bias": {100000: 1.0}},
        {"min_tokens": 9, "max_tokens": 3},
    ],
    ids=str,
)
async def test_a_bad_request_is_refused_and_the_engine_goes_on(tiny_pool, options):
    with pytest.raises(RequestError):
        await tiny_pool.complete("a b c", **options)
    assert (await tiny_pool.complete("a b c", max_tokens=2, **GREEDY)).usage.completion_tokens == 2
    assert tiny_pool.stats().replicas[0].state == "ready"


async def test_bias_and_allowed_tokens_reach_the_sampler(tiny_pool):
    biased = await tiny_pool.complete("a b c", max_tokens=3, logit_bias={77: 100.0}, **GREEDY)
    assert biased.token_ids == [77, 77, 77]
    allowed = await tiny_pool.complete(
        "a b c", max_tokens=5, allowed_token_ids=[80, 81], temperature=1, ignore_eos=True
    )
    assert set(allowed.token_ids) <= {80, 81}


async def test_tools_reach_the_chat_template(tiny_pool):
    chat = [{"role": "user", "content": "a"}]
    without, with_tools = [
        (await tiny_pool.complete(chat, max_tokens=1, tools=tools)).usage.prompt_tokens for tools in (None, TOOLS)
    ]
    assert with_tools > without + 20
    turns = [*chat, {"role": "assistant", "content": None, "tool_calls": TOOLS}, {"role": "tool", "content": "b"}]
    assert (await tiny_pool.complete(turns, max_tokens=1)).usage.prompt_tokens > with_tools


async def test_a_template_of_ones_own_and_its_variables(tiny_pool):
    chat = [{"role": "user", "content": "a"}]
    template = "{% for m in messages %}{{ m['content'] * times }}{% endfor %}"
    done = await tiny_pool.complete(
        chat, max_tokens=1, chat_template=template, chat_template_kwargs={"times": 7}, prompt_logprobs=0
    )
    assert "".join(position[0].text for position in done.prompt_logprobs[1:]) == "a" * 6
    with pytest.raises(RequestError, match="has no place for tools"):
        await tiny_pool.complete(chat, chat_template=template, tools=TOOLS)
    with pytest.raises(RequestError, match="the chat template can't render these messages: no"):
        await tiny_pool.complete(chat, chat_template="{{ raise_exception('no') }}")


async def test_the_last_message_can_be_continued(tiny_pool):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Well"}]
    going_on = await tiny_pool.complete(chat, max_tokens=1, continue_final_message=True)
    anew = await tiny_pool.complete(chat, max_tokens=1)
    assert going_on.usage.prompt_tokens < anew.usage.prompt_tokens


@pytest.mark.parametrize("first", [{"lane": "interactive"}, {"lane": "batch", "priority": -1}], ids=str)
async def test_what_goes_first_overtakes_what_waits(tiny_pool, first):
    finished = []

    async def ask(number, **options):
        await tiny_pool.complete(f"request {number}", ignore_eos=True, **options)
        finished.append(number)

    async with asyncio.TaskGroup() as asking:
        for number in range(40):  # the engine runs 16 at a time
            asking.create_task(ask(number, max_tokens=100, lane="batch"))
        await asyncio.sleep(0)
        asking.create_task(ask("first", max_tokens=2, **first))
    assert finished.index("first") <= 16


async def test_metrics_count_what_the_engine_does(tiny_pool):
    [before] = await tiny_pool.metrics()
    prompt = list(range(3, 303))
    first = await tiny_pool.complete(prompt, max_tokens=4, **GREEDY)
    again = await tiny_pool.complete(prompt, max_tokens=4, **GREEDY)
    [after] = await tiny_pool.metrics()
    assert after.prompt_tokens - before.prompt_tokens == 600
    assert after.completion_tokens - before.completion_tokens == 8
    assert first.token_ids == again.token_ids
    assert after.prefix_hits - before.prefix_hits == again.usage.cached_tokens == 256  # two blocks of 128
    stream = tiny_pool.generate(prompt, max_tokens=200, ignore_eos=True)
    await anext(stream)
    [during] = await tiny_pool.metrics()
    assert during.running == 1
    assert 0 < during.kv_cache_usage < 1
    await stream.aclose()


async def test_a_cpu_has_no_memory_to_give_back_by_sleeping(tiny_pool):
    for call in (tiny_pool.sleep, tiny_pool.wake):
        with pytest.raises(EngineError, match="vLLM can't sleep on a CPU"):
            await call()
    assert (await tiny_pool.complete("a b c", max_tokens=2, **GREEDY)).usage.completion_tokens == 2
