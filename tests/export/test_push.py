"""`smallm push`, against a stand-in for the Hugging Face hub on this machine."""

import base64
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from smallm.cli import main as cli

hub = pytest.importorskip("huggingface_hub", reason="the package huggingface_hub is not installed")


class Hub(ThreadingHTTPServer):
    """Keeps what is uploaded. `status`: the answer to the creation of a repository."""

    daemon_threads = True
    status = 200

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.created, self.files, self.commits, self.tokens = {}, {}, [], set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            name = f"owls/{self.server.created['name'].split('/')[-1]}"
            self.answer({"url": f"{self.server.url}/{name}", "error": "no"}, self.server.status)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                                   for each in files]})  # fmt: skip
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.commits.append(line["value"]["summary"])
                else:
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/owls/tiny/commit/abc", "commitOid": "abc", "success": True})
        else:
            self.answer({"errors": [], "warnings": []})  # /api/validate-yaml

    def do_GET(self):
        self.answer({"error": "not found"}, 404)

    def answer(self, content: object, status: int = 200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server
        server.shutdown()
        thread.join()


def push(*argv: object) -> int:
    return cli.run(cli.push, [*map(str, argv)])


def test_the_export_folder_is_uploaded_to_a_private_repository(exported, server, capsys):
    assert push(exported, "tiny") == 0
    assert capsys.readouterr().out == f"{server.url}/owls/tiny/commit/abc\n"
    assert server.created["name"] == "tiny"
    assert server.created.get("private") or server.created.get("visibility") == "private"
    assert server.tokens == {"Bearer hf_secret"}
    assert server.commits == ["Upload a model of smallm"]
    expected = {file.relative_to(exported).as_posix(): file for file in exported.rglob("*") if file.is_file()}
    assert {"README.md", "model.onnx", "onnx/model.onnx"} <= expected.keys()
    assert server.files == {name: file.read_bytes() for name, file in expected.items()}


def test_a_public_repository_with_a_message(exported, server):
    assert push(exported, "owls/tiny", "--public", "--message", "A first model") == 0
    assert not server.created.get("private")
    assert server.commits == ["A first model"]


@pytest.mark.parametrize(
    ("status", "repo", "expected"),
    [
        (401, "tiny", "the hub refuses to write tiny with this token ("),
        (400, "tiny", "the hub refuses the upload to tiny: "),
        (200, "a/b/c", "the repository name 'a/b/c' is not valid ("),
        (200, "tiny..", "the repository name 'tiny..' is not valid ("),
    ],
)
def test_refusals(exported, server, capsys, status, repo, expected):
    server.status = status
    assert push(exported, repo) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"smallm: {expected}")
    assert message.count("\n") == 1
    assert not server.files


def test_no_network_no_token_no_package_no_export(exported, tmp_path, monkeypatch, capsys):
    def refused(run=exported) -> str:
        assert push(run, "tiny") == 2
        return capsys.readouterr().err

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert refused().startswith("smallm: cannot reach the hub (")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    expected = "smallm: there is no token for the Hugging Face hub; set HF_TOKEN, or run: hf auth login\n"
    assert refused() == expected
    shutil.copyfile(exported / "model.onnx", tmp_path / "model.onnx")
    assert "is not an export folder; write one with" in refused(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    expected = "smallm: push needs the package 'huggingface_hub'; install it with: pip install 'smallm[hub]'\n"
    assert refused() == expected
