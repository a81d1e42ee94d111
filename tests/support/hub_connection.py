"""A connection of the loopback Hub: reads requests and sends replies, with the requested speed and faults."""

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote

from support.hub_replies import Reply, Request

if TYPE_CHECKING:
    from support.hub_server import HubServer

PIECE = 1 << 18


class Listener(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: "HubServer") -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), Connection)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that was killed is what the tests are about; a fault of the server's own must be seen.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as the client expects
    disable_nagle_algorithm = True
    server: Listener

    def do_GET(self) -> None:
        hub = self.server.hub
        request = Request(
            self.command, unquote(self.path), self.headers.get("Range"), self.headers.get("Authorization")
        )
        if self.command == "PUT":  # seen from its first byte on
            hub._log(request)
        posted = self._read_body(request)
        if posted is None:
            self._hang_up(reset=True)
            return
        asked = self.headers if self.command == "GET" else Message()  # ranges are defined for GET alone
        reply = hub._reply_to(request, self.path, asked, posted)
        request.status = reply.status
        if self.command != "PUT":
            hub._log(request)
        if reply.status == 0 or hub._closing.is_set():
            self._hang_up(reset=False)
            return
        self.send_response(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(request, reply)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self, request: Request) -> bytes | None:
        """What the client sends; None if the connection ends early, because a test or the client ended it."""
        hub, size = self.server.hub, int(self.headers.get("Content-Length") or 0)
        assert "Transfer-Encoding" not in self.headers, "the client gives lengths"
        if self.command != "PUT":
            return self.rfile.read(size)
        cut, body = hub._take_fault(request, cut=True), bytearray()
        end = size if cut is None else min(cut.after_bytes, size)
        while len(body) < end and (room := hub._room(request, len(body), end)):
            pace = hub._pace_of(request)
            piece = self.rfile.read(min(room, PIECE if pace is None else max(1, int(pace / 20))))
            if not piece:
                break
            body += piece
            request.received_bytes = len(body)
            if pace is not None:
                hub._closing.wait(len(piece) / pace)
        return None if cut is not None or len(body) < size else bytes(body)

    def _send_body(self, request: Request, reply: Reply) -> None:
        hub = self.server.hub
        cut = hub._take_fault(request, cut=True) if reply.is_content else None
        end = len(reply.body) if cut is None else min(cut.after_bytes, len(reply.body))
        try:
            for piece in self._pieces(request, memoryview(reply.body)[:end], reply.is_content):
                request.sent_bytes += len(piece)  # before, so that a client which has it all finds it all logged
                self.wfile.write(piece)
        except ConnectionError:  # the client is gone
            request.sent_bytes -= len(piece)
            self.close_connection = True
            return
        if cut is not None or request.sent_bytes < len(reply.body):
            self._hang_up(reset=cut is not None and cut.reset)

    def _pieces(self, request: Request, body: memoryview, is_content: bool) -> Iterator[memoryview]:
        """The body in pieces, each followed by a wait for the requested speed, until the server closes."""
        hub, at = self.server.hub, 0
        while at < len(body) and (room := hub._room(request, at, len(body)) if is_content else len(body) - at):
            pace = hub._pace_of(request) if is_content else None
            size = min(room, PIECE, PIECE if pace is None else max(1, int(pace / 20)))
            yield body[at : at + size]
            at += size
            if pace is not None:
                hub._closing.wait(size / pace)

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if not reset:
            with contextlib.suppress(OSError):  # the client was faster
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        # A lingering time of zero makes close() send RST. The descriptor is taken out of the socket object, which would
        # otherwise wait for its reader to be closed and be shut down in order first.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, format: str, *args: object) -> None:
        """`HubServer.requests` is the log."""
