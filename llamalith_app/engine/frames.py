"""Frames on the socket between worker and engine: a 4-byte big-endian length, then one msgpack message.

Owns reading and writing them, blocking for the child and asyncio for the parent, and telling a broken peer from one
that is gone. Knows nothing of what the messages mean.
"""

from __future__ import annotations

import asyncio
import struct
from typing import BinaryIO

import msgspec

from llamalith_app.engine.messages import MAX_FRAME_BYTES, FromEngine, ToEngine
from llamalith_app.errors import LlamalithError

_LENGTH = struct.Struct(">I")
_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class FrameError(LlamalithError):
    """The peer sent what is no message: too long, cut off, or of another shape."""


def pack(message: ToEngine | FromEngine) -> bytes:
    """One frame. Raises FrameError when it is over MAX_FRAME_BYTES."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(_checked(len(body))) + body


def read_to_engine(stream: BinaryIO) -> ToEngine | None:
    """Blocks for the next message; None: the peer is gone. Raises FrameError."""
    header = stream.read(_LENGTH.size)
    if not header:
        return None
    if len(header) < _LENGTH.size:
        raise FrameError("A frame was cut off in its length.")
    n_bytes = _checked(_LENGTH.unpack(header)[0])
    body = stream.read(n_bytes)
    if len(body) < n_bytes:
        raise FrameError(f"A frame of {n_bytes} bytes was cut off.")
    return _decoded(body, _TO_ENGINE)


async def read_from_engine(stream: asyncio.StreamReader) -> FromEngine | None:
    """Waits for the next message; None: the peer is gone, at whatever place. Raises FrameError."""
    try:
        header = await stream.readexactly(_LENGTH.size)
        body = await stream.readexactly(_checked(_LENGTH.unpack(header)[0]))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return _decoded(body, _FROM_ENGINE)


def _checked(n_bytes: int) -> int:
    if n_bytes > MAX_FRAME_BYTES:
        raise FrameError(f"A frame of {n_bytes} bytes is over the limit of {MAX_FRAME_BYTES}.")
    return n_bytes


def _decoded[T](body: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise FrameError(f"A frame holds no message: {error}") from error
