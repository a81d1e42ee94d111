"""HTTP for one page: who may ask, what is answered, one text at a time.

A page of somebody else's, open in the same browser, must not reach the model. So a request must name this server
(against DNS rebinding), one that writes must come from this server's own page and carry JSON, and no answer ever
allows another origin to read it.
"""

import base64
import hashlib
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
from urllib.parse import urlsplit

from myllm.errors import UserError
from myllm.inference.load import LanguageModel, load_model
from myllm.planning.flops import n_parameters

from .events import generate_events
from .request import MAX_NEW_TOKENS, GenerateRequest, parse_request, to_settings
from .security import is_allowed_host, is_loopback, listen

MAX_BODY_BYTES = 1 << 20
BUSY_TIMEOUT_S = 1.0
"""How long a request waits for the one before it: the page may ask again while a stopped text is still ending."""
CLIENT_TIMEOUT_S = 30.0
"""After which a client that neither sends nor takes anything is taken for gone."""


class HttpError(Exception):
    """A request that is not answered, with the HTTP status that says why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


def serve(
    model: str, device: str, int8: bool, host: str, port: int, default: GenerateRequest, precision: str | None = None
) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: no such model or device, no torchao for int8, or no such address or a port in use.
    """
    with listen(host, port) as listening:  # before the seconds that loading takes
        loaded = load_model(model, device, int8, precision)
        with PageServer(listening, host, loaded, model, default) as server:
            if not server.alone:
                print(f"note: everybody who reaches {host} can use the model: there is no password", file=sys.stderr)
            print(f"{model} is at {server.address}; Ctrl-C ends it", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                server.stop()
                print("\nended")


class PageServer(ThreadingHTTPServer):
    """The page and its model, on a socket that already listens. `with` closes it.

    Args:
        host: as the user gave it; a browser may call the server by this name too.
        name: of the model, for people.
        default: what a request leaves out, and where the page's sliders stand at first.
    """

    def __init__(
        self, listening: socket.socket, host: str, model: LanguageModel, name: str, default: GenerateRequest
    ) -> None:
        super().__init__(listening.getsockname()[:2], RequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.host, self.model, self.default = host, model, default
        self.page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        self.policy = _policy(self.page)
        self.facts = _facts(model, name, default)
        self.busy, self.stopping = threading.Lock(), threading.Event()
        self.writer: threading.Thread | None = None  # of the newest text

    @property
    def alone(self) -> bool:
        """Whether this machine alone can reach it."""
        return is_loopback(self.socket.getsockname()[0])

    @property
    def address(self) -> str:
        """What to type into a browser."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else "::1" if self.host == "::" else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.socket.getsockname()[1]}"

    def stop(self, patience_s: float = 10.0) -> None:
        """End the text under way, and wait for its thread: torch aborts where the program ends in its midst."""
        self.stopping.set()
        if self.writer:
            self.writer.join(patience_s)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave when they like; anything else is a fault of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class RequestHandler(BaseHTTPRequestHandler):
    """One request and its answer, after which the connection is closed."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = CLIENT_TIMEOUT_S
    disable_nagle_algorithm = True  # a token leaves when it is there

    def do_GET(self) -> None:
        self._answer({"/": self._page, "/model": self._model})

    def do_POST(self) -> None:
        self._answer({"/generate": self._generate})

    def _answer(self, rooms: dict[str, Callable[[], None]]) -> None:
        length = self.headers.get("Content-Length", "")
        self.unread = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else -1
        try:
            self._check_host()
            path = self.path.partition("?")[0]
            if path not in rooms:
                raise HttpError(HTTPStatus.NOT_FOUND, f"there is no {self.command} {path} here; the page is at /")
            rooms[path]()
        except HttpError as refusal:
            self._skip_body()
            self._send_json(refusal.status, {"error": str(refusal)})
        except UserError as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _check_host(self) -> None:
        named = self.headers.get_all("Host", [])
        if len(named) != 1 or not is_allowed_host(named[0], self.server.host, self.server.alone):
            raise HttpError(
                HTTPStatus.FORBIDDEN,
                f"this server does not go by the name {', '.join(named) or '(none)'}: open {self.server.address}",
            )

    def _page(self) -> None:
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page.encode())

    def _model(self) -> None:
        self._send_json(HTTPStatus.OK, self.server.facts)

    def _generate(self) -> None:
        asked = parse_request(self._body(), self.server.default)
        if not self.server.busy.acquire(timeout=BUSY_TIMEOUT_S):
            raise HttpError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "another text is being written, perhaps in another window: wait for its end, or stop it there",
            )
        try:
            self.server.writer = threading.current_thread()
            self._stream(asked)
        except OSError:  # the client went away, and its text with it
            pass
        finally:
            self.server.busy.release()

    def _body(self) -> bytes:
        origin = self.headers.get("Origin")
        if origin is not None and _place(origin) != self.headers["Host"].lower():
            raise HttpError(HTTPStatus.FORBIDDEN, f"{origin} is not this server's page, and may not use it")
        kind = self.headers.get_content_type()
        if kind != "application/json":  # what a page elsewhere cannot send without asking first
            raise HttpError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the request is {kind}: send application/json")
        if self.unread < 0:
            raise HttpError(HTTPStatus.LENGTH_REQUIRED, "the request does not say its Content-Length")
        if self.unread > MAX_BODY_BYTES:
            raise HttpError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request has {self.unread:,} bytes, but {MAX_BODY_BYTES:,} is the limit: give a shorter prompt",
            )
        body, self.unread = self.rfile.read(self.unread), 0
        return body

    def _skip_body(self) -> None:
        """Read what was refused: a connection that is closed on unread data may take the answer with it."""
        self.rfile.read(max(0, min(self.unread, 8 * MAX_BODY_BYTES)))

    def _stream(self, asked: GenerateRequest) -> None:
        """A JSON object a line. The text is whole when the last one is the end, or an error."""
        self._begin(HTTPStatus.OK, "application/x-ndjson")
        try:
            with closing(generate_events(self.server.model, asked)) as events:
                for event in events:
                    self.wfile.write(_line(event))
                    if self.server.stopping.is_set():
                        return
        except OSError:
            raise
        except Exception as error:  # such as a GPU without memory: the page says so, and the server goes on
            traceback.print_exc()
            why = f"the server failed, its terminal says more: {type(error).__name__}: {error}"
            self.wfile.write(_line({"kind": "error", "error": why}))

    def _send_json(self, status: HTTPStatus, value: object) -> None:
        self._send(status, "application/json", _line(value))

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self._begin(status, kind, len(body))
        self.wfile.write(body)

    def _begin(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in {
            "Connection": "close",
            "Cache-Control": "no-store",
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: broken requests and other methods."""
        status = HTTPStatus(code)
        self._send_json(status, {"error": f"{message or status.phrase}; the page is at /"})

    def version_string(self) -> str:
        return "myllm"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal shows the address, and faults."""


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _facts(model: LanguageModel, name: str, default: GenerateRequest) -> dict[str, Any]:
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


def _policy(page: str) -> str:
    """Only the page's own style and script run, whatever a token spells; nothing is loaded from elsewhere."""
    script, style = (
        " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    )
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
