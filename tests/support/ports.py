"""Ports for what a test starts later."""

import secrets
import socket
from contextlib import suppress


def unused_port() -> int:
    """A port of 127.0.0.1 that nobody has. Not one that the system chooses: it may give that to any connection before
    the test's own process takes it. Linux chooses from 32,768 up, macOS from 49,152."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
