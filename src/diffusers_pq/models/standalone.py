"""A class of this package with all that it stands on as one Python file, which needs diffusers but not the package."""

import ast
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


_PACKAGE = __name__.split(".")[0]
_HEADER = """# {name} of diffusers_pq {version} in one file, made of the package's sources. Licence: Apache-2.0.
# fmt: off
# ruff: noqa
{imports}


{body}


# Where the package is installed, its own class is the one that its pipelines know.
if importlib.util.find_spec("{package}") is not None:
    {name} = importlib.import_module("{package}").{name}
"""


def standalone_code(cls: type) -> str:
    """
    The code of a class of this package and of what it imports from it, one module after the other.

    What modules import inside functions stays behind: it is what they do without where it is missing. Operators are
    registered under a name of their own, so that the file may be loaded beside the package.

    Args:
        cls (`type`): Defined in this package, such as [`PQModel`].

    Returns:
        `str`: Python code that defines the class under its name.

    Raises:
        ValueError: if two modules define the same name.
    """
    sources = {name: Path(sys.modules[name].__file__).read_text(encoding="utf-8") for name in _needed(cls.__module__)}
    _check_names(sources)
    code = _HEADER.format(
        name=cls.__name__,
        version=importlib.import_module(_PACKAGE).__version__,
        package=_PACKAGE,
        imports=_merged_imports(sources),
        body="\n\n\n".join(_body(source) for source in sources.values()),
    )
    return code.replace(f'custom_op("{_PACKAGE}::', f'custom_op("{_PACKAGE}_file::')


def _needed(module: str) -> list[str]:
    """Names of the modules of this package that one imports at its top, itself last: each after those it needs."""
    found = []
    for node in _imports(inspect.getsource(sys.modules[module])):
        other = _own_module(node, module)
        if other is not None:
            found += [name for name in _needed(other) if name not in found]
    return [*found, module]


def _imports(source: str) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom)))


def _own_module(node: ast.Import | ast.ImportFrom, importer: str) -> str | None:
    if not (isinstance(node, ast.ImportFrom) and node.level):
        return None
    return importlib.util.resolve_name("." * node.level + node.module, importer.rpartition(".")[0])


def _merged_imports(sources: dict[str, str]) -> str:
    """All imports from outside the package, each once, those of the standard library before the others."""
    plain, names = {"import importlib", "import importlib.util"}, {}
    for source in sources.values():
        for node in _imports(source):
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif not node.level:
                names.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
    lines = plain | {f"from {module} import {', '.join(sorted(found))}" for module, found in names.items()}
    return "\n".join(sorted(lines, key=_import_order))


def _import_order(line: str) -> tuple:
    module = line.split()[1]
    return module.split(".")[0] not in sys.stdlib_module_names, line.startswith("from"), module


def _body(source: str) -> str:
    last = max((node.end_lineno for node in _imports(source)), default=1)
    return "\n".join(source.splitlines()[last:]).strip()


def _check_names(sources: dict[str, str]):
    names = Counter(name for source in sources.values() for name in _defined(source))
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise ValueError(f"The modules {', '.join(sources)} cannot be one file: they share the names {twice}.")


def _defined(source: str) -> set[str]:
    """Names that a module defines at its top; of `_`, which only decorators see, there may be several."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found - {"_"}
