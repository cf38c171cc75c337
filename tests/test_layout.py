"""The shape of the repository: what is packaged, which way imports point, what an import costs, and that nothing clashes."""

import ast
import doctest
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folder: the folders it may import from.
ARROWS = {
    "diagnostics": set(),
    "hooks": {"diagnostics"},
    "analysis": {"diagnostics"},
    "cli": {"analysis", "diagnostics", "examples", "hooks"},
    "examples": {"analysis", "diagnostics", "hooks"},
}
# Inside a folder: room → the rooms that its files may lead to, by any number of imports.
ROOMS = {
    "diagnostics": {
        "spectra": set(),
        "newton_schulz": {"spectra"},
        "quantities": {"newton_schulz", "spectra"},
        "store": {"spectra"},
        "schedules": {"newton_schulz", "spectra", "store"},
    },
    "hooks": {
        "adapters": set(),
        "watching": {"adapters"},
        "observing": {"adapters", "watching"},
        "ranks": {"adapters", "observing", "watching"},
        "recording": {"adapters", "observing", "ranks", "watching"},
        "curvature": {"adapters", "observing", "ranks", "recording", "watching"},
        "acting": {"adapters", "curvature", "observing", "ranks", "recording", "watching"},
        "trainers": {"adapters", "curvature", "observing", "ranks", "recording", "watching"},
    },
    "analysis": {"studies": set(), "findings": {"studies"}, "report": {"findings", "studies"}},
}
FILES = sorted(path.relative_to(ROOT) for folder in ARROWS for path in (ROOT / folder).rglob("*.py"))
MODULES = [".".join(("optiscope", *path.with_suffix("").parts)).removesuffix(".__init__") for path in FILES]


def setuptools():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_folder_with_code_is_packaged():
    folders = {path.parent for path in FILES}
    assert sorted(setuptools()["packages"]) == sorted(".".join(("optiscope", *folder.parts)) for folder in folders)
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


def test_every_package_is_its_folder():
    assert setuptools()["package-dir"] == {f"optiscope.{folder}": folder for folder in ARROWS}
    # A namespace: with a package of that name the folders could not be mapped into it.
    assert not (ROOT / "optiscope").exists()
    for module, path in zip(MODULES, FILES, strict=True):
        assert Path(find_spec(module).origin) == ROOT / path


def imports(path):
    """(level, first absolute part or folder it resolves to) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield 0, node.module
        elif isinstance(node, ast.ImportFrom):
            package = ("optiscope", *path.parent.parts)
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, ".".join((*base, name))) for name in names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    own = path.parts[0]
    for _, name in imports(path):
        parts = name.split(".")
        if parts[0] == "optiscope":
            assert parts[1] in ARROWS[own] | {own}


def imported_files(path):
    """The repository's files that a file imports, for types too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = Path(*path.parent.parts[: len(path.parent.parts) - node.level + 1], *(node.module or "").split("."))
            for alias in node.names:
                candidates = (
                    folder / f"{alias.name}.py",
                    folder / alias.name / "__init__.py",
                    folder.with_suffix(".py"),
                    folder / "__init__.py",
                )
                found = next((file for file in candidates if (ROOT / file).exists()), None)
                assert found is not None, (path, alias.name)
                if found != path:
                    yield found


GRAPH = {path: set(imported_files(path)) for path in FILES if path.parts[0] != "examples"}


def test_no_circle_of_files():
    """Type-only imports included: what two files know of each other belongs into one, or into a third."""
    TopologicalSorter(GRAPH).prepare()  # a CycleError names the circle


def test_a_circle_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "hooks" / "inner").mkdir(parents=True)
    (tmp_path / "hooks" / "__init__.py").write_text("from .x import a")
    (tmp_path / "hooks" / "x.py").write_text("def f():\n  from .inner import y")
    (tmp_path / "hooks" / "inner" / "__init__.py").write_text("")
    (tmp_path / "hooks" / "inner" / "y.py").write_text("if TYPE_CHECKING:\n  from ..x import a")
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")]
    with pytest.raises(CycleError) as circle:
        TopologicalSorter({path: set(imported_files(path)) for path in files}).prepare()
    assert set(circle.value.args[1]) == {Path("hooks/x.py"), Path("hooks/inner/y.py")}


@pytest.mark.parametrize(("folder", "room"), [(folder, room) for folder, rooms in ROOMS.items() for room in rooms])
def test_rooms_lead_one_way(folder, room):
    reached = {path for path in GRAPH if path.parts[:2] == (folder, room)}
    assert reached
    front = reached
    while front := {file for path in front for file in GRAPH[path] if file.parts[0] == folder} - reached:
        reached |= front
    assert {path.parts[1] for path in reached if len(path.parts) > 2} - {room} <= ROOMS[folder][room]


def test_every_room_is_in_the_table():
    found = {(path.parts[0], path.parts[1]) for path in GRAPH if len(path.parts) > 2 and path.parts[0] != "cli"}
    assert found == {(folder, room) for folder, rooms in ROOMS.items() for room in rooms}


def private_names(tree):
    """Names with one underscore that a file's classes give to their objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in ast.walk(node):
                name = inner.name if isinstance(inner, ast.FunctionDef) else inner.attr if is_own(inner) else ""
                if name.startswith("_") and not name.startswith("__"):
                    yield name


def is_own(node):
    """Whether it is an attribute of `self` or `cls`."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


OF_TUPLES = {"_asdict", "_fields", "_replace"}  # public in a NamedTuple


def test_nothing_reaches_a_private_name_of_another_file():
    trees = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in GRAPH}
    own = {path: set(private_names(tree)) for path, tree in trees.items()}
    reached = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            others = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not is_own(node) and node.attr not in OF_TUPLES
            if others and any(node.attr in names for other, names in own.items() if other != path):
                reached.append((str(path), node.lineno, ast.unparse(node)))
    assert reached == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_inside_are_relative(path):
    for level, name in imports(path):
        # A bare `hooks` would be the user's own.
        assert name.split(".")[0] not in ARROWS
        # Examples are there to be copied: they import what a user imports.
        assert level > 0 or not name.startswith("optiscope") or path.parts[0] == "examples"


def test_the_arrows_would_be_seen(tmp_path, monkeypatch):
    """The reading of imports itself, on every form that an import can take."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "hooks").mkdir()
    text = "import a, optiscope.cli as b\nfrom optiscope.cli import c\ndef f():\n  from ..analysis.run import d\n  from .. import cli\n  from . import e"
    (tmp_path / "hooks" / "x.py").write_text(text)
    assert sorted(imports(Path("hooks/x.py"))) == [
        (0, "a"), (0, "optiscope.cli"), (0, "optiscope.cli"), (1, "optiscope.hooks.e"), (2, "optiscope.analysis.run"), (2, "optiscope.cli"),
    ]  # fmt: skip


def loaded_by(code, **options):
    """Names of the modules that are loaded after `code` in a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-c", f"import sys; {code}; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout.split())


PLOTTING = {"matplotlib", "seaborn", "pandas"}
COSTS = {
    # What is imported, what must come with it, what must not.
    "import optiscope.hooks": ({"torch"}, PLOTTING | {"xarray", "typer", "rich", "scipy"}),
    "import optiscope.analysis": ({"optiscope.analysis"}, PLOTTING | {"torch", "xarray", "typer", "zarr", "numpy"}),
    "import optiscope.cli": ({"typer"}, PLOTTING | {"torch", "xarray", "zarr", "numpy"}),
    "import " + ", ".join(m for m in MODULES if ".diagnostics" in m): ({"numpy"}, PLOTTING | {"torch", "xarray", "typer", "zarr", "scipy"}),
    "import " + ", ".join(m for m in MODULES if ".analysis" in m): (PLOTTING | {"xarray"}, {"torch", "typer", "rich"}),
}


@pytest.mark.parametrize("code", COSTS, ids=lambda code: code[:40])
def test_an_import_loads_no_more_than_it_needs(code):
    needed, unwanted = COSTS[code]
    modules = loaded_by(code)
    assert needed <= modules
    assert not unwanted & modules


def test_a_users_own_packages_of_the_same_names_do_not_clash(tmp_path):
    for folder in ARROWS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("mine = True")
    names = ", ".join(ARROWS)
    code = f"import {names}; assert all(m.mine for m in ({names}))"
    ours = "; ".join(f"import optiscope.{folder}" for folder in ("diagnostics", "analysis", "cli"))
    assert {"hooks", "optiscope.analysis"} <= loaded_by(f"{code}; {ours}", cwd=tmp_path)
    assert {"hooks", "optiscope.analysis"} <= loaded_by(f"{ours}; {code}", cwd=tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name):
    assert doctest.testmod(import_module(name)).failed == 0


def test_there_are_examples_in_docstrings():
    found = sum(len(test.examples) for name in MODULES for test in doctest.DocTestFinder().find(import_module(name)))
    assert found > 10


def public_order(name):
    """Constants, then classes, then functions, each by name."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("folder", ["diagnostics", "hooks", "analysis", "cli"])
def test_the_public_names_are_complete_sorted_and_there(folder):
    package = import_module(f"optiscope.{folder}")
    assert package.__all__ == sorted(set(package.__all__), key=public_order)
    assert all(hasattr(package, name) for name in package.__all__)
    # Whatever the package's file imports from its own modules, it means to be used; modules themselves (`diag`'s commands) register.
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level and (node.module or folder != "cli")
        for alias in node.names
    }
    assert imported <= set(package.__all__)
    assert {name for name in package.__all__ if not name.isupper()} <= imported


def test_a_file_is_one_idea():
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > 350} == {}
