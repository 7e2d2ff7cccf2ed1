"""Frames on a socket: whole ones, cut ones, and what no peer of ours sends."""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec
import pytest

from llamalith_app.engine import frames
from llamalith_app.engine.messages import MAX_FRAME_BYTES, Cancel, FromEngine, Loading, Step, ToEngine

TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def read(data: bytes) -> list[ToEngine]:
    """All that a blocking reader makes of the bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        messages = []
        while (message := frames.read(theirs, TO_ENGINE)) is not None:
            messages.append(message)
        return messages


def test_messages_come_out_as_they_went_in() -> None:
    assert read(frames.encode(Cancel(1)) + frames.encode(Cancel(2))) == [Cancel(1), Cancel(2)]


def test_the_length_is_four_bytes_big_endian() -> None:
    frame = frames.encode(Cancel(1))
    assert struct.unpack(">I", frame[:4])[0] == len(frame) - 4


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_a_peer_that_ends_in_the_middle_of_a_frame_is_gone(cut: int) -> None:
    assert read(frames.encode(Cancel(1))[:cut]) == []


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", MAX_FRAME_BYTES + 1),
        struct.pack(">I", 1) + b"\xc1",
        struct.pack(">I", 0),
        frames.encode(Loading(0.5)),
        struct.pack(">I", 11) + b"GET / HTTP/",
    ],
)
def test_a_broken_frame_is_distinguished_from_a_peer_that_is_gone(data: bytes) -> None:
    with pytest.raises(frames.BrokenFrame):
        read(data)


async def test_the_worker_reads_the_same_frames() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(frames.encode(Step([])) + frames.encode(Loading(1.0))[:-1])
    reader.feed_eof()
    assert await frames.read_async(reader, FROM_ENGINE) == Step([])
    assert await frames.read_async(reader, FROM_ENGINE) is None
