"""A Google Cloud Storage on this machine (gcp-storage-emulator): gs://bucket, for this process and its children."""

import pytest
from gcp_storage_emulator.server import create_server

BUCKET = "bucket"


class GcsServer:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
        self._server.start()
        port = self._server._api._httpd.server_address[1]
        for name, value in {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            "NO_GCE_CHECK": "true",  # or the client looks for this machine's account for seconds
            # gcsfs would ask the control API, which the emulator does not have, for the kind of bucket each time.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }.items():
            monkeypatch.setenv(name, value)

    def stop(self) -> None:
        self._server.stop()
