"""Makes mkdocstrings read this package: lazy public names, its layout on disk, docstrings in diffusers' style."""

import re
from pathlib import Path

import griffe

import diffusers_pq


ROOT = Path(__file__).parent.parent.parent
PACKAGE = "diffusers_pq"

# [`Name`] and [`~path.to.Name`]
_LINK = re.compile(r"\[`(~?)([\w.]+)`\]")
# What diffusers writes between the brackets of `name (...)`: a type, then details, some of which the signature tells.
_TYPE = re.compile(r"`[^`]+`(?:\[[^\]]*\])?(?: or (?:`[^`]+`|a? ?tuple))*,? ?")
_IN_SIGNATURE = re.compile(r",? ?\*optional\*|,? ?defaults to (?:`[^`]*`|[^\s,]+)")
_LINKED = re.compile(r"\[(`[^`]+`)\]\[[^\]]*\]")
_SHAPED = re.compile(r"^`[^`]+` of shape")
# A parameter whose type says all; griffe wants the colon.
_UNDESCRIBED = re.compile(r"^( {4}\w+ \((?:\[?`|\*optional).*\))$", re.MULTILINE)
# Parameters that share a description; griffe wants one each.
_SHARED = re.compile(r"^ {4}(\w+(?:, \w+)+)( \(.*?\))?:(.*(?:\n {8}.*)*)$", re.MULTILINE)


class DiffusersDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs):
        if pkg.path != PACKAGE:
            return
        _add_pipelines(pkg, loader)
        objects = dict(_walk(pkg))
        for obj in objects.values():
            if obj.docstring:
                obj.docstring.value = _as_google(_link(obj, objects))
                _tidy(obj)
        for name, module in diffusers_pq._PUBLIC.items():
            if module.startswith("."):
                pkg.set_member(name, griffe.Alias(name, f"{PACKAGE}{module}.{name}"))


def _add_pipelines(pkg: griffe.Module, loader: griffe.GriffeLoader):
    """setup.py maps `diffusers_pq.pipelines` to a folder outside the package's."""
    folder = ROOT / "pipelines"
    package = _visit("pipelines", folder / "__init__.py", pkg, loader)
    for path in sorted(folder.glob("[!_]*.py")):
        _visit(path.stem, path, package, loader)


def _visit(name: str, path: Path, parent: griffe.Module, loader: griffe.GriffeLoader) -> griffe.Module:
    module = griffe.visit(
        name,
        path,
        path.read_text(encoding="utf-8"),
        extensions=loader.extensions,
        parent=parent,
        docstring_parser=loader.docstring_parser,
        docstring_options=loader.docstring_options,
        lines_collection=loader.lines_collection,
        modules_collection=loader.modules_collection,
    )
    parent.set_member(name, module)
    return module


def _walk(obj: griffe.Object):
    yield obj.path, obj
    for member in list(obj.members.values()):
        if not member.is_alias:
            yield from _walk(member)


def _link(obj: griffe.Object, objects: dict[str, griffe.Object]) -> str:
    """The docstring with links for names of this package; others, diffusers' say, stay code."""

    def replace(match: re.Match) -> str:
        short, name = match.groups()
        path = _resolve(name, obj, objects)
        shown = name.rpartition(".")[2] if short else name
        return f"[`{shown}`][{path}]" if path else f"`{shown}`"

    return _LINK.sub(replace, obj.docstring.value)


def _as_google(text: str) -> str:
    return _UNDESCRIBED.sub(r"\1:", _SHARED.sub(_one_by_one, text))


def _one_by_one(match: re.Match) -> str:
    names, brackets, description = match.groups(default="")
    return "\n".join(f"    {name}{brackets}:{description}" for name in names.split(", "))


def _resolve(name: str, obj: griffe.Object, objects: dict[str, griffe.Object]) -> str | None:
    """The path of a name as seen from an object, its class, its module or the whole package."""
    scope = obj
    while scope is not None:
        if f"{scope.path}.{name}" in objects:
            return f"{scope.path}.{name}"
        scope = scope.parent
    return next((path for path in objects if f".{path}".endswith(f".{name}")), None)


def _tidy(obj: griffe.Object):
    """Types are taken from the signature if it has them; other details, shapes above all, go to the text."""
    for section in obj.docstring.parsed:
        for item in section.value if isinstance(section.value, list) else ():
            if isinstance(item.annotation, str):
                _move_details(item, obj)
            else:
                item.description = _SHAPED.sub("Of shape", item.description)


def _move_details(item, obj: griffe.Object):
    annotation = _IN_SIGNATURE.sub("", _LINKED.sub(r"\1", item.annotation))
    details = _TYPE.sub("", annotation, count=1).strip(" ,")
    if details:
        item.description = f"{details[0].upper()}{details[1:]}. {item.description}"
    item.annotation = _signature_annotation(item, obj) or annotation.removesuffix(details).replace("`", "").strip(" ,")


def _signature_annotation(item, obj: griffe.Object):
    if isinstance(item, griffe.DocstringParameter):
        found = [parameter for parameter in obj.parameters if parameter.name.lstrip("*") == item.name]
        return found[0].annotation if found else None
    if isinstance(item, griffe.DocstringReturn):
        return obj.annotation if obj.is_attribute else obj.returns
    return None
