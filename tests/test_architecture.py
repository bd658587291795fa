"""Which way imports run: inference stands on its own feet, training on top of it, scripts and experiments above."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "diffusers_pq"
FOLDERS = {"diffusers_pq": PACKAGE, "diffusers_pq.pipelines": ROOT / "pipelines"}
SCRIPTS = ("training_scripts", "experiments", "benchmarks", "spaces")

# From the ground up: a module imports from its own floor and from those below.
FLOORS = (
    ("_versions", "_registration", "console", "devices", "files", "flags", "images", "measuring", "tables"),
    ("models",),
    ("autoencoders", "metrics"),
    (
        "photographs",
        "reconstruction",
        "compression",
        "conversion",
        "figures",
        "pipelines",
        "data",
        "data_preparation",
        "emoji",
    ),
    ("evaluation",),
    ("hub",),
    ("training", "cli"),
)


def modules():
    """Names and paths of all modules of the package."""
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def imports(path: Path, package: str = "") -> set[str]:
    """The modules that a file imports, also inside functions, as absolute names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


MODULES = dict(modules())


def package_of(name: str) -> str:
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


GRAPH = {
    name: {other for other in imports(path, package_of(name)) if other in MODULES and other != "diffusers_pq"} - {name}
    for name, path in MODULES.items()
    if name != "diffusers_pq"
}


def floor(name: str) -> int:
    part = name.split(".")[1]
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_a_module_imports_from_no_floor_above_its_own(name):
    above = {other for other in GRAPH[name] if floor(other) > floor(name)}
    assert not above, f"{name} imports {above} from above"


def test_no_import_runs_in_a_circle():
    list(TopologicalSorter(GRAPH).static_order())


def test_only_training_itself_imports_training():
    for name in GRAPH:
        if not name.startswith("diffusers_pq.training"):
            assert not [other for other in GRAPH[name] if other.startswith("diffusers_pq.training")], name
    for path in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("spaces/**/*.py"), *ROOT.glob("docs/**/*.py")]:
        assert not [other for other in imports(path) if other.startswith("diffusers_pq.training")], path


def test_nobody_imports_or_runs_a_script():
    names = {path.stem for folder in SCRIPTS[:1] for path in ROOT.glob(f"{folder}/*.py")}
    files = [*MODULES.values(), *(path for folder in SCRIPTS for path in ROOT.glob(f"{folder}/**/*.py"))]
    for path in files:
        assert not imports(path) & (names | {"runpy"}), path


def private_names(path: Path) -> set[str]:
    """Private names of other modules of the package that a file imports or reaches for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    own = [node for node in nodes if node.level or (node.module or "").startswith("diffusers_pq")]
    names = {alias.asname or alias.name for node in own for alias in node.names}
    reached = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
    }
    return {name for name in names | reached if re.search(r"(^|\.)_(?!_|versions|registration)", name)}


def test_private_names_stay_in_their_module():
    for path in [*MODULES.values(), *(path for folder in SCRIPTS for path in ROOT.glob(f"{folder}/**/*.py"))]:
        assert not private_names(path), path
