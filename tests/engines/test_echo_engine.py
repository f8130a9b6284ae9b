from __future__ import annotations

import anyio
import pytest

from actors.echo_engine import EchoEngine
from actors.engine import ChatMessage, Delta, EngineSpec, GenerateRequest, Sampling, Usage
from arun.errors import EngineDead, EngineError, MisuseError, RequestError

pytestmark = pytest.mark.anyio


def make(max_model_len=None, **options):
    return EchoEngine(EngineSpec(model="echo", engine="echo", max_model_len=max_model_len, engine_args=options))


async def answer(engine, prompt, **sampling):
    request = GenerateRequest("a", prompt, Sampling(**{"max_tokens": 100, **sampling}))
    return [delta async for delta in engine.generate(request)]


def text_of(deltas):
    return "".join(delta.text for delta in deltas)


async def test_it_answers_with_the_words_of_the_prompt_a_token_a_word():
    deltas = await answer(make(), "to be or not")
    assert [delta.text for delta in deltas] == ["to", " be", " or", " not"]
    assert deltas[-1] == Delta(" not", deltas[-1].token_ids, finish_reason="stop", usage=Usage(4, 4))
    assert all(len(delta.token_ids) == 1 for delta in deltas)


async def test_an_answer_that_may_come_whole_is_one_delta_an_index():
    engine = make(token_seconds=0.01)
    request = GenerateRequest("a", "to be or not", Sampling(max_tokens=100, n=2), whole=True)
    deltas = [delta async for delta in engine.generate(request)]
    assert [(delta.index, delta.text, delta.finish_reason) for delta in deltas] == [
        (0, "to be or not", "stop"),
        (1, "to be or not", "stop"),
    ]
    assert [delta.usage for delta in deltas] == [None, Usage(4, 8)]
    assert all(delta.first_ago >= 0.03 for delta in deltas)
    assert engine.load().tokens == 8


async def test_the_same_prompt_gives_the_same_tokens():
    assert await answer(make(), "to be or not") == await answer(make(), "to be or not")


async def test_a_chat_is_answered_with_its_last_user_message():
    chat = [ChatMessage("user", "first"), ChatMessage("assistant", "x"), ChatMessage("user", "second one")]
    assert text_of(await answer(make(), chat)) == "second one"


async def test_token_ids_are_answered_with_themselves():
    assert text_of(await answer(make(), [7, 8])) == "7 8"


@pytest.mark.parametrize(
    ("sampling", "text", "reason"),
    [
        ({"max_tokens": 2}, "a b", "length"),
        ({"stop": "c"}, "a b", "stop"),
        ({"stop": ["c"], "include_stop_str_in_output": True}, "a b c", "stop"),
        ({"stop": "a"}, "", "stop"),
        ({"max_tokens": 7, "ignore_eos": True}, "a b c a b c a", "length"),
        ({"max_tokens": None}, "a b c", "stop"),
        ({"max_tokens": None, "ignore_eos": True}, "a b c a b c a b", "length"),
        ({"max_tokens": 100, "ignore_eos": True}, "a b c a b c a b", "length"),
    ],
)
async def test_it_keeps_to_the_sampling_parameters(sampling, text, reason):
    deltas = await answer(make(max_model_len=11), "a b c", **sampling)
    assert text_of(deltas) == text
    assert deltas[-1].finish_reason == reason
    assert deltas[-1].usage is not None


async def test_an_answer_without_an_end_is_refused():
    with pytest.raises(RequestError, match="would never end: the echo engine has no max_model_len"):
        await answer(make(), "a b c", max_tokens=None, ignore_eos=True)


async def test_a_prompt_that_is_too_long_is_refused_with_the_numbers():
    with pytest.raises(RequestError, match=r"3 tokens.*max_model_len is 3"):
        await answer(make(max_model_len=3), "a b c")


async def test_it_fails_on_the_text_it_was_told_and_goes_on():
    engine = make(fail_on="poison")
    with pytest.raises(RequestError):
        await answer(engine, "some poison here")
    assert text_of(await answer(engine, "water")) == "water"
    assert (engine.load().failed, engine.load().finished) == (1, 1)


async def test_it_dies_after_the_tokens_it_was_told_for_good():
    engine = make(die_after=2)
    with pytest.raises(EngineDead, match="after 2 tokens"):
        await answer(engine, "a b c")
    with pytest.raises(EngineDead):
        await answer(engine, "a")
    with pytest.raises(EngineDead):
        await engine.check_health()


async def test_its_start_fails_as_it_was_told():
    with pytest.raises(EngineError, match="out of memory"):
        await make(fail_start="out of memory").start()


async def test_a_consumer_that_leaves_counts_as_an_abort():
    engine = make()
    deltas = engine.generate(GenerateRequest("a", "a b c"))
    await anext(deltas)
    assert engine.load().in_flight == 1
    await deltas.aclose()
    assert (engine.load().in_flight, engine.load().aborted, engine.load().tokens) == (0, 1, 1)


async def test_a_request_that_hangs_can_be_cancelled():
    engine = make(hang_on="tar pit")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(answer, engine, "a tar pit")
        await anyio.wait_all_tasks_blocked()
        assert engine.load().in_flight == 1
        tasks.cancel_scope.cancel()
    assert engine.load().aborted == 1


@pytest.mark.parametrize("options", [{"token_secs": 1}, {"token_seconds": -1}, {"die_after": "soon"}])
async def test_a_wrong_option_is_refused_with_the_known_ones(options):
    with pytest.raises(MisuseError, match="token_seconds"):
        make(**options)
