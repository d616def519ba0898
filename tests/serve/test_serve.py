"""`smallm serve` with OpenAI's own client, with clients that misbehave, and in a browser."""

import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import openai
import pytest
import uvicorn

from smallm import LanguageModel, UserError
from smallm.serve import cli
from smallm.serve.app import build_app
from smallm.serve.completion_request import CompletionRequest, Limits
from smallm.serve.connection import Connection
from smallm.serve.generation_queue import GenerationQueue

JS = Path(__file__).parents[1] / "js"
SEED = "the “café” "
TOKEN = "secret"


@pytest.fixture(scope="module")
def model(exported) -> Iterator[LanguageModel]:
    with LanguageModel.load(exported, threads=1) as model:
        yield model


@contextmanager
def serving(
    exported, model, limits: Limits | None = None, keep_alive: float = 10, **options
) -> Iterator[tuple[str, int, GenerationQueue]]:
    """A server in a thread: host, port and queue."""
    queue = GenerationQueue(model, limits or Limits(), threads=2)
    app = build_app(queue, exported / "model.onnx", "tiny", **options)
    config = uvicorn.Config(app, port=0, log_level="error", http=Connection, ws="none", timeout_keep_alive=keep_alive,
                            timeout_graceful_shutdown=1)  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 30
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        yield "127.0.0.1", server.servers[0].sockets[0].getsockname()[1], queue
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def server(exported, model):
    with serving(exported, model) as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai_client(server) as client:
        yield client


def openai_client(server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{server[0]}:{server[1]}/v1", api_key=key, max_retries=0, timeout=60)


def ask(server, method: str, path: str, body=None, headers=None) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection(*server[:2], timeout=60)) as connection:
        content = json.dumps(body).encode() if isinstance(body, dict | list) else body
        connection.request(method, path, content, {"content-type": "application/json"} | (headers or {}))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# -- OpenAI's client


def test_seed_gives_the_text_of_generate(client, model):
    answer = client.completions.create(model="tiny", prompt=SEED, max_tokens=60, temperature=0.8, seed=7)
    text = model.generate(SEED, max_length=60, temperature=0.8, rng_seed=7)
    assert SEED + answer.choices[0].text == text
    assert (answer.choices[0].finish_reason, answer.object, answer.model) == ("length", "text_completion", "tiny")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(SEED), 60)


def test_streaming(client, model):
    stream = client.completions.create(model="tiny", prompt=SEED, max_tokens=80, seed=3, stream=True, logprobs=1,
                                       stream_options={"include_usage": True})  # fmt: skip
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert SEED + text == model.generate(SEED, max_length=80, rng_seed=3)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset] == list(range(80))
    assert last.usage.total_tokens == len(SEED) + 80


def test_stop(client, model):
    answer = client.completions.create(model="tiny", prompt=SEED, max_tokens=500, seed=1, stop=["e", "o"] + ["#"] * 9)
    assert SEED + answer.choices[0].text == model.generate(SEED, max_length=500, rng_seed=1, stop=["e", "o"])
    assert answer.choices[0].finish_reason == "stop"


def test_prompts_and_n(client, model):
    prompts = ["the ", SEED]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=30, seed=5, n=2, echo=True)
    texts = [model.generate(prompts[i // 2], max_length=30, rng_seed=5, stream_number=i) for i in range(4)]
    assert [each.text for each in answer.choices] == texts
    assert [each.index for each in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 120


def test_logprobs_of_prompt_and_text(client, model):
    answer = client.completions.create(model="tiny", prompt="the “é” ", max_tokens=9, seed=2, logprobs=0, echo=True)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.token_logprobs[0] is None
    nats = model.score(answer.choices[0].text)
    assert found.token_logprobs[1:] == pytest.approx((-nats[1:]).tolist(), abs=1e-3)


def test_ids_and_extensions(client, model):
    ids = model.vocabulary.encode(SEED).tolist()
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=40, seed=2, top_p=0.9,
                                       extra_body={"top_k": 5, "min_p": 0.01, "banned": "e"})  # fmt: skip
    text = model.generate(SEED, max_length=40, rng_seed=2, top_p=0.9, top_k=5, min_p=0.01, banned="e")
    assert SEED + answer.choices[0].text == text


def test_models_and_health(client, server):
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "smallm"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    assert json.loads(ask(server, "GET", "/health")[2])["status"] == "ok"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"temperature": -1}, openai.BadRequestError, "temperature"), ({"n": 17}, openai.BadRequestError, "n = 17"),
     ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"), ({"prompt": 3}, openai.BadRequestError, "prompt"),
     ({"suffix": "x"}, openai.BadRequestError, "suffix"), ({"prompt": [10**6]}, openai.BadRequestError, "ids"),
     ({"prompt": ["a"] * 9, "n": 2}, openai.BadRequestError, "too many texts"),
     ({"model": "gpt"}, openai.NotFoundError, "gpt"), ({"stop": [3]}, openai.BadRequestError, "stop"),
     ({"extra_body": {"tempreature": 1}}, openai.BadRequestError, "did you mean temperature")],
)  # fmt: skip
def test_mistakes(client, options, error, message):
    with pytest.raises(error, match=message):
        client.completions.create(**{"model": "tiny", "prompt": "the "} | options)


@pytest.mark.slow
def test_the_native_engine(exported):
    with (
        LanguageModel.load(exported, engine="native") as native,
        serving(exported, native) as server,
        openai_client(server) as client,
    ):
        options = {"model": "tiny", "prompt": SEED, "max_tokens": 60, "seed": 7}
        text = native.generate(SEED, max_length=60, rng_seed=7)
        assert SEED + client.completions.create(**options).choices[0].text == text
        answer = client.completions.create(**options, n=2, stream=True, logprobs=1)
        texts = [SEED, SEED]
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == native.generate_many([SEED] * 2, max_length=60, rng_seed=7)


# -- clients that misbehave


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b"\xff", b"[]", b""])
def test_bad_json(server, body):
    status, _, answer = ask(server, "POST", "/v1/completions", body)
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_statuses(server):
    assert ask(server, "POST", "/v1/completions", {}, {"content-type": "text/plain"})[0] == 415
    status, _, answer = ask(server, "GET", "/v1/completions")
    assert status == 405
    assert json.loads(answer)["error"]["message"].startswith("/v1/completions does not take GET; this server has POST ")
    status, _, answer = ask(server, "GET", "/../secret")
    assert status == 404
    assert "error" in json.loads(answer)
    status, _, answer = ask(server, "POST", "/v1/chat/completions", {})
    message = json.loads(answer)["error"]["message"]
    assert (status, message.partition(";")[0]) == (404, "there is no /v1/chat/completions")
    assert "POST /v1/completions" in message


def test_ten_megabytes(server):
    with socket.create_connection(server[:2], timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                           b"content-length: 10000000\r\n\r\n" + b"x" * 1000)  # fmt: skip
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


COMPLETION = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


def completion(**fields: object) -> bytes:
    """The bytes of a request for a long text."""
    body = json.dumps({"max_tokens": 10**7, **fields}).encode()
    return COMPLETION % len(body) + body


def test_a_client_that_hangs(exported, model):
    limits = Limits(max_length=10**7, body_deadline=0.3, deadline=1.5)
    with serving(exported, model, limits) as server:
        with socket.create_connection(server[:2], timeout=60) as connection:
            connection.sendall(COMPLETION % 100 + b"{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert ask(server, "POST", "/v1/completions", {"max_tokens": 10**7})[0] == 504
        queue = server[2]
        with socket.create_connection(server[:2], timeout=60) as connection:  # one that does not read
            connection.sendall(completion(stream=True))
            wait_until(lambda: queue.active == 1)
            wait_until(lambda: queue.active == 0)
        time.sleep(0.1)
        before = queue.characters
        time.sleep(0.2)
        assert queue.characters == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(exported, model, stream):
    with serving(exported, model, Limits(max_length=10**7, deadline=1000)) as server:
        queue = server[2]
        with socket.create_connection(server[:2], timeout=60) as connection:
            connection.sendall(completion(stream=stream))
            wait_until(lambda: queue.active == 1)
        wait_until(lambda: queue.active == 0)


@pytest.mark.parametrize("first_request", [False, True])
@pytest.mark.parametrize("sends", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"x" * 2000])
def test_a_client_whose_request_does_not_begin(exported, model, sends, first_request):
    with (
        serving(exported, model, keep_alive=0.4) as server,
        socket.create_connection(server[:2], timeout=20) as connection,
    ):
        if first_request:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(1000)
        started = time.monotonic()
        try:
            for i in range(len(sends)):
                connection.sendall(sends[i : i + 1])
                time.sleep(0.02)
            assert connection.recv(1000) == b""
        except ConnectionError:
            pass  # closed while the client was sending
        assert 0.2 < time.monotonic() - started < 20  # all bytes would take 40 seconds


def test_an_answer_may_take_longer_than_a_request(exported, model):
    with serving(exported, model, Limits(max_length=10**7, deadline=1), keep_alive=0.2) as server:
        assert ask(server, "POST", "/v1/completions", {"max_tokens": 10**7})[0] == 504


def test_a_busy_server(exported, model):
    with serving(exported, model, Limits(max_requests=1)) as server, server[2].place():
        for stream in (False, True):
            status, headers, _ = ask(server, "POST", "/v1/completions", {"stream": stream})
            assert (status, headers["retry-after"]) == (503, "2")


def test_token_and_origin(exported, model):
    with serving(exported, model, token=TOKEN, origin="https://example.org", hosts=["127.0.0.1"]) as server:
        with openai_client(server, TOKEN) as client:
            assert len(client.completions.create(model="tiny", prompt="a", max_tokens=5).choices[0].text) == 5
        for key in ("wrong", "s"):
            with openai_client(server, key) as client, pytest.raises(openai.AuthenticationError, match="token"):
                client.models.list()
        assert ask(server, "GET", "/")[0] == 401
        assert ask(server, "GET", "/", headers={"authorization": "Basic OnNlY3JldA=="})[0] == 200
        assert ask(server, "GET", "/health")[0] == 200
        allowed = ask(server, "GET", "/health", headers={"origin": "https://example.org"})[1]
        assert allowed["access-control-allow-origin"] == "https://example.org"
        assert ask(server, "GET", "/health", headers={"host": "evil.example"})[0] == 400


def test_no_other_origin_by_default(server):
    assert "access-control-allow-origin" not in ask(server, "GET", "/health", headers={"origin": "https://a.org"})[1]


# -- the command line and the page


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--host", "0.0.0.0"], "give --token"), (["--port", "70000"], "--port"), (["--threads", "0"], "positive")],
)
def test_refused_options(argv, message, tmp_path, monkeypatch):
    monkeypatch.delenv("SMALLM_TOKEN", raising=False)
    with pytest.raises(UserError, match=message):
        cli.main([str(tmp_path), *argv])


def test_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'smallm\[serve\]'"):
        cli.main([str(tmp_path)])


def test_defaults(model):
    asked = CompletionRequest.parse({"prompt": None, "stop": None}, model.vocabulary, Limits())
    assert (asked.prompts, asked.config.max_length, asked.n, asked.logprobs) == (("",), 16, 1, False)


def test_the_page_and_its_files(server, exported):
    page = ask(server, "GET", "/")[2].decode()
    assert "{{" not in page
    assert ask(server, "GET", "/model.onnx")[2] == (exported / "model.onnx").read_bytes()
    types = {"smallm.js": "text/javascript", "smallm.wasm": "application/wasm", "style.css": "text/css"}
    for name, kind in types.items():
        status, headers, _ = ask(server, "GET", f"/{name}")
        assert (status, headers["content-type"].split(";")[0]) == (200, kind)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_the_command(exported):
    argv = [sys.executable, "-m", "smallm", "serve", exported, "--port", "0"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        while "running on" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(2)
        rest = process.stderr.read()
        assert process.wait(timeout=30) == 0
    assert "Traceback" not in rest


@pytest.mark.slow
def test_the_page_writes_in_chromium(server, model, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not (chromium and shutil.which("node") and (JS / "node_modules" / ".package-lock.json").is_file()):
        pytest.skip("Chromium, Node or the packages of tests/js are not installed")
    address = f"http://{server[0]}:{server[1]}/"
    done = subprocess.run(["node", JS / "served.mjs", chromium, address], capture_output=True, text=True, cwd=JS)
    assert done.returncode == 0, done.stderr[-2000:]
    saw = json.loads(done.stdout)
    assert saw["problems"] == []
    for text in saw["texts"]:
        assert text == model.generate("the moon ", 200, temperature=0.8, rng_seed=1)
