"""``dcp serve`` through OpenAI's own client: whole, streamed, at once, refused, left, ended."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from dcp.cli import main  # noqa: E402
from dcp.data.tokenizers import ByteTokenizer  # noqa: E402
from dcp.inference import InferenceEngine  # noqa: E402
from dcp.inference.model import open_model  # noqa: E402
from dcp.inference.server.prompts import Prompts  # noqa: E402
from dcp.inference.server.rank import _bound, end_tokens  # noqa: E402
from dcp.inference.server.shapes import ChatAsked  # noqa: E402
from lab.serve import (  # noqa: E402
    PAGES,
    Ask,
    answered,
    figures,
    idle_figures,
    make_asks,
    serving,
    storm,
)

MAX_LENGTH, MAX_QUEUE = 400, 32
WORDS = ["--num-processes", "2", "--num-pages", str(PAGES), "--token-budget", "64"]
WORDS += ["--max-length", str(MAX_LENGTH), "--max-queue", str(MAX_QUEUE), "--max-running", "20"]
IDS = {"return_token_ids": True}


@contextmanager
def one_server(words):
    """The process, the address and a client of a server."""
    with (
        serving(words) as (process, url),
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield process, url, client


@pytest.fixture(scope="module")
def served():
    with one_server(WORDS) as found:
        yield found


@pytest.fixture(scope="module")
def model():
    return open_model(None, dtype="float64")


def ask(client, chat, **options):
    route = client.chat.completions if chat else client.completions
    what = {"messages": [{"role": "user", "content": "Say é"}]} if chat else {"prompt": "Once é"}
    return route.create(**{"model": "bytes", "max_tokens": 30} | what | options)


def text_of(choice, chat):
    return choice.message.content if chat else choice.text


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1.5, "top_p": 0.8, "seed": 5}]
)
def test_streamed_whole_and_alone_are_the_same(served, model, chat, options):
    client = served[2]
    whole = ask(client, chat, **options, extra_body=IDS)
    choice = whole.choices[0]
    what = {"prompt": "Once é"} | {"messages": [{"role": "user", "content": "Say é"}]}
    wanted = answered(Ask(chat, what | options | {"max_tokens": 30}), model).tokens
    assert choice.token_ids == wanted
    assert choice.finish_reason == ("stop" if wanted[-1] == 257 else "length")
    text = ByteTokenizer().decode(np.array(wanted))
    assert text_of(choice, chat) == text
    assert whole.usage.completion_tokens == len(wanted)

    *chunks, last = ask(
        client, chat, **options, extra_body=IDS, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage == whole.usage
    assert last.choices == []
    parts = [chunk.choices[0] for chunk in chunks]
    assert [token for part in parts for token in part.token_ids] == wanted
    said = [part.delta.content if chat else part.text for part in parts]
    assert "".join(said) == text
    reasons = [part.finish_reason for part in parts]
    assert reasons == [None] * (len(parts) - 1) + [choice.finish_reason]


@pytest.mark.parametrize("chat", [False, True])
def test_stop_texts_end_a_reply(served, chat):
    client = served[2]
    options = {"temperature": 1.5, "seed": 11, "max_tokens": 60}
    whole = text_of(ask(client, chat, **options).choices[0], chat)
    letters = [c for c in whole[5:] if c.isascii() and c.isprintable()]
    stop = whole[whole.index(letters[2]) :][:2]
    cut = min(whole.index(stop), whole.find("}~{") % 1000)
    choice = ask(client, chat, **options, stop=[stop, "}~{"]).choices[0]
    assert text_of(choice, chat) == whole[:cut]
    assert choice.finish_reason == "stop"
    parts = ask(client, chat, **options, stop=stop, stream=True)
    said = [p.choices[0].delta.content if chat else p.choices[0].text for p in parts]
    assert "".join(said) == whole[: whole.index(stop)]


def test_log_probabilities(served):
    client = served[2]
    chat = ask(client, True, temperature=0, logprobs=True, top_logprobs=2).choices[0]
    for entry in chat.logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob > entry.top_logprobs[1].logprob
        assert bytes(entry.bytes).decode() == entry.token
    streamed = ask(client, True, temperature=0, logprobs=True, top_logprobs=2, stream=True)
    entries = [e for part in streamed for e in part.choices[0].logprobs.content]
    assert entries == chat.logprobs.content
    text = ask(client, False, temperature=0, logprobs=1).choices[0].logprobs
    assert len(text.tokens) == len(text.token_logprobs) == len(text.text_offset) == 30
    best = [max(each.values()) for each in text.top_logprobs]
    assert best == text.token_logprobs


def test_the_model_is_listed(served):
    client = served[2]
    assert [model.id for model in client.models.list()] == ["bytes"]
    assert client.models.retrieve("bytes").id == "bytes"
    with pytest.raises(openai.NotFoundError, match="only 'bytes' is"):
        client.models.retrieve("a/b")


BAD = [
    (False, {"model": "other"}, 404, "model", "the model 'other' is not here"),
    (False, {"n": 2}, 400, "n", "n is not served"),
    (False, {"best_of": 3}, 400, "best_of", "best_of is not served"),
    (False, {"echo": True}, 400, "echo", "echo is not served"),
    (False, {"suffix": "x"}, 400, "suffix", "suffix is not served"),
    (False, {"logit_bias": {"5": 1}}, 400, "logit_bias", "not served"),
    (True, {"presence_penalty": 0.5}, 400, "presence_penalty", "not served"),
    (True, {"tools": [{"type": "function"}]}, 400, "tools", "tools is not served"),
    (True, {"response_format": {"type": "json_object"}}, 400, "response_format", "not served"),
    (True, {"extra_body": {"min_p": 0.5}}, 400, "min_p", "min_p: Extra inputs"),
    (False, {"temperature": -1}, 400, None, "temperature must be 0 or more, got -1"),
    (False, {"temperature": "hot"}, 400, "temperature", "temperature: Input should be a valid"),
    (False, {"top_p": 1.5}, 400, None, "top_p must be 1 or less"),
    (False, {"extra_body": {"top_k": 0}}, 400, None, "top_k must be 1 or more"),
    (False, {"seed": -1}, 400, None, "seed must be 0 or more"),
    (False, {"max_tokens": 0}, 400, None, "max_new_tokens must be 1 or more"),
    (False, {"max_tokens": 394}, 400, None, "are more than the 400 that are served"),
    (True, {"max_tokens": None, "max_completion_tokens": 1000}, 400, None, "more than the 400"),
    (False, {"prompt": "x" * 500}, 400, None, "501 tokens of the prompt and 30 of the reply"),
    (True, {"messages": [{"role": "user", "content": "x" * 900}]}, 400, None, "the 400"),
    (False, {"prompt": "x" * 2_000_000}, 413, None, "longer than 1074176 bytes"),
    (False, {"prompt": ["a", "b"]}, 400, None, "2 texts: ask for one"),
    (False, {"prompt": [5, 999]}, 400, None, "must be 257 or less, got 999"),
    (False, {"prompt": []}, 400, None, "the prompt is empty"),
    (False, {"stop": [""]}, 400, None, "none of them empty"),
    (False, {"logprobs": 21}, 400, None, "must be 20 or less, got 21"),
    (True, {"top_logprobs": 2}, 400, None, "top_logprobs needs logprobs=true"),
    (True, {"stream_options": {"include_usage": True}}, 400, None, "needs stream=true"),
    (True, {"max_completion_tokens": 3}, 400, None, "give one of them"),
    (True, {"messages": []}, 400, None, "holds no message"),
    (True, {"messages": [{"content": "x"}]}, 400, None, "has no 'role'"),
    (True, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "text"),
]


NEUTRAL = [
    {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
    {"user": "somebody", "stream": False, "seed": None, "stop": None},
    {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"},
]


def test_what_cannot_be_honoured_is_refused_by_name(served):
    for chat, options, status, param, said in BAD:
        with pytest.raises(openai.APIStatusError) as caught:
            ask(served[2], chat, **options)
        found = caught.value
        assert (found.status_code, found.param) == (status, param), options
        assert said in found.body["message"], options
        assert found.type == "invalid_request_error"
    for options in NEUTRAL:
        assert ask(served[2], True, temperature=0, max_tokens=3, **options).choices, options


def post(url, data, route="/completions"):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + route, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_bodies_that_are_no_request_are_refused(served):
    for data, said in (
        (b'{"model": "bytes"', "the body is no JSON"),
        (b"[1]", "valid dictionary"),
        (b"{}", "model: Field required"),
        (b"", "Field required"),
    ):
        status, answer = post(served[1], data)
        assert status == 400
        assert said in answer["error"]["message"]
    assert post(served[1], b"{}", "/nothing")[0] == 404


def test_32_clients_at_once(served):
    """``python -m lab serve`` does the same for two minutes."""
    asks = make_asks(16, seed=2)
    before = figures(served[1])
    tally = asyncio.run(storm(served[1], asks, clients=32, seconds=4))
    assert tally.wrong == []
    assert set(tally.outcomes) <= {"whole", "streamed", "left"}
    assert sum(tally.outcomes.values()) >= 32
    after = idle_figures(served[1])
    assert after["dcp_running"] == after["dcp_queue"] == 0
    ended = [name for name in after if name.startswith("dcp_requests_total")]
    counted = sum(after[name] - before.get(name, 0) for name in ended)
    assert counted == sum(tally.outcomes.values())
    told = after["dcp_generated_tokens_total"] - before["dcp_generated_tokens_total"]
    assert told >= tally.num_tokens
    assert after["dcp_time_to_first_token_seconds_count"] >= 32
    assert after["dcp_time_per_token_seconds_count"] > 32


def test_more_than_the_queue_holds_is_refused_and_nothing_else_suffers(served):
    client, url = served[2], served[1]

    def one(_):
        try:
            return len(ask(client, False, max_tokens=40, extra_body=IDS).choices[0].token_ids)
        except openai.RateLimitError as error:
            return error.code

    with ThreadPoolExecutor(80) as pool:
        found = list(pool.map(one, range(80)))
    assert "queue_full" in found
    served_ones = [each for each in found if each != "queue_full"]
    assert len(served_ones) >= MAX_QUEUE
    assert idle_figures(url)["dcp_running"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(served, stream):
    url = served[1]
    options = {"model": "bytes", "prompt": "x", "max_tokens": 390, "stream": stream}
    options |= {"temperature": 1.1, "seed": 1}
    body = json.dumps(options).encode()
    gone = 'dcp_requests_total{outcome="cancelled"}'
    before = figures(url)
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as wire:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
        wire.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        end = time.monotonic() + 30
        while figures(url)["dcp_running"] == 0 and time.monotonic() < end:
            time.sleep(0.02)
    after = idle_figures(url)
    assert after[gone] == before.get(gone, 0) + 1
    assert after["dcp_running"] == 0
    new = after["dcp_generated_tokens_total"] - before["dcp_generated_tokens_total"]
    assert new < 390


def test_sigterm_lets_what_runs_finish_and_refuses_more():
    with one_server(["--num-processes", "3"]) as (process, url, client):
        see_it_drain(process, url, client)


def see_it_drain(process, url, client):
    stream = ask(client, False, temperature=0, max_tokens=80, stream=True, extra_body=IDS)
    first = next(iter(stream)).choices[0].token_ids
    process.send_signal(signal.SIGTERM)
    refused, end = None, time.monotonic() + 30
    while refused is None and time.monotonic() < end:
        try:
            ask(client, False, max_tokens=1)
        except openai.InternalServerError as error:
            refused = error
    assert refused is not None
    assert (refused.status_code, refused.code) == (503, "draining")
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(url.removesuffix("/v1") + "/health")
    parts = [part.choices[0] for part in stream]
    assert len(first) + sum(len(part.token_ids) for part in parts) == 80
    assert parts[-1].finish_reason == "length"
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model on disk whose tokenizer has no chat template."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = open_model(None, seed=4)
    model.generation_config.eos_token_id = [257, 65]
    model.save_pretrained(path)
    tokenizer = ByteTokenizer().for_transformers()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    return path


def test_a_folder_is_served_and_a_rank_that_dies_ends_the_server_with_its_name(folder):
    model = open_model(str(folder), dtype="float64")
    assert end_tokens(model) == (257, 65)
    words = ["--num-processes", "2", "--model", str(folder), "--max-queue", "4"]
    with one_server(words) as (process, _, client):
        said = InferenceEngine(model).generate({0: [256, *b"Hi"]}, max_new_tokens=9, end=65)[0]
        options = {"model": "tiny", "max_tokens": 9, "temperature": 0, "extra_body": IDS}
        found = client.completions.create(prompt="Hi", **options)
        assert found.choices[0].token_ids == said
        with pytest.raises(openai.BadRequestError, match="the tokenizer has no chat template"):
            client.chat.completions.create(
                messages=[{"role": "user", "content": "Hi"}], model="tiny"
            )
        os.kill(rank_pid(process, 1), signal.SIGKILL)
        assert process.wait(60) == 1
        assert "dcp serve: rank 1 was killed by SIGKILL" in process.stderr.read()


def rank_pid(process, rank):
    """The process of a rank: the server's child whose environment says so."""
    words = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    for pid in map(int, subprocess.run(words, capture_output=True, check=True).stdout.split()):
        with open(f"/proc/{pid}/environ") as file:
            if f"RANK={rank}" in file.read().split("\0"):
                return pid
    raise AssertionError(f"rank {rank} does not run")


def test_an_address_in_use_is_named():
    with _bound("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        said = f"cannot listen on --host 127.0.0.1 --port {port}"
        with pytest.raises(ValueError, match=said), _bound("127.0.0.1", port):
            pass


def test_a_chat_gets_what_is_left_where_it_does_not_say():
    prompts = Prompts(ByteTokenizer(), begin=256, ends=(257,), max_length=100)
    asked = ChatAsked(model="bytes", messages=[{"role": "user", "content": "Hi"}])
    request = prompts.request(asked)
    assert len(request.tokens) + request.max_new_tokens == 100
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    again = ChatAsked(model="bytes", messages=[{"role": "user", "content": parts}])
    assert prompts.request(again).tokens == request.tokens
    assert request.sampling.temperature == 1
    assert request.sampling.seed != prompts.request(asked).sampling.seed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--port 70000", "--port must be 65535 or less, got 70000"),
        ("--max-queue 0", "--max-queue must be 1 or more, got 0"),
        ("--max-length 0", "--max-length must be 1 or more"),
        ("--token-budget=-1", "--token-budget must be 1 or more, got -1"),
        ("--model /nowhere", "model '/nowhere' is no folder on this machine"),
    ],
)
def test_mistakes_of_the_command_are_named_before_ranks_start(capsys, words, said):
    assert main(["serve", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_what_the_command_needs_is_named(capsys, monkeypatch):
    monkeypatch.setattr("dcp.inference.server.command.find_spec", lambda name: None)
    assert main(["serve"]) == 2
    assert "pip install 'dynamic-context-parallel[serve]'" in capsys.readouterr().err


def test_weights_are_shared_out_by_two_of_four_ranks(model):
    """Two ranks of attention by two of tensor parallelism answer as one process does."""
    words = ["--num-processes", "4", "--tensor-parallel", "2", "--dtype", "float64"]
    wanted = answered(Ask(False, {"prompt": "Once é", "temperature": 0, "max_tokens": 30}), model)
    with one_server([*words, "--num-pages", "16"]) as (_, _, client):
        found = ask(client, False, temperature=0, extra_body=IDS)
    assert found.choices[0].token_ids == wanted.tokens
