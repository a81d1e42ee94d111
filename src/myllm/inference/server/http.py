"""The HTTP server: a page and OpenAI's completions API, one request at a time.

A page from another site, open in the same browser, must not reach the model. So a request must name this server in its
Host header (against DNS rebinding), a POST must come from this server's own page and carry JSON, and no response allows
other origins to read it.
"""

import json
import re
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import unquote

from myllm.errors import UserError
from myllm.inference.generate import LanguageModel
from myllm.planning.flops import n_parameters

from .events import generate_events
from .openai_request import parse_completion
from .openai_response import Completion
from .request import MAX_NEW_TOKENS, GenerateRequest, HttpError, parse_request, to_settings
from .security import content_security_policy, is_allowed_host, is_loopback, listen, same_host

MAX_BODY_BYTES = 1 << 20
BUSY_TIMEOUT_S = 1.0
"""How long the page waits for a text that another client reads."""
API_BUSY_TIMEOUT_S = 600.0
"""How long a request of the API waits for its turn: as long as OpenAI's client does by default."""
CLIENT_TIMEOUT_S = 30.0
"""A client that neither sends nor reads for this long is disconnected."""


def serve(models: dict[str, Callable[[], LanguageModel]], host: str, port: int, default: GenerateRequest) -> None:
    """Serve the page and the API until Ctrl-C.

    Args:
        models: by name; the functions load them.

    Raises:
        UserError: a model cannot be loaded, or the address cannot be used.
    """
    # It listens before it loads the models, which takes seconds.
    with (
        listen(host, port) as listening,
        PageServer(listening, host, {name: load() for name, load in models.items()}, default) as server,
    ):
        if not server.loopback_only:
            print(f"note: everyone who can reach {host} can use the model: there is no password", file=sys.stderr)
        print(f"serving {' and '.join(models)} at {server.address} (press Ctrl-C to stop)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.stop()
            print("\nstopped")


class PageServer(ThreadingHTTPServer):
    """The page, the API and their models, on a socket that already listens. A context manager.

    Args:
        host: as the user gave it; requests may name the server so.
        models: by name. The page shows their texts side by side.
        default: values of settings that a request omits, and the initial values on the page.
    """

    def __init__(
        self, listening: socket.socket, host: str, models: dict[str, LanguageModel], default: GenerateRequest
    ) -> None:
        super().__init__(listening.getsockname()[:2], HttpExchange, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.host, self.models, self.default = host, models, default
        self.page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        self.security_policy = content_security_policy(self.page)
        self.started = int(time.time())
        self.busy, self.stopping = threading.Lock(), threading.Event()
        self.generating: threading.Thread | None = None
        self.exchange: HttpExchange | None = None
        """The newest that had its turn."""

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
        models = self._model_objects()
        objects = {
            "/models": self._page_info(),
            "/health": {"status": "ok"},
            "/v1/models": {"object": "list", "data": models},
            **{f"/v1/models/{model['id']}": model for model in models},
        }
        routes = {path: partial(self._send_json, HTTPStatus.OK, value) for path, value in objects.items()}
        page = self.server.page.encode()
        self._dispatch({"/": partial(self._send, HTTPStatus.OK, "text/html; charset=utf-8", page), **routes})

    def do_POST(self) -> None:
        self._dispatch(
            {
                "/generate": self._generate,
                "/v1/completions": lambda: self._complete(chat=False),
                "/v1/chat/completions": lambda: self._complete(chat=True),
            }
        )

    def _dispatch(self, routes: Mapping[str, Callable[[], None]]) -> None:
        length = self.headers.get("Content-Length", "")
        self.unread_bytes = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else -1
        try:
            self._check_host()
            path = unquote(self.path.partition("?")[0])
            if path not in routes:
                raise HttpError(HTTPStatus.NOT_FOUND, f"{self.command} {path} does not exist; the page is at /")
            routes[path]()
        except HttpError as error:
            # Read the body: a connection closed with unread data may lose the response.
            self.rfile.read(max(0, min(self.unread_bytes, 8 * MAX_BODY_BYTES)))
            self._send_error(error)
        except UserError as error:
            self._send_error(HttpError(HTTPStatus.BAD_REQUEST, str(error)))

    def _send_error(self, error: HttpError) -> None:
        """In the form of the page, or in OpenAI's."""
        self._send_json(error.status, _error_body(error) if self.path.startswith("/v1/") else {"error": str(error)})

    def _page_info(self) -> dict[str, Any]:
        models = [_model_info(name, model) for name, model in self.server.models.items()]
        return {"models": models, "max_new_tokens": MAX_NEW_TOKENS, "settings": to_settings(self.server.default)}

    def _model_objects(self) -> list[dict[str, Any]]:
        """In OpenAI's form."""
        created = self.server.started
        return [{"id": name, "object": "model", "created": created, "owned_by": "myllm"} for name in self.server.models]

    def _check_host(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not is_allowed_host(hosts[0], self.server.host, self.server.loopback_only):
            raise HttpError(
                HTTPStatus.FORBIDDEN,
                f"{', '.join(hosts) or '(none)'} is not a name of this server: open {self.server.address}",
            )

    def _generate(self) -> None:
        request = parse_request(self._read_body(), self.server.default)
        name = request.model or next(iter(self.server.models))
        if name not in self.server.models:
            raise HttpError(HTTPStatus.NOT_FOUND, f"no model {name!r}; models: {', '.join(self.server.models)}")
        events = generate_events(self.server.models[name], request)
        with self._turn(BUSY_TIMEOUT_S):  # the text is complete if the last line is of kind `end`
            self._stream(
                "application/x-ndjson", events, _json_line, lambda error: {"kind": "error", "error": str(error)}
            )

    def _complete(self, chat: bool) -> None:
        request = parse_completion(self._read_body(), self.server.default, list(self.server.models), chat)
        completion = Completion(self.server.models[request.model], request)
        with self._turn(API_BUSY_TIMEOUT_S):
            if not request.stream:
                self._send_whole(completion)
            elif self._stream("text/event-stream", completion.chunks(), _server_sent_event, _error_body):
                self.wfile.write(b"data: [DONE]\n\n")

    @contextmanager
    def _turn(self, timeout_s: float) -> Iterator[None]:
        """Wait for the request before this one; if its client has left, until its next token is there and ends it."""
        while not self.server.busy.acquire(timeout=timeout_s):
            if self.server.exchange and not self.server.exchange.client_left():
                raise HttpError(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    "another text is being generated, perhaps in another window: wait for its end, or stop it there",
                )
        try:
            self.server.exchange, self.server.generating = self, threading.current_thread()
            yield
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

    def _stream(
        self,
        content_type: str,
        values: Generator[dict[str, Any], None, None],
        encode: Callable[[object], bytes],
        failure: Callable[[HttpError], object],
    ) -> bool:
        """Send objects as they are generated, and `failure` of an error. False if they are not complete."""
        self._send_headers(HTTPStatus.OK, content_type)
        try:
            with closing(values):
                for value in values:
                    self.wfile.write(encode(value))
                    if self.server.stopping.is_set():
                        return False
        except OSError:
            raise
        except Exception as error:  # for example out of GPU memory: the server continues
            self.wfile.write(encode(failure(_report_failure(error))))
            return False
        return True

    def _send_whole(self, completion: Completion) -> None:
        pieces = []
        try:
            with closing(completion.pieces()) as parts:
                for piece in parts:
                    pieces.append(piece)
                    if self.server.stopping.is_set() or self.client_left():
                        return
        except Exception as error:
            self._send_error(_report_failure(error))
            return
        self._send_json(HTTPStatus.OK, completion.whole(pieces))

    def client_left(self) -> bool:
        """True if the client closed the connection, which ends its text. Other exchanges ask too."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):  # reset, or closed by now on our side
            return True

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
        self.path = getattr(self, "path", "")  # not set if even the first line is malformed
        self._send_error(HttpError(status, f"{message or status.phrase}; the page is at /"))

    def version_string(self) -> str:
        return "myllm"

    def log_message(self, format: str, *args: object) -> None:
        """Log no requests."""


def _model_info(name: str, model: LanguageModel) -> dict[str, Any]:
    transformer, tokenizer = model
    return {
        "name": name,
        "parameters": n_parameters(transformer.config),
        "context": transformer.config.max_seq_len,
        "vocabulary": transformer.config.vocab_size,
        "tokenizer": tokenizer.name,
        "device": str(next(transformer.parameters()).device),
    }


def _error_body(error: HttpError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def _report_failure(error: Exception) -> HttpError:
    """Print the traceback of a failed text; returns the error for the client."""
    traceback.print_exc()
    message = f"the server failed, see its terminal: {type(error).__name__}: {error}"
    return HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, message)


def _json_line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _server_sent_event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"
