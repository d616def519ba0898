"""What `infer.py --surprise` prints and writes: colours where they are wanted, nothing hostile, mistakes in a line."""

import base64
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from smallm import LanguageModel
from smallm.cli import main as cli
from smallm.cli import surprise as surprise_command
from smallm.cli.terminal import takes_colours
from smallm.html import page as html
from smallm.html.characters import CHARACTERS_STATIC, LEVELS, characters, level, percent, runs
from smallm.html.escape import HIDDEN, escape, visible
from smallm.surprisal.measure import EXPECTED, Measured, id_name, measure
from smallm.surprisal.terminal_view import painted

SCRIPT = Path(__file__).parents[2] / "infer.py"
HOSTILE = "</script><script>alert(1)</script> & \"quotes\" <!-- \x1b[31m\x07\x00\x9b \u202eflip\u2028 \r\n\tend é中🎉"
ESCAPES = re.compile(r"\033\[(?:0|38;5;\d+;48;5;\d+)m")


@pytest.fixture(scope="module")
def lm(exported):
    return LanguageModel.load(exported)


@pytest.fixture
def infer(exported, capsys):
    """Runs `infer.py --model <the trained one> --surprise …` in this process: exit code, stdout, stderr."""

    def run(*argv):
        code = cli.run(cli.infer, ["--model", str(exported), "--surprise", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def file(tmp_path, text_file):
    """Some lines of what the model was trained on, and one that is not."""
    lines = text_file.read_text("utf-8").splitlines()[-40:]
    for right, wrong in (("moon", "mqoon"), ("paints", "pqints"), ("winter", "wixnter")):
        line = next(i for i, line in enumerate(lines) if right in line)
        lines[line] = lines[line].replace(right, wrong)
    lines[20] = "Es war einmal ein Mann, der hatte sieben Söhne und immer noch kein Töchterchen."
    path = tmp_path / "my <text>.txt"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


class Page(HTMLParser):
    """What a browser makes of a page: its text, its elements, its data."""

    def __init__(self, source):
        super().__init__()
        self.path, self.elements, self.words, self.scripts = [], [], [], []
        self.feed(source)
        self.close()
        assert self.path == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.path.append(tag)

    def handle_endtag(self, tag):
        assert self.path.pop() == tag

    def handle_data(self, data):
        if self.path and self.path[-1] == "script":
            self.scripts.append(data)
        elif "style" not in self.path:
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)


# -- what can be shown


def test_visible_keeps_the_number_of_characters_and_hides_what_commands():
    everything = "".join(map(chr, range(0x110000)))
    shown = visible(everything, keep="")
    assert len(shown) == len(everything)
    from unicodedata import category

    assert {c for c in shown if category(c) in HIDDEN} == {"\u200c", "\u200d"}
    assert visible("a\x1b[0m\n\t\x7f\u202e", keep="") == "a␛[0m↵⇥␡�"
    assert visible("a\n\tb\r") == "a\n\tb␍"
    assert visible("Zoë 中 👩\u200d🚀") == "Zoë 中 👩\u200d🚀"


def test_levels_and_runs():
    nats = np.array([np.nan, 0, 2.99, 3, 3.1, 4, 8.99, 9, 700])
    assert level(nats).tolist() == [0, 0, 0, 1, 1, 2, 5, 6, 6]
    assert list(runs("abcdefghi", level(nats))) == [("abc", 0), ("de", 1), ("f", 2), ("g", 5), ("hi", 6)]
    assert list(runs("", level(np.empty(0)))) == []


@pytest.mark.parametrize(
    ("p", "text"),
    [(1, "100 %"), (0.996, "100 %"), (0.55, "55 %"), (0.05, "5 %"), (9e-4, "0.09 %"), (0, "less than 0.001 %")],
)
def test_percent(p, text):
    assert percent(p) == text


def test_painted_text_is_the_text():
    text = HOSTILE * 3
    nats = np.linspace(0, 12, len(text))
    found = painted(text, nats)
    assert ESCAPES.sub("", found).replace("↵\n", "\n") == visible(text)
    assert painted("abc", np.array([np.nan, 2.9, 9])) == "ab\033[38;5;231;48;5;160mc\033[0m"
    assert painted("a\n\n", np.array([3.0, 3.0, 3.0])).split("\n") == [
        "\033[38;5;16;48;5;230ma↵\033[0m", "\033[38;5;16;48;5;230m↵\033[0m", ""]  # fmt: skip
    for line in painted(text, nats).split("\n"):  # no colour goes beyond its line
        assert line.count("\033[0m") == line.count("\033[38")


class Terminal(StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "expected"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": ""}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (StringIO(), {"TERM": "xterm-256color"}, False),
    ],
)
def test_takes_colours(stream, environment, expected):
    assert takes_colours(stream, environment) is expected


# -- in the terminal


def test_a_pipe_gets_figures_and_spans_only(infer, file, lm):
    code, out, err = infer(file)
    assert (code, err) == (0, "")
    assert "\033" not in out
    figures = lm.perplexity(file.read_text("utf-8"), stride=lm.block_size // 2)
    first, _, heading, span, most, *rest = out.splitlines()
    assert first.startswith(f"{file}: {figures.nats_per_char:.4f} nats per character ({figures.bits_per_char:.4f} bit")
    assert first.endswith(f"; the model's own validation text has {lm.metadata.training['val_loss']:.4f}")
    assert heading.startswith("passages, ")
    assert re.match(r"     21:\d+ +[\d.]+  .*einmal ein Mann, der hatte sieben", span)
    assert re.fullmatch(r" +most at 21:\d+, '.'; expected: '.+' \d.* %(, '.+' \d.* %){2}", most)
    assert any(line.startswith("words, ") for line in rest)
    assert all(line not in out for line in file.read_text("utf-8").splitlines())


def test_the_number_of_spans_can_be_chosen(infer, file):
    counts = []
    for most in (1, 3):
        out = infer(file, "--spans", most)[1]
        counts.append(len(re.findall(r"^ +\d+:\d+ .*\[.\]", out, re.MULTILINE)))
    assert counts == [1, 3]


def test_in_a_terminal_the_text_in_colours(infer, file, monkeypatch):
    monkeypatch.setattr(surprise_command, "takes_colours", lambda stream, environment: True)
    plain = infer(file)
    monkeypatch.undo()
    code, out, err = plain
    assert (code, err) == (0, "")
    legend, text = out.split("\n", 1)
    assert ESCAPES.sub("", legend).startswith("nats and probability: below 3 no colour, from  3  5 %,  4  2 %")
    assert len(ESCAPES.findall(legend)) == 2 * len(LEVELS)
    content = file.read_text("utf-8")
    assert ESCAPES.sub("", text).replace("↵\n", "\n").startswith(content)
    assert len(ESCAPES.findall(text)) > 20
    assert out.endswith(infer(file)[1])


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="pseudo-terminals are POSIX's")
@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_in_a_real_terminal(exported, file, environment, coloured):
    master, slave = os.openpty()
    variables = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | environment
    command = [sys.executable, str(SCRIPT), "--model", str(exported), "--surprise", str(file)]
    with subprocess.Popen(command, stdout=slave, stderr=subprocess.PIPE, env=variables) as process:
        os.close(slave)
        out = b""
        try:
            while data := os.read(master, 1 << 16):
                out += data
        except OSError:  # the other side is closed
            pass
        os.close(master)
        assert (process.wait(60), process.stderr.read()) == (0, b"")
    assert (b"\033[38;5;" in out) is coloured
    assert (file.read_text("utf-8").splitlines()[0] in ESCAPES.sub("", out.decode())) is coloured


def test_json_is_one_object(infer, file, lm):
    code, out, err = infer(file, "--json", "--places", 2)
    assert (code, err, out.count("\n")) == (0, "", 1)
    values = json.loads(out)
    figures = lm.perplexity(file.read_text("utf-8"), stride=lm.block_size // 2)
    assert values["file"] == str(file)
    assert values["nats_per_char"] == pytest.approx(figures.nats_per_char)
    assert values["characters"] == figures.characters
    assert (len(values["passages"]), len(values["words"])) == (1, 2)
    span = values["passages"][0]
    assert span["line"] == 21
    assert set(span) == {"line", "column", "offset", "characters", "nats", "excess", "text", "before", "after", "peak"}
    assert set(span["peak"]) == {"line", "column", "offset", "character", "nats", "expected"}
    assert len(span["peak"]["expected"]) == EXPECTED
    text = file.read_text("utf-8")
    assert text[span["offset"] :][: span["characters"]] == span["text"]


@pytest.mark.parametrize("flags", [[], ["--json"], ["colours"]])
def test_nothing_hostile_reaches_the_terminal(infer, tmp_path, flags, monkeypatch):
    path = tmp_path / "hostile.txt"
    path.write_bytes(("the moon. " * 20 + HOSTILE + "\n" + "the moon. " * 20).encode())
    if flags == ["colours"]:
        monkeypatch.setattr(surprise_command, "takes_colours", lambda stream, environment: True)
    code, out, err = infer(path, *(flag for flag in flags if flag != "colours"))
    assert (code, err) == (0, "")
    shown = ESCAPES.sub("", out)
    assert visible(shown) == shown
    if flags == ["--json"]:
        values = json.loads(out)
        assert "\x1b" in "".join(span["text"] for span in values["passages"] + values["words"])


# -- files that cannot be measured


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", [], "FILE has 0 character(s); there must be at least 2"),
        ("\ufeff".encode(), [], "FILE has 0 character(s)"),
        ("中".encode(), [], "FILE has 1 character(s)"),
        (None, [], "cannot read FILE: No such file or directory"),
        (b"good \xff bad", [], "FILE is not valid utf-8: byte 0xff at offset 5 (line 1); pass --encoding NAME"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", [], "FILE is a picture; pass a plain text"),
        (b"\0\1\2\x89\0\3\0", [], "FILE is not valid utf-8, perhaps a binary file: byte 0x89 at offset "),
        ("some text".encode("utf-16"), [], "FILE looks like UTF-16, not utf-8; pass --encoding utf-16"),
        ("some text".encode("utf-32"), [], "FILE looks like UTF-32, not utf-8; pass --encoding utf-32"),
        (b"abc", ["--encoding", "klingon"], "there is no encoding 'klingon'"),
        (b"abc", ["--places", "0"], "--spans 0 is out of range; it must be 1 or more"),
        (b"abc", ["--places", "x"], "argument --spans/--places: invalid int value: 'x'; see --help"),
        (b"abc", ["--html", "FILE"], "--html FILE is the text itself; name another file"),
        (b"abc", ["--html", "FOLDER"], "cannot write FOLDER: it is a folder; name another file"),
        (b"abc", ["--html", "FOLDER/missing/a.html"], "cannot write FOLDER/missing/a.html: FOLDER/missing is not "),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(infer, tmp_path, content, flags, message):
    path = tmp_path / "file.txt"
    if content is not None:
        path.write_bytes(content)

    def filled(text):
        return text.replace("FILE", str(path)).replace("FOLDER", str(tmp_path))

    code, out, err = infer(path, *map(filled, flags))
    assert (code, out) == (2, "")
    assert err.startswith("smallm: " + filled(message))
    assert err.count("\n") == 1


def test_a_page_without_a_text_is_a_mistake(capsys):
    assert cli.run(cli.infer, ["--html", "a.html"]) == 2
    assert capsys.readouterr().err == "smallm: --html goes with --surprise FILE\n"


def test_a_page_on_a_full_disk_is_one_line_and_keeps_the_old_page(infer, file, tmp_path, monkeypatch):
    def write_half(path, content):
        with path.open("wb") as stream:
            stream.write(content[:99])
        raise OSError(errno.ENOSPC, "No space left on device")

    page = tmp_path / "a.html"
    page.write_bytes(b"an older page")
    monkeypatch.setattr(Path, "write_bytes", write_half)
    code, _, err = infer(file, "--html", page)
    assert (code, err) == (2, f"smallm: cannot write {page}: No space left on device; name another file\n")
    assert page.read_bytes() == b"an older page"
    assert sorted(tmp_path.iterdir()) == sorted([page, file])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_encodings_and_marks(infer, file, tmp_path, encoding):
    """With a byte-order mark or without, in another encoding or not: the same figures at the same positions."""
    other = tmp_path / "other.txt"
    text = re.sub("[^\\x00-\\xff]", "?", file.read_text("utf-8"))
    file.write_text(text, "utf-8")
    other.write_text(text, encoding)
    flags = [] if encoding == "utf-8-sig" else ["--encoding", encoding]
    found, expected = (json.loads(infer(path, "--json", *more)[1]) for path, more in ((other, flags), (file, [])))
    assert found | {"file": ""} == expected | {"file": ""}


def test_a_file_in_one_line(infer, file, tmp_path):
    giant = tmp_path / "giant.txt"
    giant.write_text(file.read_text("utf-8").replace("\n", " ") * 5, "utf-8")
    out = infer(giant, "--html", tmp_path / "a.html")[1]
    assert set(re.findall(r"^ +(\d+):\d+ ", out, re.MULTILINE)) == {"1"}


# -- the page


def details(page):
    """As the page's script reads them: nats (n,), names (n, K) and probabilities (n, K)."""
    values = json.loads(page.scripts[0])
    n, K = values["characters"], values["expected"]
    data = zlib.decompress(base64.b64decode(values["data"]))
    assert len(data) == n * (2 + 3 * K)
    nats = np.frombuffer(data[: 2 * n], "<u2")
    indices = np.frombuffer(data[2 * n : 2 * n + 2 * n * K], "<u2").reshape(K, n).T
    roots = np.frombuffer(data[2 * n + 2 * n * K :], np.uint8).reshape(K, n).T
    return np.where(nats == 0xFFFF, np.nan, nats / 100), np.array(values["names"])[indices], (roots / 255.0) ** 2


def shown_text(source):
    return Page(re.search(r'<div class="text".*?</div>', source, re.DOTALL)[0]).text


def test_the_page_holds_text_details_and_spans(infer, file, lm, tmp_path):
    path = tmp_path / "page.html"
    code, out, err = infer(file, "--html", path)
    assert (code, err) == (0, f"written: {path}\n")
    assert out == infer(file)[1]
    source = path.read_text("utf-8")
    page = Page(source)
    text = file.read_text("utf-8")
    assert shown_text(source) == text
    measured = Measured.join(list(measure(lm, [text])))
    nats, names, probabilities = details(page)
    assert nats == pytest.approx(measured.nats, abs=0.006, nan_ok=True)
    assert probabilities == pytest.approx(measured.probabilities, abs=0.005)
    best = [id_name(lm.vocabulary, id) for id in measured.expected[1:, 0].tolist()]
    assert names[1:, 0].tolist() == [visible(name, keep="") for name in best]
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    anchors = {attrs["id"] for tag, attrs in page.elements if "id" in attrs}
    assert len(links) > 3
    assert {link.removeprefix("#") for link in links} == anchors
    assert "my <text>.txt" in page.text


def test_the_page_needs_nothing_from_elsewhere(infer, file, tmp_path):
    infer(file, "--html", tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text("utf-8")
    assert "default-src 'none'" in source
    assert not re.search(r"""https?:|\bsrc=|@import|url\(|<link""", source)


def test_nothing_hostile_reaches_the_browser(infer, tmp_path):
    path = tmp_path / "<b>&.txt"
    text = "the moon. " * 20 + HOSTILE + "\n" + "the moon. " * 20
    path.write_bytes(text.encode())
    infer(path, "--html", tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text("utf-8")
    assert visible(source) == source
    page = Page(source)  # its elements are closed where they should be
    assert [attrs.get("type") for tag, attrs in page.elements if tag == "script"] == ["application/json", None]
    assert len(page.scripts) == 2
    assert "<" not in page.scripts[0]
    assert shown_text(source) == visible(text)
    assert all(attrs == {"class": "end"} for tag, attrs in page.elements if tag == "b")


def test_the_page_of_a_long_text_holds_its_beginning(infer, file, tmp_path, monkeypatch):
    monkeypatch.setattr("smallm.cli.surprise.PAGE_CHARACTERS", 300)
    infer(file, "--html", tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text("utf-8")
    text = file.read_text("utf-8")
    assert shown_text(source) == text[:300]
    page = Page(source)
    assert f"holds the first 300 of its {len(text):,} characters" in page.text
    assert "sieben Söhne" in page.text  # among the spans
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    anchors = {attrs["id"] for tag, attrs in page.elements if "id" in attrs}
    assert {link.removeprefix("#") for link in links} == anchors
    assert len(links) < len([1 for tag, attrs in page.elements if attrs.get("class") == "where"])


def test_tables_and_escapes():
    found = Page(html.table(["a<b", "n"], [["<i>", 1234], ["\x1b", 0.5]]))
    assert [word for word in found.words if word.strip()] == ["a<b", "n", "<i>", "1,234", "␛", "0.5"]
    assert escape("\"'<&>\u202e") == "&quot;&#x27;&lt;&amp;&gt;�"


# -- in a browser

PROBE = """<script>
const text = document.querySelector(".text"), panel = document.querySelector(".detail"), seen = [];
const key = (key) => { text.dispatchEvent(new KeyboardEvent("keydown", { key })); seen.push(panel.textContent); };
addEventListener("load", () => setTimeout(() => {
  key("ArrowRight"); key("ArrowRight"); key("n"); key("n"); key("p"); key("Escape"); seen.push(String(panel.hidden));
  const range = document.createRange(), node = document.getElementById("p1").firstChild;
  range.setStart(node.firstChild ?? node, 0); range.setEnd(node.firstChild ?? node, 1);
  const { left, top, width, height } = range.getBoundingClientRect();
  const point = { clientX: left + width / 4, clientY: top + height / 2, bubbles: true };
  text.dispatchEvent(new PointerEvent("pointermove", point)); seen.push(panel.textContent);
  document.body.innerHTML = "<pre id=seen></pre>";
  document.getElementById("seen").textContent = JSON.stringify(seen);
}, 300));
</script>"""


def test_details_in_a_browser(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed; on Debian: apt-get install chromium")
    text = "🎉a\n<b> xyz"
    nats = np.array([np.nan, 0.5, 1, 9.25, 4, 5, 6, 0.1, 0.2, 0.3])
    expected = np.tile(np.array([97, 32, 10, 60, 122], np.int32), (len(text), 1))
    probabilities = np.tile(np.array([0.5, 0.25, 0.1, 0.05, 1e-6], np.float32), (len(text), 1))
    fragment = characters(text, nats, expected, probabilities, chr, [(3, 6, "p1"), (7, 9, "p2")])
    path = tmp_path / "page.html"
    html.save(path, html.page("x", fragment, CHARACTERS_STATIC) + PROBE)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=100, text=True, check=True)
    seen = "".join(Page(done.stdout).words).strip()
    first, second, marked, last, back, _, hidden, pointed = json.loads(seen[seen.index("[") :])
    five = "a 50 %␣ 25 %↵ 10 %< 5 %z less than 0.001 %"
    assert first == f"🎉 line 1, column 1: the first character is not predicted{five}"
    assert second == f"a line 1, column 2: 0.50 nats, probability 61 %{five}"
    assert marked == pointed == f"< line 2, column 1: 9.25 nats, probability 0.01 %{five}"
    assert back == marked
    assert last.startswith("x line 2, column 5: 0.10 nats, probability 90 %")
    assert hidden == "true"
