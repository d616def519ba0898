"""The rooms of the package: imports point down, there are no circles, and each library has its place."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "smallm"
RUNTIME_PACKAGES = {"smallm", "numpy", "onnxruntime", "tqdm"}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(module: str) -> frozenset[str]:
    """Full names of what a module imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return frozenset(found)


def room_of(module: str) -> str:
    """smallm.generation.sampler -> smallm.generation; rooms of the trainer: smallm.training.data and so on."""
    while module != "smallm" and MODULES[module].name != "__init__.py":
        parent = module.rpartition(".")[0]
        if parent in ("smallm", "smallm.training"):
            return module  # these two folders hold modules of several floors, each a room of its own
        module = parent
    return module


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def graph_of(name_of) -> dict[str, set[str]]:
    """Which nodes import which others; the root `smallm` imports its names only when they are asked for."""
    graph = {}
    for module in MODULES:
        if module != "smallm":
            others = {name_of(other) for other in imports(module) if other in MODULES and other != "smallm"}
            graph.setdefault(name_of(module), set()).update(others - {name_of(module)})
    return graph


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}}) == []


def test_modules_import_each_other_in_one_direction():
    assert circles(graph_of(lambda module: module)) == []


def test_rooms_import_each_other_in_one_direction():
    assert circles(graph_of(room_of)) == []


def test_few_modules_lie_directly_in_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def belongs(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


NOT_RUNTIME = ("smallm.training", "smallm.export", "smallm.serve.app", "smallm.serve.connection")
RUNTIME = [each for each in MODULES if each != "smallm" and not belongs(each, *NOT_RUNTIME)]


@pytest.mark.parametrize("module", RUNTIME)
def test_the_runtime_needs_only_the_base_install(module):
    for name in imports(module):
        extra = {"uvicorn"} if module == "smallm.serve.cli" else set()  # imported when the server starts
        assert name.split(".")[0] in RUNTIME_PACKAGES | sys.stdlib_module_names | extra, name
        assert not belongs(name, "smallm.training", "smallm.export"), name


def test_training_never_imports_export():
    for module in MODULES:
        if belongs(module, "smallm.training"):
            assert not any(belongs(name, "smallm.export", "onnx", "onnxruntime") for name in imports(module)), module


@pytest.mark.parametrize(
    ("library", "places"),
    [("onnxruntime", ["smallm.inference.session"]), ("onnx", ["smallm.export"]), ("accelerate", ["smallm.training"]),
     ("torch", ["smallm.training", "smallm.export"]), ("starlette", ["smallm.serve"]), ("uvicorn", ["smallm.serve"])],
)  # fmt: skip
def test_each_library_has_its_place(library, places):
    importers = [module for module in MODULES if any(belongs(name, library) for name in imports(module))]
    assert importers
    assert all(belongs(module, *places) for module in importers), importers


def test_tests_mirror_the_rooms():
    rooms = {file.parent.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py")}
    others = {Path(name) for name in ("docs", "benchmarks", "examples", "embed", "language_model")}
    for file in (ROOT / "tests").rglob("test_*.py"):
        folder = file.parent.relative_to(ROOT / "tests")
        assert folder in rooms | others | {Path()}, file
