"""Connections of the server: none is held open for nothing, and at the end each one hears that it is the end.

A connection waits for a request that is not there whole: its head must come within `HEAD_SECONDS`, its body within the
server's timeout. Beyond a number of connections, the one that has waited longest goes for each that comes, so that
thousands of half-open ones keep nobody out. The only file that knows the insides of uvicorn.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for the head of a request to come
MOST_CONNECTIONS = 2048
SPARE_FILES = 128  # for everything that is no connection
LAST_WORDS_SECONDS = 1.0  # after the signal, in which whoever has connected hears 503


def make_protocol(*, most: int = MOST_CONNECTIONS, head_seconds: float = HEAD_SECONDS) -> type[H11Protocol]:
    """HTTP as uvicorn speaks it, for at most `most` connections, whose requests begin within `head_seconds`."""
    waiting: dict[H11Protocol, None] = {}  # for a request, or the rest of one; the longest first

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most and waiting:
                next(iter(waiting)).transport.abort()  # connection_lost takes it out, a little later
                waiting.pop(next(iter(waiting)))
            waiting[self] = None
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._expect_head()
            else:
                self._end_deadline()
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                waiting.pop(self, None)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            waiting[self] = None  # for the next request, as long as uvicorn keeps it

        def connection_lost(self, exc: Exception | None) -> None:
            waiting.pop(self, None)
            self._end_deadline()
            super().connection_lost(exc)

        def shutdown(self) -> None:
            is_half = self.conn.their_state is h11.SEND_BODY and self in waiting
            if is_half or self.cycle is None:  # nothing was accepted of it, and silence would look like a failure
                self._say(b"503 Service Unavailable")
            super().shutdown()
            if is_half:
                self.transport.close()

        def _expect_head(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(head_seconds, self._give_up)

        def _end_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if not self.transport.is_closing():
                self._say(b"408 Request Timeout")
                self.transport.close()

        def _say(self, status: bytes) -> None:
            with contextlib.suppress(RuntimeError):
                self.transport.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    return Protocol


def allow_files(most: int = MOST_CONNECTIONS) -> int:
    """Let this process have as many files open as `most` connections need; returns how many connections it can have."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are no files
        return most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft - SPARE_FILES))


class HttpServer(uvicorn.Server):
    """Serves an app. Once it is to end, `say_goodbye` is called, and whoever has connected still gets an answer."""

    def __init__(
        self,
        app: Any,
        *,
        say_goodbye: Callable[[], None],
        announce: Callable[[], None] = lambda: None,
        most_connections: int = MOST_CONNECTIONS,
        head_seconds: float = HEAD_SECONDS,
        last_words_seconds: float = LAST_WORDS_SECONDS,
    ) -> None:
        protocol = make_protocol(most=most_connections, head_seconds=head_seconds)
        super().__init__(uvicorn.Config(app, http=protocol, ws="none", log_level="error", access_log=False))
        self._say_goodbye, self._announce, self._last_words = say_goodbye, announce, last_words_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer for a moment that it is over, then end when what was accepted is finished."""
        self._say_goodbye()
        await asyncio.sleep(self._last_words)
        await super().shutdown(sockets)
