from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
import typing

import msgspec
import pydantic
import pytest

from actors.engine import (
    ChatMessage,
    ChatOptions,
    Choice,
    Completion,
    Delta,
    Embedding,
    EngineSpec,
    GenerateRequest,
    Logprob,
    RequestOptions,
    Sampling,
    SamplingOptions,
    Usage,
    is_chat,
    is_tokens,
    to_embed_request,
    to_prompt,
    to_request,
)
from arun.errors import MisuseError, RequestError


@pytest.mark.parametrize(
    "prompt", ["text", [1, 2, 3], [{"role": "user", "content": "hi"}], [ChatMessage("user", "hi")], (1, 2)]
)
def test_every_kind_of_prompt_survives_the_wire(prompt):
    request = GenerateRequest("a", to_prompt(prompt), Sampling(max_tokens=3, stop=["."]), "batch", -1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=GenerateRequest) == request


def test_token_ids_and_chat_messages_are_told_apart():
    assert is_tokens(to_prompt([1, 2]))
    assert is_chat(to_prompt([{"role": "user", "content": "hi"}]))
    assert not is_tokens("12")
    assert not is_chat("hi")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1, {"role": "user", "content": "hi"}], "both token ids and chat messages"),
        ([{"role": "user"}], "content"),
        (3.5, "text, a list of token ids or a list of chat messages"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt, message):
    with pytest.raises(RequestError, match=message):
        to_prompt(prompt)


def test_an_unknown_sampling_parameter_is_refused_with_the_nearest_name():
    with pytest.raises(RequestError, match="'temprature'; did you mean 'temperature'"):
        Sampling.of({"temprature": 1.0})


@pytest.mark.parametrize(
    ("name", "ours"), [("max_completion_tokens", "max_tokens"), ("response_format", "structured_outputs")]
)
def test_what_others_call_a_parameter_is_answered_with_its_name_here(name, ours):
    with pytest.raises(RequestError, match=f"{name!r}; did you mean {ours!r}"):
        Sampling.of({name: 1})


@pytest.mark.parametrize(
    ("name", "instead"),
    [("sampling_params", "give its fields by name"), ("truncate_prompt_tokens", "list of token ids")],
)
def test_a_parameter_that_vllm_has_and_arun_has_not_is_refused_with_what_to_do(name, instead):
    with pytest.raises(RequestError, match=f"{name!r}; .*{instead}"):
        Sampling.of({name: 1})


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 2}, {"stop": 3}, {"seed": "x"}])
def test_a_sampling_value_out_of_range_is_refused_with_its_name(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        Sampling.of(options)


def test_only_what_was_given_reaches_the_engine():
    assert Sampling.of({"max_tokens": 4, "temperature": 0, "top_p": None}).given() == {
        "max_tokens": 4,
        "temperature": 0,
    }
    assert Sampling.of({"max_tokens": None}).given() == {"max_tokens": None}


def test_the_typed_options_are_the_fields_of_sampling():
    assert {*SamplingOptions.__annotations__, "max_tokens", "temperature"} == set(Sampling.__struct_fields__)
    hints = typing.get_type_hints(Sampling)
    differing = {name for name, hint in typing.get_type_hints(SamplingOptions).items() if hint != hints[name]}
    assert differing == {"structured_outputs"}  # may be given as a type or a dict


def test_the_typed_request_options_are_the_fields_of_a_request():
    own = set(RequestOptions.__annotations__) - set(SamplingOptions.__annotations__)
    assert own == {"adapter", *ChatOptions.__struct_fields__}


class Place(msgspec.Struct):
    name: str
    height: int


class Town(pydantic.BaseModel):
    name: str
    height: int


@dataclasses.dataclass
class Hill:
    name: str
    height: int


@pytest.mark.parametrize("kind", [Place, Town, Hill])
def test_a_type_asks_for_answers_of_its_json_schema(kind):
    for value in (kind, {"json": kind}):
        structured = Sampling.of({"structured_outputs": value}).structured_outputs
        schema = structured.json
        properties = schema["properties"] if "properties" in schema else schema["$defs"][kind.__name__]["properties"]
        assert {name: each["type"] for name, each in properties.items()} == {"name": "string", "height": "integer"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"regex": "a", "choice": ["b"]}, "exactly one of .* is needed; given are regex, choice"),
        ({}, "given are none"),
        ({"choice": []}, "choice"),
        ({"regx": "a"}, "regx"),
        ({"type": "object", "properties": {}}, "a JSON schema goes under 'json'"),
        (object, "no JSON schema"),
        (7, "no JSON schema"),
    ],
)
def test_structured_outputs_that_make_no_sense_are_refused(value, message):
    with pytest.raises(RequestError, match=message):
        Sampling.of({"structured_outputs": value})


def test_a_whole_request_survives_the_wire():
    options = {
        "structured_outputs": {"choice": ["yes", "no"]},
        "logit_bias": {3: 1.5},
        "n": 2,
        "logprobs": 0,
        "adapter": "pirate",
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    chat = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "x"}]
    request = to_request("a", chat, options, lane="batch", priority=3)
    assert request.adapter == "pirate"
    assert request.chat.tools == options["tools"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=GenerateRequest) == request


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("text", {"tools": []}, "tools: only chat messages have a template"),
        ([{"role": "user", "content": "hi"}], {"tools": 3}, "tools"),
        ("text", {"adapter": 3}, "request options"),
        ("text", {"adaptor": "x"}, "did you mean 'adapter'"),
        ("text", {"n": 0}, "n"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(prompt, options, message):
    with pytest.raises(RequestError, match=message):
        to_request("a", prompt, options)


def test_an_embedding_of_no_dimensions_is_refused():
    with pytest.raises(RequestError, match=r"dimensions"):
        to_embed_request("a", "text", {"dimensions": 0})


def test_deltas_of_several_answers_are_joined_by_index():
    first, second = Logprob(1, -0.5, 1, "a"), Logprob(2, -0.25, 1, "b")
    deltas = [
        Delta("a", [1], 0, logprobs=[[first]], prompt_logprobs=[None, [second]]),
        Delta("x", [9], 1, logprobs=[[second]]),
        Delta("y", [], 1, "stop", stop_reason="."),
        Delta("b", [2], 0, "length", Usage(2, 3), logprobs=[[second]]),
    ]
    deltas = msgspec.msgpack.decode(msgspec.msgpack.encode(deltas), type=list[Delta])
    done = Completion.of("r", deltas, 0.5)
    assert (done.text, done.token_ids, done.finish_reason, done.stop_reason) == ("ab", [1, 2], "length", None)
    assert done.logprobs == [[first], [second]]
    assert done.choices[1] == Choice(1, "xy", [9], "stop", ".", [[second]])
    assert (done.usage, done.prompt_logprobs) == (Usage(2, 3), [None, [second]])


def test_an_answer_without_a_single_delta_is_empty():
    assert Completion.of("r", []).text == ""


def test_an_embedding_is_a_vector_of_floats():
    assert Embedding("r", struct.pack("<3f", 1, -0.5, 0), 2).vector == [1.0, -0.5, 0.0]


def test_a_delta_survives_the_wire():
    delta = Delta(" a", [1], finish_reason="stop", usage=Usage(2, 1))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(delta), type=Delta) == delta


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "vlm"},
        {"tensor_parallel_size": 0},
        {"pipeline_parallel_size": -1},
        {"max_model_len": 1},
        {"runner": "x"},
    ],
)
def test_a_spec_that_cannot_work_is_refused(wrong):
    with pytest.raises(MisuseError):
        EngineSpec(model="tiny", **wrong).validate()


def test_the_engine_modules_import_no_ray_vllm_torch_or_transformers():
    code = (
        "import sys, actors.engine, actors.pool, actors.echo_engine, actors.vllm_engine, actors.models\n"
        "print([m for m in ('ray', 'vllm', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
