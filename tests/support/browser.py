"""A headless Chromium for tests, controlled over its DevTools protocol through a pipe. Needs no driver.

Source: https://chromedevtools.github.io/devtools-protocol/ and Chromium's --remote-debugging-pipe: it reads commands
from file descriptor 3 and writes responses and events to 4, as JSON objects that end in a zero byte.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE_S = 180.0
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39}
CONTROL = 2
NAVIGATED = ("Inspected target navigated or closed", "Execution context was destroyed.", "Cannot find context")


class Navigated(Exception):
    """The page was left or reloaded while a script ran in it."""


class Browser:
    """One page. Every wait ends after DEADLINE_S with an error."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers, self.unread, self.count = commands, answers, b"", 0
        self.errors: list[str] = []
        """What scripts threw and what the console was given as an error, a violation of the page's policy included."""
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self.count += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self.count, "method": method, "params": parameters, **session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.count:
            self._note(answer)
        if answer.get("error", {}).get("message", "").startswith(NAVIGATED):
            raise Navigated(method)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + DEADLINE_S
        while b"\0" not in self.unread:
            waiting = select.poll()  # select() takes no descriptor above 1,023
            waiting.register(self.answers, select.POLLIN)
            assert waiting.poll(1_000 * max(0.0, end - time.monotonic())), "the browser does not answer"
            part = os.read(self.answers, 1 << 16)
            assert part, "the browser has ended"
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        given = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(given["exceptionDetails"])[:500])
        elif event.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.errors.append(given["entry"]["text"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression once it is true; the page may reload meanwhile."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            with suppress(Navigated):
                if value := self.run(script):
                    return value
            time.sleep(0.02)
        raise AssertionError(f"never true: {script}; the page says {self.run('document.body.innerText')}")

    def open(
        self, address: str, width: int = 1400, height: int = 900, dark: bool = False, scale: float = 1,
        ready: str = "document.body.dataset.ready === 'yes'",
    ) -> None:  # fmt: skip
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")  # so that what is waited for is never the page before
        self.wait("location.href === 'about:blank' && document.readyState === 'complete'")
        self.call("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && !!({ready})")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        common = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def point(self, element: str, click: bool = False) -> None:
        """Move the mouse onto the middle of an element's first line."""
        box = self.run(f"(e => (e.scrollIntoView({{block: 'center'}}), e.getClientRects()[0].toJSON()))({element})")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser that ends with the block; the test is skipped where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser to look at the page with: install Chromium ({', '.join(NAMES)} on the PATH)")
    (commands_out, commands_in), (answers_out, answers_in) = os.pipe(), os.pipe()
    # Out of the way of 3 and 4, which the browser insists on.
    given = [fcntl.fcntl(node, fcntl.F_DUPFD, 64) for node in (commands_out, answers_in)]
    words = [
        program, "--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-proxy-server",
        "--blink-settings=primaryHoverType=2,availableHoverTypes=2",  # a mouse, which headless it would not have
        f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]  # fmt: skip
    redirect = f'exec "$@" 3<&{given[0]} 4>&{given[1]}'
    process = subprocess.Popen(
        ["bash", "-c", redirect, "bash", *words], pass_fds=given, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for node in (*given, commands_out, answers_in):
        os.close(node)
    try:
        yield Browser(commands_in, answers_out)
    finally:
        os.close(commands_in)
        os.close(answers_out)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=DEADLINE_S)
