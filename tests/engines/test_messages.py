from __future__ import annotations

import subprocess
import sys
import typing

import msgspec
import pytest

from actors.engine import (
    ChatMessage,
    Delta,
    EngineSpec,
    GenerateRequest,
    Sampling,
    SamplingOptions,
    Usage,
    is_chat,
    is_tokens,
    to_prompt,
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


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 2}, {"stop": 3}, {"seed": "x"}])
def test_a_sampling_value_out_of_range_is_refused_with_its_name(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        Sampling.of(options)


def test_only_what_was_given_reaches_the_engine():
    assert Sampling.of({"max_tokens": 4, "temperature": 0, "top_p": None}).given() == {
        "max_tokens": 4,
        "temperature": 0,
    }


def test_the_typed_options_are_the_fields_of_sampling():
    assert {*SamplingOptions.__annotations__, "max_tokens", "temperature"} == set(Sampling.__struct_fields__)
    hints = typing.get_type_hints(Sampling)
    assert all(typing.get_type_hints(SamplingOptions)[name] == hints[name] for name in SamplingOptions.__annotations__)


def test_a_delta_survives_the_wire():
    delta = Delta(" a", [1], finish_reason="stop", usage=Usage(2, 1))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(delta), type=Delta) == delta


@pytest.mark.parametrize(
    "wrong", [{"engine": "vlm"}, {"tensor_parallel_size": 0}, {"pipeline_parallel_size": -1}, {"max_model_len": 1}]
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
