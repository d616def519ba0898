"""The programs in examples/ run as their first lines say."""

import asyncio
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from test_kit_js import JS, chromium, node, run_node, served  # noqa: F401 (fixtures)
from toys import random_model, save_onnx

from smallm import LanguageModel
from smallm.export.kits import write_sources

ROOT = Path(__file__).parents[2]
HOSTS = ROOT / "tests" / "hosts" / "node_modules"
EXAMPLES = ROOT / "examples"
SEED = "the “café” "


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test():
    tested = Path(__file__).read_text(encoding="utf-8")
    names = [file.name for file in EXAMPLES.rglob("*") if file.suffix in (".py", ".sh", ".cpp", ".mjs", ".html")]
    assert len(names) >= 10
    for name in names:
        assert name in tested or f'"{Path(name).stem}"' in tested, name


def test_train_and_generate(text_file, tmp_path, monkeypatch, capsys):
    example, out = load("train_and_generate"), tmp_path / "run"
    argv = [str(text_file), "--minutes", "0.1", "--out", str(out), "--seed", "the "]
    monkeypatch.setattr("smallm.training.budget.configure.HANDFUL", 0)  # a busy machine has no time left
    monkeypatch.setattr(sys, "argv", ["train_and_generate.py", *argv])
    example.main()
    printed = capsys.readouterr().out
    assert "nats per character" in printed
    text = LanguageModel.load(out).generate("the ", max_length=300, temperature=0.8, rng_seed=1)
    assert printed.endswith(text.removeprefix("the ") + "\n")


def test_fine_tune(tiny_run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    new = tmp_path / "new.txt"
    new.write_text("a new text about old owls and the moon\n" * 200, encoding="utf-8")
    argv = [str(run), str(new), "--max-steps", "30", "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", ["fine_tune.py", *argv])
    load("fine_tune").main()
    old, new = [line for line in capsys.readouterr().out.splitlines() if " text: " in line]
    before, after = (float(word) for word in new.split() if word.replace(".", "").isdigit())
    assert old.startswith("old text: ")
    assert after < before


def printed_by(name: str, argv: list, monkeypatch, capsys) -> list[str]:
    """Runs an example in this process, and returns its lines."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    load(name).main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_names(tmp_path, monkeypatch, capsys):
    beginnings, middles, ends = ("An", "Be", "Ka", "Lo"), ("li", "ro", "ma"), ("na", "ta", "do", "s", "")
    known = {a + b + c for a in beginnings for b in middles for c in ends}
    file = tmp_path / "names.txt"
    file.write_text("\n".join(known), encoding="utf-8")
    argv = [file, "--count", 5, "--max-steps", 40, "--out", tmp_path / "out"]
    *_, loss, a, b, c, d, e = printed_by("names", argv, monkeypatch, capsys)
    assert "nats per character" in loss
    assert len({a, b, c, d, e} - known - {""}) == 5
    with pytest.raises(SystemExit):
        printed_by("names", argv, monkeypatch, capsys)
    assert "out exists; name a new folder with --out" in capsys.readouterr().err


def test_typos(exported, tmp_path, monkeypatch, capsys):
    file = tmp_path / "letter.txt"
    text = "an old owl paints the moon.\nZoë sings tq the moon.\nthe river follows the moon.\n"
    file.write_text(text, encoding="utf-8")
    first, second = printed_by("typos", [exported, file, "--count", 2], monkeypatch, capsys)
    assert first.startswith(f"{file}:2: tq (")
    assert "tq" not in second
    file.write_text("", encoding="utf-8")
    assert printed_by("typos", [exported, file], monkeypatch, capsys) == []


def test_language(exported, tmp_path, monkeypatch, capsys):
    noise = save_onnx(random_model(), tmp_path / "noise.onnx")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the small café sings to the moon.\n"))
    lines = printed_by("language", [f"noise={noise}", f"owls={exported}"], monkeypatch, capsys)
    assert [line.partition(":")[0] for line in lines] == ["owls", "noise", "The text is owls."]
    with pytest.raises(SystemExit):
        printed_by("language", ["owls"], monkeypatch, capsys)
    assert "NAME=PATH" in capsys.readouterr().err


class Client:
    """A client of an ASGI application: one request, its response in parts."""

    def __init__(self, app, path: str, query: str = "", leave_after: int | None = None):
        self.app, self.leave_after = app, leave_after
        self.scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode()}
        self.status, self.parts, self.ended = 0, [], False
        self.left = asyncio.Event()

    async def receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.parts.append(message["body"].decode())
        self.ended = not message.get("more_body")
        if self.leave_after is not None and len(self.parts) > self.leave_after:
            self.left.set()
        await asyncio.sleep(0)

    async def run(self) -> "Client":
        await self.app(self.scope, self.receive, self.send)
        return self


@pytest.fixture
def app(exported, monkeypatch):
    monkeypatch.setenv("SMALLM_MODEL", str(exported))
    return load("server").app


def test_server_streams_to_many_clients_from_one_model(app, exported):
    lm = LanguageModel.load(exported)

    async def all_of_them():
        query = f"seed={quote(SEED)}&max_length=60&temperature=0.8&rng_seed="
        return await asyncio.gather(*(Client(app, "/generate", f"{query}{n}").run() for n in range(4)))

    for n, client in enumerate(asyncio.run(all_of_them())):
        assert (client.status, client.ended) == (200, True)
        assert "".join(client.parts) == lm.generate(SEED, max_length=60, temperature=0.8, rng_seed=n)
        assert len(client.parts) > 3


def test_server_stops_for_a_client_that_leaves(app):
    client = asyncio.run(Client(app, "/generate", "max_length=5000", leave_after=5).run())
    assert len(client.parts) < 100


@pytest.mark.parametrize(
    ("path", "query", "status", "said"),
    [("/", "", 404, "/generate"), ("/generate", "temperature=hot", 400, "hot"), ("/generate", "top_k=-1", 400, "top_k"),
     ("/generate", "max_length=1000000", 400, "at most"), ("/generate", "tempreature=1", 400, "temperature")],
)  # fmt: skip
def test_server_says_what_is_wrong(app, path, query, status, said):
    client = asyncio.run(Client(app, path, query).run())
    assert (client.status, client.ended) == (status, True)
    assert said in "".join(client.parts)


def onnxruntime_library() -> Path:
    import onnxruntime

    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SMALLM_ORT_HEADERS"), reason="SMALLM_ORT_HEADERS is not set")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_generate_cpp(exported, tmp_path):
    library = onnxruntime_library()
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    program, source = tmp_path / "generate", EXAMPLES / "cpp" / "generate.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{os.environ['SMALLM_ORT_HEADERS']}"]
    subprocess.run(["c++", *flags, source, library, f"-Wl,-rpath,{tmp_path}", "-o", program], check=True)
    done = subprocess.run([program, exported / "model.onnx", SEED, "20"], capture_output=True, check=True)
    text = done.stdout.decode("utf-8", errors="replace")
    assert text.startswith(SEED)
    assert len(text) > len(SEED) + 10
    assert done.stderr == b""
    done = subprocess.run([program, tmp_path / "missing.onnx", "x"], capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
@pytest.mark.skipif(not (HOSTS / "onnxruntime-web").is_dir(), reason="run npm ci in tests/hosts")
def test_generate_mjs(exported, tmp_path):
    (tmp_path / "node_modules").symlink_to(HOSTS)
    script = shutil.copy(EXAMPLES / "javascript" / "generate.mjs", tmp_path)
    done = subprocess.run(["node", script, exported, SEED, "20"], capture_output=True, check=True)
    text = done.stdout.decode("utf-8")
    assert text.startswith(SEED)
    assert len(text) > len(SEED) + 10
    assert done.stderr == b""
    # The arithmetic, against Python: the same ids for a seed, and the same characters for the most probable ones.
    code = f"""
import * as ort from "onnxruntime-web";
import {{ readFile }} from "node:fs/promises";
import {{ encode, generate, readVocabulary }} from "{script}";
const config = JSON.parse(await readFile("{exported}/smallm.json", "utf8"));
const session = await ort.InferenceSession.create(await readFile("{exported}/model.onnx"), {{ logSeverityLevel: 3 }});
let text = "";
for await (const part of generate(ort, session, config, "the ", 20, {{ topK: 1 }})) text += part;
console.log(JSON.stringify([encode(readVocabulary(config.tokens), {json.dumps(SEED + "é𝄞")}), text]));
process.exit(0);
"""
    (tmp_path / "check.mjs").write_text(code, encoding="utf-8")
    done = subprocess.run(["node", tmp_path / "check.mjs"], capture_output=True, check=True, cwd=tmp_path)
    ids, text = json.loads(done.stdout)
    lm = LanguageModel.load(exported)
    assert ids == lm.vocabulary.encode(SEED + "é𝄞").tolist()
    assert lm.generate("the ", max_length=20, temperature=0).startswith("the " + text)


def test_autocomplete_html(chromium, node, exported, tmp_path):  # noqa: F811 (fixtures)
    kit = tmp_path / "kit"
    write_sources("web", exported, kit)
    shutil.copy(EXAMPLES / "autocomplete.html", kit)
    with served(kit) as url:
        saw = json.loads(run_node(node, JS / "autocomplete.mjs", chromium, f"{url}autocomplete.html"))
    lm, seed = LanguageModel.load(exported), "an old owl s"
    text = lm.generate(seed, 20, temperature=0, stop="\n")
    assert saw["problems"] == []
    assert saw["proposal"] == text.removeprefix(seed) != ""
    assert (saw["accepted"], saw["focused"]) == (text, "text")
    assert saw["escaped"] == ["", "the moon"]
    assert saw["left"] != "text"


@pytest.mark.skipif(sys.platform == "win32", reason="Slurm jobs are bash scripts")
def test_slurm_sh(tmp_path):
    for name, body in (
        ("scontrol", 'if [ "$1" = show ]; then echo first; else echo "$@" >> requeued; fi'),
        ("srun", 'trap "exit 0" TERM; echo "$@" > started; sleep 30 & wait'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    names = {"SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "7", "SLURM_NODEID": "1"}
    environment = os.environ | names | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def job(expected: str) -> None:
        started = tmp_path / "started"
        started.unlink(missing_ok=True)
        process = subprocess.Popen(["bash", EXAMPLES / "slurm.sh"], cwd=tmp_path, env=environment)
        while not (started.exists() and started.read_text()):
            time.sleep(0.02)
        assert expected in started.read_text()
        assert "--main_process_ip first" in started.read_text()
        time.sleep(0.5)  # until the job, which has just started srun, has set its trap
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM  # of the `wait` that the signal ended

    job("--config configs/shakespeare-gpu.toml --data shakespeare --out runs/big")
    (tmp_path / "runs" / "big" / "checkpoints").mkdir(parents=True)
    job("--resume runs/big")
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" * 2
