"""The commands of README.md and of the pages in docs/ run in their order with short settings; links exist."""

import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from smallm.cli import main as cli
from smallm.generation.config import options_table
from smallm.training.data import source

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "examples").rglob("README.md"))]  # fmt: skip
SHORT_MODEL = ["--model.n_layer", "1", "--model.n_embd", "32", "--model.n_head", "2", "--model.block_size", "32"]
SHORT_RUN = ["--train.max_steps", "4", "--train.eval_every", "2", "--train.sample_length", "5"]
SCRIPTS = {"train.py": "train", "export.py": "export", "infer.py": "infer"}
NOT_OURS = ("python3", ".", "pip", "accelerate", "pytest", "ruff", "mypy", "git")
READY = {  # page -> runs that a reader of the page has already, besides the texts my.txt and new.txt
    "training.md": [], "data.md": [], "time-budget.md": [], "README.md": [], "CONTRIBUTING.md": [],
    "runs-and-reports.md": ["mine", "lr-decay", "no-lr-decay"],
}  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The commands of the shell blocks of a page, one by one."""
    text = "&&".join(blocks(page, "sh")).replace("&&\n", "&&").replace("\n", "&&")
    return [command.strip() for command in text.split("&&") if command.strip()]


def shortened(command: str) -> tuple[str, list[str]] | None:
    """A command of smallm and its arguments, with settings that take seconds; None for other programs."""
    words = shlex.split(command, comments=True)
    if words[0] == "smallm":
        name, rest = words[1], words[2:]
    elif words[0] == "python" and words[1:3] == ["-m", "smallm"]:
        name, rest = words[3], words[4:]
    elif words[0] == "python" and words[1] in SCRIPTS:
        name, rest = SCRIPTS[words[1]], words[2:]
    else:
        return None
    if "--minutes" in rest:
        at = rest.index("--minutes")
        del rest[at : at + 2]
    if name == "train" and "--check" not in rest:
        model = [] if {"--init-from", "--resume"} & set(rest) else SHORT_MODEL[: 6 if "--config" in rest else None]
        rest += ["--train.max_steps", "6"] if "--resume" in rest else [*model, *SHORT_RUN]
    if name == "export" and "--precision" in rest:
        rest += ["--allow-loss"]  # the models of these tests have hardly learned anything
    if name == "infer" and not {"--perplexity", "--surprise", "--interactive"} & set(rest):
        rest += ["--max-length", "20"]
    return name, rest


@pytest.fixture
def home(tmp_path, monkeypatch, text_file):
    """A folder with texts, where a reader tries the commands; the text to download is replaced."""
    for name in ("my.txt", "new.txt"):
        shutil.copy(text_file, tmp_path / name)
    stories = tmp_path / "RusLit" / "prose" / "Chekhov"
    stories.mkdir(parents=True)
    line = "Говорили, что на набережной появилось новое лицо: дама с собачкой.\n"
    for name in ("1.txt", "2.txt"):
        (stories / name).write_text(line * 60, encoding="utf-8")
    try:
        (tmp_path / "smallm").symlink_to(ROOT / "smallm")
    except OSError:  # Windows allows links to administrators only
        shutil.copytree(ROOT / "smallm", tmp_path / "smallm")
    monkeypatch.setitem(source.BUILT_IN, "shakespeare", lambda cache: source.Source("shakespeare", [text_file]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def get_ready(page: Path, home: Path, run: Path, export: Path) -> None:
    """Puts the runs into place that a reader of the page has already."""
    for name in [] if page.parent.name == "examples" else READY.get(page.name, ["mine", "shakespeare"]):
        shutil.copytree(run, home / "runs" / name)
        shutil.copytree(export, home / "runs" / name / "export", dirs_exist_ok=True)


def test_every_page_is_tested():
    assert {page.name for page in PAGES} >= {*READY, "embedding.md", "troubleshooting.md", "internals.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run(page, home, tiny_run, exported, capsys, request):
    if page == ROOT / "README.md":
        request.getfixturevalue("charts")
    get_ready(page, home, tiny_run, exported)
    ran = []
    for command in commands(page):
        if command.startswith(("python -c ", "cat ")):  # commands that make a text
            subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True)
            continue
        if (parsed := shortened(command)) is None:
            assert command.split()[0] in NOT_OURS or "examples/" in command or ".ci/" in command, command
            continue
        name, argv = parsed
        code = cli.run(partial(cli._call, name), argv)
        assert code == 0, f"{command}\n{capsys.readouterr().err}"
        ran.append(name)
    if page == ROOT / "README.md":
        assert set(ran) == {"train", "export", "infer", "plot"}
        assert (home / "runs" / "quickstart" / "export" / "model.onnx").is_file()
        assert (home / "compare.png").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page, home, tiny_run, exported, capsys):
    get_ready(page, home, tiny_run, exported)
    short = "train={'max_steps': 4}, model={'n_layer': 1, 'n_embd': 32, 'n_head': 2, 'block_size': 32}"
    for block in blocks(page, "python"):
        exec(compile(re.sub(r"minutes=[\d.]+", short, block), page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[\w-]*)?\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:smallm|configs|tests|docs|examples|benchmarks|\.ci)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or (ROOT / path.removesuffix("/")).is_dir(), path


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_say_who_needs_them(page):
    first = page.read_text(encoding="utf-8").split("\n\n")[1]
    assert first.startswith("For "), page


def test_the_table_of_options_is_that_of_the_code():
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- options: .*? -->\n(.*?)<!-- /options -->", text, re.DOTALL)[1]
    assert table == options_table()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
