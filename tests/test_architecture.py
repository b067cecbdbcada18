"""The house rules: who imports whom, how long a file may be, what has a docstring, what is packaged."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import flexattn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
# Where each top-level folder is installed; a longer prefix would be a folder inside it.
INSTALLED = {
    "flexattn": "flexattn",
    "codegen": "flexattn.codegen",
    "templates": "flexattn.templates",
    "command": "flexattn_command",
    "plugins": "flexattn_plugins",
}
SOURCES = sorted(path.relative_to(ROOT) for folder in INSTALLED for path in (ROOT / folder).rglob("*.py"))
USERS = sorted(
    path.relative_to(ROOT)
    for folder in ("tests", "examples", "benchmarks", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)
FOLDERS = (*INSTALLED, "tests", "examples", "benchmarks", "scripts", "docs", ".ci")
MAX_LINES = 400
# Attributes of tensors that no documentation promises.
TENSOR_INTERNALS = ("_version", "_base", "_local_tensor", "_spec", "_is_view", "_typed_storage")
# Folders of one machine. A slash or a letter before it makes it part of a longer path or an address.
MACHINE_PATH = re.compile(r"(?<![\w./~*-])/(?:home|root|work|Users|tmp|opt|mnt|srv)/\w[\w./-]*|\b[A-Z]:\\Users\\\w+")


def imports(source: str, path: Path) -> Iterator[str]:
    """The absolute name of every import in a file, also of those inside functions: `from .ir import Node` in
    codegen/trace.py is flexattn.codegen.ir.Node."""
    folder = [INSTALLED[path.parts[0]], *path.parts[1:-1]]
    package = ".".join(folder).split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def standard(name: str) -> bool:
    """In the standard library, less importlib, which would go round these rules."""
    return name.split(".")[0] in sys.stdlib_module_names - {"importlib"}


def refused(source: str, path: Path) -> list[str]:
    """The imports that the file's folder may not have."""
    allowed = {
        "flexattn": ("flexattn", "torch", "triton", "importlib"),
        "codegen": ("flexattn.codegen", "torch", "triton", "sympy"),
        "templates": ("flexattn.templates", "triton"),
        "command": ("flexattn_command", "flexattn", "torch", "importlib"),
        "plugins": ("pytest", "flexattn.testing", "torch"),
    }[path.parts[0]]
    if path == Path("codegen/ir.py"):
        allowed = ()
    if path.parts[:2] == ("flexattn", "testing"):
        allowed = (*allowed, "hypothesis")
    if path == Path("flexattn/__main__.py"):
        allowed = ("flexattn_command",)
    if path == Path("codegen/private.py"):
        allowed = (*allowed, "importlib")  # of torch's own modules, by their names
    return [name for name in imports(source, path) if not standard(name) and not within(name, *allowed)]


def absolute_to_own_package(source: str, path: Path) -> list[int]:
    """Lines that name the package the folder is installed in, where a relative import belongs; flexattn itself may."""
    if path.parts[0] == "flexattn":
        return []
    own = INSTALLED[path.parts[0]].split(".")[0]
    nodes = ast.walk(ast.parse(source))
    return [
        node.lineno
        for node in nodes
        if (isinstance(node, ast.Import) and any(within(alias.name, own) for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and not node.level and within(node.module or "", own))
    ]


def machine_paths(text: str) -> list[str]:
    return MACHINE_PATH.findall(text)


def documented(thing: object) -> bool:
    """Whether somebody wrote a docstring: dataclass and NamedTuple make one up, and a class inherits one."""
    text = vars(thing).get("__doc__") if isinstance(thing, type) else inspect.getdoc(thing)
    name = getattr(thing, "__name__", "")
    return bool(text and text.strip()) and not text.startswith(f"{name}(")


def public_things() -> Iterator[tuple[str, object]]:
    for name in flexattn.__all__:
        thing = getattr(flexattn, name)
        yield f"flexattn.{name}", thing
        if isinstance(thing, ModuleType):
            yield from ((f"flexattn.{name}.{inner}", getattr(thing, inner)) for inner in thing.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_run_one_way(path: Path) -> None:
    source = (ROOT / path).read_text()
    assert refused(source, path) == []
    assert absolute_to_own_package(source, path) == []


@pytest.mark.parametrize(
    ("path", "line", "name"),
    [
        ("codegen/trace.py", "from ..api import flex_attention", "flexattn.api.flex_attention"),
        ("codegen/trace.py", "from .. import masks", "flexattn.masks"),
        ("codegen/trace.py", "def f():\n    import flexattn.ops", "flexattn.ops"),
        ("codegen/jit.py", "from ..templates import forward", "flexattn.templates.forward"),
        ("codegen/jit.py", "import templates.forward", "templates.forward"),
        ("codegen/ir.py", "import torch", "torch"),
        ("codegen/ir.py", "from .errors import ProgramError", "flexattn.codegen.errors.ProgramError"),
        ("codegen/jit.py", "import importlib", "importlib"),
        ("templates/forward.py", "import torch.nn", "torch.nn"),
        ("templates/forward.py", "from ..codegen import ir", "flexattn.codegen.ir"),
        ("flexattn/api.py", "from codegen.trace import trace", "codegen.trace.trace"),
        ("flexattn/backends/tiled.py", "import numpy", "numpy"),
        ("flexattn/explain.py", "import sympy", "sympy"),
        ("flexattn/api.py", "import hypothesis", "hypothesis"),
        ("flexattn/testing/leaks.py", "import pytest", "pytest"),
        ("plugins/pytest_plugin.py", "import flexattn.api", "flexattn.api"),
        ("flexattn/api.py", "import flexattn_command.main", "flexattn_command.main"),
        ("flexattn/__main__.py", "from .api import flex_attention", "flexattn.api.flex_attention"),
        ("command/info.py", "import triton", "triton"),
        ("command/check.py", "import flexattn_plugins", "flexattn_plugins"),
    ],
)
def test_a_forbidden_import_is_seen(path: str, line: str, name: str) -> None:
    assert refused(line, Path(path)) == [name]


def test_an_absolute_import_of_the_own_package_is_seen() -> None:
    assert absolute_to_own_package("from flexattn.codegen.ir import Node", Path("codegen/trace.py")) == [1]
    assert absolute_to_own_package("import math\nimport flexattn.codegen", Path("codegen/trace.py")) == [2]
    assert absolute_to_own_package("from flexattn_command import main", Path("command/info.py")) == [1]
    assert absolute_to_own_package("from flexattn.masks import causal_mask", Path("command/info.py")) == []


def test_every_module_can_be_imported() -> None:
    for path in SOURCES:
        folder = ".".join([INSTALLED[path.parts[0]], *path.parts[1:-1]])
        importlib.import_module(folder if path.stem == "__init__" else f"{folder}.{path.stem}")


def test_parts_that_few_programs_need_are_loaded_when_they_are_named() -> None:
    program = (
        "import sys, flexattn\n"
        "parts = ['config', 'integrations', 'testing', 'tuning_cache']\n"
        "print('flexattn.testing' in sys.modules, set(parts) <= set(dir(flexattn)))\n"
        "print(*(getattr(flexattn, part).__name__ for part in parts), hasattr(flexattn, 'gone'))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == (
        "False True\nflexattn.config flexattn.integrations flexattn.testing flexattn.tuning_cache False\n"
    )


def test_no_file_is_longer_than_400_lines() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_file_opens_with_its_purpose(path: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_is_evaluated_or_executed(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    # jit.py executes what emit.py printed, and nothing else.
    allowed = {"exec", "compile"} if path == Path("codegen/jit.py") else set()
    assert names & {"eval", "exec", "compile", "__import__"} == allowed


def private_names(source: str) -> list[str]:
    """What a file reads from PyTorch under a name with a leading underscore, dunders aside."""
    private = re.compile(r"^_(?!_)")
    found = []
    tree = ast.parse(source)
    roots = {"torch", "Tensor"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and within(node.module or "", "torch"):
            found += [f"{node.module}.{alias.name}" for alias in node.names if _hidden(f"{node.module}.{alias.name}")]
            roots |= {alias.asname or alias.name for alias in node.names if alias.name[0].islower()}
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if within(alias.name, "torch") and _hidden(alias.name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private.match(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if (isinstance(root, ast.Name) and root.id in roots) or node.attr in TENSOR_INTERNALS:
                found.append(ast.unparse(node))
    return found


def _hidden(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_private_pytorch_is_touched_in_one_place(path: Path) -> None:
    found = private_names((ROOT / path).read_text())
    assert bool(found) == (path == Path("codegen/private.py")), found


def test_private_pytorch_is_seen() -> None:
    for line in (
        "from torch._ops import HigherOrderOperator",
        "import torch.utils._pytree as pytree",
        "from torch.utils import _pytree",
        "torch._C.f()",
        "torch.autograd.forward_ad._current_level",
        "tensor._version",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
    ):
        assert private_names(line), line
    assert private_names("import torch\ntorch.__version__\nself._cache.x\nmask._version_of") == []


def stale_names(source: str) -> list[str]:
    """What a script takes from our modules and they do not have. Scripts run as programs are imported by no test."""
    tree, found, modules = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or not within(node.module or "", *INSTALLED.values()):
            continue
        module = importlib.import_module(str(node.module))
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if not hasattr(module, alias.name) and hasattr(module, "__path__") and importlib.util.find_spec(name):
                importlib.import_module(name)
            if not hasattr(module, alias.name):
                found.append(name)
            value = getattr(module, alias.name, None)
            if isinstance(value, ModuleType):
                modules[alias.asname or alias.name] = value
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and isinstance(node.ctx, ast.Load):
            module = modules.get(node.value.id) if node.value.id not in bound else None
            if module is not None and not hasattr(module, node.attr):
                found.append(f"{module.__name__}.{node.attr}")
    return found


@pytest.mark.parametrize("path", USERS, ids=str)
def test_what_is_taken_from_our_modules_is_there(path: Path) -> None:
    assert not stale_names((ROOT / path).read_text(encoding="utf-8"))


def test_a_name_that_was_moved_is_seen() -> None:
    source = "from flexattn.backends import gone, launch\nfrom flexattn.api import Gone\nlaunch.gone()\nlaunch.choose\n"
    assert stale_names(source) == ["flexattn.backends.gone", "flexattn.api.Gone", "flexattn.backends.launch.gone"]


@pytest.mark.parametrize("thing", [pytest.param(thing, id=name) for name, thing in public_things()])
def test_every_public_name_has_a_docstring(thing: object) -> None:
    assert documented(thing)


def test_a_missing_docstring_is_seen() -> None:
    def bare() -> None: ...

    class Inherits(ModuleType): ...

    class Made(NamedTuple):
        x: int

    assert [documented(thing) for thing in (bare, Inherits, Made, documented)] == [False, False, False, True]


def test_no_file_names_a_folder_of_one_machine() -> None:
    suffixes = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".in", ""}
    paths = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    files = [path for path in paths if path.suffix in suffixes and path.is_file()]
    found = {str(path.relative_to(ROOT)): hits for path in files if (hits := machine_paths(path.read_text()))}
    assert found == {}


def test_a_folder_of_one_machine_is_seen() -> None:
    for folder in ("home", "root", "tmp", "Users"):
        assert machine_paths(f'open("/{folder}/me/x.py")') == [f"/{folder}/me/x.py"]
    assert machine_paths("https://example.org/work/of/others ~/tmp/x docs/tmp/y") == []


def test_every_source_folder_is_packaged() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setuptools["packages"]) == set(setuptools["package-dir"])
    packaged = {Path(folder) for folder in setuptools["package-dir"].values()}
    assert {path.parent for path in SOURCES} == packaged


def test_no_test_folder_repeats_the_name_of_a_source_folder() -> None:
    assert not [path for path in (ROOT / "tests").rglob("*") if path.is_dir() and path.name in INSTALLED]


def test_the_version_is_that_of_the_installed_package() -> None:
    assert importlib.metadata.version("flexattn") == flexattn.__version__
