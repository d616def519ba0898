"""The three rooms: what runs on the base install, what needs torch, and which way the imports go."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "smallm"
HEAVY = ("torch", "accelerate", "onnx", "safetensors", "matplotlib", "pooch", "filelock", "tomli_w")
EXTRAS = ("training", "export", "serve")
RUNTIME = sorted(f for f in PACKAGE.rglob("*.py") if f.relative_to(PACKAGE).parts[0] not in EXTRAS)

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, {root!r})
"""


def python(code, *argv, blocked=(), cwd=None):
    """Runs code in a fresh interpreter in which the packages `blocked` are not installed."""
    code = BLOCKER.format(blocked=tuple(blocked), root=str(ROOT)) + code
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=cwd, timeout=100)


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("script", ["train", "export", "infer"])
def test_without_numpy_each_script_prints_one_line(script, tmp_path):
    """This happens when the environment is not activated."""
    code = f"from smallm.cli.main import run, {script}; raise SystemExit(run({script}, []))"
    done = python(code, blocked=("numpy", "onnxruntime", *HEAVY), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"smallm: {script} needs the package '\w+'; install it with: pip install .*\n", done.stderr)


def test_the_root_imports_without_the_train_extra():
    names = [module_of(file) for file in RUNTIME]
    assert {"smallm.language_model", "smallm.cli.infer", "smallm.tokenizer.vocabulary"} <= set(names)
    code = f"""
import importlib
for name in ["smallm", *{names!r}]:
    importlib.import_module(name)
from smallm import LanguageModel, Perplexity, UserError, Vocabulary
print(Vocabulary([]).decode(Vocabulary([]).encode("Zoë")), LanguageModel.__name__)
try:
    import torch
except ModuleNotFoundError as error:
    print("no", error.name)
"""
    done = python(code, blocked=HEAVY)
    assert done.stderr == ""
    assert done.stdout == "Zoë LanguageModel\nno torch\n"


def test_all_modules_import_on_a_system_without_posix():
    """Windows has none of these modules, functions and signals; PyTorch is imported before they are taken away."""
    names = [module_of(file) for file in PACKAGE.rglob("*.py") if file.name != "__main__.py"]
    code = f"""
import importlib, os, signal, time
for name in ["torch", "accelerate", "onnx", "onnxruntime", "matplotlib.pyplot", "pooch", "filelock", "numpy"]:
    importlib.import_module(name)
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline"):
    sys.modules[name] = None
for module, names in ((os, ("fork", "sysconf", "getuid", "mkfifo", "openpty", "sched_getaffinity", "O_DIRECTORY")),
                      (signal, ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "pthread_sigmask"))):
    for name in names:
        delattr(module, name)
for name in {names!r}:
    importlib.import_module(name)
print("all")
"""
    done = python(code)
    assert (done.stdout, done.stderr) == ("all\n", "")


@pytest.mark.parametrize("argv", [["infer.py", "--help"], ["smallm", "infer", "--help"]])
def test_infer_helps_without_the_train_extra(argv):
    code = """
import runpy
sys.argv = sys.argv[1:]
if sys.argv[0] == "smallm":
    from smallm.cli.main import main
    sys.exit(main())
runpy.run_path(f"{sys.path[0]}/infer.py", run_name="__main__")
"""
    done = python(code, *argv, blocked=HEAVY)
    assert done.returncode == 0, done.stderr
    assert "--perplexity" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "blocked"),
    [("train", HEAVY), ("train", ("torch",)), ("export", HEAVY), ("export", ("torch",)), ("export", ("onnx",))],
    ids=lambda value: value if isinstance(value, str) else "all" if value == HEAVY else value[0],
)
def test_train_and_export_say_what_to_install(command, blocked, tiny_run, tmp_path):
    argv = [str(tiny_run), "--out", "x"] if command == "export" else ["--out", "x"]
    code = """
from smallm.cli.main import main
sys.exit(main())
"""
    done = python(code, command, *argv, blocked=blocked, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"smallm: {command} needs the package '")
    assert done.stderr.endswith("install it with: pip install 'smallm[train]'\n")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


BASE = """
import contextlib, io, json
from smallm.cli.main import _call, run
said = []
for command, *argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run(lambda argv: _call(command, argv), argv)
    said.append([code, out.getvalue(), err.getvalue()])
import smallm
try:
    smallm.export(sys.argv[2])
except smallm.UserError as error:
    said.append([2, "", f"smallm: {error}\\n"])
print(json.dumps(said))
"""


def test_commands_of_the_base_install_work_or_name_the_extra(tiny_run, exported, tmp_path):
    """Except `doctor`, see tests/cli, and `smallm.train`, see tests/training."""
    text, page = tiny_run / "validation.txt", "page.html"
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    works = [
        ["runs", tiny_run], ["runs", tiny_run, "--json"], ["show", tiny_run], ["show", tiny_run, "--json"],
        ["watch", tiny_run], ["compare", tiny_run, tiny_run], ["compare", tiny_run, tiny_run, "--json"],
        ["cache"], ["cache", "--json"],
        *(["infer", "--model", exported, *more] for more in (
            ["--seed", "the", "--max-length", "5"], ["--seed", "the", "--json"], ["--next", "3"],
            ["--perplexity", text], ["--surprise", text, "--html", page])),
    ]  # fmt: skip
    needs = {
        "train": [["train"], ["train", "--check", text], ["train", "--eval-only", tiny_run],
                  ["train", "--resume", tiny_run], ["train", "--init-from", tiny_run], ["export", tiny_run],
                  ["export", tiny_run, "--gguf"], ["plot", tiny_run], ["plot", tiny_run, "--html", page],
                  ["compare", tiny_run, tiny_run, "--html", page]],
        "serve": [["serve", exported]], "hub": [["push", exported, "me/mine"]],
        "zstd": [["infer", "--model", exported, "--perplexity", "a.zst"]] * (sys.version_info < (3, 14)),
    }  # fmt: skip
    commands = [*works, *(each for group in needs.values() for each in group)]
    blocked = (*HEAVY, "starlette", "uvicorn", "huggingface_hub", "gguf", "datasets", "zstandard")
    done = python(BASE, json.dumps([list(map(str, each)) for each in commands]), str(tiny_run), blocked=blocked,
                  cwd=tmp_path)  # fmt: skip
    assert done.stderr == ""
    said = json.loads(done.stdout)
    for command, (code, out, err) in zip(works, said, strict=False):
        assert (code, bool(out)) == (0, True), (command, err)
    extras = [*(extra for extra, group in needs.items() for _ in group), "train"]  # the last: `smallm.export`
    assert len(said) == len(works) + len(extras)
    for command, extra, (code, out, err) in zip([*commands, "export"][len(works) :], extras, said[len(works) :],
                                                strict=True):  # fmt: skip
        assert (code, out, err.count("\n")) == (2, "", 1), (command, err)
        assert f"pip install 'smallm[{extra}]'" in err, (command, err)


def test_import_smallm_is_light():
    code = """
import numpy
before = set(sys.modules)
import smallm
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(name for name in new if name not in sys.stdlib_module_names))
print("onnxruntime" in sys.modules, "torch" in sys.modules, "argparse" in set(sys.modules) - before)
"""
    done = python(code)
    assert done.stderr == ""
    assert done.stdout == "['smallm']\nFalse False False\n"


def test_a_mistake_or_help_of_infer_does_not_load_the_runtime():
    code = """
from smallm.cli.infer import main
try:
    main(sys.argv[1:])
except (SystemExit, ValueError):
    pass
print("onnxruntime" in sys.modules, "numpy" in sys.modules and "torch" in sys.modules)
"""
    for argv in (["--help"], ["--no-such-flag"], ["--top-k", "many"]):
        done = python(code, *argv)
        assert done.stdout.splitlines()[-1] == "False False", (argv, done.stderr)


def test_a_mistake_in_the_settings_of_train_does_not_load_torch():
    code = """
from smallm.training.cli import main
try:
    main(sys.argv[1:])
except (SystemExit, ValueError):
    pass
print("torch" in sys.modules)
"""
    for argv in (["--help"], ["--no-such-flag"], ["--model.n_layer", "0"], ["--config", "nowhere.toml"]):
        done = python(code, *argv)
        assert done.stdout.splitlines()[-1] == "False", (argv, done.stderr)


# The source itself: every import statement, also those inside functions.


def imported(file):
    """Full names of the modules that a file imports; relative ones resolved."""
    found = set()
    package = [*file.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms(names, *rooms):
    return {name for name in names for room in rooms if f"{name}.".startswith(f"{room}.")}


@pytest.mark.parametrize("file", RUNTIME, ids=module_of)
def test_the_runtime_imports_neither_training_nor_export_nor_what_those_need(file):
    names = imported(file)
    if file == PACKAGE / "__init__.py":  # for type checkers; at run time imported at first use
        names -= {"smallm.training.api", "smallm.training.api.train", "smallm.export", "smallm.export.export"}
    assert not rooms(names, "smallm.training", "smallm.export", *HEAVY, "transformers", "tokenizers")
    outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert outside <= {"smallm", "numpy", "onnxruntime", "tqdm"}


def test_training_never_imports_export():
    files = sorted((PACKAGE / "training").rglob("*.py"))
    assert len(files) > 5
    for file in files:
        assert not rooms(imported(file), "smallm.export", "onnx", "onnxruntime"), file


def test_onnxruntime_has_one_door():
    doors = [file.stem for file in PACKAGE.rglob("*.py") if rooms(imported(file), "onnxruntime")]
    assert doors == ["session"]


def test_scripts_are_thin():
    for name in ("train.py", "export.py", "infer.py"):
        file = ROOT / name
        assert all(name.startswith("smallm.cli.main") for name in imported(file))
        assert len(file.read_text().splitlines()) < 20
        done = subprocess.run([sys.executable, str(file), "--help"], capture_output=True, text=True, timeout=100,
                              env=os.environ | {"COLUMNS": "200"})  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert name in done.stdout
