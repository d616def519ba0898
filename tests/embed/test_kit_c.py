"""The C kit builds without a warning, generates the texts of Python, and reports each mistake in one line."""

import codecs
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from toys import LATER_VOCABULARY, manifest_of, random_model, save_onnx

from smallm import LanguageModel, Vocabulary
from smallm.cli import main as cli
from smallm.errors import UserError
from smallm.export import kits
from smallm.export.cli import KITS
from smallm.export.draft_table import write_draft_table
from smallm.export.kits import SOURCES, write_kit
from smallm.export.precision import PRECISIONS, write_quantised
from smallm.generation.draft_table import DRAFT_TABLE_FILE, ROW
from smallm.generation.sampler import sample
from smallm.model_file.onnx_reader import BITS, MODEL, OPERATORS
from smallm.model_file.sampling import Sampling

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden.json").read_text(encoding="utf-8"))
C = SOURCES / "c"
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
NON_ASCII = Vocabulary.from_characters("éñ€中")
FILES = {"smallm.h", "smallm.c", "smallm_kernels.h", "smallm_threads.h", "main.c", "Makefile", "CMakeLists.txt",
         "README.md", "SAMPLING.md", "SHA256SUMS", "model.onnx", "smallm.json", "draft_table.npy"}  # fmt: skip


def run(*argv, cwd: Path | None = None, stdin: bytes = b"", env: dict[str, str] | None = None):
    return subprocess.run([str(word) for word in argv], input=stdin, capture_output=True, cwd=cwd,
                          env=os.environ | (env or {}))  # fmt: skip


def succeed(*argv, **options) -> str:
    done = run(*argv, **options)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"{shlex.join(map(str, argv))}\n{said}"
    assert "warning" not in said, said
    return done.stdout.decode()


@pytest.fixture(scope="session", autouse=True)
def compiler():
    if not shutil.which("cc"):
        pytest.skip("no C compiler")


@pytest.fixture(scope="session")
def kit(exported, tmp_path_factory) -> Path:
    """The kit of the tiny model, as written."""
    out = tmp_path_factory.mktemp("kits") / "kit-c"
    write_kit("c", exported, out)
    return out


@pytest.fixture(scope="session")
def generate(kit, tmp_path_factory) -> Path:
    """The example, built by the Makefile with all warnings as errors."""
    folder = shutil.copytree(kit, tmp_path_factory.mktemp("built") / "kit")
    succeed("make", f"CFLAGS=-O2 {shlex.join(STRICT)}", cwd=folder)
    return folder / "smallm_generate"


@pytest.fixture(scope="session")
def sanitized(kit, tmp_path_factory) -> Path:
    """The example, which ends with a report at the first fault of memory or arithmetic, and for a leak."""
    folder = shutil.copytree(kit, tmp_path_factory.mktemp("sanitized") / "kit")
    succeed("make", f"CFLAGS={shlex.join(SANITIZED)}", cwd=folder)
    return folder / "smallm_generate"


@pytest.fixture(scope="session")
def lm(exported) -> LanguageModel:
    """The same model in Python."""
    return LanguageModel.load(exported)


@pytest.fixture(scope="session")
def inner(tmp_path_factory):
    """Calls tests/kit_c.c, built with sanitizers, and returns what it prints."""
    program = tmp_path_factory.mktemp("inner") / "inner"
    succeed("cc", *STRICT, *SANITIZED, f"-I{C}", ROOT / "tests" / "kit_c.c", "-o", program, "-lm", "-pthread")

    def inner(*argv, stdin: bytes = b"") -> str:
        return succeed(program, *argv, stdin=stdin)

    return inner


def refusal(program: Path, *argv) -> str:
    """The one line that the program says about a mistake."""
    done = run(program, *argv)
    said = done.stderr.decode()
    assert (done.returncode, done.stdout) == (2, b""), said
    assert said.startswith("smallm: "), said
    assert said.count("\n") == 1, said
    return said


# -- the kit as a folder


def test_a_kit_is_whole(kit):
    assert {file.name for file in kit.iterdir()} == FILES
    assert set(KITS) == set(kits.FILES)


def test_a_kit_is_written_again_around_what_the_user_added(exported, tmp_path):
    out = tmp_path / "kit"
    write_kit("c", exported, out)
    for name in ("smallm_generate", "my_program.c", "build/smallm.o"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    (out / "smallm.h").unlink()
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    (other / "smallm.json").write_text("{}")
    write_kit("c", other, out)
    assert {file.name for file in out.iterdir()} == FILES | {"smallm_generate", "my_program.c", "build"}
    assert (out / "build" / "smallm.o").read_text() == "mine"
    assert (out / "smallm.json").read_text() == "{}"
    write_kit("c", exported, out)  # the digests are those of the newest export
    assert {file.name for file in tmp_path.iterdir()} == {"kit", "other"}


def test_edited_files_of_a_kit_are_kept(exported, tmp_path):
    out = tmp_path / "kit"
    write_kit("c", exported, out)
    before = {file: file.read_bytes() for file in out.iterdir()}
    for name in ("main.c", "smallm.json"):
        (out / name).write_text("mine")
        with pytest.raises(UserError) as error:
            write_kit("c", exported, out)
        assert str(error.value) == f"{out / name} has been edited; move it away, or choose another --out"
        assert {file: file.read_bytes() for file in out.iterdir()} == before | {out / name: b"mine"}
        (out / name).write_bytes(before[out / name])
    (out / "SHA256SUMS").unlink()  # as in a kit of an older version
    with pytest.raises(UserError, match="choose another --out"):
        write_kit("c", exported, out)


def test_a_folder_that_is_not_a_kit_is_kept(exported, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "main.c").write_text("mine")
    with pytest.raises(UserError, match="choose another --out"):
        write_kit("c", exported, tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["main.c"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="choose another --out"):
        write_kit("c", exported, tmp_path / "file")


def test_export_writes_a_kit(tiny_run, tmp_path, capsys):
    run_copy = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    assert cli.run(cli.export, [str(run_copy), "--kit", "c"]) == 0
    assert "README.md" in capsys.readouterr().out
    assert {file.name for file in (run_copy / "kit-c").iterdir()} == FILES
    assert not (run_copy / "export").exists()
    assert cli.run(cli.export, [str(run_copy), "--kit", "c", "--precision", "int8", "--allow-loss", "--out",
                                str(tmp_path / "mine")]) == 0  # fmt: skip
    assert LanguageModel.load(tmp_path / "mine").metadata.precision == "int8"
    capsys.readouterr()
    assert cli.run(cli.export, [str(run_copy), "--kit", "cobol"]) == 2
    assert "cobol" in capsys.readouterr().err


# -- building


def test_the_readme_says_how_to_build(kit, tmp_path):
    """Its commands as they stand."""
    folder = shutil.copytree(kit, tmp_path / "kit")
    (block,) = re.findall(r"```sh\n(.*?)```", (kit / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block.count("\n") == 2
    assert succeed("sh", "-ec", block, cwd=folder).startswith("Once")


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["OFF", "ON"])
def test_cmake_builds_and_installs_it(kit, tmp_path, shared):
    """The example; then an installed library in another project, by CMake and by pkg-config; then a subdirectory."""
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    folder = shutil.copytree(kit, tmp_path / "kit")
    settings = [f"-DBUILD_SHARED_LIBS={shared}", f"-DCMAKE_C_FLAGS={shlex.join(STRICT)}"]
    succeed("cmake", "-S", folder, "-B", folder / "build", *settings, f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'usr'}")
    succeed("cmake", "--build", folder / "build")
    assert succeed(folder / "build" / "smallm_generate", cwd=folder).count("\n") > 1
    succeed("cmake", "--install", folder / "build")
    app = tmp_path / "app"
    app.mkdir()
    (source,) = re.findall(r"```c\n(.*?)```", (kit / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (app / "app.c").write_text(source)
    shutil.copy(kit / "model.onnx", app)
    expected = succeed(folder / "build" / "smallm_generate", "--seed", "Once", "--max-length", 200, "--rng-seed", 1,
                       cwd=folder).removesuffix("\n").removeprefix("Once")  # fmt: skip
    for number, how in enumerate(("find_package(smallm REQUIRED)", f"add_subdirectory({folder} smallm)")):
        (app / "CMakeLists.txt").write_text(
            f"cmake_minimum_required(VERSION 3.15)\nproject(app LANGUAGES C)\n{how}\nadd_executable(generate app.c)\n"
            "target_link_libraries(generate PRIVATE smallm::smallm)\n"
        )
        built = app / f"build{number}"
        succeed("cmake", "-S", app, "-B", built, f"-DCMAKE_PREFIX_PATH={tmp_path / 'usr'}", *settings)
        succeed("cmake", "--build", built)
        assert succeed(built / "generate", cwd=app) == expected
        assert not (built / "smallm" / "smallm_generate").exists()
    if shutil.which("pkg-config"):
        env = {"PKG_CONFIG_PATH": str(next((tmp_path / "usr").glob("lib*/**/pkgconfig")))}
        flags = succeed("pkg-config", "--cflags", "--libs", "smallm", env=env).split()
        library = next((tmp_path / "usr").glob("lib*/**/libsmallm.*")).parent
        succeed("cc", app / "app.c", *flags, "-o", app / "app", f"-Wl,-rpath,{library}")
        assert succeed(app / "app", cwd=app) == expected


def test_the_program_in_the_readme_and_cpp(kit, tmp_path):
    """The same source as C and, with the header included from it, as C++."""
    (source,) = re.findall(r"```c\n(.*?)```", (kit / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "app.c").write_text(source)
    (tmp_path / "app.cpp").write_text(source)
    shutil.copy(kit / "model.onnx", tmp_path)
    succeed("cc", *STRICT, "-c", kit / "smallm.c", "-o", tmp_path / "smallm.o")
    compilers = {"app.c": ["cc", *STRICT]}
    if shutil.which("c++"):
        compilers["app.cpp"] = ["c++", "-std=c++11", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    expected = "".join(LanguageModel.load(kit).stream("Once", 200, rng_seed=1))
    for name, compiler in compilers.items():
        succeed(*compiler, f"-I{kit}", tmp_path / name, tmp_path / "smallm.o", "-lm", "-o", tmp_path / "app")
        assert succeed(tmp_path / "app", cwd=tmp_path) == expected


def test_fast_arithmetic_is_refused():
    done = run("cc", "-ffast-math", "-fsyntax-only", C / "smallm.c")
    assert done.returncode != 0
    assert b"must not be compiled with -ffast-math" in done.stderr


# -- the arithmetic


@pytest.mark.parametrize("case", GOLDEN["draws"], ids=str)
def test_golden_draws(inner, case):
    assert [int(x) for x in inner("draws", case["rng_seed"], case["stream_number"]).split()] == case["x"]


@pytest.mark.parametrize("case", GOLDEN["ids"], ids=str)
def test_golden_ids(inner, case):
    options = [case[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")]
    assert [int(id) for id in inner("ids", *options).split()] == case["ids"]


@pytest.mark.parametrize("case", GOLDEN["allowed"], ids=lambda case: f"{case['allowed']}-{case['banned']:.2}")
def test_golden_allowed_ids(inner, case):
    allowed = "-" if case["allowed"] is None else case["allowed"]
    found = inner("allowed", case["tokens"], allowed, case["banned"], case["after"]).split()
    assert [int(id) for id in found] == case["ids"]


def test_samples_are_those_of_python(inner):
    """Ties, zeros of both signs, infinities, NaN; every filter."""
    rng, lines, expected = random.Random(5), [], []
    for _ in range(3000):
        n = rng.choice((1, 2, 3, 8, 60))
        pool = [rng.gauss(0, 3) for _ in range(n)] + [0.0, -0.0, 1.0] + [-math.inf] * rng.randrange(3)
        pool += [math.inf, math.nan] * (rng.random() < 0.03)
        logits = np.float32([rng.choice(pool) for _ in range(n)])
        temperature, top_k = rng.choice((0.0, 0.3, 1.0, 2.5, 1e-300)), rng.choice((0, 0, 1, 2, 5, 10**15))
        top_p, min_p = rng.choice((1.0, 1.0, 0.9, 0.5, 1e-9)), rng.choice((0.0, 0.0, 0.1, 1.0))
        u = rng.choice((rng.randrange(1 << 24), 0, (1 << 24) - 1)) / (1 << 24)
        lines.append(" ".join(map(str, (n, temperature, top_k, top_p, min_p, u, *map(float, logits)))))
        try:
            expected.append(sample(logits, u, Sampling(temperature, top_k, top_p, min_p)))
        except UserError:
            expected.append(-1)
    assert [int(id) for id in inner("samples", stdin="\n".join(lines).encode()).split()] == expected
    assert -1 in expected


def test_bytes_become_text_as_in_python(inner):
    rng = random.Random(6)
    pieces = ["é", "€", "𝄞", "\U0010ffff", "\x00a\x7f", "\ud800", "\udfff", "中" * 3]
    data = b""
    for _ in range(3000):
        piece = rng.choice(pieces).encode("utf-8", "surrogatepass")
        data += piece[: rng.randrange(1, len(piece) + 1)] if rng.random() < 0.6 else rng.randbytes(rng.randrange(1, 4))
        if rng.random() < 0.3:
            data += bytes([rng.choice((0xC0, 0xC1, 0xE0, 0xED, 0xF0, 0xF4, 0xF5, 0xFF, 0x80, 0xBF, 0x90, 0x8F, 0xA0))])
    assert inner("decode", stdin=data) == codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def test_numbers_of_the_metadata(inner):
    """strtod would depend on the locale; settings of up to 15 digits are parsed exactly."""
    words = ["0", "0.8", "1e-05", "40", "0.95", "123456.789", "1E3", "-2.5", "1e300", "0.1", "9007199254740992", "1.0",
             "0.30000000000000004", "12345678901234567890123", "1e-320", "0." + "0" * 30 + "1"]  # fmt: skip
    found = [float(x) for x in inner("numbers", *words).split()]
    for word, number in zip(words, found, strict=True):
        exact = len(word) < 16 and "300" not in word and "320" not in word
        assert number == (float(word) if exact else pytest.approx(float(word), rel=1e-14)), word
    assert set(inner("numbers", ".5", "1e", "x", "1e999", "--1", "9" * 500).split()) == {"none"}


# -- the forward pass


def kernel_names() -> list[str]:
    """The instruction sets of this processor, as smallm.c calls them."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        needed = {"avx512": "avx512_vnni", "avx2": " avx2 ", "sse2": ""}
        return [name for name, flag in needed.items() if flag in flags] + ["plain"]
    return ["neon", "plain"] if machine in ("arm64", "aarch64") else ["plain"]


SHAPES = [
    {}, {"window": 9, "block_size": 50}, {"n_head": 4, "n_kv_head": 1, "n_embd": 64, "block_size": 70},
    {"n_head": 3, "n_kv_head": 3, "n_embd": 48, "n_inner": 50, "n_layer": 3},
    {"n_head": 1, "n_kv_head": 1, "n_embd": 80}, {"n_embd": 320, "n_head": 2, "n_kv_head": 1, "n_layer": 1},
]  # fmt: skip


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_logits(inner, tmp_path, config):
    """Close to those of ONNX Runtime; equal bits for every instruction set, number of ids in a pass and of threads."""
    path = save_onnx(random_model(NON_ASCII, **config), tmp_path / "model.onnx", NON_ASCII)
    lm = LanguageModel.load(path)
    ids = np.random.default_rng(1).integers(0, lm.vocab_size, lm.block_size)
    stdin = " ".join(map(str, ids)).encode()
    found = {(k, n): inner("logits", path, k, n, 1, stdin=stdin) for k in kernel_names() for n in (48, 1, 7)}
    found |= {n: inner("logits", path, kernel_names()[0], n, 3, stdin=stdin) for n in (48, 1)}
    assert len(set(found.values())) == 1
    bits = [[int(word, 16) for word in line.split()] for line in found["plain", 1].splitlines()]
    np.testing.assert_allclose(np.array(bits, np.uint32).view(np.float32), lm.logits(ids[None])[0], atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_logits(inner, tiny_run, tmp_path, text_file, precision):
    """Equal bits for every instruction set, number of ids in a pass and of threads; the loss of ONNX Runtime."""
    argv = [str(tiny_run), "--precision", precision, "--allow-loss", "--out", str(tmp_path / "export")]
    assert cli.run(cli.export, argv) == 0
    lm = LanguageModel.load(tmp_path / "export")
    text = text_file.read_text(encoding="utf-8")[:3000]
    ids = lm.vocabulary.encode(text)[: lm.block_size]
    stdin = " ".join(map(str, ids)).encode()
    path = tmp_path / "export" / "model.onnx"
    assert len({inner("logits", path, k, n, n, stdin=stdin) for k in kernel_names() for n in (48, 1)}) == 1
    nats = np.array(inner("score", path, stdin=text.encode()).split("\x1e")[1].split(), float)
    bits = np.nansum(nats) / (len(text) - 1) / math.log(2)
    assert bits == pytest.approx(lm.perplexity(text).bits_per_char, abs=0.002)  # an untrained toy on 3,000 characters


def save_int8(path, **config):
    """The model file of a random model in int8."""
    model = random_model(**config)
    save_onnx(model, path)
    write_quantised(model, manifest_of(model, precision="int8"), path, PRECISIONS["int8"])
    return path


@pytest.mark.parametrize("window", [0, 40])
def test_quantised_logits_of_a_long_text(inner, tmp_path, window):
    """Several blocks of positions: equal bits for all instruction sets, ids in a pass, threads; near ONNX Runtime."""
    path = save_int8(tmp_path / "model.onnx", block_size=150, window=window)
    lm = LanguageModel.load(path)
    ids = np.random.default_rng(1).integers(0, lm.vocab_size, lm.block_size)
    stdin = " ".join(map(str, ids)).encode()
    ways = [(kernels, per_pass, 1) for kernels in kernel_names() for per_pass in (48, 1)] + [("plain", 7, 3)]
    found = {inner("logits", path, *way, stdin=stdin) for way in ways}
    assert len(found) == 1
    bits = [[int(word, 16) for word in line.split()] for line in found.pop().splitlines()]
    difference = np.array(bits, np.uint32).view(np.float32) - lm.logits(ids[None])[0]
    assert np.sqrt(np.mean(difference**2)) < 0.1  # the deviation of the logits is 1.6


def rounded(x):
    """float32 numbers -> codes from -127 to 127 and their scale: SAMPLING.md."""
    largest = np.abs(x).max()
    return np.rint(x * (np.float32(127) / largest)).astype(int), largest / np.float32(127)


def exponential(x):
    """exp of float32 numbers: SAMPLING.md, with the polynomial of smallm_kernels.h."""
    f = np.float32
    x = np.clip(x, f(-87), f(87))
    n = np.rint(x * f(1.44269504))
    r = (x - n * f(0.693359375)) - n * f(-2.12194440e-4)
    e = f(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        e = e * r + f(c)
    return (e * r * r + r + f(1)) * np.exp2(n)


def sum_of_row(x):
    """The sum of float32 numbers in the order of SAMPLING.md."""
    parts = np.zeros(16, np.float32)
    for row in np.pad(x, (0, -len(x) % 16)).reshape(-1, 16):
        parts += row
    while len(parts) > 1:
        parts = parts[: len(parts) // 2] + parts[len(parts) // 2 :]
    return parts[0]


def attention8(query, keys, values):
    """Attention of int8 models as SAMPLING.md specifies it, in float32."""
    (q, q_scale), k, v = rounded(query), [rounded(row) for row in keys], [rounded(row) for row in values]
    scores = np.array([np.float32(codes @ q) * scale * q_scale for codes, scale in k])
    weights = exponential(scores - scores.max())
    scaled, out = weights * np.array([scale for _, scale in v]), np.zeros(len(query), np.float32)
    for at in range(0, len(keys), 64):
        codes, scale = rounded(scaled[at : at + 64])
        out += np.float32(codes @ [row for row, _ in v[at : at + 64]]) * scale
    return out / sum_of_row(weights)


@pytest.mark.parametrize("count", [1, 64, 131])
def test_attention_in_8_bits(inner, tmp_path, count):
    path = save_int8(tmp_path / "model.onnx", block_size=150)
    rng = np.random.default_rng(count)
    query, *rows = rng.normal(size=(1 + 2 * count, 16)).astype(np.float32)
    expected = attention8(query, rows[0::2], rows[1::2])
    assert expected.dtype == np.float32
    stdin = " ".join(f"{x:.9g}" for row in (query, *rows) for x in row).encode()
    for kernels in kernel_names():
        words = inner("attention", path, kernels, count, stdin=stdin).split()
        assert np.array([int(word, 16) for word in words], np.uint32).view(np.float32).tolist() == expected.tolist()


def test_ways_to_one_text(inner, exported):
    """Uninterrupted; cancelled before each chunk; copied after each; and stepped with 59 other texts."""
    for seed, stop in (("the ", "never"), ("naïve " * 30, "moon")):
        lines = inner("variants", exported / "model.onnx", seed, stop).split("\n")[:-1]
        assert len(lines) == 23
        assert len(set(lines)) == 1
        assert lines[0]


@pytest.mark.parametrize("kernels", ["-", "plain"])
def test_drafts_do_not_change_a_text(inner, exported, kernels):
    """Steps, copies, cancelled calls and other random numbers while drafts wait give the text without drafts, and its
    log-probabilities; also where the context of 32 ids is full."""
    assert sum(_drafts_waiting(inner, exported / "model.onnx", kernels)) > 50


def test_drafts_of_a_quantised_model_with_a_window(inner, tmp_path, text_file):
    """The same with 8 bits and a cache that slides."""
    path, model = tmp_path / "model.onnx", random_model(window=6)
    write_quantised(model, manifest_of(model), save_onnx(model, path), PRECISIONS["int8"])
    write_draft_table(path, text_file.read_text(encoding="utf-8"))
    assert sum(_drafts_waiting(inner, path, "-")) > 0


def _drafts_waiting(inner, path: Path, kernels: str) -> list[int]:
    lines = inner("drafts", path, "the ", kernels).split("\n")[:-1]
    assert len(lines) == 48
    for at in range(0, 48, 4):
        assert lines[at] == lines[at + 1] == lines[at + 2]
    return [int(line) for line in lines[3::4]]


def test_a_damaged_draft_table_is_left_aside(sanitized, exported, tmp_path):
    """The text is that without a table."""
    model, table = tmp_path / "model.onnx", (exported / "draft_table.npy").read_bytes()
    argv = [model, "--seed", "the ", "--rng-seed", "1", "--max-length", "60"]
    shutil.copyfile(exported / "model.onnx", model)
    expected, header = succeed(sanitized, *argv), table.index(b"\n") + 1
    for damaged in (
        table, b"", table[:5], table[:100], table[:-1], b"x" + table[1:], table.replace(b"<u2", b"<u4"),
        table[:8] + b"\xff\xff" + table[10:], table[:header] + b"\xff" * 64, table[:-8] + b"\xff" * 8,
    ):  # fmt: skip
        (tmp_path / "draft_table.npy").write_bytes(damaged)
        assert succeed(sanitized, *argv) == expected
    rng = np.random.default_rng(1)
    for _ in range(20):
        damaged = np.frombuffer(table, np.uint8).copy()
        damaged[rng.integers(0, len(table), 3)] = rng.integers(0, 256, 3)
        (tmp_path / "draft_table.npy").write_bytes(damaged[: rng.integers(1, len(table))])
        assert succeed(sanitized, *argv) == expected
    (tmp_path / "draft_table.npy").unlink()
    (tmp_path / "draft_table.npy").mkdir()  # fopen opens it, fread fails
    assert succeed(sanitized, *argv) == expected
    assert succeed(sanitized, exported / "model.onnx", *argv[1:], "--max-drafts", "0") == expected


@pytest.mark.parametrize("text", ["the ", "na", "", "é" * 50])
def test_next_characters_are_those_of_python(inner, lm, exported, text):
    found = [line.split() for line in inner("next", exported / "model.onnx", text, 12).splitlines()]
    expected = lm.next_characters(text, 12)
    assert [bytes.fromhex(word).decode() for word, _ in found] == [character for character, _ in expected]
    np.testing.assert_allclose([float(p) for _, p in found], [p for _, p in expected], rtol=1e-3)


def test_all_next_characters(inner, lm, exported):
    """The likeliest first, each once."""
    found = [line.split(" ") for line in inner("next", exported / "model.onnx", "the ", 300).splitlines()]
    expected = dict(lm.next_characters("the ", 300))
    probabilities = [float(p) for _, p in found]
    assert probabilities == sorted(probabilities, reverse=True)
    characters = [bytes.fromhex(word or "00").decode() for word, _ in found]
    assert len(characters) == len(expected) == len(set(characters))
    np.testing.assert_allclose(probabilities, [expected[each] for each in characters], rtol=1e-3)


def test_getters_and_ids(inner, lm, exported):
    text = "aé€ 𝄞"
    sizes, metadata, missing, ids, decoded, mistakes = inner(
        "getters", exported / "model.onnx", "smallm.start_text", text
    ).splitlines()
    assert sizes.split() == ["200", str(lm.block_size), str(lm.vocab_size), "0"]
    assert json.loads(metadata) == lm.metadata.start_text
    assert missing == "1"
    assert [int(id) for id in ids.split()] == lm.vocabulary.encode(text).tolist()
    assert bytes.fromhex(decoded).decode() == text
    assert mistakes == "2 2 2 2"


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["cc", "clang"])
@pytest.mark.parametrize("flags", ["-std=gnu99 -O0", "-std=c99 -O3", "-std=gnu17 -O2 -march=native"])
def test_every_build_writes_the_same_text(kit, generate, exported, tmp_path, compiler, flags):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    succeed(compiler, *flags.split(), kit / "smallm.c", kit / "main.c", "-lm", "-o", tmp_path / "generate")
    argv = [exported / "model.onnx", "--seed", "the ", "--rng-seed", 3, "--max-length", 400, "--overflow", "shift"]
    texts = {succeed(tmp_path / "generate", *argv, "--kernels", name) for name in kernel_names()}
    assert texts == {succeed(generate, *argv)}


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-O2", "-std=gnu99 -O3 -march=armv8.2-a+dotprod"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_aarch64_writes_the_same_text(kit, generate, tiny_run, tmp_path, flags, precision):
    if not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")):
        pytest.skip("no gcc for aarch64 or no qemu: install gcc-aarch64-linux-gnu and qemu-user")
    argv = [str(tiny_run), "--precision", precision, "--allow-loss", "--out", str(tmp_path / "export")]
    assert cli.run(cli.export, argv) == 0
    sources = [kit / "smallm.c", kit / "main.c"]
    succeed("aarch64-linux-gnu-gcc", "-static", *flags.split(), *sources, "-lm", "-o", tmp_path / "generate")
    argv = [tmp_path / "export" / "model.onnx", "--seed", "the ", "--rng-seed", 3, "--max-length", 300]
    expected = succeed(generate, *argv, "--overflow", "shift")
    for kernels in ("neon", "plain"):
        found = succeed("qemu-aarch64", tmp_path / "generate", *argv, "--overflow", "shift", "--kernels", kernels)
        assert found == expected


# -- texts


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: f"rng_seed {case['rng_seed']}")
@pytest.mark.parametrize(("overflow", "length"), [("shift", 2000), ("crop", 200)])
def test_texts_are_those_of_python(generate, lm, exported, case, overflow, length):
    """A context of 32 ids, so nearly all of it lies past the overflow. 200 characters of crop, for that is slow."""
    options = {name: case[name] for name in ("rng_seed", "temperature", "top_k", "top_p")}
    expected = lm.generate(case["seed"], length, overflow=overflow, **options)
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags += ["--seed-file", "-", "--overflow", overflow, "--max-length"]
    argv = [generate, exported / "model.onnx", *flags]
    assert succeed(*argv, length, stdin=case["seed"].encode()) == expected + "\n"
    threads = ["--threads", 2 + case["rng_seed"] % 2]
    assert expected.startswith(succeed(*argv, 100, *threads, stdin=case["seed"].encode()).removesuffix("\n"))


@pytest.mark.parametrize(("window", "block_size"), [(9, 32), (20, 64), (1, 8), (2, 9), (16, 16)])
def test_texts_slide_as_in_python(generate, tmp_path, window, block_size):
    """2,000 characters are many slides; it is the default of a model with a window."""
    path = save_onnx(random_model(window=window, block_size=block_size), tmp_path / "model.onnx")
    lm = LanguageModel.load(path)
    flags = [path, "--seed", "aé中𝄞", "--max-length", 2000, "--rng-seed", 5]
    expected = lm.generate("aé中𝄞", 2000, rng_seed=5)
    assert succeed(generate, *flags) == succeed(generate, *flags, "--overflow", "slide") == expected + "\n"
    for overflow in ("crop", "shift"):
        flags[4:5] = [100]
        expected = lm.generate("aé中𝄞", 100, rng_seed=5, overflow=overflow)
        assert succeed(generate, *flags, "--overflow", overflow) == expected + "\n"


def test_sliding_and_banning_take_no_memory(inner, tmp_path):
    path = save_onnx(random_model(window=5), tmp_path / "model.onnx")
    *found, end = inner("chunks", path, "the ", 300, "", "", 0, 1.0, 0, 2, "€ab").splitlines()
    stream = LanguageModel.load(path).stream("the ", 300, rng_seed=3, temperature=1, top_k=0, banned="€ab")
    text = "".join(stream)
    assert not set(text) & set("€ab")
    assert b"".join(bytes.fromhex(line.split()[0]) for line in found).decode() == text
    assert end.split() == ["1", "0"]


@pytest.mark.parametrize(
    "options",
    [{"allowed": "abé€𝄞\ufffd"}, {"allowed": "𝄞€"}, {"banned": "aeiouéñ\ufffd"}, {"allowed": "ab é", "banned": "bé"},
     {"banned": "\ufffd", "repetition_penalty": 1.5}, {"allowed": "0123456789", "temperature": 0.0}],
    ids=str,
)  # fmt: skip
def test_allowed_characters_are_those_of_python(sanitized, tmp_path, options):
    """Random weights, so that every allowed id occurs."""
    path = save_onnx(random_model(NON_ASCII), tmp_path / "model.onnx", NON_ASCII)
    options = {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "rng_seed": 5} | options
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    text = LanguageModel.load(path).generate("aé", 300, **options)
    assert succeed(sanitized, path, "--seed", "aé", "--max-length", 300, *flags) == text + "\n"
    assert set(text[2:]) <= set(options.get("allowed", text)) - set(options.get("banned", ""))


NARROW = {"n_layer": 1, "n_head": 1, "n_kv_head": 0, "n_embd": 32}


@pytest.mark.parametrize("config", [{}, {"block_size": 1}, {"block_size": 2}, NARROW, {"block_size": 37}], ids=str)
@pytest.mark.parametrize("overflow", ["crop", "shift"])
def test_models_of_other_shapes(generate, tmp_path, config, overflow):
    """Random weights, which make ids of helpers and broken bytes likely; the model's own sampling settings."""
    path = save_onnx(random_model(NON_ASCII, **config), tmp_path / "model.onnx", NON_ASCII)
    expected = LanguageModel.load(path).generate("aé中𝄞", 120, rng_seed=5, overflow=overflow)
    flags = ["--seed", "aé中𝄞", "--max-length", 120, "--rng-seed", 5, "--overflow", overflow]
    assert succeed(generate, path, *flags) == expected + "\n"


def test_ids_added_by_fine_tuning(generate, tmp_path):
    path = save_onnx(random_model(LATER_VOCABULARY), tmp_path / "model.onnx", LATER_VOCABULARY)
    seed = "aé中𝄞ñ€è₭"
    expected = LanguageModel.load(path).generate(seed, 120, rng_seed=5)
    assert succeed(generate, path, "--seed", seed, "--max-length", 120, "--rng-seed", 5) == expected + "\n"


@pytest.mark.parametrize(
    "stops", [("\n", "the moon"), ("", "never found"), ("s the", "s"), ("é", "e "), ("ïve", "naïve f")]
)
@pytest.mark.parametrize(("min_length", "penalty", "window"), [(0, 1.0, 0), (30, 1.3, 8)])
def test_chunks_are_those_of_python(inner, lm, exported, stops, min_length, penalty, window):
    stream = lm.stream(
        "the ", 150, rng_seed=3, temperature=1, top_k=0, overflow="shift", stop=stops, min_length=min_length,
        repetition_penalty=penalty, repetition_window=window, logprobs=True,
    )  # fmt: skip
    pieces = [(piece, sum(stream.logprobs)) for piece in stream]
    *found, end = inner(
        "chunks", exported / "model.onnx", "the ", 150, *stops, min_length, penalty, window, 1, ""
    ).splitlines()
    assert [bytes.fromhex(line.split()[0]).decode() for line in found] == [piece for piece, _ in pieces]
    logprobs = [float(line.split()[1]) for line in found]
    np.testing.assert_allclose(logprobs, [logprob for _, logprob in pieces], atol=1e-3)
    status, allocations, *error = end.split()
    assert (status, allocations, error) == ("1", "0", [])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_threads(inner, lm, exported, threads):
    """Three texts at once, from a model that has threads itself; then one in a process that was forked."""
    *texts, end = inner("threads", exported / "model.onnx", threads).split("\x1e")
    assert texts == ["".join(lm.stream("the ", 200, rng_seed=0))] * 4
    assert end == "closed"


@pytest.mark.parametrize("threads", [1, 3])
def test_a_text_is_cancelled_from_another_thread(inner, exported, threads):
    assert inner("cancelled", exported / "model.onnx", threads) == "5 0\n"


@pytest.mark.slow
def test_threads_do_not_race(exported, tmp_path):
    flags = ["-O1", "-g", "-fsanitize=thread", "-std=gnu99", f"-I{C}"]
    built = run("cc", *flags, ROOT / "tests" / "kit_c.c", "-o", tmp_path / "inner", "-lm", "-pthread")
    if built.returncode != 0:
        pytest.skip("the compiler has no thread sanitizer")
    succeed(tmp_path / "inner", "threads", exported / "model.onnx", 3, env={"TSAN_OPTIONS": "exitcode=66"})


def test_a_build_without_threads(exported, tmp_path):
    succeed("cc", *STRICT, "-DSMALLM_NO_THREADS", C / "smallm.c", C / "main.c", "-lm", "-o", tmp_path / "generate")
    argv = [tmp_path / "generate", exported / "model.onnx", "--max-length", 5]
    succeed(*argv, "--threads", 1)
    assert "ask for 1" in refusal(*argv, "--threads", 2)


def test_scores_are_those_of_python(inner, lm, exported, text_file):
    text = "𝄞 é" + text_file.read_text(encoding="utf-8")[:700] + "中€\n"
    written, found = inner("score", exported / "model.onnx", stdin=text.encode()).split("\x1e")
    assert lm.generate("the ", 20, rng_seed=0).startswith("the " + written)
    np.testing.assert_allclose(np.array(found.split(), float), lm.score(text), atol=1e-4)


def test_the_command_scores_a_file(generate, lm, exported, text_file):
    found = succeed(generate, exported / "model.onnx", "--score", text_file)
    expected = lm.perplexity(text_file.read_text(encoding="utf-8"))
    assert float(found.split()[0]) == pytest.approx(expected.nats_per_char, abs=1e-5)
    assert int(found.split()[-2]) == expected.characters


# -- mistakes


def test_mistakes_in_calls(inner, exported):
    """Each mistake is a status and a sentence, and the handle stays usable."""
    lines = inner("mistakes", exported / "model.onnx").splitlines()
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    good = {"options of the future", "max_length = INT64_MAX", "options of the past", "next again", "max_length = 0",
            "score of nothing", "open options of the past", "open options of the future", "start with the last chunk",
            "allowed = text", "next of one character", "no next characters"}  # fmt: skip
    for what, answer in found.items():
        status, _, words = answer.partition(" ")
        if what in good:
            assert answer == "0 ", what
        elif what.startswith("next of nothing"):
            assert answer == "1 ", what
        else:
            assert int(status) >= 2, what
            assert len(words.split()) > 4, what
    assert len(found) > 40
    assert "temperature = nan is out of range" in found["temperature = NAN"]
    assert "from byte 2 on" in found["a seed that is not UTF-8"]
    assert "option banned is not UTF-8 from byte 1 on" in found['banned = "a\\xc3"']
    assert "leave no character" in found['allowed = ""']
    assert "leave no character" in found["allowed and banned alike"]


def test_a_size_of_more_than_32_bits(inner):
    assert inner("tensor-bytes").split() == [str(2**33), "8"]


def damaged(exported, tmp_path, edit) -> Path:
    proto = onnx.load(exported / "model.onnx")
    graph = proto.graph.SerializeToString()
    edit(proto)
    if proto.graph.SerializeToString() != graph:
        set_metadata(proto, "checksum", "0")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    return tmp_path / "model.onnx"


def test_files_that_are_not_a_model(sanitized, exported, tmp_path):
    data = (exported / "model.onnx").read_bytes()
    bad = {"empty": b"", "text": b"an owl\n" * 100, "zeros": bytes(5000), "twice": data * 2, "no end": b"\x80" * 10**5}
    bad |= {f"first {n}": data[:n] for n in (1, 100, len(data) // 2, len(data) - 1)}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        line = refusal(sanitized, tmp_path / name)
        assert "truncated or not an ONNX model" in line, (name, line)
    assert "cannot read" in refusal(sanitized, tmp_path / "missing.onnx")
    assert "cannot read" in refusal(sanitized, tmp_path)


def test_a_model_of_another_project(sanitized, tmp_path):
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", 1, [1])])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert "is not a smallm model" in refusal(sanitized, tmp_path / "model.onnx")


METADATA = {
    "block_size": ["0", "-1", "1e2", "32.0", "true", '"32"', "16777216", "1" * 5000, "16777215", "032", "[" * 100_000],
    "n_layer": ["1", "3", "1000"],
    "checksum": ["-1", "4294967296", "1.5", "null", '"1"', "1 1"],
    "window": ["-1", "33", "1.0", "null", '"8"'],
    "rope_theta": ["0", "-1", "1e30", "NaN", '"1"', "[]", "1 1"],
    "head_dim": ["15"],
    "n_kv_head": ["0", "3"],
    "vocab_size": ["256", "262.0", "null"],
    "tokens": ['""', '"c3"', '"zz"', '"c3a9"', '"c3a9 "', '"c3a9 c3a9"', "5", '"e282ac"', '"c3a9', '"41"',
               '"e282ac e282"', '"e282 c3a9 e282ac"', '"f09f f09f9880"', '"e282 e282ac e282"',
               '"c3a9c3a9c3"'],
    "start_text": ['""', "5", '"\\ud83d"', '"\\q"', '"a', '"' + "a" * 2000 + '"'],
    "sampling": ["[]", '{"temperature": -1}', '{"temperature": NaN}', '{"temperature": 1' + "0" * 400 + "}", "{",
                 '{"top_k": 2.5}', '{"top_k": 1' + "0" * 30 + "}", '{"top_p": 0}', '{"min_p": 2}', '{"top_k": null}'],
    "format_version": ["2", "null", "1.5"],
}  # fmt: skip


@pytest.mark.parametrize("key", METADATA)
def test_broken_metadata(sanitized, exported, tmp_path, key):
    """Python refuses the same."""
    for value in METADATA[key]:
        path = damaged(exported, tmp_path, lambda proto, value=value: set_metadata(proto, key, value))
        line = refusal(sanitized, path)
        assert re.search(r"metadata|format version", line), (value[:50], line)
        with pytest.raises(UserError):
            LanguageModel.load(path)


def set_metadata(proto, key, value):
    kept = {p.key: p.value for p in proto.metadata_props}
    helper.set_model_props(proto, kept | {f"smallm.{key}": value})


def test_metadata_in_another_json_spelling(sanitized, exported, tmp_path):
    def respell(proto):
        set_metadata(proto, "start_text", ' "\\u00e9\\ud834\\udd1e\\n\\/" ')
        set_metadata(proto, "sampling", '\n{"top_p" : 9.5E-1,"temperature":1, "other": 3}\t')

    path = damaged(exported, tmp_path, respell)
    expected = LanguageModel.load(path).generate("", 50, rng_seed=1)
    assert succeed(sanitized, path, "--max-length", 50, "--rng-seed", 1) == expected + "\n"


def test_one_changed_bit_is_found(sanitized, exported, tmp_path):
    proto, data = onnx.load(exported / "model.onnx"), bytearray((exported / "model.onnx").read_bytes())
    data[data.index(proto.graph.initializer[0].raw_data) + 3] ^= 1
    (tmp_path / "model.onnx").write_bytes(data)
    assert "is damaged: it does not match its checksum" in refusal(sanitized, tmp_path / "model.onnx")
    path = damaged(exported, tmp_path, lambda proto: set_metadata(proto, "checksum", "0"))
    assert succeed(sanitized, path, "--max-length", 3)


def other_operator(proto):
    proto.graph.node[0].op_type = "Loop"


def other_domain(proto):
    proto.graph.node[0].domain = "evil"


def data_elsewhere(proto):
    tensor = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def shape_without_data(proto):
    max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data)).dims[:] = [1 << 31, 1 << 31]


def other_value(proto):
    proto.graph.input[0].name = "inputs"


def no_graph(proto):
    proto.ClearField("graph")


def huge_cache(proto):
    for value in [*proto.graph.input, *proto.graph.output]:
        if "." in value.name:
            value.type.tensor_type.shape.dim[1].dim_value = 1 << 20
    set_metadata(proto, "n_head", str(1 << 20))
    set_metadata(proto, "n_kv_head", str(1 << 20))


def key_twice(proto):
    entry = next(p for p in proto.metadata_props if p.key == "smallm.block_size")
    proto.metadata_props.add(key=entry.key, value=entry.value)


def broken_weights(proto):
    for tensor in proto.graph.initializer:
        if tensor.data_type == 1:
            tensor.raw_data = struct.pack("<f", math.nan) * (len(tensor.raw_data) // 4)


EDITS = [other_operator, other_domain, data_elsewhere, shape_without_data, other_value, no_graph, huge_cache, key_twice]


@pytest.mark.parametrize("edit", EDITS)
def test_graphs_that_smallm_did_not_write(sanitized, exported, tmp_path, edit):
    refusal(sanitized, damaged(exported, tmp_path, edit))


def test_weights_that_are_not_finite(sanitized, exported, tmp_path):
    done = run(sanitized, damaged(exported, tmp_path, broken_weights), "--max-length", 5)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"not finite" in done.stderr


@pytest.mark.parametrize(
    "argv",
    [["--temperature", "hot"], ["--temperature", "-1"], ["--top-p", "0"], ["--max-length", "-1"], ["--max-length", "x"],
     ["--max-length", "9" * 30], ["--rng-seed", "-1"], ["--rng-seed", "4294967296"], ["--overflow", "wrap"],
     ["--overflow", "slide"], ["--allowed", ""], ["--allowed", "ab", "--banned", "ba"],
     ["--kernels", "mmx"], ["--kernels", ""], ["--seed"], ["--unknown", "1"], ["two", "models"],
     ["--seed-file", "/no/such/file"], ["--score", "/no/such/file"], ["--min-length", "501"],
     ["--repetition-window", "33"]],
    ids=" ".join,
)  # fmt: skip
def test_mistakes_on_the_command_line(sanitized, exported, argv):
    refusal(sanitized, *([] if argv[0] == "two" else [exported / "model.onnx"]), *argv)


def test_text_that_is_not_utf_8(sanitized, exported, tmp_path):
    for data in (b"caf\xe9", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"a\xf0\x9d\x84"):
        (tmp_path / "text").write_bytes(data)
        for flag in ("--seed-file", "--score"):
            assert "not UTF-8 from byte" in refusal(sanitized, exported / "model.onnx", flag, tmp_path / "text")
    (tmp_path / "text").write_bytes(b"a")
    assert "at least 2 characters" in refusal(sanitized, exported / "model.onnx", "--score", tmp_path / "text")


def test_a_long_seed(sanitized, lm, exported, tmp_path):
    (tmp_path / "seed").write_text("é𝄞" * 500_000, encoding="utf-8")
    flags = ["--seed-file", tmp_path / "seed", "--max-length", 3, "--rng-seed", 2]
    found = succeed(sanitized, exported / "model.onnx", *flags)
    assert found == lm.generate("é𝄞" * 500_000, 3, rng_seed=2) + "\n"


# -- files from strangers


def test_lists_of_operators_equal_pythons():
    source = (C / "smallm.c").read_text(encoding="utf-8")
    words = re.search(r"OPERATORS\[\] =\n(.*?);", source, re.DOTALL)[1]
    assert set(words.replace('"', " ").split()) == OPERATORS
    bits = re.search(r"BITS\[ONNX_TYPES\] = {(.*?)}", source)[1].split(",")
    assert {i: int(n) for i, n in enumerate(bits) if int(n)} == BITS
    tables = dict(re.findall(r"static const rule (\w+)\[\] = {(.*?)};", source, re.DOTALL))

    def rules(name):
        return {
            int(number): (kind, rules(inner) if inner != "0" else None)
            for number, kind, inner in re.findall(r"{(\d+), '(\w)', (\w+)}", tables[name])
        }

    def expected(message):
        return {number: rule_of(kind) for number, (_, kind) in message.items()}

    def rule_of(kind):
        repeated = isinstance(kind, list)
        kind = kind[0] if repeated else kind
        letter = "m" if isinstance(kind, dict) else kind.__name__[0]
        return (letter.upper() if repeated else letter), expected(kind) if letter == "m" else None

    assert rules("MODEL") == expected(MODEL)


def test_mutated_files_never_crash_it(sanitized, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fuzz_c

    data = save_onnx(random_model(n_layer=1, n_head=2, n_kv_head=1, n_embd=32), tmp_path / "toy.onnx").read_bytes()
    kinds = set()
    for number in range(50):
        (tmp_path / "model.onnx").write_bytes(fuzz_c.mutation(data, number, 0))
        ended = fuzz_c.perform(sanitized, tmp_path / "model.onnx", number)
        assert ended["kind"] in fuzz_c.GOOD, (number, ended)
        kinds.add(ended["kind"])
    assert kinds == set(fuzz_c.GOOD)


@pytest.mark.slow
def test_guided_mutations_find_nothing(tmp_path, monkeypatch):
    """libFuzzer's target builds, and a few hundred files of fp32 and int8 neither crash nor hang."""
    if not shutil.which("clang"):
        pytest.skip("no clang")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fuzz_c

    toy, models = random_model(n_layer=1, n_head=1, n_kv_head=1, n_embd=16, n_inner=32), [tmp_path / "fp32.onnx"]
    models.append(shutil.copy(save_onnx(toy, models[0]), tmp_path / "int8.onnx"))
    write_quantised(toy, manifest_of(toy, precision="int8"), models[1], PRECISIONS["int8"])
    rows = np.zeros(1, ROW)  # of the draft table: the context of no id is followed by the id 0
    np.save(tmp_path / DRAFT_TABLE_FILE, rows)
    target = fuzz_c.build_target(tmp_path, "-O0")
    ended = fuzz_c.run_target(target, models, runs=300, seed=1)
    assert (ended["code"], ended["findings"]) == (0, [])
    assert ended["edges"] > 900


def test_the_fuzzer_recognises_bad_exits(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fuzz_c

    line = "smallm: x is broken; do y\n"
    assert fuzz_c.verdict(0, "") == "success"
    assert fuzz_c.verdict(2, line) == "refused"
    for code, said in [(-11, ""), (1, line), (2, line * 2), (2, ""), (0, "==1==ERROR: LeakSanitizer\n"), (23, "")]:
        assert fuzz_c.verdict(code, said) not in fuzz_c.GOOD
