"""Frames on a stream socket: a 4-byte big-endian length, then that many bytes of msgpack.

Owns the framing. The engine reads with `read`, which blocks; the worker reads with `read_async`. Does not know what
the messages mean.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, TypeVar

import msgspec

from llamalith_app.engine.messages import MAX_FRAME_BYTES

T = TypeVar("T")
LENGTH_BYTES = 4

_encoder = msgspec.msgpack.Encoder()


class Source(Protocol):
    """A blocking socket, or an object in front of one."""

    def recv(self, n_bytes: int, /) -> bytes: ...


class BrokenFrame(Exception):
    """The peer sent a frame that is too long or cannot be decoded, which no peer of ours does."""


def encode(message: msgspec.Struct) -> bytes:
    """The frame of a message. Raises BrokenFrame if it would be longer than MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise BrokenFrame(f"a message of {len(body)} bytes")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def read(connection: Source, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """Blocks for the next message; None at the end of the stream or if the connection breaks. Raises BrokenFrame."""
    length_bytes = _exactly(connection, LENGTH_BYTES)
    if length_bytes is None:
        return None
    body = _exactly(connection, _length(length_bytes))
    return None if body is None else _decode(body, decoder)


async def read_async(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """As `read`, without blocking the event loop."""
    try:
        return _decode(await reader.readexactly(_length(await reader.readexactly(LENGTH_BYTES))), decoder)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _length(head: bytes) -> int:
    length = int.from_bytes(head, "big")
    if length > MAX_FRAME_BYTES:
        raise BrokenFrame(f"a frame of {length} bytes")
    return length


def _decode(body: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BrokenFrame(str(error)) from None


def _exactly(connection: Source, n_bytes: int) -> bytes | None:
    received = bytearray()
    while len(received) < n_bytes:
        try:
            part = connection.recv(min(n_bytes - len(received), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        received += part
    return bytes(received)
