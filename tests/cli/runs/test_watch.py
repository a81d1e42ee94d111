"""`myllm report --watch`: a page that follows its runs, in a browser."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.browser import chromium
from support.run_files import full_rows, train_row, validation_row, write_run

from myllm.cli.runs import watch
from myllm.cli.runs.report import draw
from myllm.cli.runs.watch import WatchedPage, WatchServer
from myllm.errors import UserError
from myllm.paths import RunPaths

DEADLINE_S = 60.0


@pytest.fixture
def runs(temp_data: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunPaths]:
    monkeypatch.setattr(watch, "PAUSE_S", 0.0)
    monkeypatch.setattr(watch, "PAUSE_FACTOR", 0.0)
    return [write_run(temp_data / "runs" / name, full_rows()) for name in ("first", "second")]


@contextmanager
def watching(runs: list[RunPaths], draw: Callable[[list[RunPaths]], Path] = draw) -> Iterator[WatchServer]:
    with WatchServer(WatchedPage(runs, lambda: draw(runs)), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(DEADLINE_S)


def get(server: WatchServer, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.socket.getsockname(), timeout=DEADLINE_S)
    connection.request("GET", path, headers={"Host": host} if host else {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def append(run: RunPaths, *rows: dict) -> None:
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def test_page_redrawn_only_for_new_rows(runs: list[RunPaths], tmp_path: Path) -> None:
    drawn = []

    def count(runs: list[RunPaths]) -> Path:
        drawn.append(1)
        (tmp_path / "page.html").write_text(f"<html><body><main>{len(drawn)}</main></body></html>")
        return tmp_path / "page.html"

    with watching(runs, count) as server:
        assert not drawn
        assert "<main>1</main>" in get(server, "/")[1]
        state = json.loads(get(server, "/state")[1])
        assert state == {"version": "1", "states": "first not known, second not known"}
        append(runs[1], train_row(205))
        assert json.loads(get(server, "/state")[1])["version"] == "2"
        assert "<main>2</main>" in get(server, "/")[1]
        assert len(drawn) == 2
        assert get(server, "/nowhere")[0] == 404
        assert get(server, "/", host="evil.example")[0] == 403


def test_redraw_waits_for_pause(runs: list[RunPaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.html").write_text("<body></body>")
    monkeypatch.setattr(watch, "PAUSE_S", 1_000.0)
    page = WatchedPage(runs, lambda: tmp_path / "page.html")
    assert page.current()[1] == 1
    append(runs[0], train_row(205))
    assert page.current()[1] == 1


def test_comparison_page_updates_live(runs: list[RunPaths], tmp_path: Path) -> None:
    with watching(runs) as server, chromium(tmp_path / "profile") as browser:
        browser.open(server.address, ready="document.querySelector('.chart svg')")
        browser.run("[...document.querySelectorAll('button')].find(e => e.textContent === 'Tokens').click()")
        browser.run("scrollTo(0, 500)")
        before = browser.run("document.querySelector('.chart path[fill=none]').getAttribute('d')")
        append(runs[0], *map(train_row, range(205, 401, 5)), validation_row(400, 3.0))
        browser.wait("document.querySelector('main').textContent.includes('3.0000')")
        browser.wait("!!document.querySelector('.chart svg')")
        assert browser.run("document.querySelector('.chart path[fill=none]').getAttribute('d')") != before
        assert browser.run("[...document.querySelectorAll('.chart svg text')].some(e => e.textContent === 'tokens')")
        assert browser.run("scrollY") == 500
        assert browser.errors == []


def test_browser_wait_survives_reload(tmp_path: Path) -> None:
    """A page of another kind reloads itself, perhaps while a test looks."""
    (tmp_path / "page.html").write_text("<html><body>a page</body></html>")
    reload = "window.name || (window.name = 'reloaded', location.reload(), new Promise(() => {}))"
    with chromium(tmp_path / "profile") as browser:
        browser.open((tmp_path / "page.html").as_uri(), ready="true")
        assert browser.wait(reload) == "reloaded"


@pytest.mark.slow
def test_page_waits_for_first_row(temp_data: Path, runs: list[RunPaths], tmp_path: Path) -> None:
    new = RunPaths(temp_data / "runs/new")
    new.root.mkdir()

    def write(runs: list[RunPaths]) -> Path:
        if not new.metrics.is_file():
            raise UserError("<no> row yet")
        (tmp_path / "page.html").write_text("<html><title>report</title><body><main>a report</main></body></html>")
        return tmp_path / "page.html"

    with watching([new], write) as server, chromium(tmp_path / "profile") as browser:
        browser.open(server.address, ready="document.querySelector('#watching')?.textContent")
        assert "<no> row yet" in browser.run("document.querySelector('main').textContent")
        append(new, train_row(5))
        browser.wait("document.querySelector('main')?.textContent === 'a report'")
        server.shutdown()
        server.server_close()
        browser.wait("document.querySelector('#watching')?.textContent.startsWith('no longer live')")


@pytest.mark.slow
def test_ctrl_c_stops_watching(runs: list[RunPaths], temp_data: Path) -> None:
    words = [sys.executable, "-m", "myllm", "report", "first", "--watch", "--port", "0"]
    environment = os.environ | {"MYLLM_DATA": str(temp_data)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        address = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
        assert address is not None
        connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=DEADLINE_S)
        connection.request("GET", "/")
        assert "MyLLM pretraining run" in connection.getresponse().read().decode()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out, error) == (0, "\nstopped\n", "")
