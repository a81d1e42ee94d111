"""A server in this process for tests, and a model that generates a given text."""

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from myllm.config import ModelConfig
from myllm.data.tokenizer.base import Tokenizer
from myllm.inference.load import LanguageModel
from myllm.inference.sampling_params import SamplingParams
from myllm.inference.server.http import PageServer
from myllm.inference.server.request import GenerateRequest
from myllm.inference.server.security import listen
from myllm.model.transformer import Transformer

DEADLINE_S = 60.0
DEFAULT = GenerateRequest("", 12, SamplingParams())
JSON = {"Content-Type": "application/json"}


def scripted(tokenizer: Tokenizer, script: Sequence[int], logit: float = 14.0) -> LanguageModel:
    """A model that, begun with an empty prompt, finds `script` likeliest, token by token: only positions count."""
    size = 64
    assert len(script) < size
    config = ModelConfig(
        max_seq_len=size, d_model=size, n_layers=1, n_heads=2, d_ff=32, position="learned", tie_embeddings=False
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in (*model.blocks.parameters(), model.embedding.weight, model.head.weight):
            parameter.zero_()
        model.positions.weight.copy_(torch.eye(size))
        for position, token in enumerate(script):
            model.head.weight[token, position] = logit / size**0.5  # the norm makes a one-hot row sqrt(size) long
    return LanguageModel(model, tokenizer)


@contextmanager
def serving(model: LanguageModel, default: GenerateRequest = DEFAULT, **more: LanguageModel) -> Iterator[PageServer]:
    with PageServer(listen("127.0.0.1", 0), "127.0.0.1", {"a <model>": model, **more}, default) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stop(DEADLINE_S)
            server.shutdown()
            thread.join(DEADLINE_S)


def connect(server: PageServer) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(*server.socket.getsockname()[:2], timeout=DEADLINE_S)


def post(
    server: PageServer, body: object, headers: dict[str, str] | None = None, path: str = "/generate"
) -> tuple[int, list[dict], http.client.HTTPMessage]:
    """Status, the objects of the response, and its headers."""
    connection = connect(server)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, raw, {**JSON, **(headers or {})})
    response = connection.getresponse()
    lines = response.read().splitlines()
    connection.close()
    return response.status, [json.loads(line) for line in lines], response.headers


def post_head(size: int) -> bytes:
    """The head of a raw POST request."""
    lines = ("POST /generate HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {size}")
    return "\r\n".join((*lines, "", "")).encode()
