"""The HTTP server: uvicorn, with the limits that it does not have of its own.

Everybody can open a connection. Here is decided how many bytes and how much time one may take before it has shown
anything: what a request's head may weigh, how slow a head or a body may come, how long a connection may be idle. What
a request means is decided by the application.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any, Literal

import httptools
import msgspec
import structlog
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from llamalith_app.contracts.problems import Problem
from llamalith_app.web.envelope import HEADERS, problem

IDLE_S = 75
"""Longer than proxies keep a connection that they may use again (nginx: 60 s), and than people's programs poll: of two
who close an idle connection, the one who may still send on it must be the first."""

log = structlog.get_logger(__name__)


class Server(uvicorn.Server):
    """Ends open streams before it waits for connections to end, and looks after the time of every connection."""

    LOOK_TICKS = 10
    """Of uvicorn's own clock, which ticks every 0.1 s."""

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_streams = end_streams

    async def on_tick(self, counter: int) -> bool:
        if counter % self.LOOK_TICKS == 0:
            # One look at all of them instead of a timer for each: a request then costs no timer.
            now = asyncio.get_running_loop().time()
            for connection in tuple(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.check_time(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_streams()
        await super().shutdown(sockets)


class OneWrite:
    """A transport that tells the kernel at once what is written in one turn of the event loop.

    uvicorn writes an answer's head and its body apart, and uvloop hands on each at once; with one system call for both
    the product accepts 8 % more jobs a second (bench/README.md).
    """

    MOST_HELD = 64 * 1024
    """Bytes; more is handed on at once, so that the transport below judges whether its reader keeps up."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held += data
        if len(self._held) > self.MOST_HELD:
            self.flush()

    def write_eof(self) -> None:
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._transport.write(held)


class Flow(FlowControl):
    """Reads nothing more while requests of the connection wait for their turn."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class Protocol(HttpToolsProtocol):
    """One connection, with bounds on what it may take. Times in seconds, sizes in bytes."""

    MAX_HEAD = 64 * 1024
    """Of a request before its body, and of what a chunked body has beside its content: beyond it is a 431."""
    MAX_LINES = 200
    """Of headers: each costs many times its bytes. Beyond it is a 431."""
    HEAD_S = 10.0
    """From the connection or the first byte to the end of the headers; beyond it is a 408."""
    BODY_S = 10.0
    BODY_BYTES_PER_S = 1024
    """A body brings so much, counted over each BODY_S, while somebody reads it; less is a 408."""
    LINGER_S = 5.0
    """For what is still sent after the answer, and for taking an answer after which the connection ends."""
    TAKEN_S = float(IDLE_S)
    """While an answer waits for its reader, BODY_BYTES_PER_S of it are taken, counted over each TAKEN_S."""
    MAX_IGNORED = 32 * 1024 * 1024
    """Bytes that may come after the answer: twice the largest body, so that who sends one hears why it was refused."""
    MAX_PIPELINED = 32
    """Requests that may wait behind one; the connection ends with the answer to the last of them."""

    PIECE = 4096
    """Fed to the parser at once, so that it never holds much more than MAX_HEAD."""
    FRAMING_PER_BYTE = 16
    """What a chunked body may have beside its content for each byte of it: chunks may be short."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._writes = OneWrite(transport, self.loop)
        super().connection_made(self._writes)  # type: ignore[arg-type]
        self.flow: Flow = Flow(self._writes)  # type: ignore[arg-type]
        self.heard = False
        """Something has come."""
        self._deaf = False
        """Nothing that comes is looked at any more."""
        self._head_again = b""
        """A head that offers another protocol, without the offer: to be parsed in its place."""
        self._is_last = False
        self._ends = False
        self._unsent = 0
        self._unsent_since = 0.0
        self._expect("head")

    def eof_received(self) -> None:
        """The transport below closes by itself after this: a client may end its side and still want its answer."""
        self._writes.flush()

    # What is read

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self.heard = True
        if self.expected == "request" and not self._is_answering:
            self._expect("head")
        if self._deaf:
            self._ignore(len(data))
        while data and not self._deaf:
            data = self._feed(data[: self.PIECE]) + data[self.PIECE :] if len(data) > self.PIECE else self._feed(data)

    def _feed(self, piece: bytes) -> bytes:
        """Returns what the parser has not taken."""
        rest = b""
        self._moved_on = False
        n_body = self._n_body
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            # Nothing here speaks another protocol; what was asked is answered in this one.
            rest = self._head_again + piece[upgrade.args[0] :]
            if self._head_again:
                # The old one takes nothing more behind a head with `Connection: close`.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self._head_again = b""
        except httptools.HttpParserError as error:
            is_ours = isinstance(error, (httptools.HttpParserCallbackError, httptools.HttpParserInvalidURLError))
            reason = "its address cannot be read" if is_ours else str(error)
            self._refuse(400, "bad-input", "Bad input", f"This is no HTTP request: {reason}.")
            return b""
        if not self._moved_on and not self._deaf:
            self._n_framing += len(piece) - (self._n_body - n_body)
            if self._n_framing >= self.MAX_HEAD + self.FRAMING_PER_BYTE * self._n_body:
                self._refuse_headers(f"The headers are too large: at most {self.MAX_HEAD // 1024} KiB before the body.")
        return rest

    def on_message_begin(self) -> None:
        if not self._deaf:
            # Armed in the same segment, by the end of a body that came behind its answer.
            self._unset_keepalive_if_required()
            super().on_message_begin()
            self._expect("head")

    def on_url(self, url: bytes) -> None:
        if not self._deaf:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Not those behind a chunked body: whoever has judged the headers has not seen them.
        if self._deaf or self.expected != "head":
            return
        if len(self.headers) == self.MAX_LINES:
            self._refuse_headers(f"There are too many headers: at most {self.MAX_LINES} lines.")
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._deaf:
            return
        if (version := self.parser.get_http_version()) not in ("1.0", "1.1"):
            detail = f"HTTP/{version} is not spoken here: HTTP/1.1 is."
            self._refuse(400, "bad-input", "Bad input", detail)
            return
        if self.parser.should_upgrade() and (method := self.parser.get_method()) != b"CONNECT":
            # The parser skips the body of such a request, and clients offer HTTP/2 with any (curl --http2).
            lines = [b"%b: %b\r\n" % line for line in self.headers if line[0] != b"upgrade"]
            start = b"%b %b HTTP/%b\r\n" % (method, self.url, version.encode())
            self._head_again = start + b"".join(lines) + b"\r\n"
            return
        super().on_headers_complete()
        self._expect("body")
        self.flow.held = bool(self.pipeline)
        if len(self.pipeline) >= self.MAX_PIPELINED:
            self._is_last = True
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if not self._deaf:
            self._n_body += len(body)
            if not self._is_answering:
                self._ignore(len(body))
            super().on_body(body)

    def _ignore(self, n_bytes: int) -> None:
        """Somebody who goes on sending without end takes no more of the processor than for so many bytes."""
        self._n_ignored += n_bytes
        if self._n_ignored > self.MAX_IGNORED:
            self.transport.abort()

    def on_message_complete(self) -> None:
        if self._deaf or self._head_again:
            return
        super().on_message_complete()
        self._expect("request")
        self._deaf = self._is_last
        if not self._is_answering:
            # The answer came before the end of the body, and its timer ended with what came of it.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._count_unsent(self.loop.time())

    def on_response_complete(self) -> None:
        # The next of those that wait is taken out by this.
        self.flow.held = len(self.pipeline) > 1
        self._since = self.loop.time()
        if self._deaf and not self.pipeline:
            self.transport.close()
        super().on_response_complete()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]

    def _expect(self, what: Literal["head", "body", "request"]) -> None:
        """What the client has to send now; `request`: nothing, it may begin another one."""
        self.expected = what
        self._moved_on = True
        self._since = self.loop.time()
        self._n_framing = 0
        self._n_body = 0
        self._n_body_before = 0
        self._n_ignored = 0

    # What is given up

    def check_time(self, now: float) -> None:
        """Called every second or so; `now` is the loop's time."""
        if self._ends or self.transport.is_closing():
            self._check_end(now)
            return
        if self.flow.write_paused and not self._is_taken(now, self.TAKEN_S):
            self.transport.abort()
            return
        if self._deaf or self.expected == "request":
            # An answer is under way, or the timer of idle connections runs.
            return
        if self.expected == "body" and not self._is_answering:
            if now - self._since >= self.LINGER_S:
                self.transport.close()
        elif self.flow.read_paused or self.pipeline:
            # We do not read, so it is not the client who is slow.
            self._since = now
        elif self.expected == "head":
            if now - self._since < self.HEAD_S:
                return
            if not self.heard:
                self.transport.close()
            else:
                self._refuse(
                    408, "request-timeout", "Request timeout", f"The headers did not come within {self.HEAD_S:g} s."
                )
        elif now - self._since >= self.BODY_S:
            if self._n_body - self._n_body_before < self.BODY_S * self.BODY_BYTES_PER_S:
                detail = f"The body came too slowly: at least {self.BODY_BYTES_PER_S} bytes a second are needed."
                self._refuse(408, "request-timeout", "Request timeout", detail)
            self._since, self._n_body_before = now, self._n_body

    def _check_end(self, now: float) -> None:
        """A client that takes the last answer may take its time; one that does not take it may not."""
        if not self._ends:
            self._ends = True
            self._count_unsent(now)
        elif not self._is_taken(now, self.LINGER_S):
            self.transport.abort()

    def _is_taken(self, now: float, window_s: float) -> bool:
        """False: less than BODY_BYTES_PER_S of what waits was taken in the last window, or nothing waits any more."""
        if now - self._unsent_since < window_s:
            return True
        unsent, before = self.transport.get_write_buffer_size(), self._unsent
        self._count_unsent(now)
        return unsent > 0 and before - unsent >= window_s * self.BODY_BYTES_PER_S

    def _count_unsent(self, now: float) -> None:
        self._unsent, self._unsent_since = self.transport.get_write_buffer_size(), now

    def _refuse_headers(self, detail: str) -> None:
        self._refuse(431, "headers-too-large", "Headers too large", detail)

    def _refuse(self, status: int, word: str, title: str, detail: str) -> None:
        """Ends the connection, with an answer where one can still be given, and after those that are under way."""
        self._deaf = True
        self._unset_keepalive_if_required()
        answering, cycle = self._is_answering, self.cycle
        request_id = secrets.token_hex(8)
        address = self.client[0] if self.client else ""
        log.warning("request refused", status=status, address=address, reason=detail, request_id=request_id)
        if answering and self.expected == "body" and not self.pipeline and not cycle.response_started:
            # Its handler waits for more of the body, and has nobody to answer.
            cycle.disconnected = True
            cycle.message_event.set()
        elif answering and (self.expected != "body" or self.pipeline):
            # Requests that came whole get their answers, and the last of these ends the connection.
            if self.expected == "body":
                self.pipeline.popleft()
            else:
                cycle.keep_alive = False
            return
        elif self.expected == "body":
            # Behind an answer that is not whole, another one would be part of it.
            self.transport.close()
            return
        self._writes.write(_answer(problem(status, word, title, detail, request_id), self.server_state.default_headers))
        # Closed at once, with something unread, the connection would take the answer back.
        self._writes.write_eof()
        self.flow.held = False
        self.flow.resume_reading()
        self._ends = True
        self._count_unsent(self.loop.time())


def _answer(told: Problem, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The last one of its connection."""
    body = msgspec.json.encode(told)
    lines = [
        *headers,
        *HEADERS.items(),
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", told.request_id.encode()),
        (b"connection", b"close"),
    ]
    return STATUS_LINE[told.status] + b"".join(b"%b: %b\r\n" % line for line in lines) + b"\r\n" + body
