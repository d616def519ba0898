"""`infer.py --interactive`: the text as a tree of turns, the meaning of a line, and a real terminal with Ctrl-C."""

import io
import os
import re
import select
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
from toys import random_model, save_onnx

from smallm import LanguageModel, UserError
from smallm.cli import main as cli
from smallm.cli.repl import OPTIONS, Console
from smallm.cli.repl_state import ReplState
from smallm.generation.config import GenerationConfig
from smallm.generation.text_stream import TextStream
from smallm.html.escape import printable
from smallm.inference.kv_cache import KVCache

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lm(exported) -> LanguageModel:
    return LanguageModel.load(exported)


@pytest.fixture
def state(lm) -> ReplState:
    """An empty text; turns of 20 characters, from rng_seed 5."""
    return ReplState(lm, max_length=20, rng_seed=5)


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def generate(state: ReplState) -> str:
    return "".join(state.generate())


# The text, without a terminal.


@pytest.mark.parametrize("overflow", ["crop", "shift"])
def test_several_turns_give_the_text_of_one_long_turn(lm, overflow):
    state = ReplState(lm, max_length=13, rng_seed=5, overflow=overflow, stop=["zzz"])
    state.add("Zoë ")
    for _ in range(6):  # past the context of 32
        assert len(generate(state)) == 13
    assert state.text == lm.generate("Zoë ", 6 * 13, rng_seed=5, overflow=overflow, stop=["zzz"])


def test_continuing_does_not_repeat_the_prefill(state, monkeypatch):
    windows = []
    feed = KVCache.prefill
    monkeypatch.setattr(KVCache, "prefill", lambda self, ids: windows.append(len(ids)) or feed(self, ids))
    state.set("max_length", 4)
    state.add("the ")
    for _ in range(3):
        generate(state)
    assert windows == [4]


def test_typed_text_becomes_part_of_the_context(state, lm):
    state.add("the ")
    first = generate(state)
    state.add(" Zoë")
    second = generate(state)
    assert second == lm.generate(f"the {first} Zoë", 20, rng_seed=5).removeprefix(f"the {first} Zoë")
    assert [(turn.typed, turn.text) for turn in state.turns] == [
        (True, "the "), (False, first), (True, " Zoë"), (False, second),
    ]  # fmt: skip


def test_an_empty_text_begins_like_a_line(state, lm):
    assert generate(state) == state.text == lm.generate("", 20, rng_seed=5)


def test_options_apply_from_the_next_turn(state, lm):
    state.add("the ")
    first = generate(state)
    state.set("temperature", 0)
    seed = f"the {first}"
    assert seed + generate(state) == lm.generate(seed, 20, temperature=0)
    state.set("temperature", None)
    seed = state.text
    assert seed + generate(state) == lm.generate(seed, 20, rng_seed=5)


def test_a_set_seed_restarts_the_random_numbers(state, lm):
    state.add("the ")
    seed = state.text + generate(state)
    state.set("rng_seed", 5)
    assert seed + generate(state) == lm.generate(seed, 20, rng_seed=5)
    state.set("rng_seed", 6)
    assert seed + "".join(state.retry()) == lm.generate(seed, 20, rng_seed=6)  # not 7: no turn has used 6 yet
    assert seed + "".join(state.retry()) == lm.generate(seed, 20, rng_seed=7)
    assert state.config.rng_seed == state.rng_seed == 7
    assert seed + "".join(state.retry(3)) == lm.generate(seed, 20, rng_seed=3)


def test_without_a_seed_each_turn_differs_and_can_be_repeated(lm):
    state = ReplState(lm, max_length=40)
    state.add("the ")
    texts = {}
    for _ in range(3):
        texts[generate(state)] = state.rng_seed
        state.undo()
    assert len(texts) == 3
    text = generate(state)
    assert "".join(state.retry(state.rng_seed)) == text
    assert "".join(state.retry()) != text
    assert state.config.rng_seed is None


def test_an_abandoned_turn_can_be_continued(state, lm):
    state.add("the ")
    begun = "".join(islice(state.generate(), 7))
    assert state.text == "the " + begun
    assert state.text + generate(state) == lm.generate("the ", 27, rng_seed=5)
    assert state.undo().text == lm.generate("the ", 27, rng_seed=5).removeprefix(f"the {begun}")


def test_a_turn_interrupted_in_the_middle_of_a_step_leaves_a_consistent_state(state, lm, monkeypatch):
    state.add("the ")
    chunks = state.generate()
    begun = next(chunks) + next(chunks)
    with monkeypatch.context() as patch:
        patch.setattr(TextStream, "__next__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
    assert state.text == "the " + begun
    assert state.text + generate(state) == lm.generate("the " + begun, 20, rng_seed=5)  # read again

    state.undo()
    with monkeypatch.context() as patch:
        patch.setattr(TextStream, "_prediction", interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(state)
    assert state.text + generate(state) == lm.generate("the " + begun, 20, rng_seed=5)


def test_a_stop_ends_a_turn_and_the_next_turn_continues_after_it(state, lm):
    state.set("stop", [".\n"])
    state.set("max_length", 200)
    state.add("the ")
    generate(state)
    assert state.text == lm.generate("the ", 200, rng_seed=5, stop=".\n")
    assert state.turns[-1].stopped
    seed = state.text
    assert len(seed) < 204
    assert seed + generate(state) == lm.generate(seed, 200, rng_seed=5, stop=".\n", min_length=1)
    assert len(state.text) > len(seed)


def test_a_stop_that_holds_text_back_beyond_the_end_of_a_turn(state, lm):
    state.set("stop", ["e" * 5])
    state.set("allowed", "e ")
    state.add("the ")
    state.set("max_length", 1)
    pieces = [generate(state) for _ in range(9)]
    assert {len(piece) for piece in pieces} == {1}
    assert "the " + "".join(pieces) == lm.generate("the ", 9, rng_seed=5, allowed="e ")


def test_undo(state):
    with pytest.raises(UserError, match="no turn to undo"):
        state.undo()
    state.add("the ")
    text = generate(state)
    assert state.undo().text == text
    assert state.text == "the "
    assert state.undo().typed
    assert state.text == ""
    assert state.turns == []


def test_branches(state, lm):
    for call in (state.branch, state.retry):
        with pytest.raises(UserError):
            call()
    state.add("the ")
    first = state.text + generate(state)
    assert state.branch() == "1"
    generate(state)
    assert state.branch("long") == "long"
    assert state.switch("1") == ""
    assert state.text == first
    assert first + generate(state) == lm.generate(first, 20, rng_seed=5)
    state.undo()
    assert first + generate(state) == lm.generate(first, 20, rng_seed=5)
    state.add("!")
    assert state.switch() == "2"
    assert (state.text, state.switch("2")) == ("", "")
    assert state.text.endswith("!")
    with pytest.raises(UserError, match=re.escape("there are: 1, long, 2")):
        state.switch("3")
    with pytest.raises(UserError, match="there is a branch long already"):
        state.branch("long")
    assert state.text.endswith("!")


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_k", -1), ("top_p", 0), ("min_p", 2), ("max_length", -1), ("min_length", 21),
     ("rng_seed", 1 << 32), ("rng_seed", -1), ("overflow", "slide"), ("overflow", "x"), ("allowed", "\ud800"),
     ("stop", ["\ud800"]), ("repetition_penalty", 0), ("repetition_window", 1000)],
)  # fmt: skip
def test_options_out_of_range_change_nothing(state, name, value):
    before = state.config
    with pytest.raises(UserError):
        state.set(name, value)
    assert state.config == before
    assert len(generate(state)) == 20


def test_a_mistake_changes_nothing(state):
    state.add("the ")
    generate(state)
    text = state.text
    for rng_seed in (-1, 1 << 32):
        with pytest.raises(UserError, match="rng_seed"):
            state.retry(rng_seed)
    with pytest.raises(UserError, match="surrogate"):
        state.add("\udcff")
    assert state.text == text


# Lines, without a terminal: a script.


@pytest.fixture
def script(exported, capsys, monkeypatch):
    """Runs `infer.py --interactive` on some lines: exit code, stdout, stderr."""

    def script(*lines, argv=(), model=exported):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = cli.run(cli.infer, ["--model", str(model), "--interactive", *map(str, argv)])
        return code, *capsys.readouterr()

    return script


SHORT = ("--max-length", 30, "--rng-seed", 4)


def test_a_script_prints_texts_and_no_prompts(script, lm):
    text = lm.generate("Zoë ", 60, rng_seed=4)
    assert script("Zoë ", "", argv=SHORT) == (0, f"{text[:34]}\n{text[34:]}\n", "")
    assert script("/more", argv=(*SHORT, "--seed", "Zoë ")) == (0, f"{text[:34]}\n{text[34:]}\n", "")
    assert script("/quit", "Zoë ", argv=SHORT) == (0, "", "")
    assert script(argv=SHORT) == (0, "", "")


@pytest.mark.parametrize(
    ("line", "text"),
    [("//more", "/more"), ("///", "//"), (r"a\nb", "a\nb"), (r"a\\nb", r"a\nb"), (r"\t", "\t"), (" a ", " a "),
     (r"a/b\x", r"a/b\x"), ("é€🎉", "é€🎉")],
)  # fmt: skip
def test_how_text_is_typed(script, line, text):
    assert script(line, argv=("--max-length", 0)) == (0, text + "\n", "")


def test_commands(script, lm, tmp_path):
    file = tmp_path / "out.txt"
    text = lm.generate("the ", 30, rng_seed=4)
    code, out, err = script(
        "the ", "/branch", "/undo", "/go 1", "/again", "/branches", "/new", "/go 2", "/text", "/next 2",
        f"/save {file}", "/more", f"/save {file}", argv=SHORT,
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.removeprefix(text + "\n").split("\n")
    assert lines[0] == "stored as 1"
    assert lines[1] == "removed 30 characters; left are 4 characters: the "
    assert lines[2].startswith("stored the other text as 2")
    other = lm.generate("the ", 30, rng_seed=5)
    assert other[4:] in out
    assert re.search(r"^  1  34 characters: ", out, re.MULTILINE)
    assert "stored the other text as 3\n0 characters\n4 characters: the \nthe \n" in out
    likeliest = lm.next_characters("the ", 2)
    assert "".join(f'{p:.6f}  "{character}"\n' for character, p in likeliest) in out
    assert out.endswith(f"wrote 34 characters to {file}\n")
    assert file.read_bytes().decode() == lm.generate("the ", 30, rng_seed=5)


def test_options_as_lines(script, lm):
    code, out, err = script(
        "/temperature 1.5", "/top_k 7", r"/stop \n", "/stop zz", "/ban x", "/temperature", "/unset stop", "/rng-seed",
        "/unset rng-seed", "/options", "the ", "/rng-seed", argv=SHORT,
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.split("\n")
    assert lines[:9] == ["temperature 1.5", "top-k 7", r'stop "\n"', r'stop "\n" "zz"', 'ban "x"', "temperature 1.5",
                         "stop none", "rng-seed 4", "rng-seed a random number"]  # fmt: skip
    assert [line.split()[0] for line in lines[9:22]] == list(OPTIONS)
    last = re.fullmatch(r"rng-seed a random number; the last was (\d+)", lines[-2])
    assert lm.generate("the ", 30, rng_seed=int(last[1]), temperature=1.5, top_k=7, banned="x") in out


def test_every_option_of_generation_has_a_line():
    assert {o.name for o in OPTIONS.values()} == {o.name for o in GenerationConfig.options() if o.flag}


def test_help_names_everything(script, state, capsys):
    out = script("/help")[1]
    for name in (*OPTIONS, *Console(state).commands, "quit"):
        assert re.search(rf"^.*/{name}\b", out, re.MULTILINE), name
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/temperatur 1", "there is no command /temperatur; did you mean /temperature?"),
        ("/usr/bin", "there is no command /usr/bin; /help lists them"),
        ("/", "there is no command /;"),
        ("/temperature hot", "/temperature needs a number, not 'hot'"),
        ("/temperature nan", "temperature = nan is out of range"),
        ("/top-k 1.5", "/top-k needs a whole number"),
        ("/max-length -1", "max_length = -1"),
        ("/max-length 1" + "0" * 5000, "/max-length needs a whole number"),
        ("/overflow slide", "overflow = 'slide' needs a model"),
        ("/undo", "no turn to undo"),
        ("/undo 3", "this is not how /undo is used; type /undo"),
        ("/retry", "the model has written nothing since you typed"),
        ("/branch", "there is no text yet"),
        ("/go 7", "there is no branch 7; /branch makes one"),
        ("/next x", "/next needs a whole number"),
        ("/next -1", "n = -1 is out of range"),
        ("/save", "type /save FILE"),
        ("/save .", "cannot write .: File exists; choose another name"),
        ("/save no/where/x.txt", "cannot write no/where/x.txt: No such file"),
        ("/save a\0b", "cannot write a\\x00b"),
        ("/save ~nobody-of-this-name/x", "cannot write"),
        ("/unset", "type /unset OPTION"),
        ("/unset x", "there is no option x; there are: max-length"),
        ("/go \x1b[2J", r"there is no branch \x1b[2J"),
        ("\udcff", "this line is not UTF-8"),
        ("/stop \udcff", "this line is not UTF-8"),
    ],
)
def test_a_mistake_is_one_line_and_the_next_line_is_read(script, tmp_path, monkeypatch, line, told):
    monkeypatch.chdir(tmp_path)
    code, out, err = script(line, "/max-length", argv=SHORT)
    assert (code, out) == (0, "max-length 30\n")
    assert err.startswith("smallm: ")
    assert told in err
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()
    assert list(tmp_path.iterdir()) == []


def test_what_the_documentation_shows(script):
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8").split("\n## Interactive mode")[1]
    lines = re.findall(r"^> (.*)$", page, re.MULTILINE)
    assert len(lines) > 5
    code, _, err = script(*lines, argv=SHORT)
    assert (code, err) == (0, "")
    for name in re.findall(r"`/([\w-]+)", page):
        assert "there is no command" not in script(f"/{name}", argv=SHORT)[2]


def test_an_existing_file_is_not_overwritten(script, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("mine")
    assert "File exists; choose another name" in script("the ", f"/save {file}", argv=SHORT)[2]
    assert file.read_text() == "mine"


@pytest.mark.parametrize("other", [("--json",), ("--num-samples", 2), ("--next", 3), ("--perplexity",)])
def test_options_that_exclude_each_other(script, other):
    code, out, err = script(argv=other)
    assert (code, out) == (2, "")
    assert err in (
        f"smallm: --interactive does not go with {other[0]}; leave out one of them\n",
        f"smallm: argument {other[0]}: not allowed with argument --interactive; see --help\n",
    )


def test_options_of_the_command_line_are_checked(script):
    code, out, err = script("the ", argv=("--temperature", -1))
    assert (code, out) == (2, "")
    assert err.startswith("smallm: temperature = -1.0 is out of range")


def test_bytes_that_are_not_utf8(exported):
    """A whole process: what is read from a pipe is UTF-8 in any locale."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "infer.py"), "--model", str(exported), "--interactive", "--max-length", "0"],
        input=b"\xff\nZo\xc3\xab\n", capture_output=True, timeout=100,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "Zoë\n".encode())
    assert done.stderr == b"smallm: this line is not UTF-8; set the terminal, or save the file, as UTF-8\n"


def test_infer_loads_the_repl_only_when_asked(exported):
    code = f"""
import sys
from smallm.cli.infer import main
main(["--model", {str(exported)!r}, "--max-length", "1"])
loaded = [name in sys.modules for name in ("smallm.cli.repl", "smallm.cli.repl_state", "readline")]
print(*loaded, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "False False False"


# What a terminal gets.


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def wild(tmp_path_factory) -> ReplState:
    """A model of random weights, which writes bytes of any kind."""
    path = save_onnx(random_model(), tmp_path_factory.mktemp("toy") / "toy.onnx")
    return ReplState(LanguageModel.load(path), max_length=300, rng_seed=2, temperature=2, top_k=0, top_p=1, min_p=0)


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": ""}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False),
     ({"TERM": "dumb"}, False)],
)  # fmt: skip
def test_typed_text_is_bold_and_the_models_control_characters_are_escaped(
    wild, monkeypatch, variables, coloured
):
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    Console(wild).execute(r"a\nb")
    shown = screen.getvalue()
    typed = "\x1b[1ma\nb\x1b[0m" if coloured else "a\nb"
    assert shown.startswith(typed)
    rest = shown.removeprefix(typed)
    assert not [c for c in rest if not c.isprintable() and c not in "\n\t"]
    written = wild.turns[-1].text
    assert [c for c in written if not c.isprintable() and c not in "\n\t"]  # and the text had control characters
    assert rest == printable(written, keep="\n\t") + "\n"
    assert "\\x1b" in printable("\x1b[2J")


def test_a_pipe_gets_the_text_as_it_is(wild, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    Console(wild).execute("ab")
    assert capsys.readouterr().out == wild.text + "\n"


def test_hidden_characters_are_spelled_out():
    text = "a\tb\n\x07\r\x1b]0;x\x07\x9b1m\u202eabc\u2066\x7f中\u200d🎉\u3000\xa0é"
    spelled = "a\tb\n\\x07\\r\\x1b]0;x\\x07\\x9b1m\\u202eabc\\u2066\\x7f中\u200d🎉\u3000\xa0é"
    assert printable(text, keep="\n\t") == spelled
    assert printable("a\nb\x1b") == r"a\nb\x1b"


def test_completions(state):
    state.add("a")
    state.branch("home")
    console = Console(state)
    assert console.completions("/te") == ["/text", "/temperature"]
    assert console.completions("/go ") == ["/go home"]
    assert console.completions("/unset top-") == ["/unset top-k", "/unset top-p"]
    assert console.completions("te") == console.completions("") == console.completions("/zzz") == []


@pytest.fixture
def typist(exported, tmp_path):
    """A program at a pseudo-terminal: `expect` waits for what it shows, `press` sends keys."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    class Typist:
        def __init__(self, blocked=(), **variables):
            ours, theirs = pty.openpty()
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
            code = (
                "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # Ctrl-C is the terminal's
                f"sys.path.insert(0, {str(ROOT)!r}); sys.modules.update(dict.fromkeys({blocked!r}))\n"
                "from smallm.cli import main as cli; sys.exit(cli.run(cli.infer))"
            )
            argv = ["--model", str(exported), "--interactive", "--max-length", "20"]
            environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "HOME", "INPUTRC")}
            environment |= {"TERM": "xterm", "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
            environment |= variables | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen([sys.executable, "-c", code, *argv], stdin=theirs, stdout=theirs,
                                            stderr=theirs, start_new_session=True, env=environment)  # fmt: skip
            os.close(theirs)
            self.screen, self.seen = ours, ""

        def expect(self, what: str) -> str:
            deadline = time.monotonic() + 60
            while what not in self.seen:
                assert time.monotonic() < deadline, self.seen[-2000:]
                if select.select([self.screen], [], [], 1)[0]:
                    self.seen += self._read()
            found, _, self.seen = self.seen.partition(what)
            return found

        def _read(self) -> str:
            try:
                data = os.read(self.screen, 1 << 16)
            except OSError:  # Linux reports a closed terminal with this error
                data = b""
            assert data, self.seen[-2000:]
            return data.decode("utf-8", errors="replace")

        def press(self, keys: str) -> None:
            os.write(self.screen, keys.encode())

        def leave(self) -> int:
            while True:  # again, because a terminal drops a Ctrl-D that comes just before the prompt
                self.press("\x04")
                with suppress(subprocess.TimeoutExpired):
                    return self.process.wait(2)

    typists = []

    def start(**options):
        typists.append(Typist(**options))
        return typists[-1]

    yield start
    for each in typists:
        each.process.kill()
        each.process.wait()
        os.close(each.screen)


@pytest.mark.slow
def test_ctrl_c_stops_the_text_and_not_the_program(typist, tmp_path):
    person = typist()
    person.expect("/help lists the commands")
    person.expect("> ")
    person.press("/max-length 100000000\n")
    person.expect("max-length 100000000")
    person.press("Zoë \n")
    person.expect("\x1b[1mZoë \x1b[0m")
    while len(person.seen) < 500:
        person.seen += person._read()
    person.press("\x03")
    person.expect("> ")
    person.press("/max-length 20\n")
    person.expect("max-length 20\r\n")
    person.press("/branch here\n")
    person.expect("stored as here\r\n")
    person.press("/undo\n")
    taken = re.search(r"removed ([\d,]+) characters", person.expect("left are 4 characters: Zoë"))
    assert int(taken[1].replace(",", "")) >= 300  # of 500 seen, some are echoes and escape codes
    person.expect("> ")
    person.press("half a line")
    person.expect("half a line")
    time.sleep(0.2)  # CPython loses a Ctrl-C that comes just before it waits for a key
    person.press("\x03")
    person.expect("Ctrl-D or /quit leaves")
    person.press("/bran\t\n")  # completed up to the first ambiguity
    person.expect("stored as 1")
    assert person.leave() == 0
    history = (tmp_path / "state" / "smallm" / "history").read_text(encoding="utf-8").splitlines()
    assert history[-5:] == ["Zoë ", "/max-length 20", "/branch here", "/undo", "/branch"]


@pytest.mark.parametrize("blocked", [(), ("readline",)], ids=["no home", "no readline"])
def test_without_a_home_or_readline(typist, blocked):
    person = typist(blocked=blocked, HOME="/nowhere", XDG_STATE_HOME="/dev/null/state", NO_COLOR="1")
    person.expect("> ")
    person.press("Zoë \n")
    person.expect("Zoë ")
    person.expect("> ")
    assert "Traceback" not in person.seen
    assert person.leave() == 0
