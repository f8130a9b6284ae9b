"""Trace context: an opener's place in a trace reaches its handler, with OpenTelemetry and without."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import anyio
import pytest

from actors import LocalCluster
from arun.channel import TRACEPARENT, decode_payload, memory_pair, traceparent

from .conftest import Link

pytestmark = pytest.mark.anyio

ONE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-00"


async def tell(method, payload):
    yield traceparent()
    await anyio.lowlevel.checkpoint()
    yield TRACEPARENT.get()


async def test_a_handler_finds_its_opener_s_traceparent_and_no_other(link):
    connection = await link(tell)
    for value in (ONE, OTHER, ""):
        TRACEPARENT.set(value)
        assert [told async for told in connection.open("tell")] == [value, value]


async def test_a_handler_does_not_inherit_what_was_there_when_its_server_was_made(link):
    TRACEPARENT.set(ONE)
    connection = await link(tell)
    TRACEPARENT.set("")
    assert [told async for told in connection.open("tell")] == ["", ""]


async def test_what_is_no_traceparent_is_not_sent(link):
    connection = await link(tell)
    TRACEPARENT.set("no traceparent")
    assert [told async for told in connection.open("tell")] == ["", ""]


async def test_what_a_peer_sends_in_its_place_is_not_believed(runtime):
    here, _ = memory_pair(handler_b=tell)
    inbound = here.session.open("tell", b"\xc0", 1, "00-nothing-that-a-trace-has")
    here.wake_writer()
    await here.wait(inbound)
    assert decode_payload(inbound.items[0]) == ""
    await here.aclose()


async def test_a_handler_carries_it_on_to_what_it_opens(link):
    behind = await link(tell)

    async def between(method, payload):
        async for told in behind.open("tell"):
            yield told

    connection = await link(between)
    TRACEPARENT.set(ONE)
    assert [told async for told in connection.open("tell")] == [ONE, ONE]


@pytest.fixture
def sdk() -> Any:
    """What applications install to see spans; arun does not need it."""
    return pytest.importorskip("opentelemetry.sdk.trace")


@pytest.fixture
def spans(sdk: Any) -> Any:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@pytest.fixture
def tracer(sdk: Any, spans: Any) -> Any:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider.get_tracer("tests")


async def test_spans_of_a_handler_are_children_of_the_opener_s_span(link: Link, spans, tracer):
    async def work(method, payload):
        with tracer.start_as_current_span(f"handle {method}"):
            await anyio.lowlevel.checkpoint()
        yield 1

    with tracer.start_as_current_span("when the server was made"):
        connection = await link(work)
    with tracer.start_as_current_span("ask"):
        assert await connection.call("one") == 1
    assert await connection.call("two") == 1
    by_name = {span.name: span for span in spans.get_finished_spans()}
    assert by_name["handle one"].parent.span_id == by_name["ask"].context.span_id
    assert by_name["handle one"].context.trace_id == by_name["ask"].context.trace_id
    assert by_name["handle two"].parent is None


class Traced:
    async def place(self) -> str:
        return traceparent()

    async def modules(self) -> bool:
        return "opentelemetry" in sys.modules


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_trace_crosses_processes(anyio_backend, tracer):
    async with LocalCluster() as cluster:
        actor = await cluster.spawn(Traced)
        with tracer.start_as_current_span("ask") as span:
            context = span.get_span_context()
            assert await actor.place() == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        assert not await actor.modules()


def test_the_channel_does_not_import_opentelemetry():
    program = "import sys, arun.channel; arun.channel.traceparent(); assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
