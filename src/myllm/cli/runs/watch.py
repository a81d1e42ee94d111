"""`myllm report --watch`: serve the page on this machine only, and redraw it while the runs train.

Nothing is drawn unless a browser has the page open, and never more than a tenth of the time.
"""

import html
import json
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from myllm.errors import UserError
from myllm.inference.server.security import is_allowed_host, listen
from myllm.paths import RunPaths
from myllm.runs.catalog import state_of

HOST = "127.0.0.1"
PAUSE_S = 5.0
"""At least, after a page was drawn."""
PAUSE_FACTOR = 10.0
"""How many times longer the pause is than the drawing before it, at least: training needs the processor too."""
WAITING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>Waiting - MyLLM</title></head>
<body><main style="font: 16px/1.5 system-ui; max-width: 40rem; margin: 3rem auto; padding: 0 1rem">
<p>{}</p><p>This page shows the report as soon as there is one.</p></main>
</body></html>
"""


def serve(runs: Sequence[RunPaths], draw: Callable[[], Path], port: int) -> None:
    """Serve the page that `draw` writes until Ctrl-C.

    Raises:
        UserError: the port cannot be used.
    """
    with WatchServer(WatchedPage(runs, draw), port) as server:
        print(f"watching at {server.address} (press Ctrl-C to stop)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nstopped")


class WatchedPage:
    """A page that is drawn again when its runs have recorded something new."""

    def __init__(self, runs: Sequence[RunPaths], draw: Callable[[], Path]) -> None:
        self._runs, self._draw = runs, draw
        self._script = files(__package__).joinpath("watch.js").read_text(encoding="utf-8")
        self._lock = threading.Lock()
        self._drawn: object = None
        self._page, self._version, self._rest_until = "", 0, 0.0

    def current(self) -> tuple[str, int]:
        """The page and its version; drawn if that is due."""
        with self._lock:
            recorded = [
                _signature(file) for run in self._runs for file in (run.metrics, run.samples, run.config, run.evals)
            ]
            if recorded != self._drawn and time.monotonic() >= self._rest_until:
                started = time.monotonic()
                try:
                    page = self._draw().read_text(encoding="utf-8")
                except UserError as error:  # no row yet, or the run was moved away
                    page = WAITING.format(html.escape(str(error)))
                seconds = time.monotonic() - started
                self._rest_until = time.monotonic() + max(PAUSE_S, PAUSE_FACTOR * seconds)
                self._drawn, self._version = recorded, self._version + 1
                for tag, added in (
                    ("<title>", '<link rel="icon" href="data:,"><title>'),  # else browsers ask for one
                    ("<body>", f'<body data-version="{self._version}">'),
                    ("</body>", f"<script>\n{self._script}</script>\n</body>"),
                ):
                    page = page.replace(tag, added, 1)
                self._page = page
            return self._page, self._version

    def states(self) -> str:
        """Such as "lr-1 running, lr-2 complete"."""
        return ", ".join(f"{run.root.name} {state_of(run)}" for run in self._runs)


class WatchServer(ThreadingHTTPServer):
    """Serves a watched page. A context manager."""

    daemon_threads = True

    def __init__(self, page: WatchedPage, port: int) -> None:
        listening = listen(HOST, port)
        super().__init__(listening.getsockname()[:2], WatchExchange, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.page = page

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.socket.getsockname()[1]}"


class WatchExchange(BaseHTTPRequestHandler):
    """One request."""

    server: WatchServer

    def do_GET(self) -> None:
        """The page at /, its version and the states of its runs at /state."""
        if not is_allowed_host(self.headers.get("Host", ""), HOST, loopback_only=True):
            self.send_error(HTTPStatus.FORBIDDEN, "this address is not that of the server")
        elif self.path == "/":
            self._send("text/html; charset=utf-8", self.server.page.current()[0])
        elif self.path == "/state":
            # The version as text: it is compared with an attribute of the page.
            state = {"version": str(self.server.page.current()[1]), "states": self.server.page.states()}
            self._send("application/json", json.dumps(state))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(HTTPStatus.OK)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        for name, value in {**headers, "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line every two seconds tells nobody anything."""


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
