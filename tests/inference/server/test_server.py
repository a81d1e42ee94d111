"""The server over real HTTP: what it writes, whom it refuses, and that one text at a time is written."""

import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.serving import DEADLINE_S, DEFAULT, JSON, connect, post, post_head, scripted, serving

from myllm.config import ModelConfig
from myllm.data.tokenizer.load import load_tokenizer
from myllm.inference.completion import complete
from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.load import LanguageModel
from myllm.inference.sampling_params import SamplingParams
from myllm.inference.server.http import MAX_BODY_BYTES, PageServer
from myllm.inference.server.request import MAX_NEW_TOKENS
from myllm.inference.server.security import is_allowed_host
from myllm.model.transformer import Transformer
from myllm.planning.flops import n_parameters

R50K = load_tokenizer()
CONFIG = ModelConfig(max_seq_len=32, d_model=16, n_layers=2, n_heads=2, d_ff=32)
LONG = {"prompt": "on and on", "max_new_tokens": MAX_NEW_TOKENS}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model, generator = Transformer(CONFIG).eval(), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return LanguageModel(model, R50K)


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> PageServer:
    with serving(model) as server:
        yield server


# -- what it writes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logprobs_match_forward_pass(server: PageServer, model: LanguageModel) -> None:
    settings = {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5}
    status, (start, *tokens, end), _ = post(server, {"prompt": "the river", "max_new_tokens": 9, **settings})
    assert (status, start["kind"], end["kind"], end["tokens"], len(tokens)) == (200, "start", "end", 9, 9)
    ids = R50K.encode_document("the river").tolist()
    for event in tokens:
        # At temperature 1, without a cache, and before every filter.
        expected = model.model(torch.tensor([ids]))[0, -1].double().log_softmax(dim=-1)  # (V,)
        chosen = event["token"]["id"]
        assert event["logprob"] == pytest.approx(expected[chosen].item(), rel=1e-4)
        assert event["rank"] == int((expected > expected[chosen]).sum()) + 1
        values, most_likely = expected.topk(8)
        assert [token["id"] for token in event["top_logprobs"]] == most_likely.tolist()
        assert [token["logprob"] for token in event["top_logprobs"]] == pytest.approx(values.tolist(), rel=1e-4)
        ids.append(chosen)


def test_text_matches_myllm_sample(server: PageServer, model: LanguageModel) -> None:
    sampling = SamplingParams(1.2, 0, 0.95, 0.001, 1.1, seed=7)
    _, (_, *events), _ = post(server, {"prompt": "a 🙂 and", "max_new_tokens": 40, **vars(sampling)})
    (expected,) = complete(model, ["a 🙂 and"], 40, sampling)
    assert "".join(event["text"] for event in events) == expected.text
    assert (events[-1]["finish_reason"], events[-1]["tokens"]) == (expected.finish_reason, expected.tokens)


def test_missing_settings_use_command_defaults(model: LanguageModel) -> None:
    default = replace(DEFAULT, max_new_tokens=3, sampling=SamplingParams(temperature=0))
    with serving(model, default) as server:
        greedy = post(server, {"prompt": "the river"})[1]
        assert [event["rank"] for event in greedy[1:-1]] == [1, 1, 1]
        connection = connect(server)
        connection.request("GET", "/models")
        page = json.loads(connection.getresponse().read())
    (facts,) = page["models"]
    assert (facts["name"], facts["context"], facts["vocabulary"]) == ("a <model>", 32, 50_257)
    assert facts["parameters"] == n_parameters(model.model.config)  # as the log says it: without the padding
    assert (page["settings"]["temperature"], page["settings"]["max_new_tokens"]) == (0, 3)


def test_overlong_and_empty_prompts(server: PageServer) -> None:
    words = " word" * 50
    start = post(server, {"prompt": words, "max_new_tokens": 1})[1][0]
    assert start == {"kind": "start", "prompt_tokens": 51, "unread_tokens": 51 - 32}
    start, end = post(server, {"max_new_tokens": 0})[1]
    assert (start["prompt_tokens"], start["unread_tokens"], end["finish_reason"], end["tokens"]) == (1, 0, "length", 0)


def test_split_characters_and_end_of_document() -> None:
    script = [*R50K.encode("<script>🙂\n").tolist(), R50K.end_of_text]
    with serving(scripted(R50K, script)) as server:
        _, (_, *tokens, end), headers = post(server, {"temperature": 0})
    assert "".join(event["text"] for event in tokens) == "<script>🙂\n"
    assert [event["token"]["id"] for event in tokens] == script[:-1]
    halves = [event for event in tokens if "bytes" in event["token"]]
    assert bytes.fromhex(" ".join(event["token"]["bytes"] for event in halves)).decode() == "🙂"
    assert [bool(event["text"]) for event in halves] == [False] * (len(halves) - 1) + [True]
    # The decision to end is a token as any other, though it adds no text.
    assert (end["finish_reason"], end["token"]["text"], end["text"]) == ("end_of_text", "<|endoftext|>", "")
    assert end["rank"] == 1
    assert end["top_logprobs"][0]["logprob"] == end["logprob"] > math.log(0.9)
    assert "application/x-ndjson" in headers["Content-Type"]


def test_logprobs_do_not_change_text(model: LanguageModel) -> None:
    rows = [Sequence([3, 4], 1), Sequence([5], 2)]
    for row in generate_batch(model.model, rows, 4, SamplingParams()):
        assert row.logprobs is None
    plain, with_logprobs = [row.generated for row in rows], [Sequence([3, 4], 1), Sequence([5], 2)]
    for row in generate_batch(model.model, with_logprobs, 4, SamplingParams(), top_logprobs=2):
        assert len(row.logprobs.top) == 2
    assert [row.generated for row in with_logprobs] == plain


# -- whom it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"prompt": ', "not valid JSON"),
        (b'"\xff"', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        ([], "must be a JSON object"),
        ({"prompt": 3}, "prompt 3: give a string"),
        ({"prompt": None}, "prompt null: give a string"),
        ({"temperature": -1}, "temperature -1.0: give a number of at least 0"),
        ({"temperature": None}, "temperature null: give a number"),
        ({"temperature": "hot"}, 'temperature "hot": give a number'),
        ({"temperature": True}, "temperature true: give a number"),
        ({"temperature": 10**400}, "give a smaller number"),
        (b'{"temperature": NaN}', "temperature nan"),
        (b'{"temperature": 1e999}', "temperature inf"),
        ({"top_p": 0}, "top_p 0.0: give a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_k": 2.5}, "top_k 2.5: give an integer"),
        ({"top_k": -1}, "top_k -1"),
        ({"min_p": 2}, "min_p 2.0"),
        ({"repetition_penalty": 0}, "repetition_penalty 0.0"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"max_new_tokens": -1}, "max_new_tokens -1: give an integer from 0 to"),
        ({"max_new_tokens": 10**9}, "max_new_tokens 1000000000"),
        ({"temprature": 1}, "unknown setting 'temprature', did you mean 'temperature'?"),
        ({"top_p": 7, "min_p": 7, "seed": "x"}, "min_p 7.0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_invalid_requests_return_400(server: PageServer, body: object, message: str) -> None:
    status, (answer,), _ = post(server, body)
    assert status == 400
    assert message in answer["error"]


def test_all_request_errors_are_reported(server: PageServer) -> None:
    (answer,) = post(server, {"top_p": 7, "min_p": 7, "seed": "x", "depth": 1})[1]
    assert all(name in answer["error"] for name in ("top_p", "min_p", "seed", "depth"))


def own(server: PageServer) -> str:
    return server.address.removeprefix("http://")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/generate", {"Host": "evil.example"}, 403),
        ("/generate", {"Host": "evil.example:80"}, 403),
        ("/generate", {"Host": "localhost.evil.example"}, 403),
        ("/generate", {"Host": "192.168.0.7"}, 403),
        ("/generate", {"Host": "[::bad"}, 403),
        ("/generate", {"Host": ""}, 403),
        ("/generate", {"Origin": "http://evil.example"}, 403),
        ("/generate", {"Origin": "null"}, 403),
        ("/generate", {"Origin": "http://localhost:1"}, 403),
        ("/generate", {"Content-Type": "text/plain"}, 415),
        ("/generate", {"Content-Length": "x"}, 411),
        ("/nothing", {}, 404),
        ("/", {}, 404),
        ("/generate", {"Host": "localhost"}, 200),
        ("/generate", {"Host": "[::1]:9"}, 200),
        ("/generate?x=1", {"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
    ids=str,
)
def test_allowed_hosts_origins_and_types(server: PageServer, path: str, headers: dict[str, str], status: int) -> None:
    seen, answers, sent = post(server, {"max_new_tokens": 1}, headers, path)
    assert seen == status, answers
    assert not [name for name in sent if name.lower().startswith("access-control")]
    if status != 200:
        assert list(answers[0]) == ["error"]


def test_own_origin_is_allowed(server: PageServer) -> None:
    assert post(server, {"max_new_tokens": 1}, {"Origin": f"http://{own(server)}"})[0] == 200


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "PUT", "HEAD"])
def test_unsupported_methods(server: PageServer, method: str) -> None:
    connection = connect(server)
    connection.request(method, "/generate")
    answer = connection.getresponse()
    assert answer.status in (404, 501)
    assert answer.headers["Access-Control-Allow-Origin"] is None


def test_content_security_policy(server: PageServer) -> None:
    connection = connect(server)
    connection.request("GET", "/")
    answer = connection.getresponse()
    page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert answer.status == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)  # nothing from elsewhere
    connection = connect(server)
    connection.request("GET", "/", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 403


@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 9 * MAX_BODY_BYTES])
def test_oversized_body_is_rejected(server: PageServer, size: int) -> None:
    with socket.create_connection(server.socket.getsockname(), timeout=DEADLINE_S) as client:
        client.sendall(post_head(size) + b" " * min(size, 8 * MAX_BODY_BYTES))
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413")
    assert f"the limit is {MAX_BODY_BYTES:,}".encode() in answer


def test_server_survives_malformed_requests(server: PageServer, capfd: pytest.CaptureFixture[str]) -> None:
    for payload in (
        b"",
        b"\x16\x03\x01 hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost",
    ):
        with socket.create_connection(server.socket.getsockname(), timeout=DEADLINE_S) as client:
            client.sendall(payload)
            client.shutdown(socket.SHUT_WR)
            client.makefile("rb").read()
    assert post(server, {"max_new_tokens": 1})[0] == 200
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("header", "host", "alone", "good"),
    [
        ("localhost:8000", "127.0.0.1", True, True),
        ("LOCALHOST", "127.0.0.1", True, True),
        ("127.0.0.1:8000", "localhost", True, True),
        ("[::1]:8000", "127.0.0.1", True, True),
        ("10.0.0.5:8000", "127.0.0.1", True, False),
        ("evil.example:8000", "127.0.0.1", True, False),
        ("127.0.0.1.evil.example", "127.0.0.1", True, False),
        ("10.0.0.5:8000", "0.0.0.0", False, True),
        ("box:8000", "box", False, True),
        (socket.gethostname(), "0.0.0.0", False, True),
        ("evil.example", "0.0.0.0", False, False),
        ("user@evil.example", "0.0.0.0", False, False),
    ],
)
def test_allowed_host_headers(header: str, host: str, alone: bool, good: bool) -> None:
    assert is_allowed_host(header, host, alone) == good


# -- one text at a time -----------------------------------------------------------------------------------------------


def test_concurrent_request_rejected_until_client_disconnects(server: PageServer) -> None:
    first = connect(server)
    first.request("POST", "/generate", json.dumps(LONG), JSON)
    answer = first.getresponse()
    assert [json.loads(answer.readline())["kind"] for _ in range(3)] == ["start", "token", "token"]
    status, (refusal,), _ = post(server, {"max_new_tokens": 1})
    assert (status, "another text is being generated" in refusal["error"]) == (503, True)
    assert json.loads(answer.readline())["kind"] == "token"  # and the first continues
    answer.close()
    first.close()
    end = time.monotonic() + DEADLINE_S
    while (status := post(server, {"max_new_tokens": 1})[0]) == 503:
        assert time.monotonic() < end, "generation for a disconnected client continues"
    assert status == 200


def test_request_waits_for_slow_token_of_disconnected_client(
    server: PageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing, computed, statuses = threading.Event(), threading.Event(), []

    def slow_batch(*values: Any, **options: Any) -> Iterator[Sequence]:
        for row in generate_batch(*values, **options):
            yield row
            computing.set()
            computed.wait(DEADLINE_S)

    monkeypatch.setattr("myllm.inference.server.events.generate_batch", slow_batch)
    monkeypatch.setattr("myllm.inference.server.http.BUSY_TIMEOUT_S", 0.01)
    first = connect(server)
    first.request("POST", "/generate", json.dumps(LONG), JSON)
    answer = first.getresponse()
    assert computing.wait(DEADLINE_S)
    assert post(server, {"max_new_tokens": 1})[0] == 503
    answer.close()
    first.close()
    second = threading.Thread(target=lambda: statuses.append(post(server, {"max_new_tokens": 1})[0]))
    second.start()
    second.join(0.5)  # many times the limit, and still it waits
    assert statuses == []
    computed.set()
    second.join(DEADLINE_S)
    assert statuses == [200]


def test_server_survives_model_failure(
    server: PageServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("myllm.inference.server.events.generate_batch", fail)
        status, (*_, last), _ = post(server, {})
    assert (status, last["kind"]) == (200, "error")
    assert "out of memory" in last["error"]
    assert "Traceback" in capfd.readouterr().err  # for the operator
    assert post(server, {"max_new_tokens": 1})[0] == 200
