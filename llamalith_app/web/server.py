"""The HTTP server: uvicorn with limits on bytes and time that it lacks.

Everybody can open a connection, so it is limited before anybody has logged in: the size of a request's head, the time
for a head, the speed of a body and of taking an answer, the time to be idle. Built by `app.create_server`. Does not
know what a request means; that is the application's part.
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
"""How long an idle connection is kept. Longer than proxies keep one for reuse (nginx: 60 s) and than programs poll: the
side that may still send a request must be the first to close."""

log = structlog.get_logger(__name__)


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Deadlines of a connection, in seconds. The server checks them every second or so."""

    head_s: float = 10.0
    """From the connection, or the first byte, to the end of the headers. Beyond it: 408."""
    body_s: float = 10.0
    """The window in which a body that is being read must bring MIN_BYTES_PER_S. Below it: 408."""
    linger_s: float = 5.0
    """For what is still sent after the answer, and for reading the last answer of a connection."""
    taken_s: float = float(IDLE_S)
    """The window in which a client must read MIN_BYTES_PER_S of an answer that waits for it."""
    check_ticks: int = 10
    """Ticks of uvicorn's clock, 0.1 s each, between two checks of these deadlines."""


TIMINGS = Timings()


class Server(uvicorn.Server):
    """A uvicorn server that ends open streams before it waits for connections to end, and enforces `timings`.

    `end_streams` is called first at a shutdown: streams would never end by themselves.
    """

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], None], timings: Timings = TIMINGS) -> None:
        super().__init__(config)
        self._end_streams = end_streams
        self._timings = timings

    async def on_tick(self, counter: int) -> bool:
        if counter % self._timings.check_ticks == 0:
            # One check of all connections instead of timers: a request then costs no timer.
            now = asyncio.get_running_loop().time()
            for connection in tuple(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.check_time(now, self._timings)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_streams()
        await super().shutdown(sockets)


class WriteCoalescer:
    """A transport that passes on all writes of one turn of the event loop in one system call.

    uvicorn writes an answer's head and body separately, and uvloop passes on each at once. With one system call for
    both, the product accepts 8 % more jobs a second (bench/README.md).
    """

    MAX_HELD_BYTES = 64 * 1024
    """More is passed on at once, so that the transport below notices a reader that does not keep up."""

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
        if len(self._held) > self.MAX_HELD_BYTES:
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
    """Flow control that stops reading while requests of the connection wait for their turn (`held`)."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class Protocol(HttpToolsProtocol):
    """One connection with limits. Deadlines are in `Timings`."""

    MAX_HEAD_BYTES = 64 * 1024
    """Of a request before its body, and of the framing of a chunked body. Beyond it: 431."""
    MAX_HEADER_LINES = 200
    """A header line costs memory of many times its length. Beyond it: 431."""
    MIN_BYTES_PER_S = 1024
    """The least speed of a body, and of taking an answer."""
    MAX_IGNORED_BYTES = 32 * 1024 * 1024
    """May come after the answer. Twice the largest body, so that the sender of a body reads why it was refused."""
    MAX_PIPELINED = 32
    """Requests that may wait behind one. The connection is closed after the answer to the last of them."""

    PIECE_BYTES = 4096
    """Fed to the parser at a time, so that it never holds much more than MAX_HEAD_BYTES."""
    FRAMING_PER_BYTE = 16
    """Bytes of framing that a chunked body may have for each byte of content, since chunks may be short."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._writes = WriteCoalescer(transport, self.loop)
        super().connection_made(self._writes)  # type: ignore[arg-type]
        self.flow: Flow = Flow(self._writes)  # type: ignore[arg-type]
        self.has_received = False
        """Whether any byte has come."""
        self._ignores_input = False
        """Whether further input is dropped unread."""
        self._head_to_reparse = b""
        """A head that offers another protocol, without that offer. It is parsed in place of the original."""
        self._is_last = False
        self._ends = False
        self._unsent = 0
        self._unsent_since = 0.0
        self._expect("head")

    def eof_received(self) -> None:
        """The transport below closes by itself after this. A client may close its side and still read the answer."""
        self._writes.flush()

    # What is read

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self.has_received = True
        if self.expected == "request" and not self._is_answering:
            self._expect("head")
        if self._ignores_input:
            self._ignore(len(data))
        while data and not self._ignores_input:
            data = (
                self._feed(data[: self.PIECE_BYTES]) + data[self.PIECE_BYTES :]
                if len(data) > self.PIECE_BYTES
                else self._feed(data)
            )

    def _feed(self, piece: bytes) -> bytes:
        """Parses a piece of input; returns what is left for another call."""
        rest = b""
        self._has_advanced = False
        n_body = self._n_body
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            # No other protocol is supported; the request is answered in HTTP/1.1.
            rest = self._head_to_reparse + piece[upgrade.args[0] :]
            if self._head_to_reparse:
                # The old parser accepts nothing more after a head with `Connection: close`.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self._head_to_reparse = b""
        except httptools.HttpParserError as error:
            is_ours = isinstance(error, (httptools.HttpParserCallbackError, httptools.HttpParserInvalidURLError))
            reason = "its address cannot be read" if is_ours else str(error)
            self._refuse(400, "bad-input", "Bad input", f"This is no HTTP request: {reason}.")
            return b""
        if not self._has_advanced and not self._ignores_input:
            self._n_framing += len(piece) - (self._n_body - n_body)
            if self._n_framing >= self.MAX_HEAD_BYTES + self.FRAMING_PER_BYTE * self._n_body:
                self._refuse_headers(
                    f"The headers are too large: at most {self.MAX_HEAD_BYTES // 1024} KiB before the body."
                )
        return rest

    def on_message_begin(self) -> None:
        if not self._ignores_input:
            # The timer may have been set in the same segment, by the end of a body whose answer had been sent.
            self._unset_keepalive_if_required()
            super().on_message_begin()
            self._expect("head")

    def on_url(self, url: bytes) -> None:
        if not self._ignores_input:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers of a chunked body are dropped: the checks of the headers have not seen them.
        if self._ignores_input or self.expected != "head":
            return
        if len(self.headers) == self.MAX_HEADER_LINES:
            self._refuse_headers(f"There are too many headers: at most {self.MAX_HEADER_LINES} lines.")
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._ignores_input:
            return
        if (version := self.parser.get_http_version()) not in ("1.0", "1.1"):
            detail = f"HTTP/{version} is not spoken here: HTTP/1.1 is."
            self._refuse(400, "bad-input", "Bad input", detail)
            return
        if self.parser.should_upgrade() and (method := self.parser.get_method()) != b"CONNECT":
            # The parser skips the body of such a request, but clients offer HTTP/2 with any request (curl --http2).
            lines = [b"%b: %b\r\n" % line for line in self.headers if line[0] != b"upgrade"]
            start = b"%b %b HTTP/%b\r\n" % (method, self.url, version.encode())
            self._head_to_reparse = start + b"".join(lines) + b"\r\n"
            return
        super().on_headers_complete()
        self._expect("body")
        self.flow.held = bool(self.pipeline)
        if len(self.pipeline) >= self.MAX_PIPELINED:
            self._is_last = True
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if not self._ignores_input:
            self._n_body += len(body)
            if not self._is_answering:
                self._ignore(len(body))
            super().on_body(body)

    def _ignore(self, n_bytes: int) -> None:
        """Counts input that nobody reads, and drops the connection beyond MAX_IGNORED_BYTES: reading it costs CPU."""
        self._n_ignored += n_bytes
        if self._n_ignored > self.MAX_IGNORED_BYTES:
            self.transport.abort()

    def on_message_complete(self) -> None:
        if self._ignores_input or self._head_to_reparse:
            return
        super().on_message_complete()
        self._expect("request")
        self._ignores_input = self._is_last
        if not self._is_answering:
            # The answer was sent before the end of the body, and the body's bytes have cancelled its idle timer.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._count_unsent(self.loop.time())

    def on_response_complete(self) -> None:
        # The call of super() below takes the next request out of the pipeline.
        self.flow.held = len(self.pipeline) > 1
        self._since = self.loop.time()
        if self._ignores_input and not self.pipeline:
            self.transport.close()
        super().on_response_complete()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]

    def _expect(self, what: Literal["head", "body", "request"]) -> None:
        """Sets what the client has to send next; `request`: nothing, but it may begin another one."""
        self.expected = what
        self._has_advanced = True
        self._since = self.loop.time()
        self._n_framing = 0
        self._n_body = 0
        self._n_body_before = 0
        self._n_ignored = 0

    # Deadlines

    def check_time(self, now: float, timings: Timings) -> None:
        """Closes the connection if it exceeds a deadline. Called every second or so; `now` is the loop's time."""
        if self._ends or self.transport.is_closing():
            self._check_end(now, timings)
            return
        if self.flow.write_paused and not self._is_taken(now, timings.taken_s):
            self.transport.abort()
            return
        if self._ignores_input or self.expected == "request":
            # An answer is being sent, or the timer of idle connections runs.
            return
        if self.expected == "body" and not self._is_answering:
            if now - self._since >= timings.linger_s:
                self.transport.close()
        elif self.flow.read_paused or self.pipeline:
            # We do not read, so the client is not slow.
            self._since = now
        elif self.expected == "head":
            if now - self._since < timings.head_s:
                return
            if not self.has_received:
                self.transport.close()
            else:
                detail = f"The headers did not come within {timings.head_s:g} s."
                self._refuse(408, "request-timeout", "Request timeout", detail)
        elif now - self._since >= timings.body_s:
            if self._n_body - self._n_body_before < timings.body_s * self.MIN_BYTES_PER_S:
                detail = f"The body came too slowly: at least {self.MIN_BYTES_PER_S} bytes a second are needed."
                self._refuse(408, "request-timeout", "Request timeout", detail)
            self._since, self._n_body_before = now, self._n_body

    def _check_end(self, now: float, timings: Timings) -> None:
        """Drops a connection whose client does not read the last answer at MIN_BYTES_PER_S."""
        if not self._ends:
            self._ends = True
            self._count_unsent(now)
        elif not self._is_taken(now, timings.linger_s):
            self.transport.abort()

    def _is_taken(self, now: float, window_s: float) -> bool:
        """Whether the client reads fast enough. False if it read less than MIN_BYTES_PER_S in the last window, or if
        nothing is left to read."""
        if now - self._unsent_since < window_s:
            return True
        unsent, before = self.transport.get_write_buffer_size(), self._unsent
        self._count_unsent(now)
        return unsent > 0 and before - unsent >= window_s * self.MIN_BYTES_PER_S

    def _count_unsent(self, now: float) -> None:
        self._unsent, self._unsent_since = self.transport.get_write_buffer_size(), now

    def _refuse_headers(self, detail: str) -> None:
        self._refuse(431, "headers-too-large", "Headers too large", detail)

    def _refuse(self, status: int, word: str, title: str, detail: str) -> None:
        """Ends the connection after the answers that are being sent, with an answer of its own if that is possible."""
        self._ignores_input = True
        self._unset_keepalive_if_required()
        answering, cycle = self._is_answering, self.cycle
        request_id = secrets.token_hex(8)
        address = self.client[0] if self.client else ""
        log.warning("request refused", status=status, address=address, reason=detail, request_id=request_id)
        if answering and self.expected == "body" and not self.pipeline and not cycle.response_started:
            # The handler waits for more of the body; it must see that the client is gone.
            cycle.disconnected = True
            cycle.message_event.set()
        elif answering and (self.expected != "body" or self.pipeline):
            # Complete requests get their answers; the connection ends after the last of these.
            if self.expected == "body":
                self.pipeline.popleft()
            else:
                cycle.keep_alive = False
            return
        elif self.expected == "body":
            # The client would take a second answer for a part of the first, incomplete one.
            self.transport.close()
            return
        self._writes.write(_answer(problem(status, word, title, detail, request_id), self.server_state.default_headers))
        # Closing at once with unread input would reset the connection and lose the answer.
        self._writes.write_eof()
        self.flow.held = False
        self.flow.resume_reading()
        self._ends = True
        self._count_unsent(self.loop.time())


def _answer(refused: Problem, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The bytes of the last answer of a connection."""
    body = msgspec.json.encode(refused)
    lines = [
        *headers,
        *HEADERS.items(),
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", refused.request_id.encode()),
        (b"connection", b"close"),
    ]
    return STATUS_LINE[refused.status] + b"".join(b"%b: %b\r\n" % line for line in lines) + b"\r\n" + body
