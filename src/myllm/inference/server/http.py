"""The HTTP server: one page, one text at a time.

A page from another site, open in the same browser, must not reach the model. So a request must name this server in its
Host header (against DNS rebinding), a POST must come from this server's own page and carry JSON, and no response allows
other origins to read it.
"""

import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from myllm.errors import UserError
from myllm.inference.language_model import LanguageModel
from myllm.planning.flops import n_parameters

from .events import generate_events
from .request import MAX_NEW_TOKENS, GenerateRequest, parse_request, to_settings
from .security import content_security_policy, is_allowed_host, is_loopback, listen, same_host

MAX_BODY_BYTES = 1 << 20
BUSY_TIMEOUT_S = 1.0
"""How long a request waits for the one before it: a stopped text takes a moment to end."""
CLIENT_TIMEOUT_S = 30.0
"""A client that neither sends nor reads for this long is disconnected."""


class HttpError(Exception):
    """A rejected request, with the HTTP status of the response."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def serve(name: str, load: Callable[[], LanguageModel], host: str, port: int, default: GenerateRequest) -> None:
    """Serve the page until Ctrl-C.

    Args:
        name: of the model, for the page.

    Raises:
        UserError: the model cannot be loaded, or the address cannot be used.
    """
    # It listens before it loads the model, which takes seconds.
    with listen(host, port) as listening, PageServer(listening, host, load(), name, default) as server:
        if not server.loopback_only:
            print(f"note: everyone who can reach {host} can use the model: there is no password", file=sys.stderr)
        print(f"serving {name} at {server.address} (press Ctrl-C to stop)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.stop()
            print("\nstopped")


class PageServer(ThreadingHTTPServer):
    """The page and its model, on a socket that already listens. A context manager.

    Args:
        host: as the user gave it; requests may name the server so.
        name: of the model, for the page.
        default: values of settings that a request omits, and the initial values on the page.
    """

    def __init__(
        self, listening: socket.socket, host: str, model: LanguageModel, name: str, default: GenerateRequest
    ) -> None:
        super().__init__(listening.getsockname()[:2], HttpExchange, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.host, self.model, self.default = host, model, default
        self.page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        self.security_policy = content_security_policy(self.page)
        self.model_info = _model_info(model, name, default)
        self.busy, self.stopping = threading.Lock(), threading.Event()
        self.generating: threading.Thread | None = None

    @property
    def loopback_only(self) -> bool:
        """True if only this machine can reach the server."""
        return is_loopback(self.socket.getsockname()[0])

    @property
    def address(self) -> str:
        """The URL for a browser."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.socket.getsockname()[1]}"

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the current text and wait for its thread: torch aborts if the process exits during a computation."""
        self.stopping.set()
        if self.generating:
            self.generating.join(timeout_s)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors, except those of clients that disconnect."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class HttpExchange(BaseHTTPRequestHandler):
    """Answers one request, then closes the connection."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = CLIENT_TIMEOUT_S
    disable_nagle_algorithm = True  # send each token at once

    def do_GET(self) -> None:
        self._dispatch(
            {
                "/": lambda: self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page.encode()),
                "/model": lambda: self._send_json(HTTPStatus.OK, self.server.model_info),
            }
        )

    def do_POST(self) -> None:
        self._dispatch({"/generate": self._generate})

    def _dispatch(self, routes: dict[str, Callable[[], None]]) -> None:
        length = self.headers.get("Content-Length", "")
        self.unread_bytes = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else -1
        try:
            self._check_host()
            path = self.path.partition("?")[0]
            if path not in routes:
                raise HttpError(HTTPStatus.NOT_FOUND, f"{self.command} {path} does not exist; the page is at /")
            routes[path]()
        except HttpError as error:
            # Read the body: a connection closed with unread data may lose the response.
            self.rfile.read(max(0, min(self.unread_bytes, 8 * MAX_BODY_BYTES)))
            self._send_json(error.status, {"error": str(error)})
        except UserError as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _check_host(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not is_allowed_host(hosts[0], self.server.host, self.server.loopback_only):
            raise HttpError(
                HTTPStatus.FORBIDDEN,
                f"{', '.join(hosts) or '(none)'} is not a name of this server: open {self.server.address}",
            )

    def _generate(self) -> None:
        request = parse_request(self._read_body(), self.server.default)
        if not self.server.busy.acquire(timeout=BUSY_TIMEOUT_S):
            raise HttpError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "another text is being generated, perhaps in another window: wait for its end, or stop it there",
            )
        try:
            self.server.generating = threading.current_thread()
            self._stream(request)
        except OSError:  # the client disconnected, which ends its text
            pass
        finally:
            self.server.busy.release()

    def _read_body(self) -> bytes:
        origin = self.headers.get("Origin")
        if origin is not None and not same_host(origin, self.headers["Host"]):
            raise HttpError(HTTPStatus.FORBIDDEN, f"requests from {origin} are not allowed")
        content_type = self.headers.get_content_type()
        if content_type != "application/json":  # pages of other origins cannot send it without asking
            raise HttpError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the request is {content_type}, expected application/json"
            )
        if self.unread_bytes < 0:
            raise HttpError(HTTPStatus.LENGTH_REQUIRED, "the request has no valid Content-Length")
        if self.unread_bytes > MAX_BODY_BYTES:
            raise HttpError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request has {self.unread_bytes:,} bytes, the limit is {MAX_BODY_BYTES:,}: give a shorter prompt",
            )
        body, self.unread_bytes = self.rfile.read(self.unread_bytes), 0
        return body

    def _stream(self, request: GenerateRequest) -> None:
        """Send one JSON object per line. The text is complete if the last one is of kind `end`."""
        self._send_headers(HTTPStatus.OK, "application/x-ndjson")
        try:
            with closing(generate_events(self.server.model, request)) as events:
                for event in events:
                    self.wfile.write(_json_line(event))
                    if self.server.stopping.is_set():
                        return
        except OSError:
            raise
        except Exception as error:  # for example out of GPU memory: the server continues
            traceback.print_exc()
            message = f"the server failed, see its terminal: {type(error).__name__}: {error}"
            self.wfile.write(_json_line({"kind": "error", "error": message}))

    def _send_json(self, status: HTTPStatus, value: object) -> None:
        self._send(status, "application/json", _json_line(value))

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self._send_headers(status, content_type, {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def _send_headers(self, status: HTTPStatus, content_type: str, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": content_type,
            "Connection": "close",
            "Cache-Control": "no-store",
            "Content-Security-Policy": self.server.security_policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in {**headers, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by the base class for malformed requests and other methods."""
        status = HTTPStatus(code)
        self._send_json(status, {"error": f"{message or status.phrase}; the page is at /"})

    def version_string(self) -> str:
        return "myllm"

    def log_message(self, format: str, *args: object) -> None:
        """Log no requests."""


def _model_info(model: LanguageModel, name: str, default: GenerateRequest) -> dict[str, Any]:
    transformer, tokenizer = model
    return {
        "name": name,
        "parameters": n_parameters(transformer.config),
        "context": transformer.config.max_seq_len,
        "vocabulary": transformer.config.vocab_size,
        "tokenizer": tokenizer.name,
        "device": str(next(transformer.parameters()).device),
        "max_new_tokens": MAX_NEW_TOKENS,
        "settings": to_settings(default),
    }


def _json_line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
