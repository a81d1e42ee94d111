"""The API with OpenAI's own client: what it makes of the responses, streams and errors of the server."""

import http.client
import json

import openai
import pytest
import torch
from openai import OpenAI
from support.serving import DEADLINE_S, DEFAULT, JSON, connect, post, scripted, serving

from myllm.config import ModelConfig
from myllm.data.tokenizer.load import load_tokenizer
from myllm.inference.completion import complete
from myllm.inference.load import LanguageModel
from myllm.inference.sampling_params import SamplingParams
from myllm.inference.server.http import PageServer
from myllm.model.transformer import Transformer

R50K = load_tokenizer()
CONFIG = ModelConfig(max_seq_len=32, d_model=16, n_layers=2, n_heads=2, d_ff=32)
PROMPT = "the river"


def random_model(seed: int) -> LanguageModel:
    model, generator = Transformer(CONFIG).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return LanguageModel(model, R50K)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model(4)


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> PageServer:
    with serving(model, other=random_model(5)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: PageServer) -> OpenAI:
    return OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=DEADLINE_S, max_retries=0)


def test_completions_match_myllm_sample(client: OpenAI, model: LanguageModel) -> None:
    prompts = [PROMPT, "a 🙂 and"]
    done = client.completions.create(
        model="a <model>", prompt=prompts, max_tokens=9, temperature=1.2, top_p=0.95, n=2, seed=7,
        extra_body={"top_k": 0},
    )  # fmt: skip
    expected = list(complete(model, prompts, 9, SamplingParams(1.2, 0, 0.95, seed=7), num_samples=2))
    assert [choice.text for choice in done.choices] == [sample.text for sample in expected]
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in done.choices} == {"length"}
    read = sum(len(R50K.encode_document(prompt)) for prompt in prompts)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (read, 36, read + 36)
    assert done.object == "text_completion"


def test_stream_matches_full_completion(client: OpenAI) -> None:
    settings = {"model": "a <model>", "prompt": PROMPT, "max_tokens": 12, "n": 2, "seed": 3, "logprobs": 2}
    whole = client.completions.create(**settings)
    texts, tokens, ends, usage = ["", ""], [[], []], {}, None
    for chunk in client.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert ends == {0: "length", 1: "length"}
    assert usage == whole.usage


def test_server_sent_events_format(server: PageServer) -> None:
    connection = connect(server)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 2, "stream": True}), JSON)
    answer = connection.getresponse()
    *events, done, rest = answer.read().decode().split("\n\n")
    assert (answer.headers["Content-Type"], done, rest) == ("text/event-stream", "data: [DONE]", "")
    assert [json.loads(event.removeprefix("data: "))["object"] for event in events] == ["text_completion"] * 3


@torch.no_grad()
def test_logprobs_and_echo_match_forward_pass(client: OpenAI, model: LanguageModel) -> None:
    done = client.completions.create(
        model="a <model>", prompt=PROMPT, max_tokens=6, logprobs=3, echo=True, seed=1, temperature=0.7
    )
    (choice,) = done.choices
    assert choice.text.startswith(PROMPT)
    given = choice.logprobs
    ids = R50K.encode_document(choice.text).tolist()
    if len(ids) - 1 == len(given.tokens):  # the text's own tokens are the generated ones
        assert [R50K.decode([token]) for token in ids[1:]] == given.tokens
    prompt_ids = R50K.encode_document(PROMPT).tolist()
    expected = model.model(torch.tensor([prompt_ids]))[0].double().log_softmax(dim=-1)  # (T, V)
    own = [expected[place, token].item() for place, token in enumerate(prompt_ids[1:])]
    assert given.token_logprobs[: len(own)] == pytest.approx(own, rel=1e-4)
    best = expected[0].topk(3)
    assert sorted(given.top_logprobs[0].values())[-3:] == pytest.approx(sorted(best.values.tolist()), rel=1e-4)
    assert len(given.tokens) == len(own) + 6 == len(given.text_offset) == len(given.top_logprobs)
    for token, offset in zip(given.tokens, given.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)


@torch.no_grad()
def test_token_id_prompt_scores_match_forward_pass(client: OpenAI, model: LanguageModel) -> None:
    """`max_tokens` 0 or 1, `echo` and `logprobs`: how lm-eval's local-completions measures a text."""
    rows = [[50_256, 11, 12, 13], [7, 8]]
    done = client.completions.create(model="a <model>", prompt=rows, max_tokens=0, echo=True, logprobs=1)
    for row, choice in zip(rows, done.choices, strict=True):
        logprobs = model.model(torch.tensor([row]))[0].double().log_softmax(dim=-1)
        own = [logprobs[place, token].item() for place, token in enumerate(row[1:])]
        assert choice.logprobs.token_logprobs == [None, *[pytest.approx(value, rel=1e-4) for value in own]]
        assert choice.text == R50K.decode(row)


def test_stop_strings_truncate_text_and_tokens() -> None:
    script = [*R50K.encode("one two three🙂 four END five").tolist(), R50K.end_of_text]
    with serving(scripted(R50K, script)) as server:
        client = OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=DEADLINE_S)
        stopped = client.completions.create(
            model="a <model>", prompt="", temperature=0, max_tokens=40, stop=["END", "no"], logprobs=1
        )
        ended = client.completions.create(model="a <model>", prompt="", temperature=0, max_tokens=40)
    (choice,) = stopped.choices
    assert (choice.text, choice.finish_reason) == ("one two three🙂 four ", "stop")
    halves = [token for token in choice.logprobs.tokens if token.startswith("bytes:")]
    raw = b"".join(bytes.fromhex(half.removeprefix("bytes:").replace("\\x", "")) for half in halves)
    assert raw.decode() == "🙂"
    assert "".join(token for token in choice.logprobs.tokens if token not in halves).startswith("one two three four")
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("one two three🙂 four END five", "stop")


def test_models_and_health(server: PageServer, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["a <model>", "other"]
    assert client.models.retrieve("other").owned_by == "myllm"
    connection = connect(server)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())) == (200, {"status": "ok"})


def test_models_are_selected_by_name(client: OpenAI) -> None:
    texts = [
        client.completions.create(model=name, prompt=PROMPT, temperature=0, max_tokens=9).choices[0].text
        for name in ("a <model>", "other", "a <model>")
    ]
    assert texts[0] == texts[2] != texts[1]


def test_chat_continues_messages(client: OpenAI, model: LanguageModel) -> None:
    messages = [
        {"role": "system", "content": "the"},
        {"role": "user", "content": [{"type": "text", "text": "river"}]},
    ]
    settings = {"model": "a <model>", "messages": messages, "temperature": 0, "max_completion_tokens": 7}
    (expected,) = complete(model, ["the\nriver"], 7, SamplingParams(0))
    done = client.chat.completions.create(**settings)
    assert (done.choices[0].message.content, done.choices[0].message.role) == (expected.text, "assistant")
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**settings, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == expected.text
    assert parts[-1].finish_reason == "length"
    long = client.chat.completions.create(
        model="a <model>", messages=[{"role": "user", "content": "word " * 99}], max_tokens=8
    )
    assert (long.usage.prompt_tokens, long.usage.completion_tokens) == (32 - 8, 8)


def test_default_api_parameters_are_accepted(client: OpenAI) -> None:
    """Clients send them, though they change nothing."""
    common = {
        "model": "other", "temperature": 1, "top_p": 1, "n": 1, "max_tokens": 3, "stop": None, "seed": None,
        "user": "me", "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "stream_options": None,
    }  # fmt: skip
    messages = [{"role": "user", "content": "x", "name": "me"}]
    tool = {"type": "function", "function": {"name": "get_current_timestamp", "parameters": {"type": "object"}}}
    chat = {
        "logprobs": False, "top_logprobs": 0, "tools": [tool], "tool_choice": "auto", "parallel_tool_calls": True,
        "response_format": {"type": "text"}, "modalities": ["text"], "store": False, "service_tier": "auto",
        "metadata": {}, "functions": [], "function_call": "none", "prompt_cache_key": "x", "reasoning_effort": None,
    }  # fmt: skip
    assert client.chat.completions.create(messages=messages, **common, **chat).usage.completion_tokens == 3
    plain = {"prompt": "x", "best_of": 1, "echo": False, "logprobs": None, "suffix": None}
    assert client.completions.create(**common, **plain).usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match="tool_choice is not supported"):
        client.chat.completions.create(messages=messages, **common, **chat | {"tool_choice": "required"})


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "give a number of at least 0"),
        ({"top_p": 7, "n": 0}, "n", "give 1 to 128 texts"),
        ({"n": 129}, "n", "give 1 to 128 texts"),
        ({"max_tokens": -1}, "max_tokens", "give an integer from 0"),
        ({"max_tokens": "many"}, "max_tokens", "give an integer"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"prompt": [1, "x"]}, "prompt", "give a string"),
        ({"prompt": [50_257]}, "prompt", "ids are from 0 to 50,256"),
        ({"prompt": [50_256, 50_257]}, "prompt", "ids are from 0 to 50,256"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "is not supported"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean 'temperature'?"),
    ],
    ids=str,
)
def test_errors_follow_openai_format(client: OpenAI, settings: dict, param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "a <model>", "prompt": "x", **settings})
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert message in caught.value.message


def test_error_codes_and_statuses(client: OpenAI, server: PageServer) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'; models: a <model>, other") as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="other", prompt="word " * 40)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings does not exist"):
        client.embeddings.create(model="other", input="x")
    assert post(server, {}, {"Host": "evil.example"}, "/v1/completions")[0] == 403
    assert post(server, {}, {"Content-Type": "text/plain"}, "/v1/completions")[0] == 415
    assert post(server, b"{", path="/v1/completions")[1][0]["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_failing_model_returns_api_error(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stream: bool
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("myllm.inference.server.openai_response.generate_batch", fail)
    with pytest.raises(openai.APIError, match="RuntimeError: out of memory"):
        list(client.completions.create(model="other", prompt="x", stream=stream))
    assert "Traceback" in capfd.readouterr().err  # for the operator


def test_queued_request_runs_after_client_disconnects(server: PageServer) -> None:
    long: http.client.HTTPConnection = connect(server)
    long.request("POST", "/v1/completions", json.dumps({"prompt": "on and on", "max_tokens": 100_000}), JSON)
    waiting = connect(server)
    waiting.request("POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1}), JSON)
    long.close()
    assert waiting.getresponse().status == 200


def test_missing_settings_use_command_defaults(client: OpenAI) -> None:
    done = client.completions.create(model="other", prompt="x")
    assert done.usage.completion_tokens == DEFAULT.max_new_tokens
    texts = {client.completions.create(model="other", prompt="x", temperature=1.5).choices[0].text for _ in range(3)}
    assert len(texts) > 1  # but for the seed
