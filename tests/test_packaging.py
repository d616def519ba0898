"""The packages that a release publishes: contents, versions, and every command from an installed wheel."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from smallm import LanguageModel, __version__

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"


def test_all_versions_are_equal():
    header = (ROOT / "smallm/embed/c/smallm.h").read_text(encoding="utf-8")
    macros = [re.search(rf"#define SMALLM_VERSION_{part} (\d+)", header)[1] for part in ("MAJOR", "MINOR", "PATCH")]
    cmake = (ROOT / "smallm/embed/c/CMakeLists.txt").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert {
        ".".join(macros),
        re.search(r"project\(smallm VERSION (\S+)", cmake)[1],
        json.loads((ROOT / "smallm/embed/js/package.json").read_text(encoding="utf-8"))["version"],
        re.search(r"^## \[(\d[^]]*)\]", changelog, re.MULTILINE)[1],
    } == {__version__}


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_workflows_are_valid(name):
    workflow = yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    for job in jobs.values():
        assert job["runs-on"]
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else {*needs} <= jobs.keys()
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            if "uses" in step:
                assert "@" in step["uses"]
            if "run" in step and shutil.which("bash"):
                shell = re.sub(r"\$\{\{.*?\}\}", "x", step["run"])
                assert subprocess.run(["bash", "-n", "-c", shell], capture_output=True).returncode == 0


def test_workflows_agree_with_the_package():
    """The versions of Python, from the oldest to the newest, and the files that the steps name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ci, release = (yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8")) for name in ("ci.yml", "release.yml"))
    oldest, newest = (int(version.removeprefix("3.")) for version in ci["jobs"]["fast"]["strategy"]["matrix"]["python"])
    assert project["requires-python"] == f">=3.{oldest}"
    named = [re.search(r":: 3\.(\d+)$", each) for each in project["classifiers"]]
    assert [int(each[1]) for each in named if each] == list(range(oldest, newest + 1))
    steps = [step for each in (ci, release) for job in each["jobs"].values() for step in job["steps"]]
    versions = {str(step["with"]["python-version"]) for step in steps if "python-version" in step.get("with", {})}
    assert versions == {f"3.{oldest}", "${{ matrix.python }}"}
    wheels = next(step["env"] for step in steps if "cibuildwheel" in step.get("uses", ""))
    assert wheels["CIBW_BUILD"] == f"cp3{oldest}-*"
    files = {path for step in steps for path in re.findall(r"(?:\.ci|tests|smallm)/[\w/.]+", step.get("run", ""))}
    assert files == {".ci/run", "tests/cli/test_locales.py", "smallm/embed/js"}
    assert all((ROOT / path).exists() for path in files)


def test_a_release_needs_its_tests_and_the_tag_of_the_version():
    jobs = yaml.safe_load((WORKFLOWS / "release.yml").read_text(encoding="utf-8"))["jobs"]
    for name in ("publish-python", "publish-npm"):
        assert "tests" in jobs[name]["needs"]
        assert jobs[name]["permissions"]["id-token"] == "write"  # trusted publishing: no stored token
    assert any("smallm.__version__" in step.get("run", "") for step in jobs["tests"]["steps"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_the_npm_package():
    done = subprocess.run(["npm", "pack", "--dry-run", "--json", "--offline"], cwd=ROOT / "smallm/embed/js",
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (package,) = found if isinstance(found, list) else found.values()  # of npm 10 and of npm 11
    assert (package["name"], package["version"]) == ("smallm", __version__)
    sources = {"smallm.js", "smallm.d.ts", "smallm.cjs", "smallm.d.cts", "smallm.wasm"}
    assert {file["path"] for file in package["files"]} == sources | {"LICENSE", "README.md", "package.json"}


def build(source: Path, out: Path, target: str, **environment: str) -> Path:
    """Builds the sdist or the wheel of a source folder; returns the file."""
    pytest.importorskip("hatchling", reason="the package hatchling is not installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    environment = os.environ | environment
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.tar.gz" if target == "sdist" else "*.whl"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel that the sdist builds."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    return build(folder / f"smallm-{__version__}", folder, "wheel")


def contents(wheel: Path) -> dict[str, int]:
    """File name -> CRC of each file in a wheel, except the list of these."""
    with zipfile.ZipFile(wheel) as file:
        return {each.filename: each.CRC for each in file.infolist() if not each.filename.endswith("RECORD")}


@pytest.mark.slow
def test_contents(sdist, wheel, tmp_path):
    assert contents(wheel) == contents(build(ROOT, tmp_path, "wheel"))
    command = ["git", "ls-files", "smallm", "configs"]
    committed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert contents(wheel).keys() >= {re.sub("^configs/", "smallm/configs/", name) for name in committed}
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "train.py", "smallm/py.typed"} <= names
    for name in names | contents(wheel).keys():
        assert not re.search("node_modules|__pycache__|^tests/|^shared/|^runs/", name), name
    with zipfile.ZipFile(wheel) as file:
        text = file.read(f"smallm-{__version__}.dist-info/METADATA").decode()
    metadata = email.message_from_string(text)
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [re.match(r"\w+", line)[0] for line in required] == ["numpy", "onnxruntime", "tqdm"]


@pytest.mark.slow
def test_twine_accepts_the_packages(sdist, wheel):
    pytest.importorskip("twine", reason="the package twine is not installed")
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def smallm(site: Path, cwd: Path, *argv: str, **environment: str) -> str:
    """Runs the installed command in a folder; returns stdout."""
    code = "import sys; from smallm.cli.main import main; sys.argv[0] = 'smallm'; sys.exit(main())"
    paths = os.pathsep.join([str(site), *(path for path in sys.path if path and not (Path(path) / "smallm").is_dir())])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"} | environment
    done = subprocess.run([sys.executable, "-P", "-c", code, *argv], cwd=cwd, env=environment, capture_output=True,
                          text=True, encoding="utf-8", timeout=100, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(wheel: Path, site: Path) -> Path:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    return site


@pytest.mark.slow
def test_every_command_from_the_installed_wheel_in_an_empty_folder(wheel, tmp_path, text_file):
    site, cwd = install(wheel, tmp_path / "site"), tmp_path / "empty"
    cwd.mkdir()
    small = "--model.n_layer 1 --model.n_embd 32 --model.n_head 1 --model.block_size 32 --train.batch_size 4"
    steps = "--train.max_steps 4 --train.eval_every 4 --train.sample_length 0"
    assert smallm(site, cwd, "--version") == f"smallm {__version__}\n"
    for name in re.findall(r"^  smallm (\w+)", smallm(site, cwd, "--help"), re.MULTILINE):
        text = smallm(site, cwd, name, "--help")
        assert text.startswith(f"usage: smallm {name} ")
        assert "python" not in text.replace("python-docs", "").lower().partition("options:")[0]
    smallm(site, cwd, "train", "--config", "quickstart", "--data", str(text_file), "--out", "owls", *small.split(),
           *steps.split())  # fmt: skip
    smallm(site, cwd, "export", "owls")
    for kit, source in (("c", "smallm_kernels.h"), ("node", "smallm.wasm"), ("web", "page.js")):
        smallm(site, cwd, "export", "owls", "--kit", kit)
        assert (cwd / "owls" / f"kit-{kit}" / source).is_file()
    assert smallm(site, cwd, "infer", "--model", "owls", "--seed", "an", "--max-length", "20").startswith("an")
    assert "nats per character" in smallm(site, cwd, "infer", "--model", "owls", "--perplexity")
    assert "owls" in smallm(site, cwd, "runs", ".")
    assert "owls" in smallm(site, cwd, "show", "owls")
    smallm(site, cwd, "plot", "owls")
    assert [file.name for file in cwd.iterdir()] == ["owls"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32" or shutil.which("cc") is None, reason="there is no C compiler")
def test_a_platform_wheel_runs_the_native_engine_without_a_compiler(sdist, wheel, tmp_path, exported):
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    built = build(tmp_path / f"smallm-{__version__}", tmp_path, "wheel", SMALLM_PREBUILT="1")
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", built.name)
    changed = {name for name, crc in contents(built).items() if contents(wheel).get(name) != crc}
    assert {name for name in changed if ".dist-info/" not in name} == {"smallm/inference/smallm_native.so"}
    argv = ["infer", "--model", str(exported), "--engine", "native"]
    argv += ["--seed", "an", "--max-length", "40", "--rng-seed", "1"]
    environment = {"CC": "no-such-compiler", "SMALLM_CACHE": str(tmp_path / "cache")}
    found = smallm(install(built, tmp_path / "site"), tmp_path, *argv, **environment)
    assert found.strip("\n") == LanguageModel.load(exported).generate("an", max_length=40, rng_seed=1).strip("\n")
    assert not (tmp_path / "cache").exists()
