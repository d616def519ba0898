"""infer.py: text and figures on stdout and nothing else there, every mistake one line, and no PyTorch anywhere."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smallm import LanguageModel
from smallm.cli import infer as infer_module
from smallm.cli import main as cli

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "infer.py"
NOTE = infer_module.OVERFLOW_NOTE.format(size=32) + "\n"  # most texts here are longer than the context
TRY = "pass --encoding NAME, for example --encoding"


@pytest.fixture
def infer(exported, capsys):
    """Runs `infer.py --model <the trained one> …` in this process: exit code, stdout, stderr."""

    def run(*argv, model=exported):
        words = ["--model", model, *argv] if model else argv
        code = cli.run(cli.infer, [str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err.replace(NOTE, "")

    return run


@pytest.fixture(scope="module")
def lm(exported):
    return LanguageModel.load(exported)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables for a Python that cannot import anything but the base install."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'accelerate', 'onnx', 'safetensors', 'transformers'):\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    return os.environ | {"PYTHONPATH": str(folder)}


# -- generating


def test_seed_and_text_and_nothing_else(infer, lm):
    text = lm.generate("Zoë ", 60, rng_seed=5)
    assert infer("--seed", "Zoë ", "--max-length", 60, "--rng-seed", 5) == (0, text + "\n", "")
    assert infer("--seed", "Zoë ", "--max-length", 60, "--rng-seed", 5, "--no-stream") == (0, text + "\n", "")
    assert infer("--seed=Zoë ", "--max-length=60", "--rng-seed=5", "--stream") == (0, text + "\n", "")
    assert infer("--seed_string", "Zoë ", "--max_length", 60, "--rng_seed", 5) == (0, text + "\n", "")


def test_old_name_of_the_model(exported, infer, lm):
    text = lm.generate("a", 9, rng_seed=5)
    assert (
        infer("--model_path", exported, "--seed", "a", "--max_length", 9, "--rng-seed", 5, model=None)[1] == text + "\n"
    )


@pytest.mark.parametrize("spelling", ["-", "_"])
def test_options_reach_the_model(infer, lm, spelling):
    options = {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "overflow": "shift",
               "repetition_penalty": 1.2, "repetition_window": 8, "min_length": 3}  # fmt: skip
    flags = [f"--{name.replace('_', spelling)}={value}" for name, value in options.items()]
    flags += ["--ban", r"e\n", "--allow", "abcdefgh \n"]
    options |= {"banned": "e\n", "allowed": "abcdefgh \n"}
    expected = lm.generate("the ", 80, rng_seed=3, **options)
    assert infer("--seed", "the ", "--max-length", 80, "--rng-seed", 3, *flags) == (0, expected + "\n", "")
    assert infer("--seed", "the ", "--max-length", 80, "--rng-seed", 3, "--threads", 2, *flags)[1] == expected + "\n"
    assert expected != lm.generate("the ", 80, rng_seed=3)


@pytest.mark.parametrize(
    ("flags", "noted"),
    [
        (["--max-length", 100], True), (["--max-length", 100, "--num-samples", 2, "--json"], True),
        (["--max-length", 30], False), (["--max-length", 100, "--overflow", "shift"], False),
        (["--max-length", 100, "--stop", "e"], False),
    ],
)  # fmt: skip
def test_one_line_says_what_happened_past_the_context(exported, capsys, flags, noted):
    words = ["--model", exported, "--seed", "a", "--rng-seed", 5, *flags]
    assert cli.run(cli.infer, [str(word) for word in words]) == 0
    assert capsys.readouterr().err == (NOTE if noted else "")


@pytest.mark.parametrize("number", [0, -1, 10_001, 10**9, 10**22])
def test_the_number_of_samples_has_a_limit(infer, number):
    code, out, err = infer("--num-samples", number)
    assert (code, out) == (2, "")
    assert err == f"smallm: --num-samples {number} is out of range; it must be from 1 to 10,000\n"


def test_the_default_length_is_500(infer):
    assert len(infer("--seed", "ab", "--rng-seed", 1)[1]) == 2 + 500 + 1


def test_without_rng_seed_the_chosen_one_is_printed(infer):
    code, out, err = infer("--max-length", 40)
    assert code == 0
    assert err.startswith("again with: --rng-seed ")
    assert infer("--max-length", 40, "--rng-seed", err.split()[-1]) == (0, out, "")
    assert infer("--max-length", 40)[1] != out


def test_several_samples(infer, lm):
    texts = [lm.generate("a", 30, rng_seed=4, stream_number=n) for n in range(3)]
    assert len(set(texts)) == 3
    code, out, err = infer("--seed", "a", "--max-length", 30, "--rng-seed", 4, "--num-samples", 3)
    assert (code, err) == (0, "")
    assert out == ("\n" + "-" * 40 + "\n").join(texts) + "\n"
    assert infer("--seed", "a", "--max-length", 30, "--rng-seed", 4, "--num_samples", 3, "--no-stream")[1] == out


@pytest.mark.parametrize(
    ("argument", "stop"),
    [(r"\n", "\n"), ("\n", "\n"), (r"\t", "\t"), (r"\\", "\\"), (r"s\n", "s\n"), ("é", "é"), (r"é\n", "é\n"), ("", ""),
     ("\\", "\\"), (r"\d\x", r"\d\x"), (r"\\n", r"\n"), ("e" * 100_000, "e" * 100_000)],
)  # fmt: skip
def test_stop(infer, lm, argument, stop):
    expected = lm.generate("the ", 100, rng_seed=2, stop=stop)
    assert infer("--seed", "the ", "--max-length", 100, "--rng-seed", 2, "--stop", argument) == (0, expected + "\n", "")


def test_several_stops(infer, lm):
    expected = lm.generate("the ", 100, rng_seed=2, stop=["\n", "e"])
    assert expected != lm.generate("the ", 100, rng_seed=2, stop="\n")
    assert infer("--seed", "the ", "--rng-seed", 2, "--stop", r"\n", "--stop", "e") == (0, expected + "\n", "")


def test_json_is_one_object(infer, lm):
    code, out, err = infer(
        "--seed", "Zoë ", "--max-length", 30, "--rng-seed", 4, "--num-samples", 2, "--json", "--top-k", 5
    )
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    texts = [lm.generate("Zoë ", 30, rng_seed=4, top_k=5, stream_number=n) for n in range(2)]
    found = json.loads(out)
    logprobs = [sample.pop("logprobs") for sample in found["samples"]]
    assert found == {
        "seed": "Zoë ", "max_length": 30, "top_k": 5, "stop": [], "rng_seed": 4,
        "samples": [{"text": text, "new_text": text[4:]} for text in texts],
    }  # fmt: skip
    stream = lm.stream("Zoë ", 30, rng_seed=4, top_k=5, logprobs=True)
    assert logprobs[0] == pytest.approx([value for _ in stream for value in stream.logprobs], abs=1e-5)
    assert len(logprobs[1]) == 30
    # without a random seed, the one taken stands there
    taken = json.loads(infer("--max-length", 30, "--json")[1])
    assert infer("--max-length", 30, "--rng-seed", taken["rng_seed"])[1] == taken["samples"][0]["text"] + "\n"


def test_more_samples_than_fit_in_a_batch_come_in_order(infer, lm, monkeypatch):
    monkeypatch.setattr("smallm.generation.batch.MAX_STREAMS", 2)
    argv = ["--seed", "the ", "--max-length", 40, "--rng-seed", 4, "--num-samples", 5, "--stop", "o"]
    texts = [lm.generate("the ", 40, rng_seed=4, stop="o", stream_number=n) for n in range(5)]
    expected = ("\n" + "-" * 40 + "\n").join(texts) + "\n"
    assert infer(*argv) == infer(*argv, "--no-stream") == (0, expected, "")
    assert [sample["text"] for sample in json.loads(infer(*argv, "--json")[1])["samples"]] == texts


def test_next_characters(infer, lm):
    found = lm.next_characters("the small caf", 3)
    code, out, err = infer("--seed", "the small caf", "--next", 3)
    assert (code, err) == (0, "")
    assert out == "".join(f"{p:.6f}  {json.dumps(c, ensure_ascii=False)}\n" for c, p in found)
    values = json.loads(infer("--seed", "the small caf", "--next", 3, "--json")[1])
    assert [value["character"] for value in values["next"]] == [c for c, _ in found]
    assert [value["probability"] for value in values["next"]] == pytest.approx([p for _, p in found], abs=1e-8)


@pytest.mark.parametrize("seed", ["", "中🎉", "\n\n", "the " * 5000])
def test_any_seed(infer, seed):
    code, out, err = infer("--seed", seed, "--max-length", 40, "--rng-seed", 1)
    assert (code, err) == (0, "")
    assert out.startswith(seed)
    assert len(out) == len(seed) + 41


def test_length_zero(infer):
    assert infer("--seed", "a", "--max-length", 0, "--rng-seed", 1) == (0, "a\n", "")


# -- measuring


def test_perplexity(infer, lm, tiny_run):
    path = tiny_run / "validation.txt"
    found = lm.perplexity(path.read_text(encoding="utf-8"))
    code, out, err = infer("--perplexity", path)
    assert (code, err) == (0, "")
    assert out == (
        f"{found.nats_per_char:.4f} nats per character (cross-entropy), {found.bits_per_char:.4f} bits per character, "
        f"perplexity {found.perplexity:.4f}, over {found.characters:,} characters\n"
    )
    values = json.loads(infer("--perplexity", path, "--json")[1])
    assert values.pop("file") == str(path)
    assert values == pytest.approx(vars(found))
    overlapping = lm.perplexity(path.read_text(encoding="utf-8"), stride=8)
    assert json.loads(infer("--perplexity", path, "--stride", 8, "--json")[1])["perplexity"] == pytest.approx(
        overlapping.perplexity
    )
    assert overlapping.perplexity != pytest.approx(found.perplexity, abs=1e-4)


def test_perplexity_of_several_files(infer, lm, tmp_path):
    texts = {"b/one.txt": "the small café sings.\n" * 9, "b/c/two.TXT": "an old owl.\n" * 5, "b/x.md": "the moon"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    expected = {name: lm.perplexity(text) for name, text in texts.items()}
    folder = json.loads(infer("--perplexity", tmp_path / "b", "--json")[1])
    assert [Path(row["file"]).name for row in folder["files"]] == ["two.TXT", "one.txt"]
    nats = sum(expected[name].nats_per_char * expected[name].characters for name in list(texts)[:2])
    characters = sum(expected[name].characters for name in list(texts)[:2])
    assert folder["total"]["characters"] == characters
    assert folder["total"]["nats_per_char"] == pytest.approx(nats / characters)
    one = tmp_path / "b" / "one.txt"
    code, out, _ = infer("--perplexity", tmp_path / "**" / "*.md", one, one)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["file", "characters", "nats", "bits", "perplexity"]
    assert [Path(row[0]).name for row in rows[1:]] == ["x.md", "one.txt", "total"]
    assert rows[1][2] == f"{expected['b/x.md'].nats_per_char:.4f}"


def test_perplexity_of_a_file_in_pieces(infer, lm, tmp_path, monkeypatch):
    monkeypatch.setattr("smallm.cli.text_file.PIECE_BYTES", 7)
    path, text = tmp_path / "größer.txt", "Zoë: 10 € 中🎉\r\n" * 20
    expected = lm.perplexity(text).nats_per_char
    for encoding in ("utf-8", "utf-16", "utf-32-le", "gb18030"):
        path.write_bytes(text.encode(encoding))
        code, out, _ = infer("--perplexity", path, "--encoding", encoding, "--json")
        assert code == 0
        assert json.loads(out)["nats_per_char"] == pytest.approx(expected, abs=1e-6)
    path.write_bytes("déjà vu".encode("latin-1"))
    out = infer("--perplexity", path, "--encoding", "latin-1", "--json")[1]
    assert json.loads(out)["nats_per_char"] == pytest.approx(lm.perplexity("déjà vu").nats_per_char, abs=1e-6)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", [], "the text has 0 character(s); perplexity needs at least 2"),
        (b"a", [], "the text has 1 character(s); perplexity needs at least 2"),
        ("🎉".encode(), [], "the text has 1 character(s); perplexity needs at least 2"),
        (b"good \xff bad", [], f"FILE is not valid utf-8: byte 0xff at offset 5 (line 1); {TRY} latin-1\n"),
        ("good €".encode()[:-1], [], f"FILE is not valid utf-8: byte 0xe2 at offset 5 (line 1); {TRY} latin-1\n"),
        ("é".encode(), ["--encoding", "ascii"], f"FILE is not valid ascii: byte 0xc3 at offset 0 (line 1); {TRY} utf"),
        (b"abc", ["--encoding", "utf-16"], "FILE is not valid utf-16: "),
        (b"abc", ["--encoding", "klingon"], "there is no encoding 'klingon'; pass for example --encoding latin-1"),
        (b"616263", ["--encoding", "hex"], "there is no encoding 'hex'"),
        (b"abc", ["--encoding", "undefined"], "there is no encoding 'undefined'"),
        (None, [], "cannot read FILE: No such file or directory"),
        (b"abc", ["--stride", "0"], "stride = 0 is out of range; it must be from 1 to 32 (block_size)"),
        (b"abc", ["--stride", "33"], "stride = 33 is out of range; it must be from 1 to 32 (block_size)"),
        (b"abc", ["--stride", "x"], "argument --stride: invalid int value: 'x'; see --help"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("piece_bytes", [1 << 20, 4])
def test_files_that_cannot_be_measured(infer, tmp_path, monkeypatch, content, flags, message, piece_bytes):
    monkeypatch.setattr("smallm.cli.text_file.PIECE_BYTES", piece_bytes)
    path = tmp_path / "file.txt"
    if content is not None:
        path.write_bytes(content)
    code, out, err = infer("--perplexity", path, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("smallm: " + message.replace("FILE", str(path)))
    assert err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--perplexity", "--surprise"])
@pytest.mark.parametrize("field", ["--field", "--data.field"])
def test_the_field_of_records(infer, tmp_path, flag, field):
    path, texts = tmp_path / "a.jsonl", ["the small café\n", "sings to the moon\n"] * 9
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "a.txt").write_text("".join(texts), encoding="utf-8")
    plain = infer(flag, tmp_path / "a.txt", "--json")[1]
    code, out, _ = infer(flag, path, field, "body", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(plain) | {"file": str(path)}
    assert "its fields are body; name another with --data.field" in infer(flag, path)[2]
    assert "goes with --perplexity or --surprise" in infer("--seed", "a", field, "body")[2]


@pytest.mark.parametrize("flag", ["--perplexity", "--surprise"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("ab".encode("utf-16"), "looks like UTF-16, not utf-8; pass --encoding utf-16"),
        (gzip.compress(b"a text", mtime=0)[:-1], "is damaged or encrypted: Compressed file ended before the "
         "end-of-stream marker was reached; pass an intact file"),
        (b"%PDF-1.4 in ASCII", "is a PDF; convert it to plain text first, for instance with pdftotext"),
    ],
)
def test_files_that_are_not_plain_text_cannot_be_measured(infer, tmp_path, content, problem, flag):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    assert infer(flag, path) == (2, "", f"smallm: {path} {problem}\n")


@pytest.mark.parametrize("piece_bytes", [1 << 20, 1])
def test_a_byte_order_mark_counts_nowhere(infer, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr("smallm.cli.text_file.PIECE_BYTES", piece_bytes)
    path = tmp_path / "file.txt"
    path.write_bytes("\ufeffab".encode())
    counts = [json.loads(infer(flag, path, "--json")[1])["characters"] for flag in ("--perplexity", "--surprise")]
    assert counts == [1, 1]


def test_a_folder_instead_of_a_file(infer, tmp_path):
    code, out, err = infer("--perplexity", tmp_path / "no texts here*")
    assert (code, out) == (2, "")
    assert "has no text file" in err


def test_a_folder_that_cannot_be_read_is_not_passed_over(infer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a text\n")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    code, out, err = infer("--perplexity", tmp_path)
    assert (code, out) == (2, "")
    assert "closed: Permission denied" in err


# -- mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "-0.1"], "temperature = -0.1 is out of range; it must be 0 or more"),
        (["--temperature", "nan"], "temperature = nan is out of range"),
        (["--temperature", "inf"], "temperature = inf is out of range"),
        (["--temperature", "hot"], "argument --temperature: invalid float value: 'hot'; see --help"),
        (["--top-k", "-1"], "top_k = -1 is out of range"),
        (["--top-k", "2.5"], "argument --top-k/--top_k: invalid int value: '2.5'"),
        (["--top-p", "0"], "top_p = 0.0 is out of range"),
        (["--top-p", "1.5"], "top_p = 1.5 is out of range"),
        (["--min-p", "-1"], "min_p = -1.0 is out of range"),
        (["--max-length", "-1"], "max_length = -1 is out of range"),
        (["--max-length", "1e3"], "argument --max-length/--max_length: invalid int value: '1e3'"),
        (["--rng-seed", "-1"], "rng_seed = -1 is out of range"),
        (["--rng-seed", "4294967296"], "rng_seed = 4294967296 is out of range"),
        (["--num-samples", "0"], "--num-samples 0 is out of range; it must be from 1 to 10,000"),
        (["--threads", "0"], "threads = 0 is out of range"),
        (["--next", "0"], "--next 0 is out of range; it must be 1 or more"),
        (["--min-length", "501"], "min_length = 501 is more than max_length = 500"),
        (["--repetition-penalty", "0"], "repetition_penalty = 0.0 is out of range"),
        (["--repetition-window", "33"], "repetition_window = 33 is out of range; it must be from 0 to block_size = 32"),
        (["--allow", ""], "allowed and banned leave no character; allow one that is not banned"),
        (["--allow", "ab", "--ban", "ba"], "allowed and banned leave no character"),
        (["--ban", "\udcff"], "banned = '\\udcff' has a lone surrogate, which no text can hold; leave it out"),
        (["--stop", "x\udcff"], "stop = 'x\\udcff' has a lone surrogate, which no text can hold; leave it out"),
        (["--overflow", "wrap"], "argument --overflow: invalid choice: 'wrap'"),
        (["--seed", "caf\udcff"], "the text has a lone surrogate (U+DCFF) at character 3"),
        (["--seed"], "argument --seed/--seed_string: expected one argument"),
        (["--nonsense"], "unrecognized arguments: --nonsense; see --help"),
        (["--max", "5"], "unrecognized arguments: --max 5"),
        (["--topk", "3"], "unrecognized arguments: --topk 3; did you mean --top-k?"),
        (["--seeds=a"], "unrecognized arguments: --seeds=a; did you mean --seed?"),
        (["text"], "unrecognized arguments: text"),
    ],
)
def test_bad_options(infer, argv, message):
    code, out, err = infer(*argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"smallm: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, "truncated"])
def test_bad_models(infer, exported, tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes((exported / "model.onnx").read_bytes()[:9000] if content == "truncated" else content)
    code, out, err = infer("--seed", "a", model=path)
    assert (code, out) == (2, "")
    assert err.startswith(f"smallm: {path} is truncated or not an ONNX model")
    assert err.count("\n") == 1
    missing = tmp_path / "missing"
    expected = f"smallm: there is no model in {missing}; give a run, an export folder or an .onnx file\n"
    assert infer(model=missing) == (2, "", expected)


def test_weights_overwritten_on_disk(infer, exported, tmp_path):
    """The file is well-formed but its numbers are random: the result is text or one line of error."""
    data = bytearray((exported / "model.onnx").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = b"\xff" * 4000  # NaN
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    for argv in (["--seed", "the owl", "--rng-seed", 1], ["--perplexity", REPOSITORY / "LICENSE"]):
        code, out, err = infer(*argv, model=path)
        assert (code, out.strip() in ("", "the owl")) == (2, True)
        assert err.startswith("smallm: ")
        assert err.count("\n") == 1


def test_no_run_found(infer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = infer("--seed", "a", model=None)
    assert (code, out) == (2, "")
    assert err == "smallm: no run found in runs/; name a folder, or train one with: python -m smallm train\n"


def test_the_newest_run_is_taken_and_named(infer, exported, tiny_run, tmp_path, monkeypatch, lm):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["first", "last", "middle"]):
        shutil.copytree(exported, Path("runs") / name / "export")
        metrics = Path("runs") / name / "metrics.jsonl"
        shutil.copy(tiny_run / "metrics.jsonl", metrics)
        os.utime(metrics, (1e9 + (i == 1), 1e9 + (i == 1)))
    text = lm.generate("a", 20, temperature=0)
    argv = ["--seed", "a", "--max-length", 20, "--temperature", 0, "--rng-seed", 1]
    assert infer(*argv, model=None) == (0, text + "\n", f"model: {Path('runs/last')}\n")
    shutil.rmtree(Path("runs/last/export"))
    code, out, err = infer(*argv, model=None)
    assert (code, out) == (2, "")
    assert err.splitlines()[1] == "smallm: runs/last is not exported yet; run: python -m smallm export runs/last"


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(cli.infer, ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--seed", "--perplexity", "--stride", "--json", "--num-samples", "examples:"))


# -- as a process of its own


def script(*argv, **options):
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, **options)


def test_the_base_install_is_enough(exported, tiny_run, environment, lm, tmp_path):
    blocked = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, check=False)
    assert b"torch is blocked" in blocked.stderr
    seed = "Zoë rémembers 🎉"
    done = script(
        "--model", exported, "--seed", seed, "--max-length", 50, "--rng-seed", 1, env=environment, cwd=tmp_path
    )
    assert (done.returncode, done.stderr.decode()) == (0, NOTE)
    assert done.stdout.decode() == lm.generate(seed, 50, rng_seed=1) + "\n"
    path = tiny_run / "validation.txt"
    done = script("--model", exported, "--perplexity", path, "--json", env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = lm.perplexity(path.read_text(encoding="utf-8"))
    assert json.loads(done.stdout)["nats_per_char"] == pytest.approx(expected.nats_per_char, abs=1e-6)


def test_utf8_on_stdout_whatever_the_locale(exported, lm):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = script("--model", exported, "--seed", "é", "--max-length", 60, "--rng-seed", 1, env=environment)
    assert (done.returncode, done.stdout.decode()) == (0, lm.generate("é", 60, rng_seed=1) + "\n")


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_a_closed_pipe(exported, flag):
    command = [sys.executable, str(SCRIPT), "--model", str(exported), "--max-length", "200000", "--overflow", "shift"]
    command += [flag, "--rng-seed", "1"] if flag == "--stream" else [flag, "--rng-seed", "1", "--max-length", "300"]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # as it is for users: what is left is written at the very end
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as process:
        if flag == "--stream":
            assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_behind_stdout_is_one_line(exported):
    command = [sys.executable, str(SCRIPT), "--model", str(exported), "--max-length", "20", "--rng-seed", "1"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("smallm: ")
    assert "No space left" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_seed_that_is_not_utf8(exported):
    done = script("--model", exported, "--seed", os.fsdecode(b"caf\xe9"))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"smallm: the text has a lone surrogate (U+DCE9) at character 3")


def test_perplexity_without_a_file_is_that_of_the_runs_validation_text(infer, exported, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(exported, run / "export")
    shutil.copy(tiny_run / "validation.txt", run)
    named = infer("--perplexity", tiny_run / "validation.txt")
    for model in (run, run / "export", run / "export" / "model.onnx"):
        assert infer("--perplexity", model=model)[:2] == named[:2]
    (run / "validation.txt").unlink()
    code, out, err = infer("--perplexity", model=run)
    assert (code, out) == (2, "")
    assert "--perplexity FILE" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--perplexity", "x", "--next", "5"], "argument --next: not allowed with argument --perplexity; see --help"),
        (["--interactive", "--surprise", "x"], "argument --surprise: not allowed with argument --interactive"),
        (["--perplexity", "x", "--top-k", "3"], "--perplexity does not go with --top-k; leave out one of them"),
        (["--next", "5", "--ban", "x"], "--next does not go with --ban; leave out one of them"),
        (["--stride", "3"], "--stride goes with --perplexity"),
        (["--encoding", "ascii"], "--encoding goes with --perplexity or --surprise"),
        (["--html", "x"], "--html goes with --surprise FILE"),
    ],
)
def test_modes_exclude_each_other_and_options_they_would_ignore(infer, argv, message):
    code, out, err = infer(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"smallm: {message}")
