"""README.md: its commands run, in its order, with short settings; its files exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smallm.cli import main as cli
from smallm.training.data import source
from smallm.training.report import plot

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = """--train.max_steps 4 --train.eval_every 2 --train.sample_length 5
--model.n_layer 1 --model.n_embd 32 --model.n_head 2"""
PROGRAMS = {
    "train.py": cli.train,
    "export.py": cli.export,
    "infer.py": cli.infer,
    "runs": cli.runs,
    "show": cli.show,
    "smallm.training.report.plot": plot.main,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Every command of the shell blocks, one by one."""
    text = "&&".join(blocks("sh")).replace("&&\n", "&&").replace("\n", "&&")
    return [command.strip() for command in text.split("&&") if command.strip()]


def arguments(command: str) -> tuple[str, list[str]] | None:
    """Program and arguments, shortened; None for what is no program of ours."""
    words = shlex.split(command, comments=True)
    if words[0] == "smallm":
        return words[1], words[2:]
    if words[0] != "python" or words[1] == "-c":
        return None
    name, *rest = words[2:] if words[1] == "-m" else words[1:]
    if "--minutes" in rest:  # has tests of its own
        at = rest.index("--minutes")
        del rest[at : at + 2]
    if name == "train.py":
        rest += ["--train.max_steps", "6"] if "--resume" in rest else SHORT.split()
    if name == "infer.py" and "--perplexity" not in rest:
        rest += ["--max-length", "20"]
    return name, rest


@pytest.fixture
def home(tmp_path, monkeypatch, text_file):
    """A folder with texts, where a reader would try the commands; those that would be downloaded are others here."""
    for name in ("my.txt", "new.txt"):
        shutil.copy(text_file, tmp_path / name)
    stories = tmp_path / "RusLit" / "prose" / "Chekhov"
    stories.mkdir(parents=True)
    for name in ("1.txt", "2.txt"):
        line = "Говорили, что на набережной появилось новое лицо: дама с собачкой.\n"
        (stories / name).write_text(line * 60, encoding="utf-8")
    monkeypatch.setitem(source.BUILT_IN, "shakespeare", lambda cache: source.Source("shakespeare", [text_file]))
    (tmp_path / "smallm").symlink_to(ROOT / "smallm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shell_commands_run_in_their_order(home, capsys):
    ran = []
    for command in commands():
        if command.startswith(("python -c ", "cat ")):
            subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True)
            continue
        if (parsed := arguments(command)) is None:
            assert command.split()[0] in ("python3", ".", "pip", "accelerate", "pytest", "git"), command
            continue
        name, argv = parsed
        assert cli.run(PROGRAMS[name], argv) == 0, f"{command}\n{capsys.readouterr().err}"
        ran.append(name)
    assert set(ran) == set(PROGRAMS)
    assert (home / "runs" / "quickstart" / "export" / "model.onnx").is_file()
    assert (home / "compare.png").is_file()


def test_python_blocks_run(home, exported):
    (home / "runs").mkdir()
    shutil.copytree(exported, home / "runs" / "shakespeare")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_files_it_names_exist():
    for path in re.findall(r"\bconfigs/[\w/.-]+\.(?:toml|yaml)", README):
        assert (ROOT / path).is_file(), path
    tree = README.split("## The tree")[1]
    folder = ROOT
    for line in tree.splitlines():
        if top := re.match(r"(\S+/)\s", line):
            folder = ROOT / top[1]
            assert folder.is_dir(), line
        for name in re.findall(r"\b\w+\.py\b", line.split("   ")[0] if line.startswith("  ") else ""):
            assert (folder / name).is_file(), line
    for module in (ROOT / "smallm").rglob("*.py"):
        assert module.name in tree or module.name == "__init__.py", f"the tree does not show {module}"
