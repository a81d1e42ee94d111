"""An S3 on this machine (moto), behind a network that can be slow, cut or down."""

import contextlib
import socket
import threading
from collections.abc import Callable
from urllib.request import urlopen

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "bucket"


class S3Server:
    """s3://bucket, for this process and its children."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._moto.start()
        host, port = self._moto.get_host_and_port()
        urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()  # of what an earlier one in this process had
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._down = False
        self._lock = threading.Lock()
        """A connection that is being made is cut too."""
        self.hold: Callable[[bytes], bool] = lambda received: False
        """True for a request, or a part of it, that shall never arrive."""
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._listener.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        threading.Thread(target=self._accept, daemon=True).start()
        self.client = boto3.client("s3")
        self.client.create_bucket(Bucket=BUCKET)

    def names(self) -> set[str]:
        objects = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {found["Key"] for found in objects}

    def down(self) -> None:
        """Cut all connections, and refuse new ones."""
        with self._lock:
            self._down = True
            for connection in self._open:
                connection.close()

    def up(self) -> None:
        self._down = False

    def stop(self) -> None:
        self.down()
        self._listener.close()
        self._moto.stop()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with self._lock:
                    if self._down:
                        client.close()
                        continue
                    server = socket.create_connection(self._moto.get_host_and_port())
                    self._open += [client, server]
                threading.Thread(target=self._forward, args=(client, server, self._held), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, lambda _: False), daemon=True).start()

    def _held(self, received: bytes) -> bool:
        return self.hold(received)

    def _forward(self, source: socket.socket, target: socket.socket, held: Callable[[bytes], bool]) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(65_536):
                if held(received):
                    return
                target.sendall(received)
            target.close()
