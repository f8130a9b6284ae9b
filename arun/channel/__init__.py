"""Typed streams between processes: multiplexed, credit-controlled, authenticated.

>>> server = await serve_tcp(handler, token=token)
>>> connection = await connect_tcp(*server.address, token=token)
>>> async for item in connection.open("watch", {"start": 3}, item_type=int): ...
>>> total = await connection.call("add", [1, 2], result_type=int)
"""

from arun.channel.codec import decode_payload
from arun.channel.connection import Connection
from arun.channel.extensions import register_type
from arun.channel.failures import register_error
from arun.channel.limits import Limits
from arun.channel.memory import memory_pair
from arun.channel.serving import Handler
from arun.channel.sockets import Server, connect_tcp, connect_unix, serve_tcp, serve_unix
from arun.channel.statistics import ConnectionStatistics, StreamStatistics
from arun.channel.stream import Stream
from arun.channel.tls import TLSConfig
from arun.channel.tracing import TRACEPARENT, traceparent

__all__ = (
    "TRACEPARENT",
    "Connection",
    "ConnectionStatistics",
    "Handler",
    "Limits",
    "Server",
    "Stream",
    "StreamStatistics",
    "TLSConfig",
    "connect_tcp",
    "connect_unix",
    "decode_payload",
    "memory_pair",
    "register_error",
    "register_type",
    "serve_tcp",
    "serve_unix",
    "traceparent",
)
