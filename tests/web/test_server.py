"""The limits of a connection: bytes, time, pipelined requests. With a real uvicorn and a small application."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from llamalith_app.app import create_server
from llamalith_app.settings.config import Config
from llamalith_app.web.server import TIMINGS, Protocol, Server, Timings
from tests.settle import eventually

WITHIN_S = 20
Handler = Callable[[Any, Any, Any], Any]
CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"
GET = b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"


class App:
    """Reads the body, then answers with the path and the body's length, unless a test gives another handler."""

    def __init__(self) -> None:
        self.handler: Handler = echo
        self.messages: list[Any] = []
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = scope["headers"]

        async def noted() -> Any:
            message = await receive()
            self.messages.append(message)
            return message

        await self.handler(scope, noted, send)

    def end_streams(self) -> None:
        pass


async def echo(scope: Any, receive: Any, send: Any) -> None:
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length, more = length + len(message["body"]), message["more_body"]
    await answer(send, f"{scope['path']} {length}".encode())


async def answer(send: Any, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Served:
    connections: set[Any]
    tasks: set[asyncio.Task[None]]

    def __init__(self, app: App, server: Server, port: int) -> None:
        self.app = app
        self.port = port
        self.connections = server.server_state.connections
        self.tasks = server.server_state.tasks

    async def connect(self, first: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(first)
        return reader, writer

    def check_time_after(self, seconds: float) -> None:
        """Checks the deadlines as the server would do so many seconds later."""
        for connection in tuple(self.connections):
            connection.check_time(asyncio.get_running_loop().time() + seconds, TIMINGS)

    async def expects(self, what: str, *, has_received: bool) -> None:
        """Waits until its one connection expects this next."""

        async def is_so() -> bool:
            return [(connection.expected, connection.has_received) for connection in self.connections] == [
                (what, has_received)
            ]

        await eventually(is_so)

    async def has_read(self, n_bytes: int) -> None:
        """Waits until the application has read so many bytes of bodies."""

        async def is_there() -> bool:
            return sum(len(message.get("body", b"")) for message in self.app.messages) == n_bytes

        await eventually(is_there)

    async def has_no_connection(self) -> None:
        """Waits until all connections are closed."""

        async def nobody() -> bool:
            return not self.connections

        await eventually(nobody)


@asynccontextmanager
async def serving(idle_s: float = 60, timings: Timings = TIMINGS) -> AsyncIterator[Served]:
    app = App()
    settings = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=idle_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=1,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(settings, app.end_streams, timings)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield Served(app, server, listener.getsockname()[1])
    finally:
        server.should_exit = True
        await task
        listener.close()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """The server checks no deadlines by itself: the test says how much time has passed."""
    async with serving(timings=Timings(check_ticks=10**9)) as served:
        yield served


async def until(reader: asyncio.StreamReader, end: bytes) -> bytes:
    return await asyncio.wait_for(reader.readuntil(end), WITHIN_S)


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Everything that arrives until the connection is closed."""
    return await asyncio.wait_for(reader.read(), WITHIN_S)


# Bytes


BEYOND = Protocol.MAX_HEAD_BYTES + 2 * Protocol.PIECE_BYTES
LINE = b"a: %b\r\n" % (b"b" * 395)
ENDLESS = {
    "lines": (b"GET / HTTP/1.1\r\nHost: h\r\n", LINE * (BEYOND // 400)),
    "one value": (b"GET / HTTP/1.1\r\nHost: h\r\nX: ", b"x" * BEYOND),
    "one name": (b"GET / HTTP/1.1\r\nHost: h\r\n", b"x" * BEYOND),
    "an address": (b"GET /", b"x" * BEYOND),
    "empty lines before it": (b"", b"\r\n" * (BEYOND // 2)),
    "lines of a later request": (GET % 1 + b"GET / HTTP/1.1\r\nHost: h\r\n", LINE * (BEYOND // 400)),
    "a chunk's extension": (CHUNKED + b"1;", b"x" * BEYOND),
    "extensions of many chunks": (CHUNKED, b"1;%b\r\nx\r\n" % (b"x" * 4000) * 20),
    "lines behind the body": (CHUNKED + b"0\r\n", b"a:b\r\n" * (BEYOND // 5)),
}


@pytest.mark.parametrize(("first", "endless"), ENDLESS.values(), ids=ENDLESS.keys())
async def test_the_bytes_before_a_body_and_of_its_framing_are_limited(
    served: Served, first: bytes, endless: bytes
) -> None:
    reader, writer = await served.connect(first)
    if b"/1 " in first:
        assert (await until(reader, b"/1 0")).startswith(b"HTTP/1.1 200 ")
    writer.write(endless)
    got = await until(reader, b"}")
    assert got.startswith(b"HTTP/1.1 431 ")
    assert b"\r\nconnection: close\r\n" in got
    assert b"at most 64 KiB before the body" in got
    writer.close()
    await served.has_no_connection()


async def test_a_head_below_the_limit_is_accepted_in_any_number_of_pieces(served: Served) -> None:
    head = b"GET /1 HTTP/1.1\r\nHost: h\r\n" + LINE * ((Protocol.MAX_HEAD_BYTES - 40) // 400) + b"\r\n"
    for piece in (1013, 4096, len(head)):
        reader, writer = await served.connect()
        for start in range(0, len(head), piece):
            writer.write(head[start : start + piece])
            await writer.drain()
        assert (await until(reader, b"/1 0")).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_more_header_lines_than_the_limit_are_refused(served: Served) -> None:
    for n_lines, status in ((Protocol.MAX_HEADER_LINES, b"200"), (Protocol.MAX_HEADER_LINES + 1, b"431")):
        reader, writer = await served.connect(b"GET /1 HTTP/1.1\r\nHost: h\r\n" + b"a:b\r\n" * (n_lines - 1) + b"\r\n")
        got = await until(reader, b"/1 0" if status == b"200" else b"}")
        assert got.startswith(b"HTTP/1.1 %b " % status)
        assert (b"at most 200 lines" in got) == (status == b"431")
        writer.close()


@pytest.mark.parametrize("surplus", [b"\0", b"x\0", b"\r\n}", b" ", GET % 2 + b"\0", CHUNKED + b"x"])
async def test_invalid_input_after_a_request_does_not_cost_that_request_its_answer(
    served: Served, surplus: bytes
) -> None:
    may_answer = asyncio.Event()

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        await may_answer.wait()
        await echo(scope, receive, send)

    served.app.handler = waiting
    reader, writer = await served.connect(b"POST /1 HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody" + surplus)

    async def is_read() -> bool:
        return any(connection._ignores_input for connection in served.connections)

    await eventually(is_read)
    may_answer.set()
    got = await rest(reader)
    answers = [b"/1 4", b"/2 0"] if GET % 2 in surplus else [b"/1 4"]
    assert re.findall(rb"\r\n\r\n(/\d? \d)", got) == answers
    if not surplus.startswith(CHUNKED):
        assert got.count(b"connection: close") == 1
    writer.close()
    await served.has_no_connection()


async def test_an_invalid_body_whose_answer_has_begun_ends_the_connection_at_once(served: Served) -> None:
    async def early(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await receive()
        await asyncio.Event().wait()

    served.app.handler = early
    reader, writer = await served.connect(CHUNKED)
    await until(reader, b"\r\n\r\n")
    writer.write(b"1\r\nx\r\nx")
    assert await rest(reader) == b""
    writer.close()
    await served.has_no_connection()
    for task in tuple(served.tasks):
        task.cancel()


async def test_a_body_of_short_chunks_and_the_next_body_arrive_whole(served: Served) -> None:
    body = b"x" * 100_000
    short = CHUNKED + b"".join(b"1\r\nx\r\n" for _ in body) + b"0\r\n\r\n"
    reader, writer = await served.connect(
        short + b"POST /2 HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n" + body
    )
    assert b"/ 100000" in await until(reader, b"/ 100000")
    assert b"/2 100000" in await until(reader, b"/2 100000")
    writer.close()


async def test_trailers_of_a_chunked_body_are_not_headers(served: Served) -> None:
    reader, writer = await served.connect(CHUNKED + b"1\r\nx\r\n0\r\nX-API-Token: late\r\nHost: other\r\n\r\n")
    await until(reader, b"/ 1")
    assert served.app.headers == [(b"host", b"h"), (b"transfer-encoding", b"chunked")]
    writer.close()


async def test_a_few_pipelined_requests_are_answered_in_order(served: Served) -> None:
    reader, writer = await served.connect(b"".join(GET % n for n in range(10)))
    for n in range(10):
        assert b"200 OK" in await until(reader, b"/%d 0" % n)
    writer.close()


async def test_of_many_pipelined_requests_no_more_than_the_limit_are_kept(served: Served) -> None:
    may_answer = asyncio.Event()

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        await may_answer.wait()
        await answer(send, scope["path"].encode())

    served.app.handler = waiting
    reader, writer = await served.connect(b"".join(GET % n for n in range(1000)))

    async def waits() -> bool:
        return any(len(connection.pipeline) == Protocol.MAX_PIPELINED for connection in served.connections)

    await eventually(waits)
    may_answer.set()
    got = await rest(reader)
    assert re.findall(rb"\r\n\r\n/(\d+)", got) == [b"%d" % n for n in range(Protocol.MAX_PIPELINED + 1)]
    assert got.count(b"connection: close") == 1
    writer.close()


async def test_while_a_request_waits_for_its_turn_nothing_more_is_read(served: Served) -> None:
    watches, may_answer = asyncio.Event(), asyncio.Event()

    async def watching(scope: Any, receive: Any, send: Any) -> None:
        """Answers while it watches for the client's disconnect."""
        await receive()
        watch = asyncio.create_task(receive())
        await asyncio.sleep(0)
        watches.set()
        await may_answer.wait()
        await answer(send, scope["path"].encode())
        await watch

    served.app.handler = watching
    reader, writer = await served.connect(GET % 1 + GET % 2)
    await asyncio.wait_for(watches.wait(), WITHIN_S)
    (connection,) = served.connections
    assert connection.flow.read_paused
    may_answer.set()
    await until(reader, b"\r\n\r\n/2")
    assert not connection.flow.read_paused
    writer.close()


async def test_a_request_for_another_protocol_is_answered_in_this_one(served: Served) -> None:
    upgrade = b"GET /%d HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    reader, writer = await served.connect(upgrade % 1 + upgrade % 2 + GET % 3)
    for n in (1, 2, 3):
        assert b"200 OK" in await until(reader, b"/%d 0" % n)
    writer.close()


OFFER = b"Connection: close, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
CHUNKS = b"3\r\nbod\r\n1\r\ny\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("framing", "body"), [(b"Content-Length: 4\r\n", b"body"), (b"Transfer-Encoding: chunked\r\n", CHUNKS)]
)
@pytest.mark.parametrize("segments", [1, 2])
async def test_a_body_after_an_offer_of_another_protocol_arrives_whole(
    served: Served, framing: bytes, body: bytes, segments: int
) -> None:
    offer = OFFER.replace(b"close, ", b"")
    head = b"POST /%d?q HTTP/1.1\r\nHost: h\r\n" + framing
    reader, writer = await served.connect()
    if segments == 1:
        writer.write(head % 1 + offer + b"\r\n" + body + GET % 2)
    else:
        writer.write(head % 1 + offer + b"\r\n")
        await served.expects("body", has_received=True)
        writer.write(body + GET % 2)
    assert (await until(reader, b"/1 4")).startswith(b"HTTP/1.1 200 ")
    assert (await until(reader, b"/2 0")).startswith(b"HTTP/1.1 200 ")
    assert b"".join(message["body"] for message in served.app.messages) == b"body"
    writer.write(head % 3 + OFFER + b"\r\n" + body)
    got = await rest(reader)
    assert got.endswith(b"/3 4")
    assert b"connection: close" in got
    assert (b"host", b"h") in served.app.headers
    assert b"upgrade" not in dict(served.app.headers)
    writer.close()


async def test_a_request_for_a_tunnel_is_answered(served: Served) -> None:
    tunnel = b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    reader, writer = await served.connect(tunnel)
    assert (await until(reader, b"\r\n")).startswith(b"HTTP/1.1 ")
    writer.close()


# Time


async def test_200_connections_that_send_byte_by_byte_are_closed_in_time() -> None:
    async with serving(timings=Timings(check_ticks=1, head_s=0.3, linger_s=0.3)) as served:
        crowd = [await served.connect(b"GET / HTTP/1.1\r\n") for _ in range(200)]

        async def all_are_gone() -> bool:
            for _, writer in crowd:
                if not writer.is_closing():
                    writer.write(b"a:b\r\n")
            return not served.connections

        await eventually(all_are_gone)
        for _, writer in crowd:
            writer.close()


@pytest.mark.parametrize("before", ["", "an answered request"])
@pytest.mark.parametrize("begun", [b"GET / HTTP/1.1\r\na:b\r\n", b"\r\n"])
async def test_headers_that_do_not_end_are_refused(served: Served, before: str, begun: bytes) -> None:
    reader, writer = await served.connect(GET % 1 if before else b"")
    if before:
        await until(reader, b"/1 0")
    for seconds in (0, 9, 9.9):
        writer.write(begun)
        await served.expects("head", has_received=True)
        served.check_time_after(seconds)
    served.check_time_after(10.1)
    got = await rest(reader)
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b"The headers did not come within 10 s." in got
    writer.close()
    await served.has_no_connection()


async def test_a_connection_that_sends_nothing_is_closed_without_an_answer(served: Served) -> None:
    reader, writer = await served.connect()
    await served.expects("head", has_received=False)
    served.check_time_after(9)
    assert len(served.connections) == 1
    served.check_time_after(10.1)
    assert await rest(reader) == b""
    writer.close()
    await served.has_no_connection()


async def test_a_body_may_take_any_time_if_it_is_fast_enough(served: Served) -> None:
    reader, writer = await served.connect(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n")
    for window in range(1, 51):
        writer.write(b"x" * 10_240)
        await served.has_read(window * 10_240)
        served.check_time_after(window * 10.1)
    writer.write(b"x" * 10_239)
    await served.has_read(51 * 10_240 - 1)
    served.check_time_after(51 * 10.1)
    got = await rest(reader)
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b"The body came too slowly: at least 1024 bytes a second are needed." in got
    assert served.app.messages[-1] == {"type": "http.disconnect"}, "and its handler ends with it"
    writer.close()
    await served.has_no_connection()


async def test_an_unread_body_and_a_slow_answer_have_no_deadline(served: Served) -> None:
    """Streams are slow answers."""
    may_go_on = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await may_go_on.wait()
        await echo(scope, receive, send)

    served.app.handler = slow
    body = b"x" * 2_000_000
    answering, first = await served.connect(GET % 1 + GET % 2 + b"GET /3")
    posting, second = await served.connect(b"POST /4 HTTP/1.1\r\nHost: h\r\nContent-Length: 2000000\r\n\r\n" + body)

    async def both_wait() -> bool:
        return [bool(connection.flow.read_paused) for connection in served.connections] == [True, True]

    await eventually(both_wait)
    for seconds in (100, 200, 300):
        served.check_time_after(seconds)
    may_go_on.set()
    first.write(b" HTTP/1.1\r\nHost: h\r\n\r\n")
    for end in (b"/1 0", b"/2 0", b"/3 0"):
        assert (await until(answering, end)).startswith(b"HTTP/1.1 200 ")
    assert (await until(posting, b"/4 2000000")).startswith(b"HTTP/1.1 200 ")
    first.close()
    second.close()


async def test_idle_connections_are_closed_also_after_an_answer_before_the_end_of_its_body() -> None:
    async def early(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"no")

    async with serving(idle_s=0.2) as served:
        served.app.handler = early
        reader, writer = await served.connect(GET % 1)
        assert (await rest(reader)).endswith(b"no")
        writer.close()
        reader, writer = await served.connect(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n")
        await until(reader, b"no")
        writer.write(b"body" + GET % 1)
        await until(reader, b"no")
        writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n")
        await until(reader, b"no")
        writer.write(b"body")
        assert await rest(reader) == b""
        writer.close()
        await served.has_no_connection()


async def test_the_timer_of_idle_connections_ends_with_a_request_in_the_same_segment() -> None:
    may_end = asyncio.Event()

    async def early(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "GET":
            await may_end.wait()
        await answer(send, b"no")

    async with serving() as served:
        served.app.handler = early
        reader, writer = await served.connect(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n")
        await until(reader, b"no")
        writer.write(b"body" + GET % 1)
        await served.expects("request", has_received=True)

        async def is_asked() -> bool:
            return bool(served.tasks)

        await eventually(is_asked)
        (connection,) = served.connections
        assert connection.timeout_keep_alive_task is None
        may_end.set()
        await until(reader, b"no")
        writer.close()


async def test_a_body_that_goes_on_after_its_answer_is_not_read_for_ever(served: Served) -> None:
    async def early(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"no")

    served.app.handler = early
    reader, writer = await served.connect(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n")
    await until(reader, b"no")
    for seconds in (1, 2, 3, 4):
        writer.write(b"x" * 100_000)
        await writer.drain()
        served.check_time_after(seconds)
    assert len(served.connections) == 1
    served.check_time_after(5.1)
    await served.has_no_connection()
    writer.close()


@pytest.mark.parametrize(
    "begun",
    [b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 20_000, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n"],
)
async def test_a_client_that_goes_on_sending_after_the_answer_is_cut_off_before_the_deadline(
    served: Served, begun: bytes
) -> None:
    async def early(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"no")

    async def send_on(n_bytes: int) -> None:
        for _ in range(n_bytes // 1_000_000):
            writer.write(b"x" * 1_000_000)
            await writer.drain()

    served.app.handler = early
    reader, writer = await served.connect(begun)
    await until(reader, b"HTTP/1.1 ")
    with pytest.raises(ConnectionError):
        await send_on(10 * Protocol.MAX_IGNORED_BYTES)
    await served.has_no_connection()
    writer.close()


async def test_an_answer_may_be_read_slowly_but_is_dropped_when_nobody_reads_it(served: Served) -> None:
    async def long(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"x" * 30_000_000, (b"connection", b"close"))

    served.app.handler = long
    client = socket.create_connection(("127.0.0.1", served.port))
    client.sendall(GET % 1)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await asyncio.wait_for(loop.sock_recv(client, 1000), WITHIN_S)
    (connection,) = served.connections
    served.check_time_after(0)
    for n_checks in range(1, 4):
        unsent = connection.transport.get_write_buffer_size()
        while connection.transport.get_write_buffer_size() > unsent - 100_000:
            assert await asyncio.wait_for(loop.sock_recv(client, 1_000_000), WITHIN_S)
        served.check_time_after(n_checks * 5.1)
        assert served.connections
    served.check_time_after(4 * 5.1)
    await served.has_no_connection()
    client.close()


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_answer_that_is_being_sent_is_dropped_when_nobody_reads_it(served: Served, is_stream: bool) -> None:
    """One that is read slowly is not."""

    async def long(scope: Any, receive: Any, send: Any) -> None:
        head = [] if is_stream else [(b"content-length", b"90000000")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"x" * 30_000_000, "more_body": True})

    served.app.handler = long
    client = socket.create_connection(("127.0.0.1", served.port))
    client.sendall(GET % 1)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await asyncio.wait_for(loop.sock_recv(client, 1000), WITHIN_S)
    (connection,) = served.connections
    for n_checks in range(1, 4):
        unsent = connection.transport.get_write_buffer_size()
        while connection.transport.get_write_buffer_size() > unsent - 100_000:
            assert await asyncio.wait_for(loop.sock_recv(client, 1_000_000), WITHIN_S)
        served.check_time_after(n_checks * 75.1)
        assert not connection.transport.is_closing()
    served.check_time_after(4 * 75.1)
    await served.has_no_connection()
    assert connection.cycle.disconnected
    client.close()


def test_idle_connections_are_kept_for_longer_than_the_shipped_nginx_keeps_them(config: Config) -> None:
    found = re.search(r"^\s*keepalive_timeout (\d+)s;", CONF.read_text(), re.MULTILINE)
    assert found is not None
    assert create_server(config).config.timeout_keep_alive == 75 > int(found[1])
